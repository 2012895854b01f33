"""The label files of the facial-expression data sets, as people have them. Each reader returns `Labelled`.

A missing file is one error with the path looked for and the layout expected."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ap_fer.expressions import AFFECTNET, EXPRESSIONS, EXPW, FERPLUS, RAF_DB, expression, our_label
from common.data.files import ENDINGS, folders, images_below, read_lines, read_table, read_text, readable
from common.data.vision import data_root

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass
class Labelled:
    """Images of one split: paths, class ids in our order, and face boxes where images hold more than the face."""

    paths: list[Path] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)  # one per image, or none at all
    names: list[str] = field(default_factory=list)  # of own class folders; none: the expressions in our order
    left_out: int = 0  # images that broken_images=skip left out
    unusable: int = 0  # images of the list that have no label by the rules of the set

    def add(self, path: Path, target: int, *box: Box) -> None:
        self.paths.append(path)
        self.targets.append(target)
        self.boxes += box

    @property
    def listed(self) -> int:
        """How many images the list of this split names."""
        return len(self.paths) + self.left_out + self.unusable

    def only(self, kept: list[int]) -> "Labelled":
        """The images at these indices."""
        boxes = [self.boxes[i] for i in kept] if self.boxes else []
        paths, targets = [self.paths[i] for i in kept], [self.targets[i] for i in kept]
        return Labelled(paths, targets, boxes, self.names, len(self.paths) - len(kept), self.unusable)


def _need(path: Path, layout: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"not found: {path}. Expected {layout}")
    return path


def _rows(path: Path, layout: str) -> Iterator[tuple[str, list[str]]]:
    """(place for messages, fields) of the lines that are not empty."""
    for number, line in read_lines(_need(path, layout)):
        yield f"{path}, line {number}", line.split()


def _table(path: Path, layout: str, columns: set[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """(place for messages, {column: cell}) of the rows of a CSV file with a header that has `columns`."""
    (_, header), *rows = read_table(_need(path, layout)) or [(1, [])]
    if not columns <= set(header):
        raise ValueError(f"{path}: needs the columns {', '.join(sorted(columns))}, has {', '.join(header) or 'none'}")
    for number, row in rows:
        yield f"{path}, line {number}", dict(zip(header, row, strict=False))


def _integer(text: str, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{where}: {text!r} is not a whole number") from None


def _label(order: tuple[str, ...], label: int, where: str) -> int:
    try:
        return our_label(order, label)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def raf_db(root: Path, split: str, *, images: str = "aligned", **_: object) -> Labelled:
    """basic/EmoLabel/list_patition_label.txt (or train.txt and test.txt): "train_00001.jpg 5"; images in
    basic/Image/aligned (train_00001_aligned.jpg) or basic/Image/aligned_224 (train_00001.jpg)."""
    layout = (
        "RAF-DB (from its authors, on request): basic/EmoLabel/list_patition_label.txt or {train,test}.txt, and "
        f"basic/Image/{images}/"
    )
    base = next((b for b in (root / "basic", root) if (b / "EmoLabel").is_dir()), root / "basic")
    both = base / "EmoLabel/list_patition_label.txt"
    listed = both if both.is_file() else base / f"EmoLabel/{split}.txt"
    if not (base / f"Image/{images}").is_dir() and (base / "Image/aligned").is_dir():
        raise FileNotFoundError(
            f"no folder {base / f'Image/{images}'}, but Image/aligned is there: set data.images=aligned"
        )
    folder, found, labels = _need(base / f"Image/{images}", layout), Labelled(), {}
    for where, row in _rows(listed, layout):
        if len(row) != 2:
            raise ValueError(f"{where}: expected 'train_00001.jpg 5', got {' '.join(row)!r}")
        if both.is_file() and not row[0].startswith(f"{split}_"):
            continue
        if labels.setdefault(row[0], row[1]) != row[1]:
            raise ValueError(f"{where}: {row[0]} has the labels {labels[row[0]]} and {row[1]}")
        name = row[0].replace("_aligned", "")
        name = name.replace(".jpg", "_aligned.jpg") if images == "aligned" else name
        found.add(folder / name, _label(RAF_DB, _integer(row[1], where) - 1, where))
    return found


def ferplus(root: Path, split: str, **_: object) -> Labelled:
    """fer2013new.csv (FERPlus's votes) beside FER2013Train/, FER2013Valid/ and FER2013Test/ with the 48 x 48 images.

    Votes of a single annotator are noise and removed; an image without a majority among its votes, or with one for
    "unknown" or "not a face", is left out."""
    layout = "FERPlus (from its authors, on request): fer2013new.csv and FER2013{Train,Valid,Test}/fer0000000.png"
    usage, folder = {"train": ("Training", "FER2013Train"), "test": ("PrivateTest", "FER2013Test")}[split]
    _need(root / folder, layout)
    found, votes_of = Labelled(), (*FERPLUS, "unknown", "NF")
    for where, row in _table(root / "fer2013new.csv", layout, {"Usage", "Image name", *votes_of}):
        if row["Usage"] != usage:
            continue
        if not row["Image name"]:
            found.unusable += 1
            continue
        votes = [_integer(row[c], where) for c in votes_of]
        votes = [v if v > 1 else 0 for v in votes]
        best = max(range(len(votes)), key=votes.__getitem__)
        if best < len(FERPLUS) and votes[best] > sum(votes) / 2:
            found.add(root / folder / row["Image name"], our_label(FERPLUS, best))
        else:
            found.unusable += 1
    return found


def affectnet(root: Path, split: str, *, num_classes: int = 7, **_: object) -> Labelled:
    """training.csv and validation.csv (subDirectory_filePath, face_x, face_y, face_width, face_height, expression), in the root
    or in Manually_Annotated_file_lists/, with the images in Manually_Annotated_Images/, cropped to their face box; or the
    release {train_set,val_set}/images/<n>.jpg with annotations/<n>_exp.npy. Expressions 8 to 10 (none, uncertain, no face), and
    contempt with seven classes, are left out."""
    layout = (
        "AffectNet (from its authors, on request): training.csv, validation.csv (subDirectory_filePath, expression) and "
        "Manually_Annotated_Images/, or {train_set,val_set}/images and annotations"
    )
    release = root / {"train": "train_set", "test": "val_set"}[split]
    if release.is_dir():
        return _affectnet_release(release, layout, num_classes)
    name = {"train": "training.csv", "test": "validation.csv"}[split]
    listed = root / "Manually_Annotated_file_lists" / name
    folder, found = _need(root / "Manually_Annotated_Images", layout), Labelled()
    boxed = ("face_x", "face_y", "face_width", "face_height")
    for where, row in _table(
        listed if listed.is_file() else root / name, layout, {"subDirectory_filePath", "expression"}
    ):
        label = _integer(row["expression"], where)
        if not 0 <= label < num_classes:
            continue
        box: tuple[int, ...] = ()
        if set(boxed) <= row.keys():
            x, y, width, height = (_integer(row[c], where) for c in boxed)
            if width <= 0 or height <= 0:
                raise ValueError(f"{where}: the face box {x}, {y}, {width}, {height} is empty")
            box = (x, y, x + width, y + height)
        found.paths.append(folder / row["subDirectory_filePath"])
        found.targets.append(our_label(AFFECTNET, label))
        found.boxes += [box] if box else []  # type: ignore[list-item]
    return found


def _affectnet_release(folder: Path, layout: str, num_classes: int) -> Labelled:
    """images/<n>.jpg (cropped to the face) and annotations/<n>_exp.npy, a text of one number."""
    found, images = Labelled(), _need(folder / "images", layout)
    for path in sorted(images_below(images), key=lambda p: (len(p.stem), p.stem)):
        file = _need(folder / "annotations" / f"{path.stem}_exp.npy", layout)
        try:
            label = int(np.load(file, allow_pickle=False).item())
        except (ValueError, OSError) as error:
            raise ValueError(f"{file}: not the number of an expression ({error})") from error
        if 0 <= label < num_classes:
            found.add(path, our_label(AFFECTNET, label))
    return found


def expw(root: Path, split: str, *, test_share: float = 0.25, **_: object) -> Labelled:
    """label.lst ("name face_id top left right bottom confidence expression") and origin/; faces are cropped by their box.

    The published split is not known: every 1/test_share-th image name (sorted) is for testing, all its faces with it."""
    layout = "ExpW (from its authors, on request): label.lst and origin/<name>.jpg"
    if not 0 < test_share < 1:
        raise ValueError(f"data.test_share={test_share}, allowed: between 0 and 1")
    rows = list(_rows(_need(root / "label.lst", layout), layout))
    every, names = max(2, round(1 / test_share)), sorted({row[0] for _, row in rows})
    testing, found = set(names[::every]), Labelled()
    folder = _need(root / "origin", layout)
    for where, row in rows:
        if len(row) != 8:
            raise ValueError(f"{where}: expected 8 fields, got {len(row)}")
        if (row[0] in testing) == (split == "test"):
            top, left, right, bottom = (_integer(v, where) for v in row[2:6])
            if not (left < right and top < bottom):
                raise ValueError(f"{where}: the box left {left}, top {top}, right {right}, bottom {bottom} is empty")
            found.add(folder / row[0], _label(EXPW, _integer(row[7], where), where), (left, top, right, bottom))
    return found


def affwild2(root: Path, split: str, *, every: int = 1, **_: object) -> Labelled:
    """annotations/{Train_Set,Validation_Set}/<video>.txt (a header of class names, then a label per frame, -1 for none) and
    cropped_aligned/<video>/00001.jpg; every: take every so many frames. Frames without a detected face are missing."""
    layout = (
        "Aff-Wild2 (from its authors, on request): annotations/{Train_Set,Validation_Set}/<video>.txt and "
        "cropped_aligned/<video>/00001.jpg"
    )
    folder = root / "annotations" / {"train": "Train_Set", "test": "Validation_Set"}[split]
    if not (files := sorted(_need(folder, layout).glob("*.txt"))):
        raise FileNotFoundError(f"no annotation in {folder}. Expected {layout}")
    found = Labelled()
    for file in files:
        names, *labels = read_text(file).split()
        order = [expression(n) for n in names.split(",")]
        for frame, text in enumerate(labels, 1):
            label = _integer(text, f"{file}, frame {frame}")
            path = root / "cropped_aligned" / file.stem / f"{frame:05d}.jpg"
            known = 0 <= label < len(order) and order[label] is not None
            if known and (frame - 1) % every == 0 and path.is_file():
                found.add(path, order[label])  # type: ignore[arg-type]
    return found


def folder(root: Path, split: str, *, num_classes: int | None = 7, **_: object) -> Labelled:
    """{train,val}/<class>/*.jpg (SFEW: {Train,Val}/Angry/...). Class folders are matched to the expressions by name, in any
    spelling; with num_classes=None they are the classes, whatever their names."""
    names = {"train": ("train", "Train"), "test": ("val", "Val", "test", "Test")}[split]
    wanted = ", ".join(EXPRESSIONS[:num_classes]) if num_classes else "your own"
    layout = f"{names[0]}/<class>/*.jpg with the classes {wanted}"
    base = next((root / n for n in names if (root / n).is_dir()), None)
    if base is None:
        raise FileNotFoundError(f"no folder {root / names[0]} ({', '.join(names)}). Expected {layout}")
    places: dict[Path, int | None] = {p: i for i, p in enumerate(folders(base))}
    if num_classes:
        places = {p: expression(p.name) for p in places}
        wrong = sorted(p.name for p, c in places.items() if c is None or c >= num_classes)
        lacking = sorted(set(range(num_classes)) - set(places.values()))  # type: ignore[arg-type]
        if wrong or lacking:
            raise ValueError(
                f"{base}: class folders do not match: unknown {wrong}, missing {[EXPRESSIONS[c] for c in lacking]}. Expected "
                f"{layout}, or data.num_classes=null for classes of your own"
            )
    found = Labelled(names=[] if num_classes else [p.name for p in places])
    for place, target in places.items():
        images = images_below(place)
        if not images:
            raise ValueError(f"class folder {place} holds no image ({', '.join(ENDINGS)})")
        for path in images:
            found.add(path, target)  # type: ignore[arg-type]
    return found


def listed(root: Path, split: str, *, num_classes: int = 7, **_: object) -> Labelled:
    """train.csv and val.csv, "path,label" with a class name or our class id; paths relative to the root."""
    layout = "train.csv and val.csv with rows path,label"
    table, found, labels = root / {"train": "train.csv", "test": "val.csv"}[split], Labelled(), {}
    for number, row in read_table(_need(table, layout)):
        if [c.lower() for c in row[:2]] == ["path", "label"]:
            continue
        where = f"{table}, line {number}"
        if len(row) != 2:
            raise ValueError(f"{where}: expected path,label, got {len(row)} columns")
        target = int(row[1]) if row[1].isdecimal() else expression(row[1])
        if target is None or target >= num_classes:
            raise ValueError(
                f"{where}: label {row[1]!r}; allowed are {', '.join(EXPRESSIONS[:num_classes])} or 0..{num_classes - 1}"
            )
        if labels.setdefault(row[0], target) != target:
            both = " and ".join(EXPRESSIONS[c] for c in (labels[row[0]], target))
            raise ValueError(f"{where}: {row[0]} has the labels {both}")
        found.add(root / row[0], target)
    return found


READERS: dict[str, Callable[..., Labelled]] = {
    "raf_db": raf_db, "ferplus": ferplus, "affectnet": affectnet, "expw": expw, "affwild2": affwild2, "folder": folder,
    "csv": listed,
}  # fmt: skip


def read_split(name: str, root: str | Path | None, split: str, **options: object) -> Labelled:
    """Split "train" or "test" of data set `name`. Raises ValueError for a bad file or an empty split, FileNotFoundError."""
    if name not in READERS:
        raise ValueError(f"data.name={name!r}, allowed: {', '.join(READERS)}")
    found = READERS[name](data_root(root), split, **options)
    if not found.paths:
        raise ValueError(f"{name} under {root}: the {split} split names no image")
    if not found.paths[0].is_file():
        raise FileNotFoundError(f"{name}: its first {split} image is not at {found.paths[0]}")
    return found.only(readable(found.paths))
