"""evaluate.py, predict.py, export.py, counts.py and bench.py, on a checkpoint trained here."""

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from adaptive_prune import bench, counts, evaluate, export, predict
from adaptive_prune.backbones import build_vit
from adaptive_prune.train import fit
from common import runs
from common.metrics.claims import load_document

PAPER = Path(__file__).resolve().parents[1]
CONFIGS = PAPER / "configs"
SHORT = ["data.train_images=96", "data.test_images=40", "train.batch_size=32", "train.epochs=2", "budget.target=0.6"]
THETA = [0.01, 0.015, 0.02]


def config(name, *overrides):
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def start(script, *overrides):
    """A script's main as its command line would call it."""
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        script.main(compose(script.__name__.rpartition(".")[2], overrides=list(overrides)))


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def sharp_vit(channels, classes):
    """A bare ViT for 24 x 24 images, random, with attention far from uniform."""
    vit = {"name": "vit", "img_size": 24, "patch_size": 4, "embed_dim": 32, "depth": 6, "num_heads": 4, "mlp_ratio": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_vit(**vit, num_classes=classes, in_chans=channels)
        for block in model.blocks:
            torch.nn.init.normal_(block.attn.qkv.weight, std=0.5)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """AS-ViT trained for six steps on digit grids."""
    out = tmp_path_factory.mktemp("trained")
    torch.save(sharp_vit(1, 10).state_dict(), out / "start.pth")
    cfg = config("config", "arm=as", f"start.checkpoint={out / 'start.pth'}", f"method.thresholds={THETA}", *SHORT)
    fit(cfg, runs.launch({"accelerator": "cpu", "devices": 1}), out / "run")
    return out / "run/last.ckpt"


@pytest.fixture
def measured(capsys, tmp_path):
    """What evaluate.py prints for its overrides: {metric: value}."""

    def run(*overrides):
        capsys.readouterr()
        start(evaluate, f"out={tmp_path / 'evaluation'}", *overrides)
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        return {words[0]: float(words[1]) for words in lines if len(words) == 2 and words[0].isidentifier()}

    return run


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    """A bare ViT's weights for colour images of five classes as they are published, with thresholds."""
    file = tmp_path_factory.mktemp("colour") / "bare.pth"
    weights = {f"module.{k}": v for k, v in sharp_vit(3, 5).state_dict().items()}
    torch.save({"model": weights | {"theta": torch.tensor(THETA)}}, file)
    return [f"weights={file}", "vit=mini", "set=imagenet", "+data.size=24"]


def photos(folder, n=3):
    generator = np.random.default_rng(0)
    for i in range(n):
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("sub" if i else "") / f"photo{i}.png")
    return folder


# ----------------------------------------------------------------------------------------------------------- evaluate
def test_evaluate_gives_the_numbers_of_the_run_and_the_counts_behind_them(checkpoint, measured, tmp_path):
    found = measured(f"weights={checkpoint}")
    recorded = json.loads((checkpoint.parent / "result.json").read_text())["metrics"]
    assert found == pytest.approx(recorded, rel=1e-4) and {"top1", "macs", "gmacs", "recall_lift"} <= found.keys()
    rows = table(tmp_path / "evaluation/kept.csv")
    kept = torch.tensor([[int(r[f"kept_{s}"]) for s in (1, 2, 3)] for r in rows]).double()
    assert len(rows) == 40 and kept.std(0).max() > 0, "the test needs different counts"
    assert 100 * np.mean([int(r["right"]) for r in rows]) == pytest.approx(found["top1"])
    assert [found[f"kept_{s}"] for s in (1, 2, 3)] == pytest.approx((kept.mean(0) / 36).tolist(), rel=1e-4)
    cost = evaluate.load(checkpoint)[0].cost
    macs = [cost.staged(k, (2, 3, 4)) / cost.dense for k in kept.tolist()]
    assert found["macs"] == pytest.approx(np.mean(macs), rel=1e-4) and found["macs"] < 1
    histogram = table(tmp_path / "evaluation/histogram.csv")
    for stage in (1, 2, 3):
        bins = [r for r in histogram if r["stage"] == str(stage)]
        assert sum(int(r["images"]) for r in bins) == 40
        assert float(bins[0]["low"]) == kept[:, stage - 1].min()


def test_evaluate_with_other_thresholds_inference_data_and_calibration(checkpoint, measured, tmp_path):
    weights = f"weights={checkpoint}"
    whole = measured(weights, "thresholds=[-1,-1,-1]", "histogram=false")
    assert whole["macs"] == 1 and whole["kept_3"] == 1 and not (tmp_path / "evaluation").exists()
    none = measured(weights, "thresholds=[1,1,1]")
    assert none["kept_1"] == 0 and none["macs"] == pytest.approx(
        evaluate.load(checkpoint)[0].cost.floor((2, 3, 4)), rel=1e-4
    )
    packed = json.loads((checkpoint.parent / "result.json").read_text())["metrics"]
    assert measured(weights, "inference=masked") == pytest.approx(packed, rel=1e-4)
    retargeted = measured(weights, "calibrate=0.6", "calibration_images=64")
    assert retargeted["calibrated_macs"] == pytest.approx(0.6, abs=0.02)
    assert retargeted["macs_of_topk"] == pytest.approx(retargeted["calibrated_macs"], abs=0.02)


def test_released_weights_are_evaluated_dense(checkpoint, measured, tmp_path):
    weights = {k.removeprefix("vit."): v for k, v in runs.load_checkpoint(checkpoint)["model"].items() if k != "theta"}
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "bare.pth")
    what = ["vit=mini", "set=digit_grids", "arm=dense", "+data.test_images=40"]
    bare = measured(f"weights={tmp_path / 'bare.pth'}", *what)
    dense = measured(f"weights={checkpoint}", "thresholds=[-1,-1,-1]")
    assert bare["nll"] == pytest.approx(dense["nll"], rel=1e-4) and bare["macs"] == 1 and "kept_1" not in bare


def test_the_record_names_weights_and_claim(checkpoint, measured, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "__file__", str(tmp_path / "evaluate.py"))
    found = measured(f"weights={checkpoint}", "record=true", "claim=deit_s_weights")
    (file,) = (tmp_path / "results/external").iterdir()
    record = json.loads(file.read_text())
    assert record["weights_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert record["claim"] == "deit_s_weights" and record["n"] == 40
    assert record["value"] == pytest.approx(found["top1"], rel=1e-4)


@pytest.mark.parametrize("script", [evaluate, predict, export])
def test_a_missing_checkpoint_is_named(script, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere\.ckpt"):
        start(script, f"weights={tmp_path / 'nowhere.ckpt'}")


def test_checkpoints_of_another_kind_are_named(checkpoint, tmp_path):
    bare = {"model": "mini", "method": "dense", "dataset": "digit_grids"}
    (tmp_path / "half.ckpt").write_bytes(checkpoint.read_bytes()[:1000])
    head = {"head.weight": torch.zeros(10, 32)}
    torch.save({"model": {}, "config": {"model": {}}}, tmp_path / "foreign.ckpt")
    torch.save(head, tmp_path / "head.pth")
    torch.save(head | {"patch_embed.proj.weight": torch.zeros(32, 1, 4, 4)}, tmp_path / "parts.pth")
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        for file, names, kind, error in (
            (tmp_path / "half.ckpt", {}, runs.RunError, r"half\.ckpt: truncated"),
            (tmp_path / "foreign.ckpt", {}, ValueError, r"foreign\.ckpt.*lacks channels, classes, keep"),
            (checkpoint.parent / "evaluation.ckpt", {}, ValueError, "not written by train.py: say what it is"),
            (checkpoint.parent / "evaluation.ckpt", bare, ValueError, "holds no head weights"),
            (tmp_path / "head.pth", bare, ValueError, "holds no patch_embed weights"),
            (tmp_path / "parts.pth", bare, ValueError, r"does not fit vit: missing \['vit\.cls_token'"),
        ):
            with pytest.raises(kind, match=error):
                evaluate.load(file, **names)


def test_evaluate_names_bad_values_and_missing_folders(checkpoint, tmp_path):
    weights = f"weights={checkpoint}"
    folder = ["+data.name=folder", "+data.size=24"]
    for name in ("ant", "bee", "cat"):
        for split in ("train", "val"):
            (tmp_path / "d" / split / name).mkdir(parents=True)
            Image.new("RGB", (24, 24)).save(tmp_path / "d" / split / name / "0.png")
    for overrides, kind, error in (
        (["inference=sparse"], ValueError, "inference='sparse', allowed: packed"),
        (["ema=true"], ValueError, "no averaged weights"),
        (["thresholds=[0.1,0.2]"], RuntimeError, "size"),
        ([*folder, f"data.root={tmp_path / 'gone'}"], FileNotFoundError, r"no folder .*gone"),
        ([*folder, f"data.root={tmp_path / 'd/train'}"], FileNotFoundError, r"no folder .*d/train/train"),
        ([*folder, f"data.root={tmp_path / 'd'}"], ValueError, "10 classes, the data set 3"),
    ):
        with pytest.raises(kind, match=error):
            start(evaluate, weights, *overrides)


# ------------------------------------------------------------------------------------------------------------ predict
def test_overlay_whitens_the_dropped_patches_only():
    image = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    shown = predict.overlay(image, torch.tensor([1.0, 0, 1, 1]))
    scaled = ((image - image.min()) / (image.max() - image.min()))[0].numpy()
    assert shown.shape == (8, 8, 3) and shown[:4, 4:].min() >= 0.85
    np.testing.assert_allclose(shown[4:, :, 0], scaled[4:], atol=1e-6)
    np.testing.assert_allclose(shown[:4, :4, 2], scaled[:4, :4], atol=1e-6)


def test_predict_draws_test_images_and_counts_their_tokens(checkpoint, measured, tmp_path):
    start(predict, f"weights={checkpoint}", "count=3", f"out={tmp_path / 'out'}")
    rows = table(tmp_path / "out/kept_tokens.csv")
    measured(f"weights={checkpoint}")
    kept = table(tmp_path / "evaluation/kept.csv")[:3]
    assert [[r[f"kept_{s}"] for s in (1, 2, 3)] for r in rows] == [[r[f"kept_{s}"] for s in (1, 2, 3)] for r in kept]
    picture = np.asarray(Image.open(tmp_path / "out/kept_tokens.png"))
    assert min(picture.shape[:2]) > 300 and picture.std() > 10


def test_predict_on_a_folder_of_photographs(colour, tmp_path):
    folder = photos(tmp_path / "in")
    start(predict, *colour, "arm=as", f"images={folder}", f"out={tmp_path / 'out'}")
    rows = table(tmp_path / "out/kept_tokens.csv")
    assert [r["image"] for r in rows] == ["photo0", "photo1", "photo2"]
    start(predict, *colour, "arm=as", f"images=[{folder / 'sub'},{folder / 'photo0.png'}]", f"out={tmp_path / 'list'}")
    again = table(tmp_path / "list/kept_tokens.csv")
    assert again == [rows[1], rows[2], rows[0]], "an image must not depend on its batch"
    counts = [[int(r[f"kept_{s}"]) for s in (1, 2, 3)] for r in rows]
    assert all(36 >= a >= b >= c >= 0 for a, b, c in counts) and min(min(counts)) < 36 < sum(map(sum, counts))
    assert (tmp_path / "out/kept_tokens.png").stat().st_size > 1000


def test_predict_refuses_bad_input(checkpoint, colour, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/broken.png").write_bytes(b"no image")
    grey = [f"weights={checkpoint}", f"out={tmp_path / 'out'}"]
    folder = photos(tmp_path / "in", 1)
    for overrides, kind, error in (
        ([*colour, "arm=as", f"images={tmp_path / 'gone'}"], FileNotFoundError, "no file or folder .*gone"),
        ([*colour, "arm=as", f"images={tmp_path / 'empty'}"], FileNotFoundError, r"no image in .*empty.*\.png"),
        ([*colour, "arm=as", f"images={tmp_path / 'broken'}"], ValueError, r"cannot decode image .*broken\.png"),
        ([*grey, "photos=true"], ValueError, "1 channel, photographs have 3"),
        ([*grey, "count=41"], ValueError, r"count=41, allowed: 1\.\.40"),
        ([*colour, "arm=dense", f"images={folder}"], ValueError, "rule='none' drops no tokens"),
    ):
        with pytest.raises(kind, match=error):
            start(predict, *overrides)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- export
@pytest.mark.parametrize("batch", [False, True])
def test_onnx_drops_the_same_tokens(batch, checkpoint, tmp_path, capsys):
    out = tmp_path / "as.onnx"
    start(export, f"weights={checkpoint}", f"out={out}", f"batch={batch}")
    assert "largest difference to torch on 4 images" in capsys.readouterr().out
    model, _ = evaluate.load(checkpoint)
    x = torch.randn(6, 1, 24, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, info = model(x, details=True)
    assert info.kept.std(0).max() > 0, "the test needs different counts"
    np.testing.assert_allclose(export.onnx_logits(out, x, batch=batch), expected.numpy(), atol=1e-4)


def test_onnx_with_no_and_with_one_survivor(checkpoint, tmp_path):
    model, _ = evaluate.load(checkpoint)
    x = torch.randn(3, 1, 24, 24, generator=torch.Generator().manual_seed(1))
    model.inference = "masked"
    with torch.no_grad():
        best = model(x, details=True)[1].scores[:, 0].topk(2, 1).values
        model.theta.copy_(torch.tensor([best[0].mean(), -1.0, -1.0]))
        model.inference = "packed"
        expected, info = model(x, details=True)
        assert info.kept[0, 0] == 1
        export.export(model, x[1:], tmp_path / "one.onnx")
        np.testing.assert_allclose(export.onnx_logits(tmp_path / "one.onnx", x), expected.numpy(), atol=1e-4)
        model.theta.fill_(1.0)
        export.export(model, x, tmp_path / "none.onnx")
        np.testing.assert_allclose(export.onnx_logits(tmp_path / "none.onnx", x), model(x).numpy(), atol=1e-4)


def test_export_refuses_what_it_cannot_trace(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="only rule=threshold.*'topk'"):
        start(export, f"weights={checkpoint}", "arm=topk", f"out={tmp_path / 'm.onnx'}")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- counts
@pytest.fixture(scope="module")
def counted():
    cfg = config("counts")
    rows = {str(n): counts.measure(str(n), list(at), cfg.keep_rate) for n, at in cfg.locations.items()}
    return {f"{key}_{name}": value for name, found in rows.items() for key, value in found.items()}


def test_counts_are_the_published_ones(counted):
    exact = [c for c in load_document(PAPER)["claims"] if c["kind"] == "exact"]
    assert len(exact) >= 18
    for claim in exact:
        assert claim["arms"] == ["counts"] and claim["published"]["source"] == "code"
        assert abs(counted[claim["metric"]] - claim["published"]["value"]) <= claim.get("tol", 0), claim["id"]


def test_two_ways_of_counting_agree_and_thresholds_are_the_only_new_parameters(counted):
    names = [k.removeprefix("floor_") for k in counted if k.startswith("floor_")]
    assert len(names) == 6 and torch.get_default_device().type == "cpu", "the meta device must not leak"
    for name in names:
        assert counted[f"gmacs_dispatched_{name}"] == pytest.approx(counted[f"gmacs_{name}"], rel=1e-9)
        assert counted[f"params_pruned_{name}"] == counted[f"params_{name}"] + 3
        assert counted[f"floor_{name}"] < counted[f"gmacs_keep_{name}"] / counted[f"gmacs_{name}"] < 1
    floors = [counted[f"floor_deit_{size}_patch16_224"] for size in ("tiny", "small", "base")]
    assert floors == pytest.approx([0.3515, 0.3448, 0.3409], abs=5e-5)


# -------------------------------------------------------------------------------------------------------------- bench
def small_vit(name):
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=12, num_heads=3, mlp_ratio=2, num_classes=5)


def test_bench_rows_are_complete(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.timm, "create_model", small_vit)
    out = tmp_path / "bench.json"
    with torch.random.fork_rng():
        bench.main(["model=small", "batches=1,3", "seconds=0.1", f"out={out}"])
    rows = json.loads(out.read_text())
    keys = {"name", "ours", "baseline", "ratio", "unit", "threads", "batch", "isa", "machine"}
    assert all(set(row) == keys and row["ratio"] == pytest.approx(row["ours"] / row["baseline"]) for row in rows)
    assert {row["batch"] for row in rows} == {1, 3}
    names = {row["name"].removeprefix("small ") for row in rows}
    arms = {"packed", "padded", "batch_topk", "evit", "tome"}
    assert names >= {f"{a} against dense" for a in arms} | {
        "packed against tome",
        "packed, share of the ideal MAC ratio",
    }
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if " rounds" in line]
    macs = [float(line[line.index("MACs") - 1]) for line in lines if line[0] != "dense"]
    assert len(macs) == 2 * len(arms) and macs == pytest.approx([0.65] * len(macs), abs=0.06)


def test_bench_keeps_to_its_time_and_shuffles(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def model(name, cost):
        return lambda x: (calls.append(name), clock.__setitem__(0, clock[0] + cost))

    models = {"a": model("a", 1.0), "b": model("b", 3.0)}
    times = bench.measure(models, torch.zeros(1), end=18.0)
    assert times == {"a": [1.0] * 5, "b": [3.0] * 5}  # the fifth round begins at 16 s
    pairs = {tuple(calls[i : i + 2]) for i in range(0, 10, 2)}
    assert pairs == {("a", "b"), ("b", "a")}
    assert len(bench.measure(models, torch.zeros(1), end=0.0)["a"]) == 3


def test_bench_refuses_unknown_options():
    with pytest.raises(SystemExit, match=r"unknown \['second'\]; known: model"):
        bench.main(["second=3"])
    with pytest.raises(SystemExit, match=r"\['fast'\] is not of the form"):
        bench.main(["fast"])
