"""The script as people run it: every arm, resume, two ranks, errors, and what it leaves behind."""

import json
import math
import shutil
import time
from copy import deepcopy

import pytest
import torch
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from PIL import Image

from common import runs
from common.data.batches import eval_batches
from common.testing import process
from ncl_pp import evaluate, train
from ncl_pp.checkpoint import data_of, load
from ncl_pp.contrastive import MomentumContrast
from ncl_pp.data import build_data
from ncl_pp.model import ensemble
from ncl_pp.tests.layouts import CONFIGS, DIGITS, SHORT, folder_arm, short_config
from ncl_pp.train import build, fit, losses

PAPER = CONFIGS.parent
ARMS = sorted(p.stem for p in (CONFIGS / "method").glob("*.yaml"))


@pytest.mark.parametrize("method", ARMS)
def test_every_arm_trains_and_reports(method, fabric, tmp_path):
    fit(short_config(f"method={method}", "train.epochs=2"), fabric, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "finished" and 0 <= result["metrics"]["top1"] <= 100
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in rows] == [1, 2] and rows[0]["lr"] == pytest.approx(0.1)
    state = runs.load_checkpoint(tmp_path / "last.ckpt")
    assert state["epoch"] == 2 and len(state["indices"]) == sum(state["about"]["counts"])


def test_loss_falls_and_equal_seeds_give_equal_numbers(fabric, tmp_path):
    overrides = ["method=bsce", "train.epochs=12"]
    for name in ("a", "b"):
        fit(short_config(*overrides), fabric, tmp_path / name)
    rows = [json.loads(line)["ce"] for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert rows[-1] < 0.7 * rows[0]
    assert (tmp_path / "a/metrics.jsonl").read_text() == (tmp_path / "b/metrics.jsonl").read_text()


@pytest.mark.parametrize("method", ["nclpp", "ncl_moco"])  # ncl_moco: momentum encoders and queues, too
def test_resumed_equals_uninterrupted_bit_for_bit(method, resumed):
    whole, _ = resumed(fit, short_config(f"method={method}"))
    assert any("queue" in name for name in runs.load_checkpoint(whole / "last.ckpt")["model"]) is (method == "ncl_moco")


def test_the_contrastive_branch_trains_its_heads_and_moves_its_keys(fabric, tmp_path):
    cfg = short_config(
        "method=ncl_moco", "train.epochs=1", "schedule.kind=step", "schedule.warmup=0", "method.w_con=0.5"
    )
    before = build(cfg, build_data(seed=0, **cfg.data))[0].state_dict()
    fit(cfg, fabric, tmp_path)
    after = runs.load_checkpoint(tmp_path / "last.ckpt")["model"]
    for name in (
        "contrast.heads.1.0.weight",
        "contrast.key_heads.1.0.weight",
        "contrast.key_backbones.2.blocks.0.weight",
    ):
        assert not torch.equal(before[name], after[name]), name
    images = sum(build_data(seed=0, **cfg.data).counts)
    assert after["contrast.pointer"] == images // 32 * 32 < 256, "one batch of keys enters the queue per step"
    contrast = json.loads((tmp_path / "metrics.jsonl").read_text())["contrast"]
    assert 0.4 < contrast / (0.5 * 3 * math.log(257)) < 1.2, "w_con times the sum over three experts"


def test_the_keys_are_made_of_the_last_view_and_averaged_once_per_step(fabric, tmp_path, monkeypatch):
    cfg = short_config("method=ncl_moco", "train.epochs=1", "schedule.kind=step", "schedule.warmup=0")
    data = build_data(seed=0, **cfg.data)
    model, criterion = build(cfg, data)
    views, labels = list(torch.rand(criterion.copies + 1, 32, 1, 8, 8)), torch.arange(32) % 10
    first, other = (
        losses(deepcopy(model).eval(), criterion, [*views[:-1], last], labels) for last in (views[-1], views[0])
    )
    assert torch.equal(first["ce"], other["ce"]) and not torch.equal(first["contrast"], other["contrast"])
    average, done = MomentumContrast.update, []
    monkeypatch.setattr(MomentumContrast, "update", lambda self, nets: done.append(1) or average(self, nets))
    fit(cfg, fabric, tmp_path)
    assert len(done) == sum(data.counts) // 32


def test_a_queue_that_does_not_fit_is_refused_before_anything_is_written(fabric, tmp_path):
    with pytest.raises(ValueError, match="queue=100 is no multiple of the global batch 32"):
        fit(short_config("method=ncl_moco", "moco.queue=100"), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def images(root):
    """A class folder of coloured squares, 12 training and 4 test images in three classes."""
    for split, n in (("train", 4), ("test", 2)):
        for c, name in enumerate(("red", "green", "blue")):
            for i in range(n):
                path = root / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), tuple(60 * i + 50 if k == c else 20 for k in range(3))).save(path)
    return root


def test_accumulation_equals_the_whole_batch_without_batch_statistics(fabric, tmp_path):
    base = [*folder_arm(images(tmp_path / "data")), "train.epochs=2"]
    fit(short_config(*base), fabric, tmp_path / "one")
    fit(short_config(*base, "train.accumulation=2"), fabric, tmp_path / "two")
    a, b = (runs.load_checkpoint(tmp_path / n / "last.ckpt")["model"] for n in ("one", "two"))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "one/best.ckpt").exists(), "without a validation split nothing is selected"


def test_best_checkpoint_is_the_best_on_the_validation_split(script_config, fabric, tmp_path):
    root = images(tmp_path / "data")
    for c, (name, other) in enumerate(
        (("red", "green"), ("green", "blue"), ("blue", "red"))
    ):  # not what the test set says
        (root / "val" / name).mkdir(parents=True)
        for i in range(1 + 2 * c):
            shutil.copy(root / "test" / other / f"{i % 2}.png", root / "val" / name / f"{i}.png")
    fit(short_config(*folder_arm(root), "train.epochs=4", "method=bsce", "optim.lr=0.05"), fabric, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    scores = [r["val_top1_ensemble"] for r in rows]
    best = runs.load_checkpoint(tmp_path / "run/best.ckpt")
    assert best["epoch"] == 1 + scores.index(max(scores)) and best["best"] == max(scores)
    trained = load(tmp_path / "run/last.ckpt")
    data, by_hand = data_of(trained, {}), {}
    for split in ("validation", "test"):
        x, y = next(iter(eval_batches(data.split(split), batch_size=9)))
        by_hand[split] = 100 * (ensemble(trained.model(x)).argmax(1) == y).double().mean().item()
    assert scores[-1] == pytest.approx(by_hand["validation"]) and by_hand["validation"] != by_hand["test"]
    assert json.loads((tmp_path / "run/result.json").read_text())["metrics"]["top1_ensemble"] == pytest.approx(
        by_hand["test"]
    )
    for split, expected in by_hand.items():
        cfg = script_config("evaluate", f"weights={tmp_path / 'run/last.ckpt'}", f"split={split}")
        assert evaluate.evaluate(cfg, fabric)["top1_ensemble"] == pytest.approx(expected)
    line = [*folder_arm(root), "train.epochs=4", "method=bsce", "optim.lr=0.05", "evaluate.split=validation"]
    fit(short_config(*line), fabric, tmp_path / "validated")
    result = json.loads((tmp_path / "validated/result.json").read_text())
    assert result["metrics"]["top1_ensemble"] == pytest.approx(by_hand["validation"])


def test_a_resumed_run_keeps_the_best_of_the_epochs_before(fabric, tmp_path, monkeypatch):
    root = images(tmp_path / "data")
    shutil.copytree(root / "test", root / "val")
    cfg, scripted = short_config(*folder_arm(root), "train.epochs=2"), iter([50.0, 40.0, 30.0])
    monkeypatch.setattr(train, "expert_metrics", lambda *args, **options: {"top1_ensemble": next(scripted)})
    save = runs.Run.save_checkpoint

    def saved_once(run, state, name="last.ckpt"):
        save(run, state, name)
        if name == "last.ckpt":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.Run, "save_checkpoint", saved_once)
        fit(cfg, fabric, tmp_path / "run")
    fit(cfg, fabric, tmp_path / "run")
    best, last = (runs.load_checkpoint(tmp_path / "run" / n) for n in ("best.ckpt", "last.ckpt"))
    assert (best["epoch"], best["best"], last["epoch"], last["best"]) == (1, 50.0, 2, 50.0)


def test_two_ranks_equal_one_process_at_equal_global_batch(fabric, ranks, tmp_path):
    """NCL++ with the MoCo branch on top, so that every term passes through DDP."""
    extra = ["train.epochs=2", "method.w_con=1.0", "moco.queue=16", "moco.dim=8", "fabric.accelerator=cpu"]
    args = [*SHORT, *folder_arm(images(tmp_path / "data")), *extra]
    fit(short_config(*args), fabric, tmp_path / "one")
    two = ranks(PAPER / "train.py", [*args, f"hydra.run.dir={tmp_path / 'two'}"])
    assert two.returncode == 0, two.stderr
    assert "2 devices x 1 micro-steps x 4" in two.stdout
    a, b = (runs.load_checkpoint(tmp_path / n / "last.ckpt")["model"] for n in ("one", "two"))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    metrics = [json.loads((tmp_path / n / "result.json").read_text())["metrics"] for n in ("one", "two")]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-3)


def test_a_killed_run_goes_on_from_inside_its_folder(fabric, started, tmp_path, monkeypatch, capsys):
    args = [*SHORT, *DIGITS, "method=bsce", "train.epochs=60", f"run_root={tmp_path}"]
    begun = process(PAPER / "train.py", args, tmp_path)
    checkpoint, deadline = None, time.monotonic() + 120
    while checkpoint is None and time.monotonic() < deadline:
        time.sleep(0.02)
        checkpoint = next(tmp_path.rglob("last.ckpt"), None)
    begun.kill()
    begun.join()
    assert checkpoint is not None, "no checkpoint within two minutes"
    reached = runs.load_checkpoint(checkpoint)["epoch"]
    assert 1 <= reached < 60
    monkeypatch.chdir(PAPER)
    assert started(PAPER / "train.py", args) == 0 and f"epochs {reached + 1}..60" in capsys.readouterr().out
    assert runs.load_checkpoint(checkpoint)["epoch"] == 60
    fit(OmegaConf.load(checkpoint.parent / "config.yaml"), fabric, checkpoint.parent)
    assert "finished already" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- errors
def test_a_misspelt_arm_lists_the_choices():
    with pytest.raises(MissingConfigException, match=r"(?s)nclp.*nclpp"):
        short_config("method=nclp")


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("+method.loss.lamda=1", "lamda"),
        ("+data.imbalence=10", "imbalence"),
        ("+model.widht=3", "widht"),
        ("+schedule.warm=3", "warm"),
        ("+optim.lrr=3", "lrr"),
    ],
)
def test_a_misspelt_key_fails_with_its_name(override, error, fabric, tmp_path):
    with pytest.raises(TypeError, match=error):
        fit(short_config(override), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["method.loss.norm=l2"], r"norm='l2', allowed: nclpp, ncl"),
        (["schedule.kind=linear"], r"kind='linear', allowed: step, cosine"),
        (["model.backbone=resnet33"], r"resnet33.*allowed"),
        (["train.accumulation=3"], r"batch_size=32.*multiple of"),
        (["train.batch_size=4096"], r"fewer than train\.batch_size=4096"),
        (["evaluate.split=validation"], "no validation split"),
        (["data.imbalance=1000"], "imbalance"),
    ],
)
def test_a_wrong_value_names_what_is_allowed_and_writes_nothing(overrides, error, fabric, tmp_path):
    with pytest.raises(ValueError, match=error):
        fit(short_config(*overrides), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nan_loss_stops_the_run_and_names_the_term(fabric, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d+: .*(ce|norm)=(nan|inf)"):
        fit(short_config("optim.lr=1e18", "method=bsce", "train.epochs=30"), fabric, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "failed"


def test_preflight_writes_nothing(fabric, tmp_path, capsys):
    fit(short_config("preflight=true"), fabric, tmp_path / "run")
    assert "preflight: data found, 32 images x 4 copies" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_missing_data_ends_the_script_and_leaves_nothing_behind(refused, tmp_path):
    root = tmp_path / "nowhere"
    assert str(root) in refused(PAPER, "train", ["data=folder", f"data.root={root}"])


def test_build_draws_the_same_weights_for_a_seed():
    cfg = short_config()
    data = build_data(seed=0, **cfg.data)
    a, b = build(cfg, data)[0], build(cfg, data)[0]
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)
    assert not torch.equal(a.experts.heads[0].weight, a.experts.heads[1].weight), (
        "experts must differ by their initialisation"
    )


def test_parity_switches_reach_the_modules():
    cfg = short_config("method=ncl_moco", "parity.moco=true", "parity.eps=true")
    model, criterion = build(cfg, build_data(seed=0, **cfg.data))
    assert model.contrast.official_quirks and criterion.kl_options["official_eps"]
    assert not torch.equal(
        model.contrast.key_backbones[0].blocks[0].weight, model.experts.backbones[0].blocks[0].weight
    )
    with pytest.raises(ValueError, match="official_init apply to timm models"):
        build(short_config("parity.init=true"), build_data(seed=0, **cfg.data))
