"""The backbones: the Bi-Real/ReActNet residual network (18, 34 or small) and ReActNet-A.

They take the builders of `rbonn.layers`, so that every arm is the same network with another convolution."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from common.quant.binary import RPReLU
from rbonn.binary_conv import BinaryConv2d, binary_layers

Conv = Callable[..., nn.Conv2d]
Sign = Callable[[int], nn.Module]
STEMS = ("imagenet", "small")
RESNETS = {18: (4, 4, 4, 4), 34: (6, 8, 12, 6)}  # 3x3 convolutions, each with its own shortcut, per stage
WIDTHS = (64, 128, 256, 512)
REACTNET_A = (32, 64, 128, 128, 256, 256, *(512,) * 6, 1024, 1024)


class Block(nn.Module):
    """RPReLU(norm(conv3x3(sign(x + b))) + shortcut(x)). (B, in, H, W) -> (B, out, ceil(H/stride), ceil(W/stride))."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, conv: Conv, sign: Sign):
        super().__init__()
        self.sign = sign(in_channels)
        self.conv = conv(in_channels, out_channels, 3, stride=stride, padding=1)
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = RPReLU(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            # ceil_mode changes nothing at even sizes and fits the convolution at odd ones
            pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride != 1 else nn.Identity()
            project = nn.Conv2d(in_channels, out_channels, 1, bias=False)
            self.shortcut = nn.Sequential(pool, project, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(self.sign(x))) + self.shortcut(x))


class ReActResNet(nn.Module):
    """Stem, one stage of `Block`s per entry of layers and widths (all but the first halve the size), average pool, linear.

    layers: blocks, that is 3x3 convolutions, per stage; ResNet-18 has (4, 4, 4, 4). stem: imagenet = 7x7/2 convolution and
    3x3/2 max pool, small = 3x3 convolution. No ReLU after the stem. (B, in_channels, H, W) -> (B, num_classes)."""

    def __init__(
        self, *, num_classes: int, in_channels: int, conv: Conv, sign: Sign, layers: Sequence[int] = RESNETS[18],
        widths: Sequence[int] = WIDTHS, stem: str = "imagenet",
    ):  # fmt: skip
        super().__init__()
        if stem not in STEMS or len(layers) != len(widths) or not layers or min(*layers, *widths) < 1:
            raise ValueError(
                f"stem={stem!r}, layers={list(layers)}, widths={list(widths)}: needs a stem of {STEMS} and one width per stage"
            )
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(in_channels, widths[0], kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        self.stages = [f"layer{i}" for i in range(1, len(layers) + 1)]
        channels = widths[0]
        for i, (name, blocks, width) in enumerate(zip(self.stages, layers, widths, strict=True)):
            strides = [1 if i == 0 else 2] + [1] * (blocks - 1)
            inputs = [channels] + [width] * (blocks - 1)
            stage = [Block(c, width, s, conv=conv, sign=sign) for c, s in zip(inputs, strides, strict=True)]
            self.add_module(name, nn.Sequential(*stage))
            channels = width
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(self.avgpool(x).flatten(1))


class ReActNetBlock(nn.Module):
    """Depth of ReActNet-A: 3x3 convolution, then one 1x1 or, where the width doubles, two 1x1 side by side."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, conv: Conv, sign: Sign):
        super().__init__()
        if out_channels not in (in_channels, 2 * in_channels):
            raise ValueError(f"out_channels={out_channels}, allowed: in_channels={in_channels} or twice that")
        branches = out_channels // in_channels
        self.sign1, self.sign2 = sign(in_channels), sign(in_channels)
        self.conv1 = conv(in_channels, in_channels, 3, stride=stride, padding=1)
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.act1, self.act2 = RPReLU(in_channels), RPReLU(out_channels)
        self.conv2 = nn.ModuleList(conv(in_channels, in_channels, 1) for _ in range(branches))
        self.norm2 = nn.ModuleList(nn.BatchNorm2d(in_channels) for _ in range(branches))
        self.pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if stride == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.norm1(self.conv1(self.sign1(x))) + self.pool(x))
        y = self.sign2(x)
        branches = [norm(conv(y)) + x for conv, norm in zip(self.conv2, self.norm2, strict=True)]
        return self.act2(torch.cat(branches, 1))


class ReActNetA(nn.Module):
    """ReActNet-A (MobileNetV1-like). widths: of the stem and after every block. (B, in_channels, H, W) -> (B, num_classes)."""

    def __init__(
        self, *, num_classes: int, in_channels: int, conv: Conv, sign: Sign, widths: Sequence[int] = REACTNET_A
    ):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0])
        )  # fmt: skip
        strides = [2 if b != a and i > 0 else 1 for i, (a, b) in enumerate(pairwise(widths))]
        self.blocks = nn.Sequential(
            *(
                ReActNetBlock(a, b, s, conv=conv, sign=sign)
                for a, b, s in zip(widths, widths[1:], strides, strict=False)
            )
        )
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def build_model(*, name: str, num_classes: int, in_channels: int, conv: Conv, sign: Sign, **options) -> nn.Module:
    """react_resnet or reactnet_a with the options of its class. ValueError for another name."""
    kinds = {"react_resnet": ReActResNet, "reactnet_a": ReActNetA}
    if name not in kinds:
        raise ValueError(f"model.name={name!r}, allowed: {', '.join(kinds)}")
    return kinds[name](num_classes=num_classes, in_channels=in_channels, conv=conv, sign=sign, **options)


def conv_norm_pairs(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.BatchNorm2d]]:
    """(parent, name of the binary convolution in it, the norm that follows) for every one of these backbones' blocks, and in
    every nn.Sequential (the neck of the detector)."""
    for m in model.modules():
        if isinstance(m, Block):
            yield m, "conv", m.norm
        elif isinstance(m, ReActNetBlock):
            yield m, "conv1", m.norm1
            for i, norm in enumerate(m.norm2):
                yield m.conv2, str(i), norm  # type: ignore[misc]
        elif isinstance(m, nn.Sequential):
            for (name, child), norm in pairwise([*m.named_children(), ("", None)]):
                norm, parent = norm[1], m
                if isinstance(child, nn.Sequential) and len(child):  # (sign, convolution), norm
                    parent, name, child = child, *list(child.named_children())[-1]
                if isinstance(child, BinaryConv2d) and isinstance(norm, nn.BatchNorm2d):
                    yield parent, name, norm


def operand_bits(model: nn.Module) -> dict[str, tuple[int, int]]:
    """{name of a convolution: (1, 1)} for every binary one, for `common.metrics.ops.layer_ops`."""
    return dict.fromkeys(binary_layers(model), (1, 1))
