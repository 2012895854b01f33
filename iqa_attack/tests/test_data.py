"""Images, graded photographs, published layouts, and what is refused."""

import csv

import numpy as np
import pytest
import scipy.io
import scipy.signal
import torch
from PIL import Image

from common.data.files import find_images
from iqa_attack.photographs.data import TrainingCrops, build_data, score_all
from iqa_attack.photographs.images import from_bytes, read_image, to_bytes, write_png
from iqa_attack.photographs.iqa_sets import LIVE_TYPES, detect_set, read_set
from iqa_attack.photographs.photos import (
    LEVELS,
    TYPES,
    distort,
    full_reference,
    graded_photos,
    gradient_deviation,
    places,
    pseudo_mos,
)

RNG = np.random.default_rng(0)


def save(path, size=(40, 30), mode="RGB", **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3)
    Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8)).convert(mode).save(path, **kwargs)
    return path


def test_png_round_trip_is_exact(tmp_path, images):
    write_png(tmp_path / "a.png", images[0])
    torch.testing.assert_close(read_image(tmp_path / "a.png"), images[0], rtol=0, atol=0)
    with pytest.raises(ValueError, match="lossy format destroys"):
        write_png(tmp_path / "a.jpg", images[0])
    assert torch.equal(to_bytes(from_bytes(torch.arange(256, dtype=torch.uint8))), torch.arange(256, dtype=torch.uint8))


def test_grey_and_opaque_alpha_are_read_odd_sizes_too(tmp_path):
    grey = read_image(save(tmp_path / "g.png", (31, 17), "L"))
    assert grey.shape == (3, 17, 31) and torch.equal(grey[0], grey[2])
    save(tmp_path / "a.png", mode="RGBA")
    assert read_image(tmp_path / "a.png").shape == (3, 30, 40)
    assert read_image(save(tmp_path / "p.png", mode="P")).shape == (3, 30, 40)


def test_bad_files_are_named(tmp_path):
    Image.fromarray(RNG.integers(0, 65535, (20, 20)).astype(np.uint16)).save(tmp_path / "deep.png")
    save(tmp_path / "cmyk.jpg", mode="CMYK")
    clear = Image.new("RGBA", (20, 20), (10, 20, 30, 128))
    clear.save(tmp_path / "clear.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    whole = save(tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for name, error in (
        ("deep.png", "no 8-bit image"),
        ("cmyk.jpg", "is CMYK: convert"),
        ("clear.png", "transparent pixels"),
        ("broken.png", "cannot decode"),
        ("cut.png", "cannot decode"),
    ):
        with pytest.raises(ValueError, match=error) as caught:
            read_image(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(ValueError, match=r"big.png has 40 x 30 pixels, allowed are 1,000"):
        read_image(save(tmp_path / "big.png"), max_pixels=1000)
    with pytest.raises(FileNotFoundError, match="no image"):
        read_image(tmp_path / "none.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no image in .*looked for \.jpg"):
        find_images(tmp_path / "empty")


def test_distortions_grow_with_their_level(photos):
    from common.data.backgrounds import photographs

    photo = photographs()[1]
    clean = from_bytes(torch.from_numpy(photo.copy()).permute(2, 0, 1))[None]
    for kind in TYPES:
        values = []
        for level in LEVELS[kind]:
            x = distort(photo, kind, level, np.random.default_rng(0))
            assert x.shape == photo.shape and x.dtype == np.uint8
            values.append(
                float(pseudo_mos(full_reference(from_bytes(torch.from_numpy(x.copy()).permute(2, 0, 1))[None], clean)))
            )
        assert values == sorted(values, reverse=True) and values[0] - values[-1] > 1, kind
    assert float(pseudo_mos(full_reference(clean, clean))) == pytest.approx(10, abs=1e-2)
    with pytest.raises(ValueError, match="distortion 'rain', allowed: jpeg, jp2k, wn, gblur"):
        distort(photo, "rain", 1, np.random.default_rng(0))


def test_gmsd_is_that_of_a_plain_formulation():
    """Prewitt gradients of means of 2 x 2 pixels, zero outside, by scipy; and its two limits."""
    x, y = RNG.uniform(0, 1, (2, 40, 56))

    def magnitude(v):
        small = 255 * v.reshape(20, 2, 28, 2).mean((1, 3))
        kernel = np.array([[1.0, 0, -1]] * 3) / 3
        parts = [scipy.signal.convolve2d(small, k, mode="same") for k in (kernel, kernel.T)]
        return np.hypot(*parts)

    a, b = magnitude(x), magnitude(y)
    wanted = np.std((2 * a * b + 170) / (a**2 + b**2 + 170), ddof=1)
    tx, ty = (torch.from_numpy(v)[None, None] for v in (x, y))
    assert float(gradient_deviation(tx, ty)) == pytest.approx(wanted, rel=1e-9)
    assert float(gradient_deviation(tx, tx)) == 0 and float(gradient_deviation(tx, 0 * ty)) > 0.05
    fr = torch.zeros(2, 5)
    fr[1, 4] = -0.12
    torch.testing.assert_close(pseudo_mos(fr), torch.tensor([10.0, 10 / np.e]))


def test_a_part_alone_is_the_same_as_among_all():
    """An attack makes its twelve images only; they are those of the whole split, noise included."""
    options = {"seed": 5, "crops_per_photo": 2, "test_images": 4}
    whole, alone = graded_photos(**options), graded_photos(parts=("attack",), **options)
    assert list(alone) == ["attack"] and alone["attack"].names == whole["attack"].names
    assert torch.equal(alone["attack"].stack(), whole["attack"].stack())
    assert torch.equal(alone["attack"].fr, whole["attack"].fr)
    at = [whole["test"].names.index(n) for n in alone["attack"].names]
    assert all(torch.equal(whole["test"].images[i], x) for i, x in zip(at, alone["attack"].images, strict=True))
    noisy = [n for n in alone["attack"].names if "wn" in n]
    assert noisy, "the case that a shared generator would change"


def test_splits_share_no_photograph_and_repeat():
    a, b, other = (graded_photos(seed=s, crops_per_photo=2, test_images=4) for s in (3, 3, 4))
    for split in ("train", "test", "attack"):
        assert torch.equal(a[split].stack(), b[split].stack()) and a[split].names == b[split].names
    assert a["attack"].names != other["attack"].names
    assert len(a["test"]) == 20 * len({n.rsplit("_", 1)[0] for n in a["test"].names})
    assert [n.rsplit("_", 1)[1][:-1] for n in a["attack"].names] == list(TYPES), "types in turn"
    small = [x.float().flatten()[::97] for x in a["train"].images[::20]]
    for x in a["test"].images[::20]:
        assert min(float((x.float().flatten()[::97] - y).abs().max()) for y in small) > 5


def test_places_do_not_overlap_and_have_contrast():
    photo = np.zeros((200, 300, 3), dtype=np.uint8)
    photo[:, 150:] = RNG.integers(0, 256, (200, 150, 3))
    found = places(photo, 10, 50, np.random.default_rng(0))
    taken = np.zeros(photo.shape[:2])
    for rows, columns in found:
        taken[rows, columns] += 1
        assert photo[rows, columns].mean(2).std() > 25
    assert taken.max() == 1
    with pytest.raises(ValueError, match="no crop of 50 pixels with enough contrast"):
        places(np.zeros((100, 100, 3), dtype=np.uint8), 2, 50, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"data.test_photos=7, allowed with 7 photographs: 1..6"):
        graded_photos(seed=0, test_photos=7)


# ------------------------------------------------------------------------------------------------------ published layouts
def live(root):
    base = root / "databaserelease2"
    n = sum(k for _, k in LIVE_TYPES)
    dmos = RNG.uniform(0, 100, n)
    original = np.zeros(n)
    original[::29] = 1
    names = np.empty((1, n), dtype=object)
    names[0] = [f"ref{i % 29}.bmp" for i in range(n)]
    for kind, k in LIVE_TYPES:
        (base / kind).mkdir(parents=True)
        for i in range(1, k + 1):
            (base / kind / f"img{i}.bmp").write_bytes(b"")
    scipy.io.savemat(base / "dmos.mat", {"dmos": dmos[None], "orgs": original[None]})
    scipy.io.savemat(base / "refnames_all.mat", {"refnames_all": names})
    return dmos, original


def table(path, header, rows):
    with path.open("w", newline="") as f:
        csv.writer(f).writerows([header, *rows])


def write_layout(name, root):
    """Two images with MOS 2 and 4 of the set's own scale; returns the MOS expected on 0..10."""
    root.mkdir(exist_ok=True)
    if name == "csiq":
        save(root / "dst_imgs/awgn/1600.AWGN.1.png"), save(root / "dst_imgs/jpeg2000/cactus.jpeg2000.5.png")
        table(
            root / "csiq.DMOS.csv",
            ["image", "dst_type", "dst_lev", "dmos_std", "dmos"],
            [["1600", "noise", 1, 0.1, 0.25], ["cactus", "jpeg 2000", 5, 0.2, 0.9]],
        )
        return [7.5, 1.0]
    if name == "kadid":
        save(root / "images/I01_01_01.png"), save(root / "images/I02_01_01.png")
        table(
            root / "dmos.csv",
            ["dist_img", "ref_img", "dmos", "var"],
            [["I01_01_01.png", "I01.png", 2, 0.25], ["I02_01_01.png", "I02.png", 5, 1]],
        )
        return [2.5, 10.0]
    if name == "tid2013":
        save(root / "distorted_images/I01_01_1.BMP"), save(root / "distorted_images/i02_01_1.bmp")
        (root / "mos_with_names.txt").write_text("4.5 i01_01_1.bmp\n9.0 I02_01_1.bmp\n")
        return [5.0, 10.0]
    if name == "koniq":
        save(root / "512x384/1.jpg"), save(root / "512x384/2.jpg")
        table(
            root / "koniq10k_scores_and_distributions.csv",
            ["image_name", "MOS", "SD"],
            [["1.jpg", 20, 5], ["2.jpg", 70, 5]],
        )
        return [2.0, 7.0]
    save(root / "a/1.png"), save(root / "a/2.png")
    table(root / "labels.csv", ["path", "mos"], [["a/1.png", 30], ["a/2.png", 80]])
    return [0.0, 10.0]


@pytest.mark.parametrize("name", ["csiq", "kadid", "tid2013", "koniq", "list"])
def test_published_layouts(name, tmp_path):
    expected = write_layout(name, tmp_path / name)
    assert detect_set(tmp_path / name) == name
    data = read_set("auto", tmp_path / name)
    assert data.mos.tolist() == pytest.approx(expected) and data.image(0).shape[0] == 3
    assert len(set(data.group.tolist())) == 2
    if name == "list":
        assert read_set("list", tmp_path / name, higher_is_better=False).mos.tolist() == [10.0, 0.0]
    if name == "kadid":
        assert data.std.tolist() == pytest.approx([0.5 * 2.5, 2.5])


def test_live_layout_and_the_twelve_test_images(tmp_path):
    dmos, original = live(tmp_path)
    data = read_set("live", tmp_path)
    assert len(data) == int((original == 0).sum())
    assert data.mos.numpy() == pytest.approx(10 * (114.4147 - dmos[original == 0]) / 114.4147, rel=1e-5)
    assert data.images[0].name == "img2.bmp" and data.images[0].parent.name == "jp2k", (
        "the first is an undistorted copy"
    )
    listed = ["/".join(data.images[i].parts[-2:]) for i in (3, 600)]
    sets = build_data(kind="sets", seed=0, root=str(tmp_path), names=["live"], listed=listed)
    assert ["/".join(p.parts[-2:]) for p in sets["attack"].images] == listed
    assert len(set(sets["test"].names) | set(sets["train"].names)) == len(data), "img2.bmp is in five folders"
    assert not set(sets["train"].group.tolist()) & set(sets["test"].group.tolist())
    assert set(sets["attack"].group.tolist()) <= set(sets["test"].group.tolist())


def test_missing_and_broken_sets_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no image quality set in .*live: \*\*/dmos.mat"):
        detect_set(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"kadid not found: no dmos.csv.*images/"):
        read_set("kadid", tmp_path)
    write_layout("kadid", tmp_path)
    (tmp_path / "images/I02_01_01.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"kadid: 1 of 2 images are missing, e.g. .*I02_01_01.png"):
        read_set("kadid", tmp_path)
    table(tmp_path / "dmos.csv", ["dist_img", "score"], [["I01_01_01.png", 2]])
    with pytest.raises(ValueError, match="line 1: no column ref_img, dmos, var"):
        read_set("kadid", tmp_path)
    with pytest.raises(ValueError, match="no image quality set 'live2'"):
        read_set("live2", tmp_path)
    with pytest.raises(ValueError, match="data.root is not set"):
        read_set("auto", None)
    with pytest.raises(ValueError, match=r"data.kind='foto', allowed: photos, photo_folder, sets, folder"):
        build_data(kind="foto", seed=0)


def test_several_sets_form_pairs_within_one(tmp_path):
    for name in ("kadid", "koniq"):
        write_layout(name, tmp_path / name)
    sets = build_data(kind="sets", seed=1, root=str(tmp_path), names=["kadid", "koniq"], test_share=0.5)
    total = torch.cat([sets["train"].sources(), sets["test"].sources()])
    assert sorted(total.tolist()) == [0, 0, 1, 1] and len(sets["train"]) == len(sets["test"]) == 2


def test_training_crops_depend_on_seed_epoch_and_index_alone(photos):
    data = photos["train"]
    a, b, c = (TrainingCrops(data, seed=1, epoch=e, size=40)[5][0] for e in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.shape == (3, 40, 40)
    whole = TrainingCrops(data, seed=1, epoch=1, size=None)[5][0]
    assert torch.equal(whole, from_bytes(data.image(5)))
    assert TrainingCrops(data, seed=1, epoch=1, size=None, resize=48)[0][0].shape == (3, 48, 48)
    with pytest.raises(ValueError, match="is 96 x 96, the training crop is 128"):
        TrainingCrops(data, seed=1, epoch=1, size=128)[0]


def test_images_of_several_sizes_are_scored_in_order(tmp_path):
    sizes = [(40, 30), (40, 30), (31, 50), (40, 30)]
    for i, size in enumerate(sizes):
        save(tmp_path / f"{i}.png", size)
    data = build_data(kind="folder", seed=0, root=str(tmp_path))["attack"]
    found = score_all(lambda x: x.mean((1, 2, 3)) + x.shape[2], data, device=torch.device("cpu"), batch=2)
    expected = [float(read_image(tmp_path / f"{i}.png").mean()) + s[1] for i, s in enumerate(sizes)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert bool(data.mos.isnan().all())
