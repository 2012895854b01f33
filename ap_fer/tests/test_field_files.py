"""Faces as people have them: pixels, names, boxes, label files of any editor, and the folders of the publishers."""

import csv

import numpy as np
import pytest
from PIL import Image

from ap_fer.align import read_boxes, read_landmarks
from ap_fer.data import FaceFiles, build_data
from ap_fer.expressions import FERPLUS
from ap_fer.layouts import Labelled, read_split
from ap_fer.predict import predict
from ap_fer.tests.helpers import config, write_image

RAMP = np.add.outer(np.arange(40), np.arange(36)).astype(np.uint8) * 3
SEVEN = ("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise")


@pytest.fixture
def rows(checkpoint, fabric, tmp_path):
    """The table that predict.py writes for its `images=`."""

    def table(images, **more):
        out = tmp_path / "rows.csv"
        cfg = config(
            "predict", f"weights={checkpoint}", "images=x", f"out={out}", *(f"{k}={v}" for k, v in more.items())
        )
        cfg.images = images if isinstance(images, list) else str(images)
        predict(cfg, fabric)
        return list(csv.DictReader(out.open(encoding="utf-8")))

    return table


def turned(upright, path):
    """The picture as a phone stores it that was held upright: on its side, with a mark that says so."""
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    exif = stored.getexif()
    exif[0x0112] = 6
    path.parent.mkdir(parents=True, exist_ok=True)
    stored.save(path, exif=exif)


def text(path, content, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))


# -------------------------------------------------------------------------------------------------------------- pixels
def test_sixteen_bits_are_scaled_and_turned_photos_are_seen_upright(rows, tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(RAMP).save(tmp_path / "in/8.png")
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "in/16.png")
    turned(Image.fromarray(RAMP), tmp_path / "in/turned.png")
    found = {(r["label"], r["probability"]) for r in rows(tmp_path / "in")}
    assert len(found) == 1, f"one face in three files, and the network sees {len(found)}"


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "1", "CMYK"])
def test_every_mode_of_pillow_is_predicted(mode, rows, tmp_path):
    path = tmp_path / f"a.{'tif' if mode == 'CMYK' else 'png'}"
    Image.fromarray(RAMP).convert("RGB").convert("L" if mode == "LA" else mode).convert(mode).save(path)
    assert len(rows(path)) == 1


def test_boxes_of_a_data_set_are_in_stored_coordinates_and_its_images_stay_as_they_lie(tmp_path):
    """A photo with an orientation mark: what annotations count in is the stored picture; without boxes it is turned."""
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 40, 3), dtype=np.uint8))
    turned(upright, tmp_path / "a.png")
    stored = np.asarray(Image.open(tmp_path / "a.png"))
    assert stored.shape == (40, 60, 3)
    cut, _ = FaceFiles(Labelled([tmp_path / "a.png"], [0], [(5, 2, 50, 39)]))[0]
    np.testing.assert_array_equal(np.asarray(cut), stored[2:39, 5:50])
    whole, _ = FaceFiles(Labelled([tmp_path / "a.png"], [0]))[0]
    np.testing.assert_array_equal(np.asarray(whole), np.asarray(upright))


# --------------------------------------------------------------------------------------------------------------- names
@pytest.mark.parametrize("name", ["a b.png", "größe ü.PNG", "it's [1], x=y.JPEG", "-dash.webp"])
def test_names_of_any_kind_in_class_folders_lists_and_predictions(name, rows, tmp_path):
    root = tmp_path / "my faces [2024], a=b é"
    for split in ("train", "val"):
        for c, emotion in enumerate(SEVEN):
            write_image(root / split / emotion / name, c)
    found = build_data(name="folder", seed=0, root=str(root), size=36)
    assert found.counts == [1] * 7 and len(found.test) == 7
    with (root / "train.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label"), *((f"train/{e}/{name}", e) for e in SEVEN)])
    assert len(read_split("csv", root, "train").paths) == 7
    assert {r["path"].rsplit("/", 1)[1] for r in rows(root / "val")} == {name}


def test_equal_names_keep_their_rows_their_boxes_and_a_list_skips_what_is_no_image(rows, tmp_path, capsys):
    for place, value in (("a", 1), ("b", 2)):
        write_image(tmp_path / place / "x.png", value, size=(90, 80))
    (tmp_path / "notes.txt").write_text("no image")
    found = rows([str(tmp_path / "a"), str(tmp_path / "b/x.png"), str(tmp_path / "notes.txt")], top=7)
    assert [r["path"].rsplit("/", 2)[1] for r in found[::7]] == ["a", "b"]
    for place in "ab":  # each face cut out beforehand: what its own box must give
        Image.open(tmp_path / place / "x.png").crop((10, 10, 60, 50 if place == "a" else 70)).save(
            tmp_path / f"{place}.png"
        )
    (tmp_path / "boxes.csv").write_text("a/x.png,10,10,60,50\nb/x.png,10,10,60,70\n")
    own = rows([str(tmp_path / "a"), str(tmp_path / "b")], top=7, boxes=tmp_path / "boxes.csv")
    cut = rows([str(tmp_path / "a.png"), str(tmp_path / "b.png")], top=7)
    assert [r["probability"] for r in own] == [r["probability"] for r in cut]
    (tmp_path / "boxes.csv").write_text("a/x.png,10,10,60,50\n")
    with pytest.raises(SystemExit):  # the other one has no box: it must not take this one
        rows([str(tmp_path / "a"), str(tmp_path / "b")], boxes=tmp_path / "boxes.csv")
    assert "b/x.png" in capsys.readouterr().err
    (tmp_path / "boxes.csv").write_text("x.png,10,10,60,50\n")
    with pytest.raises(SystemExit):  # whose box is it?
        rows([str(tmp_path / "a"), str(tmp_path / "b")], boxes=tmp_path / "boxes.csv")


def test_what_is_hidden_is_no_expression_and_no_face(tmp_path):
    for split in ("train", "val"):
        for c, emotion in enumerate(SEVEN):
            write_image(tmp_path / split / emotion / "0.png", c)
        write_image(tmp_path / split / ".ipynb_checkpoints/x.png")
        for name in ("._0.png", ".DS_Store", "Thumbs.db"):
            (tmp_path / split / "fear" / name).write_bytes(b"\0")
    assert build_data(name="folder", seed=0, root=str(tmp_path), size=36).counts == [1] * 7
    assert build_data(name="folder", seed=0, root=str(tmp_path), size=36, num_classes=None).names == SEVEN


# ---------------------------------------------------------------------------------------------------- lists and labels
EDITORS = [("utf-8-sig", "\n"), ("utf-8", "\r\n"), ("utf-8", "\r"), ("utf-8", "\n\n")]


@pytest.mark.parametrize(("encoding", "end"), EDITORS)
def test_lists_of_any_editor_read_alike(encoding, end, tmp_path):
    for i in range(2):
        write_image(tmp_path / f"raf/basic/Image/aligned/train_{i}_aligned.jpg", i)
        write_image(tmp_path / f"own/faces/{i}.png", i)
        write_image(tmp_path / f"expw/origin/{i}.jpg", i, size=(80, 80))
    text(tmp_path / "raf/basic/EmoLabel/train.txt", end.join(["train_0.jpg 4", "train_1.jpg 7"]), encoding)
    assert read_split("raf_db", tmp_path / "raf", "train", images="aligned").targets == [4, 6]
    text(
        tmp_path / "own/train.csv", end.join(["path;label", "faces/0.png;Happy", "faces/../faces/1.png; 0 "]), encoding
    )
    assert read_split("csv", tmp_path / "own", "train").targets == [4, 0]
    text(tmp_path / "expw/label.lst", end.join(["0.jpg 0 10 20 70 50 3.5 6", "1.jpg 0 0 0 40 40 9 3"]), encoding)
    assert read_split("expw", tmp_path / "expw", "test", test_share=0.5).targets == [6]
    text(tmp_path / "boxes.csv", end.join(["path,left,top,right,bottom", "a.png,1,2.5,30,40"]), encoding)
    assert read_boxes(tmp_path / "boxes.csv")["a.png"].tolist() == [1, 2.5, 30, 40]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_another_encoding_names_the_list(encoding, tmp_path):
    text(tmp_path / "train.csv", "größe.png,0\n", encoding)
    with pytest.raises(ValueError, match=r"train\.csv.*UTF-8"):
        read_split("csv", tmp_path, "train")


@pytest.mark.parametrize("label", ["nan", "inf", "-1", "-100", "7", "1.0", "n/a", "", "bored", '"3,5"'])
def test_a_label_that_is_none_names_list_and_line(label, tmp_path):
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png")
    text(tmp_path / "train.csv", f"path,label\na.png,0\nb.png,{label}\n")
    with pytest.raises(ValueError, match=r"train\.csv, line 3"):
        read_split("csv", tmp_path, "train")


def test_ids_off_by_one_and_two_labels_for_one_face_are_named(raf, tmp_path):
    label = raf / "basic/EmoLabel/list_patition_label.txt"
    published = label.read_text()
    label.write_text("\n".join(f"{r[:-1]}{int(r[-1]) - 1}" for r in published.split("\n") if r))
    with pytest.raises(ValueError, match=r"list_patition_label\.txt, line 1: label -1 outside"):
        read_split("raf_db", raf, "train", images="aligned_224")
    label.write_text(published + "train_00000.jpg 5\n")
    with pytest.raises(ValueError, match=r"line 22: train_00000\.jpg has the labels 1 and 5"):
        read_split("raf_db", raf, "train", images="aligned_224")
    write_image(tmp_path / "own/a.png")
    text(tmp_path / "own/train.csv", "a.png,happy\na.png,4\na.png,fear\n")
    with pytest.raises(ValueError, match=r"train\.csv, line 3: a\.png has the labels happiness and fear"):
        read_split("csv", tmp_path / "own", "train")


@pytest.mark.parametrize("cell", ["nan", "n/a", "", "1e999"])
def test_landmarks_boxes_and_votes_that_are_no_numbers_name_file_and_line(cell, tmp_path):
    text(tmp_path / "points.csv", "a.png,1,2,3,4,5,6,7,8,9,10\nb.png,1,2,3,4,5,6,7,8,9," + cell)
    with pytest.raises(ValueError, match=r"points\.csv, line 2"):
        read_landmarks(tmp_path / "points.csv")
    text(tmp_path / "boxes.csv", f"path,left,top,right,bottom\na.png,1,2,{cell},4\n")
    with pytest.raises(ValueError, match=r"boxes\.csv, line 2"):
        read_boxes(tmp_path / "boxes.csv")
    (tmp_path / "FER2013Train").mkdir()
    header = ",".join(["Usage", "Image name", *FERPLUS, "unknown", "NF"])
    text(tmp_path / "fer2013new.csv", f"{header}\nTraining,a.png,{cell},8,0,0,0,0,0,0,0,0\n")
    with pytest.raises(ValueError, match=r"fer2013new\.csv, line 2"):
        read_split("ferplus", tmp_path, "train")


# ------------------------------------------------------------------------------------------- folders of the publishers
def test_affectnet_is_cut_by_its_boxes_from_its_own_folder_of_lists(tmp_path):
    whole = Image.open(write_image(tmp_path / "Manually_Annotated_Images/1/x.jpg", size=(100, 80)))
    columns = "subDirectory_filePath,face_x,face_y,face_width,face_height,expression"
    lists = tmp_path / "Manually_Annotated_file_lists"
    text(lists / "training.csv", f"{columns}\n1/x.jpg,20,10,50,60,3\n1/x.jpg,20,10,50,60,9\n")
    text(lists / "validation.csv", f"{columns}\n1/x.jpg,20,10,0,60,3\n")
    found = read_split("affectnet", tmp_path, "train")
    assert found.targets == [5] and found.boxes == [(20, 10, 70, 70)], "surprise; x, y, width, height became corners"
    np.testing.assert_array_equal(np.asarray(FaceFiles(found)[0][0]), np.asarray(whole)[10:70, 20:70])
    with pytest.raises(ValueError, match=r"validation\.csv, line 2: the face box 20, 10, 0, 60 is empty"):
        read_split("affectnet", tmp_path, "test")


def test_the_release_of_affectnet_with_a_file_per_label(tmp_path):
    for n, label in (("10", "1"), ("2", "6"), ("3", "7")):
        write_image(tmp_path / f"train_set/images/{n}.jpg", int(n))
        (tmp_path / "train_set/annotations").mkdir(exist_ok=True)
        np.save(tmp_path / f"train_set/annotations/{n}_exp.npy", np.array(label))
    found = read_split("affectnet", tmp_path, "train")
    assert [(p.stem, t) for p, t in zip(found.paths, found.targets, strict=True)] == [("2", 0), ("10", 4)]
    assert read_split("affectnet", tmp_path, "train", num_classes=8).targets == [0, 7, 4]
    np.save(tmp_path / "train_set/annotations/2_exp.npy", np.array("n/a"))
    with pytest.raises(ValueError, match=r"2_exp\.npy: not the number of an expression"):
        read_split("affectnet", tmp_path, "train")
    (tmp_path / "train_set/annotations/2_exp.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"2_exp\.npy"):
        read_split("affectnet", tmp_path, "train")


def test_the_same_faces_elsewhere_are_the_same_set_and_one_more_is_not(tmp_path):
    def made(place, more=0):
        for split, n in (("train", 1 + more), ("val", 1)):
            for c, emotion in enumerate(SEVEN):
                for i in range(n):
                    write_image(tmp_path / place / split / emotion / f"{i}.png", 10 * c + i)
        return build_data(name="folder", seed=0, root=str(tmp_path / place), size=36).source

    (tmp_path / "linked").symlink_to(tmp_path / "a", target_is_directory=True)
    assert made("a") == made("b") == made("linked") != made("c", more=1)
