"""The scripts as people run them: every arm, resume, two ranks, errors, evaluation, export, prediction."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from common import reproduce, runs
from common.metrics.claims import load_claims
from fm_vit import bench, evaluate, export, predict
from fm_vit.tests.helpers import CONFIGS, PAPER, SHORT, config, picture, short, write_triplets, write_videos
from fm_vit.train import build, fit, warm_cosine

ARMS = sorted(p.stem for p in (CONFIGS / "method").glob("*.yaml"))


def result(path):
    return json.loads((path / "result.json").read_text())


@pytest.mark.parametrize("method", ARMS)
def test_every_arm_trains_and_reports_every_subset_that_it_has(method, fabric, tmp_path):
    fit(short(f"method={method}", "train.epochs=1"), fabric, tmp_path)
    found = result(tmp_path)
    assert found["status"] == "finished"
    subsets = {k.removeprefix("acer_") for k in found["metrics"] if k.startswith("acer_")}
    cfg = short(f"method={method}")
    number = len(cfg.method.modalities or cfg.data.modalities)
    assert len(subsets) == 2**number - 1
    assert json.loads((tmp_path / "thresholds.json").read_text()).keys() == subsets
    assert all(0 <= found["metrics"][f"acer_{s}"] <= 100 for s in subsets)


def test_loss_falls_and_infrared_separates(fabric, tmp_path):
    fit(
        short("train.epochs=30", "data.train=64", "data.modalities=[ir]", "method=ir_only", "optim.lr=3e-3"),
        fabric,
        tmp_path,
    )
    rows = [json.loads(line)["loss_single"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1] < 0.5 * rows[0] and result(tmp_path)["metrics"]["auc_ir"] > 80


@pytest.mark.parametrize("method", ["fmvit", "concat_dropout"])
def test_resumed_equals_uninterrupted_bit_for_bit(method, fabric, tmp_path, monkeypatch):
    cfg = short(f"method={method}")
    fit(cfg, fabric, tmp_path / "whole")
    log = runs.Run.log

    def killed(self, **row):
        log(self, **row)
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, "log", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(cfg, fabric, tmp_path / "parts")
    monkeypatch.undo()
    fit(cfg, fabric, tmp_path / "parts")
    a, b = (runs.load_checkpoint(tmp_path / n / "last.ckpt")["model"] for n in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert result(tmp_path / "whole")["metrics"] == result(tmp_path / "parts")["metrics"]
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "parts/metrics.jsonl").read_text()


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


def test_accumulation_equals_the_whole_batch(fabric, tmp_path):
    for name, n in (("whole", 1), ("parts", 4)):
        fit(short(f"train.accumulation={n}", "train.epochs=1"), fabric, tmp_path / name)
    a, b = (runs.load_checkpoint(tmp_path / n / "last.ckpt")["model"] for n in ("whole", "parts"))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.loss.paths=[triple]"], "triple"),
        (["method.modalities=[thermal]"], "thermal is not in the data"),
        (["method.model=vit"], "method.model='vit'"),
        (["+method.options.cmtb.share=0"], "share=0"),
        (["data.modalities=[rgb,sonar]"], "sonar is not generated"),
        (["train.batch_size=7", "train.accumulation=2"], "train.batch_size=7"),
        (["optim.warmup=1.5"], "optim.warmup=1.5"),
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
    with pytest.raises(MissingConfigException, match="fmvitt"):
        short("method=fmvitt")


def test_a_loss_that_is_not_finite_stops_the_run(fabric, tmp_path):
    with pytest.raises(FloatingPointError, match="not finite at step"):
        fit(short("optim.lr=1e30", "optim.clip=null"), fabric, tmp_path)
    assert result(tmp_path)["status"] == "failed"


def test_warm_cosine():
    assert warm_cosine(0.05, 0.1) == pytest.approx(0.5, abs=1e-6) and warm_cosine(0.1, 0.1) == 1
    assert warm_cosine(1.0, 0.1) == pytest.approx(0) and warm_cosine(0.0, 0.0) == 1


@pytest.mark.parametrize("name", ["casia_surf", "casia_surf_base", "wmca", "cefa"])
def test_experiments_find_tiny_data_in_the_real_layout(name, fabric, tmp_path, capsys):
    lists = "data.lists={train: train_list.txt, validation: val_list.txt, test: test_list.txt}"
    if name == "cefa":
        write_videos(tmp_path)
    else:
        write_triplets(tmp_path)
    shape = {"img_size": 24, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    tiny = ["data.size=24", "data.workers=0", "train.batch_size=8", "model.vit.name=null", "~model.vit.pretrained"]
    tiny += [f"+model.vit.{key}={value}" for key, value in shape.items()]
    tiny += {"wmca": ["data.subject=null", "data.species=null"], "cefa": ["data.every=1"]}.get(name, [])
    cfg = config(f"experiment={name}", f"data.root={tmp_path}", lists, "preflight=true", "arm=test", *tiny)
    fit(cfg, fabric, tmp_path / "run")
    assert "preflight: data found" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_a_list_set_trains_to_its_end_with_augmentation(fabric, tmp_path):
    write_triplets(tmp_path)
    lists = "data.lists={train: train_list.txt, validation: val_list.txt, test: test_list.txt}"
    fit(
        config("data=casia_surf", "arm=test", f"data.root={tmp_path}", lists, "data.size=24", "data.workers=0",
            "train.epochs=1", "train.batch_size=8", "data.subject='(AS_\\d+)'"),
        fabric, tmp_path / "run",
    )  # fmt: skip
    assert result(tmp_path / "run")["status"] == "finished"


def test_pretrained_trunks_go_into_every_branch(monkeypatch):
    asked = []

    def create_model(name, pretrained=False, **options):
        from timm.models.vision_transformer import VisionTransformer

        asked.append((name, pretrained))
        torch.manual_seed(7)
        return VisionTransformer(img_size=24, patch_size=8, embed_dim=24, depth=1, num_heads=2, **options)

    monkeypatch.setattr("timm.create_model", create_model)
    model = build(short("model=vit_small"), ["rgb", "depth", "ir"])
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


# --------------------------------------------------------------------------------------------------------------- scripts
def test_evaluate_repeats_the_numbers_of_the_run_and_writes_its_figures(checkpoint, tmp_path, capsys):
    cfg = config(
        f"weights={checkpoint}",
        f"out={tmp_path}",
        "bootstrap=20",
        "record=true",
        f"record_to={tmp_path}",
        name="evaluate",
    )
    with pytest.warns(UserWarning, match="cannot be measured"):
        rows = evaluate.evaluate(cfg)
    metrics = result(checkpoint.parent)["metrics"]
    assert {f"acer_{tag}": row["acer"] for tag, row in rows.items()} == pytest.approx(
        {k: v for k, v in metrics.items() if k.startswith("acer_")}
    )
    assert all(row["acer_low"] <= row["acer_high"] and 0 <= row["tpr_0.01"] <= 100 for row in rows.values())
    with (tmp_path / "subsets.csv").open() as file:
        assert [r["subset"] for r in csv.DictReader(file)] == list(rows)
    assert (tmp_path / "subsets.png").stat().st_size > 5000 and (tmp_path / "det.png").stat().st_size > 5000
    (record,) = tmp_path.glob("*.json")
    assert json.loads(record.read_text())["n"] == 48
    with pytest.raises(ValueError, match="no sample of the attack species silicone"):
        evaluate.evaluate(config(f"weights={checkpoint}", "species=[print,silicone]", name="evaluate"))
    for bad in ("level=clip", "threshold=best"):
        with pytest.raises(ValueError, match=bad.split("=")[1]):
            evaluate.evaluate(config(f"weights={checkpoint}", bad, name="evaluate"))


def test_evaluate_refuses_other_files(tmp_path):
    torch.save({"model": {}}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="it lacks config, modalities"):
        evaluate.load(str(tmp_path / "x.ckpt"))


@pytest.mark.parametrize("names", [["rgb"], ["rgb", "depth", "ir"]])
def test_export_of_one_branch_and_of_all(names, checkpoint, tmp_path, capsys):
    out = tmp_path / "model.onnx"
    export.export(config(f"weights={checkpoint}", f"modalities={names}", f"out={out}", name="export"))
    whole = sum(v.numel() for v in runs.load_checkpoint(checkpoint)["model"].values())
    printed = capsys.readouterr().out
    parameters = int(printed.split(" parameters")[0].split()[-1].replace(",", ""))
    assert parameters * 3 == whole * len(names) and out.exists()
    with pytest.raises(ValueError, match="sonar"):
        export.export(config(f"weights={checkpoint}", "modalities=[sonar]", name="export"))


def test_predict_uses_the_threshold_of_the_subset(checkpoint, tmp_path, capsys):
    for m in ("rgb", "ir"):
        for i in range(3 if m == "rgb" else 2):
            picture(tmp_path / m / f"{i}.png", i)
    thresholds = json.loads((checkpoint.parent / "thresholds.json").read_text())
    base = [f"weights={checkpoint}", f"folders.rgb={tmp_path / 'rgb'}", f"out={tmp_path / 's.csv'}"]
    predict.score(config(*base, f"folders.ir={tmp_path / 'ir'}", name="predict"))
    printed = capsys.readouterr().out
    assert "left out, not in every folder: 2" in printed and f'"threshold": {thresholds["rgb_ir"]}' in printed
    with (tmp_path / "s.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["name"] for r in rows] == ["0", "1"] and {r["decision"] for r in rows} <= {"live", "attack"}
    predict.score(config(*base, name="predict"))
    assert f'"threshold": {thresholds["rgb"]}' in capsys.readouterr().out
    with pytest.raises(ValueError, match="give one or more of rgb, depth, ir"):
        predict.score(config(f"weights={checkpoint}", name="predict"))
    with pytest.raises(FileNotFoundError, match="no folder"):
        predict.score(config(f"weights={checkpoint}", f"folders.ir={tmp_path / 'none'}", name="predict"))


def test_bench_gives_ratios(tmp_path):
    cfg = config("rounds=2", "threads=1", f"out={tmp_path / 'bench.json'}", name="bench")
    OmegaConf.set_struct(cfg, False)
    cfg.model.vit = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    rows = bench.bench(cfg)
    assert [r["ratio"] > 0 for r in rows] == [True, True]
    assert json.loads((tmp_path / "bench.json").read_text()) == rows
