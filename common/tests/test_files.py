"""Files as people have them: depths and orientations of images, encodings and rows of lists, hidden files, equal names."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import files
from common.data.check import check
from common.data.detection import coco_detection, voc_detection
from common.data.vision import image_folder, image_list

RAMP = np.tile(np.arange(256), (8, 1))


def grey(image):
    return np.asarray(image)[..., 0].astype(int)


# --------------------------------------------------------------------------------------------------------------- images
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_cut_off(tmp_path, ending):
    path = tmp_path / f"ramp.{ending}"
    Image.fromarray((RAMP * 257).astype(np.uint16)).save(path)
    assert np.array_equal(grey(files.open_image(path)), RAMP)


def test_floats_are_scaled_by_their_unit_range_or_refused(tmp_path):
    Image.fromarray((RAMP / 255).astype(np.float32)).save(tmp_path / "unit.tif")
    assert np.array_equal(grey(files.open_image(tmp_path / "unit.tif")), RAMP)
    for bad in (RAMP.astype(np.float32), np.full((4, 4), np.nan, np.float32), np.full((4, 4), 70000, np.int32)):
        Image.fromarray(bad).save(tmp_path / "bad.tif")
        with pytest.raises(ValueError, match=r"bad\.tif"):
            files.open_image(tmp_path / "bad.tif")


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "YCbCr"])
def test_other_modes_are_rgb(tmp_path, mode):
    Image.new("RGB", (6, 4), (200, 10, 10)).convert(mode).save(
        path := tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    )
    image = files.open_image(path)
    assert image.mode == "RGB" and image.size == (6, 4)


def test_photos_are_turned_upright_and_stored_coordinates_stay(tmp_path):
    exif = Image.Exif()
    exif[files.ORIENTATION] = 6
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = 255  # bright on the left of the stored image, on top of the one shown
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    shown, stored = files.open_image(tmp_path / "a.jpg"), files.open_image(tmp_path / "a.jpg", upright=False)
    assert shown.size == (40, 60) and stored.size == (60, 40)
    assert np.asarray(shown)[:20].mean() > 200 > 50 > np.asarray(shown)[40:].mean()
    Image.fromarray((RAMP * 257).astype(np.uint16)).save(tmp_path / "deep.png", exif=exif)
    assert files.open_image(tmp_path / "deep.png").size == (8, 256), "a 16-bit photo is turned as well"


def test_broken_and_missing_images_are_named(tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot decode image .*x\.png"):
        files.open_image(tmp_path / "x.png")
    with pytest.raises(FileNotFoundError, match=r"y\.png"):
        files.open_image(tmp_path / "y.png")


# ----------------------------------------------------------------------------------------------------------- what is data
HIDDEN = ("._a.png", ".DS_Store", "Thumbs.db", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/b.png")


def picture(path, colour=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(path, format="PNG")


def test_hidden_files_are_no_data_and_no_class(tmp_path):
    for name in ("cat/a.png", "dog/B.PNG"):
        picture(tmp_path / name)
        for hidden in HIDDEN:
            picture((tmp_path / name).parent / hidden)
    for hidden in HIDDEN:
        picture(tmp_path / hidden)
    assert [p.name for p in files.find_images(tmp_path)] == ["a.png", "B.PNG"]
    data = image_folder(tmp_path)
    assert data.classes == ["cat", "dog"] and len(data) == 2
    report = check("imagefolder", tmp_path)
    assert not report.problems and any("2 images, 2 classes" in line for line in report.lines), report.lines


def test_images_takes_files_folders_and_lists_and_skips_what_is_no_image(tmp_path):
    picture(tmp_path / "b/2.png")
    picture(tmp_path / "b/1.jpeg")
    (tmp_path / "b/notes.txt").write_text("x")
    picture(tmp_path / "scan")  # an image without an ending, named by itself
    assert [p.name for p in files.find_images(tmp_path / "b")] == ["1.jpeg", "2.png"]
    assert files.find_images(str(tmp_path / "scan")) == [tmp_path / "scan"]
    both = files.find_images([str(tmp_path / "b"), str(tmp_path / "b/2.png"), str(tmp_path / "b/notes.txt")])
    assert [p.name for p in both] == ["1.jpeg", "2.png"], "each once, in the order asked for"
    (tmp_path / "empty").mkdir()
    for images, error in ((tmp_path / "empty", ValueError), (tmp_path / "gone", FileNotFoundError), (None, ValueError)):
        with pytest.raises(error, match="images=|no image in"):
            files.find_images(images)


def test_a_linked_folder_is_followed(tmp_path):
    picture(tmp_path / "real/a.png")
    (tmp_path / "in").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "in/link")
    assert len(files.find_images(tmp_path / "in")) == 1


# ----------------------------------------------------------------------------------------------------------------- lists
LISTS = {
    "l.txt": "my cat.png 0\n",
    "l.csv": "path,label\nmy cat.png,0\n",
    "l.json": json.dumps({"annotations": [{"fpath": "my cat.png", "category_id": 0}], "num_classes": 1}),
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_of_any_editor_read_alike(tmp_path, name, encoding, end):
    picture(tmp_path / "my cat.png")
    (tmp_path / name).write_bytes(LISTS[name].replace("\n", end).encode(encoding))
    data = image_list(tmp_path / name, tmp_path)
    assert data.targets == [0] and data.paths == [tmp_path / "my cat.png"]
    assert not check("list", tmp_path).problems


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_another_encoding_names_the_file(tmp_path, name, encoding):
    (tmp_path / name).write_bytes(LISTS[name].replace("cat", "kätzchen").replace("\\u00e4", "ä").encode(encoding))
    with pytest.raises((ValueError, FileNotFoundError), match=name.replace(".", r"\.")):
        image_list(tmp_path / name, tmp_path)
    assert check("list", tmp_path).problems


@pytest.mark.parametrize("label", ["nan", "3,5", "", "n/a", "-100", "1.5", "inf", "2"])
def test_a_label_that_is_none_names_file_and_line(tmp_path, label):
    picture(tmp_path / "a.png")
    rows = [{"fpath": "a.png", "category_id": 0}, {"fpath": "b.png", "category_id": label}]
    (tmp_path / "l.json").write_text(json.dumps({"annotations": rows, "num_classes": 2}))
    with pytest.raises(ValueError, match=r"l\.json|labels span"):
        image_list(tmp_path / "l.json", tmp_path)


def test_two_labels_for_one_image_are_an_error_and_the_same_twice_is_not(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "l.txt").write_text("a.png 0\na.png 1\n")
    with pytest.raises(ValueError, match=r"a\.png has the labels 0 and 1"):
        image_list(tmp_path / "l.txt", tmp_path)
    (tmp_path / "l.txt").write_text("a.png 1\na.png 1\n")
    assert len(image_list(tmp_path / "l.txt", tmp_path)) == 2


def test_tables_with_semicolons_and_numbers_with_a_comma(tmp_path):
    (tmp_path / "t.csv").write_text("path;mos\n\na.png;3,5\n")
    assert files.read_table(tmp_path / "t.csv") == [(1, ["path", "mos"]), (3, ["a.png", "3,5"])]
    for text in ("3,5", "nan", "inf", "", "n/a", None):
        with pytest.raises(ValueError, match=r"t\.csv, line 3"):
            files.number(text, "t.csv, line 3")
    assert files.number("3.5", "x", low=0, high=5) == 3.5
    with pytest.raises(ValueError, match="from 0 to 5"):
        files.number(7, "x", low=0, high=5)


# ----------------------------------------------------------------------------------------------------------- annotations
def coco(root, **changes):
    picture(root / "s/a.png")
    document = {
        "images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 8}],
        "categories": [{"id": 1, "name": "x"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4]}],
    }
    for key, value in changes.items():
        document[key] = value(document[key]) if callable(value) else value
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations/instances_s.json").write_text(json.dumps(document), encoding="utf-8-sig")
    return root


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_repeated_ids_are_named(tmp_path, key):
    coco(tmp_path, **{key: lambda rows: rows * 2})
    with pytest.raises(ValueError, match=rf"instances_s\.json: {key} with one id: 1 stands there twice"):
        coco_detection(tmp_path, "s")
    assert check("coco", tmp_path).problems


@pytest.mark.parametrize("size", [{}, {"width": None, "height": None}, {"width": 0, "height": 0}])
def test_sizes_that_are_missing_are_read_from_the_image(tmp_path, size):
    coco(tmp_path, images=[{"id": 1, "file_name": "a.png", **size}])
    assert coco_detection(tmp_path, "s")[0][1]["size"].tolist() == [8, 8]
    assert not check("coco", tmp_path).problems


def test_a_wrong_size_is_named_by_loader_and_checker(tmp_path):
    coco(tmp_path, images=[{"id": 1, "file_name": "a.png", "width": 9, "height": 8}])
    with pytest.raises(ValueError, match=r"a\.png is 8x8.*annotated as 8x9"):
        coco_detection(tmp_path, "s")[0]
    from common.data.check import Options

    assert "a.png is 8x8" in check("coco", tmp_path, Options(deep=True)).problems[0]


def test_null_flags_and_boxes_outside(tmp_path):
    rows = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [6, 6, 10, 10], "area": None, "iscrowd": None},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [20, 20, 5, 5]},
    ]
    coco(tmp_path, annotations=rows)
    data = coco_detection(tmp_path, "s")
    target = data[0][1]
    assert target["boxes"].tolist() == [[6, 6, 8, 8]] and target["area"].tolist() == [100] and data.dropped == 1


def voc(root, stem="a", end="jpg", difficult="<difficult>0</difficult>", split=None):
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox>"
    size = "<size><width>8</width><height>8</height></size>"
    xml = f"<annotation>{size}<object><name>dog</name>{difficult}{box}</object></annotation>"
    (root / f"Annotations/{stem}.xml").write_text(xml)
    (root / "ImageSets/Main/train.txt").write_bytes((split or f"{stem}\n").encode())
    picture(root / f"JPEGImages/{stem}.{end}")
    return root


@pytest.mark.parametrize(
    ("stem", "end", "split"),
    [("my dog", "jpg", None), ("a", "PNG", None), ("a", "bmp", "\ufeffa\r\n"), ("a.b", "JPG", None), ("a", "jpg", "a  1\n"),
     ("ünder", "jpg", None), ("a", "jpg", "a.jpg\n")],
)  # fmt: skip
def test_voc_names_of_labelling_tools(tmp_path, stem, end, split):
    assert len(voc_detection(voc(tmp_path, stem, end, split=split), "train")[0][1]["boxes"]) == 1
    assert not check("voc", tmp_path).problems


@pytest.mark.parametrize(
    ("difficult", "flag"),
    [("", 0), ("<difficult/>", 0), ("<difficult>Unspecified</difficult>", 0), ("<difficult>1</difficult>", 1)],
)
def test_difficult_of_labelling_tools(tmp_path, difficult, flag):
    assert voc_detection(voc(tmp_path, difficult=difficult), "train")[0][1]["difficult"].tolist() == [flag]


def test_an_image_listed_twice_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"train\.txt: a is listed twice"):
        voc_detection(voc(tmp_path, split="a\na\n"), "train")
    assert "listed twice" in check("voc", tmp_path).problems[0]


# -------------------------------------------------------------------------------------------------------- identity, output
def test_identity_is_of_the_images_not_of_their_place(tmp_path):
    for root in ("one", "two", "other"):
        picture(tmp_path / root / "train/cat/a.png")
        picture(tmp_path / root / f"train/dog/{'b' if root != 'other' else 'c'}.png")
    found = [
        files.identity("folder", files.images_below(tmp_path / r), root=tmp_path / r) for r in ("one", "two", "other")
    ]
    assert found[0] == found[1] != found[2] and found[0]["images"] == 2
    (tmp_path / "two/train/cat/a.png").write_bytes(b"another size")
    assert files.identity("folder", files.images_below(tmp_path / "two"), root=tmp_path / "two") != found[0]
    a, b = torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)
    assert files.tensor_identity("m", a, b) != files.tensor_identity("m", a, b + 1)


def test_no_two_inputs_share_an_output_name(tmp_path):
    inputs = [tmp_path / n for n in ("a/1.png", "b/1.png", "b/1.jpg", "b/c/1.png", "b__c/1.png")]
    names = files.output_names(inputs)
    assert len(set(names.values())) == len(inputs) and names[inputs[0]] == "a__1" and names[inputs[2]] == "b__1_jpg"


def test_a_stream_goes_on_after_a_broken_file_and_ends_with_status_1(tmp_path, capsys):
    for i in range(5):
        picture(tmp_path / f"{i}.png", 40 * i)
    (tmp_path / "2.png").write_bytes(b"broken")
    stream = files.ImageStream(
        files.find_images(tmp_path), lambda im: torch.tensor(im.getpixel((0, 0))[0]), batch_size=2
    )
    assert [(p.name, v) for paths, values in stream for p, v in zip(paths, values.tolist(), strict=True)] == [
        ("0.png", 0), ("1.png", 40), ("3.png", 120), ("4.png", 160),
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        stream.finish()
    assert stopped.value.code == 1 and "2.png" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_a_table_is_whole_or_not_there(tmp_path, ending):
    out = tmp_path / f"new/t.{ending}"
    with files.Table(out) as table:
        assert not out.exists()
        table.write({"path": tmp_path / 'a,"b".png', "p": 0.5})
        table.write({"path": "c", "p": 1})
    rows = json.loads(out.read_text()) if ending == "json" else list(csv.DictReader(out.open()))
    assert [r["path"] for r in rows] == [str(tmp_path / 'a,"b".png'), "c"]
    with pytest.raises(RuntimeError), files.Table(out) as table:
        raise RuntimeError
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    with pytest.raises(ValueError, match=r"\.csv or \.json"):
        files.Table(tmp_path / "t.txt")


def test_the_most_probable_classes_come_first(tmp_path):
    logits = {"a.png": [0.0, 2.0, 1.0], "b.png": [3.0, 0.0, 0.0]}
    stream = [([Path(name)], torch.tensor([row])) for name, row in logits.items()]
    table = files.write_ranked(stream, lambda images: images, tmp_path / "p.csv", ["x", "y", "z"], 2)
    rows = [line.split(",") for line in table.out.read_text().splitlines()]
    assert rows[0] == ["path", "label", "probability"] and table.rows == 4
    assert [row[:2] for row in rows[1:]] == [["a.png", "y"], ["a.png", "z"], ["b.png", "x"], ["b.png", "y"]]
    expected = torch.tensor(logits["a.png"]).softmax(0)
    assert [float(row[2]) for row in rows[1:3]] == pytest.approx([float(expected[1]), float(expected[2])], abs=1e-6)
