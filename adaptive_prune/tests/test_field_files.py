"""Files as people have them, on the sets and verbs of this folder."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from adaptive_prune import predict
from adaptive_prune.checkpoint import load
from adaptive_prune.data import build_data, prepare
from common.data.batches import Plan
from common.data.files import open_image

LOOK = {"size": 32, "crop": 0.875, "normalise": {"mean": [0.5] * 3, "std": [0.25] * 3}, "channels": 3}


def picture(path, value=100, size=(40, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 20, 20)).save(path)


def folders(root, test="val", names=("ant", "bee")):
    for split, n in (("train", 4), (test, 1)):
        for c, name in enumerate(names):
            for i in range(n):
                picture(root / split / name / f"{i}.png", 40 * c + 9 * i)
    return root


def data(root, **more):
    return build_data(name="folder", seed=0, root=str(root), size=32, test_dir=None, **more)


@pytest.mark.parametrize("test", ["val", "valid", "test"])
def test_the_test_folder_of_people_is_found(test, tmp_path):
    assert len(data(folders(tmp_path, test)).test) == 2


def test_where_val_and_test_are_there_the_best_is_chosen_on_val(tmp_path):
    folders(tmp_path)
    for i in range(3):
        picture(tmp_path / f"test/ant/{i}.png")
        picture(tmp_path / f"test/bee/{i}.png", 200)
    found = data(tmp_path)
    assert (len(found.test), len(found.validation), found.train_size) == (6, 2, 8)
    image, label = found.validation[1]
    assert image.shape == (3, 32, 32) and label == 1
    with pytest.raises(ValueError, match=r"a validation split of its own \(val/\)"):
        data(tmp_path, validation=2)
    (tmp_path / "val/bee").rename(tmp_path / "val/wasp")
    with pytest.raises(ValueError, match="val/ and test/ .*bee, wasp"):
        data(tmp_path)


def test_pictures_are_set_aside_as_test_pictures_are_prepared(tmp_path):
    found = data(folders(tmp_path), validation=3, subset=4)
    assert (found.train_size, len(found.validation)) == (4, 3)
    files = [file for file, _ in found.validation.dataset.samples]
    held = {files[i] for i in found.validation.indices}
    drawn = {k[1] for k in found.validation.dataset.samples}
    assert len(held) == 3 and drawn == {0, 1}
    image, _ = found.validation[0]
    torch.testing.assert_close(image, prepare(**LOOK | found.look)(open_image(sorted(held)[0])))
    images, _ = next(found.batches(Plan(4, 4, seed=0), 1, torch.device("cpu")))
    assert images.shape == (4, 3, 32, 32)
    found = data(tmp_path, validation=3, subset=4, augment={"color_jitter": 0.0})
    images, _ = next(found.batches(Plan(4, 4, seed=0), 1, torch.device("cpu")))
    trained, aside = (
        {round(x[0].mean().item(), 3) for x in part} for part in (images, (x for x, _ in found.validation))
    )
    assert len(trained) == 4 and len(aside) == 3 and not trained & aside, "each picture has a red of its own"


def test_hidden_folders_and_files_are_no_classes_and_no_pictures(tmp_path):
    folders(tmp_path)
    (tmp_path / "train/.ipynb_checkpoints").mkdir()
    (tmp_path / "train/ant/._0.png").write_bytes(b"resource fork")
    (tmp_path / "train/ant/Thumbs.db").write_bytes(b"no picture")
    found = data(tmp_path)
    assert found.classes == ["ant", "bee"] and found.train_size == 8


def test_folders_with_blanks_commas_brackets_and_accents(tmp_path):
    root = folders(tmp_path / "my photos [2024], a=b é", names=("Grüne Ameise", "bee, wild"))
    assert data(root).classes == ["Grüne Ameise", "bee, wild"]


def test_upper_case_endings_palettes_and_transparency(tmp_path):
    folders(tmp_path)
    Image.new("P", (40, 32)).save(tmp_path / "train/ant/palette.PNG")
    Image.new("RGBA", (40, 32), (9, 9, 9, 0)).save(tmp_path / "train/ant/alpha.png")
    Image.new("CMYK", (40, 32)).save(tmp_path / "train/ant/print.JPG")
    found = data(tmp_path)
    images, _ = next(found.batches(Plan(11, 11, seed=0), 1, torch.device("cpu")))
    assert images.shape == (11, 3, 32, 32) and images.isfinite().all()


def test_a_broken_training_picture_is_named(tmp_path):
    folders(tmp_path)
    (tmp_path / "train/ant/broken.jpg").write_bytes(b"\xff\xd8 cut off")
    found = data(tmp_path)
    with pytest.raises(ValueError, match=r"broken\.jpg"):
        list(found.batches(Plan(9, 9, seed=0), 1, torch.device("cpu")))


def test_a_class_without_a_picture_and_classes_that_differ_are_named(tmp_path):
    folders(tmp_path)
    (tmp_path / "train/cat").mkdir()
    with pytest.raises((FileNotFoundError, ValueError), match="cat"):
        data(tmp_path)
    picture(tmp_path / "train/cat/0.png")
    with pytest.raises(ValueError, match="hold different classes: cat"):
        data(tmp_path)


def test_the_same_pictures_elsewhere_are_the_same_set_and_others_are_not(tmp_path):
    a, b = data(folders(tmp_path / "a")), data(folders(tmp_path / "b"))
    assert a.source == b.source and a.source["images"] == 8
    picture(tmp_path / "b/val/ant/more.png")
    assert data(tmp_path / "b").source != a.source, "a test picture more is another set"


def test_sixteen_bit_and_turned_pictures_are_seen_as_they_look(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 40, dtype=np.uint16), (32, 1))
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    look = {"size": 24, "crop": None, "normalise": {"mean": [0.0], "std": [1.0]}, "channels": 1}
    seen = prepare(**look)(open_image(tmp_path / "deep.png"))
    assert seen.shape == (1, 24, 24) and 0.4 < seen.mean() < 0.6 and seen.unique().numel() > 10
    turned = Image.new("RGB", (40, 20), (250, 0, 0))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (20, 40)


def test_one_grey_picture_goes_through_a_colour_network_and_the_other_way_round():
    grey, colour = Image.new("L", (50, 40), 128), Image.new("RGB", (50, 40), (128, 128, 128))
    assert prepare(**LOOK)(colour).shape == (3, 32, 32)
    one = {"size": 24, "crop": None, "normalise": {"mean": [0.0], "std": [1.0]}, "channels": 1}
    torch.testing.assert_close(prepare(**one)(colour), prepare(**one)(grey))


def test_the_normalisation_is_that_of_the_checkpoint():
    image = Image.new("RGB", (40, 40), (255, 255, 255))
    assert prepare(**LOOK)(image).unique().tolist() == pytest.approx([2.0])
    other = {**LOOK, "normalise": {"mean": [0.0] * 3, "std": [0.5] * 3}}
    assert prepare(**other)(image).unique().tolist() == pytest.approx([2.0])
    dark = Image.new("RGB", (40, 40))
    assert prepare(**LOOK)(dark).unique().tolist() == pytest.approx([-2.0])
    assert prepare(**other)(dark).unique().tolist() == pytest.approx([0.0])


def test_a_picture_that_is_named_is_taken_whatever_its_ending(checkpoint, script_config, fabric, tmp_path):
    picture(tmp_path / "photo.png")
    (tmp_path / "photo.png").rename(tmp_path / "IMG_0001")
    args = [f"weights={checkpoint}", f"images={tmp_path / 'IMG_0001'}", f"out={tmp_path / 'deep/p.csv'}"]
    predict.run(script_config("predict", *args), fabric)
    with (tmp_path / "deep/p.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["label"] in load(checkpoint).about["classes"] and row["path"].endswith("IMG_0001")
