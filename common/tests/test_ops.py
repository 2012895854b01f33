"""Counts and operations against closed forms and published totals; on the meta device, so nothing is computed."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from common.metrics.ops import (
    CONVENTIONS,
    LayerOps,
    count_macs,
    count_ops,
    count_parameters,
    layer_ops,
    memory_mbit,
    ops_bnn64,
    parameter_bits,
)


def on_meta(build):
    with torch.device("meta"):
        return build()


IMAGE = torch.empty(1, 3, 224, 224, device="meta")


@pytest.fixture(scope="module")
def resnet18():
    return on_meta(torchvision.models.resnet18)


@pytest.fixture(scope="module")
def deit_small():
    return on_meta(lambda: timm.create_model("deit_small_patch16_224"))


def test_resnet18(resnet18):
    macs = count_macs(resnet18, IMAGE)
    assert sum(macs.values()) == 1_814_073_344
    assert macs["conv1"] == 118_013_952 and macs["fc"] == 512_000
    assert [macs[f"layer{i}.0.downsample.0"] for i in (2, 3, 4)] == [6_422_528] * 3
    assert len(macs) == 21  # leaves only: no block counts its convolutions again
    assert count_parameters(resnet18) == {"total": 11_689_512, "trainable": 11_689_512}
    resnet18.fc.weight.requires_grad_(False)
    assert count_parameters(resnet18)["trainable"] == 11_689_512 - 512_000
    resnet18.fc.weight.requires_grad_(True)


def test_deit_small_with_attention_products(deit_small):
    macs = count_macs(deit_small, IMAGE)
    n, d = 197, 384
    assert macs["patch_embed.proj"] == 196 * 768 * d
    assert [macs[f"blocks.{i}.attn"] for i in range(12)] == [2 * n * n * d] * 12
    linears = sum(v for k, v in macs.items() if k.endswith(("qkv", "attn.proj", "fc1", "fc2")))
    assert linears == 12 * 12 * n * d * d == 4_183_031_808
    assert macs["head"] == 1000 * d and sum(macs.values()) == 4_598_882_304


class Functional(nn.Module):
    """Products that no Conv or Linear module makes; a mode that must survive counting; a ModuleList in between."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 2, 3, 3))
        self.blocks = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5)])
        self.frozen = nn.BatchNorm2d(4).eval()

    def forward(self, x):
        y = F.conv2d(self.frozen(x), self.weight, padding=1, groups=2)  # (B, 8, 6, 6)
        y = torch.einsum("bchw,bchv->bcwv", y, y)
        return sum(block(y) for block in self.blocks)


def test_functional_products_groups_and_batch():
    model = Functional()
    counts = count_macs(model, torch.zeros(2, 4, 6, 6))
    conv, einsum, linear = 36 * 8 * 2 * 9, 8 * 6 * 6 * 6, 8 * 6 * 6 * 5
    assert counts == {"": 2 * (conv + einsum), "blocks.0": 2 * linear, "blocks.1": 2 * linear}
    assert model.training and not model.frozen.training


def test_fused_encoder_layer_is_counted():
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    total = sum(count_macs(layer, torch.zeros(1, 10, 64)).values())
    assert total == 10 * (4 * 64 * 64 + 2 * 64 * 128) + 2 * 10 * 10 * 64
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_child_called_from_elsewhere_is_an_error():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Linear(4, 4)
            self.user = User(self.shared)

        def forward(self, x):
            return self.user(x)

    class User(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.call = [shared]

        def forward(self, x):
            return self.call[0](x)

    with pytest.raises(ValueError, match="called from another module"):
        count_macs(Outer(), torch.zeros(1, 4))


BNN18 = [LayerOps("binary", 1_676_279_808, 1, 1), LayerOps("real", 137_793_536)]


def test_bnn64_of_binary_resnets():
    assert ops_bnn64(BNN18) == 163_985_408
    assert ops_bnn64([LayerOps("b", 3_525_967_872, 1, 1), LayerOps("r", 137_793_536)]) == 192_886_784
    assert ops_bnn64([LayerOps("b", 4_816_896_000, 1, 1), LayerOps("r", 11_862_016)]) == 87_126_016


def test_bnn64_and_weights_only_binary():
    layers = [
        LayerOps("w1a1", 603_542_016, 1, 1),
        LayerOps("w1a32", 802_796_400, 1, 32),
        LayerOps("fp", 266_920_704),
    ]
    assert ops_bnn64(layers) == pytest.approx(1_079_147_448, abs=1)
    assert ops_bnn64(layers, weight_only=True) == pytest.approx(288_894_742, abs=1)


def test_resnet18_from_bits_equals_the_table(resnet18):
    binary = [n for n, m in resnet18.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    layers = layer_ops(resnet18, IMAGE, bits=dict.fromkeys(binary, (1, 1)))
    assert count_ops(layers, "bnn64") == 163_985_408
    assert layers == layer_ops(resnet18, IMAGE, bits=lambda name: (1, 1) if name in binary else (32, 32))
    with pytest.raises(ValueError, match=r"\['convv1'\]"):
        layer_ops(resnet18, IMAGE, bits={"convv1": (1, 1)})
    assert count_ops(layer_ops(resnet18, IMAGE), "lane") == 1_814_073_344


@pytest.mark.parametrize(
    ("bits", "lane", "bops64", "bops1024"),
    [(4, 0.582, 1.193, 0.0746), (3, 0.440, 0.697, 0.0435), (2, 0.298, 0.342, 0.0214)],
)
def test_conventions_on_deit_small(deit_small, bits, lane, bops64, bops1024):
    """Patch embedding and head at 8 bits, linears and attention products at b: the published table, in G."""
    layers = layer_ops(deit_small, IMAGE, bits=lambda n: (8, 8) if n in ("patch_embed.proj", "head") else (bits, bits))
    assert count_ops(layers, "lane") / 1e9 == pytest.approx(lane, abs=6e-4)
    assert count_ops(layers, "bops64") / 1e9 == pytest.approx(bops64, abs=6e-4)
    assert count_ops(layers, "bops1024") / 1e9 == pytest.approx(bops1024, abs=6e-5)


@pytest.mark.parametrize(("bits", "expected"), [(4, 12.305), (3, 7.387), (2, 4.927)])
def test_halving_convention_on_a_detector(bits, expected):
    """81.167 GMAC of which stem, input projection and heads (2.006 + .446 + .016) stay real-valued."""
    real = 2.006 + 0.446 + 0.016
    layers = [LayerOps("real", round(real * 1e9)), LayerOps("low", round((81.167 - real) * 1e9), bits, bits)]
    assert count_ops(layers, "halving") / 1e9 == pytest.approx(expected, abs=1e-3)


def test_conventions_by_hand():
    mixed = [LayerOps("w4a8", 6400, 4, 8)]
    expected = {"bnn64": 6400, "lane": 1600, "halving": 1600, "bops64": 3200, "bops1024": 200}
    assert {name: count_ops(mixed, name) for name in CONVENTIONS} == expected
    real = [LayerOps("real", 640)]
    assert {count_ops(real, name) for name in CONVENTIONS} == {640}
    assert count_ops([LayerOps("w8a32", 640, 8, 32)], "bops64") == 640  # never dearer than real-valued
    with pytest.raises(ValueError, match="convention 'bops'"):
        count_ops(real, "bops")
    with pytest.raises(ValueError, match="no factor for 5 bits"):
        count_ops([LayerOps("x", 1, 5, 5)], "halving")
    with pytest.raises(ValueError, match=r"bits in 1\.\.32"):
        LayerOps("x", 1, 0, 8)


def test_memory():
    binary = 10_985_472
    assert memory_mbit({1: binary, 32: 11_704_424 - binary}) == pytest.approx(33.99, abs=5e-3)
    assert memory_mbit({1: 28_253_184, 32: 29_343_592 - 28_253_184}) == pytest.approx(63.15, abs=5e-3)
    assert memory_mbit({1: 12_366_000, 32: 14_505_886 - 12_366_000}) == pytest.approx(80.84, abs=5e-3)


def test_memory_of_quantised_deit(deit_small):
    """Block linears b bits, patch embedding and head 8 bits, the rest 32: 11.85 / 9.19 / 6.54 MB at 4/3/2 bits."""
    assert memory_mbit(parameter_bits(deit_small, {})) / 8 == pytest.approx(88.20, abs=5e-3)
    for bits, megabytes in ((4, 11.85), (3, 9.19), (2, 6.54)):
        width = {}
        for name, p in deit_small.named_parameters():
            if name.endswith("weight") and p.ndim > 1:
                width[name] = bits if name.startswith("blocks") else 8
        assert memory_mbit(parameter_bits(deit_small, width)) / 8 == pytest.approx(megabytes, abs=6e-3)
    with pytest.raises(ValueError, match="not parameters"):
        parameter_bits(deit_small, {"blocks.0.attn.qkv": 4})
