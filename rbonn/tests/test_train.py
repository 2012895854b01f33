"""The scripts as people run them: every arm, stages, resume, two ranks, errors, and what they leave behind."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from PIL import Image

from common import runs
from rbonn.train import build, fit

PAPER = Path(__file__).resolve().parents[1]
CONFIGS = PAPER / "configs"
ARMS = sorted(p.stem for p in (CONFIGS / "method").glob("*.yaml"))
SHORT = ["train.epochs=2", "train.save_every=1", "train.batch_size=32", "data.train=192", "model.layers=[1,1]"]


def config(*overrides):
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        return compose("config", overrides=[*SHORT, "arm=test", *overrides])


@pytest.fixture(scope="module")
def fabric():
    return runs.launch({"accelerator": "cpu", "devices": 1})


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
    from rbonn.data import build_data

    cfg = config("method=drelu_fixed", f"init.weights={stage1}")
    model = build(cfg, build_data(seed=0, **cfg.data))
    old = runs.load_checkpoint(stage1)["model"]
    new = model.state_dict()
    assert all(torch.equal(v, new[k]) for k, v in old.items())
    assert {k.rpartition(".")[2] for k in new.keys() - old.keys()} == {"scale_factor", "u"}


def test_teacher_gives_the_labels(fabric, tmp_path, stage1):
    overrides = ["method=xnor", f"init.weights={stage1}"]
    fit(config(*overrides), fabric, tmp_path / "labels")
    fit(config(*overrides, f"teacher.weights={stage1}"), fabric, tmp_path / "teacher")
    rows = [
        json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[0])["loss"] for n in ("labels", "teacher")
    ]
    assert rows[0] != rows[1]


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


@pytest.mark.parametrize("method", ["drelu_official", "paper", "irnet"])
def test_resumed_equals_uninterrupted_bit_for_bit(method, fabric, tmp_path, monkeypatch):
    cfg = config(f"method={method}", "train.epochs=3")
    fit(cfg, fabric, tmp_path / "whole")
    log = runs.Run.log

    def killed(self, **row):
        log(self, **row)
        if row["epoch"] == 2:
            raise KeyboardInterrupt  # after the epoch, before its checkpoint

    monkeypatch.setattr(runs.Run, "log", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(cfg, fabric, tmp_path / "parts")
    monkeypatch.setattr(runs.Run, "log", log)
    fit(cfg, fabric, tmp_path / "parts")
    whole, parts = (runs.load_checkpoint(tmp_path / n / "last.ckpt") for n in ("whole", "parts"))
    torch.testing.assert_close(parts["model"], whole["model"], rtol=0, atol=0)
    torch.testing.assert_close(parts["recurrence"], whole["recurrence"], rtol=0, atol=0)
    assert result(tmp_path / "whole")["metrics"] == result(tmp_path / "parts")["metrics"]


def test_without_its_snapshot_a_resumed_run_would_differ(fabric, tmp_path):
    """What the checkpoint of the recurrence is for: dropping it changes the numbers."""
    fit(config("method=all", "train.epochs=2"), fabric, tmp_path / "whole")
    state = runs.load_checkpoint(tmp_path / "whole/last.ckpt")
    assert state["recurrence"] and all(v.abs().sum() > 0 for v in state["recurrence"].values())
    assert not any("previous" in k for k in state["model"])


def test_mixed_precision_keeps_the_recurrence_on(fabric, tmp_path):
    half = runs.launch({"accelerator": "cpu", "devices": 1, "precision": "bf16-mixed"})
    fit(config("method=all", "fabric.precision=bf16-mixed"), half, tmp_path)
    assert result(tmp_path)["metrics"]["lookahead_flips"] > 0


RANKS = """
import sys, torch, torch.distributed as dist
from lightning_fabric import Fabric
from torch import nn
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
    torch.save({"previous": net[0].previous, "model": net.state_dict(), **recurrence.counters()}, sys.argv[2])
if dist.is_initialized():  # a process that ends with gloo's threads still running may abort
    dist.destroy_process_group()
"""


def test_two_ranks_snapshot_the_averaged_gradient(tmp_path, monkeypatch):
    file = tmp_path / "ranks.py"
    file.write_text(RANKS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, file, "2", tmp_path / "2"], cwd=PAPER.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", ["ranks.py", "1", str(tmp_path / "1")])
    runpy.run_path(str(file))
    one, two = (torch.load(tmp_path / ranks, weights_only=True) for ranks in ("1", "2"))
    torch.testing.assert_close(one["previous"], two["previous"])
    torch.testing.assert_close(one["model"], two["model"])
    assert one["active_share"] == two["active_share"] == 1.0 and one["previous"].abs().sum() > 0


def test_the_script_trains_on_two_ranks_with_the_recurrence_on(tmp_path):
    """Norms see one rank's images on CPU, so the numbers differ from one process; weights must be the same on both."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    extra = [
        "method=all",
        "init.arm=null",
        "train.epochs=2",
        "fabric.accelerator=cpu",
        f"hydra.run.dir={tmp_path / 'two'}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *SHORT, *extra], cwd=PAPER, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 devices x 1 micro-steps x" in done.stdout
    metrics = result(tmp_path / "two")["metrics"]
    assert metrics["active_share"] == 1.0 and metrics["lookahead_flips"] > 0


def test_the_script_runs_from_inside_its_folder(tmp_path):
    command = [sys.executable, "train.py", *SHORT, "method=bilinear", "train.epochs=1", f"run_root={tmp_path}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=PAPER, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "epochs 1..1" in done.stdout, done.stderr
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    assert checkpoint.parent.name == "seed0" and checkpoint.parents[2].name == "bilinear"


def test_a_finished_run_is_skipped(fabric, stage1, capsys):
    before = stage1.stat().st_mtime_ns
    fit(config("method=activations"), fabric, stage1.parent)
    assert "finished already" in capsys.readouterr().out and stage1.stat().st_mtime_ns == before


# ------------------------------------------------------------------------------------------------ evaluate and predict
def test_a_checkpoint_loads_evaluates_and_predicts(fabric, stage1, tmp_path):
    from rbonn.checkpoint import load_network
    from rbonn.data import build_data
    from rbonn.predict import image_tensor
    from rbonn.predict import predict as classes_of
    from rbonn.train import classification_metrics, predict

    network, state = load_network(stage1)
    data = build_data(seed=0, **state["config"]["data"])
    metrics = classification_metrics(*predict(fabric, network, data.test, batch_size=100, workers=0))
    assert metrics["top1"] == pytest.approx(result(stage1.parent)["metrics"]["top1"])
    Image.new("L", (8, 8), 100).save(tmp_path / "a.png")
    best = classes_of(network, image_tensor(tmp_path / "a.png", channels=1, size=8, data="digits"), top=3)
    assert len(best) == 3 and best[0][1] >= best[1][1] >= best[2][1]


def test_class_folders_train_and_records_name_a_known_claim(fabric, tmp_path):
    for split, n in (("train", 3), ("val", 1)):
        for name in ("a", "b"):
            for i in range(n):
                path = tmp_path / "data" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 36), (80 * i, 40, 200 if name == "a" else 0)).save(path)
    folder = [
        "+data.size=32",
        "+data.val=val",
        "data.name=folder",
        f"data.root={tmp_path / 'data'}",
        "+data.lighting=correct",
        "train.batch_size=4",
    ]
    fit(config("method=drelu_fixed", "model.layers=[1,1]", *folder), fabric, tmp_path / "run")
    assert result(tmp_path / "run")["status"] == "finished"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "evaluate.py",
        f"weights={tmp_path / 'run/last.ckpt'}",
        "workers=0",
        "record=true",
        f"record_to={tmp_path}",
    ]
    done = subprocess.run(command, cwd=PAPER, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(next(tmp_path.glob("*_folder.json")).read_text())
    assert record["n"] == 2 and record["claim"] is None and len(record["weights_sha256"]) == 64


# --------------------------------------------------------------------------------------------------------------- errors
def test_a_misspelt_arm_lists_the_choices():
    with pytest.raises(MissingConfigException, match=r"(?s)drelu.*drelu_fixed"):
        config("method=drelu")


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("+method.lamda=1", "lamda"),
        ("+data.sigmas=1", "sigmas"),
        ("+model.width=3", "width"),
        ("+schedule.warm=3", "warm"),
    ],
)
def test_a_misspelt_key_fails_with_its_name(override, error, fabric, tmp_path):
    with pytest.raises(TypeError, match=error):
        fit(config(override), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["method.tau=1.2"], r"tau=1\.2, allowed: 0\.\.1"),
        (["method.lam=-1"], r"lam=-1, allowed"),
        (["method.recurrent=some"], "recurrent='some', allowed"),
        (["method.weights=ternary"], "weights='ternary', allowed"),
        (["schedule.kind=exp"], "kind='exp', allowed"),
        (["optim.name=lamb"], "optim.name='lamb', allowed"),
        (["model.name=resnet"], "model.name='resnet', allowed"),
        (["data.name=mnist"], "data.name='mnist', allowed"),
        (["parity.sign_zero=2"], "sign_zero=2"),
        (["train.batch_size=4096"], r"fewer than train\.batch_size=4096"),
        (["train.accumulation=3"], "batch_size=32.*multiple of"),
        (["init.arm=a", "init.weights=b"], "not both"),
        (["teacher.timm=resnet3000"], "no timm model"),
    ],
)
def test_a_wrong_value_names_what_is_allowed_and_writes_nothing(overrides, error, fabric, tmp_path):
    with pytest.raises(ValueError, match=error):
        fit(config(*overrides), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_or_foreign_first_stage_and_a_teacher_with_other_classes(fabric, tmp_path, stage1):
    with pytest.raises(FileNotFoundError, match=r"no stage-1 checkpoint at .*method=activations"):
        fit(config("init.arm=activations", f"run_root={tmp_path / 'none'}"), fabric, tmp_path / "run")
    with pytest.raises(ValueError, match="is no first stage of this network"):
        fit(config(f"init.weights={stage1}", "model.widths=[8,32]"), fabric, tmp_path / "run")
    state = runs.load_checkpoint(stage1)
    state["classes"] = 7
    state["model"] |= {"fc.weight": torch.zeros(7, 16), "fc.bias": torch.zeros(7)}
    torch.save(state, tmp_path / "seven.ckpt")
    with pytest.raises(ValueError, match="has 7 classes, the data 10"):
        fit(config(f"teacher.weights={tmp_path / 'seven.ckpt'}"), fabric, tmp_path / "run")
    torch.save({"x": 1}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="neither a checkpoint of rbonn/train.py"):
        fit(config(f"teacher.weights={tmp_path / 'other.ckpt'}"), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nan_loss_stops_the_run_and_names_the_term(fabric, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d+: (loss|gradient norm)=(nan|inf)"):
        fit(config("optim.lr=1e30", "optim.name=sgd", "train.epochs=4"), fabric, tmp_path)
    assert result(tmp_path)["status"] == "failed"


def test_preflight_writes_nothing_and_missing_data_says_where(fabric, tmp_path, capsys):
    fit(config("preflight=true"), fabric, tmp_path / "run")
    assert "preflight: data found" in capsys.readouterr().out and not (tmp_path / "run").exists()
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "nowhere")):
        fit(config("data.name=folder", f"data.root={tmp_path / 'nowhere'}"), fabric, tmp_path / "run")


def test_every_config_composes_and_builds():
    from rbonn.checkpoint import build_network

    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        for model in (CONFIGS / "model").glob("*.yaml"):
            for method in ("real", "drelu_official", "irnet"):
                cfg = compose("config", overrides=[f"model={model.stem}", f"method={method}", "arm=test"])
                with torch.device("meta"):
                    build_network(model=cfg.model, method=cfg.method, sign_zero=1, classes=10, channels=3)
        for experiment in sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml")):
            main = "detect" if experiment.endswith("detection") else "config"
            cfg = compose(main, overrides=[f"experiment={experiment}", "arm=test", "data.root=/x"])
            if "init" in cfg and OmegaConf.is_missing(cfg.init, "weights"):
                cfg.init.weights = "/x/last.ckpt"
            runs.plain(cfg)
        for sweep in sorted((CONFIGS / "reproduce").rglob("*.yaml")):
            scale, script = sweep.parent.name, sweep.stem.split("_")[1]
            main = {"train": "config"}.get(script, script)
            cfg = compose(main, overrides=[f"+reproduce/{scale}={sweep.stem}", "arm=test"], return_hydra_config=True)
            assert cfg.scale == scale and cfg.hydra.sweeper.params
