"""evaluate, predict, export, bench and counts on checkpoints that say all that is needed."""

import csv
import json
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from common import runs
from common.onnx_export import read_about
from common.quant.packed_conv import PackedConv2d
from rbonn import bench, counts
from rbonn.checkpoint import imagenet_names, load
from rbonn.data import inference_transform
from rbonn.deploy import FORMAT, pack, pack_
from rbonn.evaluate import evaluate
from rbonn.export import export
from rbonn.metrics import classification_metrics
from rbonn.network import build_network
from rbonn.predict import predict
from rbonn.tests.layouts import composed
from rbonn.tests.test_model import published_name


def table(path):
    return list(csv.DictReader(path.open()))


def test_a_checkpoint_says_all_that_is_needed_and_rebuilds_its_network(checkpoint, folder_checkpoint):
    model, config, about = load(checkpoint)
    assert about["classes"] == [str(d) for d in range(10)] and about["channels"] == 1 and about["size"] == 8
    assert about["task"] == "classify" and not about["crop"] and len(about["normalise"]["mean"]) == 1
    assert config["method"]["recurrent"] == "drelu_fixed" and not model.training
    assert load(folder_checkpoint).about["classes"] == ["apple", "pear"]
    saved = runs.load_checkpoint(checkpoint)["model"]
    torch.testing.assert_close(model.state_dict(), saved, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("key", "value"), [("sign_zero", 0), ("tau", 0.2), ("const", 0.5), ("weights", "xnor"), ("activations", "real")]
)
def test_no_option_of_the_model_is_dropped_on_the_way_back(key, value, tmp_path):
    """sign_zero and the options of the layer are no weights: they come back from the configuration."""
    method = {"weights": "bilinear", "activations": "binary", "recurrent": "drelu_fixed"}
    build = {
        "model": {"name": "react_resnet", "layers": [1], "widths": [4], "stem": "small"},
        "sign_zero": 1,
        "classes": 2,
    }
    if key == "sign_zero":
        build[key] = value
    else:
        method |= {key: value} | ({"recurrent": "none"} if value == "xnor" else {})
    network = build_network(**build, method=method, channels=1).eval()
    config = {"model": build["model"], "method": method, "parity": {"sign_zero": build["sign_zero"]}}
    about = {"classes": ["a", "b"], "channels": 1, "size": 8, "crop": False, "normalise": {"mean": [0.0], "std": [1.0]}}
    torch.save({"model": network.state_dict(), "config": config, "about": about}, tmp_path / "a.ckpt")
    again = load(tmp_path / "a.ckpt").model
    x = torch.randn(4, 1, 8, 8)
    x[:2] = 0  # sign(0)
    assert torch.equal(network(x), again(x)) and str(network) == str(again)


# ------------------------------------------------------------------------------------------------------------ evaluate
def test_metrics_in_closed_form():
    logits = torch.zeros(4, 8)
    logits[torch.arange(4), torch.tensor([0, 1, 2, 3])] = 2.0
    logits[:, 4:] = torch.tensor([1.0, 0.9, 0.8, -1.0])
    logits[:, :4] += torch.tensor([0.1, 0.2, 0.3, 0.4])
    found = classification_metrics(logits, torch.tensor([0, 1, 4, 7]))  # two right, one among five, one last
    assert found["top1"] == 50 and found["top5"] == 75
    picked = logits.softmax(1)[torch.arange(4), torch.tensor([0, 1, 4, 7])]
    assert found["test_ce"] == pytest.approx(-picked.log().mean().item())


def test_evaluating_a_checkpoint_gives_the_metrics_of_its_run(checkpoint, folder_checkpoint, folders, fabric, capsys):
    for weights in (checkpoint, folder_checkpoint):
        recorded = json.loads((weights.parent / "result.json").read_text())["metrics"]
        found = evaluate(composed("evaluate", f"weights={weights}"), fabric)
        assert found == {k: pytest.approx(recorded[k]) for k in found} and set(found) == {"top1", "top5", "test_ce"}
    assert "4 images" in capsys.readouterr().out


def test_evaluation_needs_the_test_images_only_and_never_ignores_a_root(
    checkpoint, folder_checkpoint, folders, fabric, tmp_path
):
    shutil.copytree(folders / "val", tmp_path / "val")  # no train/
    assert evaluate(composed("evaluate", f"weights={folder_checkpoint}", f"data.root={tmp_path}"), fabric)
    with pytest.raises(ValueError, match="digits are embedded; name the set"):
        evaluate(composed("evaluate", f"weights={checkpoint}", f"data.root={folders}"), fabric)
    with pytest.raises(ValueError, match="has 10 classes, the data 2"):
        evaluate(composed("evaluate", f"weights={checkpoint}", f"data.root={folders}", "+data.name=folder"), fabric)
    (tmp_path / "val/pear").rename(tmp_path / "val/quince")
    with pytest.raises(ValueError, match="other classes than the data: 'pear' where the data have 'quince'"):
        evaluate(composed("evaluate", f"weights={folder_checkpoint}", f"data.root={tmp_path}"), fabric)


def test_records_name_a_known_claim(folder_checkpoint, fabric, tmp_path):
    weights = f"weights={folder_checkpoint}"
    with pytest.raises(ValueError, match="claim=best, allowed: released_rbonn_resnet18, released_reactnet_a"):
        evaluate(composed("evaluate", weights, "claim=best"), fabric)
    evaluate(composed("evaluate", weights, "record=true", f"record_to={tmp_path}"), fabric)
    record = json.loads(next(tmp_path.glob("*_folder.json")).read_text())
    assert record["n"] == 4 and record["claim"] is None and len(record["weights_sha256"]) == 64
    with pytest.raises(ValueError, match="sign_zero=1 is for published weights"):
        evaluate(composed("evaluate", weights, "sign_zero=1"), fabric)


# ------------------------------------------------------------------------------------------------------------- predict
def test_a_prediction_is_that_of_the_normalised_image_and_named(folder_checkpoint, folders, fabric, tmp_path):
    out = tmp_path / "p.csv"
    predict(
        composed("predict", f"weights={folder_checkpoint}", f"images={folders / 'val'}", f"out={out}", "top=2"), fabric
    )
    rows = table(out)
    assert len(rows) == 8 and {r["label"] for r in rows} == {"apple", "pear"}
    model, _, about = load(folder_checkpoint)
    look = {k: about[k] for k in ("size", "crop", "normalise", "channels")}
    image = Image.open(rows[0]["path"])
    p = model(inference_transform(**look)(image)[None]).softmax(-1)[0]
    assert float(rows[0]["probability"]) == pytest.approx(p.max().item(), abs=1e-5)
    assert rows[0]["label"] == about["classes"][p.argmax()]
    # and the transform is that of the test set, written down a second time
    small = image.convert("RGB").resize((37, 41), Image.Resampling.BILINEAR)  # shorter side 36 -> 37
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[:, 4:36, 2:34].float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(inference_transform(**look)(image), (pixels - mean) / std, atol=0.1, rtol=0)


def test_predictions_of_digits_use_the_statistics_of_the_training_set(checkpoint, fabric, tmp_path):
    from common.data.digits import split_total

    test = split_total(train=192)[1]
    for i in range(60):
        pixels = (test.images[i, 0].numpy() * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
    out = tmp_path / "p.json"
    predict(composed("predict", f"weights={checkpoint}", f"images={tmp_path}", f"out={out}"), fabric)
    model, _, about = load(checkpoint)
    mean, std = (about["normalise"][k][0] for k in ("mean", "std"))
    expected = model((test.images[:60] - mean) / std).softmax(-1)
    found = [float(r["probability"]) for r in json.loads(out.read_text())]
    assert found == pytest.approx(expected.amax(1).tolist(), abs=0.02)
    assert 0.2 < mean < 0.4 and 0.3 < std < 0.6


def test_broken_files_are_listed_and_the_others_predicted(folder_checkpoint, folders, fabric, tmp_path, capsys):
    shutil.copytree(folders / "val", tmp_path / "in")
    (tmp_path / "in/apple/broken.png").write_bytes(b"no image")
    (tmp_path / "in/notes.txt").write_text("no image either")
    (tmp_path / "in/.hidden.png").write_bytes(b"")
    out = tmp_path / "p.csv"
    with pytest.raises(SystemExit) as stopped:
        predict(composed("predict", f"weights={folder_checkpoint}", f"images={tmp_path / 'in'}", f"out={out}"), fabric)
    assert stopped.value.code == 1 and "broken.png" in capsys.readouterr().err and len(table(out)) == 4
    with pytest.raises(ValueError, match=r"top=3, allowed: 1\.\.2"):
        predict(composed("predict", f"weights={folder_checkpoint}", f"images={folders}", "top=3"), fabric)


# -------------------------------------------------------------------------------------------------------------- export
def test_exported_files_agree_and_say_what_they_need(checkpoint, fabric, tmp_path):
    out = tmp_path / "m.onnx"
    found = export(composed("export", f"weights={checkpoint}", f"out={out}"), fabric)
    assert max(found["onnx"], found["packed"], found["deployed"]) < 1e-4
    model, _, about = load(checkpoint)
    assert read_about(out)["classes"] == about["classes"] and read_about(out)["normalise"] == about["normalise"]
    x = torch.randn(3, 1, 8, 8)
    onnx = onnxruntime.InferenceSession(str(out)).run(None, {"images": x.numpy()})[0]
    np.testing.assert_allclose(onnx, model(x).detach().numpy(), atol=1e-4)
    packed = load(tmp_path / "m.packed.pt")
    torch.testing.assert_close(packed.model(x), model(x), atol=1e-4, rtol=1e-4)
    assert {k: packed.about[k] for k in ("classes", "size", "normalise")} == {
        k: about[k] for k in ("classes", "size", "normalise")
    }
    a, b = (evaluate(composed("evaluate", f"weights={w}"), fabric) for w in (checkpoint, tmp_path / "m.packed.pt"))
    assert a["test_ce"] == pytest.approx(b["test_ce"], rel=1e-4)
    content = runs.load_checkpoint(tmp_path / "m.packed.pt")
    assert content["format"] == FORMAT and content["model"]["layer1.0.conv.words"].shape == (1, 1, 9, 8)
    again = export(composed("export", f"weights={tmp_path / 'm.packed.pt'}", f"out={tmp_path / 'n.onnx'}"), fabric)
    assert again["packed"] == 0 and again["onnx"] < 1e-4
    assert abs(again["packed_bytes"] - found["packed_bytes"]) <= 128, "the container pads to 64 bytes"


def test_a_packed_file_of_an_older_kind_is_named(tmp_path):
    torch.save({"format": "rbonn-packed-2", "signs": {}, "about": {}, "config": {}}, tmp_path / "old.pt")
    with pytest.raises(ValueError, match=r"older kind \(rbonn-packed-2\): export the checkpoint again"):
        load(tmp_path / "old.pt")


def test_an_export_that_differs_leaves_no_file(checkpoint, fabric, tmp_path):
    with pytest.raises(ValueError, match="differ"):
        export(composed("export", f"weights={checkpoint}", f"out={tmp_path / 'm.onnx'}", "tolerance=1e-12"), fabric)
    assert not list(tmp_path.iterdir())


def test_published_weights_are_predicted_with_names_and_packed(fabric, tmp_path):
    torch.manual_seed(0)
    build = {
        "model": {"name": "react_resnet", "layers": [4, 4, 4, 4]},
        "method": {"weights": "xnor", "activations": "binary"},
    }
    model = build_network(**build, sign_zero=0, classes=1000, channels=3)
    state = {f"module.{published_name(k, False)}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "checkpoint.pth.tar")
    Image.new("RGB", (300, 260), (10, 200, 30)).save(tmp_path / "a.jpg")
    weights = f"weights={tmp_path / 'checkpoint.pth.tar'}"
    predict(composed("predict", weights, f"images={tmp_path / 'a.jpg'}", f"out={tmp_path / 'p.csv'}"), fabric)
    assert (
        table(tmp_path / "p.csv")[0]["label"] in imagenet_names(1000) and imagenet_names(1000)[0] == "n01440764 tench"
    )
    about = load(tmp_path / "checkpoint.pth.tar").about
    assert about["size"] == 224 and about["crop"] and about["normalise"]["mean"] == [0.485, 0.456, 0.406]
    assert about["build"]["sign_zero"] == 0
    with pytest.raises(ValueError, match="data.root is not set"):
        evaluate(composed("evaluate", weights), fabric)
    found = export(composed("export", weights, f"out={tmp_path / 'm.packed.pt'}", "size=32"), fabric)
    assert found["packed"] < 1e-4 and found["packed_bytes"] < found["checkpoint_bytes"] / 9
    packed = f"weights={tmp_path / 'm.packed.pt'}"
    predict(composed("predict", packed, f"images={tmp_path / 'a.jpg'}", f"out={tmp_path / 'q.csv'}"), fabric)
    assert table(tmp_path / "q.csv")[0]["label"] == table(tmp_path / "p.csv")[0]["label"]


# ------------------------------------------------------------------------------------------------------ bench and counts
def test_bench_takes_a_checkpoint_or_a_packed_file_and_fills_the_table(checkpoint, tmp_path, capsys):
    model, config, about = load(checkpoint)
    pack_(model)
    torch.save(pack(model, config, about), tmp_path / "m.packed.pt")
    for weights, batches in ((checkpoint, [1, 3]), (tmp_path / "m.packed.pt", [1])):
        options = [f"batches={batches}", "threads=1", "rounds=3", "compiled=false"]
        rows = bench.bench(composed("bench", f"weights={weights}", f"out={tmp_path / 'bench.json'}", *options))
        networks = [r for r in rows if r.get("kind") == "network"]
        assert [r["batch"] for r in networks] == batches and json.loads((tmp_path / "bench.json").read_text()) == rows
        for row in networks:
            floats = {"fp32 eager", "fp32 channels_last", "bf16 channels_last", "onnxruntime fp32"}
            assert set(row["forms"]) == floats | {"packed", "packed, rest bf16"} and row["baseline_is"] in floats
            assert row["ratio"] == row["baseline"] / row["ours"] and row["rest"] > 0 and row["baseline_quartiles"]
            assert row["baseline"] == min(row["forms"][k][0] for k in floats)
        assert {r["kind"] for r in rows} == {
            "bytes",
            "network",
            "layer",
        }  # no published counts for a network of one's own
    assert "real-valued rest" in capsys.readouterr().out


def test_a_capped_bench_compares_capped_forms_only(checkpoint, tmp_path, monkeypatch):
    """No variable caps onnxruntime: beside it, a kernel with AVX2 would be measured against AVX-512."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    options = ["batches=[1]", "threads=1", "rounds=3", "compiled=false"]
    rows = bench.bench(composed("bench", f"weights={checkpoint}", f"out={tmp_path / 'bench.json'}", *options))
    (network,) = (r for r in rows if r.get("kind") == "network")
    assert "onnxruntime fp32" not in network["forms"] and "AVX2" in network["skipped"]["onnxruntime fp32"]


def test_the_default_of_the_bench_is_the_published_network():
    name, network, image = bench.subject(None)
    assert name == "RBONN-18" and image.shape == (1, 3, 224, 224)
    layers = [m for m in network.modules() if isinstance(m, PackedConv2d)]
    assert len(layers) == 16 and sum(m.words.numel() * 64 for m in layers) == 10_985_472


def test_counts_are_named_by_network():
    with pytest.raises(ValueError, match="network 'resnet50', allowed"):
        counts.measure("resnet50")
    assert counts.measure("reactnet_a")["params"] == 29_343_592
