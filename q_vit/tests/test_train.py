"""The scripts as people run them: every arm, resume, two ranks, errors, and what they leave behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from PIL import Image

from common import runs
from q_vit import evaluate, train
from q_vit.data import build_data
from q_vit.model import build_float
from q_vit.train import fit

PAPER = Path(__file__).resolve().parents[1]
CONFIGS = PAPER / "configs"
ARMS = sorted(p.stem for p in (CONFIGS / "method").glob("*.yaml"))
SHORT = [
    "train.epochs=2", "train.batch_size=16", "train.calibration_images=16", "data.train_images=32", "data.test_images=40",
    "model.depth=1", "model.embed_dim=24", "model.num_heads=2",
]  # fmt: skip


def config(*overrides, name="config"):
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        return compose(name, overrides=[*SHORT, "arm=test", *overrides])


@pytest.fixture(scope="module")
def fabric():
    return runs.launch({"accelerator": "cpu", "devices": 1})


@pytest.fixture(scope="module")
def root(fabric, tmp_path_factory):
    """A run folder that holds the small teacher of the arms, where `teacher.weights=auto` finds it at scale mini."""
    root = tmp_path_factory.mktemp("runs")
    fit(config("method=fp", "arm=fp", "scale=mini"), fabric, root / "mini/fp/seed0")
    return root


def arm(root, *overrides):
    return config(f"run_root={root}", "scale=mini", *overrides)


def result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("method", ARMS)
def test_every_arm_trains_and_reports(method, fabric, root, tmp_path):
    epochs = [] if method == "ptq" else ["train.epochs=1"]
    cfg = arm(root, f"method={method}", *epochs)
    if method == "ptq":
        cfg.train.epochs = 0
    fit(cfg, fabric, tmp_path)
    found = result(tmp_path)
    assert found["status"] == "finished" and 0 <= found["metrics"]["top1"] <= 100
    assert ("qk_entropy" in found["metrics"]) == (method != "fp")
    rows = (
        [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] if method != "ptq" else []
    )
    uses_dgd = "dgd" in method or "both" in method
    assert all(("dgd" in row) == uses_dgd and {"ce", "kd", "lr"} <= row.keys() for row in rows)
    model, _ = evaluate.load(str(tmp_path / "last.ckpt"))
    assert model(torch.zeros(1, 1, 16, 16)).shape == (1, 10)


@pytest.mark.parametrize(
    "overrides",
    [
        ["method.bits=8"], ["method.quant.preset=deployable"], ["method.quant.irm_form=paper", "method.quant.irm_stats=tensor"],
        ["method.start=random", "method.irm_init=unit"], ["method.dgd.student_tap=post_quant", "method.dgd.reduction=mean"],
        ["method.dgd.norm=row", "method.dgd.tokens=patches"], ["method.quant.parts=mhsa_acts"], ["optim.name=lamb"],
        ["method.bits=32"],
    ],
)  # fmt: skip
def test_every_switch_runs(overrides, fabric, root, tmp_path):
    fit(arm(root, "train.epochs=1", *overrides), fabric, tmp_path)
    assert result(tmp_path)["status"] == "finished"


def test_loss_falls_and_equal_seeds_give_equal_numbers(fabric, root, tmp_path):
    for name in ("a", "b"):
        fit(arm(root, "train.epochs=6", "data.train_images=64"), fabric, tmp_path / name)
    rows = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["ce"] + rows[-1]["kd"] < rows[0]["ce"] + rows[0]["kd"] and rows[-1]["dgd"] < rows[0]["dgd"]
    assert (tmp_path / "a/metrics.jsonl").read_text() == (tmp_path / "b/metrics.jsonl").read_text()


def test_resumed_equals_uninterrupted_bit_for_bit(fabric, root, tmp_path, monkeypatch):
    cfg = arm(root, "train.epochs=3")
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
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "parts/metrics.jsonl").read_text()
    assert result(tmp_path / "whole")["metrics"] == result(tmp_path / "parts")["metrics"]


def test_accumulation_equals_the_whole_batch(fabric, root, tmp_path):
    base = ["train.epochs=1", "method.quant.grad_scale=none", "optim.name=sgd", "optim.lr=0.05"]
    fit(arm(root, *base), fabric, tmp_path / "one")
    fit(arm(root, *base, "train.accumulation=2"), fabric, tmp_path / "two")
    a, b = (runs.load_checkpoint(tmp_path / n / "last.ckpt")["model"] for n in ("one", "two"))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def script(*args, launcher=(), file="train.py"):
    command = [sys.executable, *launcher, file, *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=PAPER, env=environment, capture_output=True, text=True)


def test_two_ranks_have_equal_steps_and_equal_one_process(fabric, root, tmp_path):
    cfg = arm(root, "train.epochs=1", "method.quant.grad_scale=none", "arm=both")
    fit(cfg, fabric, tmp_path / "one")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [
        *SHORT,
        "train.epochs=1",
        "scale=mini",
        f"run_root={root}",
        "method.quant.grad_scale=none",
        "fabric.accelerator=cpu",
    ]
    two = script(*arguments, f"hydra.run.dir={tmp_path / 'two'}", launcher=torchrun)
    assert two.returncode == 0, two.stderr
    assert "2 devices x 1 micro-steps x 8" in two.stdout
    a, b = (runs.load_checkpoint(tmp_path / n / "last.ckpt")["model"] for n in ("one", "two"))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert result(tmp_path / "one")["metrics"]["top1"] == pytest.approx(
        result(tmp_path / "two")["metrics"]["top1"], abs=2.6
    )


def test_the_default_trains_its_teacher_first(fabric, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(train, "fit", lambda cfg, _, out: called.append((cfg, out)))
    path = train.find_teacher(config(f"run_root={tmp_path}", "teacher.seed=3"), fabric)
    ((cfg, out),) = called
    assert (cfg.arm, cfg.seed, cfg.method.bits, out) == ("fp", 3, 32, tmp_path / "default/fp/seed3")
    assert path == out / "last.ckpt"


def test_the_scripts_run_from_inside_the_folder(root, tmp_path):
    run = script(*SHORT, "train.epochs=1", "scale=mini", f"run_root={root}", f"hydra.run.dir={tmp_path}")
    assert run.returncode == 0, run.stderr
    again = script(f"weights={tmp_path / 'last.ckpt'}", "batch_size=20", file="evaluate.py")
    assert again.returncode == 0 and "40 images" in again.stdout, again.stderr
    assert f"top1             {result(tmp_path)['metrics']['top1']:.4f}" in again.stdout


def test_the_teacher_that_the_default_trains_is_the_arm_fp():
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        student = compose("config", overrides=["arm=both"])
        fp = compose("config", overrides=["method=fp", "arm=fp"])
    own = OmegaConf.load(CONFIGS / "method/fp.yaml")
    derived = OmegaConf.merge(student, own, {"arm": "fp", "seed": student.teacher.seed})
    assert runs.differing_keys(runs.plain(derived), runs.plain(fp)) == []


def images(root, size=16):
    for split in ("train", "val"):
        for c, name in enumerate(("red", "green", "blue")):
            for i in range(4):
                path = root / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (size, size), tuple(60 * i + 50 if k == c else 20 for k in range(3))).save(path)
    return root


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_class_folders_a_plain_teacher_and_swin(name, fabric, tmp_path):
    """A class folder; for "vit" a distilled student of a plain teacher (tokens differ by one), for "swin" one head."""
    data = [
        "data=folder",
        f"data.root={images(tmp_path / 'data')}",
        "data.size=16",
        "data.workers=0",
        "data.augment=none",
    ]
    short = ["train.epochs=1", "train.batch_size=12", "train.calibration_images=12"]
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        cfg = compose("config", overrides=["arm=test", "method=both", *data, *short])
    OmegaConf.set_struct(cfg, False)
    if name == "vit":
        own = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0}
        teacher, cfg.teacher.model = build_float("vit", num_classes=3, **own), {"name": "vit"}
        cfg.model = {"name": "vit_distilled", "pretrained": False, **own}
    else:
        own = {
            "img_size": 16,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        }
        teacher = build_float("swin_tiny_patch4_window7_224", num_classes=3, **own)
        cfg.model = {"name": "swin_tiny_patch4_window7_224", "pretrained": False, **own}
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.ckpt")
    cfg.teacher.weights = str(tmp_path / "teacher.ckpt")
    fit(cfg, fabric, tmp_path / "run")
    found = result(tmp_path / "run")
    assert found["status"] == "finished" and found["metrics"]["loss_dgd"] > 0


# -------------------------------------------------------------------------------------------------------------- errors
def test_a_misspelt_arm_lists_the_choices():
    with pytest.raises(MissingConfigException, match=r"(?s)bot.*both"):
        config("method=bot")


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("+method.quant.bit=4", "bit"), ("+method.dgd.wieght=1", "wieght"), ("+data.rot=1", "rot"), ("+model.dept=1", "dept"),
        ("+schedule.warm=3", "warm"), ("+optim.lrr=3", "lrr"),
    ],
)  # fmt: skip
def test_a_misspelt_key_fails_with_its_name(override, error, fabric, root, tmp_path):
    with pytest.raises(TypeError, match=error):
        fit(arm(root, override), fabric, tmp_path / "run")
    assert not (tmp_path / "run/last.ckpt").exists()


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["method.bits=1"], r"bits=1, .*2\.\.8, or 32"),
        (["method.bits=12"], "bits=12"),
        (["method.distill=soft"], "distill=soft"),
        (["method.dgd.student_tap=logits"], "student_tap='logits', allowed"),
        (["method.irm_init=zero"], "irm_init='zero'"),
        (["schedule.kind=linear"], "kind='linear', allowed: cosine, onecycle"),
        (["train.accumulation=3"], r"batch_size=16.*multiple of"),
        (["train.batch_size=4096"], r"fewer than train\.batch_size=4096"),
        (["teacher.weights=null"], "the teacher would be random"),
        (["model.depth=2"], "does not fit the model"),
    ],
)
def test_a_wrong_value_names_what_is_allowed_and_writes_nothing(overrides, error, fabric, root, tmp_path):
    with pytest.raises(ValueError, match=error):
        fit(arm(root, *overrides), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_other_tokens_is_refused(fabric, root, tmp_path):
    teacher = build_float(
        "vit_distilled", num_classes=10, in_channels=1, img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2
    )
    torch.save({"model": teacher.state_dict()}, tmp_path / "t.ckpt")
    cfg = arm(
        root, f"teacher.weights={tmp_path / 't.ckpt'}", "+teacher.model.patch_size=8", "+teacher.model.mlp_ratio=4.0"
    )
    with pytest.raises(ValueError, match=r"student \(16, 2, 18, 12\), teacher \(16, 2, 6, 12\)"):
        fit(cfg, fabric, tmp_path / "run")


def test_a_missing_teacher_says_how_to_train_it(fabric, tmp_path):
    with pytest.raises(FileNotFoundError, match="python train.py method=fp scale=mini seed=0"):
        fit(arm(tmp_path / "empty"), fabric, tmp_path / "run")


def test_nan_loss_stops_the_run_and_names_the_term(fabric, root, tmp_path):
    with pytest.raises((FloatingPointError, ValueError), match=r"step \d+: .*(ce|norm|dgd)=(nan|inf)|unusable steps"):
        fit(arm(root, "optim.lr=1e18", "train.epochs=5"), fabric, tmp_path)
    assert result(tmp_path)["status"] == "failed"


def test_preflight_writes_nothing(fabric, root, tmp_path, capsys):
    fit(arm(root, "preflight=true"), fabric, tmp_path / "run")
    assert "preflight: data found" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_evaluate_refuses_another_width_and_another_format(fabric, root, tmp_path):
    fit(arm(root, "train.epochs=1", "method.bits=3"), fabric, tmp_path)
    with pytest.raises(ValueError, match="trained with 3 bit"):
        evaluate.load(str(tmp_path / "last.ckpt"), bits=4)
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of q_vit"):
        evaluate.load(str(tmp_path / "other.ckpt"))


def test_a_sweep_can_send_the_script_to_its_workers():
    cloudpickle.register_pickle_by_value(train)  # as the launcher sees it: train.py is __main__ there
    try:
        assert cloudpickle.dumps(train.main)
    finally:
        cloudpickle.unregister_pickle_by_value(train)


def test_every_config_composes_and_builds():
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        for file in (CONFIGS / "experiment").glob("*.yaml"):
            cfg = compose("config", overrides=[f"experiment={file.stem}", "arm=test", "data.root=/x"])
            cfg = OmegaConf.to_container(cfg, resolve=True)
            with torch.device("meta"):
                build_float(**{**cfg["model"], "pretrained": False}, num_classes=10)
            with pytest.raises(FileNotFoundError, match="/x"):
                build_data(**cfg["data"])
        for sweep in (CONFIGS / "reproduce").rglob("*.yaml"):
            scale, script_name = sweep.parent.name, sweep.stem.split("_")[1]
            base = script_name if script_name != "train" else "config"
            cfg = compose(base, overrides=[f"+reproduce/{scale}={sweep.stem}", "arm=test"], return_hydra_config=True)
            assert cfg.scale == scale and cfg.hydra.sweeper.params
