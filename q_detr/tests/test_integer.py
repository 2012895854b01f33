"""Students whose products run on integers: equal to the simulation, in onnxruntime too, or refused with the reason."""

import onnx
import pytest
import torch

from common.quant.integer_onnx import IntegerConv2d, IntegerLinear, Operand
from common.quant.lsq import LSQQuantizer
from q_detr.detr import DETR
from q_detr.export import OUTPUTS, SIZES, Deployed, example, export_onnx, onnx_differences
from q_detr.integer import IntegerAttention, why_not_integer
from q_detr.quantized_detr import calibrate_student, quantize_detr
from q_detr.smca import SMCADETR
from q_detr.tests.test_export import real, student

WHOLE = {
    "quantizer": "lsq",
    "act_granularity": "per_tensor",
    "weight_init": "per_channel",
}  # outputs with steps of their own


@pytest.mark.parametrize(
    "options",
    [{"bits": 8}, {"bits": 4, "da": "co_attn"}, {"bits": 2}, {"bits": 8, "quantizer": "released"},
     {"bits": 4, "quantize_proj_inputs": False}, {"bits": 4, "attention_bits": 32}, {"bits": 4, "parts": ["decoder_mlp"]}],
)  # fmt: skip
@torch.no_grad()
def test_integers_give_what_the_simulation_gives(options):
    network = student(**(WHOLE | options)).double()  # in float32 a value between two codes may take the other one
    images, mask = example(SIZES[1])
    expected, deployed = network(images.double(), mask), Deployed(network, form="integer")
    assert not any(isinstance(m, LSQQuantizer) for m in deployed.modules())
    for found, name in zip(deployed(images.double(), mask), OUTPUTS, strict=True):
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-6)
    assert any(isinstance(m, LSQQuantizer) for m in network.modules())  # the network itself is left alone


@torch.no_grad()
def test_every_product_of_an_8_bit_student_runs_on_integers():
    deployed = Deployed(student(bits=8, **WHOLE), form="integer")
    found = list(deployed.modules())
    attentions = [m for m in found if isinstance(m, IntegerAttention)]
    layers = [m for m in found if isinstance(m, IntegerLinear | IntegerConv2d)]
    # 4 convolutions; 3 attentions with 4 projections, but for the value of the first, whose input is 0; 2 x 2 of the MLPs
    assert len(attentions) == 3 and len(layers) == 4 + 3 * 4 - 1 + 2 * 2 and deployed.products == len(layers) + 2 * 3
    assert all(isinstance(getattr(a, x), Operand) for a in attentions for x in "qkav")
    assert all(m.weight.dtype == torch.int8 for m in layers)
    assert [a.q.left for a in attentions] == [True] * 3 and [a.k.left for a in attentions] == [False] * 3


@pytest.mark.parametrize("kind", ["detr", "smca"])
def test_onnxruntime_computes_the_integers_at_any_size(kind, tmp_path):
    network = quantize_detr(real(DETR if kind == "detr" else SMCADETR), bits=8, **WHOLE)
    calibrate_student(network, *example(SIZES[0]))
    said = export_onnx(network, tmp_path / "model.onnx", form="integer")
    assert "products on integers" in said
    for row in onnx_differences(network, tmp_path / "model.onnx"):
        assert max(row[n][1] for n in OUTPUTS) < 0.02, row
    graph = onnx.load(tmp_path / "model.onnx").graph
    kinds = [n.op_type for n in graph.node]
    assert kinds.count("MatMulInteger") >= 4 + 11 + 4 + 6
    stored = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2]
    assert len(stored) >= 4 + 11 + 4 and all(len(t.raw_data) == t.dims[0] * t.dims[1] for t in stored)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"quantizer": "lsqplus"}, "real offset.*quantizer=lsqplus"), ({"bits": 32}, "bits=32"),
     ({"act_granularity": "per_channel"}, "step per channel.*per_tensor")],
)  # fmt: skip
def test_what_cannot_run_on_integers_says_why(options, reason):
    network = student(**({"bits": 8} | WHOLE | options))
    assert why_not_integer(network) is not None
    with pytest.raises(ValueError, match=reason):
        Deployed(network, form="integer")
    with pytest.raises(ValueError, match="format='int8', allowed: simulated, qdq, integer"):
        Deployed(network, form="int8")
