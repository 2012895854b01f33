"""What the tests share: a small teacher trained once, and configurations that end in seconds."""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from q_vit.train import fit

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHORT = [
    "train.epochs=2", "train.batch_size=16", "train.calibration_images=16", "data.train_images=32", "data.test_images=40",
    "model.depth=1", "model.embed_dim=24", "model.num_heads=2",
]  # fmt: skip


def config(*overrides, name="config"):
    real = any(o.startswith("data=") for o in overrides)  # only the canvases have a number to choose
    short = [*(o for o in SHORT if not (real and o.startswith("data."))), "arm=test"] if name == "config" else []
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        return compose(name, overrides=[*short, *overrides])


def result(folder):
    return json.loads((folder / "result.json").read_text())


def class_folders(root, splits=("train", "val"), classes=("blue", "green", "red"), n=4, size=16):
    """root/<split>/<class>/<i>.png, a colour per class."""
    for split in splits:
        for c, name in enumerate(classes):
            for i in range(n):
                path = Path(root) / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (size, size), tuple(60 * (i % 4) + 50 if k == c else 20 for k in range(3))).save(path)
    return Path(root)


def folder_arm(root, *overrides):
    """A student on class folders, of a small ViT; its teacher is to be given."""
    return config(
        "data=folder", f"data.root={root}", "data.size=16", "data.workers=0", "data.augment=none", "train.batch_size=12",
        "train.calibration_images=12", "train.epochs=1", *overrides,
    )  # fmt: skip


@pytest.fixture(scope="session")
def root(fabric, tmp_path_factory):
    """A run folder that holds the small teacher of the arms, where `teacher.weights=auto` finds it at scale mini."""
    root = tmp_path_factory.mktemp("runs")
    fit(config("method=fp", "arm=fp", "scale=mini"), fabric, root / "mini/fp/seed0")
    return root


@pytest.fixture
def arm(root):
    """arm(*overrides): the configuration of a student whose teacher is there."""
    return lambda *overrides: config(f"run_root={root}", "scale=mini", *overrides)


@pytest.fixture(scope="session")
def checkpoint(fabric, root, tmp_path_factory):
    """A 4-bit student, trained for an epoch."""
    out = tmp_path_factory.mktemp("student")
    fit(config(f"run_root={root}", "scale=mini", "method.bits=4", "train.epochs=1"), fabric, out)
    return out / "last.ckpt"
