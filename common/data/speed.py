"""How fast images come from a disk to a batch, before a training waits for them:

python -m common.data.speed <folder of class folders> [--size 224] [--batch 64] [--workers 0 2 4] [--seconds 10]

Prints images per second for every number of workers, read by the loader of the train loops with the augmentation of an ImageNet
recipe (random crop, flip, RandAugment, normalisation; `--plain` only resizes and crops). Compare with the images/s of a training
line: where the loader is slower, raise `data.workers` or store smaller images. The first batch of every row, which starts the
workers, is not counted.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import Dataset

from common.data.batches import Plan, SeededBatches, Views
from common.data.vision import image_folder


def speed(
    dataset: Dataset, transform: Callable[[Any], Tensor], *, batch: int, workers: int, seconds: float
) -> tuple[int, float]:
    """(images, seconds) of as many batches, over epochs, as begin within `seconds`, at least one; the first is not counted."""
    plan = Plan(len(dataset), batch, seed=0)  # type: ignore[arg-type]
    loader = SeededBatches(Views(dataset, [transform]), plan, device=torch.device("cpu"), workers=workers)
    batches = itertools.chain.from_iterable(loader.epoch(e) for e in itertools.count(1))
    next(batches)
    images, start = 0, time.perf_counter()
    while images == 0 or time.perf_counter() - start < seconds:
        (views, _) = next(batches)
        images += len(views[0])
    return images, time.perf_counter() - start


def report(folder: Path, *, size: int, batch: int, workers: Iterable[int], seconds: float, plain: bool) -> list[str]:
    """A line per number of workers. FileNotFoundError or ValueError for a folder without classes or with too few images."""
    dataset = image_folder(folder)
    augmented: dict[str, Any] = {"auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "bicubic"}
    transform: Any = create_transform(size, is_training=not plain, **({} if plain else augmented))
    lines = [
        f"{folder}: {len(dataset)} images, {size} x {size}, batches of {batch}, {'plain' if plain else 'augmented'}"
    ]
    for count in workers:
        images, took = speed(dataset, transform, batch=batch, workers=count, seconds=seconds)
        lines.append(f"workers {count:3d}  {images / took:8.1f} images/s  ({images} images)")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m common.data.speed", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2, 4])
    parser.add_argument("--seconds", type=float, default=10.0, help="per number of workers")
    parser.add_argument("--plain", action="store_true", help="resize and crop the centre only")
    args = parser.parse_args(argv)
    try:
        options = {
            "size": args.size,
            "batch": args.batch,
            "workers": args.workers,
            "seconds": args.seconds,
            "plain": args.plain,
        }
        print("\n".join(report(args.folder.expanduser(), **options)))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
