"""The detector: a step of training, what is binary and what is frozen."""

import json

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from common import runs
from common.data.batches import Plan, SeededBatches
from common.data.detection import Scenes, TorchvisionDetection
from common.data.shapes import shape_scenes
from rbonn.detect import fit, rate
from rbonn.detection import faster_rcnn, freeze_norms
from rbonn.layers import make_conv, make_sign
from rbonn.recurrent import RBConv2d
from rbonn.stages import load_backbone
from rbonn.tests.layouts import DETECTOR, composed, interrupted

BUILDERS = {"conv": make_conv(weights="bilinear", recurrent="drelu_fixed"), "sign": make_sign(activations="binary")}
TINY = {
    "backbone": {"layers": (1, 1, 1, 1), "widths": (8, 8, 8, 8), "stem": "imagenet"},
    "fpn_channels": 8,
    "head_width": 16,
    "min_size": 48,
    "max_size": 64,
}


def test_binary_neck_and_frozen_stages():
    model = faster_rcnn(num_classes=3, **BUILDERS, **TINY, frozen_stages=2)
    names = [n for n, m in model.named_modules() if isinstance(m, RBConv2d)]
    assert (
        sum("body" in n for n in names) == 4
        and sum("fpn" in n for n in names) == 4
        and sum("rpn" in n for n in names) == 1
    )
    body = model.backbone.body
    assert not any(p.requires_grad for n in ("conv1", "bn1", "layer1") for p in body[n].parameters())
    assert all(p.requires_grad for p in body["layer2"].parameters())
    model.train()
    freeze_norms(model)
    assert not body["layer1"][0].norm.training and body["layer2"][0].norm.training
    plain = faster_rcnn(num_classes=3, **BUILDERS, **TINY, binary_neck=False, frozen_stages=0)
    assert sum(isinstance(m, RBConv2d) for m in plain.modules()) == 4 and all(
        p.requires_grad for p in plain.parameters()
    )
    with pytest.raises(ValueError, match="frozen_stages=9"):
        faster_rcnn(num_classes=3, **BUILDERS, **TINY, frozen_stages=9)


def test_features_and_proposals_of_a_batch_are_those_of_single_images():
    torch.manual_seed(0)
    model = faster_rcnn(num_classes=3, **BUILDERS, **TINY).double().eval()  # a rounded sign would flip
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        both, single = model.backbone(images), model.backbone(images[1:])
        scores = [model.rpn.head(list(f.values()))[0] for f in (both, single)]
    assert [tuple(f.shape[-2:]) for f in both.values()] == [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]
    for a, b in zip(scores[0], scores[1], strict=True):
        torch.testing.assert_close(a[1:], b)


@pytest.fixture(scope="module")
def trained(fabric, tmp_path_factory):
    out = tmp_path_factory.mktemp("detector")
    fit(composed("detect", *DETECTOR), fabric, out)
    return out


def test_short_training_reports_and_resumes_bit_for_bit(fabric, trained, tmp_path):
    metrics = json.loads((trained / "result.json").read_text())["metrics"]
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= metrics["AP"] <= metrics["AP50"] <= 1 and len(rows) == 2 and rows[1]["active_share"] > 0
    assert metrics["active_share"] > 0 and rows[0]["loss"] == pytest.approx(
        sum(v for k, v in rows[0].items() if k.startswith("loss_")), rel=1e-5
    )
    cfg = composed("detect", *DETECTOR)
    interrupted(fit, cfg, fabric, tmp_path)
    fit(cfg, fabric, tmp_path)
    whole, parts = (runs.load_checkpoint(p / "last.ckpt") for p in (trained, tmp_path))
    torch.testing.assert_close(parts["model"], whole["model"], rtol=0, atol=0)
    assert json.loads((tmp_path / "result.json").read_text())["metrics"] == metrics


def test_gradients_are_clipped_and_rates_warm_up_and_fall(fabric, tmp_path):
    seen = []

    def before_step(optimizer, *_):
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        seen.append((torch.stack([g.norm() for g in grads]).norm().item(), [g["lr"] for g in optimizer.param_groups]))

    handle = register_optimizer_step_pre_hook(before_step)
    cfg = composed(
        "detect", *DETECTOR, "train.clip_norm=0.1", "schedule.warmup=4", "schedule.warmup_factor=0.2", "data.test=1"
    )
    fit(cfg, fabric, tmp_path)
    handle.remove()
    assert len(seen) == 6 and all(0.09 < norm < 0.1001 for norm, _ in seen)
    factors = [0.2, 0.4, 0.6, 0.08, 0.1, 0.1]  # warm-up to step 4, a tenth from the second epoch on
    for (_, rates), factor in zip(seen, factors, strict=True):
        assert rates == pytest.approx([0.02 * factor * m for m in (0.1, 1, 1)])
    assert rate(cfg, 1, 2) == pytest.approx(0.012)


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("train.clip_norm=-1", "clip_norm=-1, allowed: > 0"), ("train.epochs=0", "train.epochs=0"),
        ("data.root=/x", "data.root=/x: scenes are generated"), ("data.name=lvis", "data.name='lvis', allowed"),
        ("schedule.warmup_factor=2", "warmup_factor=2"), ("method.tau=3", "tau=3"), ("schedule.milestones=[5]", "milestones"),
        ("detector.frozen_stages=1", "freezes weights that nothing has trained"), ("init.weights=/none.ckpt", "no backbone at"),
        ("detector.frozen_stages=7", "frozen_stages=7"), ("schedule.kind=exp", "kind='exp'"),
    ],
)  # fmt: skip
def test_wrong_values_are_named_before_anything_is_drawn(override, error, fabric, tmp_path, monkeypatch):
    monkeypatch.setattr("rbonn.detect.detection_sets", None)  # calling it would be another error
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        fit(composed("detect", *DETECTOR, override), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_detector_is_evaluated_used_and_packed_from_its_checkpoint(fabric, trained, tmp_path):
    import csv

    from PIL import Image

    from common.quant.packed_conv import PackedConv2d
    from rbonn.binary_conv import binary_layers
    from rbonn.checkpoint import load
    from rbonn.evaluate import evaluate
    from rbonn.export import export
    from rbonn.predict import predict

    weights = f"weights={trained / 'last.ckpt'}"
    metrics = evaluate(composed("evaluate", weights, "batch_size=4"), fabric)
    recorded = json.loads((trained / "result.json").read_text())["metrics"]
    assert metrics["AP"] == recorded["AP"] and metrics["map50"] == recorded["map50"]
    Image.new("RGB", (60, 48), (200, 30, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (40, 48), (20, 30, 200)).save(tmp_path / "b.png")
    out = f"out={tmp_path / 'boxes.csv'}"
    predict(composed("predict", weights, f"images={tmp_path}", out, "score=0"), fabric)
    rows = list(csv.DictReader((tmp_path / "boxes.csv").open()))
    assert {r["label"] for r in rows} <= {"rectangle", "ellipse", "triangle"} and rows
    assert all(float(r["x1"]) <= (60 if r["path"].endswith("a.png") else 40) for r in rows)
    with pytest.raises(ValueError, match="a detector is exported packed only"):
        export(composed("export", weights), fabric)
    with pytest.raises(ValueError, match="differ from the network by more than tolerance=1e-12"):
        export(composed("export", weights, f"out={tmp_path / 'd.packed.pt'}", "tolerance=1e-12"), fabric)
    assert not list(tmp_path.glob("*.pt")) and not list(tmp_path.glob(".*"))
    found = export(composed("export", weights, f"out={tmp_path / 'd.packed.pt'}"), fabric)
    assert max(found["deployed"], found["packed"]) < 1e-4
    packed = load(tmp_path / "d.packed.pt")
    on_bits = [m for m in packed.model.modules() if isinstance(m, PackedConv2d)]
    assert len(on_bits) == len(binary_layers(load(trained / "last.ckpt").model)) == 9
    assert packed.about["classes"] == ["rectangle", "ellipse", "triangle"]
    again = evaluate(composed("evaluate", f"weights={tmp_path / 'd.packed.pt'}", "batch_size=4"), fabric)
    assert again["map50"] == pytest.approx(metrics["map50"], abs=1e-3)


def test_images_without_objects_and_of_different_size_make_a_batch():
    scenes = shape_scenes(4, seed=1, sizes=(48, 64), square=0.0, empty=1.0)
    from common.data.detection import collate

    batches = SeededBatches(
        TorchvisionDetection(Scenes(scenes)), Plan(4, 4, seed=0), device=torch.device("cpu"), collate=collate
    )
    images, targets = next(batches.epoch(1))
    assert all(t["boxes"].shape == (0, 4) for t in targets)
    torch.manual_seed(0)
    model = faster_rcnn(num_classes=3, conv=make_conv(weights="xnor"), sign=make_sign(activations="binary"), **TINY)
    losses = model.train()(images, targets)
    assert all(torch.isfinite(v) for v in losses.values())


@pytest.fixture
def classifier(tmp_path):
    """(a classifier with the backbone of TINY, its checkpoint)."""
    from rbonn.network import build_network

    shape = {"name": "react_resnet", **{k: list(v) if k != "stem" else v for k, v in TINY["backbone"].items()}}
    method = {"weights": "bilinear", "recurrent": "drelu_fixed", "activations": "binary"}
    network = build_network(model=shape, method=method, sign_zero=1, classes=4, channels=3)
    nn.init.normal_(network.bn1.running_mean)
    config = {"model": shape, "method": method, "parity": {"sign_zero": 1}}
    about = {"classes": list("abcd"), "channels": 3}
    torch.save({"model": network.state_dict(), "config": config, "about": about}, tmp_path / "a.ckpt")
    return network, tmp_path / "a.ckpt"


def test_frozen_stages_begin_with_the_classifier_and_stay(fabric, classifier, tmp_path):
    network, weights = classifier
    more = [f"init.weights={weights}", "detector.frozen_stages=2", "train.epochs=1", "schedule.milestones=[]"]
    fit(composed("detect", *DETECTOR, *more), fabric, tmp_path / "run")
    trained = runs.load_checkpoint(tmp_path / "run/last.ckpt")["model"]
    same = {k: torch.equal(v, trained[f"backbone.body.{k}"]) for k, v in network.state_dict().items() if k[:3] != "fc."}
    assert all(v for k, v in same.items() if k.startswith(("conv1.", "bn1.", "layer1."))), same
    assert not any(same[k] for k in ("layer2.0.norm.running_mean", "layer2.0.conv.weight"))


def test_backbone_loads_a_classifier_and_names_what_does_not_fit(classifier):
    network, weights = classifier
    model = faster_rcnn(num_classes=3, **BUILDERS, **TINY)
    load_backbone(model, weights)
    assert torch.equal(model.backbone.body["bn1"].running_mean, network.bn1.running_mean)
    wide = faster_rcnn(num_classes=3, **BUILDERS, **{**TINY, "backbone": {**TINY["backbone"], "widths": (8, 8, 8, 16)}})
    with pytest.raises(ValueError, match="does not fit the backbone"):
        load_backbone(wide, weights)


def test_preflight_needs_no_backbone_and_writes_nothing(fabric, tmp_path, capsys):
    cfg = composed("detect", *DETECTOR, "preflight=true", "init.weights=required", "detector.frozen_stages=1")
    fit(cfg, fabric, tmp_path / "run")
    assert "preflight: data found, 4 images" in capsys.readouterr().out and not (tmp_path / "run").exists()


class Oracle(nn.Module):
    """A detector that finds every object of a set, in the order in which it is asked: boxes, labels from 1."""

    def __init__(self, dataset):
        super().__init__()
        self.targets = iter([dataset.target(i) for i in range(len(dataset))])

    def forward(self, images):
        found = [next(self.targets) for _ in images]
        return [{"boxes": t["boxes"], "labels": t["labels"] + 1, "scores": torch.ones(len(t["labels"]))} for t in found]


def test_a_perfect_detector_is_perfect(fabric):
    from rbonn.detect import evaluate_detector

    scenes = Scenes(shape_scenes(5, seed=3, sizes=(48,)))
    metrics = evaluate_detector(fabric, Oracle(scenes).train(), scenes, batch_size=2)
    assert metrics["AP"] == metrics["map50"] == metrics["map50_11"] == 1.0


def test_boxes_carry_the_names_of_their_labels(fabric, tmp_path):
    from PIL import Image

    from common.data.files import ImageStream
    from rbonn.predict import boxes

    scenes = Scenes(shape_scenes(3, seed=3, sizes=(48,)))
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        Image.fromarray(scenes[i][0].permute(1, 2, 0).numpy()).save(path)
    stream = ImageStream(paths, lambda image: torch.zeros(3, 48, 48), batch_size=2)
    rows = list(boxes(Oracle(scenes), {"classes": scenes.classes}, stream, fabric, 0.5))
    expected = [(paths[i], scenes.classes[k]) for i in range(3) for k in scenes.target(i)["labels"].tolist()]
    assert [(r["path"], r["label"]) for r in rows] == expected and len({r["label"] for r in rows}) > 1
    assert float(rows[0]["x1"]) == pytest.approx(scenes.target(0)["boxes"][0, 2].item(), abs=0.05)
