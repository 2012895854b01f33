"""Batches by (seed, epoch), the augmentations, and learning rates by epoch."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.batches import Plan
from common.data.images import Images, Lighting
from rbonn.data import STATS, CropFlipNormalise, build_data
from rbonn.schedule import lr_at


def test_cifar_batches_are_cropped_flipped_and_normalised():
    images = torch.full((4, 3, 8, 8), 128, dtype=torch.uint8)
    data = Images(10, 3, 8, None, tensors=(images, torch.arange(4)), augment=CropFlipNormalise(padding=2))
    (batch,), _ = next(data.batches(Plan(4, 4, seed=0), torch.device("cpu")).epoch(1))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in STATS["cifar10"])
    expected = torch.stack([(128 / 255 - mean) / std, -mean / std]).flatten(
        1
    )  # a pixel of the image, or of the padding
    for c in range(3):
        torch.testing.assert_close(batch[:, c].unique(), expected[:, c].sort().values)


def test_lighting_official_hardly_changes_a_grey_level_and_the_correct_one_does():
    torch.manual_seed(0)
    image = Image.fromarray(np.random.default_rng(0).integers(30, 220, (16, 16, 3), dtype=np.uint8))
    change = {}
    for official in (True, False):
        shifts = [np.asarray(Lighting(official=official)(image)).astype(int) - np.asarray(image) for _ in range(20)]
        change[official] = np.abs(shifts).max()
    assert change[True] <= 1 < 3 < change[False]


def test_training_images_of_folders_are_cropped_at_random_and_test_images_are_not(folders):
    data = build_data(name="folder", seed=0, root=str(folders), size=32)
    ramp = Image.fromarray(np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[:, None], 60, axis=1)).convert("RGB")
    torch.manual_seed(0)
    drawn = torch.stack([data.transform(ramp) for _ in range(20)])  # a flip changes nothing here
    rise = drawn[:, 0, -1, 16] - drawn[:, 0, 0, 16]
    assert drawn.shape == (20, 3, 32, 32) and rise.min() > 0 and rise.max() > 1.5 * rise.min()
    torch.testing.assert_close(drawn, drawn.flip(-1))
    image, label = data.test[0]
    assert torch.equal(image, data.test[0][0]) and label == 0


def test_images_of_folders_are_normalised_alike_for_training_and_test(tmp_path):
    colour, mean, std = (200, 100, 50), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", (40, 40), colour).save(tmp_path / split / "a/0.png")
    data = build_data(name="folder", seed=0, root=str(tmp_path), size=32)
    (trained,), _ = next(data.batches(Plan(1, 1, seed=0), torch.device("cpu")).epoch(1))
    for image in (trained[0], data.test[0][0]):
        found = [channel.unique().tolist() for channel in image]
        assert found == [pytest.approx([(v / 255 - m) / s]) for v, m, s in zip(colour, mean, std, strict=True)]


def test_digits_depend_on_the_seed_by_their_noise_only():
    a, b = (build_data(name="digits", seed=s) for s in (0, 1))
    assert len(a) == 1000 and len(a.test) == 797 and torch.equal(a.tensors[1], b.tensors[1])
    assert not torch.equal(a.tensors[0], b.tensors[0]) and abs(a.tensors[0].mean()) < 1e-5
    assert torch.equal(a.plain_train()[3][0], a.tensors[0][3])


def test_unknown_data_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="data.lighting='pca', allowed"):
        build_data(name="digits", seed=0, lighting="pca")
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py"):
        build_data(name="cifar10", seed=0, root=str(tmp_path))


def test_learning_rates():
    assert [lr_at(e, base_lr=1.0, epochs=4) for e in (1, 2, 4)] == [1.0, 0.75, 0.25]
    assert lr_at(3, base_lr=1.0, epochs=4, kind="cosine") == pytest.approx(0.5)
    assert [lr_at(e, base_lr=1.0, epochs=4, kind="step", milestones=[3]) for e in (2, 3)] == [1.0, 0.1]
    with pytest.raises(ValueError, match=r"milestones=\[5\]"):
        lr_at(1, base_lr=1.0, epochs=4, kind="step", milestones=[5])
    with pytest.raises(ValueError, match="epoch=0, allowed: 1..4"):
        lr_at(0, base_lr=1.0, epochs=4)
