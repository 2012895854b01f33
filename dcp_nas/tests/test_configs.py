"""Every experiment composes and builds tiny; every sweep composes; every claim names arms that its scale runs."""

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from common import reproduce, runs
from common.data.batches import Plan
from common.metrics.claims import load_claims
from dcp_nas import detect, reid, search, train
from dcp_nas.checkpoint import build_network
from dcp_nas.data import SmallAugmentation, build_data, split_for_search
from dcp_nas.genotypes import PAPER
from dcp_nas.search_space import GENOTYPES
from dcp_nas.tests import layouts

CONFIGS = PAPER / "configs"
SCALES = ("mini", "full", "real_fashion_mnist", "gpu_cifar10", "paper")
SCRIPTS = {
    "search_cifar10": "search", "search_imagenet": "search", "search_folder": "search", "cifar10_onestage": "config",
    "train_folder": "config",
    "cifar10_step1": "config", "cifar10_step2": "config", "imagenet_step1": "config", "imagenet_step2": "config",
    "market1501": "reid", "voc_detection": "detect", "coco_detection": "detect",
}  # fmt: skip


def composed(name, *overrides):
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        return compose(SCRIPTS[name], overrides=[f"experiment={name}", "arm=test", "data.root=/datasets", *overrides])


def test_no_experiment_is_left_out_and_each_says_how_to_start_it():
    assert {p.stem for p in (CONFIGS / "experiment").glob("*.yaml")} == SCRIPTS.keys()
    for name in SCRIPTS:
        head = (CONFIGS / f"experiment/{name}.yaml").read_text().split("defaults:")[0]
        assert f"experiment={name}" in head and "GPU" in head, name


@pytest.mark.parametrize("name", SCRIPTS)
def test_experiments_compose_and_their_network_builds(name):
    start = [] if "step2" not in name and "detection" not in name and name != "market1501" else ["init.weights=x.ckpt"]
    cfg = composed(name, *start)
    OmegaConf.to_container(cfg, resolve=True)
    if SCRIPTS[name] == "search":
        with torch.device("meta"):
            algorithm = search.build(cfg, classes=10, channels=1, steps=1, device=torch.device("meta"))
        assert len(algorithm.phases()) == 2 * cfg.search.rounds
        return
    with torch.device("meta"):
        network = build_network(
            genotype=GENOTYPES["DCP_NAS_L"],
            model=cfg.model,
            stage=cfg.stage,
            official_m_grad=False,
            classes=1000,
            channels=3,
        )
    if cfg.model.channels == 108:
        channels = 41_688  # one m for every output channel of a 1-bit convolution
        assert sum(p.numel() for p in network.parameters()) == 14_505_886 - (
            0 if cfg.stage.weights == "m" else channels
        )


def test_published_recipe_and_search_defaults():
    cfg = composed("imagenet_step2", "init.weights=x.ckpt")
    found = (
        cfg.optim.name,
        cfg.optim.lr,
        cfg.optim.lr_min,
        cfg.optim.weight_decay,
        cfg.train.batch_size,
        cfg.train.epochs,
    )
    assert (
        found == ("adamw", 1e-3, 1e-5, 0.0, 512, 256)
        and cfg.stage.reconstruction == 0.5e-4
        and cfg.teacher.timm.startswith("resnet34")
    )
    assert (
        composed("imagenet_step1").optim.weight_decay == 1e-5
        and composed("imagenet_step1").stage.activations == "binary"
    )
    cfg = composed("search_cifar10")
    assert (cfg.method.lam, cfg.method.mu, cfg.method.hessian, cfg.method.distance) == (5e-3, 0.2, "ggn", "frobenius")
    assert (cfg.search.batch_size, cfg.w.lr, cfg.w.lr_min, cfg.alpha.lr, list(cfg.alpha.betas)) == (
        64,
        0.025,
        0.001,
        3e-4,
        [0.5, 0.999],
    )
    assert (
        train.cosine_lr(1, lr=1.0, lr_min=0.1, epochs=10) == 1.0
        and 0.1 < train.cosine_lr(10, lr=1.0, lr_min=0.1, epochs=10) < 0.13
    )


STEP_2 = sorted(n for n in SCRIPTS if "step2" in n or "detection" in n or n == "market1501")


@pytest.mark.parametrize("name", STEP_2)
def test_a_recipe_of_step_two_without_step_one_is_an_error(name, tmp_path):
    """Each composes without it: the second step on random weights would train, and mean nothing."""
    fabric = runs.launch({"accelerator": "cpu", "devices": 1})
    cell = [] if name.startswith("imagenet") else ["genotype=dcp_nas_l"]
    fit = {"config": train.fit, "reid": reid.fit, "detect": detect.fit}[SCRIPTS[name]]
    with pytest.raises(ValueError, match=r"stage=step2 begins with the weights of step 1: give init\.weights"):
        fit(composed(name, *cell), fabric, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"no step-1 checkpoint at /nowhere\.ckpt"):
        fit(composed(name, *cell, "init.weights=/nowhere.ckpt"), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_arm_of_a_training_is_the_cell_that_it_trains():
    def arm(*overrides):
        with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
            return compose("config", overrides=list(overrides)).arm

    assert arm() == "dcp_ggn_do" and arm("genotype.arm=cp_do") == "cp_do"
    assert arm("genotype=random", "genotype.draw=2") == "random_2" and arm("genotype=dcp_nas_l") == "dcp_nas_l"
    published = {name.lower() for name in GENOTYPES}
    assert {p.stem for p in (CONFIGS / "genotype").glob("*.yaml")} == published | {"file", "random", "searched"}


def test_estimated_hours_follow_what_a_rule_costs():
    hours = {
        m: composed("search_imagenet", f"method={m}").estimate.gpu_hours
        for m in ("direct", "cp", "dcp_exact", "dcp_ggn")
    }
    assert 0 < hours["direct"] < hours["cp"] < hours["dcp_exact"] < hours["dcp_ggn"] < hours["cp"] * 1.5
    assert composed("imagenet_step2", "init.weights=x").estimate.gpu_hours > 0
    assert composed("search_imagenet", "method=dcp_fisher").estimate.gpu_hours > hours["dcp_ggn"]


def sweep_cells(scale):
    """(sweep file, overrides) of every cell, read from the YAML alone."""
    for file in sorted((CONFIGS / "reproduce" / scale).glob("*.yaml")):
        params = yaml.safe_load(file.read_text())["hydra"]["sweeper"]["params"]
        choices = [[(key, v.strip()) for v in str(values).split(",")] for key, values in params.items()]
        for chosen in itertools.product(*choices):
            yield file, dict(chosen)


@pytest.mark.parametrize("scale", SCALES)
def test_every_claim_names_arms_that_its_scale_runs(scale, monkeypatch):
    one_seed = lambda override: OverridesParser.create().parse_override(override)  # noqa: E731

    def choices(override):
        key = override.split("=", 1)[0]
        parsed = one_seed(override)
        values = (
            list(parsed.sweep_string_iterator()) if parsed.is_sweep_override() else [parsed.get_value_element_as_str()]
        )
        return [f"{key}={v}" for v in (values[:1] if key == "seed" else values)]

    monkeypatch.setattr(reproduce, "_choices", choices)
    extra = () if scale in ("mini", "full") else ("data.root=/datasets",)
    cells = reproduce.cells(PAPER, scale, extra)
    arms = {c.arm for c in cells}
    claims = [c for c in load_claims(PAPER) if scale in c["scale"]]
    assert claims and all(set(c["arms"]) <= arms for c in claims), [
        c["id"] for c in claims if not set(c["arms"]) <= arms
    ]
    assert all(c.dir.is_relative_to(PAPER / "runs" / scale) for c in cells)
    assert len({c.dir for c in cells}) == len(cells)


@pytest.mark.parametrize("scale", SCALES)
def test_values_are_written_as_hydra_writes_them_and_seeds_are_those_of_the_evidence(scale):
    parser = OverridesParser.create()
    for file, chosen in sweep_cells(scale):
        for key, value in chosen.items():
            assert parser.parse_override(f"{key}={value}").get_value_element_as_str() == value, f"{file}: {key}"
        assert int(chosen["seed"]) >= 100 or "_counts" in file.stem
        text = (file.parent / "README.md").read_text()
        assert "cannot" in text.lower() and len(text) > 200


# ----------------------------------------------------------------------------------------------------------------- data
def test_the_halves_of_a_search_are_disjoint_and_cover_their_shares():
    data = build_data(name="digits", seed=0, train=100)
    w, a = split_for_search(data, [0.5, 0.25], seed=3)
    assert (len(w), len(a)) == (50, 25)
    rows = {tuple(x.flatten().tolist()) for x in torch.cat([w.tensors[0], a.tensors[0]])}
    assert len(rows) == 75
    again = split_for_search(data, [0.5, 0.25], seed=3)[0]
    assert torch.equal(again.tensors[0], w.tensors[0])
    assert not torch.equal(split_for_search(data, [0.5, 0.25], seed=4)[0].tensors[0], w.tensors[0])


def test_cutout_blanks_one_square_at_the_drawn_centre():
    augment = SmallAugmentation("cifar10", 6)
    images = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    offset, flip = torch.full((2, 2), 4), torch.tensor([False, False])
    centre = torch.tensor([[10, 20], [0, 31]])
    out = augment(images.float() / 255, offset, flip, centre)
    blank = (out == 0).all(1)
    assert blank[0].sum() == 36 and blank[0, 7:13, 17:23].all() and blank[1].sum() == 3 * 4
    drawn = augment.draw((5, 3, 32, 32), torch.Generator().manual_seed(0))
    assert len(drawn) == 3 and drawn[2].shape == (5, 2) and int(drawn[2].max()) < 32


def write_idx(root, split, n):
    """n images of 28 x 28, white where the class says, in torchvision's layout."""
    raw = Path(root) / "FashionMNIST/raw"
    raw.mkdir(parents=True, exist_ok=True)
    labels = (np.arange(n) % 10).astype(np.uint8)
    images = np.zeros((n, 28, 28), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, : 2 * label + 1] = 255
    for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
        head = struct.pack(f">{1 + values.ndim}i", 0x800 + values.ndim, *values.shape)
        (raw / f"{split}-{kind}-ubyte").write_bytes(head + values.tobytes())


def test_fashion_mnist_is_read_drawn_from_and_normalised(tmp_path):
    write_idx(tmp_path, "train", 100)
    write_idx(tmp_path, "t10k", 20)
    cfg = layouts.search_config("data=fashion_mnist", f"data.root={tmp_path}", "data.train=60")
    search.check(cfg, runs.launch({"accelerator": "cpu", "devices": 1}))
    data = build_data(seed=0, **cfg.data)
    assert (len(data), data.channels, data.size, data.classes) == (60, 1, 28, 10) and data.names[9] == "Ankle boot"
    kept = [torch.sort(build_data(seed=s, **cfg.data).tensors[1]).values for s in (0, 0, 1)]
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])
    assert len(build_data(seed=0, **{**cfg.data, "train": None})) == 100
    image, label = data.test[3]
    assert image.shape == (1, 28, 28) and label == 3
    assert image.min().item() == pytest.approx(-0.286 / 0.353) and image.max().item() == pytest.approx(0.714 / 0.353)
    plan = Plan(60, 20, seed=0)
    (images,), _ = next(iter(data.batches(plan, torch.device("cpu")).epoch(0)))
    assert images.shape == (20, 1, 28, 28) and images.max() == image.max()
    with pytest.raises(ValueError, match=r"data\.train=0, allowed: 1\.\.60000"):
        build_data(seed=0, **{**cfg.data, "train": 0})


def test_missing_data_says_where_and_writes_nothing(tmp_path):
    fabric = runs.launch({"accelerator": "cpu", "devices": 1})
    # search_folder: a line of command_lines.yaml
    for name, fit in (("search_cifar10", search.fit), ("imagenet_step1", train.fit)):
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            fit(composed(name, f"data.root={tmp_path}"), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()
