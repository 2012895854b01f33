"""Files as people have them: images, lists and answers that came up in reports, each tried here."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.files import find_images
from iqa_attack.jnd import CsvObserver, read_answers
from iqa_attack.photographs.data import build_data
from iqa_attack.photographs.images import read_image
from iqa_attack.photographs.iqa_sets import LIVE_TWELVE, detect_set, read_set

RNG = np.random.default_rng(5)
ANSWERS = "nr,fr,image,candidate,subject,order,answer,seconds"


def picture(path, size=(40, 30), **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **kwargs)
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def listed(root, text, encoding="utf-8", names=("a.png", "b.png"), file="labels.csv"):
    for name in names:
        picture(root / name)
    (root / file).write_bytes(text.encode(encoding))
    return root


# -------------------------------------------------------------------------------------------------------------- images
def test_exif_turns_a_persons_photograph_and_no_published_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = picture(tmp_path / "own/turned.png", (40, 30), exif=exif)
    assert read_image(tmp_path / "own/turned.png").shape == (3, 40, 30)
    torch.testing.assert_close(read_image(tmp_path / "own/turned.png", upright=False), stored)
    assert build_data(kind="folder", seed=0, root=tmp_path / "own")["attack"].image(0).shape == (3, 40, 30)
    root = tmp_path / "koniq"
    (root / "512x384").mkdir(parents=True)
    picture(root / "512x384/1.png", (40, 30), exif=exif), picture(root / "512x384/2.png")
    (root / "koniq10k_scores_and_distributions.csv").write_text("image_name,MOS,SD\n1.png,20,5\n2.png,70,5\n")
    assert read_set("koniq", root).image(0).shape == (3, 30, 40)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_refused_by_name(channels, tmp_path):
    import struct
    import zlib

    rows = b"".join(b"\0" + RNG.integers(0, 65536, 8 * channels).astype(">u2").tobytes() for _ in range(8))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 8, 8, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(ValueError, match="deep.png is no 8-bit image"):
        read_image(tmp_path / "deep.png")


def test_equal_names_in_two_folders_stay_apart_and_hidden_files_are_none(tmp_path):
    picture(tmp_path / "x/1.png"), picture(tmp_path / "y/1.png"), picture(tmp_path / "y/1.bmp")
    picture(tmp_path / ".thumbs/1.png"), picture(tmp_path / "x/._1.png")
    (tmp_path / "x/Thumbs.db").write_bytes(b"")
    data = build_data(kind="folder", seed=0, root=tmp_path)["attack"]
    assert len(data) == 3 and len(set(data.names)) == 3
    assert len(find_images(tmp_path)) == 3


# --------------------------------------------------------------------------------------------------------------- lists
@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("path,mos\na.png,30\nb.png,80\n", "utf-8-sig"), ("path;mos\r\na.png;30\r\nb.png;80\r\n", "utf-8"),
        ("path, mos , std\na.png,30,1\n\nb.png , 80,2\n", "utf-8"), ("mos,path\n30,a.png\n80,./b.png", "utf-8"),
    ],
    ids=["bom", "semicolons", "blanks", "columns"],
)  # fmt: skip
def test_labels_of_any_editor(text, encoding, tmp_path):
    assert read_set("auto", listed(tmp_path, text, encoding)).mos.tolist() == [0.0, 10.0]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("path,mos\na.png,nan\nb.png,80\n", "labels.csv, line 2 .a.png.: 'nan' is not a finite number"),
        ("path,mos\na.png,\nb.png,80\n", "line 2 .a.png.: '' is not a finite number"),
        ("path;mos\na.png;3,5\nb.png;80\n", "line 2 .a.png.: '3,5' is not a finite number"),
        ("path,mos\na.png,n/a\nb.png,80\n", "'n/a' is not a finite number"),
        ("path,mos\na.png,30\na.png,80\n", "line 3: a.png is named twice .opinions 30 and 80."),
        ("path,mos\na.png,30,9\nb.png,80\n", "line 2: 3 cells, the header has 2"),
        ("path,mos,std\na.png,30,-1\nb.png,80,1\n", "line 2: deviation: '-1'"),
        ("path,score\na.png,30\n", "line 1: no column mos; it has path, score"),
        ("path,mos\n,30\nb.png,80\n", "line 2: no path"),
        ("path,mos\na.png,30\nc.png,80\n", "1 of 2 images are missing, e.g. .*c.png"),
        ("path,mos\na.png,30\nb.png,30\n", "all MOS are 30"),
        ("", "labels.csv is empty"),
    ],
)
def test_wrong_labels_are_named_with_their_line(text, error, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        read_set("list", listed(tmp_path, text))


def test_latin_1_and_utf_16_name_the_file(tmp_path):
    for encoding, error in (("latin-1", "line 2: not UTF-8"), ("utf-16", "is UTF-16")):
        with pytest.raises(ValueError, match=f"labels.csv.*{error}"):
            read_set("list", listed(tmp_path / encoding, "path,mos\nä.png,3\nb.png,4\n", encoding))


def test_tab_lists_without_a_header_and_names_with_blanks(tmp_path):
    root = listed(tmp_path, "my photo.png\t30\t2\r\nb.png\t80\n", names=("my photo.png", "b.png"), file="labels.txt")
    data = read_set("auto", root)
    assert detect_set(root) == "tabs" and data.mos.tolist() == [0.0, 10.0] and data.images[0].name == "my photo.png"
    (root / "labels.txt").write_text("my photo.png 30\n")
    with pytest.raises(ValueError, match="labels.txt, line 1: 1 cells between tabs"):
        read_set("tabs", root)


def test_the_twelve_images_of_the_paper_need_no_list(tmp_path):
    for name in LIVE_TWELVE:
        picture(tmp_path / f"databaserelease2/{name}.bmp")
    data = build_data(kind="sets", seed=0, root=str(tmp_path), names=["live12"], attack_only=True)["attack"]
    assert len(data) == 12 and len(set(data.names)) == 12
    assert float(data.mos.max()) == pytest.approx(10 * 78.750119 / 114.4147)


def test_identity_follows_names_sizes_and_opinions_and_not_the_place(tmp_path):
    a = read_set("list", listed(tmp_path / "1", "path,mos\na.png,30\nb.png,80\n")).identity
    for folder, text in (("2", "path,mos\na.png,30\nb.png,81\n"),):
        assert read_set("list", listed(tmp_path / folder, text)).identity != a
    (tmp_path / "1").rename(tmp_path / "moved")
    assert read_set("list", tmp_path / "moved").identity == a


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("brisque,ssim,a,0,anna,1,maybe,0.5", "line 2: answer 'maybe'"), ("brisque,ssim,a,0,anna,1,same", "line 2: 7 cells"),
    ],
)  # fmt: skip
def test_answers_of_people(line, error, tmp_path):
    file = tmp_path / "answers.csv"
    file.write_bytes(f"{ANSWERS}\r\nbrisque,ssim,a,0,anna,1,same,0.5\r\n".encode("utf-8-sig"))
    assert CsvObserver(file=file).trials.total() == 1
    file.write_text(f"{ANSWERS}\n{line}\n")
    with pytest.raises(ValueError, match=error):
        read_answers(file)
