"""scikit-learn's 1,797 handwritten digits (8x8, 178-183 per class) and their train/test splits."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from sklearn.datasets import load_digits

from common.data.dataset import Dataset


@lru_cache(maxsize=1)
def _arrays() -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = load_digits(return_X_y=True)
    images = (np.asarray(pixels).reshape(-1, 8, 8) / 16).astype(np.float32)
    targets = np.asarray(labels).astype(np.int64)
    images.setflags(write=False)  # shared by every caller
    targets.setflags(write=False)
    return images, targets


def all_digits() -> Dataset:
    """All digits in the library's order: images (1797, 1, 8, 8) in 0..1 (sixteenths), targets 0..9."""
    images, targets = _arrays()
    return Dataset(torch.tensor(images).unsqueeze(1), torch.tensor(targets))


def split_per_class(
    *, test_per_class: int = 60, seed: int = 0, permute_classes: bool = False
) -> tuple[Dataset, Dataset]:
    """Train and test digits, with the same number of test images in every class.

    permute_classes: renames the classes by a random permutation (`extra["digit"]` is what an image shows), so that
    which digit becomes a head or a tail class of a long-tailed subset varies with the seed. With
    `longtail.long_tail_counts(100, 50, 10)` this is the long-tailed digit set: real images, 100 ... 2 per class, a
    balanced test set of 600. It shows what class imbalance does; ten easy classes cannot show confusions between many
    similar ones.
    Raises ValueError unless 1 <= test_per_class <= 173 (the rarest digit has 174 images).
    """
    data = all_digits()
    rarest = int(data.targets.bincount().min())
    if not 1 <= test_per_class < rarest:
        raise ValueError(f"test_per_class must be in 1..{rarest - 1}, got {test_per_class}")
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(data), dtype=bool)
    for c in range(10):
        members = np.flatnonzero(data.targets.numpy() == c)
        held_out[rng.permutation(members)[:test_per_class]] = True
    if permute_classes:
        names = torch.from_numpy(rng.permutation(10))
        data = Dataset(data.images, names[data.targets], extra={"digit": data.targets})
    return data.subset(np.flatnonzero(~held_out)), data.subset(np.flatnonzero(held_out))


def split_total(*, train: int = 1000, seed: int = 0) -> tuple[Dataset, Dataset]:
    """The first `train` digits of a seeded permutation, and the rest (1000/797 by default).

    Keep `seed` fixed over repeated trainings: it is the split, not the source of variation.
    Raises ValueError unless 1 <= train <= 1796.
    """
    data = all_digits()
    if not isinstance(train, int) or not 1 <= train < len(data):
        raise ValueError(f"train must be in 1..{len(data) - 1}, got {train}")
    order = np.random.default_rng(seed).permutation(len(data))
    return data.subset(order[:train]), data.subset(order[train:])
