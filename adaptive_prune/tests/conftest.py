import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from adaptive_prune.settings import CONFIGS
from adaptive_prune.tests.contract import config
from adaptive_prune.train import fit


@pytest.fixture(scope="session")
def script_config():
    """The configuration of another script: script_config("evaluate", "weights=...")."""

    def make(name, *overrides):
        with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
            return compose(name, overrides=list(overrides))

    return make


@pytest.fixture(scope="session")
def checkpoint(fabric, tmp_path_factory):
    """AS-ViT trained for a few steps on digit grids, with options away from their defaults."""
    out = tmp_path_factory.mktemp("trained") / "run"
    more = [
        "method.score=mean",
        "parity.softmax=true",
        "parity.extended_cost=true",
        "method.inference=padded",
        "train.ema=null",
    ]
    fit(config("method.thresholds=[0.01,0.015,0.02]", "data.test_images=40", *more), fabric, out)
    return out / "last.ckpt"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Class folders of small colour pictures: root/train/<class>/ and root/val/<class>/."""
    root = tmp_path_factory.mktemp("pictures")
    for split, n in (("train", 8), ("val", 3)):
        for c, name in enumerate(("red", "green")):
            for i in range(n):
                path = root / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 32), tuple(25 * i + 15 if k == c else 20 for k in range(3))).save(path)
    return root


@pytest.fixture(scope="session")
def folder_arm(pictures):
    """Overrides of a training of seconds on `pictures`."""
    vit = "model.vit={name:vit,img_size:32,patch_size:8,embed_dim:24,depth:4,num_heads:3}"
    return [
        "data=folder", f"data.root={pictures}", "data.workers=0", "train.batch_size=8", vit, "model.locations=[1,2,3]",
        "budget.target=0.8", "start.epochs=1", "start.batch_size=8",
    ]  # fmt: skip
