"""Detection data for DETR: augmentation, and targets as the set loss wants them."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset
from torchvision.ops import box_convert
from torchvision.transforms import v2

from common.data.detection import DetectionSet

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def num_classes(dataset: DetectionSet) -> int:
    """Largest label + 1: C for contiguous labels, 91 for COCO's ids."""
    return max(dataset.category_ids) + 1 if dataset.labels == "ids" else len(dataset.category_ids)


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
