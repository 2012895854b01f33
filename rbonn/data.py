"""Noisy digits (embedded), CIFAR-10 and folders of class folders (ImageNet) with the augmentation of section 5."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2

from common.data.batches import CropFlip, Plan, SeededBatches, TensorBatches, Views, to_float
from common.data.scenes import noisy_digits
from common.data.vision import image_folder, in_memory, torchvision_set

SETS = ("digits", "cifar10", "folder")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
# Principal components of ImageNet's colours (AlexNet); eigenvalues for images in 0..1.
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
LIGHTING = ("none", "correct", "official")


@dataclass(frozen=True)
class Images:
    """Training and test set. Either `tensors` (held in memory, augmented in batches) or `train` (PIL images, `transform`)."""

    classes: int
    channels: int
    size: int  # side of the images that the network sees
    test: Dataset
    tensors: tuple[Tensor, Tensor] | None = None
    augment: Any = None
    normalise: Callable[[Tensor], Tensor] = lambda x: x
    train: Dataset | None = None
    transform: Callable | None = None
    workers: int = 0

    def __len__(self) -> int:
        """Training images."""
        return len(self.tensors[1] if self.tensors is not None else self.train)  # type: ignore[arg-type]

    def batches(self, plan: Plan, device: torch.device) -> TensorBatches | SeededBatches:
        """Training batches ([images], labels) by epoch."""
        if self.tensors is not None:
            return TensorBatches(*self.tensors, plan, augment=self.augment, device=device)
        assert self.train is not None and self.transform is not None
        return SeededBatches(Views(self.train, [self.transform]), plan, workers=self.workers, device=device)

    def plain_train(self) -> Dataset | None:
        """The training set as the network sees it in evaluation, for the loss of the finished network; None on disk."""
        return None if self.tensors is None else TensorDataset(self.normalise(self.tensors[0]), self.tensors[1])


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


class Lighting:
    """Colour noise along the principal components (AlexNet), standard deviation 0.1. PIL image -> PIL image.

    official: add it to 0..255 values although the eigenvalues are for 0..1, as the published scripts do. It is then less
    than half a grey level and only truncates some values by one."""

    def __init__(self, *, std: float = 0.1, official: bool = False):
        self.std, self.scale = std, 1.0 if official else 255.0

    def __call__(self, image: Image.Image) -> Image.Image:
        weight = (torch.randn(3) * self.std).numpy() * np.array(EIGENVALUES)
        shift = np.array(EIGENVECTORS) @ weight * self.scale
        return Image.fromarray((np.asarray(image) + shift).clip(0, 255).astype(np.uint8))
