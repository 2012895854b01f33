import numpy as np
import pytest
import torch

from common.data.backgrounds import PHOTOGRAPHS, photo_crops, photographs, sine_textures
from common.data.dataset import Dataset
from common.data.objects import OBJECTS, digits_on_backgrounds, objects_on_backgrounds
from common.data.scenes import SPLITS, cued_digits, digit_grids, noisy_digits, source_digits, split_tasks
from common.data.sheets import SHEETS

MAKERS = {
    "cued": lambda split, seed: cued_digits(40, split=split, seed=seed),
    "grids": lambda split, seed: digit_grids(40, split=split, seed=seed),
    "digits": lambda split, seed: digits_on_backgrounds(40, split=split, seed=seed, rho=0.5),
    "photos": lambda split, seed: digits_on_backgrounds(
        40, split=split, seed=seed, size=16, channels=3, background="photos"
    ),
    "objects": lambda split, seed: objects_on_backgrounds(40, split=split, seed=seed, channels=3),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_deterministic_in_seed_and_split(make):
    a, b = make("train", 0), make("train", 0)
    assert torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets)
    assert not torch.equal(a.images, make("train", 1).images)
    assert not torch.equal(a.images, make("test", 0).images)
    assert a.masks is not None and a.masks.any()
    with pytest.raises(ValueError, match="'valid'"):
        make("valid", 0)


def test_train_and_test_scenes_use_different_originals():
    train, test = (source_digits(split, 1297)[0] for split in SPLITS)
    assert (len(train), len(test)) == (1297, 500)
    overlap = {x.tobytes() for x in train} & {x.tobytes() for x in test}
    assert len(overlap) < 3  # the library itself holds a few identical drawings at most


def test_noisy_digits():
    (train, test), (clean, _) = noisy_digits(), noisy_digits(sigma=0.0, standardise=False)
    assert (len(train), len(test)) == (1000, 797)
    assert abs(train.images.mean()) < 1e-5 and abs(train.images.std() - 1) < 1e-5
    assert abs(test.images.mean()) > 1e-4  # by the numbers of the training images
    rough, _ = noisy_digits(standardise=False)
    noise = rough.images - clean.images
    assert abs(noise.std() - 0.25) < 0.005 and abs(noise.mean()) < 0.005
    other, _ = noisy_digits(standardise=False, seed=1)
    assert torch.equal(other.targets, rough.targets)  # the split does not follow the seed
    assert not torch.equal(other.images, rough.images)
    with pytest.raises(ValueError, match="-1"):
        noisy_digits(sigma=-1)


def test_cued_digits_canvas():
    data = cued_digits(300, split="test", noise=0.0)
    assert data.images.shape == (300, 1, 16, 16) and data.masks is not None
    originals, labels = source_digits("test", 1297)
    known = {x.tobytes(): int(t) for x, t in zip(originals, labels, strict=True)}
    for image, target, mask, q, shown in zip(
        data.images[:, 0], data.targets, data.masks, data.extra["quadrant"], data.extra["digits"], strict=True
    ):
        row, column = divmod(int(q), 2)
        assert mask[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].all() and mask.sum() == 64
        bright = torch.nonzero(image == 2.0).tolist()
        assert bright == [[8 * row, 8 * column], [8 * row + 7, 8 * column + 7]]
        assert shown[q] == target
        other = (int(q) + 1) % 4
        r, c = divmod(other, 2)
        tile = image[8 * r : 8 * r + 8, 8 * c : 8 * c + 8].contiguous().numpy()
        assert known[tile.tobytes()] == shown[other]
    noisy = cued_digits(300, split="test")
    assert abs((noisy.images - data.images).std() - 0.05) < 0.001
    assert data.extra["quadrant"].bincount().min() > 40


def test_digit_grids_canvas():
    data = digit_grids(2000, split="train")
    assert data.images.shape == (2000, 1, 24, 24) and data.masks is not None
    k = data.extra["k"]
    assert torch.equal(data.masks.sum(dim=(1, 2)), 64 * k)
    assert sorted(k.unique().tolist()) == [1, 2, 3, 4] and k.bincount()[1:].min() > 400
    assert data.targets.bincount(minlength=10).min() > 140  # uniform in the target, unlike a maximum of k
    tokens = data.masks.float().unfold(1, 4, 4).unfold(2, 4, 4).mean(dim=(3, 4))
    assert ((tokens == 0) | (tokens == 1)).all() and torch.equal(tokens.sum(dim=(1, 2)).long(), 4 * k)
    background = data.images[:, 0][~data.masks]
    assert abs(background.std() - 0.1) < 0.002 and abs(background.mean()) < 0.002
    shown = data.images[:, 0][data.masks]
    assert shown.min() == 0 and shown.max() == 1


def test_digit_grid_target_is_the_largest_shown():
    originals, labels = source_digits("train", 1297)
    known = {x.tobytes(): int(t) for x, t in zip(originals, labels, strict=True)}
    data = digit_grids(300, split="train", grid=4, kmax=6)
    cells = data.images[:, 0].unfold(1, 8, 8).unfold(2, 8, 8).reshape(300, 16, 8, 8)
    smaller = twice = 0
    for row, target, k in zip(cells, data.targets, data.extra["k"], strict=True):
        found = [known[c.contiguous().numpy().tobytes()] for c in row if c.contiguous().numpy().tobytes() in known]
        assert len(found) == k and max(found) == target
        smaller += min(found) < target
        twice += target > 0 and found.count(int(target)) > 1
    assert smaller > 100 and twice > 30  # the others are below or equal
    with pytest.raises(ValueError, match=r"1\.\.9"):
        digit_grids(5, split="train", kmax=10)


@pytest.mark.parametrize("make", [digits_on_backgrounds, objects_on_backgrounds])
def test_spurious_cue(make):
    def own(**options):
        data = make(2000, split="train", **options)
        return (data.extra["background"] == data.targets).float().mean().item()

    assert own(rho=1.0) == 1
    assert abs(own(rho=0.0) - 0.1) < 0.025
    assert abs(own(rho=0.6) - 0.64) < 0.035  # rho + (1 - rho) / 10
    swapped = make(200, split="test", rho=1.0, swapped=True)
    assert torch.equal(swapped.extra["background"], (swapped.targets + 1) % 10)
    for bad in ({"rho": 1.5}, {"amplitude": -0.1}, {"background": "snow"}, {"channels": 2}, {"size": 7}):
        with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
            make(5, split="train", **bad)


def test_masks_cover_the_bright_object_and_nothing_else():
    for data in (
        digits_on_backgrounds(200, split="train", amplitude=0.3),
        objects_on_backgrounds(200, split="train", amplitude=0.3, size=24),
    ):
        image, mask = data.images[:, 0], data.masks
        assert mask is not None
        assert image[mask].min() >= 0.5  # half ink at least
        assert image[~mask].max() < 0.5 + 0.5 * 0.3 + 1e-6
        assert data.images.min() >= 0 and data.images.max() <= 1


def test_inverted_digits_are_negatives_with_the_same_mask():
    data = digits_on_backgrounds(600, split="train", inverted=True, amplitude=0.0)
    assert data.targets.unique().tolist() == list(range(20)) and data.masks is not None
    dark = data.targets >= 10
    assert data.images[:, 0][dark][data.masks[dark]].max() <= 0.5
    assert data.images[:, 0][~dark][data.masks[~dark]].min() >= 0.5


def test_objects_stay_inside_and_differ():
    data = objects_on_backgrounds(3000, split="train", amplitude=0.0, size=16)
    border = torch.ones(16, 16, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert data.masks is not None
    assert data.masks[:, border].float().mean() < 0.01
    means = torch.stack([data.images[data.targets == c].mean(dim=0).flatten() for c in range(len(OBJECTS))])
    distance = torch.cdist(means, means) + 10 * torch.eye(len(OBJECTS))
    assert distance.min() > 0.4


def test_textures_of_two_kinds_differ_in_spectrum_not_phase():
    rng = np.random.default_rng(0)
    which = np.repeat(np.arange(10), 20)
    spectra = np.abs(np.fft.fft2(sine_textures(which, 10, 8, rng)[:, 0] - 0.5)).reshape(200, -1)
    spectra /= np.linalg.norm(spectra, axis=1, keepdims=True)
    centres = np.stack([spectra[which == c].mean(axis=0) for c in range(10)])
    nearest = (spectra @ centres.T / np.linalg.norm(centres, axis=1)).argmax(axis=1)
    assert (nearest == which).mean() > 0.9


def test_photo_crops_are_crops():
    assert len(photographs()) == len(PHOTOGRAPHS) == 14
    assert all(p.dtype == np.uint8 and p.ndim == 3 and p.shape[2] == 3 for p in photographs())
    crops = photo_crops(np.arange(14).repeat(5), (12, 20), np.random.default_rng(0))
    assert crops.shape == (70, 3, 12, 20) and crops.min() >= 0 and crops.max() <= 1
    assert len({c.tobytes() for c in crops}) == 70
    grey = photo_crops(np.full(3, 4), 12, np.random.default_rng(0), channels=1)
    assert grey.shape == (3, 1, 12, 12)


def test_split_tasks():
    targets = torch.tensor([0, 1, 2, 3, 2, 1])
    images = targets.float().reshape(-1, 1, 1, 1)
    data = Dataset(images, targets, extra={"row": torch.arange(6)})
    first, second = split_tasks(data, sizes=[1, 3], order=[2, 0, 3, 1])
    assert first.targets.tolist() == [0, 0] and first.images.flatten().tolist() == [2, 2]
    assert second.images.flatten().tolist() == [0, 1, 3, 1] and second.targets.tolist() == [1, 3, 2, 3]
    assert second.extra["row"].tolist() == [0, 1, 3, 5]
    assert [len(t) for t in split_tasks(data, sizes=[2, 2])] == [3, 3]
    for bad in (
        {"sizes": [2, 1]},
        {"sizes": [4, 0]},
        {"sizes": []},
        {"sizes": [2, 2], "order": [0, 1, 1, 3]},
        {"sizes": [2, 3], "order": [0, 1, 2, 3, 4]},
    ):
        with pytest.raises(ValueError):
            split_tasks(data, **bad)


def test_every_sheet_draws():
    for name, draw in SHEETS.items():
        picture = draw()
        assert picture.dtype == torch.uint8 and picture.shape[0] == 3 and picture.float().std() > 10, name
