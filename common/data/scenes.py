"""Small classification scenes made of real handwritten digits (scikit-learn), generated in memory.

Every function is deterministic in `seed`, and train and test scenes are made of different digits. Each
stands for one phenomenon; none says anything about accuracy on photographs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from common.data.dataset import Dataset
from common.data.digits import split_total

SPLITS = ("train", "test")


def side(split: str) -> int:
    """0 for "train", 1 for "test", else ValueError."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    return SPLITS.index(split)


@lru_cache(maxsize=4)
def source_digits(split: str, train: int) -> tuple[np.ndarray, np.ndarray]:
    """Digits (N, 8, 8) in 0..1 sorted by class, and targets, of one side of a fixed split."""
    part = split_total(train=train)[side(split)]
    order = np.argsort(part.targets.numpy(), kind="stable")
    return part.images.numpy()[order, 0], part.targets.numpy()[order]


def stream(seed: int, split: str) -> np.random.Generator:
    return np.random.default_rng([seed, side(split)])


def digits_of(labels: np.ndarray, split: str, rng: np.random.Generator) -> np.ndarray:
    """A random digit image for every label: labels (...) in 0..9 -> (..., 8, 8)."""
    images, targets = source_digits(split, 1297)
    counts = np.bincount(targets, minlength=10)
    first = np.cumsum(counts) - counts
    return images[first[labels] + (rng.random(labels.shape) * counts[labels]).astype(np.int64)]


def check_count(n: int) -> None:
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")


def noisy_digits(
    *, sigma: float = 0.25, train: int = 1000, seed: int = 0, standardise: bool = True
) -> tuple[Dataset, Dataset]:
    """All 1,797 digits with fixed Gaussian noise N(0, sigma^2) on 0..1 pixels: train and test (1000/797).

    images: (N, 1, 8, 8); with `standardise` (x - mean) / std by the two numbers of the noisy training
    images, without it 0..1 plus noise, not clipped. The permutation that splits is always the same; `seed`
    draws the noise.
    Exercises: learning under low capacity (binary networks, searched cells) where a real-valued net is
    clearly better. Cannot show: differences of a few points (797 test images: about 1.6 points per standard
    error).
    """
    if sigma < 0:
        raise ValueError(f"sigma must be >= 0, got {sigma}")
    rng = np.random.default_rng(seed)
    noisy = []
    for part in split_total(train=train):
        noise = torch.from_numpy(rng.normal(0, sigma, part.images.shape).astype(np.float32))
        noisy.append((part.images + noise, part.targets))
    std, mean = torch.std_mean(noisy[0][0]) if standardise else (torch.tensor(1.0), torch.tensor(0.0))
    train_set, test_set = (Dataset((images - mean) / std, targets) for images, targets in noisy)
    return train_set, test_set


def cued_digits(n: int, *, split: str, seed: int = 0, noise: float = 0.05, mark: float = 2.0) -> Dataset:
    """Four digits on a 16x16 canvas; the target is the one in the marked quadrant.

    images: (n, 1, 16, 16), digits in 0..1, the marked quadrant's upper-left and lower-right pixel set to
    `mark`, then N(0, noise^2) everywhere, so values reach slightly below 0 and above `mark`. masks: the
    marked quadrant; extra["quadrant"]: 0..3 row by row, extra["digits"]: (n, 4) what each quadrant shows.
    Digits come from 1,297 (train) or 500 (test) different originals, drawn uniformly over the images.
    Exercises: content-dependent attention, information must travel from the marked patches to the class
    token, which is what quantised queries and keys damage. Cannot show: accuracy on natural images, deep-
    network effects.
    """
    check_count(n)
    digits, labels = source_digits(split, 1297)
    rng = stream(seed, split)
    pick = rng.integers(len(digits), size=(n, 4))
    quadrant = rng.integers(4, size=n)
    tiles = digits[pick]  # a copy: (n, 4, 8, 8)
    rows = np.arange(n)
    tiles[rows, quadrant, 0, 0] = tiles[rows, quadrant, 7, 7] = mark
    canvas = _tile(tiles, 2) + rng.normal(0, noise, (n, 16, 16)).astype(np.float32)
    marked = np.zeros((n, 4, 8, 8), dtype=bool)
    marked[rows, quadrant] = True
    return Dataset(
        torch.from_numpy(canvas).unsqueeze(1),
        torch.from_numpy(labels[pick[rows, quadrant]]),
        torch.from_numpy(_tile(marked, 2)),
        {"quadrant": torch.from_numpy(quadrant), "digits": torch.from_numpy(labels[pick])},
    )


def _tile(cells: np.ndarray, grid: int) -> np.ndarray:
    """(n, grid * grid, 8, 8), row by row -> (n, grid * 8, grid * 8)."""
    n = len(cells)
    return cells.reshape(n, grid, grid, 8, 8).swapaxes(2, 3).reshape(n, grid * 8, grid * 8)


def digit_grids(n: int, *, split: str, seed: int = 0, grid: int = 3, kmax: int = 4, noise: float = 0.1) -> Dataset:
    """A grid of 8x8 cells of which k (uniform in 1..kmax) show a digit; the target is the largest digit
    shown.

    images: (n, 1, 8 grid, 8 grid), digits in 0..1, the other cells N(0, noise^2). The target is drawn
    first, uniformly; the other digits uniformly from 0..target. masks: the cells with a digit (with patches
    of 4 pixels every digit is exactly 2x2 tokens); extra["k"]: number of digits.
    Exercises: a variable, known amount of relevant content: does a token-pruning model keep more when there
    is more to see, and does it keep the right tokens. Cannot show: objects without sharp borders, natural
    clutter.
    Raises ValueError unless 1 <= kmax <= grid^2.
    """
    check_count(n)
    if not 1 <= kmax <= grid * grid:
        raise ValueError(f"kmax must be in 1..{grid * grid} for a {grid}x{grid} grid, got {kmax}")
    rng = stream(seed, split)
    k = rng.integers(1, kmax + 1, size=n)
    target = rng.integers(10, size=n)
    labels = (rng.random((n, kmax)) * (target + 1)[:, None]).astype(np.int64)
    labels[:, 0] = target
    cell = rng.random((n, grid * grid)).argsort(axis=1)[:, :kmax]
    cells = rng.normal(0, noise, (n, grid * grid, 8, 8)).astype(np.float32)
    digits = digits_of(labels, split, rng)
    row, slot = np.nonzero(np.arange(kmax) < k[:, None])
    cells[row, cell[row, slot]] = digits[row, slot]
    shown = np.zeros((n, grid * grid, 8, 8), dtype=bool)
    shown[row, cell[row, slot]] = True
    return Dataset(
        torch.from_numpy(_tile(cells, grid)).unsqueeze(1),
        torch.from_numpy(target),
        torch.from_numpy(_tile(shown, grid)),
        {"k": torch.from_numpy(k)},
    )


def split_tasks(data: Dataset, *, sizes: Sequence[int], order: Sequence[int] | None = None) -> list[Dataset]:
    """Class-incremental tasks: the classes, in `order`, cut into groups of the given sizes.

    Targets become positions in `order` (task 0 holds 0..sizes[0]-1, and so on), so the same call on train,
    test and memory agrees. order: every class once (default 0, 1, 2, ...).
    Raises ValueError for repeated or missing classes, or sizes that are not positive or do not add up.
    """
    classes = sorted(set(data.targets.tolist()))
    names = list(range(sum(sizes))) if order is None else [int(c) for c in order]
    if min(sizes, default=0) < 1 or sum(sizes) != len(names):
        raise ValueError(f"sizes {list(sizes)} must be positive and add up to {len(names)} classes")
    if sorted(names) != classes:
        raise ValueError(f"order {names} must name every class of the data once: {classes}")
    position = torch.empty(max(classes) + 1, dtype=torch.int64)
    position[torch.tensor(names)] = torch.arange(len(names))
    renamed = Dataset(data.images, position[data.targets], data.masks, data.extra)
    ends = np.cumsum(sizes)
    inside = ((renamed.targets >= end - size) & (renamed.targets < end) for size, end in zip(sizes, ends, strict=True))
    return [renamed.subset(torch.nonzero(chosen).flatten()) for chosen in inside]
