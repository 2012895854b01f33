"""The script as people run it: every arm, resume in the middle of the stream, errors, the other entries."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from PIL import Image

from common import runs
from common.metrics.claims import load_claims
from lifelong import evaluate as evaluation
from lifelong.model import build_model
from lifelong.train import build, fit

PAPER = Path(__file__).resolve().parents[1]
CONFIGS = PAPER / "configs"
ARMS = sorted(p.stem for p in (CONFIGS / "method").glob("*.yaml"))
SHORT = ["train.epochs=2", "train.save_every=1", "model.hidden=16", "data.train_images=300", "data.test_images=160"]
FAST = [*SHORT, "optim.lr=0.1"]


def config(*overrides):
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        return compose("config", overrides=[*FAST, "arm=test", *overrides])


@pytest.fixture(scope="module")
def fabric():
    return runs.launch({"accelerator": "cpu", "devices": 1})


def script(*args, name="train.py", cwd=PAPER):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, name, *args], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("method", ARMS)
def test_every_arm_trains_and_reports(method, fabric, tmp_path):
    fit(config(f"method={method}", "data.tasks=2"), fabric, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "finished"
    for name in ("class_il", "continuum", "task_il"):
        assert 0 <= result["metrics"][f"{name}_acc"] <= 100
        assert {f"{name}_{k}" for k in ("aia", "bwt", "forgetting", "learning", "overall")} <= result["metrics"].keys()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["task"], r.get("epoch")) for r in rows] == [(0, 1), (0, 2), (0, None), (1, 1), (1, 2), (1, None)]
    assert (tmp_path / "matrix.png").exists() and len((tmp_path / "matrix.csv").read_text().splitlines()) == 7


def test_arms_of_claims_exist():
    for claim in load_claims(PAPER):
        assert set(claim["arms"]) <= {*ARMS, "counts"}, claim["id"]


def test_the_sweeps_of_a_scale_hold_the_arms_of_its_claims():
    for scale in ("mini", "full", "gpu_cifar10"):
        names, sweeps = {"counts"}, (CONFIGS / "reproduce" / scale).glob("*_train_*.yaml")
        for sweep in sweeps:
            names |= set(OmegaConf.load(sweep).hydra.sweeper.params.method.split(","))
        assert names >= {a for c in load_claims(PAPER) if scale in c["scale"] for a in c["arms"]}, scale


@pytest.mark.parametrize("epoch", [(1, 1), (2, None)], ids=["inside task 1", "after task 2"])
def test_resumed_equals_uninterrupted_bit_for_bit(epoch, fabric, tmp_path, monkeypatch):
    cfg = config("method=ari", "optim.momentum=0.5")
    fit(cfg, fabric, tmp_path / "whole")
    log = runs.Run.log

    def killed(self, **row):
        log(self, **row)
        if (row["task"], row.get("epoch")) == epoch:
            raise KeyboardInterrupt  # before its checkpoint

    monkeypatch.setattr(runs.Run, "log", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(cfg, fabric, tmp_path / "parts")
    monkeypatch.setattr(runs.Run, "log", log)
    fit(cfg, fabric, tmp_path / "parts")
    whole, parts = (runs.load_checkpoint(tmp_path / n / "last.ckpt") for n in ("whole", "parts"))
    torch.testing.assert_close(parts["learner"], whole["learner"], rtol=0, atol=0)
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "parts/metrics.jsonl").read_text()
    results = [json.loads((tmp_path / n / "result.json").read_text())["metrics"] for n in ("whole", "parts")]
    assert results[0] == results[1]


def test_joint_resumes_with_its_past(fabric, tmp_path, monkeypatch):
    cfg = config("method=joint", "data.tasks=2")
    fit(cfg, fabric, tmp_path / "whole")
    log = runs.Run.log

    def killed(self, **row):
        log(self, **row)
        if (row["task"], row.get("epoch")) == (1, 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, "log", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(cfg, fabric, tmp_path / "parts")
    monkeypatch.setattr(runs.Run, "log", log)
    fit(cfg, fabric, tmp_path / "parts")
    whole, parts = (runs.load_checkpoint(tmp_path / n / "last.ckpt")["learner"]["model"] for n in ("whole", "parts"))
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


def test_unequal_tasks_and_a_growing_head(fabric, tmp_path):
    fit(config("data.tasks=[12,3,5]", "model.growing=true"), fabric, tmp_path)
    state = runs.load_checkpoint(tmp_path / "last.ckpt")
    assert state["learner"]["sizes"] == [12, 3, 5] and state["learner"]["model"]["head.weight"].shape[0] == 20
    learner, stream, _, _ = evaluation.load(str(tmp_path / "last.ckpt"))
    assert learner.groups == stream.groups


def test_the_script_can_be_sent_to_the_workers_of_a_sweep():
    cloudpickle = pytest.importorskip("cloudpickle")
    cloudpickle.dumps(runpy.run_path(str(PAPER / "train.py"), run_name="script")["main"])


def test_a_killed_run_goes_on_from_inside_its_folder(tmp_path):
    args = [*FAST, "method=er", "train.epochs=60", f"run_root={tmp_path}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "train.py", *args], cwd=PAPER, env=environment, stdout=subprocess.DEVNULL
    )
    checkpoint = None
    for _ in range(4000):
        time.sleep(0.05)
        if checkpoint := next(tmp_path.rglob("last.ckpt"), None):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint is not None, "no checkpoint within a minute"
    state = runs.load_checkpoint(checkpoint)
    again = script(*args)
    assert again.returncode == 0, again.stderr
    assert f"from task {state['task']} epoch {state['epoch'] + 1} of" in again.stdout


def check_onnx(checkpoint, folder):
    ort = pytest.importorskip("onnxruntime")
    learner, stream, _, _ = evaluation.load(str(checkpoint))
    x = learner.prepare(stream.task("test", 0)[0][:5])
    for name, model, group in (("null", learner.model, slice(0, 20)), ("2", learner.adapted(2), learner.groups[2])):
        (out,) = ort.InferenceSession(str(folder / f"{name}.onnx")).run(None, {"images": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(out), model.eval()(x)[:, group], rtol=1e-4, atol=1e-4)


def hydra_main(module, config_name, *overrides):
    """The main function of a script on a composed configuration, in this process."""
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        cfg = compose(config_name, overrides=list(overrides))
    module.main.__wrapped__(cfg)


def test_evaluate_and_predict_agree_with_training(fabric, tmp_path, capsys):
    from lifelong import export, predict

    fit(config(), fabric, tmp_path)
    weights = f"weights={tmp_path / 'last.ckpt'}"
    for task in ("null", "2"):
        hydra_main(export, "export", weights, f"out={tmp_path / f'{task}.onnx'}", f"task={task}")
    check_onnx(tmp_path / "last.ckpt", tmp_path)
    metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
    capsys.readouterr()
    hydra_main(evaluation, "evaluate", weights, f"figure={tmp_path / 'again.png'}")
    text = capsys.readouterr().out
    means = next(line for line in text.splitlines() if line.startswith("mean")).split()[1:]
    expected = [metrics[f"{n}_acc"] for n in ("class_il", "continuum", "task_il")]
    assert [float(v) for v in means[:3]] == pytest.approx(expected, abs=0.006)
    assert f"forgetting {metrics['class_il_forgetting']:.2f}" in text and (tmp_path / "again.png").exists()

    learner, stream, _, _ = evaluation.load(str(tmp_path / "last.ckpt"))
    image = (stream.task("test", 1)[0][:1] * 255).byte()
    Image.fromarray(image[0, 0].numpy()).save(tmp_path / "digit.png")
    for mode in ("class_il", "task_il"):
        hydra_main(predict, "predict", weights, f"images={tmp_path / 'digit.png'}", f"mode={mode}", "task=1")
        assert (
            capsys.readouterr()
            .out.strip()
            .endswith("\t" + stream.class_names[int(learner.predict(image, mode, task=1))])
        )
    with pytest.raises(ValueError, match="no checkpoint of lifelong"):
        torch.save({"model": {}}, tmp_path / "other.ckpt")
        evaluation.load(str(tmp_path / "other.ckpt"))


# -------------------------------------------------------------------------------------------------------------- errors
def test_a_misspelt_arm_lists_the_choices():
    with pytest.raises(MissingConfigException, match=r"(?s)arii.*ari_fusion"):
        config("method=arii")


@pytest.mark.parametrize(
    "key", ["method.meta.beata", "data.taskss", "model.hiden", "schedule.knd", "optim.lrr", "memory.size"]
)
def test_a_misspelt_key_fails_with_its_name(key, fabric, tmp_path):
    with pytest.raises(TypeError, match=key.rpartition(".")[2]):
        fit(config(f"+{key}=1"), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["method.meta.attack=sky"], r"attack='sky', allowed: background"),
        (["method.meta.eps=-1"], r"eps=-1"),
        (["memory.budget=19"], r"budget=19 is smaller than the 20 classes"),
        (["memory.policy=best"], r"'best', allowed: first"),
        (["data.tasks=3"], r"data\.tasks=3 does not divide 20"),
        (["data.tasks=[10,9]"], r"add up to 20"),
        (["evaluate.p=0"], r"evaluate\.p=0"),
        (["schedule.kind=poly"], r"'poly', allowed"),
        (["model.name=vgg"], r"'vgg', allowed"),
        (["train.batch_size=1"], r"batch_size=1"),
        (["data.rho=2", "data.name=digits10", "data.tasks=2"], "rho"),
    ],
)
def test_a_wrong_value_names_what_is_allowed_and_writes_nothing(overrides, error, fabric, tmp_path):
    overrides = [("+" if o.startswith("data.rho") else "") + o for o in overrides]
    with pytest.raises(ValueError, match=error):
        fit(config(*overrides), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_half_precision_with_a_scaler_is_refused(fabric, tmp_path):
    other = runs.launch({"accelerator": "cpu", "devices": 1, "precision": "bf16-mixed"})
    fit(config("data.tasks=2", "method=er"), other, tmp_path / "bf16")
    other._precision.precision = "16-mixed"
    with pytest.raises(ValueError, match="allowed: 32-true, bf16-mixed"):
        fit(config(), other, tmp_path / "fp16")


def test_nan_loss_stops_the_run_and_names_the_term(fabric, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d+: .*(ce|clean)=(nan|inf)"):
        fit(config("method=er", "optim.lr=1e20", "train.epochs=20"), fabric, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "failed"


def test_preflight_writes_nothing_and_missing_data_says_where(fabric, tmp_path, capsys):
    fit(config("preflight=true"), fabric, tmp_path / "runs")
    assert "preflight: data found" in capsys.readouterr().out and not (tmp_path / "runs").exists()
    missing = script(
        "data=cifar100", "model=rps_net", f"data.root={tmp_path / 'nowhere'}", f"run_root={tmp_path / 'runs'}"
    )
    assert missing.returncode != 0 and str(tmp_path / "nowhere") in missing.stderr and not (tmp_path / "runs").exists()


def test_every_config_composes_and_builds():
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        for experiment in sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml")):
            cfg = compose("config", overrides=[f"experiment={experiment}", "arm=test", "data.root=/x"])
            OmegaConf.to_container(cfg, resolve=True)
            with torch.device("meta"):
                options = {k: v for k, v in cfg.model.items() if k != "growing"}
                build_model(num_classes=100, size=cfg.prepare.size, **options)
        for data in sorted(p.stem for p in (CONFIGS / "data").glob("*.yaml")):
            compose("config", overrides=[f"data={data}", "arm=test", "data.root=/x"])
        for sweep in (CONFIGS / "reproduce").rglob("*.yaml"):
            name = sweep.stem.split("_")[1]
            cfg = compose(
                "counts" if name == "counts" else "config",
                overrides=[f"+reproduce/{sweep.parent.name}={sweep.stem}", "arm=test"], return_hydra_config=True,
            )  # fmt: skip
            assert cfg.scale == sweep.parent.name and cfg.hydra.sweeper.params


def test_build_draws_the_same_weights_for_a_seed():
    from lifelong.streams import build_stream

    cfg = config()
    stream = build_stream(seed=0, **cfg.data)
    a, b, c = (build(OmegaConf.merge(cfg, {"seed": s}), stream).model.state_dict() for s in (0, 0, 1))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(a["head.weight"], c["head.weight"])
