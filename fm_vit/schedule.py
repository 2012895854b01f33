"""The learning rate of a step: warm-up, then half a cosine to 0, or steps."""

import math

SCHEDULES = ("cosine", "step")


def lr_factor(
    step: int, *, steps: int, epochs: int, warmup: float, schedule: str = "cosine", step_every: int = 20,
    step_factor: float = 0.5,
) -> float:  # fmt: skip
    """Factor of the learning rate of a step counted from 0, of `steps` in an epoch: linear over the share `warmup` of the
    training; then cosine to 0, or step: times step_factor every step_every epochs. ValueError for values out of range."""
    if schedule not in SCHEDULES or not 0 <= warmup < 1 or step_every < 1 or not 0 < step_factor <= 1:
        raise ValueError(
            f"optim.warmup={warmup}, schedule={schedule!r}, step_every={step_every}, step_factor={step_factor}, allowed: "
            f"0 <= warmup < 1 (a share of the training), {', '.join(SCHEDULES)}, >= 1, 0 < step_factor <= 1"
        )
    progress = step / max(1, epochs * steps)
    if progress < warmup:
        return (progress + 1e-8) / warmup
    if schedule == "step":
        return step_factor ** (step // max(1, steps) // step_every)
    return (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2
