"""Noisy digits (embedded), CIFAR-10 and folders of class folders (ImageNet), whole for training and split for the search."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from common.data.batches import CropFlip, stream, to_float
from common.data.images import Images, Lighting
from common.data.scenes import noisy_digits
from common.data.vision import image_folder, in_memory, torchvision_set

SETS = ("digits", "cifar10", "folder")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = ((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768))


def split_for_search(data: Images, shares: Sequence[float], *, seed: int) -> tuple[Images, Images]:
    """Disjoint random parts of the training set for the weights and for alpha, `shares` of it each.

    ValueError for shares that do not fit, or a part without an image."""
    if len(shares) != 2 or min(shares) <= 0 or sum(shares) > 1 + 1e-9:
        raise ValueError(f"search.shares={list(shares)}: two positive shares (weights, alpha) that add up to at most 1")
    counts = [int(len(data) * share + 1e-9) for share in shares]
    if min(counts) < 1:
        raise ValueError(
            f"search.shares={list(shares)} of {len(data)} training images leave {counts[0]} for the weights and {counts[1]} for "
            "alpha: neither may be empty"
        )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(stream(seed, 77)))
    return data.subset(order[: counts[0]]), data.subset(order[counts[0] : sum(counts)])


def build_data(
    *, name: str, seed: int, root: str | None = None, workers: int = 0, download: bool = False, sigma: float = 0.25,
    train: int = 1000, size: int = 224, cutout: int = 0, lighting: bool = True, val: str = "val",
) -> Images:  # fmt: skip
    """A data set by name.

    digits: scikit-learn's digits with N(0, sigma^2) noise drawn from `seed`, standardised, `train` of 1,797 for training.
    cifar10: `root` in torchvision's layout, random crop (padding 4), flip and `cutout` pixels in memory.
    folder: root/train/<class>/, root/<val>/<class>/; RandomResizedCrop(size), colour noise, flip; test: shorter side
        size * 8 / 7 (bicubic), centre crop.
    ValueError for an unknown name or option, FileNotFoundError for missing files."""
    if name not in SETS:
        raise ValueError(f"data.name={name!r}, allowed: {', '.join(SETS)}")
    if cutout < 0:
        raise ValueError(f"data.cutout={cutout} must be >= 0")
    if name == "digits":
        training, test = noisy_digits(sigma=sigma, train=train, seed=seed)
        return Images(10, 1, 8, test, tensors=(training.images, training.targets))
    if name == "cifar10":
        training, held_out = (in_memory(torchvision_set(name, root, train=t, download=download)) for t in (True, False))
        test = TensorDataset(normalise_cifar(held_out[0]), held_out[1])
        return Images(10, 3, 32, test, tensors=training, augment=CifarAugmentation(cutout))
    head = [v2.RandomResizedCrop(size, scale=(0.08, 1)), *([Lighting()] if lighting else []), v2.RandomHorizontalFlip()]
    training, test = image_folder(root, "train"), test_folder(root, size=size, val=val)
    if training.classes != test.classes:
        different = sorted(set(training.classes) ^ set(test.classes))
        raise ValueError(f"train/ and {val}/ under {root} hold different classes: {', '.join(different[:10])}")
    options = {"train": training, "transform": v2.Compose([*head, *tail()]), "workers": workers}
    return Images(len(training.classes), 3, size, test, **options)


def test_folder(root: str | None, *, size: int = 224, val: str = "val") -> Any:
    """root/<val>/<class>/ alone, shorter side size * 8 / 7, centre crop, normalised. FileNotFoundError names the layout."""
    resize = v2.Resize(round(size * 8 / 7), interpolation=v2.InterpolationMode.BICUBIC)
    return image_folder(root, val, transform=v2.Compose([resize, v2.CenterCrop(size), *tail()]))


test_folder.__test__ = False  # type: ignore[attr-defined]


def tail() -> list[Callable]:
    """PIL image -> normalised float tensor."""
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*IMAGENET)]


def normalise_cifar(images: Tensor) -> Tensor:
    """(B, 3, H, W), uint8 or 0..1 -> float."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in CIFAR)
    return (to_float(images) - mean) / std


class CifarAugmentation(CropFlip):
    """Random crop (padding 4), flip, normalisation, and a square of `cutout` pixels set to the mean, cut off at the border."""

    def __init__(self, cutout: int = 0):
        super().__init__()
        self.cutout = cutout

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> tuple[Tensor, ...]:
        centre = torch.stack([torch.randint(0, n, (shape[0],), generator=generator) for n in shape[-2:]], dim=1)
        return (*super().draw(shape, generator), centre)

    def __call__(self, images: Tensor, *drawn: Tensor) -> Tensor:
        out = normalise_cifar(super().__call__(images, *drawn[:2]))
        if not self.cutout:
            return out
        centre, half = drawn[2].to(images.device), self.cutout // 2
        inside = []
        for axis, n in ((0, images.shape[-2]), (1, images.shape[-1])):
            offset = torch.arange(n, device=images.device) - centre[:, axis, None]
            inside.append((offset >= -half) & (offset < half))
        return out.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.0)
