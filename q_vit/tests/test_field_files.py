"""Files as people have them, through training, evaluation and prediction: pixels, names, text, folders, paths."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.check import main as check_folder
from q_vit.checkpoint import load
from q_vit.data import build_data, test_set
from q_vit.predict import class_names, classify
from q_vit.tests.conftest import class_folders, config, folder_arm
from q_vit.train import fit


def predicted(checkpoint, fabric, images, out, *more):
    """{path: most probable label with its probability} of the table that predict writes."""
    cfg = config(f"weights='{checkpoint}'", f"images='{images}'", f"out='{out}'", *more, name="predict")
    classify(cfg, fabric)
    return {r["path"]: (r["label"], r["probability"]) for r in csv.DictReader(out.open())}


def ramp():
    return np.arange(256, dtype=np.uint8).reshape(16, 16)


# -------------------------------------------------------------------------------------------------------------- pixels
def test_sixteen_bits_are_scaled_by_their_range(checkpoint, fabric, tmp_path):
    Image.fromarray(ramp()).save(tmp_path / "a8.png")
    Image.fromarray(ramp().astype(np.uint16) * 257).save(tmp_path / "b16.png")
    a, b = predicted(checkpoint, fabric, tmp_path, tmp_path / "p.csv").values()
    assert a == b


def test_a_photo_is_turned_upright_by_its_exif(checkpoint, fabric, tmp_path):
    picture = Image.fromarray(ramp()).convert("RGB")
    picture.save(tmp_path / "a.png")
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    turned.save(tmp_path / "b.png", exif=exif)
    a, b = predicted(checkpoint, fabric, tmp_path, tmp_path / "p.csv").values()
    assert a == b


def test_a_class_folder_of_every_mode_trains(fabric, tmp_path):
    root = class_folders(tmp_path / "data", n=4)
    for i, mode in enumerate(("RGBA", "P", "CMYK", "L")):
        Image.new("RGB", (16, 16), (10, 20, 200)).convert(mode).save(
            root / f"train/blue/{i}.{'jpg' if mode == 'CMYK' else 'png'}"
        )
    fit(folder_arm(root, "method=fp", "train.batch_size=4"), fabric, tmp_path / "run")
    assert json.loads((tmp_path / "run/result.json").read_text())["status"] == "finished"


# --------------------------------------------------------------------------------------------------------------- names
def test_hidden_files_and_folders_are_no_data_and_no_class_and_the_checker_agrees(tmp_path, capsys):
    root = class_folders(tmp_path, n=3)
    for split in ("train", "val"):
        (root / split / ".ipynb_checkpoints").mkdir()
        Image.new("RGB", (8, 8)).save(root / split / ".ipynb_checkpoints/0-checkpoint.png")
        for name in ("._0.png", "Thumbs.db", ".DS_Store"):
            (root / split / "red" / name).write_bytes(b"\0")
    (root / "__MACOSX").mkdir()
    data = build_data(name="folder", root=str(root), size=16, augment="none")
    assert data.names == ["blue", "green", "red"] and data.images == 9 and len(data.test) == 9
    assert check_folder(["imagefolder", str(root)]) == 0
    assert "train: 9 images, 3 classes" in capsys.readouterr().out


def test_equal_names_in_different_folders_keep_their_rows(checkpoint, fabric, tmp_path):
    for folder in ("a", "b b"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        Image.fromarray(ramp()).save(tmp_path / "in" / folder / "x.png")
    assert len(predicted(checkpoint, fabric, tmp_path / "in", tmp_path / "p.csv")) == 2


def test_a_broken_file_is_listed_at_the_end_and_the_others_are_done(checkpoint, fabric, tmp_path, capsys):
    Image.fromarray(ramp()).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    Image.fromarray(ramp()).save(tmp_path / "c.png")
    with pytest.raises(SystemExit) as stop:
        predicted(checkpoint, fabric, tmp_path, tmp_path / "p.csv")
    assert stop.value.code == 1 and "b.png" in capsys.readouterr().err
    assert len(list(csv.DictReader((tmp_path / "p.csv").open()))) == 2


def test_a_broken_training_image_is_named_and_leaves_no_run(fabric, tmp_path):
    root = class_folders(tmp_path / "data", n=4)
    (root / "train/red/0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot decode image .*train/red/0\.png"):
        fit(folder_arm(root, "method=fp", "train.batch_size=12"), fabric, tmp_path / "run")
    assert not (tmp_path / "run/result.json").exists() and not (tmp_path / "run/config.yaml").exists()


# ----------------------------------------------------------------------------------------------------------------- text
def test_lists_of_names_in_other_encodings(tmp_path):
    (tmp_path / "utf16.txt").write_bytes("a\nb\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"utf16\.txt is UTF-16"):
        class_names(str(tmp_path / "utf16.txt"), ["0", "1"])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\nb\n")
    with pytest.raises(ValueError, match=r"latin\.txt, line 1: not UTF-8"):
        class_names(str(tmp_path / "latin.txt"), ["0", "1"])
    (tmp_path / "windows.txt").write_bytes("\ufeffcafé au lait\r\nb\r\n".encode())
    assert class_names(str(tmp_path / "windows.txt"), ["0", "1"]) == ["café au lait", "b"]
    with pytest.raises(ValueError, match="holds 2 lines, the model has 3 classes"):
        class_names(str(tmp_path / "windows.txt"), ["0", "1", "2"])
    with pytest.raises(FileNotFoundError):
        class_names(str(tmp_path / "none.txt"), ["0"])


# ---------------------------------------------------------------------------------------------------- folders and paths
def test_a_split_with_other_classes_names_them(tmp_path):
    root = class_folders(tmp_path, n=2)
    (root / "val/red").rename(root / "val/Red")
    with pytest.raises(ValueError, match="hold different classes: Red, red"):
        build_data(name="folder", root=str(root), size=16, augment="none")
    (root / "val/Red/0.png").unlink()
    (root / "val/Red/1.png").unlink()
    with pytest.raises(FileNotFoundError, match="Red"):
        build_data(name="folder", root=str(root), size=16, augment="none")


def test_the_test_images_alone_are_enough_to_evaluate(tmp_path):
    root = class_folders(tmp_path, splits=("val",), n=2)
    seen = {"channels": 3, "size": 16, "crop_pct": 1.0, "normalise": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    images, names, source = test_set("folder", str(root), seen)
    assert len(images) == 6 and names == ["blue", "green", "red"] and source["images"] == 6
    torch.testing.assert_close(images[0][0][:, 0, 0], torch.tensor([50, 20, 20]) / 255 * 2 - 1, atol=1e-6, rtol=0)


def test_paths_with_blanks_signs_and_accents(checkpoint, fabric, tmp_path):
    place = tmp_path / "my café, a=b (1)"
    place.mkdir()
    (place / "last.ckpt").write_bytes(checkpoint.read_bytes())
    Image.fromarray(ramp()).save(place / "täst [1].png")
    assert load(place / "last.ckpt").about["size"] == 16
    assert len(predicted(place / "last.ckpt", fabric, place / "täst [1].png", place / "out 1.csv")) == 1
