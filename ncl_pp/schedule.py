"""Learning rate by epoch. A function of the epoch alone, so that resuming needs no scheduler state."""

import math
from collections.abc import Sequence
from typing import Literal


def lr_at(
    epoch: int,
    *,
    base_lr: float,
    epochs: int,
    kind: Literal["step", "cosine"] = "step",
    warmup: int = 5,
    warmup_factor: float = 1 / 3,
    milestones: Sequence[int] = (320, 360),
    gamma: float = 0.1,
    min_lr: float = 1e-4,
) -> float:
    """Learning rate of an epoch, counted from 1; set it before the epoch begins.

    Epochs 1..warmup rise linearly towards base_lr from warmup_factor * base_lr, the value of "epoch 0": for
    5 epochs and base 0.1: 0.0467, 0.06, 0.0733, 0.0867, 0.1. After them
      step     base_lr * gamma ** (number of milestones reached), a milestone counts from its own epoch on
               (CIFAR 400 epochs: 320, 360; Places-LT 30 epochs: 10, 20);
      cosine   from base_lr to exactly min_lr in the last epoch (ImageNet-LT, iNaturalist: warmup=0).
    ValueError for an epoch outside 1..epochs, a misspelt kind, or milestones that are not increasing or
    never reached.
    """
    if kind not in ("step", "cosine"):
        raise ValueError(f"kind={kind!r}, allowed: step, cosine")
    if not 1 <= epoch <= epochs:
        raise ValueError(f"epoch={epoch}, allowed: 1..{epochs}")
    if not 0 <= warmup < epochs:
        raise ValueError(f"warmup={warmup}, allowed: 0..{epochs - 1} for epochs={epochs}")
    if kind == "step" and (list(milestones) != sorted(set(milestones)) or max(milestones, default=0) > epochs):
        raise ValueError(f"milestones={list(milestones)}, allowed: increasing, none beyond epochs={epochs}")
    if epoch <= warmup:
        return base_lr * (warmup_factor + (1 - warmup_factor) * epoch / warmup)
    if kind == "step":
        return base_lr * gamma ** sum(epoch >= m for m in milestones)
    progress = (epoch - warmup) / (epochs - warmup)
    return min_lr + (base_lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2
