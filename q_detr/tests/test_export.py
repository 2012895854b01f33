"""ONNX against PyTorch, packed weights against float weights."""

import onnx
import pytest
import torch
from omegaconf import OmegaConf

from common.onnx_export import read_about
from common.quant.integer_onnx import StoredWeight
from common.quant.lsq import LSQQuantizer
from common.quant.packed_weights import payload
from q_detr.checkpoint import load
from q_detr.detr import DETR, Attention
from q_detr.export import (
    OUTPUTS,
    SIZES,
    Deployed,
    FixedQuantizer,
    example,
    export,
    export_onnx,
    onnx_differences,
)
from q_detr.packing import pack, quantised_weights, unpack
from q_detr.quantized_detr import calibrate_student, quantize_detr
from q_detr.smca import SMCADETR

MODEL = {
    "kind": "detr", "backbone": "tiny", "queries": 5, "dim": 16, "heads": 2, "ffn": 24, "encoder_layers": 1, "decoder_layers": 1,
    "dropout": 0.0,
}  # fmt: skip


def real(cls=DETR, seed=0, **options):
    torch.manual_seed(seed)
    network = cls(num_classes=3, **{k: v for k, v in {**MODEL, **options}.items() if k != "kind"}).eval()
    with torch.no_grad():  # biases of 0 would leave the decoder's content at 0
        for p in network.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    return network


def student(seed=0, **options):
    network = quantize_detr(real(seed=seed), **options)
    calibrate_student(network, *example(SIZES[0]))
    return network.eval()


def test_a_real_valued_graph_is_the_network_at_any_size(tmp_path):
    network = real(SMCADETR)
    assert export_onnx(network, tmp_path / "smca.onnx", form="qdq") == ""
    for row in onnx_differences(network, tmp_path / "smca.onnx"):
        assert max(row[n][0] for n in OUTPUTS) < 1e-4
    sizes = [len(s) for s in SIZES]
    assert sizes[0] != sizes[1] and all(len(set(s)) > 1 for s in SIZES)  # other batch, other size, padding in both


@pytest.mark.parametrize("quantizer", ["lsqplus", "lsq", "released"])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("form", ["simulated", "qdq"])
@torch.no_grad()
def test_what_is_traced_equals_the_student(quantizer, granularity, form):
    network = student(bits=8, quantizer=quantizer, act_granularity=granularity, zp_init="official")
    images, expected = example(SIZES[1]), network(*example(SIZES[1]))
    deployed = Deployed(network, form=form)
    assert not any(isinstance(m, LSQQuantizer) for m in deployed.modules())
    for found, name in zip(deployed(*images), OUTPUTS, strict=True):
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-5)
    assert any(isinstance(m, LSQQuantizer) for m in network.modules())  # the network itself is left alone


def test_a_zero_point_that_8_bits_cannot_hold_stays_a_float_operation():
    q = LSQQuantizer(8, "activation", signed=False, zero_point="integer").train()
    x = torch.rand(2, 7)
    q(x)
    with torch.no_grad():
        q.zero_point.fill_(-3.0)
        fixed = FixedQuantizer(q.eval(), qdq=True)
        assert not fixed.qdq and torch.equal(fixed(x), q(x))
        q.zero_point.fill_(3.0)
        assert FixedQuantizer(q, qdq=True).qdq and not FixedQuantizer(q, qdq=False).qdq


@torch.no_grad()
def test_packed_weights_are_the_weights_bit_for_bit_at_their_real_size(tmp_path):
    network = student(bits=3, da="both")
    file = pack(network)
    images = example(SIZES[0])
    expected = network(*images)
    again = unpack(student(seed=7, bits=3, da="both"), file)(*images)
    assert all(torch.equal(again[k], expected[k]) for k in (*OUTPUTS, "co_attended"))
    weights = quantised_weights(network)
    names = {n.rpartition(".")[2] for n in weights}
    assert names == {"weight", "in_proj_weight"} and len(weights) == 4 + 3 * 2 + 2 * 2
    for name, (_, weight, q) in weights.items():
        assert file["packed"][name].numel() == -(-weight.numel() * q.bits // 8) and name not in file["rest"]
    assert {q.bits for *_, q in weights.values()} == {3, 8}
    coded = sum(-(-w.numel() * q.bits // 8) for _, w, q in weights.values())
    flags = 2 * sum(isinstance(m, LSQQuantizer) for m in network.modules())
    real_valued = sum(p.numel() for p in network.parameters()) - sum(w.numel() for _, w, _ in weights.values())
    assert payload(file) == coded + 4 * real_valued + flags  # to the byte: steps are among the real ones
    assert not torch.equal(
        unpack(student(seed=7, bits=3, da="both"), file).class_embed.weight, real(seed=7).class_embed.weight
    )


def test_a_checkpoint_becomes_a_graph_with_two_nodes_per_8_bit_quantiser_and_a_packed_file(tmp_path, capsys):
    quant = {"bits": 4, "da": "co_attn", "zp_init": "lsqplus"}
    network = student(**quant)
    config = {"model": MODEL, "method": {"quantised": True, "quant": quant}, "seed": 0, "data": {"name": "scenes"}}
    about = {"classes": ["a", "b", "c"], "num_classes": 3, "normalise": {"mean": [0.5], "std": [2]}}
    torch.save({"model": network.state_dict(), "config": config, "about": about}, tmp_path / "last.ckpt")
    options = {
        "weights": tmp_path / "last.ckpt",
        "out": str(tmp_path / "model.v1.onnx"),
        "format": "qdq",
        "tolerance": None,
    }
    assert export(OmegaConf.create(options)) == tmp_path / "model.v1.onnx"  # ValueError if onnxruntime disagrees
    assert read_about(tmp_path / "model.v1.onnx") == about
    out = capsys.readouterr().out
    eight = sum(isinstance(m, LSQQuantizer) and m.bits == 8 and m.kind == "activation" for m in network.modules())
    assert eight == 13  # 3 attentions x q, k, a, v, and the input of the stem
    assert f"{eight} of 31 quantisers" in out and "outputs equal" in out and "standard deviation" in out
    graph = onnx.load(tmp_path / "model.v1.onnx").graph
    kinds = [n.op_type for n in graph.node]
    assert (
        kinds.count("QuantizeLinear") == eight and kinds.count("DequantizeLinear") == eight + 1
    )  # and the stem's weight
    axes = {a.i for n in graph.node if n.op_type == "QuantizeLinear" for a in n.attribute if a.name == "axis"}
    assert axes == {1}  # heads of (B, heads, tokens, d), channels of (B, C, H, W)
    constants = [onnx.numpy_helper.to_array(t) for t in graph.initializer]
    (stem,) = [c for c in constants if c.shape == network.backbone[0].body.layers[0].weight.shape]
    assert stem.dtype == "int8"
    with torch.no_grad():
        found, expected = (
            load(tmp_path / "model.v1.packed.pt").model(*example(SIZES[1])),
            network(*example(SIZES[1])),
        )
    assert torch.equal(found["pred_boxes"], expected["pred_boxes"])


def test_what_cannot_be_packed_or_unpacked_is_named(tmp_path):
    with pytest.raises(ValueError, match="no quantised weights"):
        pack(real())
    with pytest.raises(RuntimeError, match="has no step yet"):
        pack(quantize_detr(real(), bits=4))
    file = pack(student(bits=4))
    with pytest.raises(ValueError, match=r"self_attn.in_proj_weight: 4 bit, the model has 3"):
        unpack(student(bits=3), file)
    with pytest.raises(ValueError, match="another architecture"):
        unpack(student(bits=4, da="co_attn"), file)
    wider = quantize_detr(real(ffn=32), bits=4)
    with pytest.raises(ValueError, match="another architecture"):
        unpack(wider, file)
    torch.save({"packed": {}, "config": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"no checkpoint of q_detr/train.py or export.py: it lacks about"):
        load(tmp_path / "other.pt")


def test_onnxruntime_is_given_no_leave_to_quantise_the_inputs_of_linear_layers():
    """It takes DequantizeLinear right in front of a product with a float operand as that: 2 % of the values, measured."""
    network = Deployed(student(bits=8), form="qdq")
    linear = [m for m in network.modules() if isinstance(m, torch.nn.Linear | Attention)]
    stored = [s for m in linear for s in m.children() if isinstance(s, StoredWeight)]
    assert len(stored) >= 4 and not any(s.as_node for s in stored)
