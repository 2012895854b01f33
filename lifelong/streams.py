"""Streams of tasks with disjoint classes (section 6): embedded digits and shapes, torchvision sets, CUB-200, class folders.

Labels are positions in the class order: task 0 holds 0 .. s_0 - 1, and so on, in training, test and memory alike. The images
of a task are tensors, decoded when the task begins.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from common.data.batches import stream as random_stream
from common.data.dataset import Dataset
from common.data.objects import OBJECTS, digits_on_backgrounds, objects_on_backgrounds
from common.data.vision import KNOWN, data_root, image_folder, in_memory, open_image, torchvision_set

EMBEDDED = ("digits20", "digits10", "shapes")
SETS = (*EMBEDDED, *KNOWN, "cub200", "folder")
SPLITS = ("train", "test")

Decode = Callable[[str, Tensor], Tensor]  # (split, indices) -> raw images


@dataclass(frozen=True)
class Stream:
    """groups: the labels of every task; class_names: in stream order (a function of a script that says `torch` and `.classes`
    cannot be sent to joblib's workers: cloudpickle takes that for torch.classes); targets: {split: (n,) labels}; channels, size:
    of an image; masks: foreground of the test images (n, H, W) bool where it is known."""

    groups: list[slice]
    class_names: list[str]
    targets: dict[str, Tensor]
    channels: int
    size: int
    decode: Decode
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.groups)

    def task(self, split: str, *tasks: int) -> tuple[Tensor, Tensor]:
        """Raw images (n, C, H, W), uint8 or float 0..1, and labels (n,) of one or more tasks, in data-set order."""
        chosen = self.indices(split, *tasks)
        return self.decode(split, chosen), self.targets[split][chosen]

    def indices(self, split: str, *tasks: int) -> Tensor:
        labels = self.targets[split]
        inside = torch.zeros(len(labels), dtype=torch.bool)
        for t in tasks:
            inside |= (labels >= self.groups[t].start) & (labels < self.groups[t].stop)
        return torch.nonzero(inside).flatten()


def task_groups(num_classes: int, tasks: int | Sequence[int]) -> list[slice]:
    """Groups of labels. tasks: a number of equal tasks, or the sizes of unequal ones.

    ValueError if classes do not divide, sizes do not add up, or a task would be empty."""
    if isinstance(tasks, int):
        if tasks < 1 or num_classes % tasks:
            raise ValueError(
                f"data.tasks={tasks} does not divide {num_classes} classes; give a divisor or a list of sizes"
            )
        tasks = [num_classes // tasks] * tasks
    sizes = [int(n) for n in tasks]
    if min(sizes, default=0) < 1 or sum(sizes) != num_classes:
        raise ValueError(f"data.tasks={sizes}: sizes must be positive and add up to {num_classes} classes")
    ends = np.cumsum(sizes).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def class_order(names: Sequence[str], order: str, seed: int) -> list[int]:
    """The class ids in stream order. order: natural | random (drawn from seed) | a text file with one class name per line.

    A file may name fewer classes than the data has, then only these are used. ValueError for a name that is unknown or
    stands there twice, FileNotFoundError without the file."""
    if order == "natural":
        return list(range(len(names)))
    if order == "random":
        return np.random.default_rng(random_stream(seed, 1993)).permutation(len(names)).tolist()
    file = Path(order).expanduser()
    file = file if file.is_absolute() or file.is_file() else Path(__file__).parent / "configs" / order
    if not file.is_file():
        raise FileNotFoundError(f"data.order={order}: neither natural nor random, and no file {file}")
    listed = [line.split("#")[0].strip() for line in file.read_text().splitlines()]
    listed = [name for name in listed if name]
    if twice := sorted({name for name in listed if listed.count(name) > 1}):
        raise ValueError(f"{file} names classes twice: {', '.join(twice[:5])}")
    number = {name: i for i, name in enumerate(names)}
    if missing := [name for name in listed if name not in number]:
        raise ValueError(
            f"{file} names {len(missing)} classes that the data does not have, e.g. {', '.join(missing[:5])}"
        )
    if not listed:
        raise ValueError(f"{file} names no class")
    return [number[name] for name in listed]


def build_stream(
    *,
    name: str,
    seed: int,
    tasks: int | Sequence[int] = 10,
    order: str = "natural",
    order_seed: int | None = None,
    root: str | None = None,
    download: bool = False,
    workers: int = 4,
    train_images: int = 2000,
    test_images: int = 1000,
    rho: float = 0.0,
    amplitude: float = 0.5,
    swapped: bool = False,
    stored_size: int = 256,
) -> Stream:
    """A stream by name; see `task_groups` and `class_order` for tasks and order (order_seed null: the run's seed).

    digits20: scikit-learn's digits and their negatives, 8x8, on sine textures; digits10: without the negatives; shapes: ten
    geometric shapes, 16x16, the same textures. train_images, test_images, rho (training images whose texture tells the
    class), amplitude, swapped (test textures of the next class): see common.data.objects. They show reliance on
    backgrounds and forgetting, with known foreground; they cannot show accuracy on photographs.
    mnist, fashion_mnist, cifar10, cifar100: `root` in torchvision's layout. cub200: root/CUB_200_2011/images.txt, ....
    folder: root/train/<class>/ and root/val/<class>/ (or test/). The last two are decoded per task by `workers` threads, short
    side and centre `stored_size` pixels.
    ValueError for an unknown name or classes that do not fit, FileNotFoundError for missing files."""
    if name not in SETS:
        raise ValueError(f"data.name={name!r}, allowed: {', '.join(SETS)}")
    masks = None
    if name in EMBEDDED:
        sets = _embedded(name, seed, {"train": train_images, "test": test_images}, rho, amplitude, swapped)
        masks = sets["test"].masks
        names = (
            [*OBJECTS]
            if name == "shapes"
            else [f"{i % 10}{' negative' * (i > 9)}" for i in range(20 if "20" in name else 10)]
        )
        targets = {s: d.targets for s, d in sets.items()}
        shape = sets["train"].images.shape
        decode: Decode = lambda split, at: sets[split].images[at]  # noqa: E731
    elif name in KNOWN:
        raw = {s: torchvision_set(name, root, train=s == "train", download=download) for s in SPLITS}
        images = {s: in_memory(d) for s, d in raw.items()}
        names, targets = [str(c) for c in raw["train"].classes], {s: labels for s, (_, labels) in images.items()}
        shape = images["train"][0].shape
        decode = lambda split, at: images[split][0][at]  # noqa: E731
    else:
        names, paths, targets = _cub200(root) if name == "cub200" else _folder(root)
        shape = (0, 3, stored_size, stored_size)
        decode = lambda split, at: _decode([paths[split][i] for i in at.tolist()], stored_size, workers)  # noqa: E731
    chosen = class_order(names, order, seed if order_seed is None else order_seed)
    groups = task_groups(len(chosen), list(tasks) if not isinstance(tasks, int) else tasks)
    position = torch.full((len(names),), -1)  # classes that the order leaves out belong to no task
    position[torch.tensor(chosen)] = torch.arange(len(chosen))
    targets = {s: position[labels] for s, labels in targets.items()}
    for split, labels in targets.items():
        counts = labels[labels >= 0].bincount(minlength=len(chosen))
        if empty := [names[chosen[c]] for c, n in enumerate(counts.tolist()) if n == 0]:
            raise ValueError(f"{name}: no {split} image of {len(empty)} classes, e.g. {', '.join(empty[:5])}")
    return Stream(groups, [names[c] for c in chosen], targets, shape[1], shape[-1], decode, masks)


def _embedded(
    name: str, seed: int, count: dict[str, int], rho: float, amplitude: float, swapped: bool
) -> dict[str, Dataset]:
    def make(split: str) -> Dataset:
        training = split == "train"
        common = {"split": split, "seed": seed, "rho": rho if training else 0.0, "swapped": swapped and not training}
        if name == "shapes":
            return objects_on_backgrounds(count[split], amplitude=amplitude, **common)
        return digits_on_backgrounds(count[split], amplitude=amplitude, inverted=name == "digits20", **common)

    return {split: make(split) for split in SPLITS}


def _cub200(root: str | None) -> tuple[list[str], dict[str, list[Path]], dict[str, Tensor]]:
    folder = data_root(root)
    folder = folder / "CUB_200_2011" if (folder / "CUB_200_2011").is_dir() else folder
    tables = {}
    for file in ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"cub200 not found: no {folder / file}. Expected CUB_200_2011/ with images/, images.txt, classes.txt, "
                "image_class_labels.txt and train_test_split.txt, as in CUB_200_2011.tgz of Caltech"
            )
        rows = (line.split(maxsplit=1) for line in (folder / file).read_text().splitlines() if line.strip())
        tables[file] = {int(i): value.strip() for i, value in rows}
    paths: dict[str, list[Path]] = {s: [] for s in SPLITS}
    labels: dict[str, list[int]] = {s: [] for s in SPLITS}
    for i, path in tables["images.txt"].items():
        split = "train" if tables["train_test_split.txt"][i] == "1" else "test"
        paths[split].append(folder / "images" / path)
        labels[split].append(int(tables["image_class_labels.txt"][i]) - 1)
    return [*tables["classes.txt"].values()], paths, {s: torch.tensor(v) for s, v in labels.items()}


def _folder(root: str | None) -> tuple[list[str], dict[str, list[Path]], dict[str, Tensor]]:
    test = "val" if (data_root(root) / "val").is_dir() else "test"
    sets = {"train": image_folder(root, "train"), "test": image_folder(root, test)}
    if sets["train"].classes != sets["test"].classes:
        different = sorted(set(sets["train"].classes) ^ set(sets["test"].classes))
        raise ValueError(f"train/ and {test}/ under {root} hold different classes: {', '.join(different[:10])}")
    paths = {s: [Path(p) for p, _ in d.samples] for s, d in sets.items()}
    return sets["train"].classes, paths, {s: torch.tensor(d.targets) for s, d in sets.items()}


def _decode(paths: Sequence[Path], size: int, workers: int) -> Tensor:
    """Images (n, 3, size, size) uint8: short side and centre."""

    def read(path: Path) -> Tensor:
        return center_crop(resize(pil_to_tensor(open_image(path)), [size], antialias=True), [size, size])

    with ThreadPoolExecutor(max(1, workers)) as pool:
        return torch.stack([*pool.map(read, paths)])
