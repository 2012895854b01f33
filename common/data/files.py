"""Files as people have them: images by place, decoded by what they hold; lists of any editor; the identity of a set.

What is hidden is no data anywhere: names that begin with a dot (.DS_Store, ._photo.png, .ipynb_checkpoints) and Thumbs.db.
"""

import csv
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

ENDINGS = (*IMG_EXTENSIONS, ".jp2", ".avif", ".gif")
ORIENTATION = 0x0112  # the EXIF tag


def hidden(path: str | Path) -> bool:
    """Whether a file or folder is an editor's or a system's and not the user's."""
    name = Path(path).name
    return name.startswith(".") or name in ("Thumbs.db", "desktop.ini", "__MACOSX")


def folders(path: Path) -> list[Path]:
    """The folders in a folder that are not hidden, by name."""
    return sorted(p for p in path.iterdir() if p.is_dir() and not hidden(p))


def is_image(path: Path) -> bool:
    """By its ending, in either case."""
    return path.suffix.lower() in ENDINGS and not hidden(path)


def images_below(folder: Path) -> list[Path]:
    """Every image below a folder, by path; links are followed, hidden folders are not."""
    found = []
    for place, inside, names in os.walk(folder, followlinks=True):
        inside[:] = sorted(n for n in inside if not hidden(n))
        found += [Path(place) / n for n in names if is_image(Path(n))]
    return sorted(found)


def find_images(images: Any) -> list[Path]:
    """The images of `images=`: a file, a folder (searched with what is below it), or a list of both.

    A file that is named is taken whatever its ending, in a list as well, unless it is hidden or no image by its ending in a list
    of several. FileNotFoundError for a place that is not there, ValueError where none is left."""
    if images is None or images == "":
        raise ValueError("images= is not set: give an image, a folder, or a list [a.jpg,folder]")
    places = [images] if isinstance(images, str | Path) else [str(p) for p in images]
    found: list[Path] = []
    for place in places:
        path = Path(place).expanduser()
        if path.is_dir():
            found += images_below(path)
        elif not path.exists():
            raise FileNotFoundError(f"no file or folder {path} (images={place})")
        elif len(places) == 1 or is_image(path):
            found.append(path)
    if not found:
        raise ValueError(f"no image in {', '.join(map(str, places))}; looked for {', '.join(ENDINGS)}")
    return list(dict.fromkeys(found))


def open_image(path: str | Path, *, upright: bool = True) -> Image.Image:
    """Decodes one image as 8-bit RGB, whatever its depth, mode or container.

    16-bit, 32-bit and float images are scaled to 0..255 by the range of their type (float by 0..1, refused outside), never cut
    off. Transparency is dropped as it is stored. upright: turn it by its EXIF orientation; False where annotations are in stored
    coordinates. Raises FileNotFoundError or ValueError, both naming the path."""
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                image = _eight_bits(image, path)
            turned = ImageOps.exif_transpose(image) if upright else image
            return turned.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"no image {path}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"cannot decode image {path}: {error}") from error


def _eight_bits(image: Image.Image, path: str | Path) -> Image.Image:
    values, orientation = np.asarray(image), image.getexif().get(ORIENTATION)
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError(f"{path}: a float image with values outside 0..1; convert it to 8 or 16 bits first")
        scaled = values * 255.0
    else:  # mode I is how Pillow opens many 16-bit PNG and TIFF files
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"{path}: a 32-bit image; convert it to 8 or 16 bits first")
        scaled = values / 257.0
    grey = Image.fromarray(np.round(scaled).astype(np.uint8))
    if orientation:
        grey.getexif()[ORIENTATION] = orientation
    return grey


# ------------------------------------------------------------------------------------------------------ broken images
BROKEN = ("stop", "skip")
_broken = "stop"


@contextmanager
def on_broken(what: str) -> Iterator[None]:
    """The switch `broken_images=` of the scripts, while the context lasts. stop: an image that cannot be decoded ends the run,
    named. skip: the readers of data sets decode every image once and leave those out (`readable`). ValueError for another
    word."""
    global _broken
    if what not in BROKEN:
        raise ValueError(f"broken_images={what}, allowed: {', '.join(BROKEN)}")
    before, _broken = _broken, what
    try:
        yield
    finally:
        _broken = before


def readable(images: Sequence[Any], read: Callable[[Any], Any] = open_image) -> list[int]:
    """Indices of `images` (paths, or what `read` takes) to use: all of them with broken_images=stop; with skip those that `read`
    decodes, and the others are listed on the error stream. Decided before the first batch, so that splits, batches, every rank
    and a resumed run see the same set. ValueError if nothing is left."""
    if _broken == "stop":
        return list(range(len(images)))

    def error(image: Any) -> str:
        try:
            read(image)
        except (OSError, ValueError) as error:
            return str(error)
        return ""

    with ThreadPoolExecutor() as pool:
        looked = pool.map(error, images)
        quiet = True if len(images) < 2000 else None
        errors = list(tqdm(looked, total=len(images), desc="reading every image once", leave=False, disable=quiet))
    good = [i for i, error in enumerate(errors) if not error]
    for line in filter(None, errors):
        print(f"left out: {line}", file=sys.stderr)
    if len(good) < len(images):
        print(f"broken_images=skip: {len(images) - len(good)} of {len(images)} images left out", file=sys.stderr)
    if images and not good:
        raise ValueError(f"broken_images=skip: none of {len(images)} images can be decoded, e.g. {errors[0]}")
    return good


# -------------------------------------------------------------------------------------------------------------- text
def read_text(path: str | Path) -> str:
    """The text of a list or table in UTF-8, with or without a byte order mark, with any line ends.

    FileNotFoundError, or ValueError naming the file for another encoding."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    raw = path.read_bytes()
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in raw[:200]:
        raise ValueError(f"{path} is UTF-16 text (or no text); save it as UTF-8")
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text (Latin-1?); save it as UTF-8") from error


def read_lines(path: str | Path) -> list[tuple[int, str]]:
    """(line number, text without blanks around it) of every line that is not empty."""
    return [(n, line.strip()) for n, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]


def read_table(path: str | Path) -> list[tuple[int, list[str]]]:
    """(line number, cells without blanks around them) of every row of a CSV file; separated by comma, semicolon or tab."""
    text = read_text(path)
    first = text.split("\n", 1)[0]
    separator = max((",", ";", "\t"), key=first.count)
    reader = csv.reader(text.split("\n"), delimiter=separator)
    return [(reader.line_num, [c.strip() for c in row]) for row in reader if any(c.strip() for c in row)]


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. ValueError naming file, line and column for another text."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from error


def number(text: Any, where: str, *, low: float | None = None, high: float | None = None) -> float:
    """A finite number from a cell of a list. where: file and line for the message. ValueError for anything else, 3,5 included."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = float("nan")
    if not np.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
        allowed = "a finite number" if low is None and high is None else f"a number from {low} to {high}"
        raise ValueError(f"{where}: {text!r} is not {allowed}")
    return value


def label(text: Any, where: str, *, classes: int | None = None) -> int:
    """A class index from a cell of a list. ValueError for anything but a whole number >= 0 (and < classes)."""
    shown = str(text).strip()
    if not shown.isdecimal() or (classes is not None and int(shown) >= classes):
        allowed = "a whole number >= 0" if classes is None else f"0 .. {classes - 1}"
        raise ValueError(f"{where}: label {text!r}, expected {allowed}")
    return int(shown)


# ---------------------------------------------------------------------------------------------------------- identity
def identity(
    kind: str, paths: Iterable[str | Path] | None = None, *, root: str | Path | None = None, **more: Any
) -> dict:
    """What a set is, whatever folder it lies in: {kind, images, sha, ...}. Goes into `Run.open(data=...)`.

    paths: all files of the set; their names below `root` and the sizes of about a thousand of them are hashed, in seconds for a
    million. more: further plain facts, e.g. classes=10, or left_out=3 (0 is not said)."""
    more = {k: v for k, v in more.items() if k != "left_out" or v}
    if paths is None:
        return {"kind": kind, **more}
    found = [Path(p) for p in paths]
    digest, step = hashlib.sha256(), max(1, len(found) // 1000)
    base = Path(root).expanduser() if root is not None else None
    for i, path in enumerate(found):
        name = path.relative_to(base) if base is not None and path.is_relative_to(base) else Path(path.name)
        size = path.stat().st_size if i % step == 0 and path.is_file() else ""
        digest.update(f"{name.as_posix()}\0{size}\n".encode())
    return {"kind": kind, "images": len(found), "sha": digest.hexdigest()[:16], **more}


def tensor_identity(kind: str, images: Tensor, targets: Tensor, **more: Any) -> dict:
    """`identity` of images held in memory that came from files: (n, ...) and their targets."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    for part in (images[:: max(1, len(images) // 64)], targets):
        digest.update(part.contiguous().cpu().numpy().tobytes())
    return {"kind": kind, "images": len(images), "sha": digest.hexdigest()[:16], **more}


# ---------------------------------------------------------------------------------------------------------- predicting
class _Decoded(Dataset):
    def __init__(self, paths: Sequence[Path], transform: Callable[[Image.Image], Any]):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Path, Any, str]:
        try:
            image = open_image(self.paths[i])
            image.filename = str(self.paths[i])  # type: ignore[attr-defined]  # for a transform that looks up the file
            return self.paths[i], self.transform(image), ""
        except (OSError, ValueError) as error:
            return self.paths[i], None, str(error)


class ImageStream:
    """Images of files in batches, in order, with no more than a few batches in memory:

        stream = ImageStream(paths, transform, batch_size=64)
        for paths, batch in stream: ...            # batch: (b, C, H, W), or a list where the sizes differ
        stream.finish()

    A file that cannot be decoded is left out and remembered; `finish` lists those and raises SystemExit(1) if there are any."""

    def __init__(
        self, paths: Sequence[Path], transform: Callable[[Image.Image], Any], *, batch_size: int = 64, workers: int = 0
    ):
        self.broken: list[str] = []
        self.done = 0
        self.loader = DataLoader(
            _Decoded(paths, transform),
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=list,  # type: ignore[arg-type]
        )

    def __iter__(self) -> Iterator[tuple[list[Path], Any]]:
        for items in self.loader:
            good = [(path, value) for path, value, error in items if not error]
            self.broken += [error for _, _, error in items if error]
            if not good:
                continue
            paths, values = [p for p, _ in good], [v for _, v in good]
            self.done += len(paths)
            same = all(isinstance(v, Tensor) and v.shape == values[0].shape for v in values)
            yield paths, torch.stack(values) if same else values

    def finish(self) -> None:
        for line in self.broken:
            print(f"left out: {line}", file=sys.stderr)
        if self.broken:
            print(
                f"error: {len(self.broken)} of {self.done + len(self.broken)} files could not be read", file=sys.stderr
            )
            raise SystemExit(1)


def output_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A name without ending for the output of every input, no two equal: the path below the folder that all share, with its
    separators as '__'; equal names that differ in their ending keep it."""
    if not paths:
        return {}
    full = [p.absolute() for p in paths]
    base = Path(os.path.commonpath([p.parent for p in full]))
    names = ["__".join(p.relative_to(base).with_suffix("").parts) for p in full]
    taken: dict[str, int] = {}
    for name in names:
        taken[name] = taken.get(name, 0) + 1
    unique, seen = {}, set()
    for path, where, name in zip(paths, full, names, strict=True):
        if taken[name] > 1:
            name = f"{name}{where.suffix.replace('.', '_')}"
        while name in seen:
            name += "_"
        seen.add(name)
        unique[path] = name
    return unique


class Table:
    """A CSV or JSON (by the ending of `out`) of one row per result, written as the rows come and moved into place at the end.

        with Table(cfg.out) as table: table.write({"path": ..., "label": ..., "probability": ...})

    CSV takes its columns from the first row. ValueError for another ending."""

    def __init__(self, out: str | Path):
        self.out = Path(out).expanduser()
        if self.out.suffix not in (".csv", ".json"):
            raise ValueError(f"out={out}: give a name that ends in .csv or .json")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.beside = self.out.with_name(f".{self.out.name}.tmp")
        self.rows = 0

    def __enter__(self) -> "Table":
        self.file = self.beside.open("w", newline="", encoding="utf-8")
        return self

    def write(self, row: Mapping[str, Any]) -> None:
        if self.out.suffix == ".json":
            self.file.write(("[\n" if self.rows == 0 else ",\n") + json.dumps({k: _plain(v) for k, v in row.items()}))
        else:
            if self.rows == 0:
                self.writer = csv.DictWriter(self.file, list(row), lineterminator="\n")
                self.writer.writeheader()
            self.writer.writerow(row)
        self.rows += 1

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.out.suffix == ".json":
            self.file.write("\n]\n" if self.rows else "[]\n")
        self.file.close()
        if error is None or isinstance(error, SystemExit):
            os.replace(self.beside, self.out)
        else:
            self.beside.unlink(missing_ok=True)


def ranked(path: Path, probabilities: Tensor, classes: Sequence[str], top: int) -> list[dict[str, Any]]:
    """Rows {path, label, probability} of the `top` most probable classes of an image, best first; probabilities (classes,)."""
    best = probabilities.topk(top)
    found = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [{"path": path, "label": classes[label], "probability": f"{p:.6f}"} for p, label in found]


def write_ranked(
    stream: "ImageStream", logits: Callable[[Tensor], Tensor], out: str | Path, classes: Sequence[str], top: int
) -> Table:
    """A table of the `ranked` rows of every image; logits: images (B, C, H, W) -> (B, classes)."""
    with Table(out) as table:
        for files, images in stream:
            for path, p in zip(files, logits(images).float().softmax(-1).cpu(), strict=True):
                for row in ranked(path, p, classes, top):
                    table.write(row)
    return table


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, int | float | str | list | dict) else str(value)
