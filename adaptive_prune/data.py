"""Digit grids in memory, CIFAR and MNIST, and class folders (ImageNet, or your own); batches depend on (seed, epoch) alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup, create_transform  # pyright: ignore[reportPrivateImportUsage]
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms.functional import pil_to_tensor

from common.data.batches import CropFlip, Plan, SeededBatches, Views, stream, to_float
from common.data.scenes import digit_grids
from common.data.vision import KNOWN, data_root, image_folder, in_memory, set_identity, torchvision_set

SETS = ("digit_grids", *KNOWN, "folder")
TEST_FOLDERS = ("val", "valid", "validation", "test")  # the first that is there, where data.test_dir is null


@dataclass(frozen=True)
class Data:
    """A data set: `epoch(plan, epoch, device)` yields (images (b, C, size, size) float, labels (b,)).

    classes: names by id; look: what an image must go through before the network sees it, see `prepare`; test: yields (image,
    label); train_size: images per epoch, 0 where only the test set was asked for; truth: per test image what is known beside the
    label, e.g. k (N,) and masks (N, H, W) of digit grids; source: the identity of the files, {} if there are none."""

    name: str
    classes: list[str]
    channels: int
    look: dict[str, Any]
    test: Dataset
    train_size: int = 0
    epoch: Callable[[Plan, int, torch.device], Iterator[tuple[Tensor, Tensor]]] | None = None
    truth: Mapping[str, Tensor] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)

    def about(self) -> dict[str, Any]:
        """What a checkpoint must say so that a network can be used without this data set."""
        return {"classes": self.classes, "channels": self.channels, **self.look}

    def batches(self, plan: Plan, epoch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """The training batches of an epoch. ValueError where only the test set was read."""
        if self.epoch is None:
            raise ValueError(f"{self.name}: only its test set was read")
        return self.epoch(plan, epoch, device)


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
    test_dir: str | None = "val",
    crop_pct: float = 0.875,
    augment: Mapping[str, Any] | None = None,
    repeats: int = 1,
    about: Mapping[str, Any] | None = None,
) -> Data:
    """A data set by name; with `about` (what a checkpoint says, see `Data.about`) only its test set, prepared as in training.

    digit_grids: embedded; `train_images` new ones in every epoch, test_images, grid, kmax, noise; size = 8 grid.
    mnist, fashion_mnist, cifar10, cifar100: `root` in torchvision's layout; padded crops (and flips for CIFAR), resized to
        `size`.
    folder: root/train/<class>/ and root/<test_dir>/<class>/ (null: val, valid, validation or test); timm's augmentation with the
        keywords `augment`; test images resized to size / crop_pct (bicubic) and cropped.
    Raises ValueError for an unknown name, a size that does not fit or other classes than the checkpoint's, FileNotFoundError for
    missing files."""
    check_data(name=name, root=root, size=size, grid=grid, repeats=repeats, crop_pct=crop_pct)
    if name == "digit_grids":
        drawn = partial(digit_grids, grid=grid, kmax=kmax, noise=noise)
        return _grids(drawn, train_images, test_images, seed, size)
    if name in KNOWN:
        return _known(name, root, download=download, size=size, seed=seed, about=about)
    base = data_root(root)
    test_dir = test_dir or next((d for d in TEST_FOLDERS if (base / d).is_dir()), TEST_FOLDERS[0])
    return _folder(base, test_dir, size, crop_pct, augment or {}, workers, about)


def check_data(*, name: str, root: str | None, size: int, grid: int, repeats: int, crop_pct: float, **_: Any) -> None:
    """ValueError for what cannot be, before a file is read."""
    if name not in SETS:
        raise ValueError(f"data.name={name!r}, allowed: {', '.join(SETS)}")
    if repeats != 1 and name != "folder":
        raise ValueError(f"data.repeats={repeats}: repeated augmentation is for data.name=folder")
    if repeats < 1 or not 0 < crop_pct <= 1:
        raise ValueError(f"data.repeats={repeats}, data.crop_pct={crop_pct}, allowed: >= 1, and above 0 up to 1")
    if name == "digit_grids" and root:
        raise ValueError(
            f"data.root={root}: digit_grids is embedded and reads no files; say what lies there, e.g. data=folder or data=cifar10"
        )
    if name == "digit_grids" and size != 8 * grid:
        raise ValueError(f"data.size={size}, but a grid of {grid} x {grid} cells of 8 pixels has {8 * grid}")


def prepare(*, size: int, crop: float | None, normalise: Mapping[str, Sequence[float]], channels: int, **_: Any) -> Any:
    """From a PIL image to a float tensor (channels, size, size), as test images are prepared.

    crop: the shorter side goes to size / crop (bicubic) and the centre is cut out; None: the whole image is resized to a square.
    normalise: {mean, std} of images in 0..1. Further keys of a checkpoint's `about` are not read."""
    if crop is not None:
        return create_transform(
            size, is_training=False, mean=tuple(normalise["mean"]), std=tuple(normalise["std"]), interpolation="bicubic",
            crop_pct=crop,
        )  # fmt: skip

    def whole(image: Image.Image) -> Tensor:
        pixels = pil_to_tensor(image.convert("L" if channels == 1 else "RGB"))[None]
        return prepare_batch(pixels, size=size, normalise=normalise)[0]

    return whole


def prepare_batch(images: Tensor, *, size: int, normalise: Mapping[str, Sequence[float]], **_: Any) -> Tensor:
    """The same for tensors (B, C, H, W), uint8 or float in 0..1, of sets that are not cropped."""
    x = to_float(images)
    mean, std = (torch.tensor(normalise[k], device=x.device).view(1, -1, 1, 1) for k in ("mean", "std"))
    x = (x - mean) / std
    return x if x.shape[-2:] == (size, size) else F.interpolate(x, (size, size), mode="bilinear", antialias=True)


def mixed(mixup: Mixup | None, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Images and soft labels (b, C) of a Mixup, drawn from `seed` (timm draws from numpy's global stream)."""
    if mixup is None:
        return images, labels
    np.random.seed(seed % 2**32)
    return mixup(images, labels)


def _grids(drawn: Callable[..., Any], train_images: int, test_images: int, seed: int, size: int) -> Data:
    test = drawn(test_images, split="test", seed=seed)

    def fresh(plan: Plan, epoch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        data = drawn(train_images, split="train", seed=stream(seed, epoch, 1))
        for _, batch, part in plan.epoch(epoch):
            mine = batch[part]
            yield data.images[mine].to(device), data.targets[mine].to(device)

    look = {"size": size, "crop": None, "normalise": {"mean": [0.0], "std": [1.0]}}
    return Data(
        "digit_grids", [str(c) for c in range(10)], 1, look, TensorDataset(test.images, test.targets),
        train_images, fresh, {"k": test.extra["k"], "masks": test.masks},
    )  # fmt: skip


def _known(name: str, root: str | None, *, download: bool, size: int, seed: int, about: Mapping | None) -> Data:
    testing = torchvision_set(name, root, train=False, download=download)
    classes, (test_x, test_y) = [str(c) for c in testing.classes], in_memory(testing)
    channels = test_x.shape[1]
    if about is not None:
        _same_classes(about, classes, name)
        look = {k: about[k] for k in ("size", "crop", "normalise")}
        return Data(name, classes, channels, look, _Prepared(test_x, test_y, look))
    training = torchvision_set(name, root, train=True, download=download)
    images, labels = in_memory(training)
    mean, std = (f(images.float() / 255, dim=(0, 2, 3)).tolist() for f in (torch.mean, torch.std))
    look = {"size": size, "crop": None, "normalise": {"mean": mean, "std": std}}
    augmentation = CropFlip(flip="cifar" in name)

    def cropped(plan: Plan, epoch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        for step, batch, part in plan.epoch(epoch):
            generator = torch.Generator().manual_seed(stream(seed, epoch, step))
            mine = batch[part]
            drawn = augmentation.draw((len(batch),), generator)
            crops = augmentation(images[mine].to(device), *(d[part] for d in drawn))
            yield prepare_batch(crops, **look), labels[mine].to(device)

    source = set_identity(training, name, root) | {"test": set_identity(testing, name, root)["sha"]}
    return Data(name, classes, channels, look, _Prepared(test_x, test_y, look), len(images), cropped, source=source)


def _folder(
    base: Path, test_dir: str, size: int, crop: float, augment: Mapping[str, Any], workers: int, about: Mapping | None
) -> Data:
    stats = {"mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD)}
    look: dict[str, Any] = {"size": size, "crop": crop, "normalise": stats}
    if about is not None:
        look = {k: about[k] for k in ("size", "crop", "normalise")}
    test = image_folder(base, test_dir, transform=prepare(**look, channels=3))
    if about is not None:
        _same_classes(about, test.classes, base / test_dir)
        return Data("folder", test.classes, 3, look, test)
    transform: Any = create_transform(
        size, is_training=True, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, interpolation="bicubic", **augment
    )
    train = image_folder(base, "train")
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(f"train/ and {test_dir}/ under {base} hold different classes: {', '.join(odd[:10])}")
    loaders: dict[tuple, SeededBatches] = {}

    def decoded(plan: Plan, epoch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        key = tuple(vars(plan).items())  # workers live from epoch to epoch
        if key not in loaders:
            loaders[key] = SeededBatches(Views(train, [transform]), plan, device=device, workers=workers)
        for (images,), labels in loaders[key].epoch(epoch):
            yield images, labels

    source = set_identity(train, "folder", base) | {"test": set_identity(test, "folder", base)["sha"]}
    return Data("folder", train.classes, 3, look, test, len(train), decoded, source=source)


def _same_classes(about: Mapping[str, Any], found: Sequence[str], where: Any) -> None:
    """ValueError unless the data have the checkpoint's classes; those of released weights are counted only."""
    known = list(about["classes"])
    if len(known) != len(found):
        raise ValueError(f"the weights have {len(known)} classes, {where} has {len(found)}")
    if not about.get("released") and known != list(found):
        odd = sorted(set(known) ^ set(found))
        raise ValueError(f"the weights were trained on other classes than those of {where}: {', '.join(odd[:10])}")


class _Prepared(Dataset):
    def __init__(self, images: Tensor, labels: Tensor, look: Mapping[str, Any]):
        self.images, self.labels, self.look = images, labels, look

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return prepare_batch(self.images[i : i + 1], **self.look)[0], self.labels[i]
