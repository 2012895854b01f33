"""A quantised ResNet in evaluation whose convolutions run on 8-bit integers, channels last, with what follows them folded in.

    integer_stages_(student.backbone[0].body)       # in place; a part of `q_detr.integer.integers_`

Frozen norms go into scales and biases of the convolutions in front of them, and so does the first shift of the RPReLU behind; the
second shift of a block's last RPReLU goes to the next block. All of it is folded in float64: equal to a rounding.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from common.quant.binary import RPReLU
from common.quant.integer_onnx import IntegerConv2d, Operand
from common.quant.lsq import LSQQuantizer
from q_detr.detr import ResNetBody
from q_detr.quantized_detr import PreActivationBlock, QuantConv2d

FEW = 4  # channels of an image and the like: gathering their windows takes longer than float32 takes for all (measured)


class Bend(nn.Module):
    """slope_c min(x + shift_c, 0) + max(x + shift_c, 0) + shift'_c along `axis`: RPReLU, or PReLU or ReLU without shifts.

    A maximum of two lines where no slope is above 1: onnxruntime's PRelu takes seven times as long (measured)."""

    slope: Tensor | None
    shift_in: Tensor | None
    shift_out: Tensor | None

    def __init__(self, act: nn.Module, *, axis: int):
        super().__init__()
        self.shape = [-1 if axis in (i, i - 4) else 1 for i in range(4)]
        shifts: tuple[Any, Any] = (act.shift_in, act.shift_out) if isinstance(act, RPReLU) else (None, None)
        slope: Any = {RPReLU: "slope", nn.PReLU: "weight", nn.ReLU: None}[type(act)]
        slope = slope and getattr(act, slope)
        for name, t in (("shift_in", shifts[0]), ("slope", slope), ("shift_out", shifts[1])):
            self.register_buffer(name, None if t is None else t.detach().reshape(self.shape).clone())
        self.gentle = self.slope is None or bool((self.slope <= 1).all())

    def take(self, which: str) -> Tensor:
        """A shift, (C,), or () if there is none; it is no longer added here."""
        shift = getattr(self, which)
        setattr(self, which, None)
        return torch.zeros(()) if shift is None else shift.flatten()

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.shift_in is None else x + self.shift_in
        if self.slope is None:
            x = x.relu()
        else:
            x = torch.maximum(x, x * self.slope) if self.gentle else x.relu() + x.clamp(max=0) * self.slope
        return x if self.shift_out is None else x + self.shift_out


class _InFloat(nn.Module):
    """A real-valued convolution and its norm on channels last."""

    def __init__(self, conv: nn.Module, norm: nn.Module):
        super().__init__()
        self.conv, self.norm = conv, norm

    def channels_last(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class IntegerBlock(nn.Module):
    """A residual block, (B, H, W, in) -> (B, H', W', out). late: a shift, (in,), that its input still lacks."""

    def __init__(self, block: PreActivationBlock | BasicBlock | Bottleneck, late: Tensor):
        super().__init__()
        self.depth, get = 3 if hasattr(block, "conv3") else 2, lambda name: getattr(block, name)
        own = isinstance(block, PreActivationBlock)
        acts = [Bend(get(f"act{i}") if own else nn.ReLU(), axis=-1) for i in range(self.depth + 1)]
        self.first = acts[0] if own else nn.Identity()
        self.acts = nn.ModuleList(acts[1:])
        self.convs = nn.ModuleList(_folded(get(f"conv{i}"), get(f"bn{i}")) for i in range(1, self.depth + 1))
        down: Any = block.downsample
        self.downsample = None if down is None else _folded(*down)
        if late.ndim:
            if not own or self.downsample is not None:
                raise ValueError("only a block with an identity as its shortcut can add a shift that its input lacks")
            acts[0].shift_in = acts[0].shift_in + late.view(acts[0].shape)  # type: ignore[operator]
        for conv, act in zip(self.convs, acts[1:], strict=True):
            shift = act.take("shift_in") + (late if act is acts[-1] else 0)
            conv.absorb_(torch.ones_like(conv.scale), shift.expand_as(conv.scale))  # type: ignore[operator, arg-type]

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(x)
        for conv, act in zip(self.convs[:-1], self.acts[:-1], strict=True):
            out = act(conv.channels_last(out))  # type: ignore[operator]
        shortcut = x if self.downsample is None else self.downsample.channels_last(x)  # type: ignore[operator]
        return self.acts[-1](self.convs[-1].channels_last(out) + shortcut)  # type: ignore[operator]


def _folded(conv: nn.Module, norm: nn.Module) -> IntegerConv2d | _InFloat:
    if not isinstance(conv, QuantConv2d) or not isinstance(conv.act_quant, LSQQuantizer):
        return _InFloat(conv, norm)
    layer = IntegerConv2d(Operand(conv.act_quant, left=True), conv.weight_quant, conv)  # type: ignore[arg-type]
    return layer.absorb_(*_line(norm))


def _line(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a frozen norm, (C,) in float64."""
    if not isinstance(norm, FrozenBatchNorm2d):
        raise ValueError(f"{type(norm).__name__} behind a convolution: only frozen norms are constants")
    variance, mean, weight, bias = (
        getattr(norm, n).double() for n in ("running_var", "running_mean", "weight", "bias")
    )
    scale = weight / (variance + norm.eps).sqrt()
    return scale, bias - mean * scale


def _fold_stem_(body: ResNetBody) -> None:
    """The first convolution stays real-valued, its weight on the grid, with the norm behind it folded in."""
    conv, (scale, shift) = body.conv1, _line(body.bn1)
    weight = conv.weight_quant(conv.weight).double() * scale.view(-1, 1, 1, 1)  # type: ignore[operator]
    bias = shift if conv.bias is None else shift + scale * conv.bias.double()
    conv.weight, conv.bias = (nn.Parameter(t.to(conv.weight.dtype)) for t in (weight, bias))
    conv.weight_quant, body.bn1 = nn.Identity(), nn.Identity()


class IntegerStage(nn.Module):
    """A stage of blocks, (B, in, H, W) -> (B, out, H', W'), channels last within."""

    def __init__(self, stage: nn.Sequential):
        super().__init__()
        self.blocks, late = nn.ModuleList(), torch.zeros(())
        for block in stage:
            self.blocks.append(IntegerBlock(block, late))  # type: ignore[arg-type]
            last, late = self.blocks[-1].acts[-1], torch.zeros(())  # type: ignore[index]
            if len(self.blocks) < len(stage) and stage[len(self.blocks)].downsample is None:
                late = last.take("shift_out")  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return x.permute(0, 3, 1, 2)


@torch.no_grad()
def integer_stages_(body: nn.Module) -> None:
    """Replaces the stages of a ResNet whose blocks are quantised, and folds its stem. Others stay."""
    if not isinstance(body, ResNetBody) or not isinstance(body.layer1[0].conv1, QuantConv2d):
        return
    for name in ("layer1", "layer2", "layer3", "layer4"):
        setattr(body, name, IntegerStage(getattr(body, name)))
    _fold_stem_(body)
