"""Labelled images that fit in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Dataset(torch.utils.data.Dataset):
    """Images with targets, held as tensors; indexes like any torch data set (image, target).

    images: (N, C, H, W) float32; 0..1 unless the function that made it says otherwise.
    targets: (N,) int64.
    masks: (N, H, W) bool where the truth about the foreground is known, else None.
    extra: further per-image truth, name -> (N, ...) tensor (for instance how many digits are shown).
    Raises ValueError when lengths or types disagree.
    """

    images: Tensor
    targets: Tensor
    masks: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        if self.images.ndim != 4 or self.images.dtype != torch.float32:
            raise ValueError(f"images must be float32 (N, C, H, W), got {self.images.dtype} {tuple(self.images.shape)}")
        if self.targets.ndim != 1 or self.targets.dtype != torch.int64:
            raise ValueError(f"targets must be int64 (N,), got {self.targets.dtype} {tuple(self.targets.shape)}")
        n, _, h, w = self.images.shape
        if self.masks is not None and (self.masks.shape != (n, h, w) or self.masks.dtype != torch.bool):
            raise ValueError(f"masks must be bool {(n, h, w)}, got {self.masks.dtype} {tuple(self.masks.shape)}")
        for name, value in {"targets": self.targets, **self.extra}.items():
            if len(value) != n:
                raise ValueError(f"{name} has {len(value)} entries for {n} images")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.targets[index]

    def subset(self, indices) -> Dataset:
        """The images at `indices` (sequence or tensor of ints), in that order, with masks and extra."""
        at = torch.as_tensor(indices, dtype=torch.int64)
        return replace(
            self,
            images=self.images[at],
            targets=self.targets[at],
            masks=None if self.masks is None else self.masks[at],
            extra={name: value[at] for name, value in self.extra.items()},
        )
