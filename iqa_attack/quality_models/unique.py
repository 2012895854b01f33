"""UNIQUE: bilinear pooling of convolutional features, learned from pairs with the fidelity loss (Zhang et al. 2021)."""

import itertools
import math

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from iqa_attack.photographs.images import check_images

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def bilinear_pool(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C*C): X X^T / (HW), signed root, unit length."""
    x = features.flatten(2)
    product = (x @ x.transpose(1, 2) / x.shape[2]).flatten(1)
    return F.normalize(product.sign() * (product.abs() + 1e-8).sqrt(), dim=1)


class Unique(nn.Module):
    """forward: images (B, 3, H, W) in 0..1 -> quality (B,), larger = better. `distribution` also gives the deviation.

    backbone: resnet34 (the paper's, ImageNet normalisation inside) or small (three stages of 16, 32, 48 channels)."""

    minimum = 24
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, *, backbone: str = "resnet34"):
        super().__init__()
        self.name = backbone
        if backbone == "resnet34":
            trunk = torchvision.models.resnet34(weights=None)
            trunk.fc = nn.Identity()  # type: ignore[assignment]
            self.backbone, channels = trunk, 512
        elif backbone == "small":
            widths, stages = (3, 16, 32, 48), []
            for a, b in itertools.pairwise(widths):
                stages += [nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
            self.backbone, channels = nn.Sequential(*stages), widths[-1]
        else:
            raise ValueError(f"backbone={backbone!r}, allowed: resnet34, small")
        self.fc = nn.Linear(channels**2, 2)
        self.register_buffer("pixel_mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def features(self, x: Tensor) -> Tensor:
        x = (x - self.pixel_mean) / self.pixel_std
        b = self.backbone
        if self.name == "small":
            return b(x)
        x = b.maxpool(b.relu(b.bn1(b.conv1(x))))  # type: ignore[operator]
        return b.layer4(b.layer3(b.layer2(b.layer1(x))))  # type: ignore[operator]

    def distribution(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(quality (B,), its standard deviation (B,))."""
        check_images(x, self.minimum, "UNIQUE", flat=True)
        out = self.fc(bilinear_pool(self.features(x)))
        return out[:, 0], F.softplus(out[:, 1])

    def forward(self, x: Tensor) -> Tensor:
        return self.distribution(x)[0]

    def options(self) -> dict:
        return {"backbone": self.name}


def preference(quality: Tensor, deviation: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """P(image i is better than image j) = Phi((q_i - q_j) / sqrt(d_i^2 + d_j^2 + 1e-8))."""
    z = (quality[i] - quality[j]) / (deviation[i] ** 2 + deviation[j] ** 2 + 1e-8).sqrt()
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def fidelity_loss(p: Tensor, g: Tensor) -> Tensor:
    """1 - sqrt(p g) - sqrt((1-p)(1-g)), mean over pairs; p predicted and g true probability. 0 where they agree."""
    return (1 - (p * g + 1e-8).sqrt() - ((1 - p) * (1 - g) + 1e-8).sqrt()).mean()


def pair_loss(
    quality: Tensor, deviation: Tensor, mos: Tensor, mos_std: Tensor, i: Tensor, j: Tensor, *, margin: float = 0.025
) -> dict[str, Tensor]:
    """{"fidelity", "uncertainty"} of the pairs (i, j). The deviation learns from the second term alone: hinge on its
    order."""
    fidelity = fidelity_loss(preference(quality, deviation.detach(), i, j), preference(mos, mos_std, i, j))
    sign = torch.sign(mos_std[i] - mos_std[j])
    hinge = F.relu(margin - sign * (deviation[i] - deviation[j])) * sign.abs()
    return {"fidelity": fidelity, "uncertainty": hinge.mean()}
