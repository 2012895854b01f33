"""Every layout written in miniature: labels arrive in our order, and what is wrong is named."""

import csv

import pytest
import torch
from PIL import Image

from ap_fer import data as data_module
from ap_fer.data import FaceFiles, build_data, check_counts
from ap_fer.expressions import (
    AFFECTNET,
    EXPRESSIONS,
    EXPW,
    FERPLUS,
    RAF_DB,
    RAF_DB_COUNTS,
    expression,
    imbalanced_counts,
    our_label,
    repeat_factors,
    repeated_indices,
)  # fmt: skip
from ap_fer.layouts import Labelled, read_split
from ap_fer.tests.helpers import config, write_image
from ap_fer.transforms import MEAN, STD, UniformErasing, build_transforms
from common.data.batches import Plan
from common.data.check import main as check_set
from common.data.faces import expression_faces


# ------------------------------------------------------------------------------------------------------------- labels
def test_the_class_order_of_the_released_model():
    assert EXPRESSIONS == ("anger", "disgust", "fear", "sadness", "happiness", "surprise", "neutral", "contempt")
    assert [our_label(RAF_DB, label - 1) for label in range(1, 8)] == [5, 2, 1, 4, 3, 0, 6]
    assert [our_label(AFFECTNET, i) for i in range(8)] == [6, 4, 3, 5, 2, 1, 0, 7]
    assert [our_label(EXPW, i) for i in range(7)] == [0, 1, 2, 4, 3, 5, 6]
    assert sorted(our_label(FERPLUS, i) for i in range(8)) == list(range(8))
    assert [expression(n) for n in ("Happy", "0_Neutral", "SURPRISED", "Sadness", "bored")] == [4, 6, 5, 3, None]
    with pytest.raises(ValueError, match=r"label 7 outside 0..6"):
        our_label(RAF_DB, 7)


def test_repeat_factors_of_raf_db():
    assert repeat_factors((1290, 281, 717, 4772, 1982, 705, 2524)) == [2, 3, 2, 1, 1, 2, 1]  # in RAF-DB's own order
    factors = repeat_factors(RAF_DB_COUNTS)
    assert sum(RAF_DB_COUNTS) == 12_271 and sum(f * n for f, n in zip(factors, RAF_DB_COUNTS, strict=True)) == 15_545
    assert repeated_indices([0, 1, 0], [1, 3]) == [0, 1, 1, 1, 2]
    with pytest.raises(ValueError, match=r"classes \[1\] have no training image"):
        repeat_factors([3, 0])


def test_imbalanced_counts_follow_raf_db():
    counts = imbalanced_counts(1500)
    assert (
        sum(counts) == 1500 and max(abs(c - 1500 * n / 12271) for c, n in zip(counts, RAF_DB_COUNTS, strict=True)) < 1
    )
    assert min(imbalanced_counts(20)) == 1


# ------------------------------------------------------------------------------------------------------------ layouts
def test_raf_db_both_label_files_and_both_image_folders(raf):
    for images in ("aligned", "aligned_224"):
        train, test = (read_split("raf_db", raf, s, images=images) for s in ("train", "test"))
        assert train.targets == [5, 2, 1, 4, 3, 0, 6] * 2 and test.targets == [5, 2, 1, 4, 3, 0, 6]
        assert all(p.is_file() for p in train.paths + test.paths)
    both = raf / "basic/EmoLabel/list_patition_label.txt"
    lines = both.read_text().splitlines()
    both.unlink()
    for split in ("train", "test"):
        rows = [line.replace(".jpg", "_aligned.jpg") for line in lines if line.startswith(split)]
        (both.parent / f"{split}.txt").write_text("\n".join(rows))
    assert read_split("raf_db", raf, "train", images="aligned_224").targets == [5, 2, 1, 4, 3, 0, 6] * 2
    (both.parent / "train.txt").write_text("train_00000.jpg 8\n")
    with pytest.raises(ValueError, match=r"train.txt, line 1: label 7 outside 0..6"):
        read_split("raf_db", raf, "train")
    (both.parent / "train.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"EmoLabel.*Expected RAF-DB .from its authors"):
        read_split("raf_db", raf, "train")


def test_ferplus_takes_the_majority_and_leaves_out_the_rest(tmp_path):
    columns = ["Usage", "Image name", *FERPLUS, "unknown", "NF"]
    votes = {
        "happy": ([0, 8, 1, 0, 0, 0, 0, 1, 0, 0], 4), "contempt": ([1, 0, 0, 0, 0, 0, 0, 9, 0, 0], 7),
        "split": ([5, 5, 0, 0, 0, 0, 0, 0, 0, 0], None), "unknown": ([0, 0, 0, 0, 0, 0, 0, 0, 8, 2], None),
        "noise": ([4, 1, 1, 1, 1, 1, 1, 0, 0, 0], 6),
    }  # fmt: skip
    with (tmp_path / "fer2013new.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for name, (row, _) in votes.items():
            writer.writerow(["Training", f"{name}.png", *row])
            write_image(tmp_path / f"FER2013Train/{name}.png", mode="L", size=(48, 48))
        writer.writerow(["Training", "", *[0] * 10])
        writer.writerow(["PublicTest", "other.png", *votes["happy"][0]])
    found = read_split("ferplus", tmp_path, "train")
    assert {p.stem: t for p, t in zip(found.paths, found.targets, strict=True)} == {
        n: t for n, (_, t) in votes.items() if t is not None
    }
    assert len(found.paths) == 3 and found.listed == 6, "what is left out is listed, too; another Usage is not"
    image, _ = FaceFiles(found, build_transforms("none", size=48)[1])[0]
    assert image.shape == (3, 48, 48), "grey images are converted"


def test_affectnet_expw_and_affwild2(tmp_path):
    a = tmp_path / "affectnet"
    write_image(a / "Manually_Annotated_Images/1/x.jpg")
    (a / "training.csv").write_text("subDirectory_filePath,face_x,expression\n1/x.jpg,0,1\n1/x.jpg,0,7\n1/x.jpg,0,9\n")
    assert read_split("affectnet", a, "train").targets == [4]
    assert read_split("affectnet", a, "train", num_classes=8).targets == [4, 7]
    e = tmp_path / "expw"
    write_image(e / "origin/a.jpg", size=(100, 80))
    rows = [f"{n}.jpg 0 10 20 70 50 30.5 {i}" for i, n in enumerate("abcdefg")] + ["a.jpg 1 0 0 40 40 3.1 3"]
    (e / "label.lst").write_text("\n".join(rows))
    test, train = read_split("expw", e, "test"), None
    assert [p.stem for p in test.paths] == ["a", "e", "a"] and test.targets == [0, 3, 4]
    assert test.boxes[0] == (20, 10, 70, 50), "left, top, right, bottom of a list that says top, left, right, bottom"
    assert FaceFiles(test)[0][0].size == (50, 40)
    write_image(e / "origin/b.jpg")
    train = read_split("expw", e, "train")
    assert {p.stem for p in train.paths}.isdisjoint({p.stem for p in test.paths})
    w = tmp_path / "affwild2"
    for frame in (1, 2, 4):
        write_image(w / f"cropped_aligned/v1/{frame:05d}.jpg")
    (w / "annotations/Train_Set").mkdir(parents=True)
    (w / "annotations/Train_Set/v1.txt").write_text(
        "Neutral,Anger,Disgust,Fear,Happiness,Sadness,Surprise\n0\n4\n1\n-1\n"
    )
    found = read_split("affwild2", w, "train")
    assert [(p.name, t) for p, t in zip(found.paths, found.targets, strict=True)] == [
        ("00001.jpg", 6),
        ("00002.jpg", 4),
    ]
    assert len(read_split("affwild2", w, "train", every=2).paths) == 1


def class_folders(root, names, splits=("train", "val"), n=2):
    for s, split in enumerate(splits):
        for c, name in enumerate(names):
            for i in range(n):
                write_image(root / split / name / f"{i}.png", 100 * s + 10 * c + i)
    return root


SEVEN = ["Angry", "Disgust", "Fear", "Happy", "Neutral", "Sad", "Surprise"]


def test_class_folders_match_by_name_and_say_what_does_not(tmp_path):
    root = class_folders(tmp_path / "ok", SEVEN)
    found = read_split("folder", root, "train")
    assert {p.parent.name: t for p, t in zip(found.paths, found.targets, strict=True)} == dict(
        zip(SEVEN, [0, 1, 2, 4, 6, 3, 5], strict=True)
    )
    with pytest.raises(ValueError, match=r"unknown \['Bored'\], missing \['surprise'\]"):
        read_split("folder", class_folders(tmp_path / "bad", [*SEVEN[:-1], "Bored"]), "train")
    with pytest.raises(ValueError, match="missing .'contempt'."):
        read_split("folder", root, "train", num_classes=8)
    (tmp_path / "ok/val/Fear/0.png").unlink()
    (tmp_path / "ok/val/Fear/1.png").unlink()
    with pytest.raises(ValueError, match=r"class folder .*Fear holds no image"):
        read_split("folder", root, "test")
    with pytest.raises(FileNotFoundError, match="no folder .*train.*Expected train/<class>"):
        read_split("folder", tmp_path, "train")


def test_csv_lists_take_names_and_numbers(tmp_path):
    for name in ("a.png", "b.png"):
        write_image(tmp_path / name)
    (tmp_path / "train.csv").write_text("path,label\na.png,happy\nb.png,0\n")
    assert read_split("csv", tmp_path, "train").targets == [4, 0]
    (tmp_path / "train.csv").write_text("a.png,7\n")
    with pytest.raises(ValueError, match="line 1: label '7'; allowed are anger"):
        read_split("csv", tmp_path, "train")
    (tmp_path / "train.csv").write_text("nowhere.png,0\n")
    with pytest.raises(FileNotFoundError, match=r"first train image is not at .*nowhere\.png"):
        read_split("csv", tmp_path, "train")
    (tmp_path / "train.csv").write_text("path,label\n")
    with pytest.raises(ValueError, match="the train split names no image"):
        read_split("csv", tmp_path, "train")


# ------------------------------------------------------------------------------------------------------------- images
def test_grey_and_rgba_images_are_converted_tiny_and_broken_ones_named(tmp_path):
    transform = build_transforms("raf", size=32)[1]
    paths = [
        write_image(tmp_path / "grey.png", mode="L"), write_image(tmp_path / "alpha.png", mode="RGBA"),
        write_image(tmp_path / "tiny.png", size=(40, 20)), tmp_path / "broken.png",
    ]  # fmt: skip
    paths[-1].write_bytes(b"no image")
    files = FaceFiles(Labelled(paths, [0] * 4), transform)
    assert files[0][0].shape == files[1][0].shape == (3, 32, 32)
    with pytest.raises(ValueError, match=r"tiny\.png: an image of 40 x 20 pixels is too small"):
        files[2]
    with pytest.raises(ValueError, match=r"cannot decode image .*broken\.png"):
        files[3]


def test_a_part_of_a_published_set_is_an_error_unless_it_is_meant(raf, capsys):
    with pytest.raises(
        ValueError, match="the train list has 14 images, the published one 12,271; data.partial=true takes"
    ):
        build_data(name="raf_db", seed=0, root=str(raf), size=32, partial=False)
    assert (
        check_set(["ap_fer.raf_db", str(raf), "partial=false"]) == 1
        and "the published one 12,271" in capsys.readouterr().out
    )
    built = build_data(name="raf_db", seed=0, root=str(raf), size=32)
    assert "notice: raf_db under" in capsys.readouterr().out and "published one 12,271" in built.lacks
    assert check_set(["ap_fer.raf_db", str(raf)]) == 0


@pytest.mark.parametrize(("name", "train", "test"), [("raf_db", 12_271, 3_068), ("ferplus", 28_709, 3_589)])
def test_the_published_number_of_images_is_neither_less_nor_more(name, train, test, tmp_path):
    def counted(more_train=0, more_test=0, left_out=0, partial=False):
        n, m = train + more_train - left_out, test + more_test
        found = (
            Labelled([tmp_path] * (n - 9), [0] * (n - 9), left_out=left_out, unusable=9),
            Labelled([tmp_path] * m, [0] * m),
        )
        return check_counts(name, tmp_path, *found, classes=7, partial=partial)

    assert counted() == ""
    assert counted(left_out=2).endswith("2 images are left out"), "the list is whole, what is used of it is not"
    for more, split in (
        ({"more_train": -1}, "train"),
        ({"more_train": 1}, "train"),
        ({"more_test": -1}, "test"),
        ({"more_test": 1}, "test"),
    ):
        with pytest.raises(ValueError, match=f"the {split} list has"):
            counted(**more)
        assert f"the {split} list has" in counted(**more, partial=True)


def test_numbers_that_differ_in_use_are_noticed(tmp_path, capsys):
    def said(name, train, test, classes=7):
        found = (Labelled([tmp_path] * n, [0] * n) for n in (train, test))
        assert check_counts(name, tmp_path, *found, classes=classes, partial=False) == ""
        return capsys.readouterr().out

    assert (
        said("affectnet", 10, 3_500)
        == said("affectnet", 10, 4_000, 8)
        == said("expw", 91_000, 793)
        == said("folder", 1, 1)
        == ""
    )
    assert "3,999 test images here, 4,000 is usual" in said("affectnet", 10, 3_999, 8)
    assert "91,792 faces here, 91,793 is usual" in said("expw", 91_000, 792)


def test_build_data_repeats_rare_classes_and_draws_by_seed_and_epoch(raf):
    built = build_data(name="raf_db", seed=0, root=str(raf), size=32)
    assert built.counts == [2] * 7 and built.names == EXPRESSIONS[:7]
    assert len(built.indices) == 28, "a share of 1/7 is below 0.15: everything twice"
    plan = Plan(len(built.indices), 4, seed=0)
    batches = built.make(plan, torch.device("cpu"))
    a, b, c = (next(iter(batches.epoch(e)))[0][0] for e in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.shape == (4, 3, 32, 32)
    assert torch.equal(built.test[0][0], built.test[0][0])
    with pytest.raises(ValueError, match=r"data\.name='raf', allowed: faces, raf_db"):
        build_data(name="raf", seed=0)
    with pytest.raises(ValueError, match="num_classes=6"):
        build_data(name="raf_db", seed=0, root=str(raf), num_classes=6)


def test_a_class_without_training_images_is_named(raf):
    label = raf / "basic/EmoLabel/list_patition_label.txt"
    label.write_text("\n".join(r for r in label.read_text().splitlines() if not r.endswith(" 3")))
    with pytest.raises(ValueError, match="no training image for disgust"):
        build_data(name="raf_db", seed=0, root=str(raf), size=32)


def test_faces_are_imbalanced_in_training_and_balanced_in_two_tests():
    built = build_data(name="faces", seed=1, size=48, train_images=60, test_images=21, augment="flip")
    assert built.counts == imbalanced_counts(60) and len(built.test) == 42
    labels = torch.stack([built.test[i][1] for i in range(42)])
    assert torch.bincount(labels[built.parts["clean"]]).tolist() == [3] * 7
    assert torch.bincount(labels[built.parts["occluded"]]).tolist() == [3] * 7
    assert built.truth["busy"].shape == (42,) and 5 < built.truth["busy"].sum() < 37
    assert built.truth["contrast"].shape == (42, 48, 48) and built.truth["contrast"].min() >= 0
    hidden = built.truth["occluder"].flatten(1).any(1)
    assert not hidden[built.parts["clean"]].any() and hidden[built.parts["occluded"]].all()
    whole = sum(built.truth[k].int() for k in ("face", "background", "occluder"))
    assert (whole == 1).all()
    again, other = (
        build_data(name="faces", seed=s, size=48, train_images=60, test_images=21, augment="none") for s in (1, 2)
    )
    assert torch.equal(again.test[0][0], built.test[0][0]) and not torch.equal(other.test[0][0], built.test[0][0])
    (trained,), _ = next(iter(again.make(Plan(len(again.indices), 32, seed=0), torch.device("cpu")).epoch(1)))
    tested = torch.stack([again.test[i][0] for i in range(42)])
    for seen in (trained, tested):  # both normalised: undone, they are pictures from black to white
        pixels = seen * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        assert -1e-5 < pixels.min() < 0.1 and 0.9 < pixels.max() < 1 + 1e-5
    assert (
        len(
            build_data(
                name="faces", seed=1, size=48, train_images=60, test_images=7, augment="none", balance=False
            ).indices
        )
        == 60
    )
    assert (
        len(again.indices) == sum(f * n for f, n in zip(repeat_factors(again.counts), again.counts, strict=True)) > 60
    )
    with pytest.raises(ValueError, match=r"augment=flip or none"):
        build_data(name="faces", seed=1, size=48, augment="raf")
    assert data_module.normalise(torch.full((1, 3, 1, 1), 0.5))[0, 0, 0, 0] == pytest.approx((0.5 - 0.485) / 0.229)


# --------------------------------------------------------------------------------------------------------- transforms
def test_erasing_is_uniform_in_aspect_and_area():
    torch.manual_seed(0)
    erase, ratios, areas = UniformErasing(p=1.0), [], []
    for _ in range(400):
        hole = erase(torch.full((1, 100, 100), 9.0))[0] != 9.0
        rows, columns = hole.any(1).sum().item(), hole.any(0).sum().item()
        ratios.append(rows / columns)
        areas.append(rows * columns / 1e4)
    assert min(ratios) > 0.28 and max(ratios) < 3.5 and min(areas) > 0.015 and max(areas) < 0.35
    assert 1.6 < sum(ratios) / 400 < 2.0, "uniform in (.3, 3.3) has mean 1.8, log-uniform 1.25"
    assert 0.16 < sum(areas) / 400 < 0.19
    assert sum(bool((UniformErasing()(torch.full((1, 20, 20), 9.0)) != 9).any()) for _ in range(200)) in range(70, 131)


def test_the_values_of_the_recipe():
    """Rotation, crop and erasing as published; the noise is standard normal on normalised images."""
    train, _ = build_transforms("raf", size=32)
    turned, crop, flip, grey, jitter, *_, erase = train.transforms
    assert turned.p == 0.5 and list(turned.transforms[0].degrees) == [-6, 6] and turned.transforms[0].fill == 0
    assert (tuple(crop.scale), tuple(crop.ratio), tuple(crop.size)) == ((0.8, 1), (1, 1), (32, 32))
    assert flip.p == 0.5 and grey.p == 0.2 and jitter.p == 0.8
    j = jitter.transforms[0]
    assert [tuple(round(v, 6) for v in r) for r in (j.brightness, j.contrast, j.saturation, j.hue)] == [
        (0.6, 1.4)
    ] * 3 + [(-0.1, 0.1)]
    assert (erase.p, tuple(erase.scale), tuple(erase.ratio)) == (0.5, (0.02, 0.33), (0.3, 3.3))
    torch.manual_seed(0)
    filled = torch.cat([x[x != 9] for x in (UniformErasing(p=1.0)(torch.full((3, 64, 64), 9.0)) for _ in range(30))])
    assert abs(filled.mean()) < 0.05 and abs(filled.std() - 1) < 0.05


def test_the_recipe_trains_with_augmentation_and_tests_without():
    train, test = build_transforms("raf", size=32)
    image = Image.new("RGB", (40, 40), (200, 100, 50))
    assert train(image).shape == test(image).shape == (3, 32, 32)
    assert torch.equal(test(image), test(image)) and not all(torch.equal(train(image), train(image)) for _ in range(5))
    pixel = test(image)[:, 5, 5] * torch.tensor(STD) + torch.tensor(MEAN)
    torch.testing.assert_close(pixel, torch.tensor([200, 100, 50]) / 255, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="augment='autoaugment', allowed: raf, flip, none"):
        build_transforms("autoaugment", size=32)


def test_stems_and_arms_and_tests_see_different_faces(monkeypatch):
    """The faces of the stem's pre-training (draw=1), of an arm's training and of the tests come from streams of their own."""
    asked = []

    def recorded(n, **options):
        asked.append((options["split"], options["seed"]))
        return expression_faces(n, **options)

    for cached in (data_module._rendered, data_module._test_faces):
        cached.cache_clear()
    monkeypatch.setattr(data_module, "expression_faces", recorded)
    few = {"seed": 3, "size": 48, "train_images": 14, "test_images": 7, "augment": "none"}
    first, other = (build_data(name="faces", draw=draw, **few) for draw in (0, 1))
    assert [split for split, _ in asked] == ["train", "test", "test", "train"] and len(set(asked)) == 4
    assert torch.equal(first.test[0][0], other.test[0][0]), "the tests are those of the seed"
    for method in ("face_net", "stem"):
        assert config("config", f"method={method}", "arm=x").data.draw == 1 != config("config", "arm=x").data.draw
