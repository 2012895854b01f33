"""The long-tailed data sets: embedded digits, CIFAR-LT and its kin by subsampling, list files, class folders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from common.data.batches import Plan, SeededBatches, TensorBatches, Views, to_float
from common.data.digits import split_per_class
from common.data.longtail import load_indices, long_tail_counts, subsample
from common.data.vision import KNOWN, data_root, image_folder, image_list, in_memory, set_identity, torchvision_set
from ncl_pp.transforms import (
    BATCHED,
    AffineNoise,
    CropFlipCutout,
    look,
    moco_transform,
    normalization,
    normalize,
    test_transform,
    train_transform,
)

SETS = ("digits_lt", *(f"{name}_lt" for name in KNOWN), "lists", "folder")
DIGITS_AUGMENT = {
    "affine": AffineNoise,
    "weak": lambda: CropFlipCutout(padding=1, flip=False),
}


@dataclass(frozen=True)
class LongTailed:
    """A long-tailed training set and its test (and validation) set.

    counts, classes: training images and name by class id; indices: the images used of the full training set;
    full_size: its size where a subset was drawn from files, else 0. source: the identity of the files, {} if there are none.
    look: what an image must go through before the network sees it, see `transforms.look`.
    Either `tensors` (images, targets) are held in memory with a batch augmentation, or `dataset` yields PIL
    images for `transform`, and `second` for the second view of the MoCo branch.
    """

    counts: list[int]
    classes: list[str]
    indices: list[int]
    channels: int
    test: Dataset
    look: dict[str, Any]
    validation: Dataset | None = None
    full_size: int = 0
    source: dict[str, Any] = field(default_factory=dict)
    images: Tensor | None = None
    targets: Tensor | None = None
    augment: Any = None
    dataset: Dataset | None = None
    transform: Callable | None = None
    second: Callable | None = None
    workers: int = 0

    def batches(
        self, plan: Plan, *, copies: int, device: torch.device, second_view: bool = False
    ) -> TensorBatches | SeededBatches:
        """Training batches ([copies of the images, and with second_view one more view], labels) by epoch."""
        if self.images is not None and self.targets is not None:
            views = copies + second_view
            return TensorBatches(self.images, self.targets, plan, augment=self.augment, views=views, device=device)
        assert self.dataset is not None and self.transform is not None
        transforms = [self.transform] * copies + ([self.second] if second_view and self.second else [])
        return SeededBatches(Views(self.dataset, transforms, self.indices), plan, workers=self.workers, device=device)

    def about(self) -> dict[str, Any]:
        """What a checkpoint must say so that a network can be used without this data set."""
        return {"classes": self.classes, "channels": self.channels, "counts": self.counts, **self.look}

    def split(self, name: Literal["test", "validation"]) -> Dataset:
        """The test or validation set. ValueError where there is no validation split."""
        if name == "validation" and self.validation is None:
            raise ValueError("evaluate.split=validation: this data set has no validation split")
        if name not in ("test", "validation"):
            raise ValueError(f"evaluate.split={name!r}, allowed: test, validation")
        return self.test if name == "test" else self.validation  # type: ignore[return-value]


def build_data(
    *,
    name: str,
    seed: int,
    root: str | None = None,
    folder: str = "",
    workers: int = 0,
    download: bool = False,
    imbalance: float = 100,
    n_max: int | None = None,
    test_per_class: int = 60,
    subset_seed: int | None = 0,
    shuffle_classes: bool = False,
    indices: str | None = None,
    size: int = 32,
    augment: str | None = None,
    train_list: str | None = None,
    test_list: str | None = None,
    val_list: str | None = None,
    strip_prefix: str | None = None,
) -> LongTailed:
    """A data set by name.

    digits_lt: embedded; imbalance, n_max, test_per_class, augment: affine | weak (a crop); seed chooses split
        and order of the classes.
    mnist_lt, fashion_mnist_lt, cifar10_lt, cifar100_lt: `root` in torchvision's layout (CIFAR also as class
        folders train/<class>/, test/<class>/), subsampled to n_i = int(n_max * imbalance^(-i/(C-1))) with
        subset_seed (null: the run's seed) or to the stored list `indices`. shuffle_classes: i is the place of a
        class in an order drawn from the same seed, and not its id. augment: cifar (AutoAugment +
        Cutout on workers) | in memory, in batches on the device: cifar_gpu (crop, flip, Cutout) | cifar_weak
        (crop, flip) | affine.
    lists: train_list, test_list (and val_list), paths relative to the root; see `common.data.vision.image_list`.
    folder: root/train/<class>/, root/test/<class>/ (and root/val/<class>/).
    lists and folder look in root/`folder` where that exists, so that one root can hold several sets. augment:
        see `transforms.train_transform`; null is affine for digits and the MNIST family, cifar, or imagenet.

    Raises ValueError for an unknown name or an empty class, FileNotFoundError for missing files.
    """
    if name not in SETS:
        raise ValueError(f"data.name={name!r}, allowed: {', '.join(SETS)}")
    augment = augment or default_augment(name)
    if name == "digits_lt":
        if root:
            raise ValueError(f"data.root={root}: digits_lt is embedded; name the set that lies there, e.g. data=folder")
        return _digits(
            seed=seed, imbalance=imbalance, n_max=n_max or 100, test_per_class=test_per_class, augment=augment
        )
    if name.removesuffix("_lt") in KNOWN:
        return _subsampled(
            name, root, download=download, imbalance=imbalance, n_max=n_max, augment=augment, size=size,
            seed=seed if subset_seed is None else subset_seed, shuffle=shuffle_classes, indices=indices, workers=workers,
        )  # fmt: skip
    base = data_root(root)
    base = base / folder if (base / folder).is_dir() else base
    if name == "lists" and (train_list is None or test_list is None):
        raise ValueError("data.name=lists needs data.train_list and data.test_list")
    lists = {"train": train_list, "test": test_list, "val": val_list} if name == "lists" else None
    return _files(base, lists, augment=augment, size=size, strip_prefix=strip_prefix, workers=workers)


def _files(
    base: Path, lists: dict[str, str | None] | None, *, augment: str, size: int, strip_prefix: str | None, workers: int
) -> LongTailed:
    """Images that `lists` name, or without lists those of the class folders under `base`."""
    transform, testing = train_transform(augment, size=size), test_transform(augment, size=size)
    if lists:

        def listed(split: str, transform: Callable | None) -> Any:
            file = lists[split]
            return image_list(base / file, base, strip_prefix=strip_prefix, transform=transform) if file else None

        train, test, val = listed("train", None), listed("test", testing), listed("val", testing)
        classes = [str(c) for c in range(max(train.num_classes, test.num_classes))]
    else:
        train, test = image_folder(base, "train"), image_folder(base, "test", transform=testing)
        val = image_folder(base, "val", transform=testing) if (base / "val").is_dir() else None
        _same_classes(base, train.classes, test.classes)
        classes = train.classes
    kind = "lists" if lists else "folder"
    return LongTailed(
        _counts(train.targets, len(classes), f"{base}"), classes, list(range(len(train))), 3, test,
        look(augment, size=size), val, source=set_identity(train, kind, base),
        dataset=train, transform=transform, second=moco_transform(augment, size=size), workers=workers,
    )  # fmt: skip


def default_augment(name: str) -> str:
    """The augmentation of a set whose configuration names none."""
    if name == "digits_lt" or "mnist" in name:
        return "affine"
    return "cifar" if name.startswith("cifar") else "imagenet"


def _digits(*, seed: int, imbalance: float, n_max: int, test_per_class: int, augment: str) -> LongTailed:
    if augment not in DIGITS_AUGMENT:
        raise ValueError(f"data.augment={augment!r}, allowed for digits_lt: {', '.join(DIGITS_AUGMENT)}")
    train, test = split_per_class(test_per_class=test_per_class, seed=seed, permute_classes=True)
    counts = long_tail_counts(n_max, imbalance, 10)
    chosen = subsample(train.targets, counts, seed=seed)
    shown = dict(zip(train.targets.tolist(), train.extra["digit"].tolist(), strict=True))
    return LongTailed(
        counts, [str(shown[c]) for c in range(10)], chosen, 1, TensorDataset(test.images, test.targets),
        look("affine", size=8, channels=1),
        images=train.images[chosen], targets=train.targets[chosen], augment=DIGITS_AUGMENT[augment](),
    )  # fmt: skip


def _subsampled(
    name: str,
    root: str | None,
    *,
    download: bool,
    imbalance: float,
    n_max: int | None,
    augment: str,
    size: int,
    seed: int,
    shuffle: bool,
    indices: str | None,
    workers: int,
) -> LongTailed:
    base = name.removesuffix("_lt")
    known = KNOWN[base]
    if _has_class_folders(base, root) and not download:
        sets = [image_folder(root, "train"), image_folder(root, "test")]
        _same_classes(root, sets[0].classes, sets[1].classes)
        if len(sets[0].classes) != known.classes:
            raise ValueError(
                f"{root}/train holds {len(sets[0].classes)} class folders, {base} has {known.classes}; torchvision's files "
                f"({known.layout[0]}, ...) are not under {root} either"
            )
    else:
        sets = [torchvision_set(base, root, train=t, download=download) for t in (True, False)]
    targets = torch.as_tensor(sets[0].targets)
    if indices:
        chosen = load_indices(indices, dataset=name, size=len(targets))
    else:
        n_max = n_max or int(targets.bincount(minlength=known.classes).max())
        profile = long_tail_counts(n_max, imbalance, known.classes)
        if shuffle:
            order = torch.randperm(known.classes, generator=torch.Generator().manual_seed(seed)).tolist()
            profile = [profile[place] for place in order]
        chosen = subsample(targets, profile, seed=seed)
    counts = _counts(targets[chosen].tolist(), known.classes, indices or str(root))
    source = set_identity(sets[0], base, root)
    classes = [str(c) for c in sets[0].classes]
    channels = 1 if "mnist" in base else 3
    if augment not in BATCHED:
        transform, second = (make(augment, size=size, channels=channels) for make in (train_transform, moco_transform))
        sets[1].transform = test_transform(augment, size=size, channels=channels)
        return LongTailed(
            counts, classes, chosen, channels, sets[1], look(augment, size=size, channels=channels),
            full_size=len(targets), source=source, dataset=sets[0], transform=transform, second=second, workers=workers,
        )  # fmt: skip
    images, labels = _decoded(sets[0], chosen)
    stats = normalization(augment, channels)
    test_images, test_labels = _decoded(sets[1], range(len(sets[1])))
    if augment == "affine":
        batched: Any = AffineNoise(rotation=0.2, noise=0.0)
    else:
        batched = CropFlipCutout(flip=channels == 3, cutout=size // 2 if augment == "cifar_gpu" else 0, stats=stats)
    return LongTailed(
        counts, classes, chosen, channels, TensorDataset(normalize(to_float(test_images), stats), test_labels),
        look(augment, size=test_images.shape[-1], channels=channels), full_size=len(targets), source=source,
        images=images, targets=labels, augment=batched,
    )  # fmt: skip


def _has_class_folders(base: str, root: str | None) -> bool:
    """CIFAR exported as images, and no torchvision files beside it."""
    path = data_root(root)
    files = any((path / f).is_file() for f in KNOWN[base].layout)
    return base.startswith("cifar") and not files and (path / "train").is_dir() and (path / "test").is_dir()


def _decoded(dataset: Any, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Images (n, C, H, W) uint8 and targets of the chosen images; files are decoded once, here."""
    if hasattr(dataset, "data"):
        images, targets = in_memory(dataset)
        return images[list(chosen)], targets[list(chosen)]
    return in_memory(Subset(dataset, list(chosen)))


def _same_classes(where: Any, train: list[str], test: list[str]) -> None:
    if train != test:
        different = sorted(set(train) ^ set(test))
        raise ValueError(f"train/ and test/ under {where} hold different classes: {', '.join(different[:10])}")


def _counts(targets: Sequence[int], classes: int, where: str) -> list[int]:
    counts = torch.as_tensor(targets).bincount(minlength=classes).tolist()
    if empty := [c for c, n in enumerate(counts) if n == 0]:
        raise ValueError(f"{where}: no training image for classes {empty[:10]}; log 0 has no balanced softmax")
    return counts
