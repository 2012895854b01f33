"""Short configurations, and tiny data sets in the layouts in which people have the real ones."""

from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from PIL import Image

from dcp_nas.genotypes import PAPER

CONFIGS = PAPER / "configs"
SEARCH = ["search.steps=2", "search.rounds=1", "search.batch_size=20", "data.train=80", "model.channels=2", "model.cells=2",
          "model.nodes=1", "cp_nas.samples=1", "arm=test"]  # fmt: skip
SHORT = ["train.epochs=2", "train.save_every=1", "train.batch_size=32", "data.train=96", "model.channels=4", "arm=test"]


def composed(name, *overrides):
    """The configuration of a script."""
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def search_config(*overrides):
    return composed("search", *SEARCH, *overrides)


def config(*overrides, genotype="genotype=random"):
    return composed("config", *SHORT, genotype, *overrides)


def write_class_folders(root, classes=("a", "b"), *, train=8, val=2, size=(40, 36)):
    """root/train/<class>/, root/val/<class>/ with noise that the class decides."""
    for split, n in (("train", train), ("val", val)):
        for c, name in enumerate(classes):
            (Path(root) / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                rng = np.random.default_rng([c, i, len(split)])
                pixels = rng.integers(0, 160, (size[1], size[0], 3), dtype=np.uint8) + np.uint8(40 * (c % 3))
                Image.fromarray(pixels).save(Path(root) / split / name / f"{i}.png")
    return Path(root)
