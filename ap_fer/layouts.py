"""The label files of the facial-expression data sets, as people have them (section 6). Each reader returns `Labelled`.

A missing file is one error with the path looked for and the layout expected."""

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from ap_fer.expressions import AFFECTNET, EXPRESSIONS, EXPW, FERPLUS, RAF_DB, expression, our_label
from common.data.vision import data_root

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass
class Labelled:
    """Images of one split: paths, class ids in our order, and face boxes where images hold more than the face."""

    paths: list[Path] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)  # one per image, or none at all

    def add(self, path: Path, target: int, *box: Box) -> None:
        self.paths.append(path)
        self.targets.append(target)
        self.boxes += box


def _need(path: Path, layout: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"not found: {path}. Expected {layout}")
    return path


def _rows(path: Path, layout: str) -> Iterator[tuple[str, list[str]]]:
    """(place for messages, fields) of the lines that are not empty."""
    for number, line in enumerate(_need(path, layout).read_text(encoding="utf-8-sig").splitlines(), 1):
        if line.strip():
            yield f"{path}, line {number}", line.split()


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
    folder, found = _need(base / f"Image/{images}", layout), Labelled()
    for where, row in _rows(listed, layout):
        if len(row) != 2:
            raise ValueError(f"{where}: expected 'train_00001.jpg 5', got {' '.join(row)!r}")
        if both.is_file() and not row[0].startswith(f"{split}_"):
            continue
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
    found = Labelled()
    _need(root / folder, layout)
    with _need(root / "fer2013new.csv", layout).open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            if row.get("Usage") is None or "Image name" not in row:
                raise ValueError(
                    f"{root / 'fer2013new.csv'}: needs the columns Usage, Image name, {', '.join(FERPLUS)}"
                )
            if row["Usage"] != usage or not row["Image name"].strip():
                continue
            where = f"{root / 'fer2013new.csv'}, line {number}"
            votes = [_integer(row[c], where) for c in (*FERPLUS, "unknown", "NF")]
            votes = [v if v > 1 else 0 for v in votes]
            best = max(range(len(votes)), key=votes.__getitem__)
            if best < len(FERPLUS) and votes[best] > sum(votes) / 2:
                found.add(root / folder / row["Image name"].strip(), our_label(FERPLUS, best))
    return found


def affectnet(root: Path, split: str, *, num_classes: int = 7, **_: object) -> Labelled:
    """training.csv and validation.csv (subDirectory_filePath, ..., expression), images in Manually_Annotated_Images/.
    Expressions 8 to 10 (none, uncertain, no face), and contempt with seven classes, are left out."""
    layout = (
        "AffectNet (from its authors, on request): training.csv, validation.csv (subDirectory_filePath, expression) and "
        "Manually_Annotated_Images/"
    )
    table, found = root / {"train": "training.csv", "test": "validation.csv"}[split], Labelled()
    folder = _need(root / "Manually_Annotated_Images", layout)
    with _need(table, layout).open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            if not {"subDirectory_filePath", "expression"} <= row.keys():
                raise ValueError(f"{table}: needs the columns subDirectory_filePath and expression, has {list(row)}")
            label = _integer(row["expression"], f"{table}, line {number}")
            if 0 <= label < num_classes:
                found.add(folder / row["subDirectory_filePath"], our_label(AFFECTNET, label))
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
        names, *labels = file.read_text().split()
        order = [expression(n) for n in names.split(",")]
        for frame, text in enumerate(labels, 1):
            label = _integer(text, f"{file}, frame {frame}")
            path = root / "cropped_aligned" / file.stem / f"{frame:05d}.jpg"
            known = 0 <= label < len(order) and order[label] is not None
            if known and (frame - 1) % every == 0 and path.is_file():
                found.add(path, order[label])  # type: ignore[arg-type]
    return found


def folder(root: Path, split: str, *, num_classes: int = 7, **_: object) -> Labelled:
    """{train,val}/<class>/*.jpg (SFEW: {Train,Val}/Angry/...). Class folders are matched by name, in any spelling."""
    names = {"train": ("train", "Train"), "test": ("val", "Val", "test", "Test")}[split]
    layout = f"{names[0]}/<class>/*.jpg with the classes {', '.join(EXPRESSIONS[:num_classes])}"
    base = next((root / n for n in names if (root / n).is_dir()), None)
    if base is None:
        raise FileNotFoundError(f"no folder {root / names[0]} ({', '.join(names)}). Expected {layout}")
    places = {p: expression(p.name) for p in sorted(base.iterdir()) if p.is_dir()}
    wrong = sorted(p.name for p, c in places.items() if c is None or c >= num_classes)
    lacking = sorted(set(range(num_classes)) - set(places.values()))  # type: ignore[arg-type]
    if wrong or lacking:
        raise ValueError(
            f"{base}: class folders do not match: unknown {wrong}, missing {[EXPRESSIONS[c] for c in lacking]}. Expected {layout}"
        )
    found = Labelled()
    for place, target in places.items():
        images = sorted(p for p in place.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
        if not images:
            raise ValueError(f"class folder {place} holds no image ({', '.join(IMG_EXTENSIONS)})")
        for path in images:
            found.add(path, target)  # type: ignore[arg-type]
    return found


def listed(root: Path, split: str, *, num_classes: int = 7, **_: object) -> Labelled:
    """train.csv and val.csv, "path,label" with a class name or our class id; paths relative to the root."""
    layout = "train.csv and val.csv with rows path,label"
    table, found = root / {"train": "train.csv", "test": "val.csv"}[split], Labelled()
    with _need(table, layout).open(newline="") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if not row or (number == 1 and row[:2] == ["path", "label"]):
                continue
            where = f"{table}, line {number}"
            if len(row) != 2:
                raise ValueError(f"{where}: expected path,label, got {len(row)} columns")
            text = row[1].strip()
            target = int(text) if text.isdecimal() else expression(text)
            if target is None or target >= num_classes:
                raise ValueError(
                    f"{where}: label {text!r}; allowed are {', '.join(EXPRESSIONS[:num_classes])} or 0..{num_classes - 1}"
                )
            found.add(root / row[0].strip(), target)
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
    return found
