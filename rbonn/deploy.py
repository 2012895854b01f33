"""A trained network for use: as ordinary convolutions of +-1 for ONNX (`deploy_`), and on bits (`pack_`).

names = pack_(network)      # {layer: "bits" | "float"}; then network(x) as before, and torch.save(network.state_dict())
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter

from common.loop import Loaded
from common.quant.binary import RPReLU, RSign
from common.quant.packed_conv import PackedConv2d, SignWeightConv2d, chain, fold_norm_, fold_norms_, pays
from rbonn.binary_conv import BinaryConv2d, binary_layers
from rbonn.model import Block, ReActNetBlock, ReActResNet, conv_norm_pairs
from rbonn.network import build_detector, build_network

FORMAT = "rbonn-packed-3"


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
    """Replace every binary convolution by nn.Conv2d, in place; evaluation mode. ValueError where a weight is 0 and sign(0) = 0.

    The weights are exactly +-1 and the scale is folded into the norm where it is known which norm follows (the backbones of this
    folder, nn.Sequential); elsewhere, as in a network of torchvision, the weights are scale x sign. Only the scale is folded:
    between norm and the next sign stands the shortcut's addition, so the norm itself cannot become a threshold."""
    norms = {getattr(parent, name): norm for parent, name, norm in conv_norm_pairs(network)}
    for parent, name, conv in _children(network, BinaryConv2d):
        signs, scale = _signs_and_scale(conv)
        norm = norms.get(conv)
        geometry: Any = (
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )
        plain = nn.Conv2d(*geometry, bias=norm is None and conv.bias is not None, padding_mode=conv.padding_mode)
        plain.weight.copy_(signs if norm is not None else signs * scale.view(-1, 1, 1, 1))
        if norm is not None:
            fold_scale_(norm, scale, conv.bias)
        elif conv.bias is not None and plain.bias is not None:
            plain.bias.copy_(conv.bias)
        setattr(parent, name, plain.requires_grad_(False).to(signs.device))
    return network.eval()


# ------------------------------------------------------------------------------------------------------------- on bits
class PackedBlock(nn.Module):
    """`rbonn.model.Block` in evaluation: everything behind the sign in one pass."""

    def __init__(self, block: Block):
        super().__init__()
        self.conv = _packed([block.conv], block.sign, [block.norm], block.act)
        self.shortcut = block.shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.shortcut(x))


class PackedReActNetBlock(nn.Module):
    """`rbonn.model.ReActNetBlock` in evaluation: the two 1x1 convolutions side by side are one."""

    def __init__(self, block: ReActNetBlock):
        super().__init__()
        self.conv1 = _packed([block.conv1], block.sign1, [block.norm1], block.act1)
        self.conv2 = _packed(list(block.conv2), block.sign2, list(block.norm2), block.act2)  # type: ignore[arg-type]
        self.pool, self.branches = block.pool, len(block.conv2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x, self.pool(x))
        return self.conv2(x, torch.cat([x] * self.branches, 1) if self.branches > 1 else x)


@torch.no_grad()
def pack_(network: nn.Module) -> dict[str, str]:
    """Put every binary convolution on bits, in place; evaluation mode. Returns {name it had: "bits" or "float"}.

    Bits: its input is a sign of +-1 (an RSign in front); both run as XNOR and population count, with the norm, the shortcut
    and the PReLU behind them. Float: real-valued inputs, signs with sign(0) = 0, or depth-wise, where bits do not pay; one bit
    per weight is stored. Norms of the real-valued convolutions are folded. ValueError where a weight is 0 and sign(0) = 0."""
    names: dict[nn.Module, str] = {m: n for n, m in binary_layers(network).items()}
    found = dict.fromkeys(names.values(), "float")
    network.eval()
    for kind, new in ((Block, PackedBlock), (ReActNetBlock, PackedReActNetBlock)):
        for parent, name, block in _children(network, kind):
            convs = [m for m in block.modules() if isinstance(m, nn.Conv2d) and m in names]
            signs = [m for n, m in block.named_children() if n.startswith("sign")]
            if convs and all(_one_bit(s) for s in signs):
                setattr(parent, name, new(block))
                found |= {names[m]: "bits" for m in convs}
    for sequence in [m for m in network.modules() if isinstance(m, nn.Sequential)]:
        found |= {names[m]: "bits" for m in _pack_sequence(sequence)}
    for parent, name, conv in _children(network, BinaryConv2d):
        signs, scale = _signs_and_scale(conv)
        setattr(parent, name, SignWeightConv2d.of(signs, conv, scale=scale))
    _fold_norms(network)
    return found


def pack(network: nn.Module, config: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Content of a packed file of a network after `pack_`: how to rebuild and use it, and its state, bits included.
    config, about: those of `checkpoint.load`."""
    return {"format": FORMAT, "model": network.state_dict(), "about": dict(about), "config": dict(config)}


def unpack(content: Mapping[str, Any]) -> Loaded:
    """The packed network of a file's content, in evaluation mode, and what is known of it."""
    about = content["about"]
    network = (build_detector if "detector" in about["build"] else build_network)(**about["build"])
    pack_(network)
    network.load_state_dict(content["model"])
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return Loaded(network, dict(content["config"]), about)


def _packed(convs: list[Any], sign: Any, norms: list[nn.BatchNorm2d], act: nn.Module | None) -> PackedConv2d:
    """One packed layer of binary convolutions of the same input, side by side, with what stands around them."""
    signs, scales = zip(*(_signs_and_scale(c) for c in convs), strict=True)
    packed = PackedConv2d.of(torch.cat(signs), convs[0], scale=torch.cat(scales), shift=sign.bias, zero=sign.zero)
    if norms:
        packed.absorb_norm(*norms)
    if isinstance(act, RPReLU):
        packed.absorb_prelu(act.slope, act.shift_in, act.shift_out)
    return packed


def _pack_sequence(sequence: nn.Sequential) -> list[nn.Module]:
    """Packs every sign and convolution that are neighbours, with a norm and an RPReLU right behind, which become nn.Identity;
    returns the convolutions that were packed."""
    done: list[nn.Module] = []
    links = [*chain(sequence), *[(sequence, "", nn.Identity())] * 2]
    for (at, i, sign), (owner, name, conv), *behind in zip(links, links[1:], links[2:], links[3:], strict=False):
        if not (_one_bit(sign) and isinstance(conv, BinaryConv2d) and pays(conv)):
            continue
        follows = [m for _, _, m in behind]
        norms = [m for m in follows[:1] if isinstance(m, nn.BatchNorm2d)]
        act = follows[1] if norms and isinstance(follows[1], RPReLU) else None
        setattr(owner, name, _packed([conv], sign, norms, act))
        gone = [(at, i), *[(o, n) for o, n, m in behind if any(m is x for x in (*norms, act))]]
        for where, which in gone:
            setattr(where, which, nn.Identity())
        done.append(conv)
    return done


def _fold_norms(network: nn.Module) -> None:
    """Folds the norm behind every real-valued convolution of which it is known."""
    fold_norms_(network)
    for m in network.modules():
        pair = ("conv1", "bn1") if isinstance(m, ReActResNet | IntermediateLayerGetter) else ("conv", "norm")
        conv, norm = (m._modules.get(name) for name in pair)
        ours = isinstance(m, ReActResNet | IntermediateLayerGetter | Block)
        if ours and type(conv) in (nn.Conv2d, SignWeightConv2d) and isinstance(norm, nn.BatchNorm2d):
            fold_norm_(conv, norm)  # type: ignore[arg-type]
            m._modules[pair[1]] = nn.Identity()


def _one_bit(sign: nn.Module) -> bool:
    return isinstance(sign, RSign) and sign.zero in (1, -1)


def _signs_and_scale(conv: BinaryConv2d) -> tuple[Tensor, Tensor]:
    signs, scale = conv.signs_and_scale()
    if zeros := int((signs == 0).sum()):
        raise ValueError(f"{zeros} weights are exactly 0 and sign(0) = 0 here: load with sign(0) = 1")
    return signs, scale


def _children(network: nn.Module, kind: type) -> list[tuple[nn.Module, str, Any]]:
    """(parent, name, module) of every module of a kind; a parent comes before its children."""
    return [(p, n, m) for p in network.modules() for n, m in p.named_children() if isinstance(m, kind)]
