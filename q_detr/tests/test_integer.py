"""Students whose products run on integers: equal to the simulation, in onnxruntime too, or refused with the reason."""

import onnx
import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d

from common.quant.binary import RPReLU
from common.quant.integer_onnx import IntegerConv2d, IntegerLinear, Operand
from common.quant.lsq import LSQQuantizer
from q_detr.detr import DETR
from q_detr.export import OUTPUTS, SIZES, Deployed, example, export_onnx, onnx_differences
from q_detr.integer import IntegerAttention, why_not_integer
from q_detr.integer_backbone import Bend, IntegerBlock
from q_detr.quantized_detr import QuantConv2d, calibrate_student, quantize_detr
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
    # 4 convolutions, but for that of the image; 3 attentions with 4 projections, but for the value of the first, whose input is
    # 0; 2 x 2 of the MLPs
    assert len(attentions) == 3 and len(layers) == 3 + 3 * 4 - 1 + 2 * 2 and deployed.products == len(layers) + 2 * 3
    assert all(isinstance(getattr(a, x), Operand) for a in attentions for x in "qkav")
    assert all(m.weight.dtype == torch.int8 for m in layers)
    assert [a.q.left for a in attentions] == [True] * 3 and [a.k.left for a in attentions] == [False] * 3


def lived_in(network, *, steepest=0.9):
    """Norms, slopes and shifts as training leaves them: not 0 or 1, a variance of the size of its eps, scales below 0."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for m in network.modules():
            if isinstance(m, FrozenBatchNorm2d):
                for t, centre in ((m.weight, 0.7), (m.bias, 0), (m.running_mean, 0), (m.running_var, 1)):
                    t.copy_(centre + 0.2 * torch.randn(t.shape, generator=g))
                m.weight[0], m.weight[1], m.running_var[1] = -0.5, 0.003, 1e-5
            elif isinstance(m, RPReLU):
                for t in (m.shift_in, m.shift_out):
                    t.copy_(0.2 * torch.randn(t.shape, generator=g))
                m.slope.copy_(torch.rand(m.slope.shape, generator=g) - 0.2)
                m.slope[0] = steepest
            elif isinstance(m, nn.PReLU):
                m.weight.copy_(torch.rand(m.weight.shape, generator=g) - 0.2)
    return network


def resnet_student(block=Bottleneck, *, cls=DETR, stages=4, steepest=0.9, **options):
    """A DETR behind a small ResNet with a stage of two blocks; the last stages may be empty."""
    thin: dict = {"width_per_group": 8} if block is Bottleneck else {}
    net, network = ResNet(block, [2, 1, 1, 1], norm_layer=FrozenBatchNorm2d, **thin), real(cls, backbone="resnet18")
    for i in range(1, 5):
        stage = getattr(net, f"layer{i}") if i <= stages else nn.Sequential()
        setattr(network.backbone[0].body, f"layer{i}", stage)
    network.input_proj = nn.Conv2d(64 * block.expansion * 2 ** (stages - 1), network.dim, 1)
    network = quantize_detr(network, **({"bits": 8} | WHOLE | options))
    calibrate_student(lived_in(network, steepest=steepest), *example(SIZES[0]))
    return network.eval()


@pytest.mark.parametrize(
    ("options", "steepest"),
    [({}, 0.9), ({}, 1.7), ({"bits": 3}, 0.9), ({"backbone_act": "relu"}, 0.9), ({"quantize_downsample": False}, 0.9),
     ({"block": BasicBlock}, 0.9), ({"quantizer": "released", "zp_init": "lsqplus"}, 0.9)],
)  # fmt: skip
@torch.no_grad()
def test_a_resnet_with_norms_and_shifts_folded_in_gives_what_the_simulation_gives(options, steepest):
    network = resnet_student(steepest=steepest, **options).double()
    images, _ = example(SIZES[1])
    deployed = Deployed(network, form="integer").model.backbone[0].body
    expected = network.backbone[0].body(images.double())
    torch.testing.assert_close(deployed(images.double()), expected, rtol=0, atol=1e-9 * expected.abs().max().item())
    found = list(deployed.modules())
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in found) or "quantize_downsample" in options
    assert isinstance(deployed.conv1, QuantConv2d) and not isinstance(deployed.conv1, IntegerConv2d)  # 3 channels
    blocks = [m for m in found if isinstance(m, IntegerBlock)]
    convs = sum(isinstance(m, IntegerConv2d) for m in found)
    # 5 blocks; 4 convolutions on a shortcut, 3 where the blocks do not change the channels of the first stage
    shortcuts = {"quantize_downsample": 0, "block": 3}.get(next(iter(options), ""), 4)
    assert (len(blocks), convs) == (5, 5 * (2 if "block" in options else 3) + shortcuts)
    if (
        "backbone_act" not in options
    ):  # shifts are added where they cannot be folded: in front of a block, or behind an RPReLU
        assert all(a.shift_in is None for b in blocks for a in b.acts) and all(
            b.first.shift_in is not None for b in blocks
        )
        assert sum(b.acts[-1].shift_out is None for b in blocks) == len(blocks) - 4  # those of a stage's end stay


def test_onnxruntime_computes_smca_behind_a_resnet_on_integers_channels_last_at_any_size(tmp_path):
    # every kind of block: with and without a convolution on its shortcut, stride 2
    network = resnet_student(cls=SMCADETR, bits=8, stages=2)
    assert "products on integers" in export_onnx(network, tmp_path / "model.onnx", form="integer")
    for row in onnx_differences(network, tmp_path / "model.onnx"):
        assert max(row[n][1] for n in OUTPUTS) < 0.02, row
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert {n.domain for n in graph.node} == {""}  # operators of ONNX alone
    kinds = [n.op_type for n in graph.node]
    assert kinds.count("MatMulInteger") == 9 + 2 + 11 + 4 + 6 and "PRelu" not in kinds
    assert kinds.count("Conv") == 2  # of the image, and the projection behind the backbone
    stored = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2]
    weights = {
        n: p
        for n, p in network.backbone[0].body.named_parameters()
        if n.startswith("layer") and n.endswith("weight") and p.ndim == 4
    }
    assert sum(t.dims[0] * t.dims[1] for t in stored) >= sum(p.numel() for p in weights.values()) and len(weights) == 11
    assert all(len(t.raw_data) == t.dims[0] * t.dims[1] for t in stored)


@pytest.mark.parametrize("steepest", [0.9, 1.0, 3.0])
def test_a_bend_is_rprelu_and_its_variants_along_any_axis(steepest):
    act = lived_in(nn.Sequential(RPReLU(5), nn.PReLU(5)), steepest=steepest)
    x = torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(0))
    for module in (act[0], act[1], nn.ReLU()):
        first, last = Bend(module, axis=1), Bend(module, axis=-1)
        assert torch.equal(first(x), module(x)) and torch.equal(
            last(x.permute(0, 2, 3, 1)), module(x).permute(0, 2, 3, 1)
        )
    bend = Bend(act[0], axis=-1)
    assert torch.equal(bend.take("shift_out"), act[0].shift_out.flatten()) and bend.take("shift_out").ndim == 0
    without = nn.functional.prelu(x + act[0].shift_in, act[0].slope)
    assert torch.equal(bend(x.permute(0, 2, 3, 1)), without.permute(0, 2, 3, 1))


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
