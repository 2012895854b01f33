"""Files and command lines as people have them; errors are one line and leave nothing."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dcp_nas.data import build_data
from dcp_nas.genotypes import PAPER
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


# ---------------------------------------------------------------------------------------------------------- wrong lines
WRONG = [
    ("train.py", ["train.epochs=abc"], "train.epochs=abc"),
    ("train.py", ["train.epoch=3"], "train.epoch"),
    ("train.py", ["genotype=dcp_nas_xl"], "dcp_nas_l"),
    ("train.py", ["genotype=random", "seed=-1"], "seed=-1"),
    ("train.py", ["force=maybe"], "force=maybe must be true or false"),
    ("train.py", ["genotype=file"], "give exactly one of arm, file, name, draw"),
    ("train.py", ["genotype=file", "genotype.file=/nowhere.json"], "/nowhere.json"),
    ("train.py", ["stage=step2", "genotype=random"], "stage=step2 begins with the weights of step 1"),
    ("train.py", ["data=folder", "data.root=/nowhere"], "/nowhere"),
    ("train.py", ["data.root=/nowhere"], "digits is embedded"),
    ("train.py", ["genotype=random", "teacher.weights=/nowhere.ckpt"], "no teacher at /nowhere.ckpt"),
    ("train.py", ["genotype=random", "optim.lr=-1"], "optim.lr=-1"),
    ("search.py", ["method=dcp"], "dcp_ggn"),
    ("search.py", ["method.lam=many"], "method.lam=many must be a finite number"),
    ("search.py", ["search.shares=[1,1]"], "add up to at most 1"),
    ("search.py", ["experiment=search_folder", "data.root=/nowhere"], "/nowhere"),
    ("search.py", ["+method.lamda=1"], "lamda"),
    ("reid.py", ["stage=step2"], "stage=step2 begins with the weights of step 1"),
    ("reid.py", ["data.size=[64]"], "[height, width]"),
    ("reid.py", ["data.size=[60,32]"], "multiples of 32"),
    ("detect.py", ["detector.max_size=50"], "max_size=50"),
    ("detect.py", ["data.root=/nowhere"], "scenes is embedded"),
    ("mechanism.py", ["network=ternary"], "network='ternary', allowed: real, binary"),
    ("cost.py", ["repeats=0"], "repeats=0"),
    ("average.py", ["of=[nothing]"], "no run in"),
    ("average.py", [], "name at least one arm"),
    ("evaluate.py", [], "weights"),
    ("evaluate.py", ["weights=/nowhere.ckpt"], "no checkpoint at /nowhere.ckpt"),
    ("predict.py", ["weights=/nowhere.ckpt", "images=x"], "no checkpoint at /nowhere.ckpt"),
    ("export.py", ["weights=/nowhere.ckpt"], "no checkpoint at /nowhere.ckpt"),
]
# Every line in a fork of one process that has imported what takes long; answers [[exit status, what it said], ...].
DRIVER = """
import json, os, runpy, sys, tempfile
import torch, hydra, timm
import dcp_nas.train, dcp_nas.search, dcp_nas.reid, dcp_nas.detect, dcp_nas.export
answers = []
for name, overrides in json.load(sys.stdin):
    with tempfile.TemporaryFile("w+") as said:
        if (child := os.fork()) == 0:
            os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
            os.environ.pop("HYDRA_FULL_ERROR", None)
            sys.argv = [name, *overrides]
            status = 0
            try:
                runpy.run_path(name, run_name="__main__")
            except SystemExit as end:
                status = end.code or 0
            except BaseException as error:
                print("Traceback", type(error).__name__, error)
                status = 2
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        answers.append([status, said.read()])
print(json.dumps(answers))
"""


def test_wrong_command_lines_give_one_clear_line_and_leave_nothing(tmp_path):
    rooted = ("train.py", "search.py", "reid.py", "detect.py", "mechanism.py", "cost.py", "average.py")
    lines = [[n, [*o, f"run_root={tmp_path / 'runs'}"] if n in rooted else [*o]] for n, o, _ in WRONG]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], input=json.dumps(lines), capture_output=True, text=True, cwd=PAPER,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PAPER.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wrong = []
    for (name, overrides, expected), (status, said) in zip(
        WRONG, json.loads(done.stdout.splitlines()[-1]), strict=True
    ):
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        if status != 1 or len(errors) != 1 or expected not in errors[0] or "Traceback" in said:
            wrong.append(f"{name} {' '.join(overrides)}: {status} {said[-400:]}")
    assert not wrong, "\n".join(wrong)
    assert not list(tmp_path.iterdir()), "something was left behind"


def test_equal_seeds_give_equal_digits_and_the_noise_is_the_seeds():
    a, b, c = (build_data(name="digits", seed=s, train=50).tensors[0] for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
