"""Training and test images of a configuration, in memory or on disk, and AlexNet's colour noise."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from common.data.batches import Plan, SeededBatches, TensorBatches, Views

# Principal components of ImageNet's colours (AlexNet); eigenvalues for images in 0..1.
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


@dataclass(frozen=True)
class Images:
    """Training and test set. Either `tensors` (held in memory, augmented in batches) or `train` (PIL images, `transform`)."""

    classes: int
    channels: int
    size: int  # side of the images that the network sees
    test: Dataset
    tensors: tuple[Tensor, Tensor] | None = None
    augment: Any = None
    normalise: Callable[[Tensor], Tensor] = lambda x: x
    train: Dataset | None = None
    transform: Callable | None = None
    workers: int = 0

    def __len__(self) -> int:
        """Training images."""
        return len(self.tensors[1] if self.tensors is not None else self.train)  # type: ignore[arg-type]

    def batches(self, plan: Plan, device: torch.device) -> TensorBatches | SeededBatches:
        """Training batches ([images], labels) by epoch."""
        if self.tensors is not None:
            return TensorBatches(*self.tensors, plan, augment=self.augment, device=device)
        assert self.train is not None and self.transform is not None
        return SeededBatches(Views(self.train, [self.transform]), plan, workers=self.workers, device=device)

    def plain_train(self) -> Dataset | None:
        """The training set as the network sees it in evaluation, for the loss of the finished network; None on disk."""
        return None if self.tensors is None else TensorDataset(self.normalise(self.tensors[0]), self.tensors[1])

    def subset(self, indices: Tensor) -> "Images":
        """The same with the training images at `indices`."""
        if self.tensors is not None:
            return replace(self, tensors=(self.tensors[0][indices], self.tensors[1][indices]))
        return replace(self, train=Subset(self.train, indices.tolist()))  # type: ignore[arg-type]


class Lighting:
    """Colour noise along the principal components (AlexNet), standard deviation 0.1. PIL image -> PIL image.

    official: add it to 0..255 values although the eigenvalues are for 0..1, as the published scripts do. It is then less
    than half a grey level and only truncates some values by one."""

    def __init__(self, *, std: float = 0.1, official: bool = False):
        self.std, self.scale = std, 1.0 if official else 255.0

    def __call__(self, image: Image.Image) -> Image.Image:
        weight = (torch.randn(3) * self.std).numpy() * np.array(EIGENVALUES)
        shift = np.array(EIGENVECTORS) @ weight * self.scale
        return Image.fromarray((np.asarray(image) + shift).clip(0, 255).astype(np.uint8))
