"""How ci/test_loop.py trains this paper: a random start with attention far from uniform stands for the dense one."""

import atexit
import functools
import math
import shutil
import tempfile
from pathlib import Path

import torch

from adaptive_prune.backbones import build_vit
from adaptive_prune.settings import composed
from adaptive_prune.train import fit

__all__ = ["ACCUMULATES", "CLIPS", "FRESH", "KEYS", "RELOADED", "TEACHER", "config", "fit", "rates"]


def sharp_vit(channels=1, classes=10):
    """A bare ViT for 24 x 24 images, random, with attention far from uniform."""
    vit = {"name": "vit", "img_size": 24, "patch_size": 4, "embed_dim": 32, "depth": 6, "num_heads": 4, "mlp_ratio": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_vit(**vit, num_classes=classes, in_chans=channels)
        for block in model.blocks:
            torch.nn.init.normal_(block.attn.qkv.weight, std=0.5)
    return model


@functools.cache
def start():
    """The file of such a start, as others publish theirs."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.save(sharp_vit().state_dict(), Path(folder) / "start.pth")
    return Path(folder) / "start.pth"


SHORT = ["data.train_images=64", "data.test_images=16", "train.batch_size=32", "train.epochs=2", "train.save_every=1"]


def config(*overrides):
    return composed(
        *SHORT,
        "arm=test",
        "optim.lr=1e-3",
        "optim.min_lr=1e-4",
        "train.ema=0.9",
        f"start.checkpoint={start()}",
        *overrides,
    )


def rates(cfg, step, steps):
    """A cosine over all steps, for both groups (with and without weight decay)."""
    progress = step / (steps * cfg.train.epochs)
    lr = cfg.optim.min_lr + 0.5 * (cfg.optim.lr - cfg.optim.min_lr) * (1 + math.cos(math.pi * progress))
    return [lr, lr]


ACCUMULATES = ["method.thresholds=[0.01,0.015,0.02]"]
CLIPS = (["train.clip=0.01"], 0.01)
TEACHER = []
FRESH = ["method=pretrain", "start.checkpoint=null"]
RELOADED = [
    "method.inference=masked",
    "method.score=mean",
    "parity.softmax=true",
    "method.thresholds=[0.01,0.015,0.02]",
]

CUT = ["method.thresholds=[0.01,0.015,0.02]"]
TOP = ["method=topk"]
LV = "not on a timm ViT: tests/test_train.py has LV-ViT"
KEYS = {
    "rule": ("evit", TOP), "locations": ("[1,2,3]", CUT), "thresholds": "[0.01,0.015,0.02]", "temperature": (100.0, CUT),
    "score": ("mean", CUT), "mask": ("activation", CUT), "keep": ("[9,8,7]", TOP), "match": "not here: it needs a finished run",
    "schedule": "not here: it needs a finished run", "calibrate": (32, ["method.losses.budget=0"]),
    "inference": "not a weight: it is how tokens leave in evaluation", "losses.budget": (0.5, CUT), "losses.distill": (0.1, CUT),
    "losses.token": LV, "losses.aux": LV,
}  # fmt: skip
