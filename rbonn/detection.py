"""Faster R-CNN on a binary backbone."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead

from common.quant.binary import RPReLU
from rbonn.model import Conv, ReActResNet, Sign

RATIOS = (0.5, 1.0, 2.0)


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
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and not m.weight.requires_grad:
            m.eval()
