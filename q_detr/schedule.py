"""Learning rate as a function of the step alone, so that resuming needs no scheduler state."""

import math


def lr_factor(step: int, *, steps: int, kind: str = "step", drop: float = 0.8, warmup: float = 0.1) -> float:
    """Factor of the base rate at a step counted from 0, of `steps` in all.

    step: 1, and 0.1 from the share `drop` of all steps on (the paper: epoch 400 of 500, 200 of 300, 40 of 50).
    onecycle: by cosines from 1 / 25 up to 1 over the share `warmup`, then down to 0. ValueError for a misspelt kind."""
    if kind not in ("step", "onecycle") or not 0 < drop <= 1 or not 0 <= warmup < 1:
        raise ValueError(
            f"schedule: kind={kind!r}, drop={drop}, warmup={warmup}, allowed: step, onecycle; (0, 1]; [0, 1)"
        )
    if kind == "step":
        return 1.0 if step < drop * steps else 0.1
    rise = warmup * steps
    if step < rise:
        return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * step / rise)) / 2
    return (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2
