"""Short configurations, and tiny data sets in the layouts in which people have the real ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from common import runs

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHORT = ["train.epochs=2", "train.save_every=1", "train.batch_size=32", "data.train=192", "model.layers=[1,1]"]
DETECTOR = [
    "arm=test", "data.train=12", "data.test=4", "data.side=48", "train.epochs=2", "train.batch_size=4", "train.save_every=1",
    "schedule.milestones=[2]", "detector.backbone.layers=[1,1,1,1]", "detector.backbone.widths=[8,8,8,8]",
    "detector.fpn_channels=8", "detector.head_width=16", "detector.min_size=[48]", "detector.max_size=64",
]  # fmt: skip


def composed(name, *overrides):
    """The configuration of a script."""
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def config(*overrides):
    """The embedded default, two epochs on fewer digits."""
    return composed("config", *SHORT, "arm=test", *overrides)


def folder_config(root, *overrides):
    """Class folders of 32 x 32 images."""
    short = [o for o in SHORT if not o.startswith("data.")]
    folder = ["data=folder", f"data.root={root}", "data.size=32", "data.workers=0", "train.batch_size=4"]
    return composed("config", *short, "arm=test", *folder, *overrides)


def write_class_folders(root, *, classes=("apple", "pear"), train=4, val=2):
    """root/{train,val}/<class>/<i>.png: noise around a grey level of the class."""
    rng = np.random.default_rng(0)
    for split, n in (("train", train), ("val", val)):
        for c, name in enumerate(classes):
            for i in range(n):
                path = Path(root) / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 80, (40, 36, 3)) + 160 * c / max(1, len(classes) - 1)
                Image.fromarray(pixels.astype(np.uint8)).save(path)


def interrupted(fit, cfg, fabric, out, *, forget=()):
    """A training that is killed after its first checkpoint. forget: entries of the checkpoint whose tensors are set to 0."""
    save = runs.Run.save_checkpoint

    def killed(self, state, *args):
        nothing = {name: {k: torch.zeros_like(v) for k, v in state[name].items()} for name in forget}
        save(self, {**state, **nothing}, *args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Run, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(cfg, fabric, out)
