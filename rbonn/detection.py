"""Faster R-CNN on a binary backbone, and its data: generated scenes, COCO and Pascal VOC folders (section 5)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset
from torchvision import tv_tensors
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.transforms import v2

from common.data.detection import VOC_CLASSES, DetectionSet, coco_detection, voc_detection
from common.data.shapes import ShapeScenes, shape_scenes
from common.data.vision import data_root
from common.metrics.detection import CocoEvaluator, voc_map
from common.quant.binary import RPReLU
from rbonn.model import Conv, ReActResNet, Sign

RATIOS = (0.5, 1.0, 2.0)
SETS = ("scenes", "coco", "voc")


# ----------------------------------------------------------------------------------------------------------- the network
def faster_rcnn(
    *, num_classes: int, conv: Conv, sign: Sign, backbone: Mapping[str, Any], fpn_channels: int = 256, head_width: int = 1024,
    binary_neck: bool = True, frozen_stages: int = 1, min_size: int | Sequence[int] = 600, max_size: int = 1000,
    test_min_size: int | None = None, anchor_scale: int = 8, score_thresh: float = 0.05, nms_thresh: float = 0.5,
    detections: int = 100,
) -> FasterRCNN:  # fmt: skip
    """Faster R-CNN with a feature pyramid on a Bi-Real/ReActNet ResNet of four stages.

    num_classes without the background; labels are 1..num_classes. conv, sign: builders of the arm; they make the backbone and,
    with binary_neck, the 3x3 convolutions of pyramid and RPN (with a norm behind each, which the binary scale needs). Lateral 1x1
    convolutions and the box head stay real. frozen_stages: 0 none, 1 the stem, 2 the stem and layer1, ...
    min_size: shorter side, several for multi-scale training (the last for tests unless test_min_size). anchor_scale: side
    of an anchor in strides of its level. ValueError for values out of range."""
    if num_classes < 1 or not 0 <= frozen_stages <= 5 or len(backbone["layers"]) != 4:
        raise ValueError(
            f"num_classes={num_classes} must be >= 1, frozen_stages={frozen_stages} in 0..5, "
            f"backbone.layers={list(backbone['layers'])} four"
        )
    body = ReActResNet(num_classes=1, in_channels=3, conv=conv, sign=sign, **backbone)
    frozen = ["conv1", "bn1", *body.stages][: 0 if frozen_stages == 0 else frozen_stages + 1]
    for name in frozen:
        body.get_submodule(name).requires_grad_(False)
    layers = {name: str(i) for i, name in enumerate(body.stages)}
    widths = list(backbone["widths"])
    norm = nn.BatchNorm2d if binary_neck else None
    pyramid = BackboneWithFPN(body, layers, widths, fpn_channels, norm_layer=norm)
    stride = 4 if backbone["stem"] == "imagenet" else 1
    sizes = tuple((anchor_scale * stride * 2**i,) for i in range(5))
    anchors = AnchorGenerator(sizes, (RATIOS,) * 5)
    rpn_head = RPNHead(fpn_channels, len(RATIOS))
    if binary_neck:
        for block in pyramid.fpn.layer_blocks:
            block[0] = nn.Sequential(sign(fpn_channels), conv(fpn_channels, fpn_channels, 3, padding=1))  # type: ignore[index]
        rpn_head.conv = nn.Sequential(
            sign(fpn_channels), conv(fpn_channels, fpn_channels, 3, padding=1), nn.BatchNorm2d(fpn_channels), RPReLU(fpn_channels)
        )  # fmt: skip
    sides = (min_size,) if isinstance(min_size, int) else tuple(min_size)
    model = FasterRCNN(
        pyramid, rpn_anchor_generator=anchors, rpn_head=rpn_head, min_size=sides, max_size=max_size,  # type: ignore[arg-type]
        box_head=TwoMLPHead(fpn_channels * 49, head_width), box_predictor=FastRCNNPredictor(head_width, num_classes + 1),
        box_score_thresh=score_thresh, box_nms_thresh=nms_thresh, box_detections_per_img=detections,
    )  # fmt: skip
    if test_min_size is not None:  # torchvision tests at the last, and trains at a random one
        model.transform.min_size = (*sides, test_min_size)  # pyright: ignore[reportArgumentType]
    return model


def freeze_norms(model: FasterRCNN) -> None:
    """Evaluation mode for the norms of the frozen stages; call it after `model.train()`."""
    for m in model.backbone.body.modules():  # type: ignore[union-attr]
        if isinstance(m, nn.BatchNorm2d) and not m.weight.requires_grad:
            m.eval()


# -------------------------------------------------------------------------------------------------------------- the data
class Scenes(Dataset):
    """Generated scenes as a detection set: the same items as `common.data.detection.DetectionSet` with contiguous labels."""

    def __init__(self, scenes: ShapeScenes):
        self.images, self.coco = scenes.images, scenes.coco
        self.category_ids = sorted(c["id"] for c in self.coco["categories"])
        self.classes = [c["name"] for c in sorted(self.coco["categories"], key=lambda c: c["id"])]
        self.infos = self.coco["images"]
        self._objects: dict[int, list[dict]] = {i["id"]: [] for i in self.infos}
        for a in self.coco["annotations"]:
            self._objects[a["image_id"]].append(a)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        info = self.infos[index]
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
    voc_train: Sequence[str] = ("VOC2007", "VOC2012"), voc_test: str = "VOC2007",
    classes: Sequence[str] | None = None, repeat: int = 1,
    workers: int = 0,
) -> tuple[Dataset, Any]:  # fmt: skip
    """(training set, test set); items (uint8 RGB image, target with labels from 0). The test set has coco, category_ids, classes.

    scenes: `train` and `test` are numbers of generated images of `side` pixels. coco: root/annotations/instances_<split>.json for
    the splits `train`, `test`. voc: root/<folder>/ for each folder of voc_train, and voc_test, with the
    splits. repeat: passes over the training set per epoch. ValueError, FileNotFoundError name what is wrong."""
    del workers  # of the loader
    if name not in SETS or repeat < 1:
        raise ValueError(f"data.name={name!r}, repeat={repeat}, allowed: {', '.join(SETS)} and a repeat >= 1")
    if name == "scenes":
        options: dict[str, Any] = {"sizes": (side,), "max_shapes": 4}
        training: Any = Scenes(shape_scenes(int(train), seed=2 * seed, **options))
        held_out: Any = Scenes(shape_scenes(int(test), seed=2 * seed + 1, **options))
    elif name == "coco":
        training = coco_detection(root, str(train), labels="contiguous", keep_crowd=False)
        held_out = coco_detection(root, str(test), labels="contiguous")
        if training.category_ids != held_out.category_ids:
            raise ValueError(f"the splits {train} and {test} under {root} have different categories")
    else:
        base = data_root(root)
        names = VOC_CLASSES if classes is None else tuple(classes)
        training = ConcatDataset(
            [voc_detection(base / f, str(train), classes=names, labels="contiguous") for f in voc_train]
        )
        held_out = voc_detection(base / voc_test, str(test), classes=names, labels="contiguous")
    return ConcatDataset([training] * repeat), held_out


class Transformed(Dataset):
    """A training set with a random horizontal flip of image and boxes; images as float 0..1, labels from 1, `difficult` and
    crowd objects kept out."""

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
    return {
        t["image_id"]: {k: t[k] for k in ("boxes", "labels", "difficult")}
        for _, t in (dataset[i] for i in range(len(dataset)))
    }


def detection_metrics(
    dataset: DetectionSet | Scenes, predictions: Mapping[int, Mapping[str, Tensor]]
) -> dict[str, float]:
    """COCO AP, AP50, AP75, APs, APm, APl (sizes the set has not are left out) by pycocotools, and VOC mAP@0.5 by area (map50) and
    by eleven points (map50_11), in 0..1. predictions: {image id: boxes xyxy, scores, labels from 0}. Difficult objects count
    neither way."""
    evaluator = CocoEvaluator(dataset.coco, category_ids=dataset.category_ids)
    evaluator.update(predictions)
    found = evaluator.compute()
    out = {k: found[k] for k in ("AP", "AP50", "AP75", "APs", "APm", "APl") if found[k] >= 0}
    truth, classes = ground_truth(dataset), len(dataset.category_ids)
    out["map50"] = voc_map(predictions, truth, num_classes=classes)["mAP"]
    out["map50_11"] = voc_map(predictions, truth, num_classes=classes, method="11point")["mAP"]
    return out


def load_backbone(model: FasterRCNN, path: str | Path) -> None:
    """Weights of a classification network of rbonn/train.py (or a published one) into the backbone; its classifier is left out.

    FileNotFoundError or ValueError naming what does not fit."""
    from rbonn.checkpoint import load_network

    found = {k: v for k, v in load_network(path)[0].state_dict().items() if not k.startswith("fc.")}
    body = model.backbone.body  # type: ignore[union-attr]
    expected = body.state_dict()  # type: ignore[operator]
    wrong = sorted(
        k
        for k in found.keys() | expected.keys()
        if k not in found or k not in expected or found[k].shape != expected[k].shape
    )
    if wrong:
        raise ValueError(f"{path} does not fit the backbone: {', '.join(wrong[:5])}")
    body.load_state_dict(found)  # type: ignore[operator]
