"""The backbones: every published count, published checkpoint formats, and the primitives that all arms share."""

import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from common.quant.binary import RSign, binarize, xnor_scale
from rbonn.binarize import binarize_, parameter_groups
from rbonn.counts import measure
from rbonn.layers import anneal, latent_sparsity, make_conv, make_sign
from rbonn.model import ReActNetA, ReActResNet
from rbonn.network import build_network
from rbonn.recurrent import RBConv2d, Recurrence
from rbonn.released import load_released

BINARY = {"conv": make_conv(weights="xnor"), "sign": make_sign(activations="binary")}
RBONN = {"conv": make_conv(weights="bilinear", recurrent="drelu_fixed"), "sign": make_sign(activations="binary")}


# ---------------------------------------------------------------------------------------------------------------- counts
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "resnet18",
            {
                "params": 11_704_424,
                "binary_weights": 10_985_472,
                "bops": 1_676_279_808,
                "flops": 137_793_536,
                "ops": 163_985_408,
                "entries": 186,
                "mbit": 33.99,
            },
        ),
        (
            "rbonn18",
            {
                "params": 11_712_104,
                "binary_weights": 10_985_472,
                "bops": 1_676_279_808,
                "flops": 137_793_536,
                "ops": 163_985_408,
                "entries": 218,
                "mbit": 34.24,
                "channels": 3840,
            },
        ),
        (
            "resnet34",
            {
                "params": 21_827_432,
                "binary_weights": 21_086_208,
                "bops": 3_525_967_872,
                "flops": 137_793_536,
                "ops": 192_886_784,
                "entries": 346,
                "mbit": 44.81,
            },
        ),
        (
            "reactnet_a",
            {
                "params": 29_343_592,
                "binary_weights": 28_253_184,
                "bops": 4_816_896_000,
                "flops": 11_862_016,
                "ops": 87_126_016,
                "entries": 298,
                "mbit": 63.15,
            },
        ),
    ],
)
def test_counts(name, expected):
    found = measure(name)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=0.005 if key == "mbit" else 0), key


def test_real_valued_resnet18_has_bops_plus_flops_as_macs():
    found = measure("resnet18")
    assert found["bops"] + found["flops"] == 1_814_073_344


# ------------------------------------------------------------------------------------------------- forward and structure
def test_block_is_the_formula():
    from rbonn.model import Block

    torch.manual_seed(0)
    block = Block(4, 6, 2, **RBONN).eval()
    with torch.no_grad():
        block.sign.bias.normal_()
        block.act.shift_in.normal_()
        block.act.shift_out.normal_()
        block.norm.running_mean.normal_()
    x = torch.randn(2, 4, 8, 8)
    w = 0.02 * block.conv.scale_factor.abs() * torch.where(block.conv.weight < 0, -1.0, 1.0)
    y = block.norm(F.conv2d(torch.where(x + block.sign.bias < 0, -1.0, 1.0), w, stride=2, padding=1))
    y = y + block.shortcut[2](F.conv2d(F.avg_pool2d(x, 2), block.shortcut[1].weight)) + block.act.shift_in
    expected = torch.where(y > 0, y, block.act.slope.view(1, -1, 1, 1) * y) + block.act.shift_out
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("kind", [ReActNetA, ReActResNet])
def test_batched_equals_single_at_odd_and_even_sizes(kind):
    torch.manual_seed(0)
    small = (
        {"widths": (4, 8, 8, 16)} if kind is ReActNetA else {"widths": (4, 8, 16), "layers": (1, 2, 1), "stem": "small"}
    )
    model = kind(num_classes=3, in_channels=2, **RBONN, **small).eval()
    for size in (16, 17):
        x = torch.randn(3, 2, size, size)
        torch.testing.assert_close(model(x), torch.cat([model(v[None]) for v in x]), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ published checkpoints
def published_name(key, mobile):
    """Our name -> that of the published codes, written down independently of the loader."""
    if not mobile:
        table = {
            "sign.bias": "move0.bias",
            "conv.": "binary_conv.",
            "norm.": "bn1.",
            "act.shift_in": "move1.bias",
            "act.slope": "prelu.weight",
            "act.shift_out": "move2.bias",
            "shortcut.": "downsample.",
        }
        if m := re.fullmatch(r"(layer\d\.\d+\.)(.*)", key):
            old = next(o for o in table if m[2].startswith(o))
            return m[1] + table[old] + m[2][len(old) :]
        return key
    key = key.replace("stem.0.", "feature.0.conv1.").replace("stem.1.", "feature.0.bn1.")
    if m := re.fullmatch(r"blocks\.(\d+)\.(.*)", key):
        block, rest = int(m[1]) + 1, m[2]
        double = block in (1, 2, 4, 6, 12)
        table = {
            "sign1.bias": "move11.bias",
            "sign2.bias": "move21.bias",
            "conv1.weight": "binary_3x3.weights",
            "conv2.0.weight": "binary_pw_down1.weights" if double else "binary_pw.weights",
            "conv2.1.weight": "binary_pw_down2.weights",
            "norm1.": "bn1.",
            "norm2.0.": "bn2_1." if double else "bn2.",
            "norm2.1.": "bn2_2.",
            "act1.shift_in": "move12.bias",
            "act1.slope": "prelu1.weight",
            "act1.shift_out": "move13.bias",
            "act2.shift_in": "move22.bias",
            "act2.slope": "prelu2.weight",
            "act2.shift_out": "move23.bias",
        }
        old = next(o for o in table if rest.startswith(o))
        return f"feature.{block}.{table[old]}{rest[len(old) :]}"
    return key


@pytest.mark.parametrize("name", ["resnet18", "rbonn18", "resnet34", "reactnet_a"])
def test_published_checkpoints_load_by_key(name):
    torch.manual_seed(0)
    options = {"num_classes": 7, "in_channels": 3, **(RBONN if name == "rbonn18" else BINARY)}
    model = (
        ReActNetA(**options)
        if name == "reactnet_a"
        else ReActResNet(**options, layers=(6, 8, 12, 6) if name == "resnet34" else (4,) * 4)
    )
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    mobile = name == "reactnet_a"
    state = {f"module.{published_name(k, mobile)}": v for k, v in model.state_dict().items()}
    if mobile:
        state = {k: v.reshape(-1, 1) if k.endswith(".weights") else v for k, v in state.items()}
    loaded, built = load_released({"epoch": 3, "state_dict": state}, zero=1)
    assert build_network(**built).state_dict().keys() == loaded.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.eval()(x), loaded(x))
    assert load_released(state)[0].state_dict().keys() == model.state_dict().keys()
    del state[next(k for k in state if k.endswith("running_var"))]
    with pytest.raises(ValueError, match="missing .*running_var"):
        load_released(state)


def test_a_file_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="no ReActNet or RBONN checkpoint"):
        load_released(torchvision.models.resnet18().state_dict())


# --------------------------------------------------------------------------------------------- primitives that all arms share
def test_approx_sign_gradient_and_its_integral():
    x = torch.tensor([0.0, 0.5, -0.5, 1.0, -1.0, 2.0, -2.0], requires_grad=True)
    binarize(x, estimator="approx").sum().backward()
    assert x.grad.tolist() == [2, 1, 1, 0, 0, 0, 0]
    grid = torch.linspace(-1, 1, 2001, dtype=torch.float64, requires_grad=True)
    binarize(grid, estimator="approx").sum().backward()
    assert torch.trapezoid(grid.grad, grid.detach()).item() == pytest.approx(2.0, abs=1e-9)


def test_xnor_scale_minimises_the_reconstruction():
    w = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    alpha = xnor_scale(w)

    def loss(a):
        return (w - a * w.sign()).square().sum((1, 2, 3))

    assert (loss(alpha + 1e-3) > loss(alpha)).all() and (loss(alpha - 1e-3) > loss(alpha)).all()
    assert torch.allclose(2 * (alpha - w.abs()).sum((1, 2, 3)), torch.zeros(5, dtype=torch.float64), atol=1e-12)


def test_irnet_estimators_follow_the_progress():
    model = build_network(
        model={"name": "react_resnet", "layers": [1], "widths": [4], "stem": "small"},
        method={"weights": "irnet", "activations": "irnet"},
        sign_zero=1,
        classes=2,
        channels=1,
    )
    block = model.layer1[0]
    x = torch.tensor([0.0, 0.5])
    for progress, t in ((0.0, 0.1), (0.5, 1.0), (1.0, 10.0)):
        anneal(model, progress)
        assert block.conv.t == pytest.approx(t)
        v = x.clone().requires_grad_()
        block.sign(v.view(1, 1, 1, 2).expand(1, 4, 1, 2)).sum().backward()
        torch.testing.assert_close(v.grad, 4 * max(1 / t, 1) * t * (1 - torch.tanh(t * x) ** 2))


def test_sparsity_is_relative_to_the_median_of_each_layer():
    conv = make_conv(weights="xnor")(1, 10, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([0.01, 0.02, 1, 1, 1, 1, 1, 1, 1, -0.05]).view(10, 1, 1, 1))
    assert latent_sparsity(conv) == pytest.approx(0.3)
    with torch.no_grad():
        conv.weight.mul_(100)
    assert latent_sparsity(conv) == pytest.approx(0.3)
    assert latent_sparsity(nn.Conv2d(1, 1, 1)) is None


def test_stage_one_has_no_binary_layer_and_wrong_kinds_are_named():
    assert type(make_conv(weights="real")(2, 2, 3)) is nn.Conv2d
    with pytest.raises(ValueError, match="weights='ternary', allowed"):
        make_conv(weights="ternary")
    with pytest.raises(ValueError, match="recurrent='all' with weights='xnor'"):
        make_conv(weights="xnor", recurrent="all")
    with pytest.raises(ValueError, match="activations='relu', allowed"):
        make_sign(activations="relu")


# --------------------------------------------------------------------------------------------------------- binarize_
def small_cnn(*, norm=True):
    middle = [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)] if norm else [nn.Conv2d(8, 8, 3, padding=1)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        *middle,
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def test_binarize_swaps_all_but_first_and_trains():
    torch.manual_seed(0)
    model = small_cnn()
    weight = model[3].weight.detach().clone()
    assert binarize_(model, recurrent="all", tau=0.5) == ["3"]
    assert (
        isinstance(model[3], nn.Sequential)
        and isinstance(model[3][0], RSign)
        and torch.equal(model[3][1].weight, weight)
    )
    assert model[3][1].bias is not None and not any(isinstance(m, nn.ReLU) for m in model.modules())
    optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-2))
    recurrence = Recurrence(model, optimizer)
    x, y = torch.randn(32, 3, 9, 9), torch.randint(0, 4, (32,))
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0] and recurrence.counters()["active_share"] == 1.0


def test_binarize_refuses_a_convolution_without_a_norm_and_changes_nothing():
    model = small_cnn(norm=False)
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"no norm follows 3: .*skip=\['3'\]"):
        binarize_(model)
    assert [type(m) for m in model.modules()] == before
    with pytest.raises(ValueError, match="no such convolution"):
        binarize_(model, skip=["head"])
    with pytest.raises(ValueError, match="no convolution to binarise"):
        binarize_(model, skip=["3"])
    fully = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    with pytest.raises(ValueError, match="no convolution to binarise"):
        binarize_(fully)  # the first and the last
    assert binarize_(fully, skip_first=False, skip_last=False, activations=False) == ["0", "2"]


@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_binarize_takes_library_networks(source):
    import timm

    model = (
        torchvision.models.resnet18(num_classes=5)
        if source == "torchvision"
        else timm.create_model("resnet10t", num_classes=5)
    )
    convs = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    names = binarize_(model, recurrent="none", lam=0.0)
    assert len(names) == convs - 1 == sum(isinstance(m, RBConv2d) for m in model.modules())
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("scale_factor"))


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 2, "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "circular", "stride": 2},
        {"dilation": 2, "padding": 2},
        {"groups": 4, "kernel_size": (1, 3)},
        {"padding": "same"},
    ],
)
def test_binarize_keeps_what_a_convolution_is(options):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, **{"kernel_size": 3, **options}).double().requires_grad_(False)
    model = nn.Sequential(conv, nn.BatchNorm2d(8).double()).eval()
    binarize_(model, skip_first=False, skip_last=False, activations=False, recurrent="none", lam=0.0)
    new, x = model[0], torch.randn(2, 8, 9, 9, dtype=torch.float64)
    assert new.weight.dtype == torch.float64 and not new.weight.requires_grad and not new.training
    with torch.no_grad():
        conv.weight.copy_(0.02 * new.scale_factor.abs() * torch.where(conv.weight < 0, -1.0, 1.0))
    torch.testing.assert_close(new(x), conv(x))


@pytest.mark.parametrize("zero", [1, 0])
def test_binarize_gives_the_value_of_sign_zero_to_weights_and_activations(zero):
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2)).eval()
    binarize_(model, skip_first=False, skip_last=False, recurrent="none", lam=0.0, zero=zero)
    sign, conv = model[0]
    assert sign(torch.zeros(1, 2, 1, 1)).eq(zero).all()
    nn.init.zeros_(conv.weight)
    assert conv.signs_and_scale()[0].eq(zero).all()


def test_binarize_refuses_by_name_what_it_would_change():
    from timm.layers import Conv2dSame

    def around(middle):
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), middle, nn.BatchNorm2d(8), nn.Linear(8, 2))

    with pytest.raises(ValueError, match=r"cannot replace 2 \(Conv2dSame, not nn.Conv2d\)"):
        binarize_(around(Conv2dSame(8, 8, 3)))
    with pytest.raises(ValueError, match=r"2 \(ParametrizedConv2d"):
        binarize_(around(nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))))
    hooked = around(nn.Conv2d(8, 8, 3))
    hooked[2].register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match=r"2 \(it has hooks\)"):
        binarize_(hooked)
    shared = around(nn.Conv2d(8, 8, 3))
    shared.again = shared[2]
    with pytest.raises(ValueError, match=r"2 \(also used as again\)"):
        binarize_(shared)
    assert type(shared[2]) is nn.Conv2d


def test_parameter_groups_decay_weights_only_and_slow_down_u():
    model = nn.Sequential(
        make_sign(activations="binary")(3), RBConv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)
    )
    groups = parameter_groups(model, lr=0.01, weight_decay=0.1)
    found = {n: next(g for g in groups if any(p is q for q in g["params"])) for n, p in model.named_parameters()}
    assert {n for n, g in found.items() if g["weight_decay"]} == {"1.weight"}
    assert found["1.u"]["lr"] == pytest.approx(0.001) and found["1.scale_factor"]["lr"] == 0.01
    parity = parameter_groups(model, lr=0.01, weight_decay=0.1, decay_4d_biases=True)
    decayed = {id(p) for g in parity if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(model[1].weight), id(model[0].bias)}
