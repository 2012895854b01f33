"""COCO-json and Pascal-VOC detection folders with one kind of target.

Item: (image, target). image: uint8 (3, H, W), RGB, a torchvision tv_tensor. target:
boxes float32 (n, 4) xyxy in pixels of the image, 0-based, x1/y1 exclusive (a tv_tensor, so that
torchvision.transforms.v2 moves boxes with the image); labels int64 (n,); image_id int; area float32 (n,) of
the original annotation; iscrowd int64 (n,); difficult int64 (n,); size int64 (2,) original height and
width. Boxes are clamped to the image; boxes without extent are dropped and counted in `dropped`.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from common.data.files import identity, is_image, open_image, read_json, read_lines, readable
from common.data.shapes import ShapeScenes, shape_scenes
from common.data.vision import data_root

SETS = ("scenes", "coco", "voc")

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


class DetectionSet(Dataset):
    """Images of a folder with the annotations of a COCO dict.

    coco: {"images", "annotations", "categories"}; the evaluator of common.metrics takes `self.coco`.
    labels: "ids", the category ids as they are (COCO's reach 90, with gaps: a model needs 91 classes), or
    "contiguous", 0..C-1 in the order of the ids; `category_ids[label]` maps back, `classes[label]` names.
    keep_crowd=False leaves out crowd regions (usual in training). transform: (image, target) -> (image,
    target). left_out: images that broken_images=skip left out.
    """

    left_out = 0

    def __init__(
        self,
        folder: Path,
        coco: dict[str, Any],
        *,
        labels: str = "ids",
        keep_crowd: bool = True,
        transform: Callable | None = None,
    ):
        if labels not in ("ids", "contiguous"):
            raise ValueError(f"labels must be 'ids' or 'contiguous', got {labels!r}")
        # Null flags, which some tools write, are none; a null area is that of the box.
        flags = ({k: int(a.get(k) or 0) for k in ("iscrowd", "difficult") if k in a} for a in coco["annotations"])
        areas = (
            {"area": a["bbox"][2] * a["bbox"][3]} if "area" in a and a["area"] is None else {}
            for a in coco["annotations"]
        )
        annotations = [a | f | area for a, f, area in zip(coco["annotations"], flags, areas, strict=True)]
        coco = {**coco, "annotations": annotations}
        self.folder, self.coco, self.labels, self.transform = folder, coco, labels, transform
        for what in ("images", "annotations", "categories"):
            _unique(what, [entry["id"] for entry in coco[what] if what != "annotations" or "id" in entry])
        categories = sorted(coco["categories"], key=lambda c: c["id"])
        self.category_ids: list[int] = [c["id"] for c in categories]
        self.classes: list[str] = [c["name"] for c in categories]
        number = {c: i if labels == "contiguous" else c for i, c in enumerate(self.category_ids)}
        self.infos: list[dict] = sorted(coco["images"], key=lambda i: i["id"])
        for info in self.infos:
            if not (info.get("width") and info.get("height")):  # left out by some tools, or 0
                info["width"], info["height"] = _stored_size(folder / info["file_name"])
        if not self.infos:
            raise ValueError(f"the annotations for {folder} name no image")
        self.dropped = 0
        sizes = {i["id"]: (i["width"], i["height"]) for i in self.infos}
        rows: dict[int, list[tuple]] = {i["id"]: [] for i in self.infos}
        for a in coco["annotations"]:
            if a["image_id"] not in rows or a["category_id"] not in number:
                raise ValueError(
                    f"annotation {a.get('id')} names image {a['image_id']}, category {a['category_id']}: "
                    "not in the file"
                )
            box = _clamped(a["bbox"], *sizes[a["image_id"]], where=f"annotation {a.get('id')}")
            if box is None:
                self.dropped += 1
            elif keep_crowd or not a.get("iscrowd"):
                area = a["bbox"][2] * a["bbox"][3] if a.get("area") is None else float(a["area"])
                flags = int(a.get("iscrowd") or 0), int(a.get("difficult") or 0)
                rows[a["image_id"]].append((box, number[a["category_id"]], area, *flags))
        self._rows = rows

    def __len__(self) -> int:
        return len(self.infos)

    def __getitem__(self, index: int):
        image, target = self.image(index), self.target(index)
        return (image, target) if self.transform is None else self.transform(image, target)

    def target(self, index: int) -> dict[str, Any]:
        """The annotations alone, without reading the image; no transform."""
        info = self.infos[index]
        h, w = info["height"], info["width"]
        rows = self._rows[info["id"]]
        boxes, labels, area, iscrowd, difficult = zip(*rows, strict=True) if rows else ((), (), (), (), ())
        canvas = tv_tensors.BoundingBoxes(  # type: ignore[call-overload]
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), format="XYXY", canvas_size=(h, w)
        )
        return {
            "boxes": canvas,
            "labels": torch.tensor(labels, dtype=torch.int64),
            "image_id": info["id"],
            "area": torch.tensor(area, dtype=torch.float32),
            "iscrowd": torch.tensor(iscrowd, dtype=torch.int64),
            "difficult": torch.tensor(difficult, dtype=torch.int64),
            "size": torch.tensor([h, w]),
        }

    def identity(self) -> dict[str, Any]:
        """What the set is, see `common.data.files.identity`; {} for generated scenes."""
        paths = [self.folder / i["file_name"] for i in self.infos]
        boxes = sum(map(len, self._rows.values()))
        return identity("detection", paths, root=self.folder, boxes=boxes, left_out=self.left_out)

    def image(self, index: int) -> tv_tensors.Image:
        """The image alone, uint8 RGB (3, H, W). ValueError if its size is not the annotated one."""
        info = self.infos[index]
        path, size = self.folder / info["file_name"], (info["height"], info["width"])
        image = tv_tensors.Image(pil_to_tensor(open_image(path, upright=False)))
        if tuple(image.shape[-2:]) != size:
            found = f"{image.shape[-2]}x{image.shape[-1]} (height x width)"
            raise ValueError(f"{path} is {found}, annotated as {size[0]}x{size[1]}")
        return image


class Scenes(DetectionSet):
    """Generated scenes in memory as a `DetectionSet` with contiguous labels."""

    def __init__(self, scenes: ShapeScenes):
        super().__init__(Path(), scenes.coco, labels="contiguous")
        images = {i["id"]: image for i, image in zip(scenes.coco["images"], scenes.images, strict=True)}
        self._images = [images[i["id"]] for i in self.infos]

    def identity(self) -> dict[str, Any]:
        return {}

    def image(self, index: int) -> tv_tensors.Image:
        return tv_tensors.Image(torch.from_numpy(self._images[index]).permute(2, 0, 1))


def _unique(what: str, ids: list) -> None:
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise ValueError(f"{what} with one id: {twice} stands there twice")


def _stored_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image file as it is stored."""
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: its annotation gives no size, and the file cannot be read: {error}") from error


def _clamped(bbox: Sequence[float], width: int, height: int, *, where: str) -> list[float] | None:
    """xywh -> xyxy inside the image, or None when nothing of it is left."""
    if len(bbox) != 4 or not all(math.isfinite(v) for v in bbox):
        raise ValueError(f"{where}: bbox must be four finite numbers x, y, w, h, got {bbox}")
    x, y, w, h = bbox
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    return [x0, y0, x1, y1] if x1 > x0 and y1 > y0 else None


def coco_detection(root: str | Path | None, split: str, **options) -> DetectionSet:
    """root/annotations/instances_<split>.json with the images in root/<split>/ or root/images/<split>/.

    options: those of DetectionSet. Raises FileNotFoundError with the layout, ValueError for a file that is
    not COCO.
    """
    path = data_root(root)
    file = path / "annotations" / f"instances_{split}.json"
    layout = f"expected annotations/instances_{split}.json and {split}/*.jpg (or images/{split}/) under {path}"
    if not file.is_file():
        raise FileNotFoundError(f"no {file}; {layout}. COCO: https://cocodataset.org/#download")
    # A subset file (instances_val2017_small.json) may share the folder of its full set.
    stems = dict.fromkeys([split, split.rsplit("_", 1)[0]])
    folders = [path / top / stem for stem in stems for top in ("", "images")]
    folder = next((f for f in folders if f.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"no image folder {folders[0]} or {folders[1]}; {layout}")
    content = read_json(file)
    try:
        content, left_out = _readable(folder, content)
        found = DetectionSet(folder, content, **options)
        found.left_out = left_out
        return found
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        if isinstance(error, TypeError) and "unexpected keyword" in str(error):
            raise
        raise ValueError(f"{file} is not a COCO instances file (images, annotations, categories): {error!r}") from error


def voc_detection(
    root: str | Path | None, split: str, *, classes: Sequence[str] = VOC_CLASSES, **options
) -> DetectionSet:
    """One VOC folder (VOCdevkit/VOC2007, or any with Annotations/, ImageSets/Main/<split>.txt, JPEGImages/).

    Labels are 0..C-1 in the order of `classes`. VOC pixels are 1-based and inclusive: box = (xmin - 1, ymin
    - 1, xmax, ymax). image_id counts the lines of the split from 1; an annotation keeps its `difficult`
    flag, iscrowd is 0. A box with xmax <= xmin or ymax <= ymin is dropped and counted. VOC 07+12 is a
    ConcatDataset of two of these.
    Raises FileNotFoundError with the layout; ValueError naming the file for an unknown class or a broken XML.
    """
    path = data_root(root)
    listed = path / "ImageSets" / "Main" / f"{split}.txt"
    if not listed.is_file():
        have = ", ".join(sorted(f.stem for f in listed.parent.glob("*.txt") if "_" not in f.stem)) or "none"
        raise FileNotFoundError(
            f"no {listed} (splits there: {have}); expected Annotations/*.xml, ImageSets/Main/{split}.txt and "
            f"JPEGImages/*.jpg under {path}, for instance .../VOCdevkit/VOC2007"
        )
    number = {name: i for i, name in enumerate(classes)}
    images, annotations, degenerate = [], [], 0
    pictures = _by_stem(path / "JPEGImages")
    for image_id, stem in enumerate(voc_stems(listed), 1):
        xml = path / "Annotations" / f"{stem}.xml"
        try:
            file_name = pictures.get(stem, f"{stem}.jpg")
            info, objects = _read_voc(xml, number, path / "JPEGImages" / file_name)
        except FileNotFoundError:
            raise FileNotFoundError(f"no annotation {xml}, listed in {listed}") from None
        except (ElementTree.ParseError, ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {xml}: {error}") from error
        images.append({"id": image_id, "file_name": file_name, **info})
        for o in objects:
            if min(o["bbox"][2:]) <= 1:  # inclusive corners: one pixel wide or less means xmax <= xmin
                degenerate += 1
                continue
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "iscrowd": 0, **o})
    categories = [{"id": i, "name": name} for i, name in enumerate(classes)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    coco, left_out = _readable(path / "JPEGImages", coco)
    data = DetectionSet(path / "JPEGImages", coco, **options)
    data.dropped += degenerate
    data.left_out = left_out
    return data


def _readable(folder: Path, coco: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The annotations without the images that `broken_images=skip` leaves out, and how many those are."""
    images = coco["images"]
    good = readable([folder / i["file_name"] for i in images])
    if len(good) == len(images):
        return coco, 0
    kept = [images[i] for i in good]
    ids = {i["id"] for i in kept}
    of_others = {i["id"] for i in images} - ids
    return {
        **coco, "images": kept, "annotations": [a for a in coco["annotations"] if a["image_id"] not in of_others]
    }, len(images) - len(good)  # fmt: skip


def voc_stems(listed: Path) -> list[str]:
    """The names without ending that a split lists, one a line; a second column of a class list (1, 0, -1) is left out, and an
    ending (.jpg) as well. ValueError for a name that stands there twice."""
    stems = []
    for _, line in read_lines(listed):
        head, _, last = line.rpartition(" ")
        stem = head.strip() if head and last in ("1", "0", "-1") else line
        stems.append(stem.rpartition(".")[0] if is_image(Path(stem)) else stem)
    if twice := [s for s, n in Counter(stems).items() if n > 1]:
        raise ValueError(f"{listed}: {twice[0]} is listed twice")
    return stems


def _by_stem(folder: Path) -> dict[str, str]:
    """{name without ending: file name} of the images in a folder; .jpg before other endings."""
    if not folder.is_dir():
        return {}
    files = sorted((p for p in folder.iterdir() if is_image(p)), key=lambda p: p.suffix.lower() != ".jpg", reverse=True)
    return {p.stem: p.name for p in files}


def _read_voc(xml: Path, number: dict[str, int], picture: Path) -> tuple[dict[str, int], list[dict[str, Any]]]:
    root = ElementTree.parse(xml).getroot()
    sizes = [(root.findtext(f"size/{key}") or "").strip() for key in ("width", "height")]
    width, height = (round(float(s)) if s else 0 for s in sizes)
    if not width or not height:
        width, height = _stored_size(picture)
    objects = []
    for o in root.iter("object"):
        name = _text(o, "name")
        if name not in number:
            raise ValueError(f"unknown class {name!r}; classes are {', '.join(number)}")
        x0, y0, x1, y1 = (float(_text(o, f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax"))
        if not all(map(math.isfinite, (x0, y0, x1, y1))):
            raise ValueError(f"box {x0}, {y0}, {x1}, {y1} of {name} is not finite")
        w, h = x1 - x0 + 1, y1 - y0 + 1
        difficult = (o.findtext("difficult") or "0").strip().lower()
        if difficult not in ("0", "1", "", "false", "true", "unspecified"):
            raise ValueError(f"difficult={difficult!r} of {name}, allowed: 0, 1")
        flag = int(difficult in ("1", "true"))
        objects.append({"category_id": number[name], "bbox": [x0 - 1, y0 - 1, w, h], "area": w * h, "difficult": flag})
    return {"width": width, "height": height}, objects


def _text(node: ElementTree.Element, tag: str) -> str:
    value = node.findtext(tag)
    if value is None or not value.strip():
        raise ValueError(f"no <{tag}>")
    return value.strip()


def collate(batch: Sequence[tuple[Any, dict]]) -> tuple[list, list[dict]]:
    """Lists of images (sizes differ) and of targets, for DataLoader(collate_fn=collate)."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def detection_sets(
    *, name: str, seed: int, root: str | None = None, train: int | str, test: int | str, side: int = 96, max_shapes: int = 4,
    labels: str = "contiguous", voc_train: Sequence[str] = ("VOC2007", "VOC2012"), voc_test: str = "VOC2007",
    classes: Sequence[str] | None = None,
) -> tuple[DetectionSet | ConcatDataset, DetectionSet]:  # fmt: skip
    """(training set, test set) of a configuration.

    scenes: `train` and `test` are numbers of generated images of `side` pixels with at most max_shapes. coco:
    root/annotations/instances_<split>.json for the splits `train`, `test`; crowd regions are no training data. voc:
    root/<folder>/ for each folder of voc_train, and voc_test ("." for a root that is such a folder itself), with the splits;
    classes: their names, None for the twenty of Pascal VOC. labels: see DetectionSet; "ids" for coco only.
    ValueError, FileNotFoundError name what is wrong.
    """
    if name not in SETS:
        raise ValueError(f"data.name={name!r}, allowed: {', '.join(SETS)}")
    if name != "coco" and labels != "contiguous":
        raise ValueError(f"data.labels={labels!r}: {name} has contiguous labels only")
    if name == "scenes":
        options: dict[str, Any] = {"sizes": (side,), "max_shapes": max_shapes}
        training = Scenes(shape_scenes(int(train), seed=2 * seed, **options))
        return training, Scenes(shape_scenes(int(test), seed=2 * seed + 1, **options))
    if name == "coco":
        training = coco_detection(root, str(train), labels=labels, keep_crowd=False)
        held_out = coco_detection(root, str(test), labels=labels)
        if training.category_ids != held_out.category_ids:
            raise ValueError(f"the splits {train} and {test} under {root} have different categories")
        return training, held_out
    base, names = data_root(root), VOC_CLASSES if classes is None else tuple(classes)
    parts = [voc_detection(base / f, str(train), classes=names, labels="contiguous") for f in voc_train]
    return ConcatDataset(parts), voc_detection(base / voc_test, str(test), classes=names, labels="contiguous")


class TorchvisionDetection(Dataset):
    """A training set as torchvision's detectors take it, with random horizontal flips of image and boxes.

    Images float 0..1, labels from 1 (0 is the background), no difficult and no crowd objects."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.flip = dataset, v2.RandomHorizontalFlip()

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, target = self.flip(*self.dataset[index])
        keep = (target["difficult"] == 0) & (target["iscrowd"] == 0)
        boxes = torch.as_tensor(target["boxes"]).as_subclass(Tensor)[keep]
        return image.as_subclass(Tensor).float() / 255, {"boxes": boxes, "labels": target["labels"][keep] + 1}


def ground_truth(dataset: DetectionSet) -> dict[int, dict[str, Tensor]]:
    """{image id: boxes (n, 4) xyxy, labels (n,), difficult (n,), iscrowd (n,)} of a test set."""
    items = (dataset.target(i) for i in range(len(dataset)))
    return {t["image_id"]: {k: t[k] for k in ("boxes", "labels", "difficult", "iscrowd")} for t in items}
