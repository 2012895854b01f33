"""Learning rates: the published cosine once per epoch, and the miniature's one-cycle."""

import math

KINDS = ("one_cycle", "cosine_epoch")


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"schedule.kind={kind!r}, allowed: {', '.join(KINDS)}")


def lr_at(kind: str, step: int, *, steps_per_epoch: int, epochs: int, lr: float) -> float:
    """Learning rate of optimiser step `step` (from 0).

    cosine_epoch: lr (1 + cos(pi e / epochs)) / 2 with e = 0, 1, ... the epoch, constant within it, no warm-up.
    one_cycle: cosine from lr / 25 up to lr over the first 30 % of the steps, then down to lr / 1e4."""
    check_kind(kind)
    if kind == "cosine_epoch":
        return lr * (1 + math.cos(math.pi * (step // steps_per_epoch) / epochs)) / 2
    total = max(1, steps_per_epoch * epochs - 1)
    peak = 0.3 * total
    if step < peak:
        low, high, x = lr / 25, lr, step / peak
    else:
        low, high, x = lr, lr / 1e4, (step - peak) / (total - peak)
    return low + (high - low) * (1 - math.cos(math.pi * x)) / 2
