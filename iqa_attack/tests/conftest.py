from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from iqa_attack.photographs import data as data_of_scripts
from iqa_attack.photographs.photos import graded_photos
from iqa_attack.quality_models.brisque import Brisque, fit_brisque
from iqa_attack.quality_models.cornia import fit_cornia

PAPER = Path(__file__).resolve().parents[1]
CONFIGS = PAPER / "configs"
# a small split: two crops per photograph
SMALL = [
    "data.crops_per_photo=2",
    "data.test_images=4",
    "statistics.cornia.words=12",
    "statistics.cornia.patches=100",
    "statistics.cornia.codebook_patches=2000",
    "networks.ma19.model.width=4",
    "networks.ma19.epochs=2",
    "networks.unique.epochs=2",
    "train.save_every=1",
]
FAST = ["data.crops_per_photo=2", "data.test_images=4", "recipe.steps=4", "pictures=1"]


def config(name, *overrides):
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def train_config(*overrides):
    return config("config", "arm=test", *SMALL, *overrides)


def attack_config(*overrides):
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        fr = next((o.split("=")[1] for o in overrides if o.startswith("fr=")), "chebyshev")
        return compose("attack", overrides=["arm=test", f"fr_name={fr}", *FAST, *overrides])


@pytest.fixture(autouse=True, scope="session")
def embedded_photographs_are_distorted_once():
    """Trainings and attacks of the tests ask for the same few sets; test_data calls the function itself."""
    made = {}

    def kept(**options):
        if options.get("root") is not None:
            return graded_photos(**options)
        key = repr(sorted((k, v if isinstance(v, (int, str)) or v is None else tuple(v)) for k, v in options.items()))
        if key not in made:
            made[key] = graded_photos(**options)
        return {name: replace(data) for name, data in made[key].items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_of_scripts, "graded_photos", kept)
        yield


@pytest.fixture(scope="session")
def photos():
    return graded_photos(seed=0, crops_per_photo=2, test_images=4)


@pytest.fixture(scope="session")
def images(photos):
    """(4, 3, 96, 96) distorted photographs."""
    return photos["attack"].stack()


@pytest.fixture(scope="session")
def brisque(photos):
    with torch.no_grad():
        features = torch.cat([Brisque(support=1).features(x) for x in photos["train"].stack().split(40)])
    return fit_brisque(features, photos["train"].mos, epsilon=1.0)


@pytest.fixture(scope="session")
def cornia(photos):
    return fit_cornia(
        photos["train"].stack(), photos["train"].mos, words=16, seed=0, patches=100, codebook_patches=2000
    )


@pytest.fixture(scope="session")
def trained_root(fabric, tmp_path_factory):
    """A run folder with all four models trained for a moment, where `weights=auto` finds them."""
    from iqa_attack.train import fit

    root = tmp_path_factory.mktemp("runs")
    fit(train_config("method=all", "arm=all", f"run_root={root}"), fabric, root / "default/all/seed0")
    return root
