"""Every sweep and experiment composes; every claim names arms that its scales run."""

import itertools

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from common import reproduce
from common.metrics.claims import load_claims
from iqa_attack.procedures import strengths_of
from iqa_attack.tests.conftest import CONFIGS, PAPER

SCALES = sorted(p.name for p in (CONFIGS / "reproduce").iterdir())


def cells(scale):
    """(stage, arm, seed) of every cell, read from the YAML alone."""
    for file in sorted((CONFIGS / "reproduce" / scale).glob("*.yaml")):
        params = yaml.safe_load(file.read_text())["hydra"]["sweeper"]["params"]
        choices = [[(key, v.strip()) for v in str(values).split(",")] for key, values in params.items()]
        for chosen in itertools.product(*choices):
            c = dict(chosen)
            script = file.stem.split("_")[1]
            if script == "attack":
                arm = f"{c.get('nr', 'brisque')}_{c.get('fr', 'chebyshev')}_{c.get('attack', 'perceptual')}"
                arm += f"/preset-{c['preset']}" if "preset" in c else ""
            else:
                arm = {
                    "counts": "counts", "tables": f"table_{c.get('made_by')}", "train": c.get("method"),
                    "sensitivity": f"sensitivity_{c.get('train_arm')}",
                }[script]  # fmt: skip
            yield file.stem, arm, int(c["seed"])


def test_the_scales_of_the_issue_are_there():
    assert {"mini", "full", "real_kodak", "gpu_kodak", "paper"} <= set(SCALES)
    for scale in SCALES:
        text = (CONFIGS / "reproduce" / scale / "README.md").read_text()
        assert "cannot" in text and len(text) > 200


@pytest.mark.parametrize("scale", SCALES)
def test_every_claim_names_arms_that_its_scale_runs(scale):
    seeds: dict[str, set] = {}
    for _, arm, seed in cells(scale):
        assert seed not in seeds.setdefault(arm, set()), f"{arm}: a cell twice"
        assert seed == 0 if arm == "counts" else seed >= 100
        seeds[arm].add(seed)
    claims = [c for c in load_claims(PAPER) if scale in c["scale"]]
    assert claims
    for claim in claims:
        assert set(claim["arms"]) <= seeds.keys(), claim["id"]
        if claim["kind"] in ("ordering", "ratio", "property"):
            assert len(set.intersection(*(seeds[a] for a in claim["arms"]))) >= 3, claim["id"]


@pytest.mark.parametrize("scale", SCALES)
def test_sweeps_compose_as_hydra_will_run_them(scale, monkeypatch):
    first = {}
    for stage, arm, seed in cells(scale):
        first.setdefault(stage, (arm, seed))
    monkeypatch.setattr(reproduce, "_choices", lambda override: [override.split(",")[0]])  # one cell of every sweep
    found = {c.stage: c for c in reproduce.cells(PAPER, scale, ("data.root=/datasets",))}
    assert list(found) == sorted(first)
    for stage, cell in found.items():
        assert (cell.arm, cell.seed) == first[stage]


@pytest.mark.parametrize("file", sorted((CONFIGS / "experiment").glob("*.yaml")), ids=lambda f: f.stem)
def test_experiments_compose(file):
    entry = "attack" if "attack.py" in file.read_text() else "config"
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        cfg = compose(
            entry,
            overrides=[
                f"experiment={file.stem}",
                "data.root=/datasets",
                "arm=test",
                *(["fr_name=x"] if entry == "attack" else []),
            ],
        )
    assert OmegaConf.to_container(cfg, resolve=True)
    assert f"experiment={file.stem}" in file.read_text() and "GPU" in file.read_text().split("\n")[1]


def test_published_settings():
    def experiment(entry, name):
        with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
            return compose(
                entry,
                overrides=[
                    f"experiment={name}",
                    "data.root=/d",
                    "arm=t",
                    *(["fr_name=x"] if entry == "attack" else []),
                ],
            )

    live = experiment("attack", "attack_live")
    assert (
        live.preset == "official"
        and live.recipe.steps == 200
        and len(strengths_of(live)) == 32
        and len(live.data.listed) == 12
    )
    unique = experiment("config", "unique").networks.unique
    assert (
        unique.lr,
        unique.weight_decay,
        unique.batch_size,
        unique.epochs,
        unique.crop,
        unique.resize,
        unique.frozen_epochs,
    ) == (
        1e-4,
        5e-4,
        32,
        12,
        384,
        512,
        3,
    )
