"""Says what is in a data folder, and what is missing or broken:

python -m common.data.check <set> <root> [--deep] [--list FILE ...] [--strip-prefix PREFIX]
python -m common.data.check <paper>.<set> <root> [key=value ...]    a set that one paper reads, e.g. ap_fer.raf_db, fm_vit.cefa

Exit status 0: usable; 1: not usable, with the first ten problems and the layout expected; 2: wrong arguments.
Nothing is written. `--deep` opens every image. Everything is read by the loaders that train. `key=value`: keys of the set's
`data` configuration, e.g. protocol=2.1. Without arguments it lists the sets.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf, open_dict

from common.data.detection import DetectionSet, coco_detection, voc_detection, voc_stems
from common.data.files import folders as _folders
from common.data.files import hidden, images_below, open_image
from common.data.vision import KNOWN, data_root, image_list, torchvision_set
from common.metrics.readme import PAPERS

SHOWN = 10
LAYOUTS = {
    **{name: ", ".join(known.layout) for name, known in KNOWN.items()},
    "imagefolder": "<split>/<class name>/<image>.jpg, or <class name>/<image>.jpg directly",
    "list": "*.txt ('relative/path label' per line), *.csv (path,label) or *.json lists in the root or given "
    "by --list, and the images they name under the root",
    "coco": "annotations/instances_<split>.json with images in <split>/ or images/<split>/",
    "voc": "Annotations/*.xml, ImageSets/Main/<split>.txt, JPEGImages/*.jpg (or any image ending) in the root, in VOC2007/, "
    "VOC2012/ or in VOCdevkit/VOC2007/, ...",
}


@dataclass
class Options:
    deep: bool = False
    lists: list[Path] = field(default_factory=list)
    strip_prefix: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # of a paper's set


@dataclass(frozen=True)
class Found:
    """One split as the loader of a paper reads it. `<paper>/check.py` has SETS, {name: layout in words}, and
    read(name, root, **options), which yields them.

    files: every image; per_class: how many of each class, identity, kind; open: reads one image as the loader does."""

    split: str
    files: list[Path]
    per_class: Mapping[Any, int]
    open: Callable[[Path], Any] = open_image


@dataclass
class Report:
    """What was found. A note is a fact to know; a problem makes the folder unusable."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        self.lines.append(line)

    def counts(self, split: str, images: int, per_class: Mapping[Any, int], unit: str = "images") -> None:
        """One line of totals, one of the classes (all when few, else the largest and the smallest)."""
        ranked = sorted(per_class.items(), key=lambda item: (-item[1], str(item[0])))
        shown = ranked if len(ranked) <= 20 else [*ranked[:5], *ranked[-5:]]
        names = ", ".join(f"{name} {n}" for name, n in shown)
        self.say(f"{split}: {images} images, {len(ranked)} classes")
        self.say(f"  {unit} per class{'' if shown is ranked else ' (5 largest, 5 smallest)'}: {names}")

    def text(self, layout: str) -> str:
        out = list(self.lines)
        if self.problems:
            out.append(f"{len(self.problems)} problem(s), first {min(SHOWN, len(self.problems))}:")
            out += [f"  {problem}" for problem in self.problems[:SHOWN]]
            out.append(f"expected layout: {layout}")
        out.append("NOT USABLE" if self.problems else "usable")
        return "\n".join(out)


def _open_all(paths: Iterable[Path], report: Report, read: Callable[[Path], Any] = open_image) -> None:
    for path in paths:
        try:
            read(path)
        except (FileNotFoundError, ValueError) as error:
            report.problems.append(str(error))


def check_torchvision(root: Path, report: Report, options: Options, *, name: str) -> None:
    known = KNOWN[name]
    if missing := [root / f for f in known.layout if not (root / f).is_file()]:
        for f in missing:
            zipped = f.with_name(f"{f.name}.gz")
            report.problems.append(f"no file {f}" + (f" (gunzip -k {zipped})" if zipped.is_file() else ""))
        return
    for split, size in known.sizes.items():
        try:
            data = torchvision_set(name, root, train=split == "train")
        except (FileNotFoundError, ValueError) as error:
            report.problems.append(f"{split}: {error}")
            continue
        classes = Counter(int(t) for t in data.targets)
        report.counts(split, len(data), classes)
        if (len(data), len(classes)) != (size, known.classes):
            report.problems.append(
                f"{split}: {len(data)} images of {len(classes)} classes, the full set has {size} of {known.classes}"
            )


def check_image_folder(root: Path, report: Report, options: Options) -> None:
    tops = _folders(root)
    splits = [p for p in tops if _folders(p)]
    classes_of: dict[str, list[str]] = {}
    for split in splits or [root]:
        name = split.name if splits else "(no splits)"
        per_class, others = {}, 0
        for folder in _folders(split):
            images = images_below(folder)
            files = [p for p in folder.rglob("*") if p.is_file() and not hidden(p)]
            per_class[folder.name], others = len(images), others + len(files) - len(images)
            if not images:
                report.problems.append(f"{name}: no image in class folder {folder}")
            if options.deep:
                _open_all(sorted(images), report)
        report.counts(name, sum(per_class.values()), per_class)
        if others > 0:
            report.say(f"  note: {others} other files are ignored")
        if not per_class:
            report.problems.append(f"{name}: no class folders in {split}")
        classes_of[name] = sorted(per_class)
    first = next(iter(classes_of))
    for name, classes in classes_of.items():
        if classes != classes_of[first]:
            odd = sorted(set(classes) ^ set(classes_of[first]))
            report.problems.append(f"{name} and {first} differ in classes, labels would not agree: {odd[:5]}")


def check_list(root: Path, report: Report, options: Options) -> None:
    lists = options.lists or sorted(
        p for p in root.iterdir() if p.suffix in (".txt", ".csv", ".json") and not hidden(p)
    )
    if not lists:
        report.problems.append(f"no list in {root}; name one with --list")
    for where in lists:
        try:
            data = image_list(where, root, strip_prefix=options.strip_prefix)
        except (FileNotFoundError, ValueError) as error:
            report.problems.append(str(error))
            continue
        report.counts(where.name, len(data), Counter(data.targets))
        report.problems += [f"{where.name}: no image {p}" for p in data.paths if not p.is_file()]
        if options.deep:
            _open_all((p for p in data.paths if p.is_file()), report)


def check_coco(root: Path, report: Report, options: Options) -> None:
    files = sorted(p for p in (root / "annotations").glob("instances_*.json") if not hidden(p))
    if not files:
        report.problems.append(f"no {root / 'annotations'}/instances_<split>.json")
    for file in files:
        split = file.stem.removeprefix("instances_")
        try:
            data = coco_detection(root, split)
        except (FileNotFoundError, ValueError) as error:
            report.problems.append(str(error))
            continue
        _report_detection(split, data, data.coco["annotations"], report, options)


def _report_detection(
    split: str, data: DetectionSet, annotations: list[dict], report: Report, options: Options
) -> None:
    """Counts and missing images of a set that the loader has read."""
    names = dict(zip(data.category_ids, data.classes, strict=True))
    report.counts(split, len(data), Counter(names[a["category_id"]] for a in annotations), unit="boxes")
    crowd, difficult = (sum(bool(a.get(key)) for a in annotations) for key in ("iscrowd", "difficult"))
    without = len({i["id"] for i in data.infos} - {a["image_id"] for a in annotations})
    report.say(
        f"  {crowd} crowd regions, {difficult} difficult, {data.dropped} boxes without extent (dropped), {without} empty images"
    )
    paths = [data.folder / i["file_name"] for i in data.infos]
    report.problems += [f"{split}: no image {p}" for p in paths if not p.is_file()]
    if options.deep:
        for index, path in enumerate(paths):
            if path.is_file():
                try:
                    data.image(index)
                except ValueError as error:
                    report.problems.append(str(error))


def check_voc(root: Path, report: Report, options: Options) -> None:
    tops = [root, *root.glob("VOC20*"), *root.glob("VOCdevkit/VOC20*")]
    years = [t for t in tops if (t / "Annotations").is_dir()]
    if not years:
        report.problems.append(f"no Annotations folder in {root}, its VOC20*/ or its VOCdevkit/VOC20*/")
    for year in sorted(years):
        lists = year / "ImageSets" / "Main"
        # "<class>_<split>.txt" files hold one class's +1/-1 labels; the splits are the names without "_".
        splits = [f for f in sorted(lists.glob("*.txt")) if "_" not in f.stem and not hidden(f)]
        if not splits:
            report.problems.append(f"no split list {lists}/<split>.txt")
        for split in splits:
            _check_voc_split(year, split, report, options)


def _check_voc_split(year: Path, split: Path, report: Report, options: Options) -> None:
    try:
        data = voc_detection(year, split.stem, classes=_voc_classes(year, split))
    except (FileNotFoundError, ValueError) as error:
        report.problems.append(f"{split.stem}: {error}")
        return
    _report_detection(f"{year.name} {split.stem}", data, data.coco["annotations"], report, options)


def _voc_classes(year: Path, split: Path) -> list[str]:
    """Every class that the annotations of a split name. What cannot be read is the loader's to report."""
    names = set()
    for stem in voc_stems(split):
        with contextlib.suppress(OSError, ElementTree.ParseError, UnicodeDecodeError):
            root = ElementTree.parse(year / "Annotations" / f"{stem}.xml").getroot()
            names |= {(o.findtext("name") or "").strip() for o in root.iter("object")}
    return sorted(names - {""})


CHECKS: dict[str, Callable[[Path, Report, Options], None]] = {
    **{name: partial(check_torchvision, name=name) for name in KNOWN},
    "imagefolder": check_image_folder,
    "list": check_list,
    "coco": check_coco,
    "voc": check_voc,
}


def data_choices(script: str) -> dict[str, str]:
    """{name: its first comment, the layout} of the configurations `data=<name>` beside the file `script`."""
    files = sorted(Path(script).parent.glob("configs/data/*.yaml"))
    lines = {f.stem: f.read_text(encoding="utf-8").splitlines() for f in files}
    return {name: next(t[2:] for t in text if not t.startswith("# @package")) for name, text in lines.items()}


def data_options(script: str, name: str, root: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The node `data` of a paper's configuration with data=<name>, data.root and further keys. ValueError for one it lacks."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(Path(script).resolve().parent / "configs"), version_base="1.3"):
        node = compose("config", overrides=[f"data={name}"]).data
    if unknown := sorted(set(given) - set(node)):
        raise ValueError(f"data={name} has no key {', '.join(unknown)}; it has {', '.join(node)}")
    with open_dict(node):
        node.update(root=str(root), **given)
    options: Any = OmegaConf.to_container(node, resolve=True)
    return options


def papers_sets() -> dict[str, str]:
    """{<paper>.<set>: layout} of the sets that only one paper reads."""
    # By name and at call time: nothing here depends on a paper.
    modules = {p: f"{p}.check" for p in PAPERS if importlib.util.find_spec(f"{p}.check")}
    return {f"{p}.{name}": text for p, m in modules.items() for name, text in importlib.import_module(m).SETS.items()}


def _check_of_paper(name: str, root: Path, report: Report, options: Options) -> None:
    paper, name = name.split(".", 1)
    try:
        for found in importlib.import_module(f"{paper}.check").read(name, root, **options.settings):
            report.counts(found.split, len(found.files), found.per_class)
            report.problems += [f"{found.split}: no image {p}" for p in found.files if not p.is_file()]
            if options.deep:
                _open_all((p for p in found.files if p.is_file()), report, found.open)
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, TypeError) and "unexpected keyword" not in str(error):
            raise
        report.problems.append(str(error))


def check(name: str, root: str | Path, options: Options | None = None) -> Report:
    """What is in `root`, read as the data set `name` (a key of CHECKS or of `papers_sets`, else ValueError)."""
    if name not in CHECKS and name not in (others := papers_sets()):
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join([*CHECKS, *others])}")
    report, options = Report(), options or Options()
    try:
        path = data_root(root)
    except (FileNotFoundError, ValueError) as error:
        report.problems.append(str(error))
        return report
    report.say(f"{name} in {path}")
    if name in CHECKS:
        CHECKS[name](path, report, options)
    else:
        _check_of_paper(name, path, report, options)
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m common.data.check", description="What a data folder holds.")
    parser.add_argument("set", help="a data set; without arguments: all there are")
    parser.add_argument("root")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the data configuration of a paper's set")
    parser.add_argument("--deep", action="store_true", help="open every image")
    parser.add_argument("--list", action="append", type=Path, default=[], help="a list file (set `list`)")
    parser.add_argument("--strip-prefix", help="removed from the front of the listed paths (set `list`)")
    arguments = sys.argv[1:] if arguments is None else arguments
    layouts = LAYOUTS | papers_sets()
    if not arguments:
        print("\n".join(f"{name:24s} {layout}" for name, layout in layouts.items()))
        return 0
    given = parser.parse_args(arguments)
    settings = dict(text.split("=", 1) for text in given.settings if "=" in text)
    if given.set not in layouts:
        parser.error(f"unknown data set {given.set!r}; choose from {', '.join(layouts)}")
    if len(settings) < len(given.settings) or (settings and given.set in CHECKS):
        parser.error("further arguments are key=value, for the set of a paper")
    values = {key: yaml.safe_load(value) for key, value in settings.items()}
    report = check(given.set, given.root, Options(given.deep, given.list, given.strip_prefix, values))
    print(report.text(layouts[given.set]))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
