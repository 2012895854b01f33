"""How ci/test_loop.py trains this paper."""

import math

from ncl_pp.model import NCLModel
from ncl_pp.tests.layouts import short_config
from ncl_pp.train import fit

__all__ = ["ACCUMULATES", "CLIPS", "KEYS", "RELOADED", "TEACHER", "config", "fit", "rates", "reloaded"]


def config(*overrides):
    return short_config("train.epochs=3", "data.test_per_class=5", *overrides)  # the rate of the last epoch is 0


def reloaded(experts):
    return NCLModel(experts).eval()


def rates(cfg, step, steps):
    """One epoch of warm-up, then half a cosine to 0 over the rest; constant within an epoch."""
    epoch = step // steps + 1
    warmup = cfg.schedule.warmup
    if epoch <= warmup:
        return [cfg.optim.lr * (1 / 3 + 2 / 3 * epoch / warmup)]
    return [cfg.optim.lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (cfg.train.epochs - warmup)))]


ACCUMULATES = ["method=nclpp", "schedule.warmup=0"]
CLIPS = "not here: the published recipes do not clip"
TEACHER = "not here: the experts teach each other"
RELOADED = ["model.head=cosine", "+model.scale=5.0", "schedule.warmup=0"]

ONE = ["schedule.warmup=0", "schedule.kind=step"]  # an epoch at the full rate
NCL = ["method=ncl_moco", "moco.queue=32", *ONE]
INTER = ["method.experts=3", "method.loss.intra=false", *ONE]
KEYS = {
    "experts": (3, ONE), "copies": (3, ONE), "w_con": (0.5, NCL),
    "loss.hard": (0.6, ONE), "loss.lam": (0.3, ONE), "loss.lam_hcm": (0.3, ["method.loss.norm=ncl", *INTER]),
    "loss.w_ce": (0.5, ONE),
    "loss.w_hcm": (0.5, ONE), "loss.inter": (False, ONE), "loss.intra": (False, ONE), "loss.partial": (False, ONE),
    "loss.norm": ("ncl", INTER), "loss.mode": ("renorm", ONE), "loss.select": ("per_expert", ONE),
    "loss.balanced": (False, ONE), "loss.detach_teacher": (True, ONE),
}  # fmt: skip
