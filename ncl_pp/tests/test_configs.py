"""Every experiment finds tiny data in the real layout; every sweep composes; every claim names arms that are run."""

import itertools
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from common import reproduce, scripts
from common.metrics.claims import load_claims
from ncl_pp.tests.layouts import CONFIGS, write_cifar, write_lists
from ncl_pp.train import fit

PAPER = CONFIGS.parent
SCALES = ("mini", "full", "real_fashion_mnist_lt", "gpu_cifar10_lt", "paper")
TINY = ["arm=test", "preflight=true", "data.workers=0", "train.batch_size=4"]
TIMM = ["data.size=32", "model.backbone=test_resnet", "model.pretrained=false"]


def experiment(name, root, *overrides):
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        return compose("config", overrides=[f"experiment={name}", f"data.root={root}", *TINY, *overrides])


def test_no_experiment_is_left_out():
    names = {p.stem for p in (CONFIGS / "experiment").glob("*.yaml")}
    assert names == {"cifar10_lt", "cifar100_lt", "imagenet_lt", "imagenet_lt_resnext50", "places_lt", "inat2018"}
    for name in names:
        head = (CONFIGS / f"experiment/{name}.yaml").read_text().split("defaults:")[0]
        assert f"experiment={name} data.root=" in head and "GPU" in head and "Published: unknown" in head


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("augment", ["cifar", "cifar_weak"])
def test_cifar_preflight(name, augment, fabric, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "torchvision.datasets.cifar.check_integrity", lambda *_: True
    )  # random bytes have no known hash
    write_cifar(tmp_path, name)
    few = ["data.imbalance=2", "method.copies=2"] if name == "cifar100" else ["method=ncl_moco"]
    fit(experiment(f"{name}_lt", tmp_path, f"data.augment={augment}", *few), fabric, tmp_path / "run")
    assert "preflight: data found, 4 images" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


LISTS = {
    "imagenet_lt": ("imagenet", "ImageNet_LT_{}.txt", ("train", "val", "test")),
    "imagenet_lt_resnext50": ("imagenet", "ImageNet_LT_{}.txt", ("train", "val", "test")),
    "places_lt": ("places", "Places_LT_{}.txt", ("train", "val", "test")),
    "inat2018": ("inat2018", "iNaturalist18_{}.txt", ("train", "val")),
}


@pytest.mark.parametrize("name", LISTS)
def test_list_sets_preflight(name, fabric, tmp_path, capsys):
    folder, pattern, splits = LISTS[name]
    write_lists(tmp_path / folder, {s: pattern.format(s) for s in splits})
    moco = ["method=ncl_moco", "moco.queue=8", "moco.dim=8"] if name == "places_lt" else []
    fit(experiment(name, tmp_path, *TIMM, "method.loss.hard=2", *moco), fabric, tmp_path / "run")
    assert "preflight: data found, 4 images" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=pattern.format("train")):
        fit(experiment(name, tmp_path / folder / "train", *TIMM, "method.loss.hard=2"), fabric, tmp_path / "run")


def test_published_budgets_and_schedules():
    """Hard budget, experts and copies, batch, epochs and learning rate as released."""
    expected = {
        "cifar10_lt": (0.3, 64, 400, 0.1, "resnet32"), "cifar100_lt": (0.3, 64, 400, 0.1, "resnet32"),
        "imagenet_lt": (0.3, 256, 200, 0.2, "resnet50"), "imagenet_lt_resnext50": (0.3, 256, 200, 0.2, "resnext50_32x4d"),
        "places_lt": (122, 256, 30, 0.02, "resnet152"), "inat2018": (2442, 512, 400, 0.2, "resnet50"),
    }  # fmt: skip
    for name, (hard, batch, epochs, lr, backbone) in expected.items():
        with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
            cfg = compose("config", overrides=[f"experiment={name}", "arm=test"])
        OmegaConf.to_container(cfg, resolve=True)
        found = (cfg.method.loss.hard, cfg.train.batch_size, cfg.train.epochs, cfg.optim.lr, cfg.model.backbone)
        assert found == (hard, batch, epochs, lr, backbone) and cfg.optim.weight_decay == 2e-4 and cfg.optim.nesterov
        assert (cfg.method.experts, cfg.method.copies, cfg.method.loss.lam, cfg.seed) == (2, 4, 0.6, 42)
        assert cfg.estimate.gpu_hours > 0


def sweep_cells(scale):
    """(sweep file, overrides) of every cell, read from the YAML alone."""
    for file in sorted((CONFIGS / "reproduce" / scale).glob("*.yaml")):
        params = yaml.safe_load(file.read_text())["hydra"]["sweeper"]["params"]
        choices = [[(key, v.strip()) for v in str(values).split(",")] for key, values in params.items()]
        for chosen in itertools.product(*choices):
            yield file, dict(chosen)


def arm_name(file, chosen):
    if "_counts" in file.stem:
        return "counts"
    others = sorted(f"{k}={v}" for k, v in chosen.items() if k not in ("method", "seed"))
    return scripts.arm_name("/".join([chosen["method"], *([",".join(others)] if others else [])]))


@pytest.mark.parametrize("scale", SCALES)
def test_every_claim_names_arms_that_its_scale_runs(scale):
    seeds: dict[str, set] = {}
    for file, chosen in sweep_cells(scale):
        assert chosen["seed"] not in seeds.setdefault(arm_name(file, chosen), set()), f"{file}: a cell twice"
        seeds[arm_name(file, chosen)].add(chosen["seed"])
    claims = [c for c in load_claims(PAPER) if scale in c["scale"]]
    assert claims
    for claim in claims:
        assert set(claim["arms"]) <= seeds.keys(), claim["id"]
        if claim["kind"] == "ordering":
            assert len(set.intersection(*(seeds[a] for a in claim["arms"]))) >= 3, claim["id"]


@pytest.mark.parametrize("scale", SCALES)
def test_sweeps_compose_as_hydra_will_run_them(scale, monkeypatch):
    first = {}
    for file, chosen in sweep_cells(scale):
        first.setdefault(file.stem, (file, chosen))
    monkeypatch.setattr(reproduce, "_choices", lambda override: [override.split(",")[0]])  # one cell of every sweep
    cells = {c.stage: c for c in reproduce.cells(PAPER, scale, ("data.root=/datasets",))}
    assert list(cells) == sorted(first)
    for stage, cell in cells.items():
        assert cell.arm == arm_name(*first[stage]) and cell.seed == int(first[stage][1]["seed"])
        assert cell.dir.is_relative_to(PAPER / "runs" / scale)


@pytest.mark.parametrize("scale", SCALES)
def test_values_are_written_as_hydra_writes_them_into_directory_names(scale):
    """`false` would become False there, and the report would not find the arm."""
    parser = OverridesParser.create()
    for file, chosen in sweep_cells(scale):
        for key, value in chosen.items():
            assert parser.parse_override(f"{key}={value}").get_value_element_as_str() == value, f"{file}: {key}"


def test_every_scale_says_what_it_can_show():
    for scale in SCALES:
        text = (CONFIGS / "reproduce" / scale / "README.md").read_text()
        assert "cannot" in text and len(text) > 200
    assert Path(CONFIGS / "reproduce/mini/00_counts.yaml").exists()
