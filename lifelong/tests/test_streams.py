"""Streams: class orders, unequal tasks, every layout, what is refused; augmentation."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.objects import digits_on_backgrounds
from lifelong.augmentation import Prepare
from lifelong.streams import build_stream, class_order, task_groups

DIGITS = {"name": "digits20", "seed": 3, "train_images": 400, "test_images": 200, "order": "random"}


def test_groups():
    assert task_groups(10, 5) == [slice(i, i + 2) for i in range(0, 10, 2)]
    assert task_groups(6, [3, 1, 2]) == [slice(0, 3), slice(3, 4), slice(4, 6)]


@pytest.mark.parametrize(("classes", "tasks"), [(10, 3), (10, 0), (10, [5, 4]), (10, [5, 0, 5]), (10, [])])
def test_bad_groups(classes, tasks):
    with pytest.raises(ValueError, match=r"data\.tasks"):
        task_groups(classes, tasks)


def test_labels_are_positions_in_the_order_in_training_and_test():
    natural = build_stream(**{**DIGITS, "order": "natural"}, tasks=4)
    stream = build_stream(**DIGITS, tasks=[8, 5, 5, 2])
    order = class_order(natural.class_names, "random", 3)
    assert stream.class_names == [natural.class_names[c] for c in order] and order != sorted(order)
    for split in ("train", "test"):
        for k, group in enumerate(stream.groups):
            images, labels = stream.task(split, k)
            assert set(labels.tolist()) == set(range(group.start, group.stop))
            for c in labels.unique().tolist():
                expected = natural.decode(split, torch.nonzero(natural.targets[split] == order[c]).flatten())
                assert torch.equal(images[labels == c], expected)
    whole = stream.task("train", 0, 1, 2, 3)
    assert len(whole[1]) == 400 and stream.masks.shape == (200, 8, 8)


def test_the_order_follows_its_own_seed():
    a, b, c = (build_stream(**{**DIGITS, "seed": s}, order_seed=o) for s, o in ((0, 1), (5, 1), (5, None)))
    assert a.class_names == b.class_names != c.class_names


def test_test_images_are_shuffled_within_their_task_by_the_seed():
    stream = build_stream(**DIGITS, tasks=4)
    first, again, other = (stream.test_sets(seed, 2) for seed in (0, 0, 1))
    for k in range(2):
        (x, y), (same, _), (_, mixed) = first[k], again[k], other[k]
        assert torch.equal(x, same) and not torch.equal(y, mixed)
        assert torch.equal(y.sort()[0], mixed.sort()[0]) and torch.equal(
            y.sort()[0], stream.task("test", k)[1].sort()[0]
        )


@pytest.mark.parametrize("swapped", [True, False])
def test_the_cue_is_in_the_training_images_and_the_swap_in_the_test_images(swapped):
    options = {**DIGITS, "name": "digits10", "order": "natural"}
    stream = build_stream(**options, tasks=2, rho=0.7, swapped=swapped)
    asked = {"train": {"rho": 0.7}, "test": {"swapped": swapped}}
    for split, count in (("train", 400), ("test", 200)):
        expected = digits_on_backgrounds(count, split=split, seed=3, **asked[split])
        assert torch.equal(stream.decode(split, torch.arange(count)), expected.images), split
        if split == "train":
            told = (expected.extra["background"] == expected.targets).float().mean()
            assert 0.66 < told < 0.8, "rho and the tenth of the others by chance"


def test_order_files(tmp_path):
    names, file = ["cat", "dog", "eel"], tmp_path / "order.txt"
    file.write_text("# two of three\neel\ncat\n")
    assert class_order(names, str(file), 0) == [2, 0]
    for text, error in (
        ("eel\neel\n", "twice: eel"),
        ("eel\nfox\n", "does not have, e.g. fox"),
        ("\n", "names no class"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=error):
            class_order(names, str(file), 0)
    with pytest.raises(FileNotFoundError, match="neither natural nor random"):
        class_order(names, "sorted", 0)


def test_the_imagenet100_list():
    from timm.data import ImageNetInfo

    names = sorted(ImageNetInfo().label_names())
    order = class_order(names, "imagenet100_classes.txt", 0)
    assert order == np.random.RandomState(1993).permutation(1000)[:100].tolist()


def picture(path, value, size=(20, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def test_class_folders(tmp_path):
    for split in ("train", "val"):
        for c, name in enumerate(("ant", "bee", "cow")):
            for i in range(2):
                picture(tmp_path / split / name / f"{i}.png", 50 * c + i)
    (tmp_path / "order.txt").write_text("cow\nant\n")
    options = {"name": "folder", "root": str(tmp_path), "stored_size": 8, "seed": 0}
    stream = build_stream(**options, tasks=2, order=str(tmp_path / "order.txt"))
    images, labels = stream.task("train", 0)
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.uint8 and labels.tolist() == [0, 0]
    assert images[:, 0, 0, 0].tolist() == [100, 101] and stream.class_names == ["cow", "ant"]
    picture(tmp_path / "val/dog/0.png", 3)
    with pytest.raises(ValueError, match="different classes: dog"):
        build_stream(**options, tasks=1)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build_stream(**{**options, "root": str(tmp_path / "nowhere")})


def test_cub200(tmp_path):
    base = tmp_path / "CUB_200_2011"
    for i in range(6):
        picture(base / f"images/00{i % 3}.bird/{i}.jpg", 10 * i)
    base.joinpath("images.txt").write_text("".join(f"{i + 1} 00{i % 3}.bird/{i}.jpg\n" for i in range(6)))
    base.joinpath("image_class_labels.txt").write_text("".join(f"{i + 1} {i % 3 + 1}\n" for i in range(6)))
    base.joinpath("train_test_split.txt").write_text("".join(f"{i + 1} {int(i < 3)}\n" for i in range(6)))
    with pytest.raises(FileNotFoundError, match=r"classes\.txt.*Expected"):
        build_stream(name="cub200", seed=0, root=str(tmp_path))
    base.joinpath("classes.txt").write_text("1 Black footed\n2 B\n3 C\n")
    stream = build_stream(name="cub200", seed=0, root=str(tmp_path), tasks=3, stored_size=8)
    assert stream.class_names[0] == "Black footed" and [len(stream.indices(s, 1)) for s in ("train", "test")] == [1, 1]
    assert stream.task("test", 2)[0][0, 0, 0, 0].item() == pytest.approx(50, abs=2)


def test_omniglot(tmp_path):
    """Two alphabets, of two parts that share one; twenty drawings of each character."""
    for part, alphabet, count in (
        ("background_small1", "Latin", 2),
        ("background_small2", "Latin", 2),
        ("evaluation", "Ge", 3),
    ):
        for c in range(1, count + 1):
            for drawer in range(1, 21):
                shade = 10 * c + drawer + 100 * (part == "background_small2")
                picture(
                    tmp_path / f"omniglot-py/images_{part}/{alphabet}/character{c:02d}/{c:04d}_{drawer:02d}.png", shade
                )
    options = {"name": "omniglot", "seed": 0, "root": str(tmp_path), "stored_size": 8}
    stream = build_stream(**options, tasks=None)
    assert stream.sizes == [3, 2] and stream.class_names[::3] == ["Ge/character01", "Latin/character01"]
    assert (stream.channels, stream.size) == (1, 8)
    for split, drawers in (("train", range(1, 16)), ("test", range(16, 21))):
        images, labels = stream.task(split, 1)
        assert images.shape[1:] == (1, 8, 8) and labels.unique().tolist() == [3, 4]
        assert images[labels == 3][:, 0, 0, 0].tolist() == [10 + d for d in drawers]  # of the first part that has it
    assert build_stream(**options, tasks=5, order="random").sizes == [1] * 5
    for more in ({"order": "random"}, {"name": "mnist"}):
        with pytest.raises(ValueError, match=r"data\.tasks=null .* one alphabet per task"):
            build_stream(**{**options, **more}, tasks=None)
    for wrong in (0, []):
        with pytest.raises(ValueError, match=r"data\.tasks="):
            build_stream(**options, tasks=wrong)
    picture(tmp_path / "omniglot-py/images_evaluation/Ge/character01/0001_21.png", 1)
    with pytest.raises(ValueError, match=r"0001_21\.png: the name of a drawing ends in its drawer"):
        build_stream(**options, tasks=None)
    with pytest.raises(FileNotFoundError, match="omniglot not found under .*expected images_background/"):
        build_stream(**{**options, "root": str(tmp_path / "omniglot-py/images_evaluation")}, tasks=None)


def test_cifar100_layout(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for split in ("train", "test"):
        labels = list(range(100)) * 2
        data = {"data": np.full((200, 3072), 7, np.uint8), "fine_labels": labels}
        (folder / split).write_bytes(pickle.dumps(data))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"c{i}" for i in range(100)]}))
    try:
        stream = build_stream(name="cifar100", seed=0, root=str(tmp_path), tasks=10)
    except ValueError as error:  # torchvision also checks the files' hashes
        assert "corrupt" in str(error)
    else:
        assert stream.task("train", 9)[1].tolist() == [90 + i for i in range(10)] * 2


def test_refused_streams():
    with pytest.raises(ValueError, match="'digits', allowed: digits20"):
        build_stream(name="digits", seed=0)
    with pytest.raises(ValueError, match=r"no test image of \d+ classes"):
        build_stream(**{**DIGITS, "test_images": 10})
    with pytest.raises(ValueError, match=r"data\.root is not set"):
        build_stream(name="cifar100", seed=0)


# -------------------------------------------------------------------------------------------------------- augmentation
def test_prepare_normalises_and_crops_the_centre():
    x = torch.arange(36, dtype=torch.uint8).view(1, 1, 6, 6)
    out = Prepare(mean=[0.5], std=[0.25], size=4)(x)
    torch.testing.assert_close(out, (x[..., 1:5, 1:5].float() / 255 - 0.5) / 0.25)
    with pytest.raises(ValueError, match=r"smaller than data\.size"):
        Prepare(mean=[0.5], std=[0.25], size=8)(x)
    with pytest.raises(ValueError, match="std"):
        Prepare(mean=[0.5], std=[0.0], size=8)


def test_crops_are_whole_pixel_shifts_and_flips_mirror():
    x = torch.rand(64, 1, 6, 6)
    out = Prepare(mean=[0.0], std=[1.0], size=6, padding=1)(x, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, [1] * 4)
    shifts = [(i, j) for i in range(3) for j in range(3)]
    fits = torch.stack([(out - padded[..., i : i + 6, j : j + 6]).abs().amax((1, 2, 3)) < 1e-4 for i, j in shifts])
    assert fits.any(0).all() and fits.any(1).all(), "every image one of the nine shifts, every shift drawn"
    out = Prepare(mean=[0.0], std=[1.0], size=6, flip=True)(x, torch.Generator().manual_seed(0))
    mirrored = (out - x.flip(3)).abs().amax((1, 2, 3)) < 1e-4
    same = (out - x).abs().amax((1, 2, 3)) < 1e-4
    assert (mirrored ^ same).all() and 15 < int(mirrored.sum()) < 49


def test_resized_crops_stay_inside_and_differ():
    x = torch.full((8, 3, 32, 32), 200, dtype=torch.uint8)
    out = Prepare(mean=[0.0] * 3, std=[1.0] * 3, size=16, resized_crop=True, flip=True)(
        x, torch.Generator().manual_seed(0)
    )
    assert out.shape == (8, 3, 16, 16) and out[..., 2:-2, 2:-2].min() > 0.78, "no border inside a crop"


def test_rotation_keeps_the_centre_and_test_images_are_untouched():
    x = torch.rand(4, 1, 9, 9)
    prepare = Prepare(mean=[0.0], std=[1.0], size=9, rotation=10.0)
    out = prepare(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(out[..., 4, 4], x[..., 4, 4], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out, x) and torch.equal(prepare(x), x)
