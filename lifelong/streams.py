"""Streams of tasks with disjoint classes: embedded digits and shapes, torchvision sets, CUB-200, Omniglot, class folders.

Labels are positions in the class order: task 0 holds 0 .. s_0 - 1, and so on, in training, test and memory alike. The images
of a task are tensors, decoded when the task begins.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from common.data.batches import stream as random_stream
from common.data.dataset import Dataset
from common.data.files import identity, images_below, label, open_image, read_lines, readable, tensor_identity
from common.data.objects import OBJECTS, digits_on_backgrounds, objects_on_backgrounds
from common.data.vision import KNOWN, data_root, image_folder, in_memory, torchvision_set

EMBEDDED = {"digits20": 20, "digits10": 10, "shapes": 10}  # and their classes
SETS = (*EMBEDDED, *KNOWN, "cub200", "omniglot", "folder")
# A class is a character of an alphabet; in the root, omniglot-py/ (torchvision's) or omniglot/, as many of these as are there.
OMNIGLOT = ("images_background", "images_evaluation", "images_background_small1", "images_background_small2")
TRAINING_DRAWERS = 15  # of Omniglot's twenty; it has no split of its own within a character
SPLITS = ("train", "test")

Decode = Callable[[str, Tensor], Tensor]  # (split, indices) -> raw images


@dataclass(frozen=True)
class Stream:
    """groups: the labels of every task; class_names: in stream order (a function of a script that says `torch` and `.classes`
    cannot be sent to joblib's workers: cloudpickle takes that for torch.classes); targets: {split: (n,) labels}; channels, size:
    of an image; source: what the data is, for `Run.open`; masks: foreground of the test images (n, H, W) bool where known."""

    groups: list[slice]
    class_names: list[str]
    targets: dict[str, Tensor]
    channels: int
    size: int
    decode: Decode
    source: dict[str, Any]
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def sizes(self) -> list[int]:
        """Classes of every task."""
        return [g.stop - g.start for g in self.groups]

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

    def test_sets(self, seed: int, tasks: int) -> list[tuple[Tensor, Tensor]]:
        """Test images and labels of the first tasks, shuffled within a task: a chunk must not hold one class only."""
        sets = []
        for k in range(tasks):
            images, labels = self.task("test", k)
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(random_stream(seed, k, 4)))
            sets.append((images[order], labels[order]))
        return sets


class _Loaded(NamedTuple):
    names: list[str]
    targets: dict[str, Tensor]
    shape: tuple[int, ...]  # (.., C, H, W)
    decode: Decode
    source: dict[str, Any]
    masks: Tensor | None = None


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


def class_order(names: Sequence[str], order: str | Sequence[str], seed: int) -> list[int]:
    """The class ids in stream order. order: natural | random (drawn from seed) | a text file with one class name per line (lines
    that begin with # are comments), or the names themselves.

    A list may name fewer classes than the data has, then only these are used. ValueError for a name that is unknown or
    stands there twice, FileNotFoundError without the file."""
    if order == "natural":
        return list(range(len(names)))
    if order == "random":
        return np.random.default_rng(random_stream(seed, 1993)).permutation(len(names)).tolist()
    if isinstance(order, str):
        file = Path(order).expanduser()
        file = file if file.is_absolute() or file.is_file() else Path(__file__).parent / "configs" / order
        if not file.is_file():
            raise FileNotFoundError(f"data.order={order}: neither natural nor random, and no file {file}")
        where, listed = str(file), [line for _, line in read_lines(file) if not line.startswith("#")]
    else:
        where, listed = "the checkpoint", list(order)
    if twice := sorted({name for name in listed if listed.count(name) > 1}):
        raise ValueError(f"{where} names classes twice: {', '.join(twice[:5])}")
    number = {name: i for i, name in enumerate(names)}
    if missing := [name for name in listed if name not in number]:
        raise ValueError(
            f"{where} names {len(missing)} classes that the data does not have, e.g. {', '.join(missing[:5])}"
        )
    if not listed:
        raise ValueError(f"{where} names no class")
    return [number[name] for name in listed]


def build_stream(
    *,
    name: str,
    seed: int,
    tasks: int | Sequence[int] | None = 10,
    order: str | Sequence[str] = "natural",
    order_seed: int | None = None,
    root: str | None = None,
    download: bool = False,
    workers: int = 4,
    train_images: int = 2000,
    test_images: int = 1000,
    per_class: int | None = None,
    rho: float = 0.0,
    amplitude: float = 0.5,
    swapped: bool = False,
    stored_size: int = 256,
    splits: Sequence[str] = SPLITS,
) -> Stream:
    """A stream by name; see `task_groups` and `class_order` for tasks and order (order_seed null: the run's seed).

    digits20: scikit-learn's digits and their negatives, 8x8, on sine textures; digits10: without the negatives; shapes: ten
    geometric shapes, 16x16, the same textures. train_images, test_images, rho (training images whose texture tells the
    class), amplitude, swapped (test textures of the next class): see common.data.objects. They show reliance on
    backgrounds and forgetting, with known foreground; they cannot show accuracy on photographs.
    mnist, fashion_mnist, cifar10, cifar100: `root` in torchvision's layout. cub200: root/CUB_200_2011/images.txt, ....
    omniglot: the folders of `OMNIGLOT`; tasks null: an alphabet each.
    folder: root/train/<class>/ and root/val/<class>/ (or test/). The last three are decoded per task by `workers` threads, short
    side and centre `stored_size` pixels. per_class: at most so many training images of a class, the first; null: all.
    splits: those that are needed. ValueError for an unknown name, a root for an embedded set, or classes that do not fit,
    FileNotFoundError for missing files."""
    _check_request(name, root, tasks, order, per_class, stored_size)
    if name in EMBEDDED:
        made = _embedded(name, seed, {"train": train_images, "test": test_images}, rho, amplitude, swapped)
    elif name in KNOWN:
        made = _torchvision(name, root, download, splits)
    else:
        made = _files(name, root, stored_size, workers, splits)
    names = made.names
    chosen = class_order(names, order, seed if order_seed is None else order_seed)
    groups = task_groups(len(chosen), _alphabets(names) if tasks is None else tasks)
    position = torch.full((len(names),), -1)  # classes that the order leaves out belong to no task
    position[torch.tensor(chosen)] = torch.arange(len(chosen))
    targets = {s: position[made.targets[s]] for s in splits}
    if per_class is not None and "train" in targets:
        targets["train"] = _first_of_each_class(targets["train"], per_class)
    for split, labels in targets.items():
        counts = labels[labels >= 0].bincount(minlength=len(chosen))
        if empty := [names[chosen[c]] for c, n in enumerate(counts.tolist()) if n == 0]:
            raise ValueError(f"{name}: no {split} image of {len(empty)} classes, e.g. {', '.join(empty[:5])}")
    return Stream(
        groups,
        [names[c] for c in chosen],
        targets,
        made.shape[-3],
        made.shape[-1],
        made.decode,
        made.source,
        made.masks,
    )


def _check_request(name: str, root: Any, tasks: Any, order: Any, per_class: int | None, stored_size: int) -> None:
    """What can be refused before anything is read."""
    if name not in SETS:
        raise ValueError(f"data.name={name!r}, allowed: {', '.join(SETS)}")
    if name in EMBEDDED and root:
        raise ValueError(
            f"data.root={root}: {name} is embedded; name the set at the root, e.g. data=mnist or data=folder"
        )
    if (per_class is not None and per_class < 1) or stored_size < 1:
        raise ValueError(f"data.per_class={per_class}, data.stored_size={stored_size}, allowed: >= 1 (or null)")
    if tasks is None and (name != "omniglot" or order != "natural"):
        raise ValueError(
            f"data.tasks=null with data={name}, data.order={order}: give a number of tasks or a list of sizes (null is one "
            "alphabet per task, for omniglot in its natural order)"
        )
    classes = EMBEDDED.get(name) or (KNOWN[name].classes if name in KNOWN else None)
    if classes and tasks is not None and order in ("natural", "random"):
        task_groups(classes, tasks)


def _alphabets(names: Sequence[str]) -> list[int]:
    """Characters of every alphabet; natural order keeps an alphabet together."""
    return list(Counter(name.partition("/")[0] for name in names).values())


def _first_of_each_class(labels: Tensor, count: int) -> Tensor:
    """Labels with -1 in place of all but the first `count` of every class."""
    kept = torch.full_like(labels, -1)
    for c in labels.unique().tolist():
        if c >= 0:
            at = torch.nonzero(labels == c).flatten()[:count]
            kept[at] = c
    return kept


def _embedded(name: str, seed: int, count: dict[str, int], rho: float, amplitude: float, swapped: bool) -> _Loaded:
    def make(split: str) -> Dataset:
        training = split == "train"
        common = {"split": split, "seed": seed, "rho": rho if training else 0.0, "swapped": swapped and not training}
        if name == "shapes":
            return objects_on_backgrounds(count[split], amplitude=amplitude, **common)
        return digits_on_backgrounds(count[split], amplitude=amplitude, inverted=name == "digits20", **common)

    sets = {split: make(split) for split in SPLITS}
    names = [*OBJECTS] if name == "shapes" else [f"{i % 10}{' negative' * (i > 9)}" for i in range(EMBEDDED[name])]
    targets = {s: d.targets for s, d in sets.items()}
    shape = tuple(sets["train"].images.shape)
    return _Loaded(names, targets, shape, lambda split, at: sets[split].images[at], identity(name), sets["test"].masks)


def _torchvision(name: str, root: str | None, download: bool, splits: Sequence[str]) -> _Loaded:
    raw = {s: torchvision_set(name, root, train=s == "train", download=download) for s in splits}
    images = {s: in_memory(d) for s, d in raw.items()}
    first = next(iter(images.values()))[0]
    names = [_digit(c) if name == "mnist" else str(c) for c in next(iter(raw.values())).classes]
    source = {"kind": name, **{s: tensor_identity(name, x, y)["sha"] for s, (x, y) in images.items()}}
    targets = {s: y for s, (_, y) in images.items()}
    return _Loaded(names, targets, tuple(first.shape), lambda split, at: images[split][0][at], source)


def _digit(name: str) -> str:
    return str(name).partition(" ")[0]  # torchvision calls them '0 - zero'


def stored(image: Image, size: int, channels: int = 3) -> Tensor:
    """An RGB image as (channels, size, size) uint8: short side and centre. For training, testing and predicting alike."""
    pixels = pil_to_tensor(image if channels == 3 else image.convert("L"))  # L keeps a grey pixel as it is
    return center_crop(resize(pixels, [size], antialias=True), [size, size])


def _files(name: str, root: str | None, size: int, workers: int, splits: Sequence[str]) -> _Loaded:
    names, paths, targets = files_of(name, root, splits)
    channels = 1 if name == "omniglot" else 3

    def decode(split: str, at: Tensor) -> Tensor:
        with ThreadPoolExecutor(max(1, workers)) as pool:
            return torch.stack([*pool.map(lambda i: stored(open_image(paths[split][i]), size, channels), at.tolist())])

    source = identity(name, [p for s in splits for p in paths[s]], root=root, classes=len(names))
    return _Loaded(names, targets, (channels, size, size), decode, source)


def files_of(
    name: str, root: str | None, splits: Sequence[str]
) -> tuple[list[str], dict[str, list[Path]], dict[str, Tensor]]:
    """(class names, files by split, labels by split) of cub200, omniglot or one's own class folders."""
    if name == "omniglot":
        return _omniglot(root)
    return _cub200(root) if name == "cub200" else _folder(root, splits)


def _numbered(file: Path) -> dict[int, tuple[str, str]]:
    """{id: (value, 'file, line')} of a CUB list, "<id> <value>" per line."""
    rows: dict[int, tuple[str, str]] = {}
    for n, line in read_lines(file):
        number, _, value = line.replace("\t", " ").partition(" ")
        where = f"{file}, line {n}"
        if (i := label(number, where)) in rows or not value.strip():
            raise ValueError(f"{where}: {f'id {i} stands there twice' if i in rows else 'no value after the id'}")
        rows[i] = (value.strip(), where)
    return rows


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
        tables[file] = _numbered(folder / file)
    images, labelled, split_of, names = (
        tables[f] for f in ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
    )
    for file in ("image_class_labels.txt", "train_test_split.txt"):
        if odd := sorted(set(images) ^ set(tables[file])):
            raise ValueError(f"{folder}: images.txt and {file} do not list the same images, e.g. id {odd[0]}")
    if sorted(names) != list(range(1, len(names) + 1)):
        raise ValueError(f"{folder / 'classes.txt'}: the ids must be 1..{len(names)}")
    paths: dict[str, list[Path]] = {s: [] for s in SPLITS}
    labels: dict[str, list[int]] = {s: [] for s in SPLITS}
    for i, (path, where) in images.items():
        (kind, at), (c, of) = split_of[i], labelled[i]
        if kind not in ("0", "1"):
            raise ValueError(f"{at}: {kind!r}, expected 1 (training) or 0 (test)")
        if label(c, of, classes=len(names) + 1) == 0:
            raise ValueError(f"{of}: label 0, the labels of CUB-200 begin with 1")
        if not (folder / "images" / path).is_file():
            raise FileNotFoundError(f"{where}: no image {folder / 'images' / path}")
        split = "train" if kind == "1" else "test"
        paths[split].append(folder / "images" / path)
        labels[split].append(int(c) - 1)
    for s, found in paths.items():
        kept = readable(found)
        paths[s], labels[s] = [found[i] for i in kept], [labels[s][i] for i in kept]
    return [names[i][0] for i in sorted(names)], paths, {s: torch.tensor(v) for s, v in labels.items()}


def _omniglot(root: str | None) -> tuple[list[str], dict[str, list[Path]], dict[str, Tensor]]:
    places = [data_root(root) / inner / part for inner in ("omniglot-py", "omniglot", "") for part in OMNIGLOT]
    # The small sets share Greek and Latin: the first folder that holds a character counts.
    characters: dict[str, Path] = {}
    for place in places:
        for folder in sorted(place.glob("*/character*")) if place.is_dir() else ():
            characters.setdefault(f"{folder.parent.name}/{folder.name}", folder)
    if not characters:
        raise FileNotFoundError(
            f"omniglot not found under {root}: expected images_background/<alphabet>/character01/0709_01.png, ... (also "
            "images_evaluation, images_background_small1, images_background_small2), in the root or in omniglot-py/"
        )
    names = sorted(characters)
    paths: dict[str, list[Path]] = {s: [] for s in SPLITS}
    labels: dict[str, list[int]] = {s: [] for s in SPLITS}
    drawn = [images_below(characters[name]) for name in names]
    if not all(drawn):
        raise ValueError(f"{characters[names[drawn.index([])]]} holds no drawing")
    files = [(c, path) for c, found in enumerate(drawn) for path in found]
    for i in readable([path for _, path in files]):
        c, path = files[i]
        drawer = path.stem.rpartition("_")[2]
        if not (drawer.isdecimal() and 1 <= int(drawer) <= 20):
            raise ValueError(f"{path}: the name of a drawing ends in its drawer, _01 to _20")
        split = "train" if int(drawer) <= TRAINING_DRAWERS else "test"
        paths[split].append(path)
        labels[split].append(c)
    return names, paths, {s: torch.tensor(v) for s, v in labels.items()}


def _folder(root: str | None, splits: Sequence[str]) -> tuple[list[str], dict[str, list[Path]], dict[str, Tensor]]:
    test = "val" if (data_root(root) / "val").is_dir() else "test"
    sets = {s: image_folder(root, "train" if s == "train" else test) for s in splits}
    first = next(iter(sets.values())).classes
    for found in sets.values():
        if found.classes != first:
            different = sorted(set(found.classes) ^ set(first))
            raise ValueError(f"train/ and {test}/ under {root} hold different classes: {', '.join(different[:10])}")
    paths = {s: [Path(p) for p, _ in d.samples] for s, d in sets.items()}
    return first, paths, {s: torch.tensor(d.targets) for s, d in sets.items()}
