"""List files of CASIA-SURF, CeFA and WMCA, in both formats in which people have them (section 6).

    triplets   rgb_path depth_path ir_path label        one row per frame: the official SURF lists, the flexible-modal benchmark
    videos     <folder of the colour frames> label      one row per video: the lists of the first author; the folders of the
                                                        other modalities have another last name, frames are joined by number

WHICH NUMBER MEANS LIVE DIFFERS BETWEEN LISTS, so it has to be given, and class counts can be asserted.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

FORMATS = ("triplets", "videos")


@dataclass
class Frames:
    """Frames of one split: per frame the file of every modality, and whether it is live; video, subject and species by name."""

    paths: list[dict[str, Path]] = field(default_factory=list)
    live: list[bool] = field(default_factory=list)
    video: list[str] = field(default_factory=list)
    subject: list[str] = field(default_factory=list)
    species: list[str] = field(default_factory=list)
    dropped: Counter = field(default_factory=Counter)  # reason -> frames or videos left out

    def __len__(self) -> int:
        return len(self.paths)

    def counts(self) -> dict[str, int]:
        """{"live": n, "attack": n}"""
        return {"live": sum(self.live), "attack": len(self.live) - sum(self.live)}


def read_list(
    file: str | Path,
    root: str | Path,
    *,
    modalities: Sequence[str],
    live_label: int,
    kind: str = "triplets",
    columns: Sequence[str] = ("rgb", "depth", "ir"),
    folders: Mapping[str, str] | None = None,
    subject: str | None = None,
    species: str | None = None,
    exclude: Sequence[str] = (),
    expected: Mapping[str, int] | None = None,
    every: int = 1,
) -> Frames:
    """The frames that `file` lists, paths relative to `root`.

    live_label: the label of live faces, 0 or 1. columns: the modalities of a triplets row, in order. folders: names of the
    frames' folders in a videos list by modality, the first being the one that is listed. subject, species: regular
    expressions searched in the listed path, whose first group is the name (default: the video is its own subject, attacks
    have no species). exclude: videos or frames whose listed path contains one of these (clips known to be broken). every:
    take every n-th frame of a video. expected: {"live": n, "attack": n} to assert.
    FileNotFoundError for the list or a frame that is missing; ValueError for a bad row, label or count."""
    file, root = Path(file).expanduser(), Path(root).expanduser()
    if kind not in FORMATS or live_label not in (0, 1):
        raise ValueError(
            f"format={kind!r}, live_label={live_label}, allowed: {', '.join(FORMATS)}; 0 or 1 (it differs between lists)"
        )
    if not file.is_file():
        raise FileNotFoundError(
            f"no list {file}: expected rows '{'rgb depth ir label' if kind == 'triplets' else 'video/color label'}'"
        )
    frames = Frames()
    for number, line in enumerate(file.read_text().splitlines(), 1):
        words = line.split()
        if not words:
            continue
        where = f"{file}, line {number}"
        if words[-1] not in ("0", "1"):
            raise ValueError(f"{where}: the last word must be the label 0 or 1, got {words[-1]!r}")
        live = int(words[-1]) == live_label
        if any(part in words[0] for part in exclude):
            frames.dropped["excluded"] += 1
            continue
        if kind == "triplets":
            if len(words) != len(columns) + 1:
                raise ValueError(
                    f"{where}: expected {len(columns)} paths ({', '.join(columns)}) and a label, got {len(words)} words"
                )
            named = dict(zip(columns, words[:-1], strict=True))
            _want(modalities, named, where)
            found = [{m: root / named[m] for m in modalities}]
            video = str(Path(words[0]).parent.parent)
        else:
            if len(words) != 2:
                raise ValueError(f"{where}: expected a folder and a label, got {len(words)} words")
            found = _joined(root / words[0], folders or {}, modalities, frames.dropped, where)[::every]
            video = str(Path(words[0]).parent)
        who, what = _search(subject, words[0], where) or video, _search(species, words[0], where) or "attack"
        for paths in found:
            frames.paths.append(paths)
            frames.live.append(live)
            frames.video.append(video)
            frames.subject.append(who)
            frames.species.append("live" if live else what)
    if not len(frames):
        raise ValueError(f"{file} lists no frame ({dict(frames.dropped) or 'empty'})")
    if expected is not None and frames.counts() != {k: expected[k] for k in ("live", "attack")}:
        raise ValueError(
            f"{file}: {frames.counts()}, expected {dict(expected)}. With the other live_label they would change places: check "
            "the polarity of this list"
        )
    for paths in frames.paths:
        for path in paths.values():
            if not path.is_file():
                raise FileNotFoundError(f"no frame {path}, listed in {file} (root {root})")
    return frames


def check_subjects(splits: Mapping[str, Frames]) -> None:
    """ValueError naming a subject that is in two splits."""
    owner: dict[str, str] = {}
    for name, frames in splits.items():
        shared = sorted(s for s in set(frames.subject) if owner.setdefault(s, name) != name)
        if shared:
            raise ValueError(
                f"{len(shared)} subjects are in two splits, e.g. {shared[0]} in {owner[shared[0]]} and {name}: results would be "
                "too good. Check the lists, or data.subject"
            )


def _joined(
    first: Path, folders: Mapping[str, str], modalities: Sequence[str], dropped: Counter, where: str
) -> list[dict[str, Path]]:
    """The frames of a video that every modality has, joined by the number in their names; the others are dropped and counted."""
    _want(modalities, folders, where)
    numbered: dict[str, dict[int, Path]] = {}
    for m in modalities:
        folder = first.parent / folders[m]
        if not folder.is_dir():
            raise FileNotFoundError(f"{where}: no folder {folder}")
        numbered[m] = {_number(p): p for p in sorted(folder.iterdir()) if p.suffix.lower() in IMG_EXTENSIONS}
    common = set.intersection(*(set(frames) for frames in numbered.values()))
    dropped["frame without its counterpart"] += len(set.union(*(set(f) for f in numbered.values())) - common)
    if not common:
        raise ValueError(f"{where}: {first.parent} has no frame that all of {', '.join(modalities)} share")
    return [{m: numbered[m][i] for m in modalities} for i in sorted(common)]


def _number(path: Path) -> int:
    digits = re.findall(r"\d+", path.stem)
    if not digits:
        raise ValueError(f"{path}: no frame number in the name")
    return int(digits[-1])


def _want(modalities: Sequence[str], have: Mapping[str, object], where: str) -> None:
    if absent := [m for m in modalities if m not in have]:
        raise ValueError(
            f"{where}: no {', '.join(absent)} here; this list has {', '.join(have) or 'no named folders (data.folders)'}"
        )


def _search(pattern: str | None, text: str, where: str) -> str | None:
    if pattern is None:
        return None
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"{where}: {text!r} does not match {pattern!r}")
    return found.group(1)
