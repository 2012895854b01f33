import json
import runpy
import sys

import pytest
from PIL import Image

from common.data.check import CHECKS, LAYOUTS, Options, check, main
from common.data.shapes import coco_to_voc, shape_scenes


def _picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        for name, n in (("ant", 3), ("bee", 2)):
            for i in range(n):
                _picture(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_every_check_has_a_layout():
    assert CHECKS.keys() == LAYOUTS.keys()


def test_missing_root_and_unknown_set(tmp_path, capsys):
    assert main(["mnist", str(tmp_path / "no")]) == 1
    assert "no folder" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["mnits", str(tmp_path)])
    assert stop.value.code == 2
    with pytest.raises(ValueError, match="choose from"):
        check("mnits", tmp_path)


def test_known_set_lists_every_missing_file(tmp_path):
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz").write_bytes(b"")
    report = check("mnist", tmp_path)
    assert len(report.problems) == 4
    assert "gunzip -k" in report.problems[0] and "gunzip" not in report.problems[1]


def test_image_folder_counts(folder, capsys):
    assert main(["imagefolder", str(folder), "--deep"]) == 0
    out = capsys.readouterr().out
    assert "train: 5 images, 2 classes" in out and "ant 3, bee 2" in out and out.endswith("usable\n")


def test_image_folder_problems(folder):
    (folder / "train" / "bee" / "0.png").write_bytes(b"broken")
    assert not check("imagefolder", folder).problems  # found only when every image is opened
    assert any("0.png" in p for p in check("imagefolder", folder, Options(deep=True)).problems)
    for file in (folder / "val" / "bee").iterdir():
        file.unlink()
    assert any("no image in class folder" in p for p in check("imagefolder", folder).problems)
    (folder / "val" / "bee").rmdir()
    assert any("differ in classes" in p for p in check("imagefolder", folder).problems)


def test_only_ten_problems_are_shown(tmp_path, capsys):
    _picture(tmp_path / "0.png")
    (tmp_path / "l.txt").write_text("".join(f"{i}.png 0\n" for i in range(25)))
    assert main(["list", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "24 problem(s), first 10" in out and "10.png" in out and "11.png" not in out
    assert "expected layout" in out and "NOT USABLE" in out


def test_list_named_elsewhere(folder, tmp_path):
    where = tmp_path / "lists.csv"
    where.write_text("/old/train/ant/0.png,0\n/old/train/bee/1.png,1\n")
    report = check("list", folder, Options(lists=[where], strip_prefix="/old/"))
    assert not report.problems and "2 images, 2 classes" in report.lines[1]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no list" in check("list", empty).problems[0]


def test_detection_sets(tmp_path):
    scenes = shape_scenes(6, seed=1, empty=0.0, sizes=(48,))
    scenes.write_coco(tmp_path, "train")
    coco_to_voc(tmp_path, tmp_path / "VOC2007", "train")
    for name in ("coco", "voc"):
        report = check(name, tmp_path, Options(deep=True))
        assert not report.problems
        assert any(line.endswith("train: 6 images, 3 classes") for line in report.lines)
    (tmp_path / "train" / "000002.png").unlink()
    (tmp_path / "VOC2007" / "Annotations" / "000003.xml").write_text("<annotation><object>")
    assert "000002.png" in check("coco", tmp_path).problems[0]
    assert "000003.xml" in check("voc", tmp_path).problems[0]


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"images": [], "annotations": [{}], "categories": []})])
def test_broken_coco_file_is_reported(tmp_path, text):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val").mkdir()
    (tmp_path / "annotations" / "instances_val.json").write_text(text)
    (problem,) = check("coco", tmp_path).problems
    assert "instances_val.json" in problem and (
        "not a COCO instances file" in problem or "not valid JSON" in problem or "no image" in problem
    )


def test_exit_status_of_the_module(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check", "voc", str(tmp_path)])
    monkeypatch.delitem(sys.modules, "common.data.check")  # runpy warns about a module already imported
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("common.data.check", run_name="__main__")
    out = capsys.readouterr().out
    assert stop.value.code == 1 and "no Annotations folder" in out and "NOT USABLE" in out
