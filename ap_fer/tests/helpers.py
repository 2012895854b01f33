"""Small configurations and tiny data sets in the layouts in which people have the real ones."""

from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from PIL import Image

from ap_fer.model import APViT

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHORT = ["train.epochs=2", "train.save_every=1", "train.batch_size=32", "data.train_images=100", "data.test_images=35"]


def config(name, *overrides):
    """The configuration of a script."""
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def short_config(*overrides):
    """The embedded default, two epochs on few faces."""
    return config("config", *SHORT, "start.arm=null", "arm=test", *overrides)


def small_model(**options):
    """A transformer on 6 x 6 patches of 4 pixels, width 16, 3 blocks, poolings at 20 patches and 0.7 from block 1 on."""
    shape = {"image_size": 24, "stem": "patches", "patch": 4, "dim": 16, "depth": 3, "heads": 2}
    return APViT(**(shape | {"app": {"keep": 20}, "atp": {"rate": 0.7, "start": 1}} | options))


def write_image(path, value=0, size=(40, 40), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], {"RGB": 3, "RGBA": 4}[mode])
    noise = np.random.default_rng(value).integers(0, 255, shape, dtype=np.uint8)
    Image.fromarray(noise, mode).save(path)
    return path
