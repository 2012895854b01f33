"""Digit grids in memory, CIFAR and MNIST, and class folders (ImageNet); batches that depend on (seed, epoch) alone."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import create_transform  # pyright: ignore[reportPrivateImportUsage]
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from common.data.batches import CropFlip, Plan, SeededBatches, Views, stream
from common.data.scenes import digit_grids
from common.data.vision import KNOWN, image_folder, in_memory, torchvision_set

SETS = ("digit_grids", *KNOWN, "folder")


@dataclass(frozen=True)
class Data:
    """A data set: `epoch(plan, epoch, device)` yields (images (b, C, size, size) float, labels (b,)).

    train_size: images per epoch; test: yields (image, label); truth: per test image what is known beside the label,
    e.g. k (N,) and masks (N, H, W) of digit grids."""

    name: str
    classes: int
    channels: int
    train_size: int
    test: Dataset
    epoch: Callable[[Plan, int, torch.device], Iterator[tuple[Tensor, Tensor]]]
    truth: Mapping[str, Tensor] = field(default_factory=dict)


def build_data(
    *,
    name: str,
    seed: int,
    root: str | None = None,
    workers: int = 0,
    download: bool = False,
    size: int = 24,
    train_images: int = 3200,
    test_images: int = 4000,
    grid: int = 3,
    kmax: int = 4,
    noise: float = 0.1,
    test_dir: str = "val",
    crop_pct: float = 0.875,
    augment: Mapping[str, Any] | None = None,
    repeats: int = 1,
) -> Data:
    """A data set by name.

    digit_grids: embedded; `train_images` new ones in every epoch, test_images, grid, kmax, noise; size = 8 grid.
    mnist, fashion_mnist, cifar10, cifar100: `root` in torchvision's layout; padded crops (and flips for CIFAR), resized to
        `size`.
    folder: root/train/<class>/ and root/<test_dir>/<class>/ (ImageNet: val); timm's augmentation with the keywords
        `augment`; test images resized to size / crop_pct (bicubic) and cropped.
    Raises ValueError for an unknown name or a size that does not fit, FileNotFoundError for missing files."""
    if name not in SETS:
        raise ValueError(f"data.name={name!r}, allowed: {', '.join(SETS)}")
    if repeats != 1 and name != "folder":
        raise ValueError(f"data.repeats={repeats}: repeated augmentation is for data.name=folder")
    if name == "digit_grids":
        if size != 8 * grid:
            raise ValueError(f"data.size={size}, but a grid of {grid} x {grid} cells of 8 pixels has {8 * grid}")
        test = digit_grids(test_images, split="test", seed=seed, grid=grid, kmax=kmax, noise=noise)

        def fresh(plan: Plan, epoch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
            data = digit_grids(
                train_images, split="train", seed=stream(seed, epoch, 1), grid=grid, kmax=kmax, noise=noise
            )
            for _, batch, part in plan.epoch(epoch):
                mine = batch[part]
                yield data.images[mine].to(device), data.targets[mine].to(device)

        assert test.masks is not None
        truth = {"k": test.extra["k"], "masks": test.masks}
        return Data(name, 10, 1, train_images, TensorDataset(test.images, test.targets), fresh, truth)
    if name in KNOWN:
        images, labels = in_memory(torchvision_set(name, root, train=True, download=download))
        mean, std = (f(images.float() / 255, dim=(0, 2, 3)).view(1, -1, 1, 1) for f in (torch.mean, torch.std))
        test_x, test_y = in_memory(torchvision_set(name, root, train=False, download=download))

        def prepare(x: Tensor) -> Tensor:
            x = (x.float() / 255 - mean.to(x.device)) / std.to(x.device)
            return x if x.shape[-1] == size else F.interpolate(x, size, mode="bilinear", antialias=True)

        augmentation = CropFlip(flip="cifar" in name)

        def cropped(plan: Plan, epoch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
            for step, batch, part in plan.epoch(epoch):
                generator = torch.Generator().manual_seed(stream(seed, epoch, step))
                mine = batch[part]
                drawn = augmentation.draw((len(batch),), generator)
                crops = augmentation(images[mine].to(device), *(d[part] for d in drawn))
                yield prepare(crops), labels[mine].to(device)

        return Data(
            name, KNOWN[name].classes, images.shape[1], len(images), _Prepared(test_x, test_y, prepare), cropped
        )
    train_transform: Any = create_transform(
        size, is_training=True, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD,
        interpolation="bicubic", **(augment or {}),
    )  # fmt: skip
    test_transform: Any = create_transform(
        size, is_training=False, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD,
        interpolation="bicubic", crop_pct=crop_pct,
    )  # fmt: skip
    train, test = image_folder(root, "train"), image_folder(root, test_dir, transform=test_transform)
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(f"train/ and {test_dir}/ under {root} hold different classes: {', '.join(odd[:10])}")
    loaders: dict[Plan, SeededBatches] = {}

    def decoded(plan: Plan, epoch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        if plan not in loaders:
            loaders[plan] = SeededBatches(Views(train, [train_transform]), plan, device=device, workers=workers)
        for (images,), labels in loaders[plan].epoch(epoch):
            yield images, labels

    return Data(name, len(train.classes), 3, len(train), test, decoded)


class _Prepared(Dataset):
    def __init__(self, images: Tensor, labels: Tensor, prepare: Callable[[Tensor], Tensor]):
        self.images, self.labels, self.prepare = images, labels, prepare

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.prepare(self.images[i : i + 1])[0], self.labels[i]
