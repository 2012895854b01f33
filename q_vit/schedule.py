"""Learning rate as a function of the step alone, so that resuming needs no scheduler state."""

import math
from typing import Literal


def lr_at(
    step: int, *, base_lr: float, steps: int, epochs: int,
    kind: Literal["cosine", "onecycle"] = "cosine", min_lr: float = 1e-5, warmup: float = 0.1,
) -> float:  # fmt: skip
    """Learning rate of a step counted from 0, of `steps` in all.

    cosine: from base_lr towards min_lr, constant within an epoch, no warm-up (the paper's recipe).
    onecycle: by cosines from base_lr / 25 up to base_lr over the share `warmup` of all steps, then down to 0.
    ValueError for a step outside 0..steps - 1 or a misspelt kind."""
    if kind not in ("cosine", "onecycle"):
        raise ValueError(f"schedule.kind={kind!r}, allowed: cosine, onecycle")
    if not 0 <= step < steps or not 0 <= warmup < 1 or epochs < 1:
        raise ValueError(f"step={step}, warmup={warmup}, epochs={epochs}, allowed: 0..{steps - 1}, in [0, 1), >= 1")
    if kind == "cosine":
        epoch = step * epochs // steps
        return min_lr + (base_lr - min_lr) * (1 + math.cos(math.pi * epoch / epochs)) / 2
    rise = warmup * steps
    if step < rise:
        return base_lr / 25 + (base_lr - base_lr / 25) * (1 - math.cos(math.pi * step / rise)) / 2
    return base_lr * (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2
