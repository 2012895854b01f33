"""How ci/test_loop.py trains this paper: UNIQUE, whose trunk rests in the first epoch, on a few crops."""

import math

from iqa_attack.tests.conftest import train_config
from iqa_attack.train import fit

__all__ = ["ACCUMULATES", "CLIPS", "KEYS", "TEACHER", "config", "fit", "rates"]


def config(*overrides):
    return train_config(
        "method=unique", "networks.unique.frozen_epochs=1", "train.epochs=2", "train.batch_size=64", *overrides
    )


def rates(cfg, step, steps):
    """Half a cosine to 0, constant within an epoch; the trunk is the second group."""
    epoch = step // steps + 1
    lr = cfg.networks.unique.lr * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / cfg.train.epochs))
    return [lr, 0.0 if epoch == 1 else lr]


ACCUMULATES = "not here: the losses are over all pairs of a batch, which is not cut"
CLIPS = "not here: the recipes do not clip"
TEACHER = "not here: annotators are numbers, no network teaches"
KEYS = {"models": "[unique,brisque]"}
