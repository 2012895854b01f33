import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import VOCDetection
from torchvision.transforms import v2

from common.data.detection import DetectionSet, coco_detection, collate, voc_detection
from common.data.shapes import SHAPES, coco_to_voc, shape_scenes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    scenes = shape_scenes(12, seed=3, empty=0.2)
    scenes.coco["annotations"][0]["iscrowd"] = 1
    scenes.write_coco(folder, "train")
    coco_to_voc(folder, folder / "VOC2007", "train")
    return folder


def test_coco_items(root):
    data = coco_detection(root, "train")
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    assert len(data) == 12 and data.classes == list(SHAPES) and data.category_ids == [1, 2, 3]
    for image, target in data:
        rows = [a for a in content["annotations"] if a["image_id"] == target["image_id"]]
        assert image.dtype == torch.uint8 and image.shape[-2:] == tuple(target["size"].tolist())
        expected = torch.tensor([a["bbox"] for a in rows]).reshape(-1, 4)
        assert torch.equal(target["boxes"][:, :2], expected[:, :2])
        assert torch.equal(target["boxes"][:, 2:], expected[:, :2] + expected[:, 2:])
        assert target["labels"].tolist() == [a["category_id"] for a in rows]
        assert target["area"].tolist() == [a["area"] for a in rows]
        assert target["iscrowd"].tolist() == [a["iscrowd"] for a in rows]
        assert target["boxes"].shape == (len(rows), 4) and target["labels"].dtype == torch.int64
    assert sum(int(t["iscrowd"].sum()) for _, t in data) == 1
    kept = coco_detection(root, "train", keep_crowd=False)
    assert sum(len(t["labels"]) for _, t in kept) == len(content["annotations"]) - 1


def test_voc_agrees_with_coco_in_boxes_and_flags(root):
    coco = coco_detection(root, "train", labels="contiguous")
    voc = voc_detection(root / "VOC2007", "train", classes=SHAPES)
    for (a_image, a), (b_image, b) in zip(coco, voc, strict=True):
        assert torch.equal(a["boxes"], b["boxes"]) and torch.equal(a["labels"], b["labels"])
        assert torch.equal(a["iscrowd"], b["difficult"]) and not b["iscrowd"].any()
        assert (a_image.int() - b_image.int()).abs().float().mean() < 8  # JPEG
    assert min(int(t["labels"].min()) for _, t in voc if len(t["labels"])) == 0


def test_voc_files_are_one_based_and_torchvision_reads_them(root, tmp_path):
    (tmp_path / "VOCdevkit").mkdir()
    (tmp_path / "VOCdevkit" / "VOC2007").symlink_to(root / "VOC2007")
    data = VOCDetection(str(tmp_path), year="2007", image_set="train")
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    first = content["annotations"][0]
    x, y, w, h = first["bbox"]
    _, xml = data[first["image_id"] - 1]
    found = xml["annotation"]["object"][0]
    assert {k: float(v) for k, v in found["bndbox"].items()} == {
        "xmin": x + 1,
        "ymin": y + 1,
        "xmax": x + w,
        "ymax": y + h,
    }
    assert found["difficult"] == "1"


def _coco(boxes, **image):
    return {
        "images": [{"id": 7, "file_name": "a.png", "width": 20, "height": 10} | image],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}],
        "annotations": [
            {"id": k, "image_id": 7, "category_id": 90, "bbox": b, "area": 4.0} for k, b in enumerate(boxes)
        ],
    }


def test_labels_clamping_and_gaps(tmp_path):
    from PIL import Image

    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    boxes = [[-2, -3, 6, 6], [15, 5, 50, 50], [4, 4, 0, 3], [30, 2, 5, 5]]
    data = DetectionSet(tmp_path, _coco(boxes))
    _, target = data[0]
    assert target["boxes"].tolist() == [[0, 0, 4, 3], [15, 5, 20, 10]]
    assert data.dropped == 2 and target["labels"].tolist() == [90, 90]
    compact = DetectionSet(tmp_path, _coco(boxes), labels="contiguous")
    assert compact[0][1]["labels"].tolist() == [1, 1]
    assert compact.category_ids[1] == 90 and compact.classes[1] == "toothbrush"
    with pytest.raises(ValueError, match="10x20"):
        DetectionSet(tmp_path, _coco([], width=10, height=20))[0]
        raise AssertionError  # pragma: no cover
    with pytest.raises(ValueError, match="'names'"):
        DetectionSet(tmp_path, _coco([]), labels="names")
    for bad in ([[1, 2, 3]], [[1, 2, 3, float("nan")]]):
        with pytest.raises(ValueError, match="four finite"):
            DetectionSet(tmp_path, _coco(bad))
    lost = _coco([[1, 1, 2, 2]])
    lost["annotations"][0]["category_id"] = 4
    with pytest.raises(ValueError, match="category 4"):
        DetectionSet(tmp_path, lost)


def test_transforms_move_boxes_and_collate_keeps_sizes(root):
    flip = v2.RandomHorizontalFlip(p=1.0)
    plain, flipped = coco_detection(root, "train"), coco_detection(root, "train", transform=flip)
    index = next(i for i, (_, t) in enumerate(plain) if len(t["labels"]))
    (image, a), (mirrored, b) = plain[index], flipped[index]
    width = image.shape[-1]
    assert torch.equal(mirrored, image.flip(-1))
    assert torch.equal(b["boxes"][:, 0], width - a["boxes"][:, 2])
    images, targets = next(iter(DataLoader(plain, batch_size=12, collate_fn=collate)))
    assert len(images) == len(targets) == 12 and len({i.shape for i in images}) > 1


def test_errors_say_where_and_what(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"instances_val\.json.*expected"):
        coco_detection(root, "val")
    with pytest.raises(FileNotFoundError, match=r"splits there: train.*JPEGImages"):
        voc_detection(root / "VOC2007", "test")
    with pytest.raises(ValueError, match=r"\.xml: unknown class"):
        voc_detection(root / "VOC2007", "train")
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "instances_a.json"
    file.write_text("{}")
    with pytest.raises(FileNotFoundError, match="no image folder"):
        coco_detection(tmp_path, "a")
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="not a COCO instances file"):
        coco_detection(tmp_path, "a")
    with pytest.raises(TypeError, match="labls"):
        coco_detection(root, "train", labls="ids")


def test_voc_drops_boxes_without_extent_and_names_broken_files(root, tmp_path):
    import shutil

    voc = shutil.copytree(root / "VOC2007", tmp_path / "voc")
    xml = sorted((voc / "Annotations").iterdir())[0]
    stem = xml.stem
    box = "<bndbox><xmin>5</xmin><ymin>4</ymin><xmax>{}</xmax><ymax>9</ymax></bndbox>"
    text = "<annotation><size><width>{w}</width><height>{h}</height></size>{o}</annotation>"
    info = coco_detection(root, "train").infos[0]
    both = "".join(f"<object><name>ellipse</name>{box.format(x)}</object>" for x in (5, 6))
    (voc / "ImageSets" / "Main" / "one.txt").write_text(f"{stem}\n")
    xml.write_text(text.format(w=info["width"], h=info["height"], o=both))
    data = voc_detection(voc, "one", classes=SHAPES)
    assert data.dropped == 1 and data[0][1]["boxes"].tolist() == [[4, 3, 6, 9]]
    assert data[0][1]["area"].tolist() == [12]
    xml.write_text("<annotation/>")
    assert tuple(voc_detection(voc, "one", classes=SHAPES)[0][1]["size"].tolist()) == (info["height"], info["width"])
    for broken in ("<annotation>", text.format(w=info["width"], h="nan", o=""), text.format(w=8, h=8, o="<object/>")):
        xml.write_text(broken)
        with pytest.raises(ValueError, match=f"cannot read.*{xml.name}"):
            voc_detection(voc, "one", classes=SHAPES)
    xml.unlink()
    with pytest.raises(FileNotFoundError, match=xml.name):
        voc_detection(voc, "one", classes=SHAPES)


def test_item_order_does_not_depend_on_the_file(tmp_path):
    coco = _coco([])
    coco["images"].insert(0, coco["images"][0] | {"id": 9})
    assert [i["id"] for i in DetectionSet(tmp_path, coco).infos] == [7, 9]
    assert np.all([i["id"] for i in coco["images"]] == [9, 7])
