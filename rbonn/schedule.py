"""Learning rate by epoch. A function of the epoch alone, so that resuming needs no scheduler state."""

import math
from collections.abc import Sequence

KINDS = ("linear", "cosine", "step", "constant")


def lr_at(
    epoch: int, *, base_lr: float, epochs: int, kind: str = "linear", milestones: Sequence[int] = (), gamma: float = 0.1
) -> float:
    """Learning rate of an epoch, counted from 1.

    linear: base_lr (1 - (epoch - 1) / epochs), the rule of ReActNet and RBONN; cosine: from base_lr towards 0 in the same way;
    step: base_lr gamma^(milestones reached), a milestone counts from its own epoch on; constant. ValueError for another kind, an
    epoch outside 1..epochs, or milestones that do not increase or are never reached."""
    if kind not in KINDS:
        raise ValueError(f"schedule.kind={kind!r}, allowed: {', '.join(KINDS)}")
    if not 1 <= epoch <= epochs:
        raise ValueError(f"epoch={epoch}, allowed: 1..{epochs}")
    progress = (epoch - 1) / epochs
    if kind == "linear":
        return base_lr * (1 - progress)
    if kind == "cosine":
        return base_lr * (1 + math.cos(math.pi * progress)) / 2
    if kind == "constant":
        return base_lr
    if list(milestones) != sorted(set(milestones)) or max(milestones, default=0) > epochs:
        raise ValueError(f"milestones={list(milestones)}, allowed: increasing, none beyond epochs={epochs}")
    return base_lr * gamma ** sum(epoch >= m for m in milestones)
