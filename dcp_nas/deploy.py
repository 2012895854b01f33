"""A trained network for use: as ordinary convolutions for ONNX (`deploy_`), and with one bit per weight (`pack_`).

    names = pack_(network)      # {layer: "bits" | "float"}; then network(x) as before, and torch.save(network.state_dict())

The published networks binarise the input of the 1x1 convolutions inside depth-wise separable ones only; those run on bits, with
the norm, the residual and the PReLU behind them. The others have 1-bit weights and real inputs: they are stored with one bit and
run as floats.
"""

from typing import Any

import torch
from torch import Tensor, nn

from common.quant.binary import binary_sign
from common.quant.packed_conv import PackedConv2d, SignWeightConv2d, fold_norms_
from dcp_nas.operations import BinaryConv2d, DilConv, FactorizedReduce, Preprocess, Sign


@torch.no_grad()
def deploy_(network: nn.Module) -> nn.Module:
    """Replace every 1-bit convolution by nn.Conv2d with the weights scale o sign(w), in place; evaluation mode."""
    for parent, name, conv in _children(network, BinaryConv2d):
        geometry: Any = (
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )
        plain = nn.Conv2d(*geometry, bias=False)
        plain.weight.copy_(conv.scale() * binary_sign(conv.weight))
        setattr(parent, name, plain.requires_grad_(False).to(conv.weight.device))
    return network.eval()


class PackedDilConv(nn.Module):
    """`DilConv` in evaluation: real-valued up to the sign, one pass behind it."""

    def __init__(self, conv: DilConv):
        super().__init__()
        self.depthwise, self.residual = conv.body[:5], conv.residual
        self.pointwise = _packed(conv.body[6]).absorb_norm(conv.body[7]).absorb_prelu(conv.act.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x), x if self.residual else None)


@torch.no_grad()
def pack_(network: nn.Module) -> dict[str, str]:
    """Replace every 1-bit convolution in place; evaluation mode. Returns {name it had: "bits" or "float"}.

    Bits: a sign stands in front, and both run as XNOR and population count. Float: real-valued inputs, or depth-wise, where bits
    do not pay. Norms behind real-valued convolutions are folded. ValueError for a network that is not of trained cells (norms
    without running statistics)."""
    names = {m: n for n, m in network.named_modules() if isinstance(m, BinaryConv2d)}
    found = dict.fromkeys(names.values(), "float")
    network.eval()
    for parent, name, conv in _children(network, DilConv):
        if isinstance(conv.body[5], Sign) and isinstance(conv.body[6], BinaryConv2d):
            setattr(parent, name, PackedDilConv(conv))
            found[names[conv.body[6]]] = "bits"
    for _, _, block in _children(network, Preprocess):
        if isinstance(block[1], Sign) and isinstance(block[2], BinaryConv2d):
            found[names[block[2]]] = "bits"
            block[2] = _packed(block[2]).absorb_norm(block[3]).absorb_prelu(block[4].weight)  # type: ignore[arg-type]
            block[1] = block[3] = block[4] = nn.Identity()
    for _, _, block in _children(network, FactorizedReduce):
        if isinstance(block.sign, Sign) and isinstance(block.even, BinaryConv2d):
            for half in ("even", "odd"):
                conv = getattr(block, half)
                found[names[conv]] = "bits"
                setattr(block, half, _packed(conv))
            block.sign = nn.Identity()
    for parent, name, conv in _children(network, BinaryConv2d):
        setattr(parent, name, SignWeightConv2d.of(binary_sign(conv.weight), conv, scale=conv.scale()))
    fold_norms_(network)
    return found


def _packed(conv: Any) -> PackedConv2d:
    return PackedConv2d.of(binary_sign(conv.weight), conv, scale=conv.scale())


def _children(network: nn.Module, kind: type) -> list[tuple[nn.Module, str, Any]]:
    """(parent, name, module) of every module of a kind."""
    return [(p, n, m) for p in network.modules() for n, m in p.named_children() if isinstance(m, kind)]
