"""Deployed, packed and exported networks give the outputs of the trained one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.quant.pack import binary_conv2d, pack_signs
from rbonn.binary_conv import binary_layers
from rbonn.deploy import binary_names, deploy_, fold_scale_
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
    assert len(binary_names(deployed)) == count == (2 if name == "react_resnet" else 5)


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
    assert binary_names(model) == ["3.1"] and model[3][1].bias is None


def test_a_binary_layer_without_a_norm_is_named():
    from rbonn.layers import make_conv

    with pytest.raises(ValueError, match="no batch norm to take the scale of 0"):
        deploy_(nn.Sequential(make_conv(weights="xnor")(2, 2, 3), nn.ReLU()))
