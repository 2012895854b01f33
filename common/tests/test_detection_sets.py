"""One configuration, three sources of detection data, and the metrics of all of them."""

import pytest
import torch
from torch.utils.data import ConcatDataset

from common.data.detection import Scenes, TorchvisionDetection, detection_sets
from common.data.shapes import coco_to_voc, shape_scenes
from common.metrics.detection import detection_metrics


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """The same scenes as COCO and VOC folders."""
    root = tmp_path_factory.mktemp("scenes")
    for split, n in (("train", 6), ("val", 4)):
        shape_scenes(n, seed=n, sizes=(48, 64)).write_coco(root / "coco", split)
        coco_to_voc(root / "coco", root / "voc/VOC2007", split)
    return root


def perfect(dataset):
    found = {}
    for _, target in (dataset[i] for i in range(len(dataset))):
        keep = target["iscrowd"] == 0
        boxes, labels = torch.as_tensor(target["boxes"])[keep], target["labels"][keep]
        found[target["image_id"]] = {"boxes": boxes, "labels": labels, "scores": torch.ones(len(labels))}
    return found


@pytest.mark.parametrize("name", ["scenes", "coco", "voc"])
def test_ground_truth_fed_back_has_ap_one(name, layouts):
    options = {
        "scenes": {"train": 4, "test": 6},
        "coco": {"root": str(layouts / "coco"), "train": "train", "test": "val"},
        "voc": {
            "root": str(layouts / "voc"),
            "train": "train",
            "test": "val",
            "voc_train": ["VOC2007"],
            "classes": ["rectangle", "ellipse", "triangle"],
        },
    }[name]
    training, test = detection_sets(name=name, seed=0, **options)
    assert len(training) == (4 if name == "scenes" else 6) and len(test.classes) == 3
    metrics = detection_metrics(test, perfect(test))
    assert metrics["AP"] == pytest.approx(1.0) and metrics["map50"] == metrics["map50_11"] == pytest.approx(1.0)
    wrong = {k: {**v, "labels": (v["labels"] + 1) % 3} for k, v in perfect(test).items()}
    assert detection_metrics(test, wrong)["AP50"] < 0.5


def test_transform_flips_boxes_with_the_image_and_counts_classes_from_one():
    training, _ = detection_sets(name="scenes", seed=0, train=8, test=2, side=48)
    flips = set()
    for index in range(8):
        image, target = training[index]
        for seed in range(4):
            torch.manual_seed(seed)
            out, new = TorchvisionDetection(training)[index]
            flipped = not torch.equal(out, image.float() / 255)
            flips.add(flipped)
            boxes = torch.as_tensor(target["boxes"]).float()
            expected = (
                torch.stack([48 - boxes[:, 2], boxes[:, 1], 48 - boxes[:, 0], boxes[:, 3]], 1) if flipped else boxes
            )
            torch.testing.assert_close(new["boxes"], expected)
            assert torch.equal(new["labels"], target["labels"] + 1) and type(new["boxes"]) is torch.Tensor
    assert flips == {True, False}


def test_the_ground_truth_fed_back_has_ap_one_and_nothing_has_zero():
    _, held_out = detection_sets(name="scenes", seed=0, train=1, test=12)
    found = detection_metrics(held_out, perfect(held_out))
    assert found["AP"] == found["AP50"] == found["map50"] == pytest.approx(1)
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    found = detection_metrics(held_out, {i["id"]: none for i in held_out.infos})
    assert found["AP"] == found["map50"] == 0


def test_voc_folders_are_joined_and_difficult_objects_follow_the_policy(tmp_path):
    scenes = shape_scenes(5, seed=3, sizes=(48,), empty=0)
    scenes.coco["annotations"][0]["difficult"] = 1
    scenes.write_coco(tmp_path / "coco")
    for year in ("VOC2007", "VOC2012"):
        coco_to_voc(tmp_path / "coco", tmp_path / year)
    names = ["rectangle", "ellipse", "triangle"]
    training, held_out = detection_sets(
        name="voc", seed=0, root=str(tmp_path), train="train", test="train", classes=names
    )
    assert isinstance(training, ConcatDataset) and len(training) == 10 and len(held_out) == 5
    found = perfect(held_out)
    assert detection_metrics(held_out, found)["AP50"] == pytest.approx(1)
    image = scenes.coco["annotations"][0]["image_id"]
    flags = next(t for _, t in (held_out[i] for i in range(5)) if t["image_id"] == image)["difficult"]
    found[image] = {k: v[flags == 0] for k, v in found[image].items()}
    assert detection_metrics(held_out, found)["AP50"] == pytest.approx(1)
    assert detection_metrics(held_out, found, difficult="count")["AP50"] < 0.99


def test_crowd_regions_are_neither_missed_nor_found(tmp_path):
    scenes = shape_scenes(6, seed=2, sizes=(48,), empty=0)
    scenes.coco["annotations"][0]["iscrowd"] = 1
    scenes.write_coco(tmp_path, "val")
    _, held_out = detection_sets(name="coco", seed=0, root=str(tmp_path), train="val", test="val")
    found = detection_metrics(held_out, perfect(held_out))  # everything but the crowd region
    assert found["AP50"] == found["map50"] == pytest.approx(1)
    assert detection_metrics(held_out, perfect(held_out), difficult="count")["map50"] == pytest.approx(1)


def test_scenes_in_memory_equal_scenes_on_disk(layouts):
    memory = Scenes(shape_scenes(6, seed=6, sizes=(48, 64)))
    disk, _ = detection_sets(name="coco", seed=0, root=str(layouts / "coco"), train="train", test="val")
    for (image, target), (other, wanted) in zip(memory, disk, strict=True):
        assert torch.equal(image, other)
        assert all(torch.equal(torch.as_tensor(target[k]), torch.as_tensor(wanted[k])) for k in wanted)


def test_seeds_splits_and_labels_are_kept_apart():
    one, test = detection_sets(name="scenes", seed=1, train=2, test=2, side=48)
    two, _ = detection_sets(name="scenes", seed=2, train=2, test=2, side=48)
    assert len({bytes(d.image(0).numpy()) for d in (one, test, two)}) == 3
    with pytest.raises(ValueError, match="scenes has contiguous labels only"):
        detection_sets(name="scenes", seed=0, train=1, test=1, labels="ids")
