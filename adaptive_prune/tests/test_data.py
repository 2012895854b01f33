"""Batches, the content metrics, and McNemar."""

import pytest
import torch
from scipy.stats import binom, spearmanr

from adaptive_prune.budget import ViTCost
from adaptive_prune.data import build_data
from adaptive_prune.metrics import classification, content, histogram, mcnemar, merit
from common.data.batches import Plan

CPU = torch.device("cpu")


def test_digit_grids_are_new_in_every_epoch_and_equal_for_a_seed():
    data = build_data(name="digit_grids", seed=1, train_images=32, test_images=8)
    plan = Plan(32, 16, seed=1)
    first, again, second = (next(data.batches(plan, e, CPU))[0] for e in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first.sort(0).values, second.sort(0).values)
    assert data.truth["k"].shape == (8,) and data.classes == [str(c) for c in range(10)]
    with pytest.raises(ValueError, match="repeated augmentation"):
        build_data(name="digit_grids", seed=0, repeats=3)


def test_recall_and_its_chance_level():
    truth = {"k": torch.tensor([1, 2]), "masks": torch.zeros(2, 4, 4, dtype=torch.bool)}
    truth["masks"][0, :2, :2] = True  # one of four patches
    truth["masks"][1, :2] = True  # two of four
    masks = torch.tensor([[[1, 1, 0, 0], [1, 0, 0, 0]], [[1, 1, 1, 1], [0, 1, 1, 1]]], dtype=torch.uint8)
    kept = masks.sum(-1).float()
    found = content(masks, kept, torch.tensor([True, False]), truth, patch=2, locations=(1, 2), depth=4)
    # weights 1/3 and 2/3: image 0 keeps all of its digit, image 1 everything, then one token of two
    recall = (1.0 + (1 / 3 + 2 / 3 * 0.5)) / 2
    chance = ((0.5 / 3 + 0.25 * 2 / 3) + (1 / 3 + 0.75 * 2 / 3)) / 2
    assert found["recall"] == pytest.approx(recall) and found["recall_lift"] == pytest.approx(recall - chance)
    assert found["kept_k1"] == pytest.approx(1 / 3) and found["kept_corr"] == pytest.approx(1.0)
    assert found["top1_k1"] == 100 and found["top1_k2"] == 0
    assert content(masks, kept, torch.tensor([True]), {}, patch=2, locations=(1, 2), depth=4) == {}


def test_content_without_a_number_is_the_size_of_the_object():
    masks = torch.zeros(4, 4, 4, dtype=torch.bool)
    for i, (rows, columns) in enumerate([(1, 1), (2, 4), (3, 3), (0, 0)]):  # 1, 2, 4 and no patch of 2 x 2
        masks[i, :rows, :columns] = True
    kept = torch.tensor([[[1, 0, 0, 0]], [[1, 0, 0, 0]], [[1, 1, 1, 0]], [[0, 0, 0, 1]]])
    found = content(kept, kept.sum(-1).float(), torch.tensor([True, False, True, True]), {"masks": masks}, patch=2,
                    locations=(1,), depth=2)  # fmt: skip
    assert found["kept_corr"] == pytest.approx(spearmanr([1, 1, 3, 1], [1, 2, 4, 0]).statistic)
    assert found["recall"] == pytest.approx((1 + 0.5 + 0.75) / 3), "an image without an object has none to find"
    assert found["recall_lift"] == pytest.approx((1 + 0.5 + 0.75) / 3 - (0.25 + 0.25 + 0.75) / 3)
    assert [found[f"kept_k{k}"] for k in (1, 2, 3, 4)] == [0.25, 0.25, 0.25, 0.75] and found["top1_k3"] == 0


def test_best_is_what_meets_the_budget_and_then_is_most_accurate():
    cheap, dear, dearer = {"macs": 0.50, "top1": 60.0}, {"macs": 0.509, "top1": 61.0}, {"macs": 0.9, "top1": 99.0}
    order = sorted([dearer, cheap, dear], key=lambda f: merit(f, 0.5))
    assert order == [dearer, cheap, dear] and merit({"macs": 0.6, "top1": 1.0}, 0.5) > merit(dearer, 0.5)


class Clothes:
    """Stands for a set of torchvision's: image i has one square of brightness i + 30."""

    def __init__(self, train):
        n = 40 if train else 6
        self.data, self.targets, self.transform = torch.zeros(n, 28, 28, dtype=torch.uint8), torch.arange(n) % 3, None
        self.data[:, 8:16, 8:16] = torch.arange(n, dtype=torch.uint8)[:, None, None] + 30
        self.data[:, 20, 20] = 20  # noise
        self.classes = ["coat", "bag", "shirt"]

    def __len__(self):
        return len(self.data)


@pytest.fixture
def clothes(monkeypatch):
    monkeypatch.setattr("adaptive_prune.data.torchvision_set", lambda *_, train, **__: Clothes(train))
    return lambda **more: build_data(name="fashion_mnist", root="x", size=28, **more)


def brightness(images, data):
    mean, std = (data.look["normalise"][k][0] for k in ("mean", "std"))
    return sorted((images.flatten(1).amax(1) * std + mean).mul(255).round().long().sub(30).tolist())


def test_validation_images_are_set_aside_for_every_seed_alike(clothes):
    parts = []
    for seed in (0, 1):
        data = clothes(seed=seed, validation=8, subset=16)
        drawn = torch.cat([x for e in (1, 2) for x, _ in data.batches(Plan(16, 8, seed=seed), e, CPU)])
        held = brightness(torch.stack([data.validation[i][0] for i in range(8)]), data)
        used = set(brightness(drawn, data))
        assert data.train_size == 16 and len(used) == 16 and len(set(held)) == 8 and not used & set(held)
        parts.append((used, held))
    assert parts[0] == parts[1]
    assert clothes(seed=0).train_size == 40 and clothes(seed=0).validation is None
    with pytest.raises(ValueError, match=r"data\.validation=30, data\.subset=11, but there are only 40"):
        clothes(seed=0, validation=30, subset=11)


def test_the_object_of_a_grey_photograph_is_what_is_not_black(clothes):
    data = clothes(seed=0)
    about = {**data.about(), "classes": data.classes}
    for found in (data, clothes(seed=0, about=about)):
        assert found.truth["masks"].sum((1, 2)).tolist() == [64] * 6 and found.truth["masks"][0, 8:16, 8:16].all()
    assert build_data(name="fashion_mnist", root="x", size=32, seed=0).truth == {}, "not at another size"


def test_grids_set_aside_are_of_the_training_digits_and_no_epochs():
    data = build_data(name="digit_grids", seed=1, train_images=32, test_images=8, validation=16)
    held = torch.stack([data.validation[i][0] for i in range(16)])
    first = next(data.batches(Plan(32, 32, seed=1), 1, CPU))[0]
    assert len(held) == 16 and not (held[:, None] == first[None]).flatten(2).all(2).any()


def test_classification_and_histogram():
    cost = ViTCost(dim=4, hidden=8, heads=1, depth=2, patches=4, prefix=1, stem=0)
    logits = torch.eye(6)[torch.tensor([0, 1, 2])]
    kept = torch.tensor([[2.0], [4.0], [3.0]])
    found, right = classification(logits, torch.tensor([0, 1, 5]), torch.full((3,), cost.dense / 2), kept, cost)
    assert right.tolist() == [True, True, False] and found["top1"] == pytest.approx(200 / 3)
    assert found["macs"] == pytest.approx(0.5) and found["kept_1"] == pytest.approx(0.75)
    assert found["kept_hard"] == pytest.approx(spearmanr([2, 4, 3], [0, 0, 1]).statistic), "the third image is wrong"
    rows = histogram(kept, bins=2)
    assert [r["images"] for r in rows] == [1, 2] and histogram(torch.full((5, 1), 3.0))[0]["images"] == 5


def test_mcnemar_is_the_exact_binomial_test():
    a = torch.tensor([True] * 9 + [False] * 3 + [True] * 5)
    b = torch.tensor([False] * 9 + [True] * 3 + [True] * 5)
    found = mcnemar(a, b)
    assert (found["only_a"], found["only_b"]) == (9, 3) and found["p"] == pytest.approx(2 * binom.cdf(3, 12, 0.5))
    assert mcnemar(a, a)["p"] == 1.0
    with pytest.raises(ValueError, match="different images"):
        mcnemar(a, b[:3])
