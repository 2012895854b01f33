"""Detection data for DETR: augmentation, and targets as the set loss wants them."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset
from torchvision.ops import box_convert
from torchvision.transforms import v2

from common.data.detection import SETS, DetectionSet
from common.data.files import identity

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LONGEST = 1333  # pixels of the longer side of a resized test image


def source_options(data: Mapping[str, Any]) -> dict[str, Any]:
    """Of a data configuration, what `detection_sets` takes."""
    return {k: v for k, v in data.items() if k not in ("workers", "augment", "test_side")}


def check_data(data: Mapping[str, Any]) -> None:
    """ValueError for a data configuration that cannot be meant, before anything is read."""
    if data["name"] not in SETS:
        raise ValueError(f"data.name={data['name']!r}, allowed: {', '.join(SETS)}")
    if data["name"] == "scenes" and data.get("root"):
        raise ValueError(
            f"data.root={data['root']}: scenes are generated, no folder is read; name the set at the root: data=coco, data=voc"
        )
    if data["test_side"] is not None and data["test_side"] < 1:
        raise ValueError(f"data.test_side={data['test_side']}, allowed: null or >= 1")
    training_transform(data["augment"])


def data_identity(name: str, training: Any, held_out: DetectionSet, root: str | None) -> dict[str, Any]:
    """What the images and annotations are, wherever they lie (`common.data.files.identity`)."""
    if name == "scenes":
        return identity(name)
    sets: list[Any] = [*(training.datasets if isinstance(training, ConcatDataset) else [training]), held_out]
    digest = hashlib.sha256()
    for part in sets:
        for i, info in enumerate(part.infos):
            t = part.target(i)
            digest.update(
                f"{info['file_name']} {t['boxes'].tolist()} {t['labels'].tolist()} {t['iscrowd'].tolist()}\n".encode()
            )
    paths = [Path(part.folder) / info["file_name"] for part in sets for info in part.infos]
    return identity(name, paths, root=root, annotations=digest.hexdigest()[:16], classes=len(held_out.classes))


def num_classes(dataset: DetectionSet) -> int:
    """Largest label + 1: C for contiguous labels, 91 for COCO's ids."""
    return max(dataset.category_ids) + 1 if dataset.labels == "ids" else len(dataset.category_ids)


def dropped_boxes(dataset: Any) -> int:
    """Annotations without extent that were left out."""
    parts: list[Any] = dataset.datasets if isinstance(dataset, ConcatDataset) else [dataset]
    return sum(part.dropped for part in parts)


def training_transform(augment: str | Mapping[str, Any]) -> v2.Transform:
    """The name of an augmentation, or {name, and keywords of `Augment`}. ValueError, TypeError name what is wrong."""
    options = {"name": augment} if isinstance(augment, str) else dict(augment)
    return Augment(**options)  # type: ignore[arg-type]


class Augment(v2.Transform):
    """Training augmentation of (uint8 image, target). name: plain, horizontal flip; detr, flip, then a side of 480..800, at most
    1333, for half of the images after a crop of 384..600 from one resized to 400, 500 or 600 (released code of DETR).

    scale multiplies these sizes, for small networks. vertical: flip the other way too, where images have no up. `shrink`: shorter
    side beyond which an image has nothing to give, with scale < 1; see `Prepared`."""

    def __init__(self, *, name: str, scale: float = 1.0, vertical: bool = False):
        super().__init__()
        if name not in ("plain", "detr"):
            raise ValueError(f"augment={name!r}, allowed: plain, detr")
        steps: list[v2.Transform] = [v2.RandomHorizontalFlip(), *([v2.RandomVerticalFlip()] if vertical else [])]
        self.shrink = round(800 * scale) if name == "detr" and scale < 1 else None
        if name == "detr":
            sides = [round(s * scale) for s in range(480, 801, 32)]
            resize = v2.RandomChoice([v2.Resize(s, max_size=round(1333 * scale)) for s in sides])
            small = v2.RandomChoice([v2.Resize(round(s * scale)) for s in (400, 500, 600)])
            crop = RandomSizeCrop(round(384 * scale), round(600 * scale))
            steps.append(v2.RandomChoice([resize, v2.Compose([small, crop, resize])]))
        self.steps = v2.Compose(steps)

    def forward(self, *inputs: Any) -> Any:
        return self.steps(*inputs)


class Shrunk(Dataset):
    """(image, target) of a data set with the shorter side reduced to `side`, decoded once and kept in memory as uint8 (by every
    worker for itself)."""

    def __init__(self, dataset: Any, side: int):
        self.dataset, self.side, self.kept = dataset, side, {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        if index not in self.kept:
            item = self.dataset[index]
            self.kept[index] = v2.Resize(self.side)(*item) if min(item[0].shape[-2:]) > self.side else item
        return self.kept[index]


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


def normalise(image: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """uint8 RGB (3, H, W) -> float with the mean and standard deviation of ImageNet, or those of a checkpoint."""
    return v2.functional.normalize(image.as_subclass(Tensor).float() / 255, list(mean), list(std))


class Prepared(Dataset):
    """Items (normalised image (3, H, W), {"labels", "boxes" cxcywh in 0..1}); crowd regions, and boxes that a crop cut to
    nothing, are left out. With a transform that scales down, images are decoded and shrunk once (`Shrunk`)."""

    def __init__(self, dataset: Any, transform: Augment | v2.Transform | None = None):
        side = getattr(transform, "shrink", None)
        self.dataset, self.transform = dataset if side is None else Shrunk(dataset, side), transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, target = self.dataset[index]
        if self.transform is not None:
            image, target = self.transform(image, target)
        height, width = image.shape[-2:]
        boxes = v2.functional.clamp_bounding_boxes(target["boxes"]).as_subclass(Tensor)  # resizing rounds past the edge
        keep = (target["iscrowd"] == 0) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes = box_convert(boxes[keep], "xyxy", "cxcywh") / torch.tensor([width, height, width, height])
        return normalise(image), {"labels": target["labels"][keep], "boxes": boxes}


def resize_for_test(image: Tensor, side: int | None, max_size: int = LONGEST) -> Tensor:
    """Shorter side to `side`, the longer at most max_size; None leaves the image."""
    return image if side is None else v2.functional.resize(image, [side], max_size=max_size)
