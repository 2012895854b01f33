"""How ci/test_loop.py trains this paper: ARI on two tasks, with a clean and an attacked step per task and batch."""

import math

from hydra import compose, initialize_config_dir

from common import runs
from lifelong.streams import build_stream
from lifelong.tests.test_train import CONFIGS
from lifelong.train import fit

__all__ = ["ACCUMULATES", "CLIPS", "KEYS", "TEACHER", "config", "fit", "observe", "rates"]

TINY = [
    "data.tasks=2", "data.train_images=256", "data.test_images=160", "train.epochs=2",
    "train.save_every=1", "train.batch_size=64", "memory.budget=40", "optim.lr=0.2", "optim.momentum=0.5",
    "evaluate.adapt=false",
]  # fmt: skip


def config(*overrides):
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        hidden = [] if "model=rps_net" in overrides else ["model.hidden=16"]
        return compose("config", overrides=[*TINY, *hidden, "arm=test", *overrides])


def rates(cfg, step, steps):
    """Half a cosine within every task, from the full rate on. Steps of the first task: two (clean, attacked) per batch of 64, a
    small rest joined; of the second: twice as many per batch, as both tasks are in it."""
    first = len(build_stream(seed=cfg.seed, **cfg.data).indices("train", 0))
    size = cfg.train.batch_size
    of_first = 2 * (first // size + (first % size >= size / 2))
    if step < cfg.train.epochs * of_first:
        epoch = step // of_first
    else:
        epoch = (step - cfg.train.epochs * of_first) // (steps - of_first)
    return [cfg.optim.lr * 0.5 * (1 + math.cos(math.pi * epoch / cfg.train.epochs))]


def observe(cfg, fabric, out):
    """The weights after the last task alone: what else a checkpoint holds would differ by the mere name of a learner."""
    fit(cfg, fabric, out)
    return list(runs.load_checkpoint(out / "last.ckpt")["model"].values())


ACCUMULATES = "not here: the inner loops of a batch are optimizer steps of their own, there are no micro-batches"
CLIPS = "not here: neither the released code nor a baseline clips"
TEACHER = ["method=lwf"]

ONE = ["train.epochs=1"]
NORM = [*ONE, "model=rps_net", "model.widths=[2,2,2,2]", "data.train_images=140"]  # batch norm
LWF, EWC, DER = ([*ONE, f"method={name}"] for name in ("lwf", "ewc", "derpp"))
FISHERS = [
    *EWC,
    "data.tasks=4",
    "train.batch_size=16",
]  # several steps in the third task: at the anchor the penalty is flat
KEYS = {
    "learner": ("ce", ONE), "replay": ("none", ONE),
    "meta.loss": ("seen", ONE), "meta.steps": (2, ONE), "meta.attack": ("everywhere", ONE), "meta.eps": (64.0, ONE),
    "meta.semantics": ("sequential_last", ONE), "meta.weights": ("mean", ONE), "meta.distance": ("cosine", ONE),
    "meta.constant": (10.0, ONE), "meta.beta": (3.0, ONE), "meta.optimizer_state": ("per_task", ONE),
    "meta.min_samples": (30, ONE), "meta.freeze_bn": (True, NORM),
    "lwf.weight": (5.0, LWF), "lwf.temperature": (1.0, LWF),
    "ewc.weight": (5.0, EWC), "ewc.samples": (20, EWC), "ewc.decay": (0.1, FISHERS),
    "reservoir.buffer": (20, DER), "reservoir.logits": (2.0, DER), "reservoir.labels": (2.0, DER),
}  # fmt: skip
