"""The scripts as people run them: every arm, stages, resume, two ranks, errors, and what they leave behind."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from common import runs
from common.testing import process
from rbonn import train
from rbonn.data import build_data
from rbonn.tests.layouts import CONFIGS, SHORT, config, folder_config, interrupted
from rbonn.train import build, fit

PAPER = Path(__file__).resolve().parents[1]
ARMS = sorted(p.stem for p in (CONFIGS / "method").glob("*.yaml"))


def result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def stage1(fabric, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage1")
    fit(config("method=activations"), fabric, folder)
    return folder / "last.ckpt"


@pytest.mark.parametrize("method", ARMS)
def test_every_arm_trains_and_reports(method, fabric, tmp_path, stage1):
    start = [] if method in ("real", "activations") else [f"init.weights={stage1}"]
    fit(config(f"method={method}", *start), fabric, tmp_path)
    found = result(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in {"flip_rate", "active_share", "lookahead_flips"} & set(rows[0]):
        assert found["metrics"][name] == pytest.approx(sum(r[name] for r in rows) / 2), "the mean over the epochs"
    assert (
        found["metrics"]["last_loss"] == rows[1]["loss"] and found["metrics"]["train_ce"] != found["metrics"]["test_ce"]
    )
    assert found["status"] == "finished" and 0 <= found["metrics"]["top1"] <= found["metrics"]["top5"] <= 100
    assert (
        ("flip_rate" in found["metrics"])
        == ("latent_sparsity" in found["metrics"])
        == (method not in ("real", "activations"))
    )
    recurrent = config(f"method={method}").method.recurrent != "none"
    assert ("active_share" in found["metrics"]) == recurrent
    if recurrent and method != "paper":
        assert found["metrics"]["active_share"] > 0 and found["metrics"]["lookahead_flips"] > 0


def test_two_stages_begin_with_the_weights_of_the_first(fabric, stage1):
    cfg = config("method=drelu_fixed", f"init.weights={stage1}")
    model, teacher, begun = build(cfg, build_data(seed=0, **cfg.data))
    assert teacher is None and set(begun) == {"init"}
    old = runs.load_checkpoint(stage1)["model"]
    new = model.state_dict()
    assert all(torch.equal(v, new[k]) for k, v in old.items())
    assert {k.rpartition(".")[2] for k in new.keys() - old.keys()} == {"scale_factor", "u"}


def test_the_teacher_is_its_checkpoint_frozen_in_evaluation_mode_and_gives_the_labels(fabric, tmp_path, stage1):
    overrides = ["method=xnor", f"init.weights={stage1}"]
    cfg = config(*overrides, f"teacher.weights={stage1}")
    _, teacher, begun = build(cfg, build_data(seed=0, **cfg.data))
    saved = runs.load_checkpoint(stage1)["model"]
    assert all(torch.equal(v, saved[k]) for k, v in teacher.state_dict().items()) and set(begun) == {"init", "teacher"}
    assert not any(m.training for m in teacher.modules()) and not any(p.requires_grad for p in teacher.parameters())
    fit(config(*overrides, "train.epochs=1"), fabric, tmp_path / "labels")
    fit(config(*overrides, "train.epochs=1", f"teacher.weights={stage1}"), fabric, tmp_path / "teacher")
    rows = [
        json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[0])["loss"] for n in ("labels", "teacher")
    ]
    assert rows[0] != rows[1]


def test_estimators_of_irnet_are_those_of_the_epochs_before(fabric, tmp_path, stage1, monkeypatch):
    """t from 0.1 towards 10 by equal factors: at the beginning of the first of 4 epochs it is 0.1."""
    seen = []

    def epoch(fabric, model, *_, **more):
        seen.append(next(m.t for m in model.modules() if hasattr(m, "t")))
        return {"loss": 1.0}

    monkeypatch.setattr(train, "train_one_epoch", epoch)
    fit(config("method=irnet", f"init.weights={stage1}", "train.epochs=4"), fabric, tmp_path)
    assert seen == pytest.approx([0.1, 0.1 * 10**0.5, 1.0, 10**0.5])


def test_loss_falls_and_equal_seeds_give_equal_numbers(fabric, tmp_path):
    for name in ("a", "b"):
        fit(
            config("method=drelu_official", "train.epochs=8", "data.sigma=0.0", "optim.lr=0.01"),
            fabric,
            tmp_path / name,
        )
    rows = [json.loads(line)["loss"] for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert rows[-1] < 0.9 * rows[0]
    assert (tmp_path / "a/metrics.jsonl").read_text() == (tmp_path / "b/metrics.jsonl").read_text()


@pytest.mark.parametrize("method", ["all", "paper", "irnet"])
def test_a_run_goes_on_bit_for_bit_with_its_snapshot_and_differs_without(method, fabric, tmp_path):
    """Killed after the first of two epochs. What the checkpoint of the recurrence is for: without it the weights are others."""
    cfg = config(f"method={method}", "optim.lr=0.05")
    fit(cfg, fabric, tmp_path / "whole")
    whole = runs.load_checkpoint(tmp_path / "whole/last.ckpt")
    found = {}
    for kept in (True, False):
        interrupted(fit, cfg, fabric, tmp_path / str(kept), forget=() if kept else ("recurrence",))
        fit(cfg, fabric, tmp_path / str(kept))
        found[kept] = runs.load_checkpoint(tmp_path / str(kept) / "last.ckpt")
    torch.testing.assert_close(found[True]["model"], whole["model"], rtol=0, atol=0)
    torch.testing.assert_close(found[True]["recurrence"], whole["recurrence"], rtol=0, atol=0)
    assert result(tmp_path / "whole")["metrics"] == result(tmp_path / "True")["metrics"]
    same = all(torch.equal(v, whole["model"][n]) for n, v in found[False]["model"].items())
    assert same == (method == "irnet"), "irnet has no recurrence, the others do"


def test_mixed_precision_keeps_the_recurrence_on(fabric, tmp_path):
    half = runs.launch({"accelerator": "cpu", "devices": 1, "precision": "bf16-mixed"})
    fit(config("method=all", "fabric.precision=bf16-mixed"), half, tmp_path)
    assert result(tmp_path)["metrics"]["lookahead_flips"] > 0


RANKS = """
import sys, torch
from lightning_fabric import Fabric
from torch import nn
from common import runs
from rbonn.recurrent import RBConv2d, Recurrence

fabric = Fabric(accelerator="cpu", devices=int(sys.argv[1]), strategy="ddp" if sys.argv[1] == "2" else "auto")
fabric.launch()
torch.manual_seed(0)
net = nn.Sequential(RBConv2d(3, 6, 3, recurrent="all", lam=1e-2), nn.Flatten(), nn.Linear(54, 4)).double()
raw = torch.optim.SGD(net.parameters(), lr=0.1)
model, optimizer = fabric.setup(net, raw)
recurrence = Recurrence(net, raw)
for k in range(3):
    g = torch.Generator().manual_seed(k)
    x, y = torch.randn(8, 3, 5, 5, generator=g, dtype=torch.float64), torch.randint(0, 4, (8,), generator=g)
    part = slice(fabric.global_rank * 8 // fabric.world_size, (fabric.global_rank + 1) * 8 // fabric.world_size)
    fabric.backward(nn.functional.cross_entropy(model(x[part]), y[part]))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
if fabric.global_rank == 0:
    signs, scale = net[0].signs_and_scale()
    binary = {"signs": signs, "scale": scale}
    torch.save({"previous": net[0].previous, "model": net.state_dict(), **binary, **recurrence.counters()}, sys.argv[2])
runs.leave()
"""


def test_two_ranks_snapshot_the_averaged_gradient(ranks, tmp_path, monkeypatch):
    file = tmp_path / "ranks.py"
    file.write_text(RANKS)
    done = ranks(file, ["2", str(tmp_path / "2")])
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", ["ranks.py", "1", str(tmp_path / "1")])
    runpy.run_path(str(file))
    one, two = (torch.load(tmp_path / world, weights_only=True) for world in ("1", "2"))
    torch.testing.assert_close(one["previous"], two["previous"])
    torch.testing.assert_close(one["model"], two["model"])
    assert torch.equal(one["signs"], two["signs"])
    torch.testing.assert_close(one["scale"], two["scale"])
    assert one["lookahead_flips"] == two["lookahead_flips"] > 0 and one["flip_rate"] == two["flip_rate"]
    assert one["active_share"] == two["active_share"] == 1.0 and one["previous"].abs().sum() > 0


def test_the_script_runs_from_inside_its_folder(tmp_path):
    begun = process(PAPER / "train.py", [*SHORT, "method=bilinear", "train.epochs=1", f"run_root={tmp_path}"], tmp_path)
    begun.join()
    assert begun.exitcode == 0 and "epochs 1..1" in (tmp_path / "out").read_text(), (tmp_path / "err").read_text()
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    assert checkpoint.parent.name == "seed0" and checkpoint.parents[2].name == "bilinear"


def test_a_finished_run_is_skipped(fabric, stage1, capsys):
    before = stage1.stat().st_mtime_ns
    fit(config("method=activations"), fabric, stage1.parent)
    assert "finished already" in capsys.readouterr().out and stage1.stat().st_mtime_ns == before


# --------------------------------------------------------------------------------------------------------------- errors
def test_a_missing_or_foreign_first_stage_and_a_teacher_with_other_classes(fabric, tmp_path, stage1):
    with pytest.raises(FileNotFoundError, match=r"no stage-1 checkpoint at .*method=activations"):
        fit(config("init.arm=activations", f"run_root={tmp_path / 'none'}"), fabric, tmp_path / "run")
    with pytest.raises(ValueError, match="is no first stage of this network"):
        fit(config(f"init.weights={stage1}", "model.widths=[8,32]"), fabric, tmp_path / "run")
    state = runs.load_checkpoint(stage1)
    state["about"]["classes"] = list("abcdefghij")  # as many, but others
    torch.save(state, tmp_path / "others.ckpt")
    with pytest.raises(ValueError, match="has other classes than the data: 'a' where the data have '0'"):
        fit(config(f"teacher.weights={tmp_path / 'others.ckpt'}"), fabric, tmp_path / "run")
    state["about"]["classes"] = list("abcdefg")
    state["model"] |= {"fc.weight": torch.zeros(7, 16), "fc.bias": torch.zeros(7)}
    torch.save(state, tmp_path / "seven.ckpt")
    with pytest.raises(ValueError, match="has 7 classes, the data 10"):
        fit(config(f"teacher.weights={tmp_path / 'seven.ckpt'}"), fabric, tmp_path / "run")
    torch.save({"x": 1}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="neither a checkpoint of rbonn/train.py"):
        fit(config(f"teacher.weights={tmp_path / 'other.ckpt'}"), fabric, tmp_path / "run")
    fit(config("method=xnor", "train.epochs=1"), fabric, tmp_path / "xnor")
    with pytest.raises(
        ValueError, match="is no first stage: its weights are xnor; stage 2 begins with method=activations"
    ):
        fit(config(f"init.weights={tmp_path / 'xnor/last.ckpt'}"), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nan_loss_stops_the_run_and_names_the_term(fabric, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d+:.*(loss|gradient norm)=(nan|inf)"):
        fit(config("optim.lr=1e30", "optim.name=sgd", "train.epochs=4"), fabric, tmp_path)
    assert result(tmp_path)["status"] == "failed"


def test_preflight_writes_nothing_and_missing_data_says_where(fabric, tmp_path, capsys):
    fit(config("preflight=true"), fabric, tmp_path / "run")
    assert "preflight: data found" in capsys.readouterr().out and not (tmp_path / "run").exists()
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "nowhere")):
        fit(folder_config(tmp_path / "nowhere"), fabric, tmp_path / "run")


def test_preflight_stands_in_for_stages_that_are_not_there_and_trains_none(fabric, tmp_path, capsys, monkeypatch):
    from rbonn import train

    taught, loss = [], train.distribution_loss
    monkeypatch.setattr(train, "distribution_loss", lambda *logits: taught.append(logits) or loss(*logits))
    runs_at = tmp_path / "runs"
    cfg = config("preflight=true", "init.arm=activations", "teacher.arm=real", f"run_root={runs_at}")
    fit(cfg, fabric, tmp_path / "run")
    assert len(taught) >= 2, "the teacher's forward pass is on the clock"
    fit(config("preflight=true", "init.weights=required"), fabric, tmp_path / "run")
    said = capsys.readouterr().out
    assert "init.weights is not set, fresh weights" in said
    assert "no stage-1 checkpoint" in said and "no teacher" in said and "teacher's forward pass included" in said
    assert not runs_at.exists() and not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------------------- stages
def test_a_stage_is_found_by_its_data_and_model_also_in_a_directory_of_overrides(fabric, tmp_path):
    def stage(folder, *overrides):
        fit(config("method=activations", "arm=activations", "train.epochs=1", *overrides), fabric, tmp_path / folder)

    here = [f"run_root={tmp_path}", "method=xnor", "init.arm=activations"]
    stage("default/activations/seed0")
    with pytest.raises(FileNotFoundError, match="activations/seed1/last.ckpt"):  # every seed has a stage of its own
        fit(config(*here, "seed=1"), fabric, tmp_path / "run")
    with pytest.raises(ValueError, match=r"data.sigma: 0.25 -> 0.1.*method=activations"):
        fit(config(*here, "data.sigma=0.1"), fabric, tmp_path / "run")
    stage("default/activations/data.sigma-0.1/seed0", "data.sigma=0.1")
    fit(config(*here, "data.sigma=0.1", "train.epochs=1"), fabric, tmp_path / "run")
    stage("default/activations/other/seed0", "data.sigma=0.1", "optim.lr=0.1")
    with pytest.raises(ValueError, match="choose one with init.weights="):
        fit(config(*here, "data.sigma=0.1"), fabric, tmp_path / "run2")
    unfinished = tmp_path / "default/activations/seed0/result.json"
    unfinished.write_text(unfinished.read_text().replace('"finished"', '"running"'))
    with pytest.raises(ValueError, match="has not finished: run its command again"):
        fit(config(*here), fabric, tmp_path / "run3")


def test_another_first_stage_is_another_run(fabric, tmp_path, stage1):
    begin = tmp_path / "begin.ckpt"
    begin.write_bytes(stage1.read_bytes())
    cfg = config("method=xnor", f"init.weights={begin}", "train.epochs=1")
    fit(cfg, fabric, tmp_path / "run")
    state = runs.load_checkpoint(stage1)
    state["model"]["fc.bias"] += 1
    torch.save(state, begin)
    with pytest.raises(runs.RunError, match="on other data .init"):
        fit(cfg, fabric, tmp_path / "run")


@pytest.mark.parametrize("experiment", sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml")))
def test_no_recipe_of_a_second_stage_starts_without_the_first(experiment, fabric, tmp_path):
    """init.weights must be given where the recipe needs it, and a stage that is named by its arm must be there."""
    from rbonn import detect

    main, fit_ = ("detect", detect.fit) if experiment.endswith("detection") else ("config", fit)
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        cfg = compose(
            main, overrides=[f"experiment={experiment}", "arm=test", "data.root=/nowhere", f"run_root={tmp_path}"]
        )
    second = "stage2" in experiment or main == "detect"
    expected = (
        "init.weights is not set, and this recipe needs it|no stage-1 checkpoint" if second else "no folder /nowhere"
    )
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        fit_(cfg, fabric, tmp_path / "run")
    if main == "config" and cfg.init.weights is not None:  # an arm is enough
        with pytest.raises(FileNotFoundError, match="no stage-1 checkpoint at .*activations/seed0"):
            OmegaConf.update(cfg, "init.arm", "activations")
            fit_(cfg, fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pretrained_teachers_offline_name_the_option_for_a_file(fabric, tmp_path, monkeypatch):
    import timm

    def offline(*args, **kwargs):
        assert kwargs["pretrained"]
        raise OSError("cannot reach the hub")

    monkeypatch.setattr(timm, "create_model", offline)
    cfg = config("teacher.timm=resnet10t")
    with pytest.raises(ValueError, match="cannot reach the hub.*teacher.weights=<file> beside teacher.timm"):
        build(cfg, build_data(seed=0, **cfg.data))
    cfg = config("teacher.timm=resnet10t", "teacher.weights=/nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="no file /nowhere.safetensors"):
        build(cfg, build_data(seed=0, **cfg.data))


def test_a_timm_teacher_of_other_classes_is_refused(monkeypatch):
    import timm

    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: make(name, **options | {"pretrained": False}))
    cfg = config("teacher.timm=resnet10t")
    with pytest.raises(ValueError, match="the teacher resnet10t has 1000 classes, the data 10"):
        build(cfg, build_data(seed=0, **cfg.data))


def test_every_config_composes_and_builds():
    from rbonn.network import build_network

    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        for model in (CONFIGS / "model").glob("*.yaml"):
            for method in ("real", "drelu_official", "irnet"):
                cfg = compose("config", overrides=[f"model={model.stem}", f"method={method}", "arm=test"])
                with torch.device("meta"):
                    build_network(model=cfg.model, method=cfg.method, sign_zero=1, classes=10, channels=3)
        for experiment in sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml")):
            main = "detect" if experiment.endswith("detection") else "config"
            cfg = compose(main, overrides=[f"experiment={experiment}", "arm=test", "data.root=/x"])
            runs.plain(cfg)
        for sweep in sorted((CONFIGS / "reproduce").rglob("*.yaml")):
            scale, script = sweep.parent.name, sweep.stem.split("_")[1]
            main = {"train": "config"}.get(script, script)
            cfg = compose(main, overrides=[f"+reproduce/{scale}={sweep.stem}", "arm=test"], return_hydra_config=True)
            assert cfg.scale == scale and cfg.hydra.sweeper.params


IMAGES = {"imagenet": 1_281_167, "cifar10": 50_000}
TEACHER_GMAC = 3.664  # torchvision's ResNet-34 at 224 x 224


@pytest.mark.parametrize("experiment", sorted(p.stem for p in (CONFIGS / "experiment").glob("*stage*.yaml")))
def test_the_hours_of_a_recipe_follow_from_its_forward_passes(experiment):
    from common.metrics.ops import count_macs
    from rbonn.network import build_network

    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        cfg = compose("config", overrides=[f"experiment={experiment}", "arm=test"])
    size = 32 if "cifar10" in experiment else 224
    with torch.device("meta"):
        network = build_network(
            model=cfg.model, method={"weights": "real", "activations": "real"}, sign_zero=1, classes=10, channels=3
        )
        gmac = sum(count_macs(network, torch.empty(1, 3, size, size)).values()) / 1e9
    passes = 3 * gmac + (TEACHER_GMAC if cfg.teacher.timm else 0)
    hours = IMAGES[experiment.split("_")[0]] * cfg.train.epochs * passes / 3000 / 3600
    assert cfg.estimate.gpu_hours == pytest.approx(hours, rel=0.03)
