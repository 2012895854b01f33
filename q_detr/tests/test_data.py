"""Data and evaluation: COCO and VOC folders, augmentation, bad annotations."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch.testing import assert_close
from torchvision import tv_tensors
from torchvision.ops import box_convert

from common import runs
from common.data.detection import Scenes, detection_sets
from common.data.shapes import coco_to_voc, shape_scenes
from common.metrics.detection import detection_metrics
from q_detr.data import (
    Prepared,
    RandomSizeCrop,
    dropped_boxes,
    num_classes,
    resize_for_test,
    training_transform,
)
from q_detr.evaluate import annotations_as_detections
from q_detr.set_prediction import check_targets
from q_detr.train import fit

HERE = Path(__file__).parents[1]


@pytest.mark.parametrize(("labels", "classes"), [("ids", 91), ("contiguous", 3)])
def test_coco_with_gaps_crowds_and_unsorted_ids(folder, labels, classes):
    training, held_out = detection_sets(name="coco", seed=0, root=str(folder), train="train", test="val", labels=labels)
    assert num_classes(held_out) == classes
    assert dropped_boxes(training) == dropped_boxes(held_out) == 1
    assert detection_metrics(held_out, annotations_as_detections(held_out))["AP"] == pytest.approx(1)
    targets = [Prepared(training)[i][1] for i in range(len(training))]
    check_targets(targets, classes)
    assert sum(len(t["labels"]) for t in targets) == sum(
        a["iscrowd"] == 0 for a in training.coco["annotations"]
    ) - 1  # fmt: skip
    wrong = {
        i: {**p, "labels": p["labels"] * 0 + (50 if labels == "ids" else 3)}
        for i, p in annotations_as_detections(held_out).items()
    }
    assert detection_metrics(held_out, wrong)["AP"] == 0  # 50 is a gap: no detection, and no error
    if labels == "ids":
        with pytest.raises(ValueError, match="91 for COCO"):
            check_targets(targets, 80)


def test_a_missing_image_and_different_categories_are_named(folder):
    training, _ = detection_sets(name="coco", seed=0, root=str(folder), train="train", test="val")
    (folder / "train" / training.infos[2]["file_name"]).unlink()
    with pytest.raises(FileNotFoundError, match=training.infos[2]["file_name"]):
        training[2]
    path = folder / "annotations/instances_val.json"
    coco = json.loads(path.read_text())
    coco["categories"].append({"id": 91, "name": "other"})
    path.write_text(json.dumps(coco))
    with pytest.raises(ValueError, match="different categories"):
        detection_sets(name="coco", seed=0, root=str(folder), train="train", test="val")
    with pytest.raises(ValueError, match="data.name='lvis', allowed: scenes"):
        detection_sets(name="lvis", seed=0, train=1, test=1)


def test_prepared_targets_are_normalised_centres_that_the_flip_moves():
    scenes = Scenes(shape_scenes(4, seed=0, sizes=(48, 96), square=0.0, empty=0.0))
    for i in range(4):
        image, raw = scenes[i]
        prepared, target = Prepared(scenes)[i]
        h, w = image.shape[-2:]
        back = box_convert(target["boxes"] * torch.tensor([w, h, w, h]), "cxcywh", "xyxy")
        assert_close(back, raw["boxes"].as_subclass(torch.Tensor))
        assert_close(prepared[0, 3, 5], (image.as_subclass(torch.Tensor)[0, 3, 5] / 255 - 0.485) / 0.229)
        flip = training_transform("plain")
        flip.steps.transforms[0].p = 1.0
        flipped, mirrored = Prepared(scenes, flip)[i]
        assert torch.equal(flipped, prepared.flip(-1))
        assert_close(mirrored["boxes"][:, 0], 1 - target["boxes"][:, 0])


def test_a_crop_clips_boxes_and_drops_those_outside():
    boxes = torch.tensor([[0.0, 0, 35, 35], [45, 45, 55, 55], [96, 96, 100, 100]])
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(100, 100)),
        "labels": torch.tensor([0, 1, 2]), "iscrowd": torch.zeros(3, dtype=torch.int64),
    }  # fmt: skip
    source = [(tv_tensors.Image(torch.zeros(3, 100, 100, dtype=torch.uint8)), target)]
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        image, found = Prepared(source, RandomSizeCrop(40, 60))[0]
        assert 40 <= image.shape[-1] <= 60 and 40 <= image.shape[-2] <= 60
        check_targets([found], 3)
        seen.add(len(found["labels"]))
    assert max(seen) == 2 and len(seen) > 1  # the first and the last box never fit together


def test_the_paper_augmentation_and_the_test_size():
    torch.manual_seed(0)
    image = tv_tensors.Image(torch.zeros(3, 300, 500, dtype=torch.uint8))
    boxes = tv_tensors.BoundingBoxes(torch.tensor([[10.0, 10, 490, 290]]), format="XYXY", canvas_size=(300, 500))
    target = {"boxes": boxes, "labels": torch.zeros(1, dtype=torch.int64), "iscrowd": torch.zeros(1, dtype=torch.int64)}
    sides = set()
    for _ in range(6):
        out, found = Prepared([(image, target)], training_transform("detr"))[0]
        sides.add(min(out.shape[-2:]))
        assert max(out.shape[-2:]) <= 1333
        check_targets([found], 1)
    assert sides <= set(range(480, 801, 32)) and len(sides) > 1
    assert resize_for_test(torch.zeros(3, 300, 900), 800).shape == (3, 444, 1333)
    assert resize_for_test(torch.zeros(3, 300, 400), 600).shape == (3, 600, 800)
    with pytest.raises(ValueError, match="augment='mosaic'"):
        training_transform("mosaic")


def test_the_small_scale_multiplies_every_size_and_decodes_once():
    torch.manual_seed(0)
    reads = []

    class Source(list):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    image = tv_tensors.Image(torch.randint(256, (3, 480, 960), dtype=torch.uint8))
    boxes = tv_tensors.BoundingBoxes(torch.tensor([[60.0, 45, 900, 435]]), format="XYXY", canvas_size=(480, 960))
    target = {"boxes": boxes, "labels": torch.zeros(1, dtype=torch.int64), "iscrowd": torch.zeros(1, dtype=torch.int64)}
    prepared = Prepared(
        Source([(image, target)]), training_transform({"name": "detr", "scale": 0.16, "vertical": True})
    )
    sides = set()
    for _ in range(30):
        out, found = prepared[0]
        sides.add(min(out.shape[-2:]))
        assert max(out.shape[-2:]) <= 213
        check_targets([found], 1)
    assert reads == [0] and min(sides) == 77 and max(sides) <= 128
    kept, moved = prepared.dataset[0]
    assert kept.shape == (3, 128, 256) and kept.dtype == torch.uint8
    assert_close(moved["boxes"].as_subclass(torch.Tensor), torch.tensor([[16.0, 12, 240, 116]]))
    for wrong, error in (({"name": "detr", "scales": 2}, TypeError), ({"scale": 0.1}, TypeError)):
        with pytest.raises(error, match="scales|name"):
            training_transform(wrong)
    assert Prepared(Source([(image, target)]), training_transform("detr")).dataset[0][0].shape == image.shape


def test_the_vertical_flip_mirrors_image_and_boxes():
    scenes = Scenes(shape_scenes(1, seed=0, sizes=(48,), empty=0.0))
    plain, target = Prepared(scenes)[0]
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        image, found = Prepared(scenes, training_transform({"name": "plain", "vertical": True}))[0]
        (how,) = [d for d in ((), (-1,), (-2,), (-1, -2)) if torch.equal(image, plain.flip(d) if d else plain)]
        moved = target["boxes"].clone()
        for d in how:
            moved[:, -1 - d] = 1 - moved[:, -1 - d]
        assert_close(found["boxes"], moved)
        seen.add(how)
    assert len(seen) == 4


def test_images_with_crowds_alone_train_as_empty_ones_and_nan_boxes_are_named(folder):
    path = folder / "annotations/instances_train.json"
    coco = json.loads(path.read_text())
    for a in coco["annotations"]:
        a["iscrowd"] = 1
    path.write_text(json.dumps(coco))
    training, held_out = detection_sets(
        name="coco", seed=0, root=str(folder), train="train", test="train", labels="ids"
    )
    assert all(len(Prepared(d)[i][1]["labels"]) == 0 for d in (training, held_out) for i in range(len(training)))
    assert detection_metrics(held_out, annotations_as_detections(held_out)) == {}  # no object, no figure
    coco["annotations"][1]["bbox"][2] = float("nan")
    path.write_text(json.dumps(coco))
    with pytest.raises(
        ValueError, match=f"annotation {coco['annotations'][1]['id']}: bbox must be four finite numbers"
    ):
        detection_sets(name="coco", seed=0, root=str(folder), train="train", test="train")


def test_a_voc_folder_with_broken_boxes_trains_by_config_alone(folder, tmp_path, capsys):
    for split in ("train", "val"):
        path = folder / f"annotations/instances_{split}.json"
        coco = json.loads(path.read_text())
        for c, name in zip(coco["categories"], ("RBC", "WBC", "Platelets"), strict=True):
            c["name"] = name
        path.write_text(json.dumps(coco))
        coco_to_voc(folder, tmp_path / "cells", split)
    options = [
        "method=teacher",
        "data=bccd",
        f"data.root={tmp_path / 'cells'}",
        "data.test=val",
        "model=small",
        "train.batch_size=2",
    ]
    with initialize_config_dir(str(HERE / "configs"), version_base="1.3"):
        cfg = compose(
            "config", [*options, "train.epochs=1", "fabric.accelerator=cpu", f"run_root={tmp_path}", "arm=teacher"]
        )
    cfg.data.augment.scale = 0.08
    fit(cfg, runs.launch(cfg.fabric), tmp_path / "run")
    assert "6 images (1 boxes without extent dropped), 3 classes" in capsys.readouterr().out
    state = runs.load_checkpoint(tmp_path / "run/last.ckpt")
    assert state["about"]["classes"] == ["RBC", "WBC", "Platelets"] and state["config"]["model"]["kind"] == "smca"
