"""A checkpoint in use: what it says, evaluate, predict, export, and that nothing of it needs the training data."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common import runs
from common.data.scenes import noisy_digits
from common.onnx_export import read_about
from common.quant.packed_conv import in_float_
from dcp_nas import data as data_module
from dcp_nas import train
from dcp_nas.bench import bench
from dcp_nas.checkpoint import load
from dcp_nas.data import build_data, build_test, inference_transform
from dcp_nas.deploy import pack_
from dcp_nas.evaluate import evaluate
from dcp_nas.export import export, pack
from dcp_nas.network import Network
from dcp_nas.operations import BinaryConv2d, Bits
from dcp_nas.predict import classify
from dcp_nas.search_space import GENOTYPES
from dcp_nas.tests.layouts import SHORT, composed, config, write_class_folders

CELLS = ["model.cells=2", "model.reductions=[1]"]  # one of each kind: exports take as long as a network has nodes


@pytest.fixture(scope="module")
def step2(fabric, tmp_path_factory):
    folder = tmp_path_factory.mktemp("step2")
    first = _strict(fabric, tmp_path_factory)
    options = [
        *CELLS,
        f"init.weights={first}",
        "train.epochs=1",
        "parity.official_m_grad=true",
        "stage.strict_1bit=true",
    ]
    train.fit(config("stage=step2", *options), fabric, folder)
    return folder / "last.ckpt"


def _strict(fabric, tmp_path_factory):
    folder = tmp_path_factory.mktemp("strict")
    train.fit(config("stage=step1", "stage.strict_1bit=true", "train.epochs=1", *CELLS), fabric, folder)
    return folder / "last.ckpt"


def test_reload_keeps_every_option_of_the_model(step2):
    network, settings, about = load(step2)
    ops = [m for m in network.modules() if type(m).__name__ == "MConv2d"]
    assert ops and all(m.act_bits == 1 and m.official_m_grad for m in ops) and settings["stage"]["strict_1bit"]
    assert about["seed"] == 0 and about["data"]["train"] == 96 and "root" not in about["data"]
    assert {"model", "optimizer", "epoch", "rows", "about", "config"} <= runs.load_checkpoint(step2).keys()


def test_evaluate_gives_the_metric_of_the_training_without_its_images(step2, fabric, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_module, "build_data", lambda **_: pytest.fail("it built the training set"))
    cfg = composed("evaluate", f"weights={step2}", "record=true", f"record_to={tmp_path}")
    found = evaluate(cfg, fabric)
    expected = json.loads((step2.parent / "result.json").read_text())["metrics"]
    assert found["top1"] == expected["top1"] and found["test_ce"] == pytest.approx(expected["test_ce"], rel=1e-6)
    record = json.loads(next(tmp_path.glob("*_digits.json")).read_text())
    assert record["value"] == found["top1"] and record["n"] == 1797 - 96 and record["counts"]["macs_w1a1"] > 0
    for overrides, error in (
        ([f"data.root={tmp_path}"], "digits is embedded"),
        (["claim=none"], "claim=none, allowed"),
    ):
        with pytest.raises(ValueError, match=error):
            evaluate(composed("evaluate", f"weights={step2}", *overrides), fabric)


def test_own_images_from_folder_to_names(fabric, tmp_path):
    root = write_class_folders(tmp_path / "data", ("aubergine", "zebra finch"))
    options = [o for o in SHORT if not o.startswith("data.")]
    options += [
        "data=folder",
        f"data.root={root}",
        "data.size=32",
        "data.workers=0",
        "model.stem=imagenet",
        "train.batch_size=4",
    ]
    train.fit(composed("config", *options, "genotype=random", "train.epochs=1"), fabric, tmp_path / "run")
    weights = tmp_path / "run/last.ckpt"
    (root / "train").rename(tmp_path / "gone")
    found = evaluate(composed("evaluate", f"weights={weights}"), fabric)
    assert found["top1"] == json.loads((tmp_path / "run/result.json").read_text())["metrics"]["top1"]
    moved = (root / "val").rename(root / "held out")
    evaluate(composed("evaluate", f"weights={weights}", f"data.root={root}", "data.val='held out'"), fabric)
    (root / "held out/extra").mkdir()
    Image.new("RGB", (8, 8)).save(root / "held out/extra/x.png")
    with pytest.raises(ValueError, match="knows 2 classes, the data 3: extra differ"):
        evaluate(composed("evaluate", f"weights={weights}", "data.val='held out'"), fabric)
    (moved / "aubergine/0.png").rename(moved / "aubergine/Größe 0.png")
    (moved / "zebra finch/._1.png").write_bytes(b"junk")
    out = classify(
        composed("predict", f"weights={weights}", f"images='{moved}'", f"out={tmp_path}/p.json", "top=2"), fabric
    )
    rows = json.loads(out.read_text())
    assert len(rows) == 2 * 5 and {r["label"] for r in rows} == {"aubergine", "zebra finch"}
    assert float(rows[0]["probability"]) + float(rows[1]["probability"]) == pytest.approx(1, abs=1e-5)


def test_predict_sees_a_digit_as_evaluation_does(step2, fabric, tmp_path):
    """The statistics of training, not those of the image, nor none."""
    about = load(step2).about
    clean, _ = noisy_digits(sigma=0.0, train=96, seed=0, standardise=False)
    training = build_data(name="digits", seed=0, train=96).tensors[0]
    noisy, _ = noisy_digits(sigma=0.25, train=96, seed=0, standardise=False)
    mean, std = (torch.tensor(about["normalise"][k]).view(1, 1, 1) for k in ("mean", "std"))
    torch.testing.assert_close((noisy.images - mean) / std, training, rtol=1e-5, atol=1e-6)
    pixels = (255 * clean.images[0, 0]).round().byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    look = {k: about[k] for k in ("size", "crop", "normalise", "channels")}
    seen = inference_transform(**look)(Image.open(tmp_path / "a.png"))
    torch.testing.assert_close(seen, (torch.from_numpy(pixels)[None].float() / 255 - mean) / std)
    out = classify(composed("predict", f"weights={step2}", f"images={tmp_path}/a.png", f"out={tmp_path}/p.csv"), fabric)
    with torch.no_grad():
        p = load(step2).model(seen[None]).softmax(1)[0]
    path, label, probability = out.read_text().splitlines()[1].split(",")
    assert label == about["classes"][int(p.argmax())] and float(probability) == pytest.approx(p.max().item(), abs=1e-5)


def test_predict_lists_a_broken_file_and_goes_on(step2, fabric, tmp_path, capsys):
    Image.new("L", (8, 8), 9).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "c.png")
    cfg = composed("predict", f"weights={step2}", f"images={tmp_path}", f"out={tmp_path}/p.csv")
    with pytest.raises(SystemExit):
        classify(cfg, fabric)
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 3 and "b.png" in capsys.readouterr().err
    for overrides, error in (
        (["top=11"], r"top=11, allowed: 1\.\.10"),
        ([f"out={tmp_path}/p.txt"], r"\.csv or \.json"),
    ):
        with pytest.raises(ValueError, match=error):
            classify(composed("predict", f"weights={step2}", f"images={tmp_path}/a.png", *overrides), fabric)


def _digit(folder):
    Image.new("L", (8, 8), 9).save(folder / "digit.png")
    return folder / "digit.png"


@pytest.mark.parametrize("weights", ["m", "beta"])
@pytest.mark.parametrize("strict", [False, True])
def test_a_network_on_bits_is_the_trained_one(weights, strict):
    """1,000 images: the same class, the logits to 1e-5 of the largest, and the bits of the float twin; as a backbone, too."""
    torch.manual_seed(0)
    bits = Bits(weights, "binary", strict_1bit=strict)
    network = Network(GENOTYPES["DCP_NAS_L"], num_classes=5, in_channels=1, channels=20, cells=3, bits=bits)
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, std=0.1)
            nn.init.uniform_(m.weight, -1, 1)
            nn.init.uniform_(m.running_var, 0.5, 2)
    network.eval()
    x = torch.randn(1000, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    packed = copy.deepcopy(network)
    where = pack_(packed)
    binary = {n: m for n, m in network.named_modules() if isinstance(m, BinaryConv2d)}
    assert where.keys() == binary.keys() and not [m for m in packed.modules() if isinstance(m, BinaryConv2d)]
    assert {n for n, how in where.items() if how == "bits"} == {
        n for n, m in binary.items() if m.act_bits == 1 and m.groups == 1
    }
    with torch.no_grad():
        expected, found = network(x), packed(x)
        torch.testing.assert_close(in_float_(copy.deepcopy(packed), exact=True)(x), found, rtol=0, atol=0)
        for ours, theirs in zip(packed.features(x[:2]), network.features(x[:2]), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    off = (found - expected).abs().amax(1) > 1e-5 * expected.abs().max()
    # a value within rounding of 0 may fall on either side of a sign
    assert off.float().mean() <= 5e-3
    assert torch.equal(found.argmax(1)[~off], expected.argmax(1)[~off])


def test_exported_and_packed_files_say_what_they_are_and_compute_the_same(step2, fabric, tmp_path):
    cfg = composed("export", f"weights={step2}", f"out={tmp_path}/m.onnx", f"packed={tmp_path}/m.packed.pt")
    found = export(cfg)
    assert found["onnx"] < 1e-4 and found["packed"] < 1e-4 and found["packed_bytes"] > 0
    assert read_about(tmp_path / "m.onnx") == load(step2).about == load(tmp_path / "m.packed.pt").about
    state = runs.load_checkpoint(tmp_path / "m.packed.pt")["model"]
    binary = {n for n, m in load(step2).model.named_modules() if type(m).__name__ == "MConv2d"}
    assert not any(k.endswith((".m", "body.2.weight", "body.6.weight")) for k in state)
    stored = {k.rpartition(".")[0] for k in state if k.endswith((".signs", ".words"))}
    assert len(stored) == len(binary) and any(k.endswith(".words") for k in state)
    out = classify(
        composed("predict", f"weights={tmp_path}/m.packed.pt", f"images={_digit(tmp_path)}", f"out={tmp_path}/p.csv"),
        fabric,
    )
    assert len(out.read_text().splitlines()) == 2
    a = evaluate(composed("evaluate", f"weights={tmp_path}/m.packed.pt"), fabric)
    whole = evaluate(composed("evaluate", f"weights={step2}"), fabric)
    assert a["test_ce"] == pytest.approx(whole["test_ce"], rel=1e-4)
    assert a["top1"] == json.loads((step2.parent / "result.json").read_text())["metrics"]["top1"]
    from_bits = (
        f"{tmp_path}/m.packed.pt",
        "null",
        r"onnxruntime differs from torch by \S+e-0[5-9]",
    )  # off by rounding alone
    for weights, packed, error in (from_bits, (step2, f"{tmp_path}/n.pt", "the packed network differs")):
        with pytest.raises(ValueError, match=error):
            export(
                composed(
                    "export", f"weights={weights}", f"out={tmp_path}/n.onnx", f"packed={packed}", "tolerance=1e-12"
                )
            )
    assert not list(tmp_path.glob("n.*")) and not list(tmp_path.glob(".*"))


def test_bench_takes_a_packed_file(step2, tmp_path):
    torch.save(pack(load(step2))[0], tmp_path / "m.packed.pt")
    options = ["batches=[2]", "threads=1", "rounds=3", "compiled=false", "search=false"]
    rows = bench(composed("bench", f"weights={tmp_path}/m.packed.pt", f"out={tmp_path}/bench.json", *options))
    network = next(r for r in rows if r["kind"] == "network")
    assert network["limit"] == network["baseline"] / network["rest"] and network["batch"] == 2
    assert {r["kind"] for r in rows} == {"bytes", "network", "layer"}


def test_checkpoints_of_other_tasks_are_refused_by_name(step1, tmp_path):
    content = runs.load_checkpoint(step1)
    content["about"]["task"] = "detection"
    torch.save(content, tmp_path / "d.ckpt")
    with pytest.raises(ValueError, match=r"is a checkpoint of detection, not of dcp_nas/train\.py"):
        load(tmp_path / "d.ckpt")
    with pytest.raises(ValueError, match="data.name='mnist', allowed"):
        build_test(name="mnist", seed=0)
