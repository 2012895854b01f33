import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from ncl_pp.model import (
    CifarResNet,
    ConvNet,
    CosineHead,
    Experts,
    LinearHead,
    build_backbone,
    ensemble,
    option_a_shortcut,
)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def macs(model, image):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(image)
    assert counter.get_total_flops() % 2 == 0  # the counter takes one multiply-accumulate as two operations
    return counter.get_total_flops() // 2


def test_resnet32_costs_what_the_literature_says():
    assert parameters(CifarResNet()) == 463_504
    assert parameters(Experts("resnet32", 100, experts=1)) == 470_004
    assert parameters(Experts("resnet32", 10, experts=1)) == 464_154
    assert parameters(Experts("resnet32", 100, experts=2)) == 940_008
    assert parameters(Experts("resnet32", 100, experts=3)) == 1_410_012
    model = Experts("resnet32", 100, experts=2)
    assert macs(model.single(1), torch.zeros(1, 3, 32, 32)) == 68_868_352
    assert macs(model, torch.zeros(1, 3, 32, 32)) == 2 * 68_868_352


@pytest.mark.parametrize(
    ("name", "classes", "backbone", "expert", "giga_macs"),
    [
        ("resnet50", 1000, 23_508_032, 25_557_032, 4.089),
        ("resnet50", 8142, 23_508_032, 40_190_990, None),
        ("resnext50_32x4d", 1000, 22_979_904, 25_028_904, 4.230),
        ("resnet152", 365, 58_143_808, 58_891_693, None),
        ("resnet152", 1000, 58_143_808, 60_192_808, 11.51),
    ],
)
def test_large_networks(name, classes, backbone, expert, giga_macs):
    with torch.device("meta"):
        model = Experts(name, classes, experts=1, head="cosine")
        assert parameters(model.backbones[0]) == backbone
        assert parameters(model) == expert
        if giga_macs:
            trunk = macs(model.backbones[0], torch.zeros(1, 3, 224, 224))
            assert (trunk + 2048 * classes) / 1e9 == pytest.approx(giga_macs, abs=5e-3)


def test_resnet32_feature_map_and_initialisation():
    torch.manual_seed(0)
    net = CifarResNet()
    assert net.feature_map(torch.zeros(2, 3, 32, 32)).shape == (2, 64, 8, 8)
    x = torch.randn(2, 3, 32, 32)
    net.eval()
    assert_close(net(x), net.feature_map(x).mean((2, 3)))
    weight = net.blocks[-1].conv2.weight  # type: ignore[union-attr]
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)  # fan-in, gain sqrt(2)


def test_small_resnets_of_cifar():
    net = build_backbone("resnet8", in_channels=1, width=8)
    assert net.num_features == 32 and net(torch.zeros(2, 1, 28, 28)).shape == (2, 32)
    widths = [8] + [8] * 2 + [16] * 2 + [32] * 2
    assert [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)] == widths
    assert parameters(build_backbone("resnet20")) == 269_072  # 0.27 M, as in the literature, less its classifier
    for name, width in (("resnet32", 6), ("resnet18", 8)):
        with pytest.raises(ValueError, match=f"width={width}"):
            build_backbone(name, width=width)


def test_option_a_shortcut():
    x = torch.randn(1, 16, 4, 4)
    y = option_a_shortcut(x, 32)
    assert y.shape == (1, 32, 2, 2)
    assert (y[:, :8] == 0).all() and (y[:, 24:] == 0).all()
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])


def test_conv_net():
    net = ConvNet(in_channels=1, width=8)
    assert net.num_features == 32 and net(torch.zeros(2, 1, 8, 8)).shape == (2, 32)
    assert [tuple(m.weight.shape[:2]) for m in net.modules() if isinstance(m, nn.Conv2d)] == [(8, 1), (16, 8), (32, 16)]
    assert net.blocks(torch.zeros(1, 1, 8, 8)).shape == (1, 32, 2, 2)
    with pytest.raises(ValueError, match="width=0"):
        ConvNet(width=0)


def test_cosine_head():
    torch.manual_seed(0)
    head, x = CosineHead(6, 4, scale=16.0), torch.randn(9, 6)
    assert head.weight.abs().max() <= 6**-0.5 and (head.bias == 0).all()
    with torch.no_grad():
        head.bias.normal_()
        out = head(x)
        assert_close(head(x * torch.rand(9, 1).add(0.1)), out)
        assert ((out - head.bias).abs() <= 16 + 1e-4).all()
        cosine = nn.functional.cosine_similarity(x[:, None], head.weight[None], dim=-1)
        assert_close(out, 16 * cosine + head.bias)
        head.weight.mul_(torch.tensor([1.0, 2.0, 0.3, 7.0])[:, None])
        assert_close(head(x), out)


def test_the_linear_head_keeps_its_precision_under_autocast():
    head, x = LinearHead(64, 4), torch.randn(5, 64)
    expected = x @ head.weight.T + head.bias
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, half = head(x), head(x.bfloat16())
    assert found.dtype == half.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(half, x.bfloat16().float() @ head.weight.T + head.bias)


def test_cosine_head_is_safe_in_half_precision():
    head, x = CosineHead(512, 4), 1e-4 * torch.randn(3, 512)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head(x.to(torch.bfloat16))
    assert out.dtype == torch.float32
    assert_close(out, head(x.to(torch.bfloat16).float()))


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_experts_are_separate_and_deployable_alone(head):
    torch.manual_seed(0)
    model = Experts("convnet", 5, experts=3, head=head, in_channels=1, width=2).eval()
    x = torch.randn(4, 1, 8, 8)
    logits = model(x)
    assert logits.shape == (3, 4, 5) and model.features(x).shape == (3, 4, 8)
    for k in range(3):
        assert_close(model.single(k)(x), logits[k])
        assert_close(model(x[2:3])[k, 0], logits[k, 2])  # batched == single
    assert not torch.allclose(logits[0], logits[1])
    model.zero_grad()
    model(x)[1].sum().backward()
    for k, backbone in enumerate(model.backbones):
        assert all((p.grad is None or not p.grad.any()) for p in backbone.parameters()) is (k != 1)
    with pytest.raises(ValueError, match=r"expert 3, allowed: 0\.\.2"):
        model.single(3)


def test_checkpoint_round_trip(tmp_path):
    options = {"experts": 2, "in_channels": 1, "width": 2}
    model, other = Experts("convnet", 5, **options).eval(), Experts("convnet", 5, **options).eval()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    other.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(x), other(x))


def test_any_network_with_num_features():
    class Flat(nn.Flatten):
        num_features = 12

    model = Experts(Flat, 3, experts=2, head="linear")
    assert model(torch.zeros(5, 3, 2, 2)).shape == (2, 5, 3)
    with pytest.raises(ValueError, match="width: only for a backbone given by name"):
        Experts(Flat, 3, width=3)


def test_official_init_is_torchs_default():
    torch.manual_seed(0)
    net = build_backbone("resnet10t", official_init=True)
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            bound = (m.in_channels // m.groups * m.kernel_size[0] * m.kernel_size[1]) ** -0.5
            assert m.weight.abs().max() <= bound
        if isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all()
    reference = build_backbone("resnet10t")
    assert any((m.weight == 0).all() for m in reference.modules() if isinstance(m, nn.BatchNorm2d))


def test_ensemble_is_the_mean_of_raw_logits():
    logits = torch.tensor([[[3.0, 0.0, 2.0]], [[0.0, 2.0, 2.5]]])
    assert_close(ensemble(logits), torch.tensor([[1.5, 1.0, 2.25]]))
    assert torch.equal(ensemble(logits).argmax(-1), logits.sum(0).argmax(-1))
    shifted = logits + torch.tensor([7.0, 0.0])[:, None, None]
    assert torch.equal(ensemble(shifted).argmax(-1), ensemble(logits).argmax(-1))
    scaled = logits * torch.tensor([9.0, 1.0])[:, None, None]
    assert not torch.equal(ensemble(scaled).argmax(-1), ensemble(logits).argmax(-1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: build_backbone("resnet-32"), "allowed: resnet8, resnet20, resnet32, convnet or a timm model"),
        (lambda: build_backbone("resnet32", pretrained=True), "apply to timm models, not to 'resnet32'"),
        (lambda: build_backbone("resnet18", pretrained=True, official_init=True), "exclude each other"),
        (lambda: Experts("convnet", 5, head="cos"), "head='cos', allowed: linear, cosine"),  # type: ignore[arg-type]
        (lambda: Experts("convnet", 5, experts=0), "experts=0"),
        (lambda: CosineHead(3, 2, scale=0.0), "scale=0.0"),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_misspelt_option_is_named():
    with pytest.raises(TypeError, match="widht"):
        Experts("convnet", 5, widht=3)
