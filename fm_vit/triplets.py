"""Frames of several modalities as one tensor: decoded, cut alike, changed in colour each for itself.

A sample is (3 M, H, W): three channels for each of the M modalities in canonical order, 0..1; `unpack` makes the mapping that
the models take. Geometry is torchvision v2 on tv_tensors, one draw for all modalities; colour is per modality.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from common.data.files import open_image
from fm_vit.protocols import Frames

MEAN = STD = 0.5  # of every channel


def unpack(images: Tensor, modalities: Sequence[str], *, mean: float = MEAN, std: float = STD) -> dict[str, Tensor]:
    """(B, 3 M, H, W) in 0..1 -> {modality: (B, 3, H, W)}, normalised (to -1..1)."""
    return dict(zip(modalities, ((images - mean) / std).split(3, dim=1), strict=True))


def read_frame(path: Path, *, modality: str = "rgb", depth_max: float | None = None) -> Tensor:
    """One image as float (3, H, W) in 0..1, upright; grey ones are repeated, depth of more than 8 bits is divided by depth_max
    (then clipped), other images of more than 8 bits by the range of their type.

    ValueError for an image that cannot be decoded or is black all over, or a 16-bit depth image without depth_max."""
    deep = modality == "depth" and _is_wide(path)
    if deep and depth_max is None:
        raise ValueError(f"{path} has 16 bits: give depth_max, the value that is to become 1")
    if deep and depth_max is not None:
        with Image.open(path) as image:
            values = torch.from_numpy(np.asarray(image).astype(np.float32))[None]
        pixels = (values / depth_max).clamp(0, 1).expand(3, -1, -1)
    else:
        pixels = pil_to_tensor(open_image(path)).float() / 255
    if not pixels.any():
        raise ValueError(f"{path} is black all over: a sensor failed there. List it in data.exclude")
    return pixels


def _is_wide(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return image.mode.startswith("I") or image.mode == "F"
    except (OSError, SyntaxError, ValueError):
        return False  # open_image says what is wrong


def geometry(size: int, *, train: bool, rotation: float = 10.0) -> v2.Transform:
    """Resize to size x size; for training a crop of 80 to 100 % of the area, a rotation and a flip."""
    if not train:
        return v2.Resize((size, size), antialias=True)
    return v2.Compose([
        v2.RandomRotation([-rotation, rotation]), v2.RandomResizedCrop(size, scale=(0.8, 1.0), ratio=(0.9, 1.1), antialias=True),
        v2.RandomHorizontalFlip(),
    ])  # fmt: skip


def colour(modality: str) -> Callable[[Tensor], Tensor]:
    """Brightness and contrast for every modality but depth, whose values are distances; hue and saturation for RGB only."""
    if modality == "depth":
        return v2.Identity()
    return v2.ColorJitter(0.3, 0.3, 0.3, 0.05) if modality == "rgb" else v2.ColorJitter(0.2, 0.2)


def silhouette(x: Tensor) -> Tensor:
    """1 where any channel is not black: pre-cropped faces of SURF may give themselves away by their outline alone."""
    return (x > 0).any(0, keepdim=True).expand(3, -1, -1).float()


class Triplets(Dataset):
    """(packed image (3 M, size, size) in 0..1, 1 live | 0 attack) of `frames`; augmented if train."""

    def __init__(
        self, frames: Frames, modalities: Sequence[str], *, size: int, train: bool, depth_max: float | None = None,
        outline_only: bool = False,
    ):  # fmt: skip
        self.frames, self.modalities, self.train = frames, list(modalities), train
        self.depth_max, self.outline_only = depth_max, outline_only
        self.move = geometry(size, train=train)
        self.paint: Mapping[str, Callable[[Tensor], Tensor]] = {m: colour(m) for m in modalities} if train else {}

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.pack(self.frames.paths[i]), int(self.frames.live[i])

    def pack(self, paths: Mapping[str, Path]) -> Tensor:
        """The packed image of one file per modality."""
        images = {m: read_frame(paths[m], modality=m, depth_max=self.depth_max) for m in self.modalities}
        height, width = images[self.modalities[0]].shape[-2:]
        if any(x.shape[-2:] != (height, width) for x in images.values()):  # one draw fits all only at one size
            images = {m: v2.functional.resize(x, [height, width], antialias=True) for m, x in images.items()}
        moved = self.move({m: tv_tensors.Image(x) for m, x in images.items()})
        parts = []
        for m in self.modalities:
            x = moved[m].as_subclass(Tensor)
            x = silhouette(x) if self.outline_only else self.paint[m](x) if self.train else x
            parts.append(x)
        return torch.cat(parts)
