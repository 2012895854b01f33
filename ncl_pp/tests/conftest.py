import pytest
from hydra import compose, initialize_config_dir

from ncl_pp.tests.layouts import CONFIGS, short_config
from ncl_pp.train import fit


@pytest.fixture(scope="session")
def checkpoint(fabric, tmp_path_factory):
    """NCL++ trained for a few epochs on digits, two experts."""
    out = tmp_path_factory.mktemp("trained")
    fit(short_config("train.epochs=10", "train.save_every=10"), fabric, out)
    return out / "last.ckpt"


@pytest.fixture
def script_config():
    """The configuration of another script: script_config("evaluate", "weights=...")."""

    def make(name, *overrides):
        with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
            return compose(name, overrides=list(overrides))

    return make
