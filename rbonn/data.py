"""Noisy digits (embedded), CIFAR-10 and folders of class folders (ImageNet) with the augmentation of section 5."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from common.data.batches import CropFlip, to_float
from common.data.images import Images, Lighting
from common.data.scenes import noisy_digits
from common.data.vision import image_folder, in_memory, torchvision_set

SETS = ("digits", "cifar10", "folder")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
LIGHTING = ("none", "correct", "official")


def build_data(
    *, name: str, seed: int, root: str | None = None, workers: int = 0, download: bool = False, sigma: float = 0.25,
    train: int = 1000, size: int = 224, lighting: str = "none", val: str = "val",
) -> Images:  # fmt: skip
    """A data set by name.

    digits: scikit-learn's digits with N(0, sigma^2) noise drawn from `seed`, standardised, `train` of 1,797 for training.
    cifar10: `root` in torchvision's layout, random crop (padding 4) and flip in memory.
    folder: root/train/<class>/, root/<val>/<class>/; RandomResizedCrop(size), flip, lighting: none | correct | official
        (see `Lighting`); test: shorter side size * 8 / 7, centre crop.
    ValueError for an unknown name or option, FileNotFoundError for missing files."""
    if name not in SETS:
        raise ValueError(f"data.name={name!r}, allowed: {', '.join(SETS)}")
    if lighting not in LIGHTING:
        raise ValueError(f"data.lighting={lighting!r}, allowed: {', '.join(LIGHTING)}")
    if name == "digits":
        training, test = noisy_digits(sigma=sigma, train=train, seed=seed)
        return Images(10, 1, 8, test, tensors=(training.images, training.targets))
    if name == "cifar10":
        training, held_out = (in_memory(torchvision_set(name, root, train=t, download=download)) for t in (True, False))
        test = TensorDataset(_normalise_cifar(held_out[0]), held_out[1])
        return Images(10, 3, 32, test, tensors=training, augment=CropFlipNormalise(), normalise=_normalise_cifar)
    lights = [] if lighting == "none" else [Lighting(official=lighting == "official")]
    head = [v2.RandomResizedCrop(size, scale=(0.08, 1)), *lights, v2.RandomHorizontalFlip()]
    training, test = image_folder(root, "train"), test_folder(root, size=size, val=val)
    if training.classes != test.classes:
        different = sorted(set(training.classes) ^ set(test.classes))
        raise ValueError(f"train/ and {val}/ under {root} hold different classes: {', '.join(different[:10])}")
    return Images(
        len(training.classes), 3, size, test, train=training, transform=v2.Compose([*head, *_tail()]), workers=workers
    )


def test_folder(root: str | None, *, size: int = 224, val: str = "val") -> Any:
    """root/<val>/<class>/ alone, shorter side size * 8 / 7, centre crop, normalised. FileNotFoundError names the layout."""
    centre = [v2.Resize(round(size * 8 / 7)), v2.CenterCrop(size)]
    return image_folder(root, val, transform=v2.Compose([*centre, *_tail()]))


test_folder.__test__ = False  # type: ignore[attr-defined]


def _tail() -> list[Callable]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*IMAGENET)]


class CropFlipNormalise(CropFlip):
    """Random crop (padding 4) and flip of CIFAR images, then normalisation."""

    def __call__(self, images: Tensor, *drawn: Tensor) -> Tensor:
        return _normalise_cifar(super().__call__(images, *drawn))


def _normalise_cifar(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in CIFAR)
    return (to_float(images) - mean) / std
