"""Average precision for detection: the COCO figures by pycocotools, and the older VOC mAP.

Boxes everywhere are xyxy in pixels of the original image, 0-based with exclusive x1, y1.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common.data.detection import DetectionSet, ground_truth

STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
DIFFICULT = ("ignore", "count")


class _Eval(COCOeval):
    """COCOeval forgets an annotation's `ignore`; this keeps it, so that `difficult` objects neither count
    as missed nor turn their detections into false alarms (a crowd region would also absorb several
    detections)."""

    def _prepare(self):
        super()._prepare()  # pyright: ignore[reportAttributeAccessIssue]
        for objects in self._gts.values():  # pyright: ignore[reportAttributeAccessIssue]
            for o in objects:
                o["ignore"] = int(bool(o["ignore"] or o["_difficult"]))


class CocoEvaluator:
    """COCO box AP over images whose predictions arrive in any order and on any rank.

    gt: dict of a COCO instances file (also DetectionSet.coco). labels of predictions are category ids, or
    positions in `category_ids` when that is given. difficult: "ignore" annotations flagged so (neither hit
    nor miss), or "count".

        evaluator = CocoEvaluator(dataset.coco)
        evaluator.update({image_id: {"boxes": (n, 4), "scores": (n,), "labels": (n,)}})
        evaluator.compute()["AP"]

    An image without predictions is an image on which nothing was found: it lowers AP.
    """

    def __init__(
        self,
        gt: Mapping[str, Any],
        *,
        category_ids: Sequence[int] | None = None,
        difficult: str = "ignore",
    ):
        if difficult not in DIFFICULT:
            raise ValueError(f"difficult must be one of {DIFFICULT}, got {difficult!r}")
        annotations = []
        # New ids: pycocotools takes a match with annotation 0 for no match, and repeated ids overwrite each other.
        for k, a in enumerate(gt["annotations"], 1):
            w, h = a["bbox"][2:]
            flag = int(bool(a.get("difficult", 0)) and difficult == "ignore")
            kept = {key: copy.copy(a[key]) for key in ("image_id", "category_id", "bbox")}
            kept |= {"id": k, "area": a.get("area", w * h), "iscrowd": a.get("iscrowd", 0), "_difficult": flag}
            annotations.append(kept)
        self._gt = _coco(gt["images"], annotations, gt["categories"])
        self._images = {i["id"] for i in gt["images"]}
        self._categories = {c["id"] for c in gt["categories"]}
        self._ids = None if category_ids is None else list(category_ids)
        if self._ids is not None and not set(self._ids) <= self._categories:
            unknown = sorted(set(self._ids) - self._categories)
            raise ValueError(f"category_ids {unknown} are not in the ground truth")
        self._found: dict[int, list[dict[str, Any]]] = {}

    def update(self, predictions: Mapping[int, Mapping[str, Any]]) -> None:
        """Adds {image_id: {"boxes" (n, 4), "scores" (n,), "labels" (n,)}}; n may be 0, tensors or arrays.

        Raises ValueError for an unknown image or label, an image given twice, wrong shapes or a value not
        finite.
        """
        for image_id, p in predictions.items():
            image_id = int(image_id)
            if image_id not in self._images:
                raise ValueError(f"image {image_id} is not in the ground truth")
            if image_id in self._found:
                raise ValueError(f"image {image_id} was given before; call reset() between evaluations")
            boxes, scores, labels = _arrays(p, f"image {image_id}")
            if self._ids is not None:
                if labels.size and not 0 <= labels.min() <= labels.max() < len(self._ids):
                    raise ValueError(f"image {image_id}: labels must be in 0..{len(self._ids) - 1}")
                labels = np.asarray(self._ids)[labels] if labels.size else labels
            unknown = set(labels.tolist()) - self._categories
            if unknown:
                raise ValueError(f"image {image_id}: labels {sorted(unknown)} are no category ids of the ground truth")
            xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
            rows = zip(xywh.tolist(), scores.tolist(), labels.tolist(), strict=True)
            self._found[image_id] = [
                {"image_id": image_id, "category_id": c, "bbox": b, "score": s} for b, s, c in rows
            ]

    def reset(self) -> None:
        """Forgets all predictions."""
        self._found.clear()

    def compute(self) -> dict[str, float]:
        """The 12 COCO figures in 0..1, named as in STATS; -1 where the ground truth holds no such object.

        In a distributed run every rank must call it; predictions are gathered, an image that several ranks
        evaluated (samplers pad) counts once, and every rank returns the same figures.
        """
        found = dict(self._found)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, found)
            found = {}
            for part in ranks:
                for image_id, rows in part.items():
                    found.setdefault(image_id, rows)
        rows = [dict(row) for image_id in sorted(found) for row in found[image_id]]
        for k, row in enumerate(rows, 1):
            row |= {"id": k, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
        detections = _coco(self._gt.dataset["images"], rows, self._gt.dataset["categories"])
        with contextlib.redirect_stdout(io.StringIO()):
            run = _Eval(self._gt, detections, "bbox")
            run.evaluate()
            run.accumulate()
            run.summarize()
        return {name: float(value) for name, value in zip(STATS, run.stats, strict=True)}


def _coco(images, annotations, categories) -> COCO:
    # COCO.loadRes fails on an empty list, hence the same construction for both sides.
    coco = COCO()
    coco.dataset = {"images": list(images), "annotations": annotations, "categories": list(categories)}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _arrays(p: Mapping[str, Any], where: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    boxes, scores, labels = (torch.as_tensor(p[key]).detach().cpu() for key in ("boxes", "scores", "labels"))
    n = scores.numel()
    if scores.ndim != 1 or labels.shape != (n,) or (boxes.shape != (n, 4) and boxes.numel() + n > 0):
        raise ValueError(
            f"{where}: expected boxes (n, 4), scores (n,), labels (n,), got "
            f"{tuple(boxes.shape)}, {tuple(scores.shape)}, {tuple(labels.shape)}"
        )
    if not (torch.isfinite(boxes).all() and torch.isfinite(scores).all()):
        raise ValueError(f"{where}: boxes or scores are not finite")
    return boxes.reshape(-1, 4).double().numpy(), scores.double().numpy(), labels.long().numpy()


def voc_map(
    predictions: Mapping[int, Mapping[str, Any]],
    targets: Mapping[int, Mapping[str, Any]],
    *,
    num_classes: int,
    iou: float = 0.5,
    method: str = "area",
    difficult: str = "ignore",
) -> dict[str, Any]:
    """Pascal VOC mean average precision: {"mAP": float, "per_class": [AP of class 0, ...]}, in 0..1.

    targets: {image_id: {"boxes" (m, 4), "labels" (m,), optional "difficult" (m,)}}; predictions as in
    CocoEvaluator, labels 0..num_classes-1. method: "area" under the monotone precision envelope (VOC 2010
    on) or "11point" (VOC 2007). difficult: "ignore" (the devkit: no recall to gain, detections of them are
    dropped) or "count". Devkit rule: by falling score, each detection takes its best-overlapping object of
    the class if the overlap is at least `iou`; a second detection of the same object is a false alarm. A
    class without counted objects has AP nan and is left out of the mean. Raises ValueError for bad
    arguments or a prediction for an unknown image.
    """
    if method not in ("area", "11point") or difficult not in DIFFICULT or not 0 < iou <= 1:
        raise ValueError(
            f"needs method 'area' or '11point', difficult in {DIFFICULT}, 0 < iou <= 1; "
            f"got {method=}, {difficult=}, {iou=}"
        )
    if unknown := set(predictions) - set(targets):
        raise ValueError(f"predictions for images without target: {sorted(unknown)[:5]}")
    found = {k: _arrays(p, f"image {k}") for k, p in predictions.items()}
    truth = {}
    for k, t in targets.items():
        boxes = torch.as_tensor(t["boxes"]).double().reshape(-1, 4).numpy()
        labels = torch.as_tensor(t["labels"]).long().reshape(-1).numpy()
        flags = torch.as_tensor(t.get("difficult", torch.zeros(len(labels)))).bool().numpy()
        truth[k] = boxes, labels, flags & (difficult == "ignore")
    for k, labels in ((k, entry[i]) for entries, i in ((found, 2), (truth, 1)) for k, entry in entries.items()):
        if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
            raise ValueError(f"image {k}: labels must be in 0..{num_classes - 1}")
    per_class = [_class_ap(c, found, truth, iou, method) for c in range(num_classes)]
    counted = [ap for ap in per_class if not np.isnan(ap)]
    return {"mAP": float(np.mean(counted)) if counted else float("nan"), "per_class": per_class}


def _class_ap(c: int, found: Mapping, truth: Mapping, iou: float, method: str) -> float:
    positives = sum(int(((labels == c) & ~ignored).sum()) for _, labels, ignored in truth.values())
    if positives == 0:
        return float("nan")
    ranked = sorted(
        (
            (score, k, box)
            for k, (boxes, scores, labels) in found.items()
            for box, score, label in zip(boxes, scores, labels, strict=True)
            if label == c
        ),
        key=lambda row: -row[0],
    )
    taken = {k: np.zeros(len(labels), dtype=bool) for k, (_, labels, _) in truth.items()}
    hits = []
    for _, k, box in ranked:
        boxes, labels, ignored = truth[k]
        overlap = np.where(labels == c, _iou(box, boxes), -1.0)
        best = int(overlap.argmax()) if len(overlap) else -1
        if best < 0 or overlap[best] < iou:
            hits.append(False)
        elif not ignored[best]:
            hits.append(not taken[k][best])
            taken[k][best] = True
    tp = np.cumsum(np.array(hits, dtype=np.float64))
    precision, recall = tp / np.arange(1, len(tp) + 1), tp / positives
    if method == "11point":
        # tenths as i / 10: np.arange(0, 1.1, .1) misses the recall .3 by one rounding error
        return float(np.mean([precision[recall >= i / 10].max(initial=0.0) for i in range(11)]))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def _iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    shared = (np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])).clip(0).prod(axis=1)
    union = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - shared
    return shared / np.maximum(union, 1e-12)


def detection_metrics(
    dataset: DetectionSet, predictions: Mapping[int, Mapping[str, Any]], *, difficult: str = "ignore"
) -> dict[str, float]:
    """COCO AP, AP50, AP75, APs, APm, APl in 0..1 by pycocotools, without the sizes that the set has not, and, for contiguous
    labels, the VOC mAP@0.5 by area (map50) and by eleven points (map50_11).

    predictions: {image id: boxes xyxy in pixels, scores, labels as those of the set}. Detections that are no category (gaps
    between category ids) are left out, and so are annotations without extent, which `dataset.dropped` counts. difficult:
    "ignore" | "count". ValueError for a set without objects.
    """
    contiguous = dataset.labels == "contiguous"
    known = torch.tensor(range(len(dataset.category_ids)) if contiguous else dataset.category_ids)
    kept = {}
    for image_id, p in predictions.items():
        labels = torch.as_tensor(p["labels"]).cpu()
        kept[image_id] = {k: torch.as_tensor(v).cpu()[torch.isin(labels, known)] for k, v in p.items()}
    annotations = [a for a in dataset.coco["annotations"] if min(a["bbox"][2:]) > 0]
    if not annotations:
        raise ValueError(f"none of the {len(dataset)} test images has an object: average precision is not defined")
    gt = {**dataset.coco, "annotations": annotations}
    evaluator = CocoEvaluator(gt, category_ids=dataset.category_ids if contiguous else None, difficult=difficult)
    evaluator.update(kept)
    found = evaluator.compute()
    out = {k: found[k] for k in STATS[:6] if found[k] >= 0}
    if contiguous:
        truth, count = ground_truth(dataset), len(dataset.category_ids)
        for t in truth.values():  # a crowd region counts neither way, as in the COCO figures
            t["difficult"] = t["iscrowd"] | (t["difficult"] * (difficult == "ignore"))
        for key, method in (("map50", "area"), ("map50_11", "11point")):
            out[key] = voc_map(kept, truth, num_classes=count, method=method)["mAP"]
    return out
