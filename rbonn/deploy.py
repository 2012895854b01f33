"""A trained network for use: scales folded into the norms, weights that are exactly +-1, and one bit per weight on disk."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import runs
from common.quant.pack import pack_signs, unpack_signs
from rbonn.checkpoint import build_network
from rbonn.model import conv_norm_pairs

FORMAT = "rbonn-packed-1"


@torch.no_grad()
def fold_scale_(norm: nn.BatchNorm2d, scale: Tensor) -> None:
    """Make norm(z) what norm(scale * z) was, in evaluation: gamma' = gamma s, mean' = mean / s; var, eps, beta stay.

    scale: (C,), >= 0. A channel with s = 0 is dead: it becomes the constant that it was, without a division."""
    mean, var, gamma, beta = norm.running_mean, norm.running_var, norm.weight, norm.bias
    if mean is None or var is None:
        raise ValueError("a norm without running statistics cannot take a scale")
    dead = scale == 0
    beta.copy_(torch.where(dead, beta - gamma * mean / (var + norm.eps).sqrt(), beta))
    gamma.mul_(scale)
    mean.copy_(torch.where(dead, 0.0, mean / torch.where(dead, 1.0, scale)))


@torch.no_grad()
def deploy_(network: nn.Module) -> nn.Module:
    """Replace every binary convolution by nn.Conv2d with weights of exactly +-1, its scale folded into the norm; in place.

    Only the scale is folded: between norm and the next sign stands the shortcut's addition, so that in these networks the norm
    itself cannot become a threshold. Evaluation mode. ValueError where a weight is 0 and sign(0) = 0: it has no bit."""
    for parent, name, norm in list(conv_norm_pairs(network)):
        conv: Any = getattr(parent, name)
        if not hasattr(conv, "signs_and_scale"):
            continue
        signs, scale = conv.signs_and_scale()
        if bool((signs == 0).any()):
            raise ValueError(
                f"{int((signs == 0).sum())} weights are exactly 0 and sign(0) = 0 here: load with sign(0) = 1"
            )
        plain = nn.Conv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
            bias=False
        )  # fmt: skip
        plain.weight.copy_(signs)
        plain.weight.requires_grad_(False)
        setattr(parent, name, plain.to(signs.device))
        fold_scale_(norm, scale)
    return network.eval()


def binary_names(network: nn.Module) -> list[str]:
    """Names of the convolutions of a deployed network whose weights are all +-1."""
    return [
        n for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and bool((m.weight.abs() == 1).all())
    ]  # fmt: skip


def pack(network: nn.Module, config: dict[str, Any], *, classes: int, channels: int, size: int) -> dict[str, Any]:
    """Content of a packed file of a deployed network: signs as uint8 bits, everything else as float32, and how to rebuild it."""
    names = binary_names(network)
    state = {k: v for k, v in network.state_dict().items() if k.removesuffix(".weight") not in names}
    signs = {n: pack_signs(network.get_submodule(n).weight.flatten()) for n in names}  # type: ignore[operator, union-attr, arg-type]
    return {
        "format": FORMAT, "signs": signs, "state": state, "classes": classes, "channels": channels, "size": size,
        "model": config["model"], "method": config["method"], "sign_zero": config["parity"]["sign_zero"],
    }  # fmt: skip


def load_packed(path: str | Path) -> nn.Module:
    """The deployed network of a packed file, in evaluation mode. ValueError for another format."""
    content = runs.load_checkpoint(path)
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: format {content.get('format')!r}, expected {FORMAT!r} as export.py writes it")
    network = build_network(
        model=content["model"], method={**content["method"], "weights": "real", "recurrent": "none"},
        sign_zero=content["sign_zero"], classes=content["classes"], channels=content["channels"],
    )  # fmt: skip
    weights = {}
    for name, bits in content["signs"].items():
        shape = network.get_submodule(name).weight.shape  # type: ignore[union-attr]
        weights[f"{name}.weight"] = unpack_signs(bits, shape.numel()).view(shape)  # type: ignore[union-attr, arg-type]
    network.load_state_dict({**content["state"], **weights})
    return network.eval()
