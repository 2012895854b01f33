"""Cued digits (embedded), torchvision's small sets and class folders, in batches that depend on (seed, epoch) alone."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import InterpolationMode, v2

from common.data.batches import seeded, stream
from common.data.scenes import cued_digits
from common.data.vision import KNOWN, image_folder, torchvision_set

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
SETS = ("cued_digits", *KNOWN, "folder")


@dataclass(frozen=True)
class Batches:
    """Training batches: rank and micro-step take their slice of every global batch; the incomplete last one is dropped."""

    source: "Canvases | Images"
    seed: int
    batch_size: int
    rank: int = 0
    world: int = 1
    accumulation: int = 1

    @property
    def steps(self) -> int:
        return self.source.size // self.batch_size

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(
                f"{self.source.size} training images are fewer than train.batch_size={self.batch_size}: no step"
            )

    def slices(self) -> Iterator[slice]:
        """The positions, within an epoch, of each micro-batch of this rank."""
        part = self.batch_size // (self.world * self.accumulation)
        for step in range(self.steps):
            for micro in range(self.accumulation):
                start = step * self.batch_size + (self.rank * self.accumulation + micro) * part
                yield slice(start, start + part)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(images (b, C, H, W), labels (b,)) of every micro-step."""
        return self.source.batches(self.seed, epoch, list(self.slices()))

    def first(self, n: int) -> Tensor:
        """The first n images of epoch 1 (n, C, H, W), the same on every rank: what the steps are set from."""
        n = min(n, self.source.size)
        return next(iter(self.source.batches(self.seed, 1, [slice(0, n)])))[0]


@dataclass(frozen=True)
class Canvases:
    """`size` new cued-digit canvases per epoch, drawn from (seed, epoch)."""

    size: int

    def batches(self, seed: int, epoch: int, slices: list[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        data = cued_digits(self.size, split="train", seed=stream(seed, epoch))
        for part in slices:
            yield data.images[part], data.targets[part]


@dataclass(frozen=True)
class Images:
    """A data set of PIL images, shuffled and augmented from (seed, epoch, position). repeats: 3 = repeated augmentation, an
    epoch then holds a third of the images three times each, augmented differently, in the same batches."""

    dataset: Any
    transform: Callable
    workers: int = 0
    repeats: int = 1

    @property
    def size(self) -> int:
        return len(self.dataset)

    def batches(self, seed: int, epoch: int, slices: list[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(stream(seed, epoch)))
        order = order[: math.ceil(self.size / self.repeats)].repeat_interleave(self.repeats)[: self.size].tolist()
        keys = [[(seed, epoch, position, order[position]) for position in range(s.start, s.stop)] for s in slices]
        yield from DataLoader(
            _Augmented(self.dataset, self.transform), batch_sampler=keys, num_workers=self.workers,  # type: ignore[arg-type]
            pin_memory=torch.cuda.is_available(),
        )  # fmt: skip


class _Augmented(Dataset):
    def __init__(self, dataset: Any, transform: Callable):
        self.dataset, self.transform = dataset, transform

    def __getitem__(self, key: tuple[int, int, int, int]) -> tuple[Tensor, int]:
        *position, index = key
        image, target = self.dataset[index]
        with seeded(*position):
            image = self.transform(image)
        return image, target


@dataclass(frozen=True)
class Data:
    """source: training images, see `Batches`; test: (image (C, H, W), label) pairs."""

    source: Canvases | Images
    test: Dataset
    num_classes: (
        int  # not "classes": with torch.classes in sight, cloudpickle could not send train.py to a sweep's workers
    )
    channels: int


def build_data(
    *,
    name: str,
    root: str | None = None,
    workers: int = 0,
    download: bool = False,
    train_images: int = 1280,
    test_images: int = 1500,
    size: int = 224,
    crop_pct: float = 0.875,
    augment: str = "deit",
    repeats: int = 1,
) -> Data:
    """A data set by name.

    cued_digits: embedded; train_images new canvases per epoch, test_images fixed ones made of other digits.
    mnist, fashion_mnist, cifar10, cifar100: `root` in torchvision's layout; folder: root/train/<class>/, root/val/<class>/.
    size: pixels; augment: deit (crop, flip, RandAugment, jitter, erasing) | crop (padded crop and flip, the CIFAR recipe) | none.
    crop_pct: evaluation resizes to size / crop_pct (bicubic) before the centre crop; 1 for images that have the size.
    Raises ValueError for an unknown name or value, FileNotFoundError for missing files."""
    if name not in SETS:
        raise ValueError(f"data.name={name!r}, allowed: {', '.join(SETS)}")
    if not 0 < crop_pct <= 1 or repeats < 1:
        raise ValueError(f"data.crop_pct={crop_pct}, data.repeats={repeats}, allowed: in (0, 1] and >= 1")
    if name == "cued_digits":
        test = cued_digits(test_images, split="test", seed=0)
        return Data(Canvases(train_images), TensorDataset(test.images, test.targets), 10, 1)
    channels = 1 if "mnist" in name else 3
    train_transform, test_transform = transforms(augment, size=size, crop_pct=crop_pct, channels=channels)
    if name == "folder":
        train, test = image_folder(root, "train"), image_folder(root, "val", transform=test_transform)
        if train.classes != test.classes:
            different = sorted(set(train.classes) ^ set(test.classes))
            raise ValueError(f"train/ and val/ under {root} hold different classes: {', '.join(different[:10])}")
        classes = len(train.classes)
    else:
        train = torchvision_set(name, root, train=True, download=download)
        test = torchvision_set(name, root, train=False, transform=test_transform)
        classes = KNOWN[name].classes
    return Data(Images(train, train_transform, workers, repeats), test, classes, channels)


def transforms(augment: str, *, size: int, crop_pct: float, channels: int = 3) -> tuple[Callable, Callable]:
    """(train, test) transforms of a PIL image to a normalised float tensor (channels, size, size)."""
    mean, std = IMAGENET if channels == 3 else ([0.3], [0.3])
    to_tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    bicubic = InterpolationMode.BICUBIC
    resized = int(size / crop_pct)
    test = v2.Compose([v2.Resize(resized, bicubic), v2.CenterCrop(size), *to_tensor])
    if augment == "deit":
        if channels != 3:
            raise ValueError("data.augment=deit is for colour images; use crop or none")
        train = create_transform(
            size, is_training=True, color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic",
            re_prob=0.25, re_mode="pixel", re_count=1, mean=tuple(mean), std=tuple(std),
        )  # fmt: skip
    elif augment == "crop":
        flip = [v2.RandomHorizontalFlip()] if channels == 3 else []
        resize = [v2.Resize([size, size], bicubic)]
        train = v2.Compose([*resize, v2.RandomCrop(size, padding=size // 8), *flip, *to_tensor])
    elif augment == "none":
        train = test
    else:
        raise ValueError(f"data.augment={augment!r}, allowed: deit, crop, none")
    return train, test  # pyright: ignore[reportReturnType]
