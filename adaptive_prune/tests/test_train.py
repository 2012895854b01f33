"""The script as people run it: every arm, resume, two ranks, errors, and what it leaves behind."""

import json
import os
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

from adaptive_prune.data import build_data
from adaptive_prune.train import build, fit, loss_terms
from common import runs
from common.data.batches import Plan

PAPER = Path(__file__).resolve().parents[1]
CONFIGS = PAPER / "configs"
ARMS = sorted(p.stem for p in (CONFIGS / "method").glob("*.yaml") if p.stem != "pretrain")
SHORT = ["data.train_images=96", "data.test_images=40", "train.batch_size=32", "train.epochs=2", "train.save_every=1"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def config(*overrides):
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        short = [
            o for o in SHORT if not any("data=" in x or "experiment=" in x for x in overrides) or o.startswith("train")
        ]
        return compose("config", overrides=[*short, "arm=test", *overrides])


@pytest.fixture(scope="module")
def fabric():
    return runs.launch({"accelerator": "cpu", "devices": 1})


@pytest.fixture(scope="module")
def root(fabric, tmp_path_factory):
    """A run root that holds the dense start and an AS-ViT run."""
    where = tmp_path_factory.mktemp("runs")
    for arm in ("pretrain", "as"):
        fit(config(f"method={arm}", f"run_root={where}"), fabric, where / f"default/{arm}/seed0")
    return where


@pytest.mark.parametrize("method", ARMS)
def test_every_arm_trains_and_reports(method, root, fabric, tmp_path):
    fit(config(f"method={method}", f"run_root={root}"), fabric, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    metrics = result["metrics"]
    assert result["status"] == "finished" and 0 <= metrics["top1"] <= 100
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in rows] == [1, 2]
    assert ("distill" in rows[0]) == (method != "no_distillation")
    learned = method in ("as", "mean_score", "activation_mask", "early_positions", "no_distillation")
    assert ("budget" in rows[0]) == ("theta_1" in rows[0]) == learned
    if method in ("topk", "evit", "tome"):
        assert metrics["macs"] == pytest.approx(0.45, abs=0.01) and metrics["kept_corr"] == 0
    if method == "dense":
        assert metrics["macs"] == 1
    if method == "topk_matched":
        target = json.loads((root / "default/as/seed0/result.json").read_text())["metrics"]["macs"]
        assert 0 <= metrics["macs"] - target < 0.02 and 0 <= metrics["mcnemar_p"] <= 1
    if method == "early_positions":
        assert runs.load_checkpoint(tmp_path / "last.ckpt")["config"]["method"]["locations"] == [1, 2, 3]


def test_every_term_falls_on_one_batch(root, fabric):
    cfg = config(f"run_root={root}", "budget.target=0.6")
    data = build_data(seed=0, **cfg.data)
    model, teacher = build(cfg, data)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=2e-3))
    images, labels = next(data.epoch(Plan(96, 32, seed=0), 1, fabric.device))
    values = []
    for _ in range(80):
        terms = loss_terms(fabric, cfg, model, teacher, images, labels)
        fabric.backward(sum(terms.values()))
        optimizer.step()
        optimizer.zero_grad()
        values.append({name: value.item() for name, value in terms.items()})
    assert values[-1]["ce"] < 0.6 * values[0]["ce"] and values[-1]["budget"] < 0.3 * values[0]["budget"]


def test_equal_seeds_give_equal_numbers_and_others_do_not(fabric, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit(config("method=pretrain", f"seed={seed}"), fabric, tmp_path / name)
    a, b, c = ((tmp_path / name / "metrics.jsonl").read_text() for name in "abc")
    assert a == b != c


def test_resumed_equals_uninterrupted_bit_for_bit(root, fabric, tmp_path, monkeypatch):
    cfg = config(f"run_root={root}", "train.epochs=3", "train.ema=0.9")
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
    for key in ("model", "ema"):
        torch.testing.assert_close(parts[key], whole[key], rtol=0, atol=0)
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "parts/metrics.jsonl").read_text()


def test_thresholds_are_not_decayed(root, fabric, tmp_path):
    overrides = ["method.losses.budget=0", "method.losses.distill=0", "optim.lr=1e-3", "optim.weight_decay=100"]
    fit(config(f"run_root={root}", *overrides, "method.thresholds=[0.9,0.91,0.92]"), fabric, tmp_path)
    state = runs.load_checkpoint(tmp_path / "last.ckpt")["model"]
    torch.testing.assert_close(state["theta"], torch.tensor([0.9, 0.91, 0.92]), rtol=0, atol=1e-3)
    before = runs.load_checkpoint(root / "default/pretrain/seed0/last.ckpt")["model"]
    name = "vit.blocks.0.mlp.fc1.weight"
    assert state[name].norm() < 0.9 * before[name].norm()


def folder(root):
    for split, n in (("train", 6), ("val", 2)):
        for c, name in enumerate(("red", "green")):
            for i in range(n):
                path = root / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 40), tuple(40 * i + 15 if k == c else 20 for k in range(3))).save(path)
    return root


def folder_arm(where):
    return [
        "data=imagenet", f"data.root={where}", "data.size=32", "data.workers=0", "train.batch_size=4", "start.arm=null",
        "model.vit={name:vit,img_size:32,patch_size:8,embed_dim:24,depth:4,num_heads:3}", "model.locations=[1,2,3]",
        "budget.target=0.8",
        "method.losses.distill=0.0", "method.losses.token=0.0",
    ]  # fmt: skip


def test_image_folders_with_the_whole_recipe(fabric, tmp_path):
    mix = "train.mixup={mixup_alpha:0.8,cutmix_alpha:1.0,prob:1.0,switch_prob:0.5,mode:batch}"
    more = ["train.label_smoothing=0.1", mix, "budget.form=absolute_gmacs", "train.eval_every=1"]
    more += ["parity={separate_masks:true,softmax:true,extended_cost:true,budget_per_rank:true}"]
    fit(config(*folder_arm(folder(tmp_path / "data")), *more), fabric, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert "top1" in rows[0] and rows[0]["ce"] > 0


def test_two_ranks_equal_one_process_at_equal_global_batch(root, fabric, tmp_path):
    """The budget's mean is that of all ranks: |mean| is not the mean of |.|."""
    args = ["start.checkpoint=" + str(root / "default/pretrain/seed0/last.ckpt"), "budget.target=0.9"]
    fit(config(*args, "arm=as"), fabric, tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    two = subprocess.run(
        [*torchrun, *SHORT, *args, "fabric.accelerator=cpu", f"run_root={tmp_path / 'two'}"],
        cwd=PAPER, env=ENV, capture_output=True, text=True,
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    assert "2 devices x 1 micro-steps x 16" in two.stdout
    found = [tmp_path / "one/last.ckpt", next((tmp_path / "two").rglob("last.ckpt"))]
    a, b = (runs.load_checkpoint(f) for f in found)
    torch.testing.assert_close(a["model"], b["model"], rtol=1e-3, atol=2e-5)
    metrics = [json.loads((f.parent / "result.json").read_text())["metrics"] for f in found]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-3)


def test_a_killed_run_goes_on_from_inside_its_folder_and_trains_its_start_first(tmp_path):
    args = [sys.executable, "train.py", *SHORT, "train.epochs=24", f"run_root={tmp_path}"]
    process = subprocess.Popen(args, cwd=PAPER, env=ENV, stdout=subprocess.DEVNULL)
    checkpoint = None
    for _ in range(900):
        time.sleep(0.1)
        if checkpoint := next(tmp_path.rglob("as/**/last.ckpt"), None):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint is not None, "no checkpoint within 90 seconds"
    reached = runs.load_checkpoint(checkpoint)["epoch"]
    again = subprocess.run(args, cwd=PAPER, env=ENV, capture_output=True, text=True)
    assert again.returncode == 0 and f"epochs {reached + 1}..24" in again.stdout, again.stdout + again.stderr
    start = next(tmp_path.rglob("pretrain/seed0/result.json"))
    assert json.loads(start.read_text())["status"] == "finished" and "dense start" not in again.stdout


# -------------------------------------------------------------------------------------------------------------- errors
def test_a_misspelt_arm_lists_the_choices():
    with pytest.raises(MissingConfigException, match=r"(?s)topkk.*topk"):
        config("method=topkk")


@pytest.mark.parametrize(
    ("override", "error"),
    [("+data.kmin=1", "kmin"), ("+model.vit.widht=3", "widht"), ("+train.mixup={alfa:1.0}", "alfa")],
)
def test_a_misspelt_key_fails_with_its_name(override, error, fabric, tmp_path):
    with pytest.raises(TypeError, match=error):
        fit(config("method=pretrain", override.replace("+train", "train")), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["budget.target=1.5"], r"budget 1\.5 must be in"),
        (["budget.target=0.2"], r"below the floor 0\.35"),
        (["method.locations=[0,2,3]"], r"locations=\[0, 2, 3\]"),
        (["method.rule=randomly"], r"rule='randomly', allowed"),
        (["method.inference=sparse"], r"inference='sparse', allowed"),
        (["data.name=digits"], r"data\.name='digits', allowed"),
        (["data.size=32"], r"data\.size=32.*has 24"),
        (["train.accumulation=3"], r"batch_size=32.*multiple of"),
        (["train.batch_size=4096"], r"fewer than train\.batch_size=4096"),
        (["start.arm=null"], "needs a teacher"),
        (["data.noise=0.2"], r"other data.*noise: 0\.1 -> 0\.2"),
        (["budget.form=flops"], r"budget\.form='flops', allowed"),
    ],
)
def test_a_wrong_value_names_what_is_allowed(overrides, error, root, fabric, tmp_path):
    with pytest.raises(ValueError, match=error):
        fit(config(f"run_root={root}", *overrides), fabric, tmp_path / "run")


def test_a_missing_start_or_match_says_where(fabric, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pretrain/seed0/last\.ckpt"):
        fit(config(f"run_root={tmp_path}"), fabric, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"as/seed0/evaluation\.ckpt"):
        fit(config(f"run_root={tmp_path}", "method=topk_matched"), fabric, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fit(config("data=imagenet", f"data.root={tmp_path / 'nowhere'}"), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nan_loss_stops_the_run_and_names_the_term(fabric, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d+: .*(ce|norm)=(nan|inf)"):
        fit(config("method=pretrain", "optim.lr=1e18", "train.epochs=20"), fabric, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "failed"


def test_preflight_writes_nothing(root, fabric, tmp_path, capsys):
    fit(config(f"run_root={root}", "preflight=true"), fabric, tmp_path / "run")
    assert "preflight: data found" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_every_config_composes_and_builds():
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        for file in (CONFIGS / "experiment").glob("*.yaml"):
            more = ["start.checkpoint=null"] if file.stem.startswith("lvvit") else []
            off = ["start.pretrained=false", "start.arm=null", "method.losses.distill=0", "method.losses.token=0"]
            cfg = compose("config", overrides=[f"experiment={file.stem}", "arm=test", "data.root=/x", *more, *off])
            OmegaConf.to_container(cfg, resolve=True)
            small = cfg.model.vit.name in ("vit", "deit_tiny_patch16_224")
            if small:  # the wide ones take seconds each to draw; their sizes are checked by the counts
                fake = build_data(name="digit_grids", seed=0, train_images=64, test_images=4)
                assert build(cfg, fake)[0].locations == tuple(cfg.model.locations)
        for sweep in (CONFIGS / "reproduce").rglob("*.yaml"):
            scale, name = sweep.parent.name, "counts" if "counts" in sweep.stem else "config"
            cfg = compose(name, overrides=[f"+reproduce/{scale}={sweep.stem}", "arm=test"], return_hydra_config=True)
            assert cfg.scale == scale and cfg.hydra.sweeper.params
