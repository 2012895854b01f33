"""The training as people run it: every arm, two ranks, bad configurations, every experiment on tiny data in the real layout."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hydra.errors import MissingConfigException

from common import loop, reproduce, runs
from common.metrics.claims import load_claims
from fm_vit import train
from fm_vit.checkpoint import build, load
from fm_vit.losses import PATHS, losses, training_paths
from fm_vit.model import FMViT
from fm_vit.pad_metrics import Scored
from fm_vit.schedule import lr_factor
from fm_vit.tests.helpers import CONFIGS, COPY, PAPER, SHORT, config, short, write_own, write_triplets, write_videos
from fm_vit.train import check, fit

ARMS = sorted(p.stem for p in (CONFIGS / "method").glob("*.yaml"))
TINY = {"img_size": 24, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}


def result(path):
    return json.loads((path / "result.json").read_text())


@pytest.mark.parametrize("method", ARMS)
def test_every_arm_passes_its_check(method):
    check(short(f"method={method}"))


@pytest.mark.parametrize(
    "method", ["fmvit", "single_cross", "late_fusion", "shared", "concat_dropout", "cross_attention", "cmfl"]
)
def test_every_kind_of_arm_trains_and_reports_every_subset_that_it_has(method, fabric, tmp_path):
    cfg = short(f"method={method}", "train.epochs=1")
    fit(cfg, fabric, tmp_path)
    found = result(tmp_path)
    assert found["status"] == "finished"
    subsets = {k.removeprefix("acer_") for k in found["metrics"] if k.startswith("acer_")}
    number = len(cfg.method.modalities or cfg.data.modalities)
    assert len(subsets) == 2**number - 1
    assert sum(k.startswith("gain_") for k in found["metrics"]) == 2**number - 1 - number
    assert found["metrics"]["mean_acer"] == pytest.approx(
        sum(found["metrics"][f"acer_{s}"] for s in subsets) / len(subsets)
    )
    about = load(tmp_path / "last.ckpt").about
    assert about["thresholds"].keys() == subsets and about["classes"] == ["attack", "live"]
    assert all(0 <= found["metrics"][f"acer_{s}"] <= 100 for s in subsets)


def test_thresholds_of_a_training_are_those_of_its_validation_split(fabric, tmp_path, monkeypatch):
    """Test scores that are shifted down: with a threshold of their own there would be no error."""
    score = train.predict

    def shifted(fabric, model, data, split, **options):
        scored, kept = score(fabric, model, data, split, **options)
        perfect = scored.live * 0.5 + 0.25 - 0.5 * (split == "test")
        return Scored(dict.fromkeys(scored.scores, perfect), scored.live, scored.species, scored.subject), kept

    monkeypatch.setattr(train, "predict", shifted)
    fit(short("train.epochs=0"), fabric, tmp_path)
    metrics = result(tmp_path)["metrics"]
    assert metrics["bpcer_rgb"] == 100 and metrics["apcer_rgb"] == 0
    assert set(load(tmp_path / "last.ckpt").about["thresholds"].values()) == {0.75}


def test_every_path_of_the_loss_is_trained(fabric, tmp_path):
    """Every subset by default; without one kind of path the gradient is another one, so a dropped kind would show."""
    assert training_paths(["rgb", "depth", "ir"], short().method.loss.paths) == training_paths(
        ["rgb", "depth", "ir"], PATHS
    )
    weights = {}
    for left_out in (None, *PATHS):
        paths = ",".join(p for p in PATHS if p != left_out)
        fit(short("train.epochs=1", f"method.loss.paths=[{paths}]"), fabric, tmp_path / f"{left_out}")
        row = json.loads((tmp_path / f"{left_out}" / "metrics.jsonl").read_text().splitlines()[0])
        assert {k for k in row if k.startswith("loss")} == {f"loss_{p}" for p in PATHS if p != left_out}
        weights[left_out] = runs.load_checkpoint(tmp_path / f"{left_out}" / "last.ckpt")["model"]
    for key in ("branches.rgb.trunk.patch_embed.proj.weight", "branches.ir.cmtb.0.mfa.k.weight"):
        assert not any(torch.equal(weights[None][key], weights[p][key]) for p in PATHS)


def test_loss_falls_and_infrared_separates(fabric, tmp_path):
    fit(
        short("train.epochs=30", "data.train=64", "data.modalities=[ir]", "method=ir_only", "optim.lr=3e-3"),
        fabric,
        tmp_path,
    )
    rows = [json.loads(line)["loss_single"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1] < 0.5 * rows[0] and result(tmp_path)["metrics"]["auc_ir"] > 80


def test_trunks_are_slow_and_positions_class_tokens_and_vectors_are_not_decayed():
    branch = FMViT(["rgb"], vit=TINY).branches["rgb"]
    groups = train.parameter_groups(branch, {"lr": 1.0, "backbone_lr": 0.1, "weight_decay": 0.5})
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    trunk, qkv = branch.trunk, branch.trunk.blocks[0].attn.qkv
    assert {found[id(p)] for p in (trunk.pos_embed, trunk.cls_token, trunk.norm.weight, qkv.bias)} == {(0.1, 0.0)}
    assert {found[id(p)] for p in (qkv.weight, trunk.patch_embed.proj.weight)} == {(0.1, 0.5)}
    assert (found[id(branch.head.weight)], found[id(branch.head.bias)]) == ((1.0, 0.5), (1.0, 0.0))


def test_two_ranks_equal_one_process_and_the_script_runs_from_inside_its_folder(fabric, tmp_path):
    extra = ["fabric.accelerator=cpu", "data.test=47", "arm=test"]
    fit(config(*SHORT, *extra), fabric, tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    two = subprocess.run(
        [*torchrun, *SHORT, *extra, f"hydra.run.dir={tmp_path / 'two'}"],
        cwd=PAPER,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert two.returncode == 0, two.stderr
    assert "2 devices x 1 micro-steps x 8" in two.stdout
    a, b = (runs.load_checkpoint(tmp_path / n / "last.ckpt")["model"] for n in ("one", "two"))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    assert result(tmp_path / "one")["metrics"] == pytest.approx(result(tmp_path / "two")["metrics"], abs=0.5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.loss.paths=[triple]"], "triple"),
        (["method.modalities=[thermal]"], "thermal is not in the data"),
        (["method.model=vit"], "method.model='vit'"),
        (["method.options.cmtb.share=0"], "share=0"),
        (["data.modalities=[rgb,sonar]"], "sonar is not generated"),
        (["train.batch_size=7", "train.accumulation=2"], "train.batch_size=7"),
        (["optim.warmup=1.5"], "optim.warmup=1.5"),
        (["optim.schedule=linear"], "schedule='linear'"),
        (["evaluate.threshold=best"], "threshold='best'"),
        (["data.size=28"], r"images are \(28, 28\), the network was made for \(24, 24\)"),
        (["method.loss.weights.cross=-1"], "method.loss.weights"),
        (["method=cmfl", "method.loss.cmfl=2"], "cmfl=2"),
        (["method=concat_dropout", "method.options.dropout=1.5"], "dropout=1.5"),
        (["data.root=/data"], "these faces are generated"),
        (["data.modalities=[rgb,rgb]"], "different names"),
        (["data.validation=0"], "data.validation=0"),
        (["model.vit.patch_size=5"], "24 x 24 are no multiple of patches of 5 x 5"),
    ],
)
def test_bad_configurations_are_named_before_anything_is_written(overrides, message, fabric, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(short(*overrides), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unknown_keys_and_choices(fabric, tmp_path):
    with pytest.raises(TypeError, match="dept"):
        fit(short("+data.dept=1"), fabric, tmp_path / "run")
    with pytest.raises(TypeError, match="gama"):
        fit(short("+method.loss.gama=1"), fabric, tmp_path / "run2")
    assert not list(tmp_path.iterdir())
    with pytest.raises(MissingConfigException, match="fmvitt"):
        short("method=fmvitt")


def test_a_loss_that_is_not_finite_stops_the_run(fabric, tmp_path):
    with pytest.raises(FloatingPointError, match="not finite at step"):
        fit(short("optim.lr=1e30", "optim.clip=null"), fabric, tmp_path)
    assert result(tmp_path)["status"] == "failed"


def test_schedules():
    options = {"steps": 10, "epochs": 10}
    assert (
        lr_factor(5, warmup=0.1, **options) == pytest.approx(0.5, abs=1e-6)
        and lr_factor(10, warmup=0.1, **options) == 1
    )
    assert lr_factor(100, warmup=0.1, **options) == pytest.approx(0) and lr_factor(0, warmup=0.0, **options) == 1
    halved = [lr_factor(s, warmup=0.0, schedule="step", step_every=4, **options) for s in (0, 39, 40, 79, 80, 99)]
    assert halved == [1, 1, 0.5, 0.5, 0.25, 0.25]


def tiny_model():
    return [
        "model.vit.name=null",
        "~model.vit.pretrained",
        *(f"+model.vit.{key}={value}" for key, value in TINY.items()),
    ]


@pytest.mark.parametrize("name", ["casia_surf", "casia_surf_base", "wmca", "cefa", "flex_benchmark"])
def test_experiments_find_tiny_data_in_the_real_layout(name, fabric, tmp_path, capsys):
    if name == "cefa":
        write_videos(tmp_path)
    else:
        write_triplets(tmp_path)
    more = ["data.size=24", "train.batch_size=8", *tiny_model()]
    more += {"wmca": ["data.subject=null", "data.video=null", "data.species=null"], "cefa": ["data.every=1"]}.get(
        name, []
    )
    cfg = config(f"experiment={name}", f"data.root={tmp_path}", *COPY, "preflight=true", "arm=fmvit", *more)
    assert 0.1 < cfg.estimate.gpu_hours < 100
    fit(cfg, fabric, tmp_path / "run")
    assert "preflight: data found" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_hours_of_an_arm_are_those_of_its_cost():
    hours = {
        m: config("experiment=casia_surf", f"arm={m}").estimate.gpu_hours for m in ("rgb_only", "fmvit", "zero_init")
    }
    assert hours["zero_init"] is None and 3 < hours["fmvit"] / hours["rgb_only"] < 4


def test_own_folders_train_with_augmentation_and_other_data_is_another_run(fabric, tmp_path):
    write_own(tmp_path / "a")
    write_own(tmp_path / "b", people=4)
    cfg = ["data=folder", "data.size=24", "data.workers=0", "arm=test", "train.epochs=1", "train.batch_size=8"]
    fit(config(*cfg, f"data.root={tmp_path / 'a'}"), fabric, tmp_path / "run")
    found = result(tmp_path / "run")
    assert found["status"] == "finished" and found["data"]["images"] == 81
    assert "apcer_worst_rgb" in found["metrics"]  # species are the names of the folders
    with pytest.raises(runs.RunError, match="on other data"):
        fit(config(*cfg, f"data.root={tmp_path / 'b'}"), fabric, tmp_path / "run")
    (tmp_path / "a").rename(tmp_path / "moved")
    fit(config(*cfg, f"data.root={tmp_path / 'moved'}"), fabric, tmp_path / "run")  # where it lies may change


def test_pretrained_trunks_go_into_every_branch(monkeypatch):
    asked = []

    def create_model(name, pretrained=False, **options):
        from timm.models.vision_transformer import VisionTransformer

        asked.append((name, pretrained))
        torch.manual_seed(7)
        return VisionTransformer(img_size=24, patch_size=8, embed_dim=24, depth=1, num_heads=2, **options)

    monkeypatch.setattr("timm.create_model", create_model)
    model = build(runs.plain(short("model=vit_small")), ["rgb", "depth", "ir"])
    assert asked == [("vit_small_patch16_224", True)] * 3
    assert torch.equal(model.branches["rgb"].trunk.pos_embed, model.branches["ir"].trunk.pos_embed)


def test_sweeps_compose_and_claims_name_arms_that_are_run():
    claims = load_claims(PAPER)
    for scale in ("mini", "full", "gpu_faces112", "paper"):
        found = reproduce.cells(PAPER, scale)
        arms = {c.arm for c in found}
        wanted = {a for c in claims if scale in c["scale"] for a in c["arms"]}
        assert wanted <= arms, (scale, wanted - arms)
        assert len({c.dir for c in found}) == len(found)
    assert sum(c["primary"] for c in claims if "mini" in c["scale"]) == 3


def test_a_step_on_shapes_is_made_once_for_each_network_whatever_the_seed(monkeypatch):
    made = []
    monkeypatch.setattr(train, "losses", lambda model, images, labels, loss: made.append(type(model).__name__))
    monkeypatch.setattr(loop, "_DONE", set())
    for overrides in (
        ["seed=1"],
        ["seed=2", "optim.lr=0.5"],
        ["method=shared"],
        ["seed=1"],
        ["data.size=32", "model.vit.img_size=32"],
    ):
        check(short(*overrides))
    assert made == ["FMViT", "SharedViT", "FMViT"]


def test_every_term_of_the_loss_is_that_of_its_own_paths():
    """With a loss that is the number of modalities of the path, summed over the modalities of each path."""

    class Counting:
        modalities = ("rgb", "depth", "ir")

        def __call__(self, images, paths):
            return [{m: torch.tensor(float(len(p))) for m in p} for p in paths]

        def loss(self, logits, labels, **options):
            return sum(logits.values())

    loss = {"paths": ["single", "partial", "cross"], "weights": {"cross": 0.5}}
    terms = losses(Counting(), {}, torch.zeros(2, dtype=torch.long), loss)  # type: ignore[arg-type]
    assert {k: float(v) for k, v in terms.items()} == {
        "loss_single": 3,
        "loss_partial": 3 * 2 * 2,
        "loss_cross": 0.5 * 3 * 3,
    }
