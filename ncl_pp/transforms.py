"""Augmentation: batched on tensors for small in-memory sets, torchvision and timm pipelines for real images."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms import v2

from common.data.batches import CropFlip

Stats = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of every channel, of images in 0..1

IMAGENET: Stats = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR: Stats = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
INAT: Stats = ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192))
STATS = {
    "cifar": CIFAR, "cifar_weak": CIFAR, "cifar_gpu": CIFAR, "affine": ((0.0,), (1.0,)),
    "imagenet": IMAGENET, "inat": INAT, "places": IMAGENET, "plain": IMAGENET,
}  # fmt: skip
BATCHED = ("affine", "cifar_weak", "cifar_gpu")  # recipes that run on tensors in memory


def normalization(recipe: str, channels: int) -> Stats:
    """Mean and standard deviation per channel that a recipe normalises with; averaged for grey images."""
    mean, std = STATS[recipe]
    return (mean, std) if channels == len(mean) else ((sum(mean) / len(mean),), (sum(std) / len(std),))


def normalize(images: Tensor, stats: Stats) -> Tensor:
    """(images - mean) / std, images (B, C, H, W)."""
    mean, std = (torch.tensor(s, device=images.device)[:, None, None] for s in stats)
    return (images - mean) / std


# -------------------------------------------------------------------------------------------------- tensors in memory
class AffineNoise:
    """Random rotation, scale, shear and shift, then Gaussian noise, a separate draw for every image.

    rotation: radians; scale, shear: relative; shift: in half image widths; each uniform in +-value. noise:
    standard deviation in the image's own range 0..1.
    """

    def __init__(
        self,
        *,
        rotation: float = 0.3,
        scale: float = 0.15,
        shear: float = 0.2,
        shift: float = 0.15,
        noise: float = 0.1,
    ):
        self.ranges = torch.tensor([rotation, scale, shear, shift, shift])
        self.noise = noise

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random numbers for a batch of shape (B, C, H, W), so that a rank can take its slice of the global batch."""
        affine = (2 * torch.rand(shape[0], 5, generator=generator) - 1) * self.ranges
        return affine, self.noise * torch.randn(*shape, generator=generator)

    def __call__(self, images: Tensor, affine: Tensor, noise: Tensor) -> Tensor:
        """images (B, C, H, W) float -> the same shape; zeros move in from the border."""
        angle, scale, shear, dx, dy = affine.to(images.device).unbind(1)
        c, s = angle.cos() * (1 + scale), angle.sin() * (1 + scale)
        theta = torch.stack([torch.stack([c, shear - s, dx], 1), torch.stack([s, c, dy], 1)], 1)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False) + noise.to(images.device)


class CropFlipCutout(CropFlip):
    """Crop after zero padding, horizontal flip with probability 1/2, Cutout, normalisation: a draw for every image.

    The CIFAR augmentation without AutoAugment, which has no batched form: with cutout=0 the weak variant
    (crop + flip), with cutout=16 as near as a batch on the device comes to the strong one. Cutout zeroes a
    square around a uniform centre, clipped at the border, before normalisation.
    """

    def __init__(self, *, padding: int = 4, flip: bool = True, cutout: int = 0, stats: Stats = ((0.0,), (1.0,))):
        super().__init__(padding=padding, flip=flip)
        self.cutout, self.stats = cutout, stats

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> tuple[Tensor, ...]:
        """(offset (B, 2), flip (B,), centre (B, 2)) for a batch of shape (B, C, H, W)."""
        drawn = super().draw(shape, generator)
        return *drawn, (torch.rand(shape[0], 2, generator=generator) * torch.tensor(shape[2:])).long()

    def __call__(self, images: Tensor, *drawn: Tensor) -> Tensor:
        """images (B, C, H, W) in 0..1 -> the same shape, normalised."""
        offset, flip, centre = drawn
        images = super().__call__(images, offset, flip)
        if self.cutout:
            half, centre = self.cutout // 2, centre.to(images.device)
            distances = (
                torch.arange(n, device=images.device) - centre[:, i : i + 1] for i, n in enumerate(images.shape[2:])
            )
            rows, columns = ((d >= -half) & (d < half) for d in distances)
            images = images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)
        return normalize(images, self.stats)


# -------------------------------------------------------------------------------------------------------- real images
class Cutout:
    """Zero a size x size square around a uniform centre, clipped at the border. Image (C, H, W), values 0..1."""

    def __init__(self, size: int = 16):
        self.size = size

    def __call__(self, image: Tensor) -> Tensor:
        h, w = image.shape[-2:]
        y, x = (int(torch.randint(0, n, ())) for n in (h, w))
        half = self.size // 2
        image = image.clone()
        image[:, max(0, y - half) : y + half, max(0, x - half) : x + half] = 0
        return image


def _check(recipe: str, allowed: Sequence[str]) -> None:
    if recipe not in allowed:
        raise ValueError(f"data.augment={recipe!r}, allowed: {', '.join(allowed)}")


def _to_tensor(channels: int) -> list[Callable]:
    """PIL image -> float (channels, H, W) in 0..1."""
    gray = [] if channels == 3 else [v2.Grayscale(channels)]
    return [*gray, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]


def _normalize(recipe: str, channels: int) -> v2.Normalize:
    mean, std = normalization(recipe, channels)
    return v2.Normalize(list(mean), list(std))


def _blur(size: int) -> v2.RandomApply:
    return v2.RandomApply([v2.GaussianBlur(kernel_size=2 * (size // 20) + 1, sigma=(0.1, 2.0))], p=0.5)


def train_transform(recipe: str, *, size: int, channels: int = 3) -> Callable:
    """Training transform from a PIL image to a normalised float tensor (channels, size, size), random at each call.

    recipe: cifar (AutoAugment + Cutout) | cifar_weak (crop + flip) | imagenet | inat | places | plain (resize
    only). torchvision's AutoAugment and timm's RandAugment stand for the copies in the released code;
    translation magnitudes and the posterise operation differ slightly. ValueError for another recipe.
    """
    _check(recipe, ("cifar", "cifar_weak", "imagenet", "inat", "places", "plain"))
    flip, jitter = v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4, 0.0)
    cutout = []
    if recipe in ("cifar", "cifar_weak"):
        first = [v2.RandomCrop(size, padding=size // 8), flip]
        if recipe == "cifar":
            first.append(v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=[128] * 3))
            cutout = [Cutout(size // 2)]
    elif recipe in ("imagenet", "inat"):
        fill = tuple(round(255 * m) for m in STATS[recipe][0])
        policy = rand_augment_transform("rand-m10-n2-mstd0.5", {"translate_const": int(size * 0.45), "img_mean": fill})
        first = [v2.RandomResizedCrop(size, (0.08, 1.0)), flip, jitter, policy]
    elif recipe == "places":
        first = [v2.RandomResizedCrop(size), jitter, v2.RandomGrayscale(0.2), _blur(size), flip]
    else:
        first = [v2.Resize([size, size])]
    return v2.Compose([*first, *_to_tensor(channels), *cutout, _normalize(recipe, channels)])


def moco_transform(recipe: str, *, size: int, channels: int = 3) -> Callable:
    """The second view of NCL's MoCo branch, normalised as the first. Places-LT uses its own recipe for both views."""
    if recipe == "places":
        return train_transform(recipe, size=size, channels=channels)
    _check(recipe, tuple(STATS))
    colour = [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), v2.RandomGrayscale(0.2)]
    first = [v2.RandomResizedCrop(size, (0.2, 1.0)), v2.RandomHorizontalFlip(), *colour, _blur(size)]
    return v2.Compose([*first, *_to_tensor(channels), _normalize(recipe, channels)])


def look(recipe: str, *, size: int, channels: int = 3) -> dict[str, Any]:
    """What the network sees of a test image, as plain data for a checkpoint: {size, crop: the shorter side to 256/224 of the size
    and then the centre, normalise: {mean, std} of images in 0..1}. ValueError for another recipe."""
    _check(recipe, tuple(STATS))
    mean, std = normalization(recipe, channels)
    crop = recipe in ("imagenet", "inat", "places")
    return {"size": size, "crop": crop, "normalise": {"mean": list(mean), "std": list(std)}}


def inference_transform(*, size: int, crop: bool, normalise: Mapping[str, Sequence[float]], channels: int) -> Callable:
    """Test transform from a PIL image to a float tensor (channels, size, size), from what `look` says."""
    first = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)] if crop else [v2.Resize([size, size])]
    return v2.Compose([*first, *_to_tensor(channels), v2.Normalize(list(normalise["mean"]), list(normalise["std"]))])


def test_transform(recipe: str, *, size: int, channels: int = 3) -> Callable:
    """Test transform of a recipe from a PIL image to a float tensor (channels, size, size), normalised as in training."""
    return inference_transform(channels=channels, **look(recipe, size=size, channels=channels))


test_transform.__test__ = False  # type: ignore[attr-defined]
