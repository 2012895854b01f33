"""Image quality data sets in the layouts in which people have them: LIVE, CSIQ, KADID-10k, TID2013, KonIQ-10k, or a
csv.

MOS are mapped to 0..10, larger = better. Sets are found by their files; an error names the path and the layout
expected."""

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.io
import torch

from common.data.vision import data_root
from iqa_attack.photos import QualitySet

LIVE_LARGEST = 114.4147  # the code's scale of LIVE: larger = better, 0..114.4147
LIVE_TYPES = (("jp2k", 227), ("jpeg", 233), ("wn", 174), ("gblur", 174), ("fastfading", 174))
CSIQ_NAMES = {  # type in the list: (folder, name in the file)
    "noise": ("awgn", "AWGN"), "awgn": ("awgn", "AWGN"), "blur": ("blur", "BLUR"), "contrast": ("contrast", "contrast"),
    "fnoise": ("fnoise", "fnoise"), "jpeg": ("jpeg", "JPEG"),
    "jpeg 2000": ("jpeg2000", "jpeg2000"), "jpeg2000": ("jpeg2000", "jpeg2000"),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One image: path, mos as the set has it, its standard deviation, the name of its content."""

    path: Path
    mos: float
    std: float
    content: str


def _csv(path: Path, needed: tuple[str, ...]) -> Iterator[dict[str, str]]:
    with path.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            row = {str(k).strip(): str(v).strip() for k, v in row.items()}
            if missing := [n for n in needed if n not in row]:
                raise ValueError(f"{path}, line {number}: no column {', '.join(missing)}; it has {', '.join(row)}")
            yield row


def _live(root: Path) -> list[Row]:
    """databaserelease2/: dmos.mat (dmos, orgs), refnames_all.mat, <type>/img<i>.bmp. The undistorted copies are left
    out."""
    base = root / "databaserelease2" if (root / "databaserelease2").is_dir() else root
    data, names = scipy.io.loadmat(base / "dmos.mat"), scipy.io.loadmat(base / "refnames_all.mat")
    dmos, originals = np.ravel(data["dmos"]), np.ravel(data["orgs"]).astype(bool)
    contents = [str(np.ravel(n)[0]) for n in np.ravel(names["refnames_all"])]
    files = [base / kind / f"img{i}.bmp" for kind, n in LIVE_TYPES for i in range(1, n + 1)]
    if not len(dmos) == len(originals) == len(contents) == len(files):
        raise ValueError(f"{base}: {len(dmos)} DMOS and {len(contents)} names, LIVE has {len(files)}")
    rows = zip(files, dmos, originals, contents, strict=True)
    return [Row(f, LIVE_LARGEST - d, 1.0, c) for f, d, original, c in rows if not original]


def _csiq(root: Path) -> list[Row]:
    """csiq.DMOS.csv (image, dst_type, dst_lev, dmos_std, dmos), dst_imgs/<type>/<image>.<TYPE>.<level>.png."""
    rows = []
    for row in _csv(root / "csiq.DMOS.csv", ("image", "dst_type", "dst_lev", "dmos")):
        if row["dst_type"].lower() not in CSIQ_NAMES:
            raise ValueError(
                f"{root / 'csiq.DMOS.csv'}: distortion {row['dst_type']!r}, allowed: {', '.join(CSIQ_NAMES)}"
            )
        folder, name = CSIQ_NAMES[row["dst_type"].lower()]
        path = root / "dst_imgs" / folder / f"{row['image']}.{name}.{row['dst_lev']}.png"
        rows.append(Row(path, 1 - float(row["dmos"]), float(row.get("dmos_std") or 0.1), row["image"]))
    return rows


def _kadid(root: Path) -> list[Row]:
    """dmos.csv (dist_img, ref_img, dmos, var), images/. The column is called dmos, but larger is better."""
    rows = _csv(root / "dmos.csv", ("dist_img", "ref_img", "dmos", "var"))
    return [Row(root / "images" / r["dist_img"], float(r["dmos"]), float(r["var"]) ** 0.5, r["ref_img"]) for r in rows]


def _tid(root: Path) -> list[Row]:
    """mos_with_names.txt ("mos name" per line), mos_std.txt, distorted_images/. The first part of a name is its
    content."""
    lines = [line.split() for line in (root / "mos_with_names.txt").read_text().splitlines() if line.strip()]
    std = root / "mos_std.txt"
    deviations = [float(v) for v in std.read_text().split()] if std.is_file() else [0.1] * len(lines)
    names = {
        p.name.lower(): p for p in (root / "distorted_images").iterdir()
    }  # the case of names differs between systems
    rows = zip(lines, deviations, strict=True)
    return [
        Row(names.get(n.lower(), root / "distorted_images" / n), float(m), s, n.split("_")[0].lower())
        for (m, n), s in rows
    ]


def _koniq(root: Path) -> list[Row]:
    """koniq10k_scores_and_distributions.csv (image_name, MOS, SD), images in 512x384/ or 1024x768/; every image its
    own content."""
    folder = next((root / d for d in ("512x384", "1024x768") if (root / d).is_dir()), root / "1024x768")
    rows = _csv(root / "koniq10k_scores_and_distributions.csv", ("image_name", "MOS", "SD"))
    return [Row(folder / r["image_name"], float(r["MOS"]), float(r["SD"]), r["image_name"]) for r in rows]


def _list(root: Path) -> list[Row]:
    """labels.csv (path, mos, optionally std and content), images below the folder."""
    rows = _csv(root / "labels.csv", ("path", "mos"))
    return [
        Row(root / r["path"], float(r["mos"]), float(r.get("std") or 0.5), r.get("content") or r["path"]) for r in rows
    ]


@dataclass(frozen=True)
class Layout:
    """How a set is recognised and read; low, high: its MOS scale as `read` returns it (null: that of the list)."""

    marker: str
    read: Callable[[Path], list[Row]]
    low: float | None = None
    high: float | None = None


SETS = {
    "live": Layout("**/dmos.mat", _live, 0.0, LIVE_LARGEST), "csiq": Layout("csiq.DMOS.csv", _csiq, 0.0, 1.0),
    "kadid": Layout("dmos.csv", _kadid, 1.0, 5.0), "tid2013": Layout("mos_with_names.txt", _tid, 0.0, 9.0),
    "koniq": Layout("koniq10k_scores_and_distributions.csv", _koniq, 0.0, 100.0), "list": Layout("labels.csv", _list),
}  # fmt: skip


def detect_set(root: str | Path | None) -> str:
    """The name of the set in a folder. FileNotFoundError listing the markers if none fits."""
    path = data_root(root)
    for name, layout in SETS.items():
        if next(path.glob(layout.marker), None):
            return name
    markers = ", ".join(f"{n}: {lay.marker}" for n, lay in SETS.items())
    raise FileNotFoundError(f"no image quality set in {path}; looked for {markers}")


def read_set(name: str, root: str | Path | None, *, higher_is_better: bool = True) -> QualitySet:
    """A set by name ("auto": detected), as paths: images are read when used.

    higher_is_better: of the column mos of a `list`; the other sets know their direction. Raises FileNotFoundError,
    ValueError."""
    name = detect_set(root) if name == "auto" else name
    if name not in SETS:
        raise ValueError(f"no image quality set {name!r}, allowed: auto, {', '.join(SETS)}")
    path, layout = data_root(root), SETS[name]
    if not next(path.glob(layout.marker), None):
        raise FileNotFoundError(f"{name} not found: no {layout.marker} in {path}. Layout: {layout.read.__doc__}")
    try:
        rows = layout.read(path)
    except (KeyError, OSError) as error:
        raise ValueError(f"{path} is no complete {name}: {error}. Layout: {layout.read.__doc__}") from error
    if not rows:
        raise ValueError(f"{path}: the list of {name} names no image")
    if missing := [r.path for r in rows if not r.path.is_file()]:
        raise FileNotFoundError(f"{name}: {len(missing)} of {len(rows)} images are missing, e.g. {missing[0]}")
    raw = torch.tensor([r.mos for r in rows], dtype=torch.float64)
    low = layout.low if layout.low is not None else float(raw.min())
    high = layout.high if layout.high is not None else float(raw.max())
    if high <= low:
        raise ValueError(f"{path}: all MOS are {low:g}, nothing can be learned or tested")
    mos = 10 * (raw - low) / (high - low)
    if name == "list" and not higher_is_better:
        mos = 10 - mos
    contents = {c: i for i, c in enumerate(dict.fromkeys(r.content for r in rows))}
    std = torch.tensor([r.std for r in rows]) * (10 / (high - low))
    group = torch.tensor([contents[r.content] for r in rows])
    return QualitySet([r.path for r in rows], mos.float(), [r.path.name for r in rows], std.float(), group)


def unrated(paths: list[Path]) -> QualitySet:
    """Images without opinions: mos is NaN."""
    nan = torch.full((len(paths),), float("nan"))
    return QualitySet(list(paths), nan, [p.name for p in paths], nan, torch.arange(len(paths)))
