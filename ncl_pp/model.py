"""K complete networks side by side: backbones (CIFAR ResNet-32, a small conv net, any timm model), heads."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncl_pp.contrastive import MomentumContrast


def option_a_shortcut(x: Tensor, planes: int) -> Tensor:
    """Parameter-free shortcut: every second pixel, channels zero-padded evenly on both sides.

    (B, c, H, W) -> (B, planes, ceil(H/2), ceil(W/2)); with planes = 2c the padding is planes/4 on each side.
    """
    pad = (planes - x.shape[1]) // 2
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad))


class _BasicBlock(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride, self.planes = stride, planes

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.stride == 1 else option_a_shortcut(x, self.planes)))


CIFAR_RESNETS = {"resnet8": 1, "resnet20": 3, "resnet32": 5}  # blocks of a stage; none of these is a name of timm


class CifarResNet(nn.Module):
    """The ResNets of CIFAR: 3 x `blocks` basic blocks of width, 2*width, 4*width channels, option-A shortcuts, kaiming-normal
    init.

    Images (B, in_channels, H, W) -> features (B, 4*width). blocks = 5 is ResNet-32, 463,504 parameters for three input channels.
    """

    def __init__(self, blocks: int = 5, *, in_channels: int = 3, width: int = 16):
        super().__init__()
        if width < 4 or width % 4:
            raise ValueError(f"width={width}, allowed: multiples of 4")
        self.num_features = 4 * width
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        made, inplanes = [], width
        for planes in (width, 2 * width, 4 * width):
            for _ in range(blocks):
                made.append(_BasicBlock(inplanes, planes, stride=1 if inplanes == planes else 2))
                inplanes = planes
        self.blocks = nn.Sequential(*made)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)

    def feature_map(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, 4*width, H/4, W/4), before global average pooling."""
        return self.blocks(F.relu(self.bn1(self.conv1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.feature_map(x).mean((2, 3))


class ConvNet(nn.Module):
    """Three conv-BN-ReLU blocks of width, 2*width, 4*width channels, strides 1, 2, 2, global average pooling.

    Images (B, in_channels, H, W) -> features (B, 4*width).
    """

    def __init__(self, *, in_channels: int = 1, width: int = 8):
        super().__init__()
        if width < 1:
            raise ValueError(f"width={width}, allowed: >= 1")
        self.num_features = 4 * width
        layers: list[nn.Module] = []
        for planes, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
            layers += [
                nn.Conv2d(in_channels, planes, 3, stride, 1, bias=False),
                nn.BatchNorm2d(planes),
                nn.ReLU(),
            ]
            in_channels = planes
        self.blocks = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).mean((2, 3))


def build_backbone(
    name: str,
    *,
    in_channels: int = 3,
    width: int | None = None,
    pretrained: bool = False,
    official_init: bool = False,
) -> nn.Module:
    """A network from images (B, in_channels, H, W) to features (B, backbone.num_features).

    name: resnet8, resnet20, resnet32 (of CIFAR) | convnet | any timm model name. width: channels of the first stage,
    null: 8 in the convnet, 16 in the ResNets of CIFAR; timm's have their own.
    pretrained: timm's weights (timm models only; downloads). official_init: torch's default convolution init
    instead of timm's, as the published code has it for ResNet-50/152 trained from scratch. ValueError for a
    name that neither this file nor timm knows.
    """
    if name == "convnet" or name in CIFAR_RESNETS:
        if pretrained or official_init:
            raise ValueError(f"pretrained and official_init apply to timm models, not to {name!r}")
        if name == "convnet":
            return ConvNet(in_channels=in_channels, width=8 if width is None else width)
        return CifarResNet(CIFAR_RESNETS[name], in_channels=in_channels, width=16 if width is None else width)
    if width is not None:
        raise ValueError(f"width={width} applies to the convnet and the ResNets of CIFAR, not to {name!r}")
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name}*")[:5]) or "see timm.list_models()"
        raise ValueError(f"backbone {name!r}, allowed: {', '.join(CIFAR_RESNETS)}, convnet or a timm model ({close})")
    if pretrained and official_init:
        raise ValueError("pretrained=True and official_init=True exclude each other")
    backbone = timm.create_model(name, pretrained=pretrained, num_classes=0, in_chans=in_channels)
    if official_init:
        for m in backbone.modules():
            if isinstance(m, nn.Conv2d | nn.BatchNorm2d):  # timm also zeroes the last BN weight of a block
                m.reset_parameters()
    return backbone


def _no_autocast(x: Tensor) -> torch.autocast:
    kind = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"  # the meta device has none
    return torch.autocast(kind, enabled=False)


class LinearHead(nn.Linear):
    """Linear classifier with bias: features (..., d) -> logits (..., C), in the precision of the weight also under autocast: the
    divergence between two experts is a small difference of logits."""

    def forward(self, x: Tensor) -> Tensor:
        with _no_autocast(x):
            return super().forward(x.to(self.weight.dtype))


class CosineHead(nn.Module):
    """out_c = scale * <x/|x|, w_c/|w_c|> + b_c: features (..., d) -> logits (..., C).

    Published scales: 16 for ImageNet-LT and Places-LT, 32 for iNaturalist. w starts uniform in +-1/sqrt(d),
    b at 0.
    """

    def __init__(self, in_features: int, num_classes: int, *, scale: float = 16.0):
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale={scale}, allowed: > 0")
        self.scale = scale
        bound = in_features**-0.5
        self.weight = nn.Parameter(torch.empty(num_classes, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        with _no_autocast(x):  # squared norms overflow and underflow in half precision
            x = x.to(self.weight.dtype)
            return self.scale * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1)) + self.bias


class Experts(nn.Module):
    """K independent networks, backbone and head each, that differ by their random initialisation.

    backbone: a name for `build_backbone`, which also takes the remaining keywords, or a function without
    arguments that returns a new module with the attribute `num_features`. head: linear | cosine (then
    `scale`).
    """

    def __init__(
        self,
        backbone: str | Callable[[], nn.Module],
        num_classes: int,
        *,
        experts: int = 2,
        head: Literal["linear", "cosine"] = "linear",
        scale: float = 16.0,
        **backbone_options: Any,
    ):
        super().__init__()
        if head not in ("linear", "cosine"):
            raise ValueError(f"head={head!r}, allowed: linear, cosine")
        if experts < 1 or num_classes < 1:
            raise ValueError(f"experts={experts}, num_classes={num_classes}, allowed: >= 1")
        if isinstance(backbone, str):
            backbone = partial(build_backbone, backbone, **backbone_options)
        elif backbone_options:
            raise ValueError(f"{', '.join(backbone_options)}: only for a backbone given by name")
        self.backbones = nn.ModuleList(backbone() for _ in range(experts))
        dims = [int(b.num_features) for b in self.backbones]  # type: ignore[arg-type]
        self.num_features = dims[0]
        self.heads = nn.ModuleList(
            LinearHead(d, num_classes) if head == "linear" else CosineHead(d, num_classes, scale=scale) for d in dims
        )

    def features(self, x: Tensor) -> Tensor:
        """Images (M, channels, H, W), the same for every expert -> features (K, M, d)."""
        return torch.stack([backbone(x) for backbone in self.backbones])

    def classify(self, features: Tensor) -> Tensor:
        """Features (K, M, d) -> raw logits (K, M, C)."""
        return torch.stack([head(f) for head, f in zip(self.heads, features, strict=True)])

    def forward(self, x: Tensor) -> Tensor:
        """Images (M, channels, H, W) -> raw logits (K, M, C)."""
        return self.classify(self.features(x))

    def single(self, k: int) -> nn.Sequential:
        """Expert k alone, images -> logits (M, C). It shares its weights with this module."""
        if not 0 <= k < len(self.heads):
            raise ValueError(f"expert {k}, allowed: 0..{len(self.heads) - 1}")
        return nn.Sequential(self.backbones[k], self.heads[k])


class NCLModel(nn.Module):
    """What is trained as one module: the experts and, in NCL with self-supervision, the MoCo branch.

    Everything that needs gradients passes through `forward`, so that DDP synchronises it. contrast: None in
    every other arm; weight: w_con.
    """

    def __init__(self, experts: Experts, contrast: MomentumContrast | None = None, *, weight: float = 1.0):
        super().__init__()
        if not 0 <= weight < float("inf"):
            raise ValueError(f"w_con={weight!r}, allowed: finite and >= 0")
        self.experts, self.contrast, self.weight = experts, contrast, weight

    def forward(self, images: Tensor, second: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (N*B, channels, H, W), copy-major, and for the MoCo branch a second view (B, channels, H, W).

        -> raw logits (K, N*B, C) and {"contrast": w_con * sum_k L_con^k}, {} without a second view. The query
        is the first copy, the view that is classified.
        """
        features = self.experts.features(images)
        logits = self.experts.classify(features)
        if second is None:
            return logits, {}
        if self.contrast is None:
            raise ValueError("a second view was given, but this model has no contrastive branch")
        term = self.contrast(features[:, : len(second)], second)
        if self.contrast.official_quirks:  # averaged before the optimiser step
            self.contrast.update(self.experts.backbones)
        return logits, {"contrast": self.weight * term}

    def after_step(self) -> None:
        """Moves the momentum encoders of the MoCo branch, if there is one; call it after the optimiser step."""
        if self.contrast is not None and not self.contrast.official_quirks:
            self.contrast.update(self.experts.backbones)


def ensemble(logits: Tensor) -> Tensor:
    """Prediction of all experts together: the mean of their RAW logits, (K, M, C) -> (M, C)."""
    return logits.mean(0)


class Ensemble(nn.Module):
    """Images (M, channels, H, W) -> logits (M, C), the mean of the experts' raw logits."""

    def __init__(self, experts: Experts):
        super().__init__()
        self.experts = experts

    def forward(self, images: Tensor) -> Tensor:
        return ensemble(self.experts(images))
