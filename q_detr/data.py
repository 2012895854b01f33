"""Detection data for DETR: generated scenes, COCO json and Pascal VOC folders; targets as the set loss wants them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2

from common.data.detection import VOC_CLASSES, DetectionSet, coco_detection, voc_detection
from common.data.shapes import ShapeScenes, shape_scenes
from common.data.vision import data_root
from common.metrics.detection import CocoEvaluator, voc_map

SETS = ("scenes", "coco", "voc")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Scenes(Dataset):
    """Generated scenes in memory, the same items as `common.data.detection.DetectionSet` with contiguous labels."""

    dropped = 0

    def __init__(self, scenes: ShapeScenes):
        self.images, self.coco = scenes.images, scenes.coco
        categories = sorted(self.coco["categories"], key=lambda c: c["id"])
        self.category_ids = [c["id"] for c in categories]
        self.classes = [c["name"] for c in categories]
        self.infos = self.coco["images"]
        self._objects: dict[int, list[dict]] = {i["id"]: [] for i in self.infos}
        for a in self.coco["annotations"]:
            self._objects[a["image_id"]].append(a)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        info = self.infos[index]
        objects = self._objects[info["id"]]
        corners = torch.tensor([o["bbox"] for o in objects], dtype=torch.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        size = (info["height"], info["width"])
        none = torch.zeros(len(objects), dtype=torch.int64)
        return tv_tensors.Image(torch.from_numpy(self.images[index]).permute(2, 0, 1)), {
            "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size),  # type: ignore[call-overload]
            "labels": torch.tensor([self.category_ids.index(o["category_id"]) for o in objects], dtype=torch.int64),
            "image_id": info["id"], "iscrowd": none, "difficult": none, "size": torch.tensor(size),
        }  # fmt: skip


def build_data(
    *, name: str, seed: int, root: str | None = None, train: int | str = 3000, test: int | str = 300, side: int = 48,
    max_shapes: int = 3, labels: str = "contiguous", voc_train: Sequence[str] = ("VOC2007", "VOC2012"),
    voc_test: str = "VOC2007", classes: Sequence[str] | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """(training set, test set); items (uint8 RGB image, target with xyxy boxes in pixels).

    scenes: `train` and `test` are numbers of generated images of `side` pixels. coco: root/annotations/instances_<split>.json for
    the splits `train`, `test`. voc: root/<folder>/ for each folder of voc_train, and voc_test, with the splits.
    labels: "contiguous", 0..C-1, or "ids", COCO's category ids as they are: the official checkpoints count them to 90.
    ValueError, FileNotFoundError name what is wrong."""
    if name not in SETS:
        raise ValueError(f"data.name={name!r}, allowed: {', '.join(SETS)}")
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


def num_classes(dataset: DetectionSet | Scenes, *, labels: str) -> int:
    """Largest label + 1: C for contiguous labels, 91 for COCO's ids."""
    return max(dataset.category_ids) + 1 if labels == "ids" else len(dataset.category_ids)


def dropped_boxes(dataset: Any) -> int:
    """Annotations without extent that were left out."""
    parts: list[Any] = dataset.datasets if isinstance(dataset, ConcatDataset) else [dataset]
    return sum(part.dropped for part in parts)


def training_transform(kind: str) -> v2.Transform:
    """plain: horizontal flip. detr: flip, then a side of 480..800, at most 1333, for half of the images after a crop of 384..600
    from one resized to 400, 500 or 600 (section 5)."""
    if kind not in ("plain", "detr"):
        raise ValueError(f"augment={kind!r}, allowed: plain, detr")
    flip = v2.RandomHorizontalFlip()
    if kind == "plain":
        return flip
    sides = list(range(480, 801, 32))
    resize = v2.RandomChoice([v2.Resize(s, max_size=1333) for s in sides])
    small = v2.RandomChoice([v2.Resize(s) for s in (400, 500, 600)])
    return v2.Compose([flip, v2.RandomChoice([resize, v2.Compose([small, RandomSizeCrop(384, 600), resize])])])


class RandomSizeCrop(v2.Transform):
    """A crop whose sides are drawn from low..min(high, side); boxes are clipped, those left without extent go."""

    def __init__(self, low: int, high: int):
        super().__init__()
        self.low, self.high = low, high

    def forward(self, *inputs: Any) -> Any:
        image, target = inputs
        side = [self._draw(min(self.low, s), min(self.high, s)) for s in image.shape[-2:]]
        top, left = (self._draw(0, s - c) for s, c in zip(image.shape[-2:], side, strict=True))
        image = v2.functional.crop(image, top, left, *side)
        boxes = v2.functional.clamp_bounding_boxes(v2.functional.crop(target["boxes"], top, left, *side))
        return image, {**target, "boxes": boxes}

    @staticmethod
    def _draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, ()))


def normalise(image: Tensor) -> Tensor:
    """uint8 RGB (3, H, W) -> float, ImageNet mean and standard deviation."""
    return v2.functional.normalize(image.as_subclass(Tensor).float() / 255, list(MEAN), list(STD))


class Prepared(Dataset):
    """Items (normalised image (3, H, W), {"labels", "boxes" cxcywh in 0..1}); crowd regions, and boxes that a crop cut to
    nothing, are left out."""

    def __init__(self, dataset: Any, transform: v2.Transform | None = None):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, target = self.dataset[index]
        if self.transform is not None:
            image, target = self.transform(image, target)
        boxes, height, width = target["boxes"].as_subclass(Tensor), *image.shape[-2:]
        keep = (target["iscrowd"] == 0) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes = box_convert(boxes[keep], "xyxy", "cxcywh") / torch.tensor([width, height, width, height])
        return normalise(image), {"labels": target["labels"][keep], "boxes": boxes}


def resize_for_test(image: Tensor, side: int | None, max_size: int = 1333) -> Tensor:
    """Shorter side to `side`, the longer at most max_size; None leaves the image."""
    return image if side is None else v2.functional.resize(image, [side], max_size=max_size)


def ground_truth(dataset: Any) -> dict[int, dict[str, Tensor]]:
    """{image id: boxes (n, 4) xyxy, labels (n,), difficult (n,)} of a test set."""
    return {
        t["image_id"]: {k: torch.as_tensor(t[k]) for k in ("boxes", "labels", "difficult")}
        for _, t in (dataset[i] for i in range(len(dataset)))
    }


def detection_metrics(
    dataset: Any,
    predictions: Mapping[int, Mapping[str, Tensor]],
    *,
    labels: str = "contiguous",
    difficult: str = "ignore",
) -> dict[str, float]:
    """COCO AP, AP50, AP75, APs, APm, APl in percent by pycocotools (sizes that the set has not are left out) and, for contiguous
    labels, the VOC mAP@0.5 by area (map50) and by eleven points (map50_11). predictions: {image id: boxes xyxy in pixels,
    scores, labels}. Detections that are no category (COCO's gaps) are left out. difficult: "ignore" or "count"."""
    known = torch.tensor(dataset.category_ids if labels == "ids" else range(len(dataset.category_ids)))
    kept = {}
    for image_id, p in predictions.items():
        keep = torch.isin(p["labels"].cpu(), known)
        kept[image_id] = {k: v.cpu()[keep] for k, v in p.items()}
    ids = dataset.category_ids if labels == "contiguous" else None
    annotations = [
        a for a in dataset.coco["annotations"] if min(a["bbox"][2:]) > 0
    ]  # the others are counted as dropped
    evaluator = CocoEvaluator({**dataset.coco, "annotations": annotations}, category_ids=ids, difficult=difficult)
    evaluator.update(kept)
    found = evaluator.compute()
    out = {k: 100 * found[k] for k in ("AP", "AP50", "AP75", "APs", "APm", "APl") if found[k] >= 0}
    if labels == "contiguous":
        truth, count = ground_truth(dataset), len(dataset.category_ids)
        for key, method in (("map50", "area"), ("map50_11", "11point")):
            value = voc_map(kept, truth, num_classes=count, method=method, difficult=difficult)["mAP"]
            out[key] = 100 * value
    return out
