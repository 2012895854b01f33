"""How ci/test_loop.py trains this paper."""

import math

from ap_fer.tests.helpers import short_config
from ap_fer.train import fit

__all__ = ["ACCUMULATES", "CLIPS", "KEYS", "RELOADED", "TEACHER", "config", "fit", "rates"]

TINY = [
    "data.train_images=64",
    "data.test_images=14",
    "model.dim=16",
    "model.depth=2",
    "model.start=1",
    "model.heads=2",
]


def config(*overrides):
    return short_config(*TINY, *overrides)


def rates(cfg, step, steps):
    """One cycle: a cosine from lr / 25 up to lr over the first 30 % of the steps, then down to lr / 1e4; groups: stem,
    class token and positions, all others."""
    last = steps * cfg.train.epochs - 1
    x = step / (0.3 * last)
    if x < 1:
        start, end = cfg.optim.lr / 25, cfg.optim.lr
    else:
        start, end, x = cfg.optim.lr, cfg.optim.lr / 1e4, (step - 0.3 * last) / (0.7 * last)
    rate = start + (end - start) * math.sin(math.pi * x / 2) ** 2
    return [cfg.model.stem_rate * rate, rate, rate]


ACCUMULATES = ["method=app_atp"]
CLIPS = (["train.clip=0.001"], 0.001)
TEACHER = "not here: no arm has a teacher"
RELOADED = ["model.heads=4", "model.init_std=0.5", "optim.lr=0.05", "method.app.score=max", "method.atp.source=softmax"]

# Tokens dropped by the last block are read by nobody: pool from the first one on.
LEARNED = ["train.epochs=2", "optim.lr=0.02", "method.atp.rate=0.3", "method.atp.start=0"]
KEYS = {
    "app.keep": 10, "app.score": "max", "app.lowest": True, "app.when": "test",
    "atp.rate": 0.5, "atp.start": 0, "atp.score": ("max", LEARNED), "atp.source": ("softmax", LEARNED),
    "atp.lowest": (True, LEARNED), "atp.when": "test",
}  # fmt: skip
