"""Procedural detection scenes, as COCO json in memory, on disk, and as a Pascal VOC folder."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.data.backgrounds import PHOTOGRAPHS, cloud_noise, photo_crops

SHAPES = ("rectangle", "ellipse", "triangle")
CHUNK = 128  # images painted together, small enough to stay in cache


@dataclass(frozen=True, eq=False)
class ShapeScenes:
    """images: uint8 (H, W, 3) arrays; coco: the dict of a COCO instances file (bbox xywh, 0-based)."""

    images: list[np.ndarray]
    coco: dict[str, Any]

    def __len__(self) -> int:
        return len(self.images)

    def write_coco(self, root: str | Path, split: str = "train") -> Path:
        """Writes root/<split>/<file_name>.png and root/annotations/instances_<split>.json (returned)."""
        folder, notes = Path(root) / split, Path(root) / "annotations"
        folder.mkdir(parents=True, exist_ok=True)
        notes.mkdir(parents=True, exist_ok=True)
        for image, info in zip(self.images, self.coco["images"], strict=True):
            Image.fromarray(image).save(folder / info["file_name"])
        file = notes / f"instances_{split}.json"
        file.write_text(json.dumps(self.coco))
        return file


def shape_scenes(
    n: int,
    *,
    seed: int = 0,
    sizes: Sequence[int] = (48, 64, 80, 96),
    square: float = 0.75,
    max_shapes: int = 4,
    empty: float = 0.05,
    overlap: float = 0.2,
    background: str = "noise",
) -> ShapeScenes:
    """Scenes of 1..max_shapes rectangles, ellipses and triangles of random colour and size on textured noise.

    sizes: sides to choose from; a share `square` of the images is square, the others draw both sides.
    empty: share of images without a shape. A shape spans 20 to 50 % of the shorter side, and a new one
    covers at most the share `overlap` of the smaller of two boxes; one that finds no room in 16 tries is
    left out. Boxes are the extent of the drawn pixels, area counts them (as if nothing lay in front).
    background: "noise" or "photos" (library photographs). Colour and size are independent of the class;
    category ids are 1, 2, 3 (SHAPES).
    Exercises: localisation, matching, non-square batches, images without objects, COCO areas. Cannot show:
    many classes, crowds, large scale changes, natural appearance.
    Raises ValueError for a parameter out of range.
    """
    sides = sorted({int(s) for s in sizes})
    if n < 1 or max_shapes < 1 or not sides or sides[0] < 24:
        raise ValueError(f"needs n >= 1, max_shapes >= 1, sizes >= 24; got {n=}, {max_shapes=}, {sizes=}")
    for name, share in (("square", square), ("empty", empty), ("overlap", overlap)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be in 0..1, got {share}")
    if background not in ("noise", "photos"):
        raise ValueError(f"background must be 'noise' or 'photos', got {background!r}")
    rng = np.random.default_rng(seed)
    height = rng.choice(sides, size=n)
    width = np.where(rng.random(n) < square, height, rng.choice(sides, size=n))
    count = np.where(rng.random(n) < empty, 0, rng.integers(1, max_shapes + 1, size=n))

    images: list[Any] = [None] * n
    objects: list[list[tuple[int, list[float], float]]] = [[] for _ in range(n)]
    for h, w in sorted(set(zip(height.tolist(), width.tolist(), strict=True))):
        members = np.flatnonzero((height == h) & (width == w))
        for start in range(0, len(members), CHUNK):
            rows = members[start : start + CHUNK]
            painted, found = _paint(h, w, count[rows], overlap, background, rng)
            for i, image, objects_of_image in zip(rows, painted, found, strict=True):
                images[i], objects[i] = image, objects_of_image

    infos = [
        {"id": i + 1, "file_name": f"{i + 1:06d}.png", "height": int(height[i]), "width": int(width[i])}
        for i in range(n)
    ]
    annotations = [
        {"image_id": i + 1, "category_id": kind + 1, "bbox": box, "area": area, "iscrowd": 0}
        for i, found in enumerate(objects)
        for kind, box, area in found
    ]
    for k, annotation in enumerate(annotations, 1):  # ids from 1: pycocotools takes 0 for "not matched"
        annotation["id"] = k
    categories = [{"id": k, "name": name, "supercategory": "shape"} for k, name in enumerate(SHAPES, 1)]
    return ShapeScenes(images, {"images": infos, "annotations": annotations, "categories": categories})


def _paint(h: int, w: int, count: np.ndarray, overlap: float, background: str, rng: np.random.Generator):
    """Images uint8 (n, h, w, 3) and, per image, its (kind, [x, y, w, h], area)."""
    n, slots = len(count), int(count.max(initial=0))
    if background == "noise":
        canvas = cloud_noise(n, (h, w), rng)
    else:
        canvas = photo_crops(rng.integers(len(PHOTOGRAPHS), size=n), (h, w), rng)
    canvas = (canvas * 255).astype(np.uint8)
    kinds = rng.integers(len(SHAPES), size=(n, slots))
    colours = _colours(rng, n * slots).reshape(n, slots, 3)
    boxes, placed = _place(h, w, count, slots, overlap, rng)
    found: list[list[tuple[int, list[float], float]]] = [[] for _ in range(n)]
    columns = np.arange(w, dtype=np.int16)
    for slot in range(slots):
        rows = np.flatnonzero(placed[:, slot])
        if not len(rows):
            continue
        left, right = _spans(kinds[rows, slot], boxes[rows, slot], h, rng)
        inside = (columns >= left[:, :, None]) & (columns < right[:, :, None])
        part = canvas[rows]
        np.copyto(part, colours[rows, slot][:, :, None, None], where=inside[:, None])
        canvas[rows] = part
        filled = right > left
        area = np.where(filled, right - left, 0).sum(axis=1)
        top, bottom = filled.argmax(axis=1), h - filled[:, ::-1].argmax(axis=1)
        x0, x1 = np.where(filled, left, w).min(axis=1), np.where(filled, right, 0).max(axis=1)
        for i, *values in zip(rows, kinds[rows, slot], x0, top, x1 - x0, bottom - top, area, strict=True):
            kind, x, y, bw, bh, pixels = (int(v) for v in values)
            found[i].append((kind, [float(x), float(y), float(bw), float(bh)], float(pixels)))
    return np.ascontiguousarray(canvas.transpose(0, 2, 3, 1)), found


def _place(h: int, w: int, count: np.ndarray, slots: int, overlap: float, rng: np.random.Generator):
    """Boxes (n, slots, 4) as x0, y0, x1, y1, and which of them are used; greedy, 16 proposals each."""
    n, tries = len(count), 16
    boxes, placed = np.zeros((n, slots, 4)), np.zeros((n, slots), dtype=bool)
    for slot in range(slots):
        extent = rng.uniform(0.2, 0.5, (n, tries, 2)) * min(h, w)
        corner = rng.random((n, tries, 2)) * (np.array([w, h]) - extent)
        new = np.concatenate([corner, corner + extent], axis=2)[:, :, None]
        old = boxes[:, None, :slot]
        shared = np.minimum(new[..., 2:], old[..., 2:]) - np.maximum(new[..., :2], old[..., :2])
        smaller = np.minimum(_area(new), _area(old))
        collides = (shared.clip(0).prod(axis=-1) > overlap * smaller) & placed[:, None, :slot]
        free = ~collides.any(axis=2)
        boxes[:, slot] = new[np.arange(n), free.argmax(axis=1), 0]
        placed[:, slot] = free.any(axis=1) & (slot < count)
    return boxes, placed


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _spans(kinds: np.ndarray, boxes: np.ndarray, h: int, rng: np.random.Generator):
    """First and one-past-last column of each shape on each image row, (n, h) int16 each.

    A pixel belongs to a shape when its centre does.
    """
    x0, y0, x1, y1 = (boxes[:, i : i + 1] for i in range(4))
    y = np.arange(h) + 0.5
    depth = (y - y0) / (y1 - y0)  # 0 at the top of the box, 1 at its bottom
    bulge = np.sqrt(np.clip(1 - (2 * depth - 1) ** 2, 0, None)) / 2
    apex = rng.uniform(0.2, 0.8, (len(boxes), 1))
    low = np.choose(kinds[:, None], [np.zeros_like(depth), 0.5 - bulge, apex * (1 - depth)])
    high = np.choose(kinds[:, None], [np.ones_like(depth), 0.5 + bulge, apex + (1 - apex) * depth])
    inside = (depth >= 0) & (depth < 1)
    left = np.ceil(x0 + low * (x1 - x0) - 0.5)
    right = np.where(inside, np.ceil(x0 + high * (x1 - x0) - 0.5), left)
    return left.astype(np.int16), right.astype(np.int16)


def _colours(rng: np.random.Generator, n: int) -> np.ndarray:
    """Saturated random colours (n, 3) uint8: one channel high, one low, one anywhere."""
    levels = np.stack([rng.integers(190, 256, n), rng.integers(0, 60, n), rng.integers(0, 256, n)], axis=1)
    return rng.permuted(levels, axis=1).astype(np.uint8)


def coco_to_voc(root: str | Path, target: str | Path, split: str = "train") -> Path:
    """Rewrites root/annotations/instances_<split>.json and root/<split>/ as a Pascal VOC folder; returns it.

    target/Annotations/*.xml, target/ImageSets/Main/<split>.txt, target/JPEGImages/*.jpg (quality 95: the
    pixels are no longer exactly those of the source). VOC coordinates are 1-based and inclusive: xmin = x +
    1, xmax = x + w. `difficult` is 1 where the COCO annotation has difficult or iscrowd set.
    Raises FileNotFoundError without the json.
    """
    source, out = Path(root), Path(target)
    file = source / "annotations" / f"instances_{split}.json"
    if not file.is_file():
        raise FileNotFoundError(f"no {file}")
    coco = json.loads(file.read_text())
    names = {c["id"]: c["name"] for c in coco["categories"]}
    objects: dict[int, list[dict]] = {info["id"]: [] for info in coco["images"]}
    for annotation in coco["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    stems = []
    for info in coco["images"]:
        stem = Path(info["file_name"]).stem
        stems.append(stem)
        with Image.open(source / split / info["file_name"]) as image:
            image.convert("RGB").save(out / "JPEGImages" / f"{stem}.jpg", quality=95, subsampling=0)
        xml = _voc_xml(f"{stem}.jpg", info, objects[info["id"]], names)
        ElementTree.ElementTree(xml).write(out / "Annotations" / f"{stem}.xml")
    (out / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{s}\n" for s in stems))
    return out


def _voc_xml(name: str, info: dict, objects: list[dict], names: dict[int, str]) -> ElementTree.Element:
    def add(parent: ElementTree.Element, tag: str, value: object = None) -> ElementTree.Element:
        child = ElementTree.SubElement(parent, tag)
        child.text = None if value is None else str(value)
        return child

    root = ElementTree.Element("annotation")
    add(root, "filename", name)
    size = add(root, "size")
    for tag, value in (("width", info["width"]), ("height", info["height"]), ("depth", 3)):
        add(size, tag, value)
    for o in objects:
        x, y, w, h = o["bbox"]
        node = add(root, "object")
        add(node, "name", names[o["category_id"]])
        add(node, "truncated", 0)
        add(node, "difficult", int(bool(o.get("difficult", 0) or o.get("iscrowd", 0))))
        box = add(node, "bndbox")
        for tag, value in (("xmin", x + 1), ("ymin", y + 1), ("xmax", x + w), ("ymax", y + h)):
            add(box, tag, f"{value:g}" if value == int(value) else f"{value:.2f}")
    return root
