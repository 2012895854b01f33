"""IR-50, the "improved ResNet" of ArcFace and face.evoLVe: its first three stages are APViT's stem."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

UNITS = (3, 4, 14)  # a fourth stage of 3 units exists in the face network and is not used
WIDTHS = (64, 128, 256)


class Unit(nn.Module):
    """[BN, conv3x3, PReLU, conv3x3 (stride), BN] + shortcut; (B, in, H, W) -> (B, out, H / stride, W / stride).

    The shortcut is plain sub-sampling where the channels are equal, else a 1x1 convolution with BN."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        if channels == out:
            self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(channels), nn.Conv2d(channels, out, 3, 1, 1, bias=False), nn.PReLU(out),
            nn.Conv2d(out, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class IR50(nn.Module):
    """(B, 3, H, W) -> (B, 256, H / 8, W / 8). Keys as in the released APViT: input_layer.*, body.<stage>.<unit>.*"""

    def __init__(self, *, units: Sequence[int] = UNITS, widths: Sequence[int] = WIDTHS):
        super().__init__()
        if len(units) != len(widths) or min(units) < 1:
            raise ValueError(f"units={list(units)} and widths={list(widths)}: one entry >= 1 per stage")
        channels = widths[0]
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.PReLU(channels)
        )
        self.body = nn.ModuleList()
        for number, width in zip(units, widths, strict=True):
            first = Unit(channels, width, 2)
            self.body.append(nn.Sequential(first, *(Unit(width, width, 1) for _ in range(number - 1))))
            channels = width
        self.out_channels, self.stride = channels, 2 ** len(units)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_layer(x)
        for stage in self.body:
            x = stage(x)
        return x


class ConvStem(nn.Module):
    """The miniature's stem: [conv, BN, PReLU] per width; (B, 3, H, W) -> (B, widths[-1], H / s, W / s), s = prod(strides)."""

    def __init__(self, widths: Sequence[int], strides: Sequence[int] = (2, 2), kernels: Sequence[int] = (3, 3)):
        super().__init__()
        if not widths or not len(widths) == len(strides) == len(kernels):
            raise ValueError(
                f"widths={list(widths)}, strides={list(strides)}, kernels={list(kernels)}: one of each per convolution"
            )
        layers: list[nn.Module] = []
        for channels, width, stride, size in zip([3, *widths], widths, strides, kernels, strict=False):
            convolution = nn.Conv2d(channels, width, size, stride, size // 2, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.PReLU(width)]
        self.layers = nn.Sequential(*layers)
        self.out_channels, self.stride = widths[-1], math.prod(strides)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
