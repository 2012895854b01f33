"""Files as people have them."""

import numpy as np
import pytest
import torch
from PIL import Image

from dcp_nas.data import build_data
from dcp_nas.search_space import GENOTYPES, Genotype
from dcp_nas.tests.layouts import write_class_folders
from dcp_nas.transfer.reidentification import market1501


def folder(root, **more):
    return build_data(name="folder", root=str(root), size=32, seed=0, workers=0, **more)


# ---------------------------------------------------------------------------------------------------------------- images
def test_hidden_files_and_folders_are_no_images_and_no_classes(tmp_path):
    root = write_class_folders(tmp_path)
    for split in ("train", "val"):
        for name in (".ipynb_checkpoints", "__MACOSX"):
            (root / split / name).mkdir()
            Image.new("RGB", (9, 9)).save(root / split / name / "x.png")
        (root / split / "a/._0.png").write_bytes(b"junk")
        (root / split / "a/Thumbs.db").write_bytes(b"junk")
    data = folder(root)
    assert data.names == ("a", "b") and len(data) == 16 and len(data.test) == 4


def test_a_class_with_blanks_umlauts_and_any_ending_keeps_its_name(tmp_path):
    root = write_class_folders(tmp_path, ("Zürich 1=2", "a,b"))
    Image.new("CMYK", (40, 40)).save(root / "train/a,b/x y.JPG")
    Image.fromarray(np.linspace(0, 65535, 1600).reshape(40, 40).astype(np.uint16)).save(root / "val/a,b/deep.png")
    data = folder(root)
    assert set(data.names) == {"Zürich 1=2", "a,b"} and len(data) == 17
    deep = next(data.test[i][0] for i in range(len(data.test)) if "deep" in str(data.test.samples[i][0]))
    assert len(deep.unique()) > 100, "16 bits are scaled, not cut to black and white"


def test_the_identity_of_a_folder_is_what_it_holds_and_not_where_it_lies(tmp_path):
    a, b = (write_class_folders(tmp_path / name) for name in ("one place", "another"))
    assert folder(a).source == folder(b).source
    (b / "train/a/7.png").unlink()
    assert folder(a).source != folder(b).source and folder(b).source["images"] == 15


def test_missing_or_unequal_classes_name_them(tmp_path):
    root = write_class_folders(tmp_path)
    Image.new("RGB", (9, 9)).save((root / "val/b").rename(root / "val/c") / "more.png")
    with pytest.raises(ValueError, match="different classes: b, c"):
        folder(root)
    with pytest.raises(FileNotFoundError, match="no folder"):
        folder(root, val="nothing")
    (root / "train/empty").mkdir()
    with pytest.raises((FileNotFoundError, ValueError), match="empty"):
        folder(root)


# ------------------------------------------------------------------------------------------------------------- genotypes
def test_a_genotype_is_read_with_a_byte_order_mark_and_windows_ends(tmp_path):
    GENOTYPES["CHL_I6"].save(tmp_path / "g.json", found={"arm": "x"})
    text = (tmp_path / "g.json").read_text().replace("\n", "\r\n")
    (tmp_path / "w.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert Genotype.load(tmp_path / "w.json") == GENOTYPES["CHL_I6"]
    (tmp_path / "u.json").write_bytes(text.encode("utf-16"))
    with pytest.raises(ValueError, match=r"u\.json is UTF-16"):
        Genotype.load(tmp_path / "u.json")
    (tmp_path / "cut.json").write_text(text[:80])
    with pytest.raises(ValueError, match=r"cut\.json, line \d+, column \d+"):
        Genotype.load(tmp_path / "cut.json")


# ------------------------------------------------------------------------------------------------------------ Market-1501
def test_people_with_jpeg_endings_hidden_files_and_a_name_without_a_camera(tmp_path):
    for name in ("bounding_box_train", "query", "bounding_box_test"):
        (tmp_path / name).mkdir()
        for k, ending in ((2, "jpg"), (7, "JPG"), (9, "png")):
            Image.new("RGB", (8, 16)).save(tmp_path / name / f"{k:04d}_c{k % 3 + 1}s1_000001_00.{ending}")
        (tmp_path / name / "._0002_c1s1_000451_03.jpg").write_bytes(b"junk")
        (tmp_path / name / "Thumbs.db").write_bytes(b"junk")
    train, _, gallery = market1501(tmp_path)
    assert train.ids.tolist() == [2, 7, 9] and gallery.cameras.tolist() == [3, 2, 1]
    Image.new("RGB", (8, 16)).save(tmp_path / "query/person.jpg")
    with pytest.raises(ValueError, match=r"person\.jpg"):
        market1501(tmp_path)


def test_equal_seeds_give_equal_digits_and_the_noise_is_the_seeds():
    a, b, c = (build_data(name="digits", seed=s, train=50).tensors[0] for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
