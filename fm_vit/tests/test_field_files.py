"""Lists, labels, folders and images as people have them, by kind."""

import numpy as np
import pytest
import torch
from PIL import Image

from fm_vit.data import build_data
from fm_vit.protocols import read_folders, read_list
from fm_vit.tests.helpers import config, picture, write_own
from fm_vit.triplets import read_frame

NAMES = ["rgb", "depth", "ir"]
MADE = {"modalities": NAMES, "live_label": 1}


def frame(root, stem, *, ending="png"):
    """One frame in three modalities; its row without a label."""
    names = [f"{stem}/{m}.{ending}" for m in ("color", "depth", "ir")]
    for i, name in enumerate(names):
        picture(root / name, i)
    return " ".join(names)


def listed(root, text, *, encoding="utf-8", name="l.txt", **options):
    (root / name).write_bytes(text.encode(encoding))
    return read_list(root / name, root, **{**MADE, **options})


def dataset(root, name, *overrides):
    cfg = config(f"data={name}", f"data.root={root}", "data.size=16", "data.workers=0", *overrides)
    return build_data(seed=0, **cfg.data)


# ------------------------------------------------------------------------------------------- lists of the publishers
def test_the_public_casia_surf_lists(tmp_path):
    """Subjects CLKJ_AS/BS/CS in training; Val/0000/000037-color.jpg in validation, whose folder is neither subject nor video."""
    rows = {"train": [], "val_private": [], "test_private": []}
    for kind in "ABC":
        for part, label in (("real_part", 1), ("fake_part", 0)):
            clip = f"Training/{part}/CLKJ_{kind}S0137/{'real' if label else '04_en_b'}.rssdk"
            for n in (1, 11):
                names = [f"{clip}/{m}/{n}.jpg" for m in ("color", "depth", "ir")]
                rows["train"].append((names, label))
    for split, top in (("val_private", "Val"), ("test_private", "Testing")):
        for n in range(4):
            rows[split].append(([f"{top}/0000/{n:06d}-{m}.jpg" for m in ("color", "depth", "ir")], n % 2))
    for split, found in rows.items():
        for names, _ in found:
            for i, name in enumerate(names):
                picture(tmp_path / name, i)
        (tmp_path / f"{split}_list.txt").write_text("\r\n".join(f"{' '.join(n)} {y}" for n, y in found))  # Windows ends
    with pytest.raises(ValueError, match="expected {'frames': 29266, 'live': 8942"):
        dataset(tmp_path, "casia_surf")
    data = dataset(tmp_path, "casia_surf", "data.expected=null")
    train, test = data.splits["train"], data.splits["test"]
    assert set(train.subject) == {"CLKJ_AS0137", "CLKJ_BS0137", "CLKJ_CS0137"} and len(set(train.video)) == 6
    assert test.video is None and len(set(test.subject)) == 4 and test.species is None  # nothing is made up
    assert test.live.tolist() == [False, True, False, True]


def test_cefa_lists_of_both_publishers(tmp_path):
    clips = [("train", "AF-120/1_120_1_1_1"), ("train", "AF-120/1_120_3_1_4"), ("dev", "AF-201/1_201_1_1_1"),
             ("dev", "AF-201/1_201_3_1_2"), ("test", "CA-301/2_301_1_1_1"), ("test", "CA-301/2_301_3_1_2")]  # fmt: skip
    author, benchmark = {}, {}
    for split, clip in clips:
        fake = int(not clip.endswith("_1"))
        video = f"CASIA_CeFA/Ethnicity/{clip[:2]}/{clip}"
        for k in (3, 9):
            names = [f"{video}/{m}/{k:04d}.jpg" for m in ("color", "depth", "ir")]
            for i, name in enumerate(names):
                picture(tmp_path / name, i)
            benchmark.setdefault(split, []).append(f"{' '.join(names)} {1 - fake}")
        author.setdefault(split, []).append(f"{video}/color {fake}")
    mask = "CASIA_CeFA/Mask/3D-Mask/002/1_002_1_1_2_1_3"
    for m in ("color", "depth", "ir"):
        picture(tmp_path / mask / m / "0003.jpg", 1)
    author["test"].append(f"{mask}/color 1")
    for split, rows in author.items():
        file = tmp_path / f"CASIA_CeFA/protocol/CASIA_CeFA@p4.3_video_{split}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(rows))
        (tmp_path / f"protocol/4@1_{split}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / f"protocol/4@1_{split}.txt").write_text("\n".join(benchmark[split]))
    with pytest.raises(ValueError, match="expected {'videos': 400}"):
        dataset(tmp_path, "cefa", "data.protocol='4.3'")
    data = dataset(tmp_path, "cefa", "data.protocol='4.3'", "data.expected=null", "data.every=1")
    assert data.splits["test"].species == ["live", "live", "cloth print", "cloth print", "3D mask"]
    assert (
        data.splits["test"].subject[-1] == "3D-Mask/002"
        and data.splits["train"].live.tolist() == [True] * 2 + [False] * 2
    )
    frames = dataset(tmp_path, "cefa_frames")
    assert frames.splits["train"].live.tolist() == [True] * 2 + [False] * 2
    assert set(frames.splits["test"].video) == {
        "CASIA_CeFA/Ethnicity/CA/CA-301/2_301_1_1_1",
        "CASIA_CeFA/Ethnicity/CA/CA-301/2_301_3_1_2",
    }


def test_wmca_rows_of_both_publishers(tmp_path):
    clips = {"train": ["001_01_000_0_01", "535_05_004_1_16"], "val": ["002_01_000_0_01", "100_06_003_2_10"],
             "test": ["003_01_000_0_01", "098_06_069_3_12"]}  # fmt: skip
    for split, names in clips.items():
        rows, videos = [], []
        for name in names:
            fake = int(name.split("_")[3] != "0")
            for m in ("color", "depth", "ir"):
                picture(tmp_path / f"IDIAP_WMCA/R_CDIT/{name}/{m}/0012.jpg", fake)
            paths = " ".join(f"IDIAP_WMCA/R_CDIT/{name}/{m}/0012.jpg" for m in ("color", "depth", "ir"))
            rows.append(f"{paths} {1 - fake}")
            videos.append(f"IDIAP_WMCA/R_CDIT/{name} {fake}")
        (tmp_path / f"{'dev' if split == 'val' else split}.txt").write_text("\n".join(rows))
        (tmp_path / "IDIAP_WMCA/protocol").mkdir(exist_ok=True)
        (tmp_path / f"IDIAP_WMCA/protocol/p1_video_{split}.txt").write_text("\n".join(videos))
    one, two = dataset(tmp_path, "wmca"), dataset(tmp_path, "wmca_videos", "data.expected=null")
    for split in one.splits:
        assert one.splits[split].live.tolist() == two.splits[split].live.tolist() == [True, False]
        assert one.splits[split].species == two.splits[split].species
    assert one.splits["test"].species == ["live", "print"] and one.splits["train"].species == ["live", "glasses"]
    assert one.splits["train"].subject == ["001", "535_05_004_1_16"]  # of an attack: its video


# ------------------------------------------------------------------------------------------------------- text and labels
@pytest.mark.parametrize(
    ("encoding", "ends"), [("utf-8-sig", "\n"), ("utf-8", "\r\n"), ("utf-8", "\r"), ("utf-8-sig", "\r\n\r\n")]
)
def test_marks_and_line_ends(encoding, ends, tmp_path):
    text = ends.join([f"{frame(tmp_path, 'a')} 1", f"{frame(tmp_path, 'ü')} 0"])
    assert listed(tmp_path, text, encoding=encoding).live == [True, False]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_other_encodings_name_the_file(encoding, tmp_path):
    with pytest.raises(ValueError, match=r"l\.txt"):
        listed(tmp_path, f"{frame(tmp_path, 'ü')} 0\n", encoding=encoding)


@pytest.mark.parametrize("label", ["2", "-1", "-100", "nan", "", "1.0", "0,5", "live", "１０"])
def test_a_label_that_is_none_names_file_and_line(label, tmp_path):
    text = f"{frame(tmp_path, 'a')} 1\n{frame(tmp_path, 'b')} {label}\n"
    with pytest.raises(ValueError, match=r"l\.txt, line 2"):
        listed(tmp_path, text)


@pytest.mark.parametrize("separator", ["\t", ",", ";", "  "])
def test_separators_and_names_with_blanks(separator, tmp_path):
    stem = "a" if separator == "  " else "my faces/no 1"
    row = [f"{stem}/{m}.png" for m in ("color", "depth", "ir")]
    frame(tmp_path, stem)
    assert listed(tmp_path, separator.join([*row, "1"])).live == [True]


def test_names_with_blanks_between_blanks_are_an_error_and_not_another_file(tmp_path):
    with pytest.raises(ValueError, match="line 1.*need tabs or commas"):
        listed(tmp_path, f"{frame(tmp_path, 'my faces')} 1")


def test_windows_separators_and_dots(tmp_path):
    row = frame(tmp_path / "data", "a")
    rows = f"{row} 1".replace("/", "\\")
    assert listed(tmp_path / "data", rows).live == [True]
    up = " ".join(f"../data/{name}" for name in row.split())
    assert listed(tmp_path / "data", f"{up} 0").live == [False]


def test_a_video_with_two_labels_and_a_frame_listed_twice_are_refused(tmp_path):
    for stem in ("v/0", "v/1"):
        frame(tmp_path, stem)
    rows = [f"v/{k}/color.png v/{k}/depth.png v/{k}/ir.png" for k in (0, 1)]
    with pytest.raises(ValueError, match="video v is live in one row and an attack in another"):
        listed(tmp_path, f"{rows[0]} 1\n{rows[1]} 0\n", video=r"^(v)/")
    with pytest.raises(ValueError, match="frame .*color.png is live in one row and an attack in another"):
        listed(tmp_path, f"{rows[0]} 1\n{rows[0]} 0\n")
    with pytest.raises(ValueError, match="listed twice"):
        listed(tmp_path, f"{rows[0]} 1\n{rows[0]} 1\n")
    assert len(listed(tmp_path, f"{rows[0]} 1\n{rows[1]} 1\n", video=r"^(v)/")) == 2


# ----------------------------------------------------------------------------------------------------- names and folders
def test_frames_with_one_number_are_not_joined_by_chance(tmp_path):
    for m in ("color", "depth", "ir"):
        picture(tmp_path / f"v/{m}/a_1.png", 1)
        (tmp_path / f"v/{m}/._a_1.png").write_bytes(b"x")  # hidden: no frame
    options = {"kind": "videos", "folders": dict(zip(NAMES, ("color", "depth", "ir"), strict=True))}
    assert len(listed(tmp_path, "v/color 1", **options)) == 1
    picture(tmp_path / "v/color/b_1.png", 2)
    with pytest.raises(ValueError, match="have the same frame number"):
        listed(tmp_path, "v/color 1", **options)


def test_own_folders_with_what_editors_leave_behind(tmp_path):
    write_own(tmp_path)
    data = dataset(tmp_path, "folder", "data.subject='(person\\d+)'")
    assert {*data.splits["train"].species} == {"live", "print", "mask"} and len(data.splits["test"]) == 9
    assert data.splits["train"].samples[0][0].shape == (9, 16, 16)
    with pytest.raises(ValueError, match=r"expected genuine \(data.live_class\)"):
        dataset(tmp_path, "folder", "data.live_class=genuine")
    with pytest.raises(FileNotFoundError, match="no folder .*valid"):
        dataset(tmp_path, "folder", "data.splits.validation=valid")
    (tmp_path / "train/live/ir/person00.jpg").unlink()
    assert dataset(tmp_path, "folder").dropped == {"train: frame without its counterpart": 1}


def test_own_folders_of_one_modality_and_equal_stems(tmp_path):
    for name in ("live", "print"):
        picture(tmp_path / f"train/{name}/a.png", 1)
        picture(tmp_path / f"train/{name}/a.jpg", 2)
        picture(tmp_path / f"train/{name}/more/a.png", 3)
    found = read_folders(tmp_path, "train", modalities=["rgb"])
    assert len(found) == 6 and len({p["rgb"] for p in found.paths}) == 6
    for name in ("live", "print"):
        for m in ("rgb", "ir"):
            picture(tmp_path / f"val/{name}/{m}/a.png", 1)
            picture(tmp_path / f"val/{name}/{m}/a.jpg", 2)
    joined = read_folders(tmp_path, "val", modalities=["rgb", "ir"])
    assert len(joined) == 4 and all(p["rgb"].name == p["ir"].name for p in joined.paths)


# ----------------------------------------------------------------------------------------------------------------- pixels
def test_deep_turned_and_transparent_images(tmp_path):
    ramp = np.linspace(256, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    found = read_frame(tmp_path / "deep.png", modality="rgb")
    torch.testing.assert_close(found[0], torch.from_numpy(ramp / 65535).float(), atol=1 / 255, rtol=0)
    picture(tmp_path / "plain.png", 3)
    image = Image.open(tmp_path / "plain.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    turned, plain = read_frame(tmp_path / "turned.png"), read_frame(tmp_path / "plain.png")
    assert torch.equal(turned, plain.rot90(-1, (1, 2)))
    image.convert("P").save(tmp_path / "palette.png")
    image.convert("RGBA").save(tmp_path / "alpha.png")
    assert (
        torch.equal(read_frame(tmp_path / "alpha.png"), plain)
        and read_frame(tmp_path / "palette.png").shape == plain.shape
    )


def test_one_class_only_is_an_error_before_training(tmp_path):
    rows = {s: f"{frame(tmp_path, s)} 1" for s in ("train", "val_private", "test_private")}
    for split, row in rows.items():
        (tmp_path / f"{split}_list.txt").write_text(row)
    with pytest.raises(ValueError, match="train.* has 1 live and 0 attacks"):
        dataset(tmp_path, "casia_surf", "data.expected=null", "data.subject=null", "data.video=null")
