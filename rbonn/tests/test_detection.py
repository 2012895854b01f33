"""The detector: a step of training, what is binary and what is frozen."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from common import runs
from common.data.batches import Plan, SeededBatches
from common.data.detection import Scenes, TorchvisionDetection
from common.data.shapes import shape_scenes
from rbonn.detect import fit
from rbonn.detection import (
    faster_rcnn,
    freeze_norms,
    load_backbone,
)
from rbonn.layers import make_conv, make_sign
from rbonn.recurrent import RBConv2d
from rbonn.tests.test_train import CONFIGS

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


def test_short_training_resumes_and_reports(tmp_path):
    fabric = runs.launch({"accelerator": "cpu", "devices": 1})
    overrides = [
        "arm=test",
        "data.train=12",
        "data.test=4",
        "data.side=48",
        "train.epochs=2",
        "train.batch_size=4",
        "train.save_every=1",
        "schedule.milestones=[2]",
        "detector.backbone.layers=[1,1,1,1]",
        "detector.backbone.widths=[8,8,8,8]",
        "detector.fpn_channels=8",
        "detector.head_width=16",
        "detector.min_size=[48]",
        "detector.max_size=64",
        "detector.frozen_stages=1",
    ]
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        cfg = compose("detect", overrides=overrides)
    fit(cfg, fabric, tmp_path)
    metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= metrics["AP"] <= metrics["AP50"] <= 1 and len(rows) == 2 and rows[1]["active_share"] > 0
    state = runs.load_checkpoint(tmp_path / "last.ckpt")
    assert state["class_names"] == ["rectangle", "ellipse", "triangle"] and state["recurrence"]


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


def test_backbone_loads_a_classifier_and_names_what_does_not_fit(tmp_path):
    from rbonn.checkpoint import build_network

    shape = {"name": "react_resnet", **{k: list(v) if k != "stem" else v for k, v in TINY["backbone"].items()}}
    method = {"weights": "bilinear", "recurrent": "drelu_fixed", "activations": "binary"}
    network = build_network(model=shape, method=method, sign_zero=1, classes=4, channels=3)
    nn.init.normal_(network.bn1.running_mean)
    config = {"model": shape, "method": method, "parity": {"sign_zero": 1}}
    torch.save({"model": network.state_dict(), "config": config, "classes": 4, "channels": 3}, tmp_path / "a.ckpt")
    model = faster_rcnn(num_classes=3, **BUILDERS, **TINY)
    load_backbone(model, tmp_path / "a.ckpt")
    assert torch.equal(model.backbone.body["bn1"].running_mean, network.bn1.running_mean)
    wide = faster_rcnn(num_classes=3, **BUILDERS, **{**TINY, "backbone": {**TINY["backbone"], "widths": (8, 8, 8, 16)}})
    with pytest.raises(ValueError, match="does not fit the backbone"):
        load_backbone(wide, tmp_path / "a.ckpt")
