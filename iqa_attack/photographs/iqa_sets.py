"""Image quality data sets in the layouts in which people have them: LIVE, CSIQ, KADID-10k, TID2013, KonIQ-10k, or a list of
one's own.

MOS are mapped to 0..10, larger = better. Sets are found by their files; an error names the path and the layout
expected."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.io
import torch

from common.data.files import identity, number, output_names, read_lines, read_table, readable
from common.data.vision import data_root
from iqa_attack.photographs.photos import QualitySet

LIVE_LARGEST = 114.4147  # the code's scale of LIVE: larger = better, 0..114.4147
LIVE_TYPES = (("jp2k", 227), ("jpeg", 233), ("wn", 174), ("gblur", 174), ("fastfading", 174))
LIVE_TWELVE = {  # the images that the paper attacks, larger = better on 0..114.4147: the list of the released code
    "wn/img100": 73.179006, "gblur/img121": 37.107651, "jpeg/img69": 62.905481, "wn/img32": 51.495040,
    "jpeg/img119": 75.306901, "wn/img50": 32.338561, "jp2k/img146": 55.613455, "jpeg/img35": 36.481787,
    "jp2k/img192": 74.991647, "gblur/img85": 55.507309, "jp2k/img202": 36.013150, "gblur/img102": 78.750119,
}  # fmt: skip
CSIQ_NAMES = {  # type in the list: (folder, name in the file)
    "noise": ("awgn", "AWGN"), "awgn": ("awgn", "AWGN"), "blur": ("blur", "BLUR"), "contrast": ("contrast", "contrast"),
    "fnoise": ("fnoise", "fnoise"), "jpeg": ("jpeg", "JPEG"),
    "jpeg 2000": ("jpeg2000", "jpeg2000"), "jpeg2000": ("jpeg2000", "jpeg2000"),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One image: path, mos as the set has it, its standard deviation, the name of its content, where it was listed."""

    path: Path
    mos: float
    std: float
    content: str
    where: str = ""


def _csv(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """("<file>, line <n>", {column: cell}) of every row below a header that names the columns."""
    rows = read_table(path)
    if not rows:
        raise ValueError(f"{path} is empty; expected columns {', '.join(needed)}")
    header = rows[0][1]
    if missing := [n for n in needed if n not in header]:
        raise ValueError(f"{path}, line {rows[0][0]}: no column {', '.join(missing)}; it has {', '.join(header)}")
    for number_, cells in rows[1:]:
        where = f"{path}, line {number_}"
        if len(cells) != len(header):
            raise ValueError(f"{where}: {len(cells)} cells, the header has {len(header)} columns")
        yield where, dict(zip(header, cells, strict=True))


def _std(text: str, where: str, default: float) -> float:
    return number(text, f"{where}: deviation", low=0) if text else default


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
    where = f"{base / 'dmos.mat'}"
    return [Row(f, LIVE_LARGEST - number(d, where), 1.0, c) for f, d, original, c in rows if not original]


def _live12(root: Path) -> list[Row]:
    """databaserelease2/<type>/img<i>.bmp: the twelve images that the paper attacks, with the values of the released list."""
    base = root / "databaserelease2" if (root / "databaserelease2").is_dir() else root
    return [Row(base / f"{name}.bmp", mos, 1.0, name) for name, mos in LIVE_TWELVE.items()]


def _csiq(root: Path) -> list[Row]:
    """csiq.DMOS.csv (image, dst_type, dst_lev, dmos_std, dmos), dst_imgs/<type>/<image>.<TYPE>.<level>.png."""
    rows = []
    for where, row in _csv(root / "csiq.DMOS.csv", ("image", "dst_type", "dst_lev", "dmos")):
        if row["dst_type"].lower() not in CSIQ_NAMES:
            raise ValueError(f"{where}: distortion {row['dst_type']!r}, allowed: {', '.join(CSIQ_NAMES)}")
        folder, name = CSIQ_NAMES[row["dst_type"].lower()]
        path = root / "dst_imgs" / folder / f"{row['image']}.{name}.{row['dst_lev']}.png"
        mos, std = 1 - number(row["dmos"], where), _std(row.get("dmos_std", ""), where, 0.1)
        rows.append(Row(path, mos, std, row["image"], where))
    return rows


def _kadid(root: Path) -> list[Row]:
    """dmos.csv (dist_img, ref_img, dmos, var), images/. The column is called dmos, but larger is better."""
    return [
        Row(
            root / "images" / r["dist_img"],
            number(r["dmos"], where),
            _std(r["var"], where, 0.0) ** 0.5,
            r["ref_img"],
            where,
        )
        for where, r in _csv(root / "dmos.csv", ("dist_img", "ref_img", "dmos", "var"))
    ]


def _tid(root: Path) -> list[Row]:
    """mos_with_names.txt ("mos name" per line), mos_std.txt, distorted_images/. The first part of a name is its
    content."""
    file, std = root / "mos_with_names.txt", root / "mos_std.txt"
    lines = read_lines(file)
    deviations = (
        [number(v, f"{std}, line {n}", low=0) for n, v in read_lines(std)] if std.is_file() else [0.1] * len(lines)
    )
    if len(deviations) != len(lines):
        raise ValueError(f"{std} has {len(deviations)} values, {file} names {len(lines)} images")
    folder, rows = root / "distorted_images", []
    names = {p.name.lower(): p for p in folder.iterdir()}  # the case of names differs between systems
    for (n, line), deviation in zip(lines, deviations, strict=True):
        mos, name = [*line.split(None, 1), ""][:2]
        path = names.get(name.lower(), folder / name)
        rows.append(
            Row(path, number(mos, f"{file}, line {n}"), deviation, name.split("_")[0].lower(), f"{file}, line {n}")
        )
    return rows


def _koniq(root: Path) -> list[Row]:
    """koniq10k_scores_and_distributions.csv (image_name, MOS, SD), images in 512x384/ or 1024x768/; every image its
    own content."""
    folder = next((root / d for d in ("512x384", "1024x768") if (root / d).is_dir()), root / "1024x768")
    return [
        Row(folder / r["image_name"], number(r["MOS"], where), _std(r["SD"], where, 0.0), r["image_name"], where)
        for where, r in _csv(root / "koniq10k_scores_and_distributions.csv", ("image_name", "MOS", "SD"))
    ]


def _list(root: Path) -> list[Row]:
    """labels.csv (path, mos, optionally std and content), images below the folder."""
    rows = []
    for where, r in _csv(root / "labels.csv", ("path", "mos")):
        if not r["path"]:
            raise ValueError(f"{where}: no path")
        mos, std = number(r["mos"], f"{where} ({r['path']})"), _std(r.get("std", ""), where, 0.5)
        rows.append(Row(root / r["path"].replace("\\", "/"), mos, std, r.get("content") or r["path"], where))
    return rows


def _tabs(root: Path) -> list[Row]:
    """labels.txt ("path<tab>mos[<tab>std]" per line, no header: the form of the released lists), images below the folder."""
    rows = []
    for n, line in read_lines(root / "labels.txt"):
        where = f"{root / 'labels.txt'}, line {n}"
        cells = [c.strip() for c in line.split("\t")]
        if len(cells) not in (2, 3):
            raise ValueError(f"{where}: {len(cells)} cells between tabs, expected path, mos and perhaps std")
        std = _std(cells[2] if len(cells) == 3 else "", where, 0.5)
        rows.append(Row(root / cells[0], number(cells[1], where), std, cells[0], where))
    return rows


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
    "tabs": Layout("labels.txt", _tabs), "live12": Layout("**/jp2k/img202.bmp", _live12, 0.0, LIVE_LARGEST),
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

    higher_is_better: of the mos of a `list` or `tabs`; the other sets know their direction. Raises FileNotFoundError,
    ValueError naming file and line: an image named twice, an opinion that is no number."""
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
    _named_once(rows)
    kept = readable([r.path for r in rows])
    rows, left_out = [rows[i] for i in kept], len(rows) - len(kept)
    raw = torch.tensor([r.mos for r in rows], dtype=torch.float64)
    low = layout.low if layout.low is not None else float(raw.min())
    high = layout.high if layout.high is not None else float(raw.max())
    if high <= low:
        raise ValueError(f"{path}: all MOS are {low:g}, nothing can be learned or tested")
    mos = 10 * (raw - low) / (high - low)
    own = name in ("list", "tabs")
    if own and not higher_is_better:
        mos = 10 - mos
    contents = {c: i for i, c in enumerate(dict.fromkeys(r.content for r in rows))}
    std = torch.tensor([r.std for r in rows]) * (10 / (high - low))
    group = torch.tensor([contents[r.content] for r in rows])
    paths = [r.path for r in rows]
    labels, digest = output_names(paths), hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:8]
    source = identity(name, paths, root=path, opinions=digest, left_out=left_out)
    return QualitySet(paths, mos.float(), [labels[p] for p in paths], std.float(), group, identity=source, upright=own)


def _named_once(rows: list[Row]) -> None:
    first: dict[Path, Row] = {}
    for row in rows:
        if (before := first.setdefault(row.path, row)) is not row:
            raise ValueError(f"{row.where}: {row.path.name} is named twice (opinions {before.mos:g} and {row.mos:g})")


def unrated(paths: list[Path], root: str | Path | None = None) -> QualitySet:
    """Images without opinions: mos is NaN. No two have the same name."""
    kept = readable(paths)
    paths, left_out = [paths[i] for i in kept], len(paths) - len(kept)
    nan, labels = torch.full((len(paths),), float("nan")), output_names(paths)
    source = identity("folder", paths, root=root, left_out=left_out)
    return QualitySet(list(paths), nan, [labels[p] for p in paths], nan, torch.arange(len(paths)), identity=source)
