"""LPIPS (Zhang et al. 2018) and DISTS (Ding et al. 2020). Both need the ImageNet weights of VGG-16, a file of the user;
without it they are refused.

The linear weights of LPIPS and DISTS ship inside torchmetrics.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
import torchmetrics.functional.image as shipped
import torchvision
from torch import Tensor, nn

from common import runs

STAGES = (
    slice(0, 4),
    slice(4, 9),
    slice(9, 16),
    slice(16, 23),
    slice(23, 30),
)  # of VGG-16's features, each ends in a ReLU
CHANNELS = (64, 128, 256, 512, 512)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def vgg16_trunk() -> nn.Sequential:
    """The layers of VGG-16 up to relu5_3, on the device "meta": names and shapes, no weights yet."""
    with torch.device("meta"):
        return torchvision.models.vgg16(weights=None).features[:30]  # type: ignore[index]


def vgg16_features(weights_path: str | Path | None) -> nn.Sequential:
    """The convolutional part of VGG-16 with the weights of a file: torchvision's state dict, in evaluation mode.

    Raises ValueError without a file (random features are no distance that anyone means), or for weights of another
    model."""
    if not weights_path:
        raise ValueError(
            "LPIPS and DISTS need the ImageNet weights of VGG-16: fr.weights_path=<vgg16-397923af.pth of torchvision>. "
            "They are not shipped, and random features are refused as a constraint"
        )
    state = runs.load_checkpoint(weights_path)
    features = {k.removeprefix("features."): v for k, v in state.items() if not k.startswith("classifier.")}
    vgg = vgg16_trunk()
    try:
        vgg.load_state_dict(features, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{weights_path} holds no weights of torchvision's vgg16: {str(error).splitlines()[0]}"
        ) from error
    return vgg.float().eval().requires_grad_(False)


class _VGGDistance(nn.Module):
    minimum = 32
    mean: Tensor
    std: Tensor

    def __init__(self, weights_path: str | Path | None):
        super().__init__()
        self.vgg = vgg16_features(weights_path)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def stages(self, x: Tensor) -> list[Tensor]:
        if min(x.shape[2:]) < self.minimum:
            raise ValueError(f"{type(self).__name__} needs sides of at least {self.minimum}, got {tuple(x.shape[2:])}")
        x, out = (x - self.mean) / self.std, []
        for stage in STAGES:
            for layer in self.vgg[stage]:
                x = self.pool(x) if isinstance(layer, nn.MaxPool2d) else layer(x)
            out.append(x)
        return out

    def pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2)


class LPIPS(_VGGDistance):
    """Learned perceptual image patch similarity v0.1, VGG-16 trunk."""

    def __init__(self, *, weights_path: str | Path | None = None):
        super().__init__(weights_path)
        linear = runs.load_checkpoint(Path(shipped.__file__).parent / "lpips_models/vgg.pth")
        for i in range(len(CHANNELS)):
            self.register_buffer(f"linear{i}", linear[f"lin{i}.model.1.weight"])

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        total = x.new_zeros(len(x))
        for i, (a, b) in enumerate(zip(self.stages(x), self.stages(x0), strict=True)):
            a, b = (t / (1e-8 + t.pow(2).sum(1, keepdim=True)).sqrt() for t in (a, b))
            total = total + F.conv2d((a - b) ** 2, getattr(self, f"linear{i}")).mean((1, 2, 3))
        return total


class DISTS(_VGGDistance):
    """Deep image structure and texture similarity. The gradient flows through all six stages (in the released attack
    it does not)."""

    window: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(self, *, weights_path: str | Path | None = None):
        super().__init__(weights_path)
        hann = torch.hann_window(5, periodic=False)[1:-1]
        window = torch.outer(hann, hann)
        self.register_buffer("window", (window / window.sum())[None, None])
        weights = runs.load_checkpoint(Path(shipped.__file__).parent / "dists_models/weights.pt")
        total = weights["alpha"].sum() + weights["beta"].sum()
        self.register_buffer("alpha", weights["alpha"].flatten() / total)
        self.register_buffer("beta", weights["beta"].flatten() / total)

    def pool(self, x: Tensor) -> Tensor:
        """L2 pooling with a Hann window, stride 2."""
        weight = self.window.expand(x.shape[1], 1, 3, 3)
        return (F.conv2d(x**2, weight, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        total, start = x.new_zeros(len(x)), 0
        for a, b in zip([x, *self.stages(x)], [x0, *self.stages(x0)], strict=True):
            alpha, beta = (w[start : start + a.shape[1]] for w in (self.alpha, self.beta))
            start += a.shape[1]
            a, b = a.flatten(2), b.flatten(2)
            ma, mb = a.mean(2), b.mean(2)
            va, vb = (t.var(2, unbiased=False) for t in (a, b))
            covariance = (a * b).mean(2) - ma * mb
            luminance = (2 * ma * mb + 1e-6) / (ma**2 + mb**2 + 1e-6)
            structure = (2 * covariance + 1e-6) / (va + vb + 1e-6)
            total = total + (alpha * luminance + beta * structure).sum(1)
        return 1 - total
