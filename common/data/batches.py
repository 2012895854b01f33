"""Batches that depend on (seed, epoch) alone: the same on one device or many, interrupted or not.

The permutation of an epoch is cut into GLOBAL batches; each rank and micro-step takes its slice of them. Random numbers of
augmentation are seeded by (seed, epoch, step) for images in memory and by (seed, epoch, position in the epoch) for files.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset


def stream(*key: int) -> int:
    """A seed from a tuple of integers; different tuples give unrelated streams."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the global streams of torch (CPU), random and numpy by `stream(*key)`; afterwards they are as they were."""
    seed, before = stream(*key), (random.getstate(), np.random.get_state())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


class Plan:
    """Which images form which batch: batch_size images per step over `world` ranks and `accumulation` micro-steps.

    The last, smaller batch is dropped. repeats: an image appears so many times in a row (repeated augmentation), and an
    epoch keeps its number of steps. ValueError if there is no whole batch, or if a batch does not divide.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        repeats: int = 1,
    ):
        if size < batch_size:
            raise ValueError(
                f"the training set has {size} images, fewer than train.batch_size={batch_size}: with the incomplete batch "
                f"dropped there would be no step at all. Use train.batch_size <= {size}"
            )
        if batch_size < 1 or batch_size % (world * accumulation):
            raise ValueError(
                f"batch_size={batch_size} is not a positive multiple of {world} ranks x {accumulation} micro-steps"
            )
        if repeats < 1:
            raise ValueError(f"repeats={repeats} must be at least 1")
        self.size, self.batch_size, self.seed, self.repeats = size, batch_size, seed, repeats
        self.rank, self.world, self.accumulation = rank, world, accumulation
        self.steps = size // batch_size

    @classmethod
    def of(cls, train: Mapping[str, Any], size: int, fabric: Fabric, *, seed: int, repeats: int = 1) -> "Plan":
        """The plan of a configuration's node `train` (batch_size: the GLOBAL batch; accumulation) for the ranks of `fabric`."""
        return cls(
            size, train["batch_size"], seed=seed, rank=fabric.global_rank, world=fabric.world_size,
            accumulation=train.get("accumulation", 1), repeats=repeats,
        )  # fmt: skip

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))

    def __str__(self) -> str:
        """global batch 64 = 2 devices x 1 micro-steps x 32"""
        part = self.batch_size // (self.world * self.accumulation)
        return f"global batch {self.batch_size} = {self.world} devices x {self.accumulation} micro-steps x {part}"

    def __len__(self) -> int:
        """Micro-batches per epoch and rank."""
        return self.steps * self.accumulation

    def epoch(self, epoch: int) -> Iterator[tuple[int, Tensor, slice]]:
        """(step, indices of the global batch (batch_size,), the slice of it for this rank and micro-step)."""
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(stream(self.seed, epoch)))
        order = order.repeat_interleave(self.repeats)
        part = self.batch_size // (self.world * self.accumulation)
        for step in range(self.steps):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            for micro in range(self.accumulation):
                start = (self.rank * self.accumulation + micro) * part
                yield step, batch, slice(start, start + part)


class BatchAugmentation(Protocol):
    """Augmentation of a whole batch of tensors, in two steps so that a rank can take its slice of the random numbers."""

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> tuple[Tensor, ...]:
        """Random numbers for images of shape (B, C, H, W), each tensor with B rows, on the CPU."""
        ...

    def __call__(self, images: Tensor, *drawn: Tensor) -> Tensor:
        """images (b, C, H, W) float and their rows of what `draw` returned -> (b, C, H, W)."""
        ...


class CropFlip:
    """Random crop after zero padding, and a horizontal flip with probability 1/2."""

    def __init__(self, *, padding: int = 4, flip: bool = True):
        self.padding, self.flip = padding, flip

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        offset = torch.randint(0, 2 * self.padding + 1, (shape[0], 2), generator=generator)
        return offset, torch.rand(shape[0], generator=generator) < (0.5 if self.flip else 0.0)

    def __call__(self, images: Tensor, *drawn: Tensor) -> Tensor:
        """images (B, C, H, W) -> the same shape."""
        offset, flip = (d.to(images.device) for d in drawn)
        b, _, h, w = images.shape
        columns = torch.arange(w, device=images.device).expand(b, w)
        columns = torch.where(flip[:, None], w - 1 - columns, columns) + offset[:, 1:]
        rows = torch.arange(h, device=images.device) + offset[:, :1]
        padded = F.pad(images, [self.padding] * 4)
        batch = torch.arange(b, device=images.device)[:, None, None]
        return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class TensorBatches:
    """Batches of images held in memory, augmented in whole batches on the device.

    images: (n, C, H, W) uint8 in 0..255 or float; targets: (n,). views: independent draws of `augment` per image.
    `epoch` yields ([views of (b, C, H, W) float], labels (b,)).
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        plan: Plan,
        *,
        device: torch.device,
        augment: BatchAugmentation | None = None,
        views: int = 1,
    ):
        self.images, self.targets = images.to(device), targets.to(device)
        self.plan, self.augment, self.views = plan, augment, views

    def __len__(self) -> int:
        return len(self.plan)

    def epoch(self, epoch: int) -> Iterator[tuple[list[Tensor], Tensor]]:
        for step, batch, part in self.plan.epoch(epoch):
            mine = batch[part].to(self.images.device)
            images = to_float(self.images[mine])
            if self.augment is None:
                yield [images] * self.views, self.targets[mine]
                continue
            # Drawn for the global batch, so that the split over ranks and micro-steps changes nothing.
            generator = torch.Generator().manual_seed(stream(self.plan.seed, epoch, step))
            shape = (len(batch), *images.shape[1:])
            draws = [self.augment.draw(shape, generator) for _ in range(self.views)]
            yield [self.augment(images, *(d[part] for d in draw)) for draw in draws], self.targets[mine]


class Views(Dataset):
    """Items ([transform(image) for every transform], target) of a data set of (image, target).

    Repeat a function for independent draws of it. indices: the subset of the data set, in the order of the positions."""

    def __init__(self, dataset: Dataset, transforms: Sequence[Callable], indices: Sequence[int] | None = None):
        self.dataset, self.transforms = dataset, transforms
        self.indices = range(len(dataset)) if indices is None else indices  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[list[Any], Any]:
        image, target = self.dataset[self.indices[index]]
        return [transform(image) for transform in self.transforms], target


class SeededBatches:
    """Batches of a map-style data set that draws its augmentation in `__getitem__`, loaded by `workers` processes.

    `epoch` yields what `collate` (default: torch's) makes of the items, its tensors on `device`. Transforms may use the
    global streams of torch, random and numpy: they are seeded for every item, and left as they were."""

    def __init__(
        self, dataset: Dataset, plan: Plan, *, device: torch.device, workers: int = 0, collate: Callable | None = None
    ):
        self.plan, self.sampler, self.device = plan, _PlanSampler(plan), device
        self.loader = DataLoader(
            _Seeded(dataset, plan.seed),
            batch_sampler=self.sampler,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def epoch(self, epoch: int) -> Iterator[Any]:
        self.sampler.current = epoch
        for batch in self.loader:
            yield move_data_to_device(batch, self.device)


class _Seeded(Dataset):
    """Item (epoch, position, index), drawn from (seed, epoch, position)."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int, int]) -> Any:
        epoch, position, index = key
        with seeded(self.seed, epoch, position):
            return self.dataset[index]


class _PlanSampler:
    def __init__(self, plan: Plan):
        self.plan, self.current = plan, 0

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for step, batch, part in self.plan.epoch(self.current):
            first = step * self.plan.batch_size + part.start
            yield [(self.current, first + i, index) for i, index in enumerate(batch[part].tolist())]


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 0..1; floats as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def eval_batches(dataset: Dataset, *, batch_size: int, workers: int = 0, rank: int = 0, world: int = 1) -> DataLoader:
    """Batches (images float, labels) of every world-th image in order, beginning with `rank`."""
    share = Subset(dataset, range(rank, len(dataset), world))  # type: ignore[arg-type]
    return DataLoader(share, batch_size=batch_size, num_workers=workers, collate_fn=_collate)


def _collate(samples: list[tuple[Tensor, Any]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*samples, strict=True)
    return to_float(torch.stack(images)), torch.as_tensor([int(y) for y in labels])
