"""Files as people have them, through the lists, the class folders and predict of this folder."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from common import runs
from common.data import check
from common.data.batches import Plan
from ncl_pp.data import build_data
from ncl_pp.predict import classify
from ncl_pp.tests.layouts import short_config, write_class_folders, write_image
from ncl_pp.train import fit

RAMP = np.add.outer(np.arange(40), np.arange(36)).astype(np.uint8) * 3
NAMES = ("a b.png", "größe ü.PNG", "it's [1], x=y.JPEG", "%20.webp")


@pytest.fixture
def rows(checkpoint, script_config, fabric, tmp_path):
    """The table that predict.py writes for its `images=`."""

    def table(images):
        cfg = script_config("predict", f"weights={checkpoint}", "images=x", f"out={tmp_path / 'rows.csv'}")
        cfg.images = images if isinstance(images, list) else str(images)
        classify(cfg, fabric)
        return list(csv.DictReader((tmp_path / "rows.csv").open(encoding="utf-8")))

    return table


def listed(root, train="train.txt", test=None):
    options = {"augment": "plain", "size": 16, "train_list": train, "test_list": test or train}
    return build_data(name="lists", seed=0, root=str(root), **options)


def folder(root):
    return build_data(name="folder", seed=0, root=str(root), augment="plain", size=16)


# -------------------------------------------------------------------------------------------------------------- pixels
def test_sixteen_bits_are_scaled_and_turned_photos_are_seen_upright(rows, tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(RAMP).save(tmp_path / "in/8.png")
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "in/16.png")
    turned = Image.fromarray(RAMP).transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "in/turned.png", exif=exif)
    found = {(r["label"], r["probability"]) for r in rows(tmp_path / "in")}
    assert len(found) == 1, f"one picture in three files, and the network sees {len(found)}"


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "1", "CMYK"])
def test_every_mode_of_pillow_trains_and_is_predicted(mode, rows, tmp_path):
    ending = "tif" if mode == "CMYK" else "png"
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            path = tmp_path / "d" / split / name / f"0.{ending}"
            path.parent.mkdir(parents=True)
            Image.fromarray(RAMP).convert("RGB").convert("L" if mode == "LA" else mode).convert(mode).save(path)
    (images,), _ = next(
        folder(tmp_path / "d").batches(Plan(2, 2, seed=0), copies=1, device=torch.device("cpu")).epoch(1)
    )
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all() and len(rows(tmp_path / "d")) == 4


# --------------------------------------------------------------------------------------------------------------- names
def test_equal_names_keep_their_rows_and_a_list_skips_what_is_no_image(rows, tmp_path):
    for place, value in (("a", 1), ("b", 2)):
        write_image(tmp_path / place / "x.png", value)
    (tmp_path / "notes.txt").write_text("no image")
    found = rows([str(tmp_path / "a"), str(tmp_path / "b/x.png"), str(tmp_path / "notes.txt")])
    assert [r["path"].rsplit("/", 2)[1] for r in found] == ["a", "b"]


def test_names_of_any_kind_in_folders_lists_and_predictions(rows, tmp_path):
    root = tmp_path / "my photos [2024], a=b é"
    for c, name in enumerate(("Grüne Ameise", "bee, wild")):
        for i, file in enumerate(NAMES):
            write_image(root / "train" / name / file, 10 * c + i)
            write_image(root / "test" / name / file, 90 + 10 * c + i)
    assert folder(root).classes == ["Grüne Ameise", "bee, wild"] and folder(root).counts == [4, 4]
    lines = [f"train/{n}/{f} {c}" for c, n in enumerate(("Grüne Ameise", "bee, wild")) for f in NAMES]
    (root / "train.txt").write_text("\n".join(lines), encoding="utf-8")
    assert listed(root).counts == [4, 4]
    assert sorted({r["path"].rsplit("/", 1)[1] for r in rows(root / "test")}) == sorted(NAMES)


def test_what_is_hidden_is_no_class_and_no_image_and_the_checker_agrees(tmp_path, capsys):
    write_class_folders(tmp_path, {"train": 4, "test": 1}, ("ant", "bee"))
    for split in ("train", "test"):
        for place in (".ipynb_checkpoints", "__MACOSX"):
            write_image(tmp_path / split / place / "x.png")
        for name in ("._0.png", ".DS_Store", "Thumbs.db"):
            (tmp_path / split / "ant" / name).write_bytes(b"\0")
    data = folder(tmp_path)
    assert data.classes == ["ant", "bee"] and data.counts == [4, 4] and len(data.test) == 2
    assert check.main(["imagefolder", str(tmp_path)]) == 0 and "8 images, 2 classes" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- lists and labels
@pytest.fixture
def images(tmp_path):
    for c, name in enumerate(("ant", "bee", "cat")):
        for i in range(3):
            write_image(tmp_path / "train" / name / f"{i}.png", 10 * c + i)
    return tmp_path


ROWS = [f"train/{name}/{i}.png {c}" for c, name in enumerate(("ant", "bee", "cat")) for i in range(3)]


@pytest.mark.parametrize(
    ("encoding", "end", "change"),
    [
        ("utf-8-sig", "\n", str),
        ("utf-8", "\r\n", str),
        ("utf-8", "\r", str),
        ("utf-8", "\n\n", lambda row: f"  {row}  "),
        ("utf-8", "\n", lambda row: row.replace(" ", "\t")),
        ("utf-8", "\n", lambda row: f"./train/../{row}"),
    ],
)
def test_lists_of_any_editor_read_alike(encoding, end, change, images):
    (images / "train.txt").write_bytes(end.join(map(change, ROWS)).encode(encoding))
    assert listed(images).counts == [3, 3, 3]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_another_encoding_names_the_list(encoding, images):
    (images / "train.txt").write_bytes("\n".join([*ROWS, "train/größe/0.png 1"]).encode(encoding))
    with pytest.raises(ValueError, match=r"train\.txt.*UTF-8"):
        listed(images)


@pytest.mark.parametrize("label", ["nan", "inf", "-1", "-100", "1.0", "3,5", "n/a", "", "ant"])
def test_a_label_that_is_none_names_list_and_line(label, images):
    (images / "train.txt").write_text("\n".join([ROWS[0], f"train/ant/1.png {label}", *ROWS[3:]]))
    with pytest.raises(ValueError, match=r"train\.txt, line 2"):
        listed(images)


def test_two_labels_for_one_image_ids_from_one_and_a_class_only_in_the_test_list(images):
    (images / "train.txt").write_text("\n".join([*ROWS, "train/ant/0.png 2"]))
    with pytest.raises(ValueError, match=r"train/ant/0\.png has the labels 0 and 2"):
        listed(images)
    (images / "train.txt").write_text("\n".join(f"{r[:-1]}{int(r[-1]) + 1}" for r in ROWS))
    with pytest.raises(ValueError, match=r"no training image for classes \[0\]"):
        listed(images)
    (images / "train.txt").write_text("\n".join(ROWS))
    (images / "test.txt").write_text("\n".join([*ROWS, "train/dog/0.png 4"]))
    with pytest.raises(ValueError, match=r"no training image for classes \[3, 4\]"):
        listed(images, test="test.txt")


# -------------------------------------------------------------------------------------------------- folders and places
def test_links_and_the_same_images_elsewhere_are_the_same_set(fabric, tmp_path):
    write_class_folders(tmp_path / "a", {"train": 4, "test": 1}, ("ant", "bee"), size=20)
    write_class_folders(tmp_path / "b", {"train": 5, "test": 1}, ("ant", "bee"), size=20)
    (tmp_path / "linked").symlink_to(tmp_path / "a", target_is_directory=True)
    assert folder(tmp_path / "linked").source == folder(tmp_path / "a").source != folder(tmp_path / "b").source
    small = ["data=folder", "data.augment=plain", "data.size=16", "data.workers=0", "train.batch_size=8"]
    short = [*small, "train.epochs=1", "schedule.warmup=0", "method=bsce", "method.loss.hard=1"]
    fit(short_config(*short, f"data.root={tmp_path / 'a'}"), fabric, tmp_path / "run")
    (tmp_path / "a").rename(tmp_path / "c")
    fit(short_config(*short, f"data.root={tmp_path / 'c'}"), fabric, tmp_path / "run")
    with pytest.raises(runs.RunError, match="on other data"):
        fit(short_config(*short, f"data.root={tmp_path / 'b'}"), fabric, tmp_path / "run")


def test_splits_with_other_classes_or_an_empty_one_are_named(tmp_path):
    write_class_folders(tmp_path, {"train": 1, "test": 1}, ("ant", "bee"))
    (tmp_path / "test/bee").rename(tmp_path / "test/Bee")
    with pytest.raises(ValueError, match="different classes: Bee, bee"):
        folder(tmp_path)
    (tmp_path / "test/Bee").rename(tmp_path / "test/bee")
    (tmp_path / "train/cat").mkdir()
    with pytest.raises(FileNotFoundError, match="cat"):
        folder(tmp_path)
