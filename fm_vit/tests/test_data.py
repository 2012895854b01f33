"""Lists in both formats, frames of unequal number, polarity, subjects, depth images, and identical geometry in all modalities."""

import numpy as np
import pytest
import torch
from PIL import Image

from fm_vit.data import build_data
from fm_vit.protocols import check_splits, read_list
from fm_vit.tests.helpers import config, picture, write_triplets, write_videos
from fm_vit.triplets import Triplets, geometry, read_frame, silhouette, unpack

NAMES = ["rgb", "depth", "ir"]
FOLDERS = {"rgb": "color", "depth": "depth", "ir": "ir"}


def triplets(root, split="train", **options):
    return read_list(root / f"{split}_list.txt", root, **{"modalities": NAMES, "live_label": 1, **options})


def videos(root, split="train", **options):
    base = {"modalities": NAMES, "live_label": 0, "kind": "videos", "folders": FOLDERS}
    return read_list(root / f"{split}_list.txt", root, **{**base, **options})


def test_triplet_rows(tmp_path):
    write_triplets(tmp_path)
    frames = triplets(tmp_path, subject=r"(CLKJ_AS\d+)", video=r"(.+)/color/")
    assert frames.counts() == {"frames": 16, "live": 8, "attack": 8, "videos": 8}
    assert (
        frames.paths[0]["ir"].parts[-2:] == ("ir", "0.png")
        and frames.live[0]
        and frames.species[:3] == ["live", "live", None]
    )
    assert set(frames.subject) == {f"CLKJ_AS0{s:03d}" for s in range(4)}
    two = triplets(tmp_path, modalities=["ir"])
    assert [*two.paths[0]] == ["ir"]


def test_polarity_is_explicit_and_asserted(tmp_path):
    write_triplets(tmp_path, frames=1)
    rows = (tmp_path / "train_list.txt").read_text().splitlines()
    (tmp_path / "train_list.txt").write_text("\n".join(rows[:-1]) + "\n")  # one attack less
    right = {"live": 4, "attack": 3}
    assert triplets(tmp_path, expected=right).counts() == right | {"frames": 7}
    with pytest.raises(ValueError, match="check the polarity"):
        triplets(tmp_path, expected=right, live_label=0)
    with pytest.raises(ValueError, match="live_label=2"):
        triplets(tmp_path, live_label=2)


def test_video_lists_join_frames_by_number(tmp_path):
    write_videos(tmp_path)
    frames = videos(tmp_path, species=r"_(\d)/", subject=r"(AF-\d+)", species_names={"4": "screen"})
    assert frames.counts() == {
        "frames": 10,
        "live": 6,
        "attack": 4,
        "videos": 4,
    }  # an attack's third frame has no infrared
    assert frames.dropped["frame without its counterpart"] == 2
    assert set(frames.species) == {"live", "screen"} and set(frames.subject) == {f"AF-00{s}" for s in range(4)}
    assert all(len({p.stem for p in paths.values()}) == 1 for paths in frames.paths)
    assert videos(tmp_path, every=3).counts() == {"frames": 4, "live": 2, "attack": 2, "videos": 4}
    kept = videos(tmp_path, exclude=["1_000_1_1_1"])
    assert kept.dropped["excluded"] == 1 and kept.counts()["live"] == 3


def test_bad_lists_are_named(tmp_path):
    write_triplets(tmp_path, frames=1)
    good = (tmp_path / "train_list.txt").read_text()

    def with_list(text):
        (tmp_path / "train_list.txt").write_text(text)
        return triplets(tmp_path)

    for text, error, message in (
        (good.replace(" 1\n", " 3\n", 1), ValueError, r"line 1: label '3', expected 0 \.\. 1"),
        ("a.png 1\n", ValueError, "expected 3 paths"),
        ("", ValueError, "lists no frame"),
        ("x/1.png y/1.png z/1.png 1\n", FileNotFoundError, "no frame .*x/1.png"),
    ):
        with pytest.raises(error, match=message):
            with_list(text)
    (tmp_path / "train_list.txt").write_text(good)
    with pytest.raises(ValueError, match="no thermal here"):
        triplets(tmp_path, modalities=["thermal"])
    with pytest.raises(FileNotFoundError, match="no list"):
        triplets(tmp_path, "train2")
    with pytest.raises(ValueError, match="does not match"):
        triplets(tmp_path, subject=r"(XX\d+)")
    write_videos(tmp_path / "v")
    with pytest.raises(ValueError, match="no ir here"):
        videos(tmp_path / "v", folders={"rgb": "color", "depth": "depth"})
    with pytest.raises(FileNotFoundError, match="no folder .*nir"):
        videos(tmp_path / "v", folders={**FOLDERS, "ir": "nir"})


def test_subjects_in_two_splits_are_refused(tmp_path):
    write_triplets(tmp_path, frames=1)
    splits = {s: triplets(tmp_path, s, subject=r"(CLKJ_AS\d+)") for s in ("train", "val")}
    check_splits(splits)
    splits["test"] = splits["train"]
    with pytest.raises(ValueError, match="4 subjects are in two splits, e.g. CLKJ_AS0000 in train and test"):
        check_splits(splits)
    unknown = {s: triplets(tmp_path, "train") for s in ("train", "test")}  # without subjects: the frames themselves
    with pytest.raises(ValueError, match="8 frames are in two splits"):
        check_splits(unknown)


def test_frames_of_every_kind(tmp_path):
    picture(tmp_path / "rgb.png", 0)
    picture(tmp_path / "grey.png", 1, mode="L")
    picture(tmp_path / "deep.png", 2, mode="I;16")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "black.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    rgb = read_frame(tmp_path / "rgb.png")
    assert rgb.shape == (3, 30, 26) and 0 < rgb.max() <= 1
    grey = read_frame(tmp_path / "grey.png")
    assert torch.equal(grey[0], grey[2])
    deep = read_frame(tmp_path / "deep.png", modality="depth", depth_max=4000)
    raw = np.asarray(Image.open(tmp_path / "deep.png")).astype(np.float32)
    torch.testing.assert_close(deep[1], torch.from_numpy(raw / 4000))
    infrared = read_frame(tmp_path / "deep.png", modality="ir")  # by the range of its type, as everywhere
    torch.testing.assert_close(infrared[0], torch.from_numpy(raw / 65535), atol=1 / 255, rtol=0)
    for name, message in (("deep", "depth_max"), ("black", "black all over"), ("broken", "cannot decode")):
        with pytest.raises(ValueError, match=f"{name}.png.*{message}|{message}.*{name}.png"):
            read_frame(tmp_path / f"{name}.png", modality="depth")


def test_geometry_is_the_same_in_every_modality_and_colour_is_not(tmp_path):
    """The same picture as all three modalities: depth, whose colour never changes, shows the geometry that all share."""
    ramp = np.broadcast_to(np.linspace(1, 254, 40, dtype=np.uint8)[None, :, None], (40, 40, 3)).copy()
    for m in ("color", "depth", "ir"):
        (tmp_path / m).mkdir()
        Image.fromarray(ramp).save(tmp_path / m / "0.png")
    (tmp_path / "train_list.txt").write_text("color/0.png depth/0.png ir/0.png 1\n")
    frames = triplets(tmp_path)
    samples = Triplets(frames, NAMES, size=24, train=True)
    samples.paint = dict.fromkeys(NAMES, torch.nn.Identity())
    torch.manual_seed(3)
    x, live = samples[0]
    assert live == 1 and x.shape == (9, 24, 24)
    assert torch.equal(x[0:3], x[3:6]) and torch.equal(x[0:3], x[6:9])
    painted = Triplets(frames, NAMES, size=24, train=True)
    torch.manual_seed(3)
    y, _ = painted[0]
    assert torch.equal(y[3:6], x[3:6]) and not torch.equal(y[0:3], x[0:3]) and not torch.equal(y[6:9], x[6:9])
    plain = Triplets(frames, NAMES, size=24, train=False)
    assert torch.equal(plain[0][0], plain[0][0])
    assert isinstance(geometry(24, train=False), torch.nn.Module)


def test_outline_only_shows_nothing_but_the_silhouette(tmp_path):
    x = torch.zeros(3, 4, 4)
    x[1, 1:3] = 0.4
    assert torch.equal(silhouette(x), (x[1:2] > 0).float().expand(3, -1, -1))


def test_unpack_normalises_and_names():
    images = unpack(torch.rand(2, 9, 5, 5), NAMES)
    assert [*images] == NAMES and images["ir"].shape == (2, 3, 5, 5)
    assert torch.equal(unpack(torch.ones(1, 3, 2, 2), ["rgb"])["rgb"], torch.ones(1, 3, 2, 2))
    assert torch.equal(unpack(torch.zeros(1, 3, 2, 2), ["rgb"])["rgb"], -torch.ones(1, 3, 2, 2))


def test_generated_data():
    options = {"name": "faces", "seed": 0, "size": 24, "train": 20, "validation": 12, "test": 16}
    data = build_data(modalities=["rgb", "ir"], **options)
    images, labels = data.splits["train"].samples.tensors
    assert images.shape == (20, 6, 24, 24) and images.dtype == torch.uint8 and torch.equal(images[:, 3], images[:, 5])
    assert (labels.numpy() == 1).tolist() == data.splits["train"].live.tolist()
    subjects = [set(s.subject) for s in data.splits.values()]
    assert not subjects[0] & subjects[2] and not subjects[1] & subjects[2]
    unseen = build_data(modalities=["rgb"], attacks=["print"], test_attacks=["mask"], **options)
    assert {*unseen.splits["train"].species} == {"live", "print"} and {*unseen.splits["test"].species} == {
        "live",
        "mask",
    }
    with pytest.raises(ValueError, match="thermal is not generated"):
        build_data(modalities=["thermal"], **options)
    with pytest.raises(ValueError, match="data.name='x'"):
        build_data(name="x", seed=0)
    with pytest.raises(ValueError, match="these faces are generated"):
        build_data(modalities=["rgb"], root="/data", **options)


def test_lists_need_a_validation_split_and_disjoint_subjects(tmp_path):
    write_triplets(tmp_path, frames=1)
    lists = {"train": "train_list.txt", "validation": "val_list.txt", "test": "test_list.txt"}
    options = {"name": "lists", "seed": 0, "root": str(tmp_path), "modalities": NAMES, "size": 16, "live_label": 1}
    options["columns"] = NAMES
    data = build_data(lists=lists, subject=r"(CLKJ_AS\d+)", **options)
    assert len(data.splits["test"]) == 8 and data.splits["test"].species is None
    with pytest.raises(ValueError, match="no list for validation"):
        build_data(lists={**lists, "validation": None}, **options)
    with pytest.raises(ValueError, match="two splits"):
        build_data(lists={**lists, "test": "train_list.txt"}, **options)
    with pytest.raises(ValueError, match=r"data\.root is not set"):
        build_data(lists=lists, **{**options, "root": None})


def test_the_controls_of_generated_faces():
    """Shuffled: the same faces, as many live ones, other labels, in training only. Outline: the same oval for every sensor."""
    sizes = {"train": 60, "validation": 30, "test": 30}
    plain, shuffled, outline = (
        build_data(seed=0, **config(f"data={name}", *(f"data.{k}={v}" for k, v in sizes.items())).data)
        for name in ("faces", "faces_shuffled", "faces_outline")
    )
    for split in sizes:
        (images, labels), (same, mixed) = (d.splits[split].samples.tensors for d in (plain, shuffled))
        assert torch.equal(images, same) and labels.sum() == mixed.sum()
        assert torch.equal(labels, mixed) == (split != "train")
        assert shuffled.splits[split].live.tolist() == (mixed == 1).tolist()
        drawn, kept = outline.splits[split].samples.tensors
        assert torch.equal(kept, labels) and set(drawn.unique().tolist()) == {0, 255}
        assert (drawn == drawn[:, :1]).all() and 0.1 < (drawn > 0).float().mean() < 0.6
    assert outline.about()["outline_only"] and not plain.about()["outline_only"]
