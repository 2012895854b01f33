"""How ci/test_loop.py trains this paper."""

import math

from fm_vit.tests.helpers import short
from fm_vit.train import fit

__all__ = ["ACCUMULATES", "CLIPS", "KEYS", "RELOADED", "TEACHER", "config", "fit", "rates"]


def config(*overrides):
    return short("optim.backbone_lr=5e-4", *overrides)


def rates(cfg, step, steps):
    """Linear over 5 % of the training, then half a cosine to 0; trunks at their own rate. Groups in the order of parameters."""
    t = step / (steps * cfg.train.epochs)
    if t < cfg.optim.warmup:
        factor = (t + 1e-8) / cfg.optim.warmup
    else:
        factor = 0.5 + 0.5 * math.cos(math.pi * (t - cfg.optim.warmup) / (1 - cfg.optim.warmup))
    slow, fast = factor * cfg.optim.backbone_lr, factor * cfg.optim.lr
    return [slow, slow, fast, fast]


ACCUMULATES = ["method=fmvit"]
CLIPS = (["optim.clip=0.01"], 0.01)
TEACHER = "not here: no network teaches another"
RELOADED = ["method.options.cmtb.share=0.2", "method.options.cmtb.mma=own"]
KEYS = {
    "model": ("shared", ["method=shared", "method.model=fmvit"]), "modalities": "[rgb,ir]",
    "loss.paths": "[single]", "loss.weights.single": 0.5, "loss.weights.cross": 0.5,
    "loss.weights.partial": 0.5, "options.after": "[1]",
    "options.cmtb.mma": "own", "options.cmtb.rule": "mean", "options.cmtb.share": 0.1, "options.cmtb.mfa": False,
    "options.cmtb.mlp_ratio": 2.0, "options.cmtb.zero_init": True,
}  # fmt: skip
