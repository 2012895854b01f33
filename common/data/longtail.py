"""Long-tailed subsets: the exponential class profile, a seeded draw, and the stored list of the draw."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch


def long_tail_counts(n_max: int, imbalance: float, num_classes: int) -> list[int]:
    """Images per class, int(n_max * imbalance^(-i / (C - 1))) for class i = 0 (head) .. C-1 (tail).

    float64 and truncation, as in the CIFAR-LT protocol (Cui et al. 2019): CIFAR-100 at imbalance 100 has
    10,847.
    Raises ValueError for n_max < 1, imbalance < 1, num_classes < 2, or a profile that leaves a class empty.
    """
    if n_max < 1 or imbalance < 1 or num_classes < 2:
        raise ValueError(
            f"needs n_max >= 1, imbalance >= 1, num_classes >= 2; got {n_max=}, {imbalance=}, {num_classes=}"
        )
    counts = [int(n_max * float(imbalance) ** (-i / (num_classes - 1))) for i in range(num_classes)]
    if counts[-1] == 0:
        raise ValueError(f"imbalance {imbalance} leaves the last class empty: use at most {n_max}")
    return counts


def subsample(targets: Sequence[int] | torch.Tensor, counts: Sequence[int], *, seed: int) -> list[int]:
    """Sorted indices of counts[c] images of every class c.

    Each class has a random stream of its own, so changing one count leaves the draw of the other classes
    alone.
    Raises ValueError for a target outside 0..len(counts)-1 or a class with fewer images than asked for.
    """
    labels = torch.as_tensor(targets).cpu().numpy()
    if len(labels) and (labels.min() < 0 or labels.max() >= len(counts)):
        raise ValueError(f"targets span {labels.min()}..{labels.max()}, counts name classes 0..{len(counts) - 1}")
    chosen = []
    for c, count in enumerate(counts):
        members = np.flatnonzero(labels == c)
        if not 0 <= count <= len(members):
            raise ValueError(f"class {c} has {len(members)} images, {count} asked for")
        chosen.append(np.random.default_rng([seed, c]).permutation(members)[:count])
    return sorted(int(i) for i in np.concatenate(chosen))


def _checked(indices: Sequence[int], size: int, where: str) -> list[int]:
    for i in indices:
        if type(i) is not int or not 0 <= i < size:
            raise ValueError(f"{where}: index {i!r} is not an integer in 0..{size - 1}")
    if len(set(indices)) != len(indices):
        seen: set[int] = set()
        twice = next(i for i in indices if i in seen or seen.add(i))
        raise ValueError(f"{where}: index {twice} appears more than once")
    return list(indices)


def save_indices(path: str | Path, indices: Sequence[int], *, dataset: str, size: int) -> None:
    """Writes the drawn indices as JSON with the name and the size of the full set they point into.

    Raises ValueError for an index out of range or repeated.
    """
    path = Path(path)
    record = {"dataset": dataset, "size": size, "count": len(indices)}
    record["indices"] = _checked(indices, size, str(path))
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(record))
    os.replace(beside, path)


def load_indices(path: str | Path, *, dataset: str, size: int) -> list[int]:
    """Reads a list written by `save_indices`, for the data set `dataset` of `size` images.

    Raises FileNotFoundError without the file; ValueError when it is not such a list, belongs to another set
    or size, or holds the wrong number of indices, a repeated one or one out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no index list at {path}; `save_indices` writes one")
    try:
        record = json.loads(path.read_text())
        found = {key: record[key] for key in ("dataset", "size", "count", "indices")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an index list (keys dataset, size, count, indices): {error!r}") from error
    if (found["dataset"], found["size"]) != (dataset, size):
        raise ValueError(
            f"{path} belongs to {found['dataset']} with {found['size']} images, not to {dataset} with {size}"
        )
    if not isinstance(found["indices"], list) or len(found["indices"]) != found["count"]:
        raise ValueError(f"{path} announces {found['count']} indices and does not hold that many")
    return _checked(found["indices"], size, str(path))
