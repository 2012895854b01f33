"""Boxes on one's own images, as a table, as pictures and as COCO results.

python predict.py weights=runs/default/drd/seed0/last.ckpt images=photos/ pictures=boxes
python predict.py weights=detr-r50.pth images=/datasets/coco/val2017 coco=results.json batch_size=8
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from common.data.files import ORIENTATION, ImageStream, Table, find_images, open_image, output_names, read_json
from common.scripts import script
from q_detr.checkpoint import label_names, load
from q_detr.data import normalise, resize_for_test
from q_detr.detr import pad_images
from q_detr.set_prediction import postprocess

COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf")
# Where a point of the upright image of size (w, h) lies in the stored one, by EXIF orientation.
STORED: dict[int, Callable[[float, float, int, int], tuple[float, float]]] = {
    2: lambda x, y, w, h: (w - x, y), 3: lambda x, y, w, h: (w - x, h - y), 4: lambda x, y, w, h: (x, h - y),
    5: lambda x, y, w, h: (y, x), 6: lambda x, y, w, h: (y, w - x), 7: lambda x, y, w, h: (h - y, w - x),
    8: lambda x, y, w, h: (h - y, x),
}  # fmt: skip


def transform(image: Image.Image, about: Mapping[str, Any]) -> tuple[Tensor, tuple[int, int]]:
    """(what the network sees of a picture, its height and width), as `about` of a checkpoint says."""
    tensor = normalise(pil_to_tensor(image), **about["normalise"])
    return resize_for_test(tensor, about["size"], about["longest"]), (image.height, image.width)


def detect(
    fabric: Fabric, network: Any, about: Mapping[str, Any], images: Sequence[tuple[Tensor, tuple[int, int]]]
) -> list[dict[str, Tensor]]:
    """{"scores", "labels", "boxes" xyxy in pixels} of every image on the CPU, the surest first, classes only."""
    batch, mask = pad_images([image for image, _ in images])
    sizes = torch.tensor([size for _, size in images], device=fabric.device)
    found = postprocess(network(batch.to(fabric.device), mask.to(fabric.device)), sizes, loss=about["loss"])
    classes, rows = torch.tensor(list(label_names(about))), []
    for p in ({k: v.cpu() for k, v in p.items()} for p in found):
        order = p["scores"].argsort(descending=True)
        order = order[torch.isin(p["labels"][order], classes)]  # gaps between category ids, and SMCA's last channel
        rows.append({k: v[order] for k, v in p.items()})
    return rows


def draw(image: Image.Image, rows: list[dict], colours: Mapping[str, str]) -> Image.Image:
    """The image with a frame and "label score" per detection, the surest on top; small images are enlarged first."""
    factor = max(1, round(400 / min(image.size)))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    for row in sorted(rows, key=lambda r: r["score"]):
        x0, y0, x1, y1 = (factor * row[k] for k in ("x0", "y0", "x1", "y1"))
        colour = colours[row["label"]]
        if x1 < x0 or y1 < y0:
            continue
        pen.rectangle((x0, y0, x1, y1), outline=colour, width=2)
        text, at = f"{row['label']} {row['score']:.2f}", (max(x0, 0) + 3, max(y0, 0) + 2)
        pen.rectangle(pen.textbbox(at, text), fill=colour)
        pen.text(at, text, fill="white")
    return image


def image_ids(paths: Sequence[Path], ids: str | None) -> dict[Path, int]:
    """The COCO id of every image: of an instances file by file name, otherwise the whole number that its name is.

    ValueError for an image without an id, and for two with one."""
    if ids is None:
        found = {p: int(p.stem) if p.stem.isdecimal() else None for p in paths}
    else:
        names = {Path(i["file_name"]).name: i["id"] for i in read_json(Path(ids).expanduser())["images"]}
        found = {p: names.get(p.name) for p in paths}
    if none := [p for p, i in found.items() if i is None]:
        where = f"{ids} does not name it" if ids else "its name is no whole number; give ids=<instances json>"
        raise ValueError(f"coco=: no image id for {none[0]} and {len(none) - 1} more: {where}")
    if len(set(found.values())) < len(found):
        raise ValueError("coco=: two images have the same id; give one folder of the set")
    return {p: i for p, i in found.items() if i is not None}


def stored_box(box: Sequence[float], path: Path, size: tuple[int, int]) -> list[float]:
    """xyxy of the upright image of (height, width) `size` -> xywh in the image as it is stored, where annotations are."""
    with Image.open(path) as image:
        turn = STORED.get(image.getexif().get(ORIENTATION, 1), lambda x, y, w, h: (x, y))
    corners = [turn(x, y, size[1], size[0]) for x, y in (box[:2], box[2:])]
    (x0, x1), (y0, y1) = (sorted(v) for v in zip(*corners, strict=True))
    return [round(v, 3) for v in (x0, y0, x1 - x0, y1 - y0)]


class Results:
    """COCO results, written as they come: [{"image_id", "category_id", "bbox" xywh, "score"}, ...]."""

    def __init__(self, out: str, paths: Sequence[Path], ids: str | None, about: Mapping[str, Any]):
        if not out.endswith(".json"):
            raise ValueError(f"coco={out}: give a name that ends in .json")
        self.ids, self.table = image_ids(paths, ids), Table(out)
        self.category = dict(zip(label_names(about), about["category_ids"], strict=True))

    def write(self, path: Path, found: Mapping[str, Tensor], size: tuple[int, int]) -> None:
        for box, label, score in zip(*(found[k].tolist() for k in ("boxes", "labels", "scores")), strict=True):
            self.table.write({
                "image_id": self.ids[path], "category_id": self.category[label], "bbox": stored_box(box, path, size),
                "score": round(score, 6),
            })  # fmt: skip


def rows_of(path: Path, found: Mapping[str, Tensor], names: Mapping[int, str], *, threshold: float, top: int | None):
    """The rows of the table of one image."""
    rows = []
    for box, label, score in zip(*(found[k].tolist() for k in ("boxes", "labels", "scores")), strict=True):
        if score >= threshold:
            corners = dict(zip(("x0", "y0", "x1", "y1"), (round(v, 1) for v in box), strict=True))
            rows.append({"path": path, "label": names[label], "score": round(score, 4), **corners})
    return rows[:top]


@torch.no_grad()
def predict(cfg: DictConfig, fabric: Fabric) -> Path:
    """Writes cfg.out and what else is asked for, and returns its path; see configs/predict.yaml."""
    if not 0 <= cfg.threshold <= 1 or (cfg.ids and not cfg.coco):
        raise ValueError(f"threshold={cfg.threshold}, allowed: 0..1; ids= belongs to coco=<file>.json")
    network, _, about = load(cfg.weights)
    paths, table, names = find_images(cfg.images), Table(cfg.out), label_names(about)
    results = Results(cfg.coco, paths, cfg.ids, about) if cfg.coco else None
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(about["classes"])}
    network, pictures = fabric.setup_module(network), output_names(paths)
    folder = Path(cfg.pictures).expanduser() if cfg.pictures else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    stream = ImageStream(paths, lambda image: transform(image, about), batch_size=cfg.batch_size, workers=cfg.workers)
    without = 0
    with table, results.table if results else contextlib.nullcontext():
        for files, images in stream:
            for path, found, (_, size) in zip(files, detect(fabric, network, about, images), images, strict=True):
                rows = rows_of(path, found, names, threshold=cfg.threshold, top=cfg.top)
                without += not rows
                for row in rows:
                    table.write(row)
                if results is not None:
                    results.write(path, found, size)
                if folder is not None:
                    draw(open_image(path), rows, colours).save(folder / f"{pictures[path]}.png")
    print(
        f"{stream.done} images, {table.rows} detections of at least {cfg.threshold}: {table.out}; {without} images without one"
    )
    stream.finish()
    return table.out


main = script("predict", predict)


if __name__ == "__main__":
    main()
