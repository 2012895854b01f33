"""Faster R-CNN on a searched 1-bit backbone."""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from dcp_nas.network import Features, Network

RATIOS = (0.5, 1.0, 2.0)


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
