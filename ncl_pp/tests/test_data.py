"""Data sets in their real layouts (tiny), counts, batches that depend on (seed, epoch) alone, clear errors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.batches import Plan, eval_batches
from common.data.longtail import long_tail_counts, save_indices
from ncl_pp import data as data_module
from ncl_pp.data import build_data
from ncl_pp.tests.layouts import write_cifar, write_class_folders, write_image, write_lists, write_mnist
from ncl_pp.transforms import (
    AffineNoise,
    CropFlipCutout,
    Cutout,
    inference_transform,
    moco_transform,
    test_transform,
    train_transform,
)

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    for split, per_class in (("train", 4), ("test", 2), ("val", 1)):
        for c, name in enumerate(("ant", "bee", "cat")):
            for i in range(per_class - (c == 2 and split == "train") * 2):
                write_image(tmp_path / split / name / f"{i}.png", value=c * 50 + i)
    return tmp_path


def test_the_seed_draws_the_test_digits_and_the_training_subset(monkeypatch):
    def test_set(seed):
        images, targets = build_data(name="digits_lt", seed=seed).test.tensors
        return {image.numpy().tobytes() for image in images}, targets

    assert len(test_set(0)[0] & test_set(1)[0]) < 400, "other digits are tested, not only other classes"
    fixed = data_module.split_per_class(test_per_class=60, seed=0, permute_classes=True)
    monkeypatch.setattr(data_module, "split_per_class", lambda **options: fixed)
    first, again, other = (build_data(name="digits_lt", seed=s).indices for s in (0, 0, 1))
    assert first == again and set(first) != set(other)


def test_digits_are_long_tailed_and_the_head_class_varies_with_the_seed():
    a, b = (
        build_data(name="digits_lt", seed=0, imbalance=50, n_max=100),
        build_data(name="digits_lt", seed=1, imbalance=50, n_max=100),
    )
    assert a.counts == long_tail_counts(100, 50, 10) and a.counts[0] == 100 and a.counts[-1] == 2
    assert torch.as_tensor(a.targets).bincount().tolist() == a.counts
    assert len(a.test) == 600 and a.test.tensors[1].bincount().tolist() == [60] * 10
    assert not torch.equal(a.images[a.targets == 0].mean(0), b.images[b.targets == 0].mean(0))
    train = {tuple(x.flatten().tolist()) for x in a.images}
    assert not any(tuple(x.flatten().tolist()) in train for x in a.test.tensors[0]), (
        "a test image is in the training set"
    )


@pytest.mark.parametrize("augment", ["cifar", "cifar_weak", "cifar_gpu"])
def test_cifar100_lt_in_torchvisions_layout(tmp_path, augment, monkeypatch):
    monkeypatch.setattr(
        "torchvision.datasets.cifar.check_integrity", lambda *_: True
    )  # random bytes have no known hash
    write_cifar(tmp_path, "cifar100")
    data = build_data(name="cifar100_lt", root=str(tmp_path), seed=0, imbalance=2, n_max=2, augment=augment)
    assert len(data.counts) == 100 and sum(data.counts) == len(data.indices)
    views, labels = next(data.batches(Plan(len(data.indices), 8, seed=0), copies=2, device=CPU).epoch(1))
    images = torch.cat(views)
    assert images.shape == (16, 3, 32, 32) and labels.shape == (8,) and images.dtype == torch.float32


def test_which_classes_are_rare_is_drawn_with_the_subset(tmp_path):
    write_mnist(tmp_path)
    options = {"name": "mnist_lt", "root": str(tmp_path), "imbalance": 5, "n_max": 15, "subset_seed": None}
    fixed = build_data(seed=0, **options)
    drawn = [build_data(seed=seed, shuffle_classes=True, **options) for seed in (0, 0, 1)]
    assert fixed.counts == sorted(fixed.counts, reverse=True) and fixed.classes == [*map(str, drawn[0].classes)]
    assert drawn[0].counts == drawn[1].counts != drawn[2].counts
    for data in drawn:
        assert sorted(data.counts, reverse=True) == fixed.counts != data.counts
        assert torch.as_tensor(data.targets).bincount().tolist() == data.counts


def test_stored_index_list_decides_the_subset(tmp_path):
    write_mnist(tmp_path)
    chosen = [i for i in range(200) if i % 10 < 5 or i < 50]
    save_indices(tmp_path / "subset.json", chosen, dataset="mnist_lt", size=200)
    data = build_data(
        name="mnist_lt",
        root=str(tmp_path),
        seed=0,
        augment="affine",
        imbalance=2,
        indices=str(tmp_path / "subset.json"),
    )
    assert data.indices == chosen and data.counts == [20] * 5 + [5] * 5 and data.channels == 1


def test_list_files_and_folder_protocol(folder):
    for split in ("train", "test"):
        files = sorted((folder / split).rglob("*.png"))
        rows = [f"{p.relative_to(folder)} {('ant', 'bee', 'cat').index(p.parent.name)}" for p in files]
        (folder / f"{split}.txt").write_text("\n".join(rows))
    listed = build_data(
        name="lists", seed=0, root=str(folder), augment="plain", size=16,
        train_list=str(folder / "train.txt"), test_list=str(folder / "test.txt"),
    )  # fmt: skip
    by_folder = build_data(name="folder", seed=0, root=str(folder), augment="plain", size=16)
    assert listed.counts == by_folder.counts == [4, 4, 2]
    assert listed.validation is None and by_folder.validation is not None
    with pytest.raises(ValueError, match="no validation split"):
        listed.split("validation")
    x, y = next(iter(eval_batches(by_folder.test, batch_size=6, workers=0)))
    assert x.shape == (6, 3, 16, 16) and y.tolist() == [0, 0, 1, 1, 2, 2]


def test_official_json_list(folder):
    rows = [
        {"fpath": f"old/train/ant/{i}.png", "category_id": i % 2, "image_id": i, "im_height": 40, "im_width": 40}
        for i in range(4)
    ]
    (folder / "train.json").write_text(json.dumps({"annotations": rows, "num_classes": 2}))
    data = build_data(
        name="lists", seed=0, root=str(folder), augment="plain", size=16, strip_prefix="old/",
        train_list=str(folder / "train.json"), test_list=str(folder / "train.json"),
    )  # fmt: skip
    assert data.counts == [2, 2]


def test_errors_name_the_thing(tmp_path, folder):
    with pytest.raises(ValueError, match="digits_l.*allowed.*digits_lt"):
        build_data(name="digits_l", seed=0)
    with pytest.raises(ValueError, match=r"data\.root"):
        build_data(name="cifar10_lt", seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py"):
        build_data(name="cifar10_lt", seed=0, root=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"augment='strong'.*allowed.*cifar"):
        build_data(name="folder", seed=0, root=str(folder), augment="strong")
    (folder / "only.txt").write_text("train/ant/0.png 0\ntrain/ant/1.png 2\n")
    with pytest.raises(ValueError, match=r"no training image for classes \[1\]"):
        build_data(
            name="lists", seed=0, root=str(folder), augment="plain",
            train_list=str(folder / "only.txt"), test_list=str(folder / "only.txt"),
        )  # fmt: skip
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        build_data(
            name="lists", seed=0, root=str(folder), augment="plain",
            train_list=str(folder / "missing.txt"), test_list=str(folder / "only.txt"),
        )  # fmt: skip
    (folder / "train/ant/0.png").write_bytes(b"not an image")
    data = build_data(name="folder", seed=0, root=str(folder), augment="plain", size=16)
    with pytest.raises(ValueError, match=r"ant/0\.png"):
        list(data.batches(Plan(10, 10, seed=0), copies=1, device=CPU).epoch(1))


# ------------------------------------------------------------------------------------------------------------ batches
@pytest.mark.parametrize("name", ["digits_lt", "folder"])
def test_copies_are_independent_draws_of_the_same_images(name, folder):
    real = {"root": str(folder), "augment": "imagenet", "size": 16}
    data = build_data(name=name, seed=0, **(real if name == "folder" else {"n_max": 100, "imbalance": 50}))
    plan = Plan(len(data.indices), 8, seed=5)
    (a, labels), (b, _) = (next(data.batches(plan, copies=3, device=CPU).epoch(3)) for _ in range(2))
    assert len(a) == 3 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], a[1]) and not torch.equal(a[1], a[2]) and labels.shape == (8,)


# --------------------------------------------------------------------------------------------------------- transforms
def test_affine_without_ranges_is_the_identity_and_shift_moves_by_half_widths():
    images = torch.rand(2, 1, 8, 8)
    still = AffineNoise(rotation=0, scale=0, shear=0, shift=0, noise=0)
    torch.testing.assert_close(still(images, *still.draw(images.shape, torch.Generator())), images)
    shift = torch.tensor([[0, 0, 0, 0.25, 0]]).expand(
        2, 5
    )  # a quarter of a half width of 4 pixels: one pixel to the left
    moved = still(images, shift, torch.zeros_like(images))
    torch.testing.assert_close(moved[..., :-1], images[..., 1:])


def test_batched_cutout_is_cutout_and_comes_before_normalisation():
    images, still = torch.rand(300, 3, 32, 32), torch.full((300, 2), 4)
    op = CropFlipCutout(cutout=16, stats=((0.5, 0.4, 0.3), (0.2, 0.2, 0.1)))
    _, flip, centre = op.draw(images.shape, torch.Generator().manual_seed(0))
    assert centre.min() == 0 and centre.max() == 31 and 100 < flip.sum() < 200
    out = op(images, still, torch.zeros(300, dtype=torch.bool), centre)
    mean, std = torch.tensor(op.stats)[:, None, :, None, None]
    for i, (y, x) in enumerate(centre[:50].tolist()):
        expected = images[i].clone()
        expected[:, max(0, y - 8) : y + 8, max(0, x - 8) : x + 8] = 0
        torch.testing.assert_close(out[i], ((expected - mean) / std)[0])


def test_cutout_zeroes_at_most_its_square():
    torch.manual_seed(0)
    areas = [(Cutout(16)(torch.ones(3, 32, 32))[0] == 0).sum().item() for _ in range(200)]
    assert max(areas) == 256 and min(areas) >= 64, "the centre is uniform, so the square may be clipped at the border"


def test_training_images_are_normalised_as_test_images_are():
    image = Image.new("RGB", (32, 32), (200, 100, 50))
    for recipe in ("plain", "cifar_weak"):
        seen, tested = train_transform(recipe, size=32)(image), test_transform(recipe, size=32)(image)
        black = test_transform(recipe, size=32)(Image.new("RGB", (32, 32)))[:, :1, :1]
        padded = (seen == black).all(0)  # beyond the border
        assert padded.sum() < 32 * 8
        torch.testing.assert_close(seen[:, ~padded], tested[:, ~padded])


def test_the_released_order_of_the_strong_recipe():
    """Crop and flip, AutoAugment of CIFAR, a black square, and only then the normalisation."""
    recipe = train_transform("cifar", size=32)
    names = [type(t).__name__ for t in recipe.transforms]
    assert names == [
        "RandomCrop",
        "RandomHorizontalFlip",
        "AutoAugment",
        "PILToTensor",
        "ToDtype",
        "Cutout",
        "Normalize",
    ]
    assert recipe.transforms[2].policy.value == "cifar10"
    black = test_transform("cifar", size=32)(Image.new("RGB", (32, 32)))
    torch.manual_seed(0)
    for _ in range(20):
        seen = recipe(Image.new("RGB", (32, 32), (255, 255, 255)))
        assert (seen == black).all(0).sum() >= 64, "a square of black, not of the mean"


# -------------------------------------------------------------------------------------------------------- second views
def test_the_second_view_leaves_the_first_as_it_is(folder):
    """Other arms see the same numbers whether or not the MoCo branch asks for one more view."""
    digits = build_data(name="digits_lt", seed=0, imbalance=50)
    real = build_data(name="folder", seed=0, root=str(folder), augment="cifar", size=16)
    for data in (digits, real):
        plan = Plan(len(data.indices), 8, seed=0)
        one, two = (next(data.batches(plan, copies=2, device=CPU, second_view=v).epoch(1)) for v in (False, True))
        (one, labels), (two, again) = one, two
        assert len(one) == 2 and len(two) == 3 and two[2].shape == one[0].shape and torch.equal(labels, again)
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
        assert not torch.equal(two[2], two[0]) and not torch.equal(two[2], two[1])


def test_moco_view_crops_and_places_uses_its_own_recipe_twice():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    for recipe in ("cifar", "imagenet", "places"):
        assert moco_transform(recipe, size=32)(image).shape == (3, 32, 32)
    assert repr(moco_transform("places", size=32)) == repr(train_transform("places", size=32))
    assert "scale=(0.2, 1.0)" in repr(moco_transform("cifar", size=32))


# ----------------------------------------------------------------------------------------------------- counts, layouts
def test_cifar_exported_as_class_folders_is_read_too(tmp_path):
    names = [f"class{c}" for c in range(10)]
    write_class_folders(tmp_path, {"train": 4, "test": 1}, names, size=32)
    data = build_data(name="cifar10_lt", root=str(tmp_path), seed=0, imbalance=4, augment="cifar_gpu")
    assert data.counts == long_tail_counts(4, 4, 10) and data.classes == names and len(data.test) == 10
    assert data.images is not None and data.images.dtype == torch.uint8 and len(data.images) == sum(data.counts)
    x, y = data.test[3]
    with Image.open(tmp_path / "test/class3/0.png") as image:
        torch.testing.assert_close(x, inference_transform(channels=3, **data.look)(image))
    assert y == 3
    with pytest.raises(ValueError, match="10 class folders, cifar100 has 100"):
        build_data(name="cifar100_lt", root=str(tmp_path), seed=0)


def test_lists_are_found_under_the_root_or_its_folder(tmp_path):
    names = {"train": "a_train.txt", "test": "a_test.txt"}
    write_lists(tmp_path / "sub", names)
    options = {
        "name": "lists",
        "seed": 0,
        "train_list": "a_train.txt",
        "test_list": "a_test.txt",
        "augment": "plain",
        "size": 16,
    }
    for place in ({"root": str(tmp_path), "folder": "sub"}, {"root": str(tmp_path / "sub"), "folder": "sub"}):
        assert build_data(**options, **place).counts == [6, 6, 6]


def test_digits_offer_a_weak_augmentation():
    data = build_data(name="digits_lt", seed=0, augment="weak", imbalance=50)
    (x,), _ = next(data.batches(Plan(len(data.indices), 32, seed=0), copies=1, device=CPU).epoch(1))
    values = {round(v * 16, 6) for v in x.flatten().tolist()}
    assert values <= set(range(17)), "a crop makes no new grey values"
    with pytest.raises(ValueError, match=r"augment='strong', allowed for digits_lt: affine, weak"):
        build_data(name="digits_lt", seed=0, augment="strong")
