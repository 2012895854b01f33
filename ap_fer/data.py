"""Parametric faces in memory, and the facial-expression sets; batches that depend on (seed, epoch) alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ap_fer.expressions import EXPRESSIONS, imbalanced_counts, repeat_factors, repeated_indices
from ap_fer.layouts import READERS, Labelled, read_split
from ap_fer.transforms import MEAN, STD, build_transforms, check_image
from common.data.batches import CropFlip, Plan, SeededBatches, TensorBatches, Views, stream
from common.data.faces import contrast, expression_faces
from common.data.files import identity, open_image
from common.data.vision import data_root

SETS = ("faces", *READERS)
# Images that the lists of the publishers name; another number is noticed, and an error with data.partial=false.
PUBLISHED = {
    "raf_db": {"train": 12_271, "test": 3_068},
    "ferplus": {"train": 28_709, "test": 3_589},  # rows of fer2013new.csv, unusable ones included
}
VALIDATION_PER_CLASS = {"affectnet": 500}  # usual, but copies in use differ: noticed
ALL_FACES = {"expw": 91_793}  # likewise


@dataclass(frozen=True)
class Data:
    """names: class names in our order; counts: training images per class; indices: those of an epoch, with repeats.

    test: yields (image (3, S, S) normalised, label). parts: named slices of it that are also reported alone. truth: of the test
    images of parametric faces {"face", "background", "occluder"} masks (N, S, S), "busy" (N,) and "contrast" (N, S, S), see
    `expression_faces`. source: the identity of the files.
    files: the training images of a set on disk, each once, as they are. lacks: in what it is not the whole published set."""

    names: tuple[str, ...]
    counts: list[int]
    indices: list[int]
    test: Dataset
    make: Callable[[Plan, torch.device], TensorBatches | SeededBatches]
    parts: Mapping[str, slice] = field(default_factory=dict)
    truth: Mapping[str, Tensor] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    files: "FaceFiles | None" = None
    lacks: str = ""


class FaceFiles(Dataset):
    """Items (transform(PIL RGB image), label); images are cropped to their box where there is one.

    An image that cannot be read, or is too small, raises ValueError with its path."""

    def __init__(self, labelled: Labelled, transform: Callable | None = None):
        self.found, self.transform = labelled, transform

    def __len__(self) -> int:
        return len(self.found.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path = self.found.paths[index]
        image = open_image(path, upright=not self.found.boxes)  # boxes are in stored coordinates
        if self.found.boxes:
            image = image.crop(self.found.boxes[index])
        try:
            check_image(image)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return (image if self.transform is None else self.transform(image)), self.found.targets[index]


def build_data(
    *,
    name: str,
    seed: int,
    root: str | None = None,
    folder: str = "",
    workers: int = 0,
    size: int = 112,
    num_classes: int | None = 7,
    balance: bool = True,
    augment: str = "raf",
    train_images: int = 1200,
    test_images: int = 1000,
    occluded: float = 0.5,
    busy: float = 0.5,
    counts: str = "raf_db",
    draw: int = 0,
    images: str = "aligned_224",
    test_share: float = 0.25,
    every: int = 1,
    partial: bool = True,
) -> Data:
    """A data set by name.

    faces: embedded; train_images in the proportions `counts` (raf_db | equal), `occluded` of them with occluders; test_images
        without and as many with occluders, balanced; `busy` of all in surroundings with the contrast of the face.
        seed: of both, so that an interval over seeds covers the
        draw of the faces. draw: 1 gives other training images (the stem's pre-training).
    raf_db (images: aligned | aligned_224), ferplus, affectnet, expw (test_share), affwild2 (every), folder, csv: see `layouts`.
    Sets are looked for in root/`folder` where that exists, so that one root can hold several.
    size: pixels; num_classes: 7, 8 with contempt, or null: the class folders as they are; balance: repeat rare classes as
        RAF-DB's recipe does; augment: see `transforms.build_transforms` (faces: flip | none).
    partial: also take a list of a published set that names fewer or more images than the published one (`check_counts`).
    Raises ValueError for an unknown name, a wrong label or an empty class, FileNotFoundError for missing files."""
    if name not in SETS:
        raise ValueError(f"data.name={name!r}, allowed: {', '.join(SETS)}")
    if num_classes not in (7, 8) and not (name == "folder" and num_classes is None):
        raise ValueError(f"data.num_classes={num_classes}, allowed: 7, 8 with contempt, or for own class folders null")
    if name == "faces":
        if root is not None:
            raise ValueError(f"data.root={root}: faces is embedded; name the set that lies there, e.g. data=folder")
        if num_classes != 7 or augment not in ("flip", "none"):
            raise ValueError("data.name=faces has 7 classes and data.augment=flip or none")
        if counts not in ("raf_db", "equal"):
            raise ValueError(f"data.counts={counts!r}, allowed: raf_db, equal")
        shares = imbalanced_counts(train_images, *([[1] * 7] if counts == "equal" else []))
        return _faces(
            EXPRESSIONS[:7], seed, size, shares, test_images, occluded, busy, draw, balance=balance, augment=augment
        )
    base = data_root(root)
    base = base / folder if (base / folder).is_dir() else base
    options = {
        "num_classes": num_classes,
        "images": images,
        "test_share": test_share,
        "every": every,
        "partial": partial,
    }
    return _files(name, base, options, size=size, balance=balance, augment=augment, workers=workers)


def _files(
    name: str, base: Path, options: dict[str, Any], *, size: int, balance: bool, augment: str, workers: int
) -> Data:
    """The sets of `layouts` under `base`."""
    train, test = (read_split(name, base, split, **options) for split in ("train", "test"))
    lacks = check_counts(name, base, train, test, classes=options["num_classes"], partial=options["partial"])
    if train.names != test.names:
        raise ValueError(f"{base}: the splits have different classes: {sorted(set(train.names) ^ set(test.names))}")
    names = tuple(train.names) or EXPRESSIONS[: options["num_classes"]]
    for split, found in (("train", train), ("test", test)):
        if (largest := max(found.targets)) >= len(names):
            raise ValueError(
                f"{name}: the {split} split has {EXPRESSIONS[largest]}: data.num_classes={largest + 1} is needed"
            )
    transform, testing = build_transforms(augment, size=size)
    per_class = torch.tensor(train.targets).bincount(minlength=len(names)).tolist()
    if empty := [names[c] for c, n in enumerate(per_class) if n == 0]:
        raise ValueError(f"{name} under {base}: no training image for {', '.join(empty)}")
    indices = repeated_indices(train.targets, repeat_factors(per_class) if balance else [1] * len(names))

    def make(plan: Plan, device: torch.device) -> SeededBatches:
        return SeededBatches(Views(FaceFiles(train), [transform], indices), plan, device=device, workers=workers)

    source = identity(
        name, [*train.paths, *test.paths], root=base, classes=len(names), left_out=train.left_out + test.left_out
    )
    return Data(
        names, per_class, indices, FaceFiles(test, testing), make, source=source, files=FaceFiles(train), lacks=lacks
    )


def check_counts(name: str, base: Path, train: Labelled, test: Labelled, *, classes: int | None, partial: bool) -> str:
    """In what a set is not the published one, in a sentence; empty if it is, or if its numbers are not known.

    ValueError where the publisher's list of a split has another number of images, without `partial`."""
    for split, found in (("train", train), ("test", test)):
        published = PUBLISHED.get(name, {}).get(split, found.listed)
        if found.listed != published:
            lacks = (
                f"{name} under {base}: the {split} list has {found.listed:,} images, the published one {published:,}"
            )
            if not partial:
                raise ValueError(f"{lacks}; data.partial=true takes it as it is, published numbers are not for it")
            print(f"notice: {lacks}")
            return lacks
    if name in VALIDATION_PER_CLASS and len(test.paths) != (usual := VALIDATION_PER_CLASS[name] * (classes or 0)):
        print(f"notice: {name} has {len(test.paths):,} test images here, {usual:,} is usual")
    if name in ALL_FACES and train.listed + test.listed != ALL_FACES[name]:
        print(f"notice: {name} has {train.listed + test.listed:,} faces here, {ALL_FACES[name]:,} is usual")
    if left := train.left_out + test.left_out:
        return f"{name} under {base}: {left:,} images are left out"
    return ""


def normalise(images: Tensor) -> Tensor:
    """(N, 3, H, W) in 0..1, by ImageNet's mean and standard deviation."""
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@lru_cache(maxsize=2)  # cells of a sweep that share a seed run one after the other in one process
def _rendered(n: int, seed: int, size: int, occluded: float, busy: float, counts: tuple[int, ...]):
    return expression_faces(n, split="train", seed=seed, size=size, occluded=occluded, busy=busy, counts=counts)


@lru_cache(maxsize=2)
def _test_faces(n: int, size: int, seed: int, busy: float) -> tuple[TensorDataset, dict[str, Tensor]]:
    clean, hidden = (
        expression_faces(n, split="test", seed=stream(seed, share), size=size, occluded=share, busy=busy)
        for share in (0, 1)
    )
    truth = {"face": torch.cat([clean.masks, hidden.masks])}  # type: ignore[list-item]
    truth |= {k: torch.cat([clean.extra[k], hidden.extra[k]]) for k in ("background", "occluder", "busy")}
    images = torch.cat([clean.images, hidden.images])
    truth["contrast"] = torch.from_numpy(contrast(images))
    return TensorDataset(normalise(images), torch.cat([clean.targets, hidden.targets])), truth


def _faces(
    names: tuple[str, ...], seed: int, size: int, counts: list[int], test: int, occluded: float, busy: float, draw: int, *,
    balance: bool, augment: str,
) -> Data:  # fmt: skip
    data = _rendered(sum(counts), stream(seed, draw), size, occluded, busy, tuple(counts))
    indices = repeated_indices(data.targets.tolist(), repeat_factors(counts) if balance else [1] * len(counts))
    held, truth = _test_faces(test, size, seed, busy)
    mirror = CropFlip(padding=0) if augment == "flip" else None

    def make(plan: Plan, device: torch.device) -> TensorBatches:
        return TensorBatches(
            normalise(data.images[indices]), data.targets[indices], plan, device=device, augment=mirror
        )

    return Data(names, counts, indices, held, make, {"clean": slice(0, test), "occluded": slice(test, 2 * test)}, truth)
