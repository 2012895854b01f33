"""Networks with a spatial attention gate: rps_net, mlp, resnet18, any timm backbone; heads that grow.

Every model maps images (B, c, H, W), normalised, to logits (B, C); `model(x, return_attention=True)` also returns the map
(B, 1, H, W) in (0, 1), and `model.features(x)` what the head sees.
"""

from collections.abc import Sequence

import timm
import torch
import torchvision
from torch import Tensor, nn

MODELS = ("rps_net", "mlp", "resnet18", "timm")


class SpatialAttention(nn.Module):
    """a = sigmoid(BN(a')), a' = sigmoid(conv7x7([mean, max over channels])): features (B, C, H, W) -> (B, 1, H, W).

    The second sigmoid is the released code's: it keeps a within about 0.27 .. 0.88. double=False leaves it out (mlp)."""

    def __init__(self, *, double: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(1) if double else None

    def forward(self, features: Tensor) -> Tensor:
        a = self.conv(torch.cat([features.mean(1, keepdim=True), features.amax(1, keepdim=True)], 1)).sigmoid()
        return a if self.norm is None else self.norm(a).sigmoid()


class Gated(nn.Module):
    """What the models share: forward from `embed`, which returns features (B, D) and the attention map."""

    head: nn.Linear

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise TypeError(f"{type(self).__name__} must define embed(x) -> (features, attention)")

    def features(self, x: Tensor) -> Tensor:
        return self.embed(x)[0]

    def forward(self, x: Tensor, return_attention: bool = False):
        features, attention = self.embed(x)
        logits = self.head(features)
        return (logits, attention) if return_attention else logits


class _Block(nn.Module):
    def __init__(self, inside: int, out: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1), nn.BatchNorm2d(out),
        )  # fmt: skip
        project = [nn.Conv2d(inside, out, 3, padding=1), nn.BatchNorm2d(out)] if inside != out else []
        self.skip = nn.Sequential(*project)

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.skip(x)).relu()


class RPSNet(Gated):
    """The CIFAR network: attention after the first convolution, four residual groups, generalised-mean pooling (p = 3).

    widths: channels of the groups, two blocks each; pooling by 2 after the second and the third group only.
    unused: adds the PReLU scalar that the released class owns and never uses, so that totals agree with it."""

    def __init__(
        self,
        num_classes: int,
        *,
        channels: int = 3,
        widths: Sequence[int] = (21, 42, 85, 170),
        unused: bool = False,
    ):
        super().__init__()
        if len(widths) != 4 or min(widths) < 1:
            raise ValueError(f"widths={list(widths)}, allowed: four numbers of channels >= 1")
        w1, w2, w3, w4 = widths
        self.conv = nn.Conv2d(channels, w1, 3, padding=1)
        self.attention = SpatialAttention()
        self.norm = nn.BatchNorm2d(w1)
        self.groups = nn.Sequential(
            _Block(w1, w1), _Block(w1, w1),
            _Block(w1, w2), _Block(w2, w2), nn.MaxPool2d(2),
            _Block(w2, w3), _Block(w3, w3), nn.MaxPool2d(2),
            _Block(w3, w4), _Block(w4, w4),
        )  # fmt: skip
        self.head = nn.Linear(w4, num_classes, bias=False)
        self.unused = nn.PReLU() if unused else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.conv(x)
        attention = self.attention(first)
        x = self.groups(self.norm(attention * first).relu())
        return x.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3), attention


class AttentionMLP(Gated):
    """The MNIST network: a convolution feeds the attention only; the gated image goes through two hidden layers.

    size: image side; unused: adds the 1x1 convolution (3 weights) that the released class owns and never uses."""

    def __init__(self, num_classes: int, *, channels: int = 1, size: int = 28, hidden: int = 400, unused: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(channels, 3, 3, padding=1, bias=False)
        self.attention = SpatialAttention(double=False)
        self.body = nn.Sequential(
            nn.Linear(channels * size * size, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.head = nn.Linear(hidden, num_classes, bias=False)
        self.unused = nn.Conv2d(3, 1, 1, bias=False) if unused else None

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        attention = self.attention(self.conv(x))
        return self.body((attention * x).flatten(1)), attention


class GatedBackbone(Gated):
    """A 3x3 convolution c -> c and the attention gate at full input resolution in front of any feature extractor.

    backbone: images -> features (B, dim). The head has a bias, as torchvision's ResNet has."""

    def __init__(self, backbone: nn.Module, dim: int, num_classes: int, *, channels: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.attention = SpatialAttention()
        self.backbone = backbone
        self.head = nn.Linear(dim, num_classes)

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.conv(x)
        attention = self.attention(first)
        return self.backbone(attention * first), attention


def build_model(
    *,
    name: str,
    num_classes: int,
    channels: int = 3,
    size: int = 32,
    widths: Sequence[int] = (21, 42, 85, 170),
    hidden: int = 400,
    backbone: str = "resnet18",
    pretrained: bool = False,
    small_images: bool = False,
    unused: bool = False,
) -> Gated:
    """A model by name.

    rps_net: widths. mlp: size, hidden. resnet18: torchvision's; small_images replaces its 7x7 stem and first pooling by a
    3x3 convolution (the usual CIFAR variant); pretrained loads ImageNet weights (downloads). timm: any timm model called
    `backbone`. unused: see RPSNet and AttentionMLP. ValueError for an unknown name."""
    if name not in MODELS:
        raise ValueError(f"model.name={name!r}, allowed: {', '.join(MODELS)}")
    if num_classes < 1 or channels < 1:
        raise ValueError(f"num_classes={num_classes}, channels={channels}, allowed: >= 1")
    if name == "rps_net":
        return RPSNet(num_classes, channels=channels, widths=widths, unused=unused)
    if name == "mlp":
        return AttentionMLP(num_classes, channels=channels, size=size, hidden=hidden, unused=unused)
    if name == "resnet18":
        weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1 if pretrained else None
        if pretrained and (channels != 3 or small_images):
            raise ValueError("model.pretrained=true needs RGB images and model.small_images=false")
        net = torchvision.models.resnet18(weights=weights)
        if small_images or channels != 3:
            net.conv1 = nn.Conv2d(
                channels, 64, 3 if small_images else 7, 1 if small_images else 2, 1 if small_images else 3, bias=False
            )
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        if small_images:
            net.maxpool = nn.Identity()  # type: ignore[assignment]
        net.fc = nn.Identity()  # type: ignore[assignment]
        return GatedBackbone(net, 512, num_classes, channels=channels)
    try:
        net = timm.create_model(backbone, pretrained=pretrained, num_classes=0, in_chans=channels)
    except RuntimeError as error:
        raise ValueError(f"model.backbone={backbone!r}: {error}; allowed: the names of timm.list_models()") from error
    return GatedBackbone(net, int(net.num_features), num_classes, channels=channels)  # type: ignore[arg-type]


def grow_head(model: Gated, num_classes: int) -> None:
    """Widen the head to `num_classes` outputs in place; rows that exist keep their values, new ones are drawn freshly.

    ValueError for fewer outputs than there are. Optimisers must be made anew."""
    old = model.head
    if num_classes < old.out_features:
        raise ValueError(f"a head of {old.out_features} classes cannot shrink to {num_classes}")
    if num_classes == old.out_features:
        return
    new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None).to(old.weight)
    with torch.no_grad():
        new.weight[: old.out_features] = old.weight
        if old.bias is not None:
            new.bias[: old.out_features] = old.bias
    model.head = new
