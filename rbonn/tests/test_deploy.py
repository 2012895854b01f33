"""Deployed, packed and exported networks give the outputs of the trained one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.quant.binary import RSign
from common.quant.pack import binary_conv2d, pack_signs
from common.quant.packed_conv import in_float_
from rbonn.binary_conv import binary_layers
from rbonn.deploy import deploy_, fold_scale_, pack, pack_, unpack
from rbonn.network import build_network

SMALL = {"name": "react_resnet", "layers": [1, 1], "widths": [8, 16], "stem": "small"}
METHODS = {
    "bilinear": {"weights": "bilinear", "recurrent": "drelu_fixed", "activations": "binary"},
    "xnor": {"weights": "xnor", "activations": "binary"},
    "irnet": {"weights": "irnet", "activations": "irnet"},
}


def trained(weights, model=SMALL):
    torch.manual_seed(0)
    network = build_network(model=model, method=METHODS[weights], sign_zero=1, classes=5, channels=1).eval()
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight, m.bias, m.running_mean):
                nn.init.normal_(t)
            nn.init.uniform_(m.running_var, 0.01, 1)
    return network


@pytest.mark.parametrize("weights", METHODS)
@pytest.mark.parametrize("name", ["react_resnet", "reactnet_a"])
def test_deployed_equals_trained_and_its_weights_are_signs(weights, name):
    model = SMALL if name == "react_resnet" else {"name": name, "widths": [8, 16, 16]}
    network = trained(weights, model)
    x = torch.randn(3, 1, 12, 12)
    with torch.no_grad():
        expected = network(x)
        deployed = deploy_(copy.deepcopy(network))
        torch.testing.assert_close(deployed(x), expected, rtol=1e-4, atol=1e-4)
    count = len(binary_layers(network))
    signs = [m for m in deployed.modules() if isinstance(m, nn.Conv2d) and bool((m.weight.abs() == 1).all())]
    assert len(signs) == count == (2 if name == "react_resnet" else 5)


def test_a_folded_scale_is_the_scaled_input_also_where_it_is_zero():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4).eval()
    for t in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(t)
    scale = torch.tensor([0.5, 0.0, 3.0, 1e-3])
    z = torch.randn(2, 4, 3, 3)
    expected = norm(z * scale.view(1, 4, 1, 1))
    fold_scale_(norm, scale)
    torch.testing.assert_close(norm(z), expected)
    assert torch.isfinite(norm.running_mean).all()


def test_packed_convolution_is_the_trained_layer_borders_included():
    conv = trained("bilinear").layer2[0].conv
    signs, scale = conv.signs_and_scale()
    x = torch.randn(2, 8, 7, 7).sign()
    y = binary_conv2d(pack_signs(x.permute(0, 2, 3, 1)), pack_signs(signs.permute(0, 2, 3, 1)), 8, stride=2, padding=1)
    with torch.no_grad():
        torch.testing.assert_close(y.permute(0, 3, 1, 2) * scale.view(1, -1, 1, 1), conv(x))
    inner = F.conv2d(x, signs)  # without padding: n - 2 popcount at every position
    assert torch.equal(
        binary_conv2d(pack_signs(x.permute(0, 2, 3, 1)), pack_signs(signs.permute(0, 2, 3, 1)), 8)
        .permute(0, 3, 1, 2)
        .float(),
        inner,
    )


def test_threshold_of_conv_norm_sign_flips_with_the_sign_of_gamma():
    """Without a shortcut between them, norm + shift + sign is a comparison of the integer; gamma < 0 turns it round."""
    torch.manual_seed(0)
    z = torch.randint(-9, 10, (500, 2)).float()
    gamma, beta, mean, var, s, shift = (
        torch.tensor(v) for v in ([0.7, -0.7], [0.1, 0.2], [0.3, -0.1], [2.0, 0.5], [0.02, 0.5], [0.05, -0.3])
    )
    y = gamma * (s * z - mean) / (var + 1e-5).sqrt() + beta + shift
    threshold = (mean - (beta + shift) * (var + 1e-5).sqrt() / gamma) / s
    compared = torch.where(gamma > 0, z >= threshold, z <= threshold)
    assert torch.equal(compared, y >= 0) and 0 < compared[:, 1].sum() < 500


def test_no_norm_is_folded_into_a_threshold_where_a_shortcut_is_added():
    deployed = deploy_(trained("bilinear"))
    assert all(isinstance(b.norm, nn.BatchNorm2d) for b in (deployed.layer1[0], deployed.layer2[0]))


def test_zero_weights_without_a_bit_are_refused():
    network = build_network(model=SMALL, method=METHODS["xnor"], sign_zero=0, classes=5, channels=1)
    nn.init.zeros_(network.layer1[0].conv.weight)
    with pytest.raises(ValueError, match=r"576 weights are exactly 0"):
        deploy_(network)


def test_a_binarised_network_of_ones_own_is_deployed_bias_included():
    from rbonn.binarize import binarize_

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(128, 2),
    )
    binarize_(model, recurrent="none", lam=0.0)
    nn.init.normal_(model[3][1].bias)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model.eval()(x)
        torch.testing.assert_close(deploy_(model)(x), expected, rtol=1e-4, atol=1e-4)
    assert bool((model[3][1].weight.abs() == 1).all()) and model[3][1].bias is None


def test_a_binary_layer_without_a_norm_of_its_own_keeps_its_scale_in_the_weights():
    from rbonn.layers import make_conv

    network = nn.Sequential(make_conv(weights="xnor")(2, 2, 3), nn.ReLU()).eval()
    x = torch.randn(1, 2, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(deploy_(copy.deepcopy(network))(x), network(x))


# ------------------------------------------------------------------------------------------------------------- on bits
@pytest.mark.parametrize("weights", METHODS)
@pytest.mark.parametrize("name", ["react_resnet", "reactnet_a"])
def test_a_network_on_bits_is_the_trained_one(weights, name):
    """1,000 images: the same class, the logits to 1e-5 of the largest, and the bits of the float twin."""
    model = SMALL if name == "react_resnet" else {"name": name, "widths": [8, 16, 16]}
    network = trained(weights, model)
    x = torch.randn(1000, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    packed = copy.deepcopy(network)
    assert set(pack_(packed).values()) == {"bits"} and not binary_layers(packed)
    with torch.no_grad():
        expected, found = network(x), packed(x)
        assert torch.equal(found, in_float_(copy.deepcopy(packed), exact=True)(x))
    assert torch.equal(found.argmax(1), expected.argmax(1))
    # a value within rounding of a sign's threshold may fall on either side of it: that is one image in a thousand at most
    off = (found - expected).abs().amax(1) > 1e-5 * expected.abs().max()
    assert off.float().mean() <= 1e-3


def test_a_packed_file_gives_the_network_back_and_has_a_bit_per_weight(tmp_path):
    network = trained("bilinear", {"name": "react_resnet", "layers": [1, 1], "widths": [64, 128], "stem": "small"})
    about = {"build": {"model": {"name": "react_resnet", "layers": [1, 1], "widths": [64, 128], "stem": "small"},
                       "method": METHODS["bilinear"], "sign_zero": 1, "classes": 5, "channels": 1}}  # fmt: skip
    pack_(network)
    torch.save(pack(network, {}, about), tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    words = {k: v for k, v in content["model"].items() if k.endswith(".words")}
    assert sum(v.numel() * 64 for v in words.values()) == 9 * 64 * 64 + 9 * 64 * 128
    again = unpack(content).model
    x = torch.randn(2, 1, 9, 9)
    assert torch.equal(again(x), network.to(memory_format=torch.channels_last)(x))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "timm_resnet26"])
def test_any_binarised_network_runs_on_bits_and_is_deployed(name):
    """Also the depth-wise convolutions, and norms that are no neighbours in a sequence."""
    import timm
    import torchvision

    from rbonn.binarize import binarize_

    torch.manual_seed(0)
    model = (
        timm.create_model("resnet26", num_classes=3)
        if name.startswith("timm")
        else getattr(torchvision.models, name)(num_classes=3)
    )
    names = binarize_(model, recurrent="none", lam=0.0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, std=0.1)
            nn.init.uniform_(m.running_var, 1e-4, 2e-4)  # the binary scale makes outputs small
    x = torch.randn(2, 3, 40, 40)
    model.eval()
    packed, deployed = copy.deepcopy(model), copy.deepcopy(model)
    found = pack_(packed)
    assert len(found) == len(names) and not binary_layers(packed)
    assert {n for n, how in found.items() if how == "float"} == {
        f"{n}.1" for n in names if model.get_submodule(n)[1].groups > 1
    }
    assert not binary_layers(deploy_(deployed))
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(packed(x), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(deployed(x), expected, rtol=1e-3, atol=1e-3)


def test_convolutions_of_real_inputs_and_of_a_third_sign_stay_in_float_with_one_bit_on_disk():
    from rbonn.binarize import binarize_

    torch.manual_seed(0)
    plain = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten()]
    model = nn.Sequential(*plain, nn.Linear(128, 2))
    binarize_(model, recurrent="none", lam=0.0, activations=False)
    third = trained("bilinear")
    for m in third.modules():
        if isinstance(m, RSign):
            m.zero = 0
    for network, x in ((model.eval(), torch.randn(2, 3, 8, 8)), (third, torch.zeros(1, 1, 8, 8))):
        packed = copy.deepcopy(network)
        assert set(pack_(packed).values()) == {"float"}
        again = copy.deepcopy(packed)
        for p in again.parameters():
            p.data.zero_()
        again.load_state_dict(packed.state_dict())
        assert any(k.endswith(".signs") and v.dtype == torch.uint8 for k, v in packed.state_dict().items())
        with torch.no_grad():
            torch.testing.assert_close(packed(x), network(x), rtol=1e-4, atol=1e-4)
            assert torch.equal(again(x), packed(x))
