"""List files of CASIA-SURF, CeFA and WMCA as their publishers give them, and folders of one's own.

    triplets   rgb_path depth_path ir_path label        one row per frame: the official SURF lists, the flexible-modal benchmark
    videos     <video>/color label, or <video> label    one row per video: the lists of the first author; every modality has a
                                                        folder in the video, frames are joined by number
    folders    <split>/<live or a species>/<modality>/  one's own images, joined by their names

WHICH NUMBER MEANS LIVE DIFFERS BETWEEN LISTS, so it has to be given, and counts can be asserted. Subject, video and species are
found in the listed path by patterns; where a pattern says that it is unknown, nothing is made up for it.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.data.files import folders as visible_folders
from common.data.files import images_below, is_image, label, read_lines

FORMATS = ("triplets", "videos")


@dataclass
class Frames:
    """Frames of one split: per frame the file of every modality and whether it is live; video, subject and species by name, None
    where they are not known ("live" is the species of live ones)."""

    paths: list[dict[str, Path]] = field(default_factory=list)
    live: list[bool] = field(default_factory=list)
    video: list[str | None] = field(default_factory=list)
    subject: list[str | None] = field(default_factory=list)
    species: list[str | None] = field(default_factory=list)
    dropped: Counter = field(default_factory=Counter)  # reason -> frames or videos left out

    def __len__(self) -> int:
        return len(self.paths)

    def add(self, paths: Sequence[dict[str, Path]], live: bool, names: Mapping[str, str | None]) -> None:
        """Frames that share a label and the names {video, subject, species}."""
        for one in paths:
            self.paths.append(one)
            self.live.append(live)
            self.video.append(names["video"])
            self.subject.append(names["subject"])
            self.species.append("live" if live else names["species"])

    def counts(self) -> dict[str, int]:
        """{"frames": n, "live": n, "attack": n}, and "videos" where all are known."""
        live = sum(self.live)
        found = {"frames": len(self.live), "live": live, "attack": len(self.live) - live}
        return found if None in self.video else found | {"videos": len(set(self.video))}

    def check(self, where: str, expected: Mapping[str, int] | None = None) -> None:
        """ValueError for no frame, counts that are not the expected ones, a frame or a video with two labels, a frame listed
        twice; FileNotFoundError for a frame that is not there."""
        if not len(self):
            raise ValueError(f"{where} lists no frame ({dict(self.dropped) or 'empty'})")
        counts = self.counts()
        if wrong := {k: n for k, n in (expected or {}).items() if counts.get(k) != n}:
            raise ValueError(
                f"{where}: {counts}, expected {dict(wrong)}. Live and attack in each other's place: check the polarity of this "
                "list (data.live_label). Another copy of the set: data.expected=null"
            )
        _one_label(
            where, "video", [v for v in self.video if v], [x for x, v in zip(self.live, self.video, strict=True) if v]
        )
        first = [str(next(iter(p.values()))) for p in self.paths]
        _one_label(where, "frame", first, self.live)
        if len(set(first)) < len(first):
            again = next(name for name, n in Counter(first).items() if n > 1)
            raise ValueError(f"{where}: {again} is listed twice")
        for paths in self.paths:
            for path in paths.values():
                if not path.is_file():
                    raise FileNotFoundError(f"no frame {path}, listed in {where}")


def _one_label(where: str, what: str, names: Sequence[str], live: Sequence[bool]) -> None:
    seen: dict[str, bool] = {}
    for name, is_live in zip(names, live, strict=True):
        if seen.setdefault(name, is_live) != is_live:
            raise ValueError(f"{where}: {what} {name} is live in one row and an attack in another")


def read_list(
    file: str | Path, root: str | Path, *, modalities: Sequence[str], live_label: int, kind: str = "triplets",
    columns: Sequence[str] = ("rgb", "depth", "ir"), folders: Mapping[str, str] | None = None, video: str | None = None,
    subject: str | None = None, species: str | None = None, species_names: Mapping[str, str] | None = None,
    exclude: Sequence[str] = (), expected: Mapping[str, int] | None = None, every: int = 1,
) -> Frames:  # fmt: skip
    """The frames that `file` lists, paths relative to `root`.

    live_label: the label of live faces, 0 or 1. columns: the modalities of a triplets row, in order. folders: names of the
    frames' folders in a video by modality. video, subject, species: regular expressions searched in the (first) listed path;
    the first group that is not empty is the name, a match without one says that it is not known, no match is an error; null: not
    known (a row of a videos list is its own video). species_names: other names for them. exclude: leave out what has one of these
    in its listed path (clips known to be broken). every: take every n-th frame of a video. expected: some of {frames, live,
    attack, videos} to assert.
    FileNotFoundError for the list or a frame that is missing; ValueError for a bad row, label or count, naming file and line."""
    file, root = Path(file).expanduser(), Path(root).expanduser()
    check_format(kind, live_label, modalities, columns if kind == "triplets" else folders or {})
    if not file.is_file():
        row = "'rgb depth ir label'" if kind == "triplets" else "'video/color label'"
        raise FileNotFoundError(f"no list {file}: expected rows {row}")
    patterns = {"video": video, "subject": subject, "species": species}
    frames = Frames()
    for number, line in read_lines(file):
        where = f"{file}, line {number}"
        *named, text = cells(line, kind)
        live = label(text, where, classes=2) == live_label
        if any(part in named[0] for part in exclude):
            frames.dropped["excluded"] += 1
            continue
        names = {k: None if p is None else _search(p, named[0], where, k) for k, p in patterns.items()}
        names["species"] = (species_names or {}).get(names["species"] or "", names["species"])
        if kind == "triplets":
            if len(named) != len(columns):
                raise ValueError(
                    f"{where}: expected {len(columns)} paths ({', '.join(columns)}) and a label, got {len(named) + 1} words; "
                    "names with blanks need tabs or commas between the columns"
                )
            row = dict(zip(columns, named, strict=True))
            frames.add([{m: root / row[m] for m in modalities}], live, names)
        else:
            clip = root / named[0]
            clip = clip.parent if folders and clip.name in folders.values() else clip
            names["video"] = names["video"] or clip.relative_to(root).as_posix()
            found = _joined(clip, folders or {}, modalities, frames.dropped, where)[::every]
            frames.add(found, live, names)
    frames.check(str(file), expected)
    return frames


def check_format(
    kind: str, live_label: int, modalities: Sequence[str], have: Sequence[str] | Mapping[str, str]
) -> None:
    """ValueError for another format or label, or a modality that is not among the columns or folders of a list."""
    if kind not in FORMATS or live_label not in (0, 1) or isinstance(live_label, bool):
        raise ValueError(
            f"data.format={kind!r}, data.live_label={live_label}, allowed: {', '.join(FORMATS)}; 0 or 1 (lists differ)"
        )
    if absent := [m for m in modalities if m not in have]:
        raise ValueError(
            f"data.modalities: no {', '.join(absent)} here; this list has {', '.join(have) or 'no named folders (data.folders)'}"
        )


def cells(line: str, kind: str) -> list[str]:
    """The columns of a row, separated by tabs, commas, semicolons or blanks; Windows' separators become '/'."""
    separator = next((s for s in "\t,;" if s in line), None)
    if separator:
        parts = [part.strip() for part in line.split(separator)]
    elif kind == "videos":  # the one name may have blanks
        parts = line.rsplit(None, 1)
    else:
        parts = line.split()
    return [part.replace("\\", "/") for part in ([*parts] if len(parts) > 1 else ["", *parts])]


def read_folders(
    root: Path, split: str, *, modalities: Sequence[str], live_class: str = "live", subject: str | None = None,
    video: str | None = None, expected: Mapping[str, int] | None = None,
) -> Frames:  # fmt: skip
    """One's own images: root/split/<live_class, or the name of a species>/<modality>/..., joined by their names below the
    modality's folder; of one modality that folder may be left out.

    subject, video: patterns as in `read_list`, searched in the path below `split`.
    FileNotFoundError for a missing folder, ValueError where no live faces or no attacks are found."""
    base = root / split
    if not base.is_dir():
        raise FileNotFoundError(
            f"no folder {base}: expected {split}/<{live_class}|species of attack>/<modality>/<image>"
        )
    classes = [p.name for p in visible_folders(base)]
    if live_class not in classes or len(classes) < 2:
        raise ValueError(
            f"{base} has the folders {', '.join(classes) or 'none'}: expected {live_class} (data.live_class) and one or more "
            "of attacks"
        )
    frames = Frames()
    for name in classes:
        places = {m: base / name / m for m in modalities}
        if len(modalities) == 1 and not places[modalities[0]].is_dir():
            places = {modalities[0]: base / name}
        found, alone = join_names(places)
        frames.dropped["frame without its counterpart"] += len(alone)
        for paths in found:
            path = paths[modalities[0]].relative_to(base).as_posix()
            who, clip = (
                None if p is None else _search(p, path, path, k) for k, p in (("subject", subject), ("video", video))
            )
            frames.add([paths], name == live_class, {"video": clip, "subject": who, "species": name})
    frames.check(str(base), expected)
    return frames


def join_names(folders: Mapping[str, Path]) -> tuple[list[dict[str, Path]], list[str]]:
    """(images that every folder has, by their path below it; names of those that one lacks). The ending may differ between
    folders, unless two images of a folder differ in nothing else: these need their whole name.

    FileNotFoundError for a folder that is missing, ValueError if nothing is shared."""
    found: dict[str, dict[str, Path]] = {}
    for m, folder in folders.items():
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder} (of {m})")
        files = {p.relative_to(folder).as_posix(): p for p in images_below(folder)}
        stems = Counter(str(Path(name).with_suffix("")) for name in files)
        short = {name: str(Path(name).with_suffix("")) for name in files}
        found[m] = {name if stems[short[name]] > 1 else short[name]: p for name, p in files.items()}
    shared = set.intersection(*(set(f) for f in found.values()))
    if not shared:
        raise ValueError(
            f"the folders of {', '.join(folders)} share no image name: {', '.join(map(str, folders.values()))}"
        )
    alone = sorted(set.union(*(set(f) for f in found.values())) - shared)
    return [{m: found[m][name] for m in folders} for name in sorted(shared)], alone


def check_splits(splits: Mapping[str, Frames]) -> None:
    """ValueError naming a subject, a video or a frame that is in two splits, as far as they are known."""
    for what in ("subject", "video", "frame"):
        owner: dict[str, str] = {}
        for name, frames in splits.items():
            values = [str(next(iter(p.values()))) for p in frames.paths] if what == "frame" else getattr(frames, what)
            shared = sorted(s for s in {v for v in values if v is not None} if owner.setdefault(s, name) != name)
            if shared:
                raise ValueError(
                    f"{len(shared)} {what}s are in two splits, e.g. {shared[0]} in {owner[shared[0]]} and {name}: results would "
                    f"be too good. Check the lists{', or data.subject' if what == 'subject' else ''}"
                )


def _joined(
    clip: Path, folders: Mapping[str, str], modalities: Sequence[str], dropped: Counter, where: str
) -> list[dict[str, Path]]:
    """The frames of a video that every modality has, joined by the number in their names; the others are dropped and counted."""
    numbered: dict[str, dict[int, Path]] = {}
    for m in modalities:
        folder = clip / folders[m]
        if not folder.is_dir():
            raise FileNotFoundError(f"{where}: no folder {folder}")
        numbered[m] = {}
        for path in sorted(p for p in folder.iterdir() if is_image(p)):
            if (other := numbered[m].setdefault(_number(path), path)) != path:
                raise ValueError(f"{where}: {other} and {path} have the same frame number")
    shared = set.intersection(*(set(frames) for frames in numbered.values()))
    dropped["frame without its counterpart"] += len(set.union(*(set(f) for f in numbered.values())) - shared)
    if not shared:
        raise ValueError(f"{where}: {clip} has no frame that all of {', '.join(modalities)} share")
    return [{m: numbered[m][i] for m in modalities} for i in sorted(shared)]


def _number(path: Path) -> int:
    digits = re.findall(r"\d+", path.stem)
    if not digits:
        raise ValueError(f"{path}: no frame number in the name")
    return int(digits[-1])


def _search(pattern: str, text: str, where: str, what: str) -> str | None:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"{where}: {text!r} does not match data.{what}={pattern!r}")
    return next((group for group in found.groups() if group), None)


def check_pattern(pattern: str | None, what: str) -> None:
    """ValueError for a pattern that is no regular expression or has no group."""
    if pattern is None:
        return
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"data.{what}={pattern!r} is no regular expression: {error}") from error
    if not groups:
        raise ValueError(f"data.{what}={pattern!r} has no group: put the name in round brackets")
