"""Real image sets in the layouts in which people have them, with errors that say what to do.

torchvision reads the files; what this adds is one error with the path looked for, the layout expected and
the way to get it, and the path of an image that cannot be decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor

from common.data.files import (
    folders,
    hidden,
    identity,
    is_image,
    label,
    open_image,
    read_json,
    read_lines,
    read_table,
    readable,
    tensor_identity,
)


@dataclass(frozen=True)
class Known:
    """A set that torchvision reads: its class, the files under the root, its classes and image counts."""

    reader: Callable[..., Any]
    layout: tuple[str, ...]
    classes: int
    sizes: dict[str, int]


_IDX = tuple(f"{s}-{k}-ubyte" for s in ("train", "t10k") for k in ("images-idx3", "labels-idx1"))
KNOWN = {
    "mnist": Known(datasets.MNIST, tuple(f"MNIST/raw/{f}" for f in _IDX), 10, {"train": 60000, "test": 10000}),
    "fashion_mnist": Known(
        datasets.FashionMNIST,
        tuple(f"FashionMNIST/raw/{f}" for f in _IDX),
        10,
        {"train": 60000, "test": 10000},
    ),
    "cifar10": Known(
        datasets.CIFAR10,
        tuple(
            f"cifar-10-batches-py/{f}"
            for f in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
        ),
        10,
        {"train": 50000, "test": 10000},
    ),
    "cifar100": Known(
        datasets.CIFAR100,
        tuple(f"cifar-100-python/{f}" for f in ("train", "test", "meta")),
        100,
        {"train": 50000, "test": 10000},
    ),
}


def data_root(root: str | Path | None) -> Path:
    """`root` with ~ expanded. Raises ValueError when not set, FileNotFoundError when it is no folder."""
    if root is None or str(root).strip() == "":
        raise ValueError("data.root is not set: give the folder that holds the data (data.root=/datasets/...)")
    path = Path(root).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path} (data.root={root})")
    return path


def torchvision_set(
    name: str,
    root: str | Path | None,
    *,
    train: bool = True,
    download: bool = False,
    transform: Callable | None = None,
):
    """MNIST, Fashion-MNIST, CIFAR-10 or CIFAR-100 (name: a key of KNOWN), as torchvision's data set.

    Raises ValueError for an unknown name or a corrupt file, FileNotFoundError when files are missing (or
    could not be downloaded), with the layout expected under `root`.
    """
    if name not in KNOWN:
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(KNOWN)}")
    known = KNOWN[name]
    if download and root:
        Path(root).expanduser().mkdir(parents=True, exist_ok=True)
    path = data_root(root)
    missing = [f for f in known.layout if not (path / f).is_file()]
    if missing and not download:
        raise FileNotFoundError(_missing_message(name, path, missing))
    try:
        return known.reader(str(path), train=train, download=download, transform=transform)
    except Exception as error:  # torchvision raises RuntimeError, URLError, EOFError, pickle errors, ...
        if missing:
            raise FileNotFoundError(f"{_missing_message(name, path, missing)}\nThe download failed: {error}") from error
        raise ValueError(
            f"{name} under {path} is corrupt: {error}. Delete {path / Path(known.layout[0]).parts[0]} and get it again"
        ) from error


def _missing_message(name: str, path: Path, missing: list[str]) -> str:
    zipped = [f for f in missing if (path / f"{f}.gz").is_file()]
    hint = f"\nThe files are there as .gz: gunzip -k {path / zipped[0]}.gz and the others." if zipped else ""
    return (
        f"{name} not found: looked for {path / missing[0]}"
        f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}.\n"
        f"Expected under {path}: {', '.join(KNOWN[name].layout)}.{hint}\n"
        f"To get it: data.download=true, or copy the files there; "
        f"`python -m common.data.check {name} {path}` says what is missing."
    )


def image_folder(root: str | Path | None, split: str | None = None, *, transform: Callable | None = None):
    """torchvision's ImageFolder on root/split/<class>/<image>; classes in sorted order.

    Raises FileNotFoundError naming the folder looked for, or the class folders without an image.
    """
    path = data_root(root) / (split or "")
    layout = f"Expected {path}/<class name>/<image>.jpg (jpeg, png, ...), one folder per class."
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}. {layout}")
    try:
        found = _ClassFolders(str(path), transform=transform, loader=open_image, is_valid_file=partial(_is_data, path))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no usable classes in {path}: {error}. {layout}") from error
    good = readable([file for file, _ in found.samples])
    found.left_out = len(found.samples) - len(good)
    found.samples = found.imgs = [found.samples[i] for i in good]
    found.targets = [target for _, target in found.samples]
    if empty := set(range(len(found.classes))) - set(found.targets):
        raise ValueError(f"{path}: no image of class {found.classes[min(empty)]} can be decoded")
    return found


def _is_data(root: Path, file: str) -> bool:
    return is_image(Path(file)) and not any(map(hidden, Path(file).relative_to(root).parts))


class _ClassFolders(datasets.ImageFolder):
    """Hidden folders are no classes. left_out: images that broken_images=skip left out."""

    left_out = 0

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = [p.name for p in folders(Path(directory))]
        if not names:
            raise FileNotFoundError("no class folder")
        return names, {name: i for i, name in enumerate(names)}


class ListedImages(torch.utils.data.Dataset):
    """Images named by a list: items are (transform(PIL RGB image), label).

    paths: list of Path; targets: list of int; num_classes: as stated in the list, else the largest label + 1.
    """

    def __init__(
        self,
        paths: list[Path],
        targets: list[int],
        *,
        num_classes: int | None = None,
        transform: Callable | None = None,
    ):
        good = readable(paths)
        self.left_out = len(paths) - len(good)
        self.num_classes = max(targets) + 1 if num_classes is None else num_classes
        self.paths, self.targets, self.transform = [paths[i] for i in good], [targets[i] for i in good], transform
        if not 0 <= min(targets) <= max(targets) < self.num_classes:
            raise ValueError(f"labels span {min(targets)}..{max(targets)}, expected 0..{self.num_classes - 1}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        image = open_image(self.paths[index])
        return (image if self.transform is None else self.transform(image)), self.targets[index]

    def identity(self) -> dict[str, Any]:
        """What the set is, see `common.data.files.identity`."""
        return identity("list", self.paths, classes=self.num_classes, left_out=self.left_out)


def image_list(
    list_file: str | Path,
    root: str | Path | None,
    *,
    strip_prefix: str | None = None,
    transform: Callable | None = None,
) -> ListedImages:
    """Images named in a list, found under `root`.

    Formats, by suffix: .txt, "relative/path label" per line (ImageNet-LT, Places-LT, iNaturalist lists; a
    path may contain blanks); .csv, "path,label" (a header row naming these two is skipped); .json,
    {"annotations": [{"fpath", "category_id"}, ...], "num_classes"} (the format of the long-tailed CIFAR and
    ImageNet lists). strip_prefix is removed from the front of every path, which re-roots lists written on
    another machine.
    Raises FileNotFoundError for a missing list or a missing first image, ValueError naming the bad line.
    """
    where, folder = Path(list_file).expanduser(), data_root(root)
    if not where.is_file():
        raise FileNotFoundError(
            f"no list {where}; expected a .txt ('relative/path label' per line), .csv or .json file"
        )
    readers = {".txt": _read_txt, ".csv": _read_csv, ".json": _read_json}
    if where.suffix.lower() not in readers:
        raise ValueError(f"list {where}: suffix {where.suffix!r}, allowed are {', '.join(readers)}")
    rows, num_classes = readers[where.suffix.lower()](where)
    if not rows:
        raise ValueError(f"list {where} names no image")
    _one_label_per_image(where, rows)
    prefix = strip_prefix or ""
    for name, _ in rows:
        if not name.startswith(prefix):
            raise ValueError(f"list {where}: path {name!r} does not start with strip_prefix={prefix!r}")
    # An absolute path stays as it is unless a prefix says that it belongs under the root.
    paths = [folder / (name[len(prefix) :].lstrip("/") if prefix else name) for name, _ in rows]
    if not paths[0].is_file():
        raise FileNotFoundError(
            f"list {where}: its first image is not at {paths[0]} (listed as {rows[0][0]!r}, root {folder}). "
            "Set data.root, or strip_prefix for a list written on another machine"
        )
    return ListedImages(paths, [label for _, label in rows], num_classes=num_classes, transform=transform)


def _row(where: Path, number: int, name: str, target: Any) -> tuple[str, int]:
    if not name:
        raise ValueError(f"list {where}, line {number}: expected a path and a label >= 0, got {name!r}, {target!r}")
    return name, label(target, f"list {where}, line {number} ({name})")


def _read_txt(where: Path):
    split = ((n, line.rpartition(" ") if " " in line else line.rpartition("\t")) for n, line in read_lines(where))
    return [_row(where, n, name.strip(), target) for n, (name, _, target) in split], None


def _read_csv(where: Path):
    rows = read_table(where)
    if rows and [c.lower() for c in rows[0][1][:2]] == ["path", "label"]:
        rows = rows[1:]
    for n, row in rows:
        if len(row) != 2:
            raise ValueError(f"list {where}, line {n}: expected two columns path,label, got {len(row)}")
    return [_row(where, n, *row) for n, row in rows], None


def _read_json(where: Path):
    content = read_json(where)
    try:
        entries, classes = content["annotations"], int(content["num_classes"])
        return [_row(where, n, e["fpath"], e["category_id"]) for n, e in enumerate(entries)], classes
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"list {where}: expected "
            '{"annotations": [{"fpath", "category_id"}, ...], "num_classes"}; '
            f"{type(error).__name__}: {error}"
        ) from error


def _one_label_per_image(where: Path, rows: list[tuple[str, int]]) -> None:
    """ValueError for an image that a list names with two labels; named twice with the same one it is kept twice."""
    first: dict[str, int] = {}
    for name, target in rows:
        if first.setdefault(name, target) != target:
            raise ValueError(f"list {where}: {name} has the labels {first[name]} and {target}")


def set_identity(dataset: Any, kind: str, root: str | Path | None = None) -> dict[str, Any]:
    """`common.data.files.identity` of a class folder, a list, or one of torchvision's sets."""
    if hasattr(dataset, "identity"):
        return dataset.identity()
    if hasattr(dataset, "samples"):
        paths, left_out = [path for path, _ in dataset.samples], getattr(dataset, "left_out", 0)
        return identity(kind, paths, root=root or dataset.root, classes=len(dataset.classes), left_out=left_out)
    data, targets = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
    return tensor_identity(kind, data, targets)


def in_memory(dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Decodes a small set once: images uint8 (N, C, H, W) in 0..255, targets int64 (N,).

    Takes a set without a transform (its items are PIL images): what the transform draws at random must be
    drawn in every epoch. Raises ValueError when it has one, is empty, or when the images differ in size.
    """
    if getattr(dataset, "transform", None) is not None:
        raise ValueError("in_memory takes a data set without a transform; apply it to the batches instead")
    if len(dataset) == 0:
        raise ValueError("the data set is empty")
    data = getattr(dataset, "data", None)
    if isinstance(data, torch.Tensor) and data.ndim == 3:  # MNIST family: (N, H, W)
        return data.unsqueeze(1).clone(), torch.as_tensor(dataset.targets, dtype=torch.int64)
    if isinstance(data, np.ndarray) and data.ndim == 4:  # CIFAR: (N, H, W, 3)
        images = torch.from_numpy(data).permute(0, 3, 1, 2).contiguous()
        return images, torch.as_tensor(dataset.targets, dtype=torch.int64)
    images, targets = [], []
    for i in range(len(dataset)):
        image, target = dataset[i]
        images.append(pil_to_tensor(image))
        targets.append(int(target))
        if images[-1].shape != images[0].shape:
            raise ValueError(
                f"image {i} is {tuple(images[-1].shape)}, image 0 {tuple(images[0].shape)}: in_memory needs equal sizes"
            )
    return torch.stack(images), torch.tensor(targets)
