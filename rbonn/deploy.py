"""A trained network for use: scales folded into the norms, weights that are exactly +-1, and one bit per weight on disk."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.loop import Loaded
from common.quant.pack import pack_signs, unpack_signs
from rbonn.binary_conv import BinaryConv2d, binary_layers
from rbonn.model import conv_norm_pairs
from rbonn.network import build_detector, build_network

FORMAT = "rbonn-packed-2"


@torch.no_grad()
def fold_scale_(norm: nn.BatchNorm2d, scale: Tensor, bias: Tensor | None = None) -> None:
    """Make norm(z) what norm(scale * z + bias) was, in evaluation: gamma' = gamma s, mean' = (mean - bias) / s; var, eps, beta
    stay.

    scale: (C,), >= 0; bias: (C,) or None. A channel with s = 0 is dead: the constant that it was, without a division."""
    mean, var, gamma, beta = norm.running_mean, norm.running_var, norm.weight, norm.bias
    if mean is None or var is None:
        raise ValueError("a norm without running statistics cannot take a scale")
    if bias is not None:
        mean.sub_(bias)
    dead = scale == 0
    beta.copy_(torch.where(dead, beta - gamma * mean / (var + norm.eps).sqrt(), beta))
    gamma.mul_(scale)
    mean.copy_(torch.where(dead, 0.0, mean / torch.where(dead, 1.0, scale)))


@torch.no_grad()
def deploy_(network: nn.Module) -> nn.Module:
    """Replace every binary convolution by nn.Conv2d with weights of exactly +-1, its scale folded into the norm; in place.

    Only the scale is folded: between norm and the next sign stands the shortcut's addition, so that in these networks the norm
    itself cannot become a threshold. Evaluation mode. ValueError where a weight is 0 and sign(0) = 0: it has no bit, and for a
    binary convolution that no norm follows."""
    for parent, name, norm in list(conv_norm_pairs(network)):
        conv = getattr(parent, name)
        if not isinstance(conv, BinaryConv2d):
            continue
        signs, scale = conv.signs_and_scale()
        if bool((signs == 0).any()):
            raise ValueError(
                f"{int((signs == 0).sum())} weights are exactly 0 and sign(0) = 0 here: load with sign(0) = 1"
            )
        geometry: Any = (
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )
        plain = nn.Conv2d(*geometry, bias=False, padding_mode=conv.padding_mode)
        plain.weight.copy_(signs)
        plain.weight.requires_grad_(False)
        setattr(parent, name, plain.to(signs.device))
        fold_scale_(norm, scale, conv.bias)
    if left := binary_layers(network):
        raise ValueError(f"no batch norm to take the scale of {', '.join(left)}")
    return network.eval()


def binary_names(network: nn.Module) -> list[str]:
    """Names of the convolutions of a deployed network whose weights are all +-1."""
    return [
        n for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and bool((m.weight.abs() == 1).all())
    ]  # fmt: skip


def pack(network: nn.Module, config: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Content of a packed file of a deployed network: signs as uint8 bits, everything else as float32, and how to rebuild and use
    it. config, about: those of `checkpoint.load`."""
    names = binary_names(network)
    state = {k: v for k, v in network.state_dict().items() if k.removesuffix(".weight") not in names}
    signs = {n: pack_signs(network.get_submodule(n).weight.flatten()) for n in names}  # type: ignore[operator, union-attr, arg-type]
    build = {**about["build"], "method": {**about["build"]["method"], "weights": "real", "recurrent": "none"}}
    return {
        "format": FORMAT,
        "signs": signs,
        "state": state,
        "about": {**about, "build": build},
        "config": dict(config),
    }


def unpack(content: Mapping[str, Any]) -> Loaded:
    """The deployed network of a packed file's content, in evaluation mode, and what is known of it."""
    about = content["about"]
    network = (build_detector if "detector" in about["build"] else build_network)(**about["build"])
    weights = {}
    for name, bits in content["signs"].items():
        shape = network.get_submodule(name).weight.shape  # type: ignore[union-attr]
        weights[f"{name}.weight"] = unpack_signs(bits, shape.numel()).view(shape)  # type: ignore[union-attr, arg-type]
    network.load_state_dict({**content["state"], **weights})
    return Loaded(network.eval(), dict(content["config"]), about)
