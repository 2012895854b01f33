"""Files as people have them: class folders, lists and checkpoints."""

import numpy as np
import pytest
import torch
from PIL import Image

from lifelong.streams import build_stream, class_order, stored
from lifelong.tests.test_streams import picture


def folders(root, test="val", classes=("ant", "bee"), count=2):
    for split in ("train", test):
        for c, name in enumerate(classes):
            for i in range(count):
                picture(root / split / name / f"{i}.png", 50 * c + i)
    return {"name": "folder", "root": str(root), "stored_size": 8, "seed": 0, "tasks": 2}


def test_hidden_files_and_folders_are_no_data_and_no_class(tmp_path):
    options = folders(tmp_path)
    (tmp_path / "train/.ipynb_checkpoints").mkdir()
    (tmp_path / "train/ant/._0.png").write_bytes(b"x")
    (tmp_path / "val/bee/Thumbs.db").write_bytes(b"x")
    (tmp_path / "train/.DS_Store").write_bytes(b"x")
    stream = build_stream(**options)
    assert stream.class_names == ["ant", "bee"] and len(stream.targets["train"]) == 4


def test_an_order_file_of_a_windows_editor(tmp_path):
    (tmp_path / "order.txt").write_bytes(b"\xef\xbb\xbf# comment\r\nbee\r\n\r\nant  \r\n")
    assert class_order(["ant", "bee"], str(tmp_path / "order.txt"), 0) == [1, 0]
    (tmp_path / "latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt, line 1: not UTF-8"):
        class_order(["ant"], str(tmp_path / "latin.txt"), 0)


def test_a_class_name_with_a_number_sign(tmp_path):
    (tmp_path / "order.txt").write_text("c#\nant\n")
    assert class_order(["ant", "c#"], str(tmp_path / "order.txt"), 0) == [1, 0]


def test_16_bit_and_turned_photographs_are_decoded_as_they_are_meant(tmp_path):
    options = folders(tmp_path)
    ramp = np.linspace(0, 65535, 144).astype(np.uint16).reshape(12, 12)
    Image.fromarray(ramp).save(tmp_path / "train/ant/0.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.new("RGB", (20, 20))
    turned.paste((255, 255, 255), (0, 0, 20, 10))
    turned.save(tmp_path / "train/ant/1.png", exif=exif)
    images, _ = build_stream(**options).task("train", 0)
    assert len(images[0].unique()) > 20, "a ramp, not black and white"
    assert images[1, 0, 4, 7] > 200 > 50 > images[1, 0, 4, 0], "the white half is on the right once it is upright"


def test_the_identity_is_of_the_images_and_not_of_the_path(tmp_path):
    a, b = build_stream(**folders(tmp_path / "a")), build_stream(**folders(tmp_path / "b"))
    assert a.source == b.source and a.source["images"] == 8
    picture(tmp_path / "b/train/ant/9.png", 9)
    assert build_stream(**folders(tmp_path / "b")).source != a.source


def cub(base, **change):
    for i in range(1, 5):
        picture(base / f"images/00{i % 2}.bird/{i}.jpg", i)
    files = {
        "images.txt": "".join(f"{i} 00{i % 2}.bird/{i}.jpg\n" for i in range(1, 5)),
        "image_class_labels.txt": "1 1\n2 2\n3 1\n4 2\n",
        "train_test_split.txt": "1 1\n2 1\n3 0\n4 0\n",
        "classes.txt": "1 A\n2 B\n",
    } | change
    for name, text in files.items():
        (base / name).write_text(text)
    return {"name": "cub200", "seed": 0, "root": str(base), "tasks": 2, "stored_size": 8}


@pytest.mark.parametrize(
    ("file", "text", "error"),
    [
        ("image_class_labels.txt", "1 0\n2 2\n3 1\n4 2\n", r"labels\.txt, line 1: label 0"),
        ("image_class_labels.txt", "1 1\n2 3\n3 1\n4 2\n", r"labels\.txt, line 2: label '3'"),
        ("image_class_labels.txt", "1 1\n1 2\n3 1\n4 2\n", r"line 2: id 1 stands there twice"),
        ("image_class_labels.txt", "1 1\n2\n3 1\n4 2\n", r"line 2: no value"),
        ("train_test_split.txt", "1 1\n2 2\n3 0\n4 0\n", r"split\.txt, line 2: '2', expected 1"),
        ("train_test_split.txt", "1 1\n2 1\n3 0\n", r"do not list the same images, e\.g\. id 4"),
        ("images.txt", "1 001.bird/1.jpg\n2 000.bird/x.jpg\n3 001.bird/3.jpg\n4 000.bird/4.jpg\n", r"line 2: no image"),
        ("classes.txt", "1 A\n3 B\n", r"ids must be 1\.\.2"),
        ("classes.txt", "one A\n2 B\n", r"classes\.txt, line 1: label 'one'"),
    ],
)
def test_lists_of_cub200_with_errors_name_file_and_line(file, text, error, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        build_stream(**cub(tmp_path, **{file: text}))


def test_lists_of_cub200_from_windows(tmp_path):
    options = cub(tmp_path)
    for file in tmp_path.glob("*.txt"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert build_stream(**options).class_names == ["A", "B"]


def test_a_grey_or_wide_photograph_is_stored_as_training_stores_it():
    image = Image.new("RGB", (40, 20), (10, 20, 30))
    assert stored(image, 8, 3).shape == (3, 8, 8) and stored(image, 8, 1).shape == (1, 8, 8)


def test_a_half_written_checkpoint_is_named(tmp_path):
    from lifelong.checkpoint import load

    torch.save({"model": torch.zeros(1000)}, tmp_path / "whole.ckpt")
    (tmp_path / "half.ckpt").write_bytes((tmp_path / "whole.ckpt").read_bytes()[:500])
    with pytest.raises(RuntimeError, match=r"half\.ckpt"):
        load(tmp_path / "half.ckpt")
