"""Digit grids in memory, CIFAR, MNIST and Fashion-MNIST, and class folders (ImageNet, or your own); batches depend on (seed,
epoch) alone."""

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
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.transforms.functional import pil_to_tensor

from common.data.batches import CropFlip, Plan, SeededBatches, Views, stream, to_float
from common.data.files import folders
from common.data.scenes import digit_grids
from common.data.vision import KNOWN, data_root, image_folder, in_memory, set_identity, torchvision_set

SETS = ("digit_grids", *KNOWN, "folder")
GREY = ("digit_grids", "mnist", "fashion_mnist")  # of one channel, bright on black
INK = 25  # of 255: what is brighter belongs to the object
HELD_OUT = ("val", "valid", "validation")  # folders to test on where there is no test/, else to choose best.ckpt by


@dataclass(frozen=True)
class Data:
    """A data set: `epoch(plan, epoch, device)` yields (images (b, C, size, size) float, labels (b,)).

    classes: names by id; look: what an image must go through before the network sees it, see `prepare`; test: yields (image,
    label); validation: the same of images set aside to choose best.ckpt by, None without; train_size: images per epoch, 0 where
    only the test set was asked for; truth: per test image what is known beside the label, masks (N, H, W) of where the object
    is and for digit grids k (N,), their number; source: the identity of the files, {} if there are none."""

    name: str
    classes: list[str]
    channels: int
    look: dict[str, Any]
    test: Dataset
    train_size: int = 0
    epoch: Callable[[Plan, int, torch.device], Iterator[tuple[Tensor, Tensor]]] | None = None
    truth: Mapping[str, Tensor] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    validation: Dataset | None = None

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
    validation: int = 0,
    subset: int | None = None,
    padding: int = 4,
    about: Mapping[str, Any] | None = None,
) -> Data:
    """A data set by name; with `about` (what a checkpoint says, see `Data.about`) only its test set, prepared as in training.

    digit_grids: embedded; `train_images` new ones in every epoch, test_images, grid, kmax, noise; size = 8 grid.
    mnist, fashion_mnist, cifar10, cifar100: `root` in torchvision's layout; crops after zero `padding` (0: the images as they
        are) and flips for CIFAR, resized to `size`.
    folder: root/train/<class>/ and root/<test_dir>/<class>/ (null: test, or else val, valid, validation; where both are there
        the second is the validation set); timm's augmentation with the keywords `augment`; test images resized to
        size / crop_pct (bicubic) and cropped.
    validation: so many training images are set aside to choose best.ckpt by; subset: train on so many of the others, null on all.
    Both are drawn once and for all, whatever the seed.
    Raises ValueError for an unknown name, a size that does not fit or other classes than the checkpoint's, FileNotFoundError for
    missing files."""
    check_data(
        name=name, root=root, size=size, grid=grid, repeats=repeats, crop_pct=crop_pct, validation=validation, subset=subset,
        padding=padding,
    )  # fmt: skip
    if name == "digit_grids":
        drawn = partial(digit_grids, grid=grid, kmax=kmax, noise=noise)
        return _grids(drawn, train_images, test_images, validation, seed, size)
    parts = {"validation": validation, "subset": subset}
    if name in KNOWN:
        return _known(name, root, download=download, size=size, seed=seed, about=about, padding=padding, **parts)
    return _folder(data_root(root), test_dir, size, crop_pct, augment or {}, workers, about, **parts)


def check_data(
    *, name: str, root: str | None, size: int, grid: int, repeats: int, crop_pct: float, validation: int = 0,
    subset: int | None = None, padding: int = 0, **_: Any,
) -> None:  # fmt: skip
    """ValueError for what cannot be, before a file is read."""
    if name not in SETS:
        raise ValueError(f"data.name={name!r}, allowed: {', '.join(SETS)}")
    if repeats != 1 and name != "folder":
        raise ValueError(f"data.repeats={repeats}: repeated augmentation is for data.name=folder")
    if repeats < 1 or not 0 < crop_pct <= 1:
        raise ValueError(f"data.repeats={repeats}, data.crop_pct={crop_pct}, allowed: >= 1, and above 0 up to 1")
    if validation < 0 or padding < 0 or (subset is not None and (subset < 1 or name == "digit_grids")):
        raise ValueError(
            f"data.validation={validation}, data.padding={padding}, data.subset={subset}, allowed: >= 0, >= 0, and >= 1 or null "
            "(digit grids are new in every epoch: data.train_images)"
        )
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


def split_training(images: int, validation: int, subset: int | None) -> tuple[list[int], list[int]]:
    """(indices to train on, indices set aside) of a training set, drawn once and for all. ValueError for too few images."""
    if validation + (subset or 1) > images:
        raise ValueError(
            f"data.validation={validation}, data.subset={subset}, but there are only {images} training images"
        )
    order = torch.randperm(images, generator=torch.Generator().manual_seed(stream(0))).tolist()
    rest = order[validation:]
    return sorted(rest if subset is None else rest[:subset]), sorted(order[:validation])


def _grids(
    drawn: Callable[..., Any], train_images: int, test_images: int, validation: int, seed: int, size: int
) -> Data:
    test = drawn(test_images, split="test", seed=seed)
    held = drawn(validation, split="train", seed=stream(seed, 0, 1)) if validation else None  # epochs count from 1

    def fresh(plan: Plan, epoch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        data = drawn(train_images, split="train", seed=stream(seed, epoch, 1))
        for _, batch, part in plan.epoch(epoch):
            mine = batch[part]
            yield data.images[mine].to(device), data.targets[mine].to(device)

    look = {"size": size, "crop": None, "normalise": {"mean": [0.0], "std": [1.0]}}
    return Data(
        "digit_grids", [str(c) for c in range(10)], 1, look, TensorDataset(test.images, test.targets),
        train_images, fresh, {"k": test.extra["k"], "masks": test.masks},
        validation=None if held is None else TensorDataset(held.images, held.targets),
    )  # fmt: skip


def _known(
    name: str, root: str | None, *, download: bool, size: int, seed: int, about: Mapping | None, validation: int,
    subset: int | None, padding: int,
) -> Data:  # fmt: skip
    testing = torchvision_set(name, root, train=False, download=download)
    classes, (test_x, test_y) = [str(c) for c in testing.classes], in_memory(testing)
    channels = test_x.shape[1]
    native = test_x.shape[-1] == (size if about is None else about["size"])
    truth = {"masks": test_x[:, 0] > INK} if name in GREY and native else {}
    if about is not None:
        _same_classes(about, classes, name)
        look = {k: about[k] for k in ("size", "crop", "normalise")}
        return Data(name, classes, channels, look, _Prepared(test_x, test_y, look), truth=truth)
    training = torchvision_set(name, root, train=True, download=download)
    images, labels = in_memory(training)
    mean, std = (f(images.float() / 255, dim=(0, 2, 3)).tolist() for f in (torch.mean, torch.std))
    look = {"size": size, "crop": None, "normalise": {"mean": mean, "std": std}}
    chosen, held = split_training(len(images), validation, subset)
    held_out = _Prepared(images[held], labels[held], look) if held else None
    images, labels = images[chosen], labels[chosen]
    augmentation = CropFlip(padding=padding, flip="cifar" in name)

    def cropped(plan: Plan, epoch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        for step, batch, part in plan.epoch(epoch):
            generator = torch.Generator().manual_seed(stream(seed, epoch, step))
            mine = batch[part]
            drawn = augmentation.draw((len(batch),), generator)
            crops = augmentation(images[mine].to(device), *(d[part] for d in drawn))
            yield prepare_batch(crops, **look), labels[mine].to(device)

    source = set_identity(training, name, root) | {"test": set_identity(testing, name, root)["sha"]}
    test = _Prepared(test_x, test_y, look)
    return Data(name, classes, channels, look, test, len(images), cropped, truth, source, held_out)


def find_splits(base: Path, test_dir: str | None) -> tuple[str, str | None]:
    """The folders to test and to validate on (None: there is none): `test_dir` alone if it is given; else test/, if it holds
    class folders, and the first of val/, valid/, validation/, which is tested on where it is the only one."""
    if test_dir is not None:
        return test_dir, None
    held_out = next((d for d in HELD_OUT if (base / d).is_dir()), None)
    if (base / "test").is_dir() and folders(base / "test"):
        return "test", held_out
    return held_out or HELD_OUT[0], None


def _folder(
    base: Path, test_dir: str | None, size: int, crop: float, augment: Mapping[str, Any], workers: int,
    about: Mapping | None, *, validation: int, subset: int | None,
) -> Data:  # fmt: skip
    test_dir, own = find_splits(base, test_dir)
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
    if own and validation:
        raise ValueError(
            f"data.validation={validation}: {base} has a validation split of its own ({own}/); leave it at 0"
        )
    chosen, held = split_training(len(train), validation, subset)
    held_out: Any = image_folder(base, own or "train", transform=prepare(**look, channels=3)) if own or held else None
    if own and held_out.classes != test.classes:
        odd = sorted(set(held_out.classes) ^ set(test.classes))
        raise ValueError(f"{own}/ and {test_dir}/ under {base} hold different classes: {', '.join(odd[:10])}")
    held_out = Subset(held_out, held) if held else held_out
    loaders: dict[tuple, SeededBatches] = {}

    def decoded(plan: Plan, epoch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        key = tuple(vars(plan).items())  # workers live from epoch to epoch
        if key not in loaders:
            loaders[key] = SeededBatches(Views(train, [transform], chosen), plan, device=device, workers=workers)
        for (images,), labels in loaders[key].epoch(epoch):
            yield images, labels

    source = set_identity(train, "folder", base) | {"test": set_identity(test, "folder", base)["sha"]}
    return Data("folder", train.classes, 3, look, test, len(chosen), decoded, {}, source, held_out)


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
