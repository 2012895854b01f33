"""Batches, the content metrics, and McNemar."""

import pytest
import torch
from scipy.stats import binom

from adaptive_prune.budget import ViTCost
from adaptive_prune.data import build_data
from adaptive_prune.metrics import classification, content, histogram, mcnemar
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


def test_classification_and_histogram():
    cost = ViTCost(dim=4, hidden=8, heads=1, depth=2, patches=4, prefix=1, stem=0)
    logits = torch.eye(6)[torch.tensor([0, 1, 2])]
    kept = torch.tensor([[2.0], [4.0], [3.0]])
    found, right = classification(logits, torch.tensor([0, 1, 5]), torch.full((3,), cost.dense / 2), kept, cost)
    assert right.tolist() == [True, True, False] and found["top1"] == pytest.approx(200 / 3)
    assert found["macs"] == pytest.approx(0.5) and found["kept_1"] == pytest.approx(0.75)
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
