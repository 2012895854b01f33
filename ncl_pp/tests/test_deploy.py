"""evaluate.py, predict.py, export.py and bench.py on a checkpoint trained here."""

import csv
import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from common import runs
from common.data.batches import eval_batches
from common.data.digits import all_digits
from common.onnx_export import export_onnx, read_about
from ncl_pp import bench, evaluate, export, predict
from ncl_pp.checkpoint import data_of, load
from ncl_pp.model import Ensemble, Experts, ensemble
from ncl_pp.tests.layouts import folder_arm, short_config, write_class_folders
from ncl_pp.train import fit


# ----------------------------------------------------------------------------------------------------------- evaluate
def test_evaluate_gives_the_numbers_of_the_run(checkpoint, script_config, capsys, fabric):
    metrics = evaluate.evaluate(script_config("evaluate", f"weights={checkpoint}", "per_class=true"), fabric)
    recorded = json.loads((checkpoint.parent / "result.json").read_text())["metrics"]
    assert metrics == pytest.approx(recorded, abs=1e-6) and metrics["top1"] > 60
    out = capsys.readouterr().out
    per_class = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("class ")]
    assert len(per_class) == 10 and np.mean(per_class) == pytest.approx(metrics["top1_ensemble"], abs=0.01)


def test_shifted_priors_pay_when_known_and_groups_follow_the_convention(checkpoint, script_config, fabric):
    for prior in ("forward", "backward", "train"):
        cfg = script_config("evaluate", f"weights={checkpoint}", f"prior={prior}", "groups=official")
        metrics = evaluate.evaluate(cfg, fabric)
        assert metrics["top1_ensemble_prior_known"] != metrics["top1_ensemble_prior_ignored"]
        assert {"top1_medium", "top1_few"} & metrics.keys() and "top1_many" not in metrics  # 40 ... 10 images
        trained = load(checkpoint)
        x, y = next(iter(eval_batches(data_of(trained, {}).test, batch_size=600)))
        pi = evaluate.test_prior(prior, trained.about["counts"], cfg.prior_ratio)
        with torch.no_grad():
            posterior = ensemble(trained.model(x)).double().softmax(-1) * pi  # Bayes: the training was balanced
        by_hand = sum(float(pi[c] * (posterior[y == c].argmax(-1) == c).double().mean()) for c in range(10))
        assert metrics["top1_ensemble_prior_known"] == pytest.approx(100 * by_hand, abs=1e-6)


def test_evaluate_on_other_data_and_the_record(checkpoint, script_config, tmp_path, fabric):
    other = evaluate.evaluate(script_config("evaluate", f"weights={checkpoint}", "+data.test_per_class=20"), fabric)
    base = evaluate.evaluate(
        script_config("evaluate", f"weights={checkpoint}", "record=true", f"record_to={tmp_path / 'external'}"), fabric
    )
    assert other != base
    (file,) = (tmp_path / "external").iterdir()
    record = json.loads(file.read_text())
    assert record["weights_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest() and record["claim"] is None
    assert record["n"] == 600 and record["value"] == base["top1_ensemble"]


def test_bad_checkpoints_and_splits_are_named(checkpoint, script_config, tmp_path, fabric):
    half = tmp_path / "half.ckpt"
    half.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(runs.RunError, match=r"half\.ckpt"):
        load(str(half))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        load(str(tmp_path / "nowhere.ckpt"))
    torch.save({"model": {}, "config": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="lacks about"):
        load(str(tmp_path / "foreign.ckpt"))
    with pytest.raises(ValueError, match="no validation split"):
        evaluate.evaluate(script_config("evaluate", f"weights={checkpoint}", "split=validation"), fabric)
    with pytest.raises(TypeError, match="rooot"):
        evaluate.evaluate(script_config("evaluate", f"weights={checkpoint}", "+data.rooot=/x"), fabric)
    write_class_folders(tmp_path / "d", {"train": 1, "test": 1}, ("a", "b", "c"))
    folder = ["+data.name=folder", f"data.root={tmp_path / 'd'}", "+data.augment=plain"]
    with pytest.raises(ValueError, match="folder has 3 classes, the model 10"):
        evaluate.evaluate(script_config("evaluate", f"weights={checkpoint}", *folder), fabric)


# ------------------------------------------------------------------------------------------------------------ predict
@pytest.fixture
def test_images(checkpoint, tmp_path):
    """Twelve test digits as PNG files (sixteenths of grey survive in 8 bits), their tensors and labels."""
    data = data_of(load(checkpoint), {}).test
    for i in range(12):
        grey = (data[i][0][0] * 255).round().to(torch.uint8).numpy()
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(grey).save(tmp_path / f"in/{i:02d}.png")
    return tmp_path / "in", *next(iter(eval_batches(data, batch_size=12, workers=0)))


def test_predict_writes_the_ensembles_and_an_experts_probabilities(
    checkpoint, test_images, script_config, tmp_path, fabric
):
    folder, images, _ = test_images
    trained = load(str(checkpoint))
    with torch.no_grad():
        logits = trained.model(images)
    for which, z in (("null", ensemble(logits)), ("1", logits[1])):
        out = tmp_path / f"{which}.csv"
        args = [f"weights={checkpoint}", f"images={folder}", f"out={out}", "top=3", f"expert={which}", "batch_size=5"]
        predict.classify(script_config("predict", *args), fabric)
        rows = list(csv.DictReader(out.open()))
        assert list(rows[0]) == ["path", "label", "probability"] and len(rows) == 36
        top = z.softmax(-1).topk(3)
        assert [r["label"] for r in rows[::3]] == [trained.about["classes"][i] for i in top.indices[:, 0].tolist()]
        np.testing.assert_allclose([float(r["probability"]) for r in rows], top.values.flatten(), atol=5e-3)
        assert rows[0]["path"].endswith("00.png") and rows[35]["path"].endswith("11.png")


def test_predict_names_classes_and_refuses_bad_input(checkpoint, fabric, script_config, tmp_path):
    write_class_folders(tmp_path / "d", {"train": 4, "test": 1}, ("ant", "bee", "cat"))
    fit(short_config(*folder_arm(tmp_path / "d"), "train.epochs=2"), fabric, tmp_path / "run")
    out = tmp_path / "one.csv"
    weights = f"weights={tmp_path / 'run/last.ckpt'}"
    predict.classify(script_config("predict", weights, f"images={tmp_path / 'd/test/ant/0.png'}", f"out={out}"), fabric)
    (row,) = csv.DictReader(out.open())
    assert row["label"] in ("ant", "bee", "cat") and 1 / 3 <= float(row["probability"]) <= 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image in .*empty"):
        predict.classify(script_config("predict", weights, f"images={tmp_path / 'empty'}"), fabric)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        predict.classify(script_config("predict", weights, f"images={tmp_path / 'gone'}"), fabric)
    with pytest.raises(ValueError, match=r"top=4, allowed: 1\.\.3"):
        predict.classify(script_config("predict", weights, "images=x", "top=4"), fabric)
    with pytest.raises(ValueError, match="expert 2, allowed"):
        predict.classify(script_config("predict", weights, f"images={tmp_path / 'd'}", "expert=2"), fabric)
    (tmp_path / "d/test/ant/broken.png").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        predict.classify(script_config("predict", weights, f"images={tmp_path / 'd/test'}", f"out={out}"), fabric)
    assert len(list(csv.DictReader(out.open()))) == 3, "the other images are classified"


def test_a_drawn_zero_is_called_zero(checkpoint, script_config, tmp_path, fabric):
    """The classes of the embedded set are in an order drawn from the seed: their names must follow."""
    shown = all_digits()
    trained = load(checkpoint)
    (tmp_path / "in").mkdir()
    for i in range(60):
        grey = (shown.images[i, 0] * 255).round().to(torch.uint8).numpy()
        Image.fromarray(grey).save(tmp_path / f"in/{i:02d}_{int(shown.targets[i])}.png")
    out = tmp_path / "p.csv"
    predict.classify(
        script_config("predict", f"weights={checkpoint}", f"images={tmp_path / 'in'}", f"out={out}"), fabric
    )
    rows = list(csv.DictReader(out.open()))
    right = sum(r["path"].endswith(f"_{r['label']}.png") for r in rows)
    assert right > 40 and trained.about["classes"] != sorted(trained.about["classes"])
    assert data_of(trained, {}).classes == trained.about["classes"]


def test_predict_normalises_as_the_checkpoint_says(checkpoint, test_images, script_config, tmp_path, fabric):
    folder, images, _ = test_images
    state = runs.load_checkpoint(checkpoint)
    state["about"]["normalise"] = {"mean": [0.5], "std": [0.25]}
    torch.save(state, tmp_path / "other.ckpt")
    out = tmp_path / "p.csv"
    predict.classify(
        script_config("predict", f"weights={tmp_path / 'other.ckpt'}", f"images={folder}", f"out={out}"), fabric
    )
    with torch.no_grad():
        expected = ensemble(load(checkpoint).model((images - 0.5) / 0.25)).softmax(-1).amax(1)
    np.testing.assert_allclose([float(r["probability"]) for r in csv.DictReader(out.open())], expected, atol=5e-3)


# ------------------------------------------------------------------------------------------------------------- export
@pytest.mark.parametrize("expert", ["0", "ensemble"])
def test_exported_network_equals_torch_and_says_which_it_is(
    expert, checkpoint, test_images, script_config, tmp_path, capsys, fabric
):
    import onnxruntime

    out = tmp_path / "model.onnx"
    export.export(script_config("export", f"weights={checkpoint}", f"out={out}", f"expert={expert}"), fabric)
    said = capsys.readouterr().out
    assert f"{'expert 0' if expert == '0' else 'the ensemble of 2 experts'}. " in said
    assert read_about(out)["classes"] == load(checkpoint).about["classes"] and read_about(out)["size"] == 8
    assert "the ensemble costs K = 2 times one expert" in said
    _, images, _ = test_images
    with torch.no_grad():
        logits = load(str(checkpoint)).model(images)
    expected = logits[0] if expert == "0" else ensemble(logits)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
    assert [p.name for p in tmp_path.glob("*.onnx")] == ["model.onnx"]


def test_the_best_expert_is_chosen_on_the_validation_split(fabric, tmp_path):
    write_class_folders(tmp_path / "d", {"train": 4, "test": 1, "val": 4}, ("ant", "bee", "cat"))
    fit(short_config(*folder_arm(tmp_path / "d"), "train.epochs=2"), fabric, tmp_path / "run")
    trained = load(str(tmp_path / "run/last.ckpt"))
    x, y = next(iter(eval_batches(data_of(trained, {}).validation, batch_size=12, workers=0)))
    trained.model.heads[0].weight.data.zero_()
    trained.model.heads[0].bias.data = torch.tensor([0.0, -1.0, -1.0])  # expert 0 always says ant: 4 of 12
    with torch.no_grad():
        features = trained.model.features(x)[1].double()
    # Expert 1 becomes a ridge regression on its own features of the validation images.
    target = torch.nn.functional.one_hot(y, 3).double()
    ridge = torch.linalg.solve(features @ features.T + 1e-6 * torch.eye(12).double(), target).T @ features
    trained.model.heads[1].weight.data = ridge.float()
    trained.model.heads[1].bias.data.zero_()
    which, why = export.best_expert(trained, fabric, {})
    assert which == 1 and "the best on the validation split (33.33, " in why


def test_a_network_that_onnx_changes_is_refused(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = Experts("convnet", 5, experts=1, in_channels=1, width=2).single(0)
    with pytest.raises(ValueError, match="onnxruntime differs from torch by .*allowed: tolerance=0"):
        export_onnx(model, torch.zeros(1, 1, 8, 8), tmp_path / "m.onnx", about={}, tolerance=0.0)
    assert not list(tmp_path.iterdir())


def test_export_refuses_an_unknown_choice(checkpoint, script_config, fabric):
    with pytest.raises(ValueError, match=r"expert='worst', allowed: best, ensemble, 0\.\.1"):
        export.export(script_config("export", f"weights={checkpoint}", "expert=worst"), fabric)


# -------------------------------------------------------------------------------------------------------------- bench
def test_the_bench_measures_equal_things_and_its_rows_are_complete(tmp_path, monkeypatch, script_config):
    times = bench.criterion_times(4, 3)  # raises if the two losses differ
    assert times["ours"].low <= times["ours"].median <= times["ours"].high and times["loops"].rounds == 3
    measured = bench.deployment_times([2], 3, backbone="convnet")
    assert len(measured[2]) == 6
    monkeypatch.setattr(bench, "deployment_times", lambda batches, *_: dict.fromkeys(batches, measured[2]))
    out = tmp_path / "bench.json"
    rows = bench.bench(script_config("bench", f"out={out}", "batch_size=4", "rounds=3"))
    assert json.loads(out.read_text()) == rows and len(rows) == 7
    keys = {"name", "ours", "baseline", "ratio", "unit", "threads", "batch", "isa", "machine", "ours_quartiles"}
    assert all(keys <= set(row) and row["ratio"] == row["baseline"] / row["ours"] for row in rows)


def test_ensemble_module_is_the_mean_of_raw_logits():
    torch.manual_seed(0)
    experts = Experts("convnet", 5, experts=3, in_channels=1, width=2).eval()
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(Ensemble(experts)(x), experts(x).mean(0))
