"""Files as people have them, through training, evaluation and prediction of this folder."""

import csv
import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import check
from rbonn.checkpoint import load
from rbonn.data import build_data
from rbonn.detect import fit as fit_detector
from rbonn.detect import test_scenes
from rbonn.evaluate import evaluate
from rbonn.predict import predict
from rbonn.tests.layouts import DETECTOR, composed, config, folder_config, write_class_folders
from rbonn.train import fit

RAMP = np.add.outer(np.arange(40), np.arange(36)).astype(np.uint8) * 3


def rows(fabric, weights, images, tmp_path, **more):
    out = tmp_path / "rows.csv"
    options = [f"{k}={v}" for k, v in more.items()]
    cfg = composed("predict", f"weights={weights}", "images=x", f"out={out}", *options)
    cfg.images = images if isinstance(images, list) else str(images)
    predict(cfg, fabric)
    return list(csv.DictReader(out.open(encoding="utf-8")))


def probability(fabric, weights, path, tmp_path):
    return float(rows(fabric, weights, path, tmp_path)[0]["probability"])


# -------------------------------------------------------------------------------------------------------------- pixels
def test_sixteen_bits_are_scaled_and_not_cut_off(folder_checkpoint, fabric, tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "8.png")
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "16.png")
    a, b = (probability(fabric, folder_checkpoint, tmp_path / f"{n}.png", tmp_path) for n in (8, 16))
    assert a == pytest.approx(b, abs=1e-5)


def test_a_turned_photo_is_seen_upright(folder_checkpoint, fabric, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (60, 40, 3), dtype=np.uint8)
    upright = Image.fromarray(pixels)
    upright.save(tmp_path / "a.png")
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "b.png", exif=exif)
    a, b = (probability(fabric, folder_checkpoint, tmp_path / f"{n}.png", tmp_path) for n in "ab")
    assert a == b


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_mode_of_pillow_is_predicted(mode, folder_checkpoint, fabric, tmp_path):
    path = tmp_path / f"a.{'tif' if mode == 'CMYK' else 'png'}"
    Image.fromarray(RAMP).convert("RGB").convert(mode if mode != "LA" else "L").convert(mode).save(path)
    assert len(rows(fabric, folder_checkpoint, path, tmp_path)) == 1


def test_an_image_of_one_pixel_and_a_long_strip(folder_checkpoint, fabric, tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (900, 3)).save(tmp_path / "strip.png")
    assert len(rows(fabric, folder_checkpoint, tmp_path, tmp_path)) == 2


# --------------------------------------------------------------------------------------------------------------- names
def test_equal_names_in_two_folders_keep_their_rows(folder_checkpoint, folders, fabric, tmp_path):
    found = rows(fabric, folder_checkpoint, folders / "val", tmp_path)
    assert len({r["path"] for r in found}) == len(found) == 4
    assert len({r["path"].rsplit("/", 1)[1] for r in found}) == 2


@pytest.mark.parametrize(
    "name", ["a b.png", "a[1].png", "a,b=c.png", "größe ü.PNG", "it's.JPEG", "%20.webp", "-dash.jpg"]
)
def test_names_of_any_kind(name, folder_checkpoint, fabric, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "in" / name)
    for images in (tmp_path / "in", tmp_path / "in" / name, [str(tmp_path / "in" / name)]):
        assert rows(fabric, folder_checkpoint, images, tmp_path)[0]["path"].endswith(name)


def test_what_is_hidden_is_no_class_and_no_image_and_the_checker_agrees(fabric, tmp_path, capsys):
    write_class_folders(tmp_path)
    for split in ("train", "val"):
        for folder in (".ipynb_checkpoints", "__MACOSX"):
            (tmp_path / split / folder).mkdir()
            Image.new("RGB", (9, 9)).save(tmp_path / split / folder / "x.png")
        for name in ("._0.png", ".DS_Store", "Thumbs.db"):
            (tmp_path / split / "apple" / name).write_bytes(b"\0")
    data = build_data(name="folder", seed=0, root=str(tmp_path), size=32)
    assert data.names == ("apple", "pear") and len(data) == 8 and len(data.test) == 4
    assert check.main(["imagefolder", str(tmp_path)]) == 0
    assert "8 images, 2 classes" in capsys.readouterr().out


def test_class_names_of_any_script_come_back_in_the_table(fabric, tmp_path):
    write_class_folders(tmp_path / "data", classes=("яблоко", "груша, зелёная"))
    fit(folder_config(tmp_path / "data", "method=xnor", "train.epochs=1"), fabric, tmp_path / "run")
    found = rows(fabric, tmp_path / "run/last.ckpt", tmp_path / "data/val", tmp_path, top=2)
    assert {r["label"] for r in found} == {"яблоко", "груша, зелёная"}


def test_links_and_endings_in_capitals(tmp_path):
    write_class_folders(tmp_path / "real")
    for file in (tmp_path / "real/train/apple").iterdir():
        file.rename(file.with_suffix(".PNG"))
    (tmp_path / "linked").symlink_to(tmp_path / "real", target_is_directory=True)
    assert len(build_data(name="folder", seed=0, root=str(tmp_path / "linked"), size=32)) == 8


# -------------------------------------------------------------------------------------------------- what does not work
def test_a_broken_training_image_is_named(fabric, tmp_path):
    write_class_folders(tmp_path / "data")
    (tmp_path / "data/train/pear/2.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"cannot decode image .*train/pear/2.png"):
        fit(folder_config(tmp_path / "data"), fabric, tmp_path / "run")


def test_folders_with_other_classes_or_an_empty_one_are_named(tmp_path):
    write_class_folders(tmp_path)
    (tmp_path / "val/pear").rename(tmp_path / "val/Pear")
    with pytest.raises(ValueError, match="different classes: Pear, pear"):
        build_data(name="folder", seed=0, root=str(tmp_path), size=32)
    (tmp_path / "val/Pear").rename(tmp_path / "val/pear")
    (tmp_path / "train/quince").mkdir()
    with pytest.raises(FileNotFoundError, match="quince"):
        build_data(name="folder", seed=0, root=str(tmp_path), size=32)


def test_other_images_in_the_same_place_are_another_run(fabric, tmp_path):
    from common import runs

    write_class_folders(tmp_path / "a")
    write_class_folders(tmp_path / "b", train=5)
    fit(folder_config(tmp_path / "a", "train.epochs=1"), fabric, tmp_path / "run")
    (tmp_path / "a").rename(tmp_path / "elsewhere")  # the same images
    fit(folder_config(tmp_path / "elsewhere", "train.epochs=1"), fabric, tmp_path / "run")
    with pytest.raises(runs.RunError, match="on other data"):
        fit(folder_config(tmp_path / "b", "train.epochs=1"), fabric, tmp_path / "run")


@pytest.mark.parametrize("content", [b"PK\x03\x04 cut", b"{}", b"\x80\x04}."])
def test_files_that_are_no_checkpoint_are_named(content, tmp_path):
    from common.runs import RunError

    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises((RunError, ValueError), match="weights.pt"):
        load(tmp_path / "weights.pt")


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": 3}, {"model": {}}, {"epoch": 1}])
def test_checkpoints_of_others_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="weights.pt"):
        load(tmp_path / "weights.pt")


# ---------------------------------------------------------------------------------------------------- sets of torchvision
def test_fashion_mnist_trains_evaluates_and_predicts_by_name(fabric, tmp_path):
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 96), ("t10k", 30)):
        images = np.random.default_rng(0).integers(0, 255, (n, 28, 28), dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + images.tobytes())
        labels = (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels.tobytes())
    short = ["data=fashion_mnist", f"data.root={tmp_path}", "train.epochs=1", "train.batch_size=32"]
    cfg = composed("config", *short, "arm=test", "model.layers=[1,1]", "method=drelu_fixed")
    fit(cfg, fabric, tmp_path / "run")
    recorded = json.loads((tmp_path / "run/result.json").read_text())
    assert recorded["data"]["images"] == 96 and "train_ce" in recorded["metrics"]
    found = evaluate(composed("evaluate", f"weights={tmp_path / 'run/last.ckpt'}"), fabric)
    assert found["top1"] == pytest.approx(recorded["metrics"]["top1"])
    drawn = [build_data(seed=s, **{**cfg.data, "train": 20}).tensors for s in (0, 0, 1)]
    (some, named), again, others = (d for d in drawn if d)
    assert len(some) == 20 and torch.equal(some, again[0]) and not torch.equal(some, others[0])
    everything, names = build_data(seed=0, **cfg.data).tensors or ()
    where = [int((everything == image).flatten(1).all(1).nonzero()) for image in some]
    assert torch.equal(names[where], named), "an image keeps its label"
    with pytest.raises(ValueError, match="data.train=97"):
        build_data(seed=0, **{**cfg.data, "train": 97})
    seen, _ = build_data(seed=0, **cfg.data).test[0]
    torch.testing.assert_close(seen[0], (torch.from_numpy(images[0]) / 255 - 0.2860) / 0.3530)
    image = Image.fromarray(images[0])
    image.save(tmp_path / "a.png")
    table = rows(fabric, tmp_path / "run/last.ckpt", tmp_path / "a.png", tmp_path)
    model, _, about = load(tmp_path / "run/last.ckpt")
    expected = model((torch.from_numpy(images[:1]).float()[None] / 255 - 0.2860) / 0.3530).softmax(-1)
    assert table[0]["label"] == about["classes"][expected.argmax()] and "Sandal" in about["classes"]
    assert float(table[0]["probability"]) == pytest.approx(expected.max().item(), abs=1e-4)


# ---------------------------------------------------------------------------------------------------------- annotations
def test_voc_lists_of_any_editor_and_names_with_blanks(tmp_path):
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    xml = (
        "<annotation><size><width>40</width><height>30</height></size><object><name>dog</name><bndbox>"
        "<xmin>2</xmin><ymin>3</ymin><xmax>20</xmax><ymax>25</ymax></bndbox></object></annotation>"
    )
    for stem in ("000001", "000002"):
        (tmp_path / f"Annotations/{stem}.xml").write_text(xml)
        Image.new("RGB", (40, 30)).save(tmp_path / f"JPEGImages/{stem}.jpg")
    (tmp_path / "ImageSets/Main/test.txt").write_bytes(b"\xef\xbb\xbf000001\r\n\r\n000002\r\n")
    data = {"name": "voc", "root": str(tmp_path), "voc_test": ".", "test": "test", "classes": None}
    found = test_scenes(data, seed=0)
    assert len(found) == 2 and found[0][1]["labels"].tolist() == [11]
    with pytest.raises(ValueError, match="generated; name the set"):
        test_scenes({"name": "scenes", "root": "/x"}, seed=0)


def write_coco(root, split, *, objects):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir()
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 60, "height": 48} for i in range(1, 5)]
    for image in images:
        Image.new("RGB", (60, 48), (50 * image["id"], 90, 0)).save(root / split / image["file_name"])
    boxes = [
        {"id": i, "image_id": i, "category_id": 7, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}
        for i in range(1, 5)
    ]
    content = {"images": images, "annotations": boxes if objects else [], "categories": [{"id": 7, "name": "cup"}]}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def test_a_coco_folder_trains_and_a_split_without_objects_is_named_before(fabric, tmp_path):
    write_coco(tmp_path, "train", objects=True)
    write_coco(tmp_path, "val", objects=True)
    write_coco(tmp_path, "bare", objects=False)
    short = [o for o in DETECTOR if not o.startswith("data.")]
    data = ["data.name=coco", f"data.root={tmp_path}", "data.train=train", "train.epochs=1", "schedule.milestones=[]"]
    with pytest.raises(ValueError, match="the split bare of coco under data.root=.* names no object"):
        fit_detector(composed("detect", *short, *data, "data.test=bare"), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    fit_detector(composed("detect", *short, *data, "data.test=val"), fabric, tmp_path / "run")
    recorded = json.loads((tmp_path / "run/result.json").read_text())
    assert recorded["data"]["objects"] == 4 and load(tmp_path / "run/last.ckpt").about["classes"] == ["cup"]
    weights = f"weights={tmp_path / 'run/last.ckpt'}"
    (tmp_path / "train").rename(tmp_path / "gone")  # the test images are enough
    assert evaluate(composed("evaluate", weights, "batch_size=2"), fabric)["AP"] == recorded["metrics"]["AP"]


def test_digits_take_no_folder(fabric, tmp_path):
    with pytest.raises(ValueError, match="digits are embedded"):
        fit(config(f"data.root={tmp_path}"), fabric, tmp_path / "run")
