"""`python -m common.data.check <paper>.<set>`: the checker says 'usable' exactly where the paper's own loader reads."""

import csv

import pytest
from PIL import Image

from ap_fer.data import build_data as faces
from ap_fer.expressions import EXPRESSIONS
from common.data.check import Options, check, main, papers_sets
from dcp_nas.transfer.reidentification import market1501
from fm_vit.check import data_options
from fm_vit.check import read as read_triplets
from iqa_attack.photographs.iqa_sets import read_set
from lifelong.streams import build_stream


def save(path, size=(24, 24), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize(size).convert(mode).save(path)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=" " if path.suffix == ".txt" else ",").writerows(rows)


def raf_db(root):
    rows = [(f"{split}_{k}{c}.jpg", c) for split in ("train", "test") for c in range(1, 8) for k in (0, 1)]
    write(root / "basic/EmoLabel/list_patition_label.txt", rows)
    for name, _ in rows:
        save(root / "basic/Image/aligned_224" / name)


def own_triplets(root):
    for split in ("train", "val", "test"):
        for kind in ("live", "print"):
            for modality in ("rgb", "depth", "ir"):
                for k in range(2):
                    save(
                        root / split / kind / modality / f"{split}{kind}{k}.png",
                        mode="RGB" if modality == "rgb" else "L",
                    )


def opinions(root):
    for k in range(4):
        save(root / f"a/{k}.png", (64, 64))
    write(root / "labels.csv", [("path", "mos"), *[(f"a/{k}.png", 20 * k) for k in range(4)]])


def market(root):
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        for person, camera in ((2, 1), (2, 2), (7, 1)):
            save(root / folder / f"{person:04d}_c{camera}s1_000451_03.jpg", (16, 32))


def birds(root):
    base = root / "CUB_200_2011"
    for i in range(1, 9):
        save(base / f"images/{i % 2}/{i}.jpg")
    write(base / "images.txt", [(i, f"{i % 2}/{i}.jpg") for i in range(1, 9)])
    write(base / "image_class_labels.txt", [(i, 1 + i % 2) for i in range(1, 9)])
    write(base / "train_test_split.txt", [(i, int(i > 4)) for i in range(1, 9)])
    write(base / "classes.txt", [(1, "wren"), (2, "jay")])


def cub(root):
    return build_stream(name="cub200", seed=0, root=str(root), tasks=2, stored_size=16, workers=0)


def drawings(root):
    for c, drawer in ((1, 1), (1, 20), (2, 3), (2, 18)):
        save(root / f"images_background/Greek/character{c:02d}/{c:04d}_{drawer:02d}.png")


def omniglot(root):
    return build_stream(name="omniglot", seed=0, root=str(root), tasks=None, stored_size=16, workers=0)


# set: (make the folder, read it as train.py does, a file whose text is spoilt and how, an image that is taken away, a line)
SETS = {
    "ap_fer.raf_db": (
        raf_db, lambda r: faces(seed=0, **data_options(faces.__code__.co_filename, "raf_db", r, {})),
        ("basic/EmoLabel/list_patition_label.txt", "train_01.jpg 1", "train_01.jpg 9"),
        "basic/Image/aligned_224/train_11.jpg", f"{EXPRESSIONS[0]} 2",
    ),
    "fm_vit.folder": (
        own_triplets, lambda r: list(read_triplets("folder", r)), None, "val/print/depth/*", "validation: 12 images, 2 classes",
    ),
    "iqa_attack.list": (opinions, lambda r: read_set("list", r), ("labels.csv", "20", "n/a"), "a/3.png", "all: 4 images"),
    "dcp_nas.market1501": (
        market, market1501, None, "query/*", "query: 3 images, 2 classes"
    ),
    "lifelong.cub200": (birds, cub, ("CUB_200_2011/image_class_labels.txt", "1 2", "1 0"),
        "CUB_200_2011/images/1/1.jpg", "wren 2"),
    "lifelong.omniglot": (drawings, omniglot, None, "images_background/Greek/character01/*", "test: 2 images, 2 classes"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_a_whole_folder_is_usable_and_counted(name, tmp_path, capsys):
    make, load, _, _, line = SETS[name]
    make(tmp_path)
    load(tmp_path)
    assert main([name, str(tmp_path), "--deep"]) == 0
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("name", SETS)
def test_what_stops_the_loader_stops_the_checker_with_the_same_words(name, tmp_path):
    make, load, spoilt, missing, _ = SETS[name]
    if spoilt:
        make(tmp_path / "spoilt")
        file, before, after = spoilt
        text = (tmp_path / "spoilt" / file).read_text()
        assert before in text
        (tmp_path / "spoilt" / file).write_text(text.replace(before, after, 1))
        with pytest.raises(ValueError) as stopped:
            load(tmp_path / "spoilt")
        assert check(name, tmp_path / "spoilt").problems == [str(stopped.value)]
    make(tmp_path / "gap")
    for image in (tmp_path / "gap").glob(missing):
        image.unlink()
    problems = check(name, tmp_path / "gap").problems
    assert problems and missing.rstrip("/*") in problems[0]
    try:
        load(tmp_path / "gap")
    except (OSError, ValueError) as stopped:
        assert problems == [str(stopped)]
    else:
        assert name == "ap_fer.raf_db", "RAF-DB's other images are looked for when they are read"


@pytest.mark.parametrize("name", SETS)
def test_a_broken_image_is_found_when_every_one_is_opened(name, tmp_path):
    make, _, _, image, _ = SETS[name]
    make(tmp_path)
    image = next(tmp_path.glob(image)).relative_to(tmp_path)
    (tmp_path / image).write_bytes(b"broken")
    assert not check(name, tmp_path).problems
    (problem,) = check(name, tmp_path, Options(deep=True)).problems
    assert str(image) in problem


def test_keys_of_the_configuration_and_names_are_checked(tmp_path, capsys):
    raf_db(tmp_path)
    assert main(["ap_fer.raf_db", str(tmp_path), "images=aligned"]) == 1
    assert "basic/Image/aligned" in capsys.readouterr().out
    assert main(["ap_fer.raf_db", str(tmp_path), "imagess=aligned"]) == 1
    assert "has no key imagess" in capsys.readouterr().out
    assert main(["iqa_attack.list", str(tmp_path), "x=1"]) == 1
    for wrong in (
        ["ap_fer.nothing", str(tmp_path)],
        ["imagefolder", str(tmp_path), "x=1"],
        ["ap_fer.csv", str(tmp_path), "x"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2
    capsys.readouterr()
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in SETS) and papers_sets().keys() >= SETS.keys()
