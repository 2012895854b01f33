"""Faster R-CNN on a searched 1-bit backbone, and its data: generated scenes, COCO and Pascal VOC folders."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset
from torchvision import tv_tensors
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms import v2

from common.data.detection import VOC_CLASSES, DetectionSet, coco_detection, voc_detection
from common.data.shapes import ShapeScenes, shape_scenes
from common.data.vision import data_root
from common.metrics.detection import CocoEvaluator, voc_map
from dcp_nas.checkpoint import load_network
from dcp_nas.network import Features, Network

RATIOS = (0.5, 1.0, 2.0)
SETS = ("scenes", "coco", "voc")


# ----------------------------------------------------------------------------------------------------------- the network
class PyramidBackbone(nn.Module):
    """The maps of a features-only network through a feature pyramid, with one more level by pooling."""

    def __init__(self, body: Features, out_channels: int):
        super().__init__()
        self.body, self.out_channels = body, out_channels
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), out_channels, LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(i): m for i, m in enumerate(self.body(x))})


def faster_rcnn(
    backbone: Network, *, num_classes: int, fpn_channels: int = 256, head_width: int = 1024,
    min_size: int | Sequence[int] = 600, max_size: int = 1000, anchor_scale: int = 8, score_thresh: float = 0.05,
    nms_thresh: float = 0.5, detections: int = 100,
) -> FasterRCNN:  # fmt: skip
    """torchvision's Faster R-CNN on a network with the ImageNet stem: maps of stride 4 (the stem), 8, 16, 32, and a pooled one.

    num_classes without the background; labels are 1..num_classes. Pyramid and heads are real-valued. anchor_scale: side of an
    anchor in strides of its level. ValueError for a network with another stem."""
    if num_classes < 1 or backbone.stem != "imagenet":
        raise ValueError(
            f"num_classes={num_classes}, stem={backbone.stem!r}: at least one class, and the ImageNet stem whose maps have "
            "strides 4 to 32"
        )
    body = Features(backbone)
    strides = [*body.feature_info.reduction(), 2 * body.feature_info.reduction()[-1]]
    anchors = AnchorGenerator(tuple((anchor_scale * s,) for s in strides), (RATIOS,) * len(strides))
    names = [str(i) for i in range(len(strides) - 1)]
    model = FasterRCNN(
        PyramidBackbone(body, fpn_channels), rpn_anchor_generator=anchors,
        box_roi_pool=MultiScaleRoIAlign(featmap_names=names, output_size=7, sampling_ratio=2),
        min_size=(min_size,) if isinstance(min_size, int) else tuple(min_size), max_size=max_size,  # type: ignore[arg-type]
        box_head=TwoMLPHead(fpn_channels * 49, head_width), box_predictor=FastRCNNPredictor(head_width, num_classes + 1),
        box_score_thresh=score_thresh, box_nms_thresh=nms_thresh, box_detections_per_img=detections,
    )  # fmt: skip
    model.transform.size_divisible = 32  # type: ignore[assignment]
    return model


def load_backbone(network: Network, path: str | Path) -> None:
    """Weights of a classification network of train.py, without its classifier. ValueError naming what does not fit."""
    found = {
        k: v for k, v in load_network(path)[0].state_dict().items() if not k.startswith(("fc.", "auxiliary_head."))
    }
    expected = {k: v for k, v in network.state_dict().items() if not k.startswith(("fc.", "auxiliary_head."))}
    keys = found.keys() | expected.keys()
    wrong = sorted(k for k in keys if k not in found or k not in expected or found[k].shape != expected[k].shape)
    if wrong:
        raise ValueError(f"{path} does not fit the backbone (same genotype, stage and model?): {', '.join(wrong[:5])}")
    network.load_state_dict(found, strict=False)


# -------------------------------------------------------------------------------------------------------------- the data
class Scenes(Dataset):
    """Generated scenes with the items of `common.data.detection.DetectionSet`, contiguous labels."""

    def __init__(self, scenes: ShapeScenes):
        self.images, self.coco = scenes.images, scenes.coco
        self.category_ids = sorted(c["id"] for c in self.coco["categories"])
        self.classes = [c["name"] for c in sorted(self.coco["categories"], key=lambda c: c["id"])]
        self._objects: dict[int, list[dict]] = {i["id"]: [] for i in self.coco["images"]}
        for a in self.coco["annotations"]:
            self._objects[a["image_id"]].append(a)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        info = self.coco["images"][index]
        objects = self._objects[info["id"]]
        corners = torch.tensor([o["bbox"] for o in objects], dtype=torch.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        size = (info["height"], info["width"])
        boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size)  # type: ignore[call-overload]
        labels = torch.tensor([self.category_ids.index(o["category_id"]) for o in objects], dtype=torch.int64)
        image = tv_tensors.Image(torch.from_numpy(self.images[index]).permute(2, 0, 1))
        none = torch.zeros(len(objects), dtype=torch.int64)
        return image, {"boxes": boxes, "labels": labels, "image_id": info["id"], "difficult": none, "iscrowd": none}


def build_detection_data(
    *, name: str, seed: int, root: str | None = None, train: int | str = 400, test: int | str = 100, side: int = 96,
    voc_train: Sequence[str] = ("VOC2007", "VOC2012"), voc_test: str = "VOC2007", classes: Sequence[str] | None = None,
    workers: int = 0,
) -> tuple[Dataset, Any]:  # fmt: skip
    """(training set, test set); items (uint8 RGB image, target with labels from 0). The test set has coco, category_ids, classes.

    scenes: `train`, `test` are numbers of generated images of `side` pixels. coco: root/annotations/instances_<split>.json for
    the splits `train`, `test`. voc: root/<folder>/ for each folder of voc_train, and voc_test. ValueError, FileNotFoundError."""
    del workers  # of the loader
    if name not in SETS:
        raise ValueError(f"data.name={name!r}, allowed: {', '.join(SETS)}")
    if name == "scenes":
        options: dict[str, Any] = {"sizes": (side,), "max_shapes": 4}
        return (
            Scenes(shape_scenes(int(train), seed=2 * seed, **options)),
            Scenes(shape_scenes(int(test), seed=2 * seed + 1, **options)),
        )
    if name == "coco":
        training = coco_detection(root, str(train), labels="contiguous", keep_crowd=False)
        held_out = coco_detection(root, str(test), labels="contiguous")
        if training.category_ids != held_out.category_ids:
            raise ValueError(f"the splits {train} and {test} under {root} have different categories")
        return training, held_out
    base = data_root(root)
    names = VOC_CLASSES if classes is None else tuple(classes)
    parts = [voc_detection(base / f, str(train), classes=names, labels="contiguous") for f in voc_train]
    return ConcatDataset(parts), voc_detection(base / voc_test, str(test), classes=names, labels="contiguous")


class Transformed(Dataset):
    """A training set with random horizontal flips of image and boxes; images 0..1, labels from 1, no difficult or crowd ones."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.flip = dataset, v2.RandomHorizontalFlip()

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        image, target = self.flip(*self.dataset[index])
        keep = (target["difficult"] == 0) & (target["iscrowd"] == 0)
        boxes = torch.as_tensor(target["boxes"]).as_subclass(Tensor)[keep]
        return image.as_subclass(Tensor).float() / 255, {"boxes": boxes, "labels": target["labels"][keep] + 1}


# ----------------------------------------------------------------------------------------------------------- the metrics
def ground_truth(dataset: DetectionSet | Scenes) -> dict[int, dict[str, Tensor]]:
    """{image id: boxes (n, 4), labels (n,) from 0, difficult (n,)} of a test set."""
    items = (dataset[i][1] for i in range(len(dataset)))
    return {t["image_id"]: {k: t[k] for k in ("boxes", "labels", "difficult")} for t in items}


def detection_metrics(
    dataset: DetectionSet | Scenes, predictions: Mapping[int, Mapping[str, Tensor]]
) -> dict[str, float]:
    """COCO AP, AP50, AP75, APs, APm, APl (sizes the set has not are left out) by pycocotools, and VOC mAP@0.5 by area (map50), in
    0..1. predictions: {image id: boxes xyxy, scores, labels from 0}. Difficult objects count neither way."""
    evaluator = CocoEvaluator(dataset.coco, category_ids=dataset.category_ids)
    evaluator.update(predictions)
    found = evaluator.compute()
    out = {k: found[k] for k in ("AP", "AP50", "AP75", "APs", "APm", "APl") if found[k] >= 0}
    out["map50"] = voc_map(predictions, ground_truth(dataset), num_classes=len(dataset.category_ids))["mAP"]
    return out
