"""Says what is in a data folder, and what is missing or broken:

python -m common.data.check <set> <root> [--deep] [--list FILE ...] [--strip-prefix PREFIX]

Exit status 0: usable; 1: not usable, with the first ten problems and the layout expected; 2: wrong arguments.
Nothing is written. `--deep` opens every image.
"""

from __future__ import annotations

import argparse
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from common.data.files import folders as _folders
from common.data.files import is_image, open_image
from common.data.vision import KNOWN, data_root, image_list, torchvision_set

SHOWN = 10
LAYOUTS = {
    **{name: ", ".join(known.layout) for name, known in KNOWN.items()},
    "imagefolder": "<split>/<class name>/<image>.jpg, or <class name>/<image>.jpg directly",
    "list": "*.txt ('relative/path label' per line), *.csv (path,label) or *.json lists in the root or given "
    "by --list, and the images they name under the root",
    "coco": "annotations/instances_<split>.json with images in <split>/ or images/<split>/",
    "voc": "Annotations/*.xml, ImageSets/Main/<split>.txt, JPEGImages/*.jpg in the root, in VOC2007/, "
    "VOC2012/ or in VOCdevkit/VOC2007/, ...",
}


@dataclass
class Options:
    deep: bool = False
    lists: list[Path] = field(default_factory=list)
    strip_prefix: str | None = None


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


def _open_all(paths: Iterable[Path], report: Report) -> None:
    for path in paths:
        try:
            open_image(path)
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
            files = [p for p in folder.rglob("*") if p.is_file()]
            images = [p for p in files if is_image(p)]
            per_class[folder.name], others = len(images), others + len(files) - len(images)
            if not images:
                report.problems.append(f"{name}: no image in class folder {folder}")
            if options.deep:
                _open_all(sorted(images), report)
        report.counts(name, sum(per_class.values()), per_class)
        if others:
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
    lists = options.lists or sorted(p for p in root.iterdir() if p.suffix in (".txt", ".csv", ".json"))
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
    files = sorted((root / "annotations").glob("instances_*.json"))
    if not files:
        report.problems.append(f"no {root / 'annotations'}/instances_<split>.json")
    for file in files:
        try:
            content = json.loads(file.read_text())
            _check_coco_file(root, file, content, report, options)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            report.problems.append(f"{file} is not a COCO instances file: {type(error).__name__} {error}")


def _check_coco_file(root: Path, file: Path, content: dict, report: Report, options: Options) -> None:
    split = file.stem.removeprefix("instances_")
    names = {c["id"]: c["name"] for c in content["categories"]}
    images = {i["id"]: i for i in content["images"]}
    per_class = Counter(names.get(a["category_id"], "?") for a in content["annotations"])
    report.counts(split, len(images), per_class, unit="boxes")
    crowd = sum(bool(a.get("iscrowd", 0)) for a in content["annotations"])
    empty = sum(min(a["bbox"][2:]) <= 0 for a in content["annotations"])
    without = len(images.keys() - {a["image_id"] for a in content["annotations"]})
    report.say(f"  {crowd} crowd regions, {empty} boxes without area (dropped), {without} empty images")
    for a in content["annotations"]:
        if a["category_id"] not in names or a["image_id"] not in images:
            report.problems.append(f"{split}: annotation {a['id']} names an unknown image or category")
    # A subset file such as instances_train2017_free.json shares the folder of its full set.
    stems = [split, split.rsplit("_", 1)[0]]
    folders = [root / top / stem for stem in stems for top in ("", "images")]
    folder = next((f for f in folders if f.is_dir()), None)
    if folder is None:
        report.problems.append(f"{split}: no image folder, looked for {folders[0]} and {folders[1]}")
        return
    paths = [folder / i["file_name"] for i in images.values()]
    report.problems += [f"{split}: no image {p}" for p in paths if not p.is_file()]
    if options.deep:
        _open_all((p for p in paths if p.is_file()), report)


def check_voc(root: Path, report: Report, options: Options) -> None:
    tops = [root, *root.glob("VOC20*"), *root.glob("VOCdevkit/VOC20*")]
    years = [t for t in tops if (t / "Annotations").is_dir()]
    if not years:
        report.problems.append(f"no Annotations folder in {root}, its VOC20*/ or its VOCdevkit/VOC20*/")
    for year in sorted(years):
        lists = year / "ImageSets" / "Main"
        # "<class>_<split>.txt" files hold one class's +1/-1 labels; the splits are the names without "_".
        splits = [f for f in sorted(lists.glob("*.txt")) if "_" not in f.stem]
        if not splits:
            report.problems.append(f"no split list {lists}/<split>.txt")
        for split in splits:
            _check_voc_split(year, split, report, options)


def _check_voc_split(year: Path, split: Path, report: Report, options: Options) -> None:
    ids = split.read_text().split()
    per_class, difficult, empty, images = Counter(), 0, 0, []
    for image_id in ids:
        images.append(year / "JPEGImages" / f"{image_id}.jpg")
        if not images[-1].is_file():
            report.problems.append(f"{split.stem}: no image {images.pop()}")
        xml = year / "Annotations" / f"{image_id}.xml"
        try:
            objects = ElementTree.parse(xml).getroot().findall("object")
            for o in objects:
                per_class[o.findtext("name", "?").strip()] += 1
                difficult += o.findtext("difficult", "0").strip() == "1"
                x0, y0, x1, y1 = (float(o.findtext(f"bndbox/{k}", "nan")) for k in ("xmin", "ymin", "xmax", "ymax"))
                empty += not (x1 > x0 and y1 > y0)
        except FileNotFoundError:
            report.problems.append(f"{split.stem}: no annotation {xml}")
        except (ElementTree.ParseError, ValueError) as error:
            report.problems.append(f"{split.stem}: cannot read {xml}: {error}")
    report.counts(f"{year.name} {split.stem}", len(ids), per_class, unit="boxes")
    report.say(f"  {difficult} difficult, {empty} boxes without extent (dropped)")
    if options.deep:
        _open_all(images, report)


CHECKS: dict[str, Callable[[Path, Report, Options], None]] = {
    **{name: partial(check_torchvision, name=name) for name in KNOWN},
    "imagefolder": check_image_folder,
    "list": check_list,
    "coco": check_coco,
    "voc": check_voc,
}


def check(name: str, root: str | Path, options: Options | None = None) -> Report:
    """What is in `root`, read as the data set `name` (a key of CHECKS, else ValueError)."""
    if name not in CHECKS:
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(CHECKS)}")
    report = Report()
    try:
        path = data_root(root)
    except (FileNotFoundError, ValueError) as error:
        report.problems.append(str(error))
        return report
    report.say(f"{name} in {path}")
    CHECKS[name](path, report, options or Options())
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m common.data.check", description="What a data folder holds.")
    parser.add_argument("set", choices=CHECKS)
    parser.add_argument("root")
    parser.add_argument("--deep", action="store_true", help="open every image")
    parser.add_argument("--list", action="append", type=Path, default=[], help="a list file (set `list`)")
    parser.add_argument("--strip-prefix", help="removed from the front of the listed paths (set `list`)")
    given = parser.parse_args(arguments)
    report = check(given.set, given.root, Options(given.deep, given.list, given.strip_prefix))
    print(report.text(LAYOUTS[given.set]))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
