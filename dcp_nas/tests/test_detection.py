"""The detector: the maps it takes, a step of training."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir

from common import runs
from dcp_nas.checkpoint import load_backbone
from dcp_nas.detect import fit, step_lr
from dcp_nas.genotypes import PAPER
from dcp_nas.network import Network
from dcp_nas.operations import BinaryConv2d, Bits
from dcp_nas.search_space import GENOTYPES
from dcp_nas.transfer.detection import faster_rcnn

TINY = {"fpn_channels": 8, "head_width": 16, "min_size": 64, "max_size": 64}


def backbone(stem="imagenet", genotype="CHL_I6", channels=4):
    bits = Bits("beta", "binary")
    return Network(GENOTYPES[genotype], num_classes=1, channels=channels, cells=3, stem=stem, bits=bits)


def test_the_detector_takes_maps_of_stride_4_to_32_and_a_1_bit_backbone():
    torch.manual_seed(0)
    model = faster_rcnn(backbone(), num_classes=3, **TINY).eval()
    maps = model.backbone(torch.rand(1, 3, 64, 96))
    assert [tuple(m.shape[-2:]) for m in maps.values()] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    assert len(model.rpn.anchor_generator.sizes) == 5 and model.roi_heads.box_roi_pool.featmap_names == [
        "0",
        "1",
        "2",
        "3",
    ]
    assert any(isinstance(m, BinaryConv2d) for m in model.backbone.body.modules())
    assert not any(isinstance(m, BinaryConv2d) for m in model.backbone.fpn.modules())
    with pytest.raises(ValueError, match="stem='small'"):
        faster_rcnn(backbone("small"), num_classes=3, **TINY)
    losses = model.train()(
        [torch.rand(3, 50, 70)], [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]
    )
    assert all(torch.isfinite(v) for v in losses.values())  # no object, any size


def test_learning_rate_steps():
    options = {"lr": 1.0, "milestones": [3, 5], "warmup_share": 1.0}
    assert [round(step_lr(e, **options), 6) for e in (1, 2, 3, 4, 5)] == [1.0, 1.0, 0.1, 0.1, 0.01]
    assert step_lr(1, lr=1.0, milestones=[], warmup_share=0.25) == 0.25


def test_short_training_reports_and_its_classifier_loads_as_a_backbone(tmp_path):
    fabric = runs.launch({"accelerator": "cpu", "devices": 1})
    overrides = ["arm=test", "data.train=8", "data.test=4", "data.side=64", "train.epochs=1", "train.batch_size=4",
                 "model.channels=4", "detector.fpn_channels=8", "detector.head_width=16", "detector.min_size=[64]"]  # fmt: skip
    with initialize_config_dir(config_dir=str(PAPER / "configs"), version_base="1.3"):
        cfg = compose("detect", overrides=overrides)
    fit(cfg, fabric, tmp_path)
    metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
    state = runs.load_checkpoint(tmp_path / "last.ckpt")
    assert 0 <= metrics["AP"] <= metrics["AP50"] <= 1 and state["about"]["classes"] == [
        "rectangle",
        "ellipse",
        "triangle",
    ]
    network = backbone()
    config = {"model": {"channels": 4, "cells": 3, "stem": "imagenet"}, "stage": {"weights": "beta", "activations": "binary"},
              "parity": {"official_m_grad": False}}  # fmt: skip
    about = {"task": "classification", "classes": ["a"], "channels": 3, "genotype": GENOTYPES["CHL_I6"].plain()}
    torch.save({"model": network.state_dict(), "config": config, "about": about}, tmp_path / "c.ckpt")
    other = backbone()
    load_backbone(other, tmp_path / "c.ckpt")
    assert torch.equal(other.stem0[0].weight, network.stem0[0].weight)
    with pytest.raises(ValueError, match="does not fit the backbone"):
        load_backbone(backbone(genotype="TANGENT_1"), tmp_path / "c.ckpt")
