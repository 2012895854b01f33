"""Class groups by their published sizes, group accuracy and calibration by hand."""

import math

import pytest
import torch

from common.metrics.classification import GROUPS, calibration, class_groups, group_accuracy


def longtail(factor, classes=100, largest=500):
    return [int(largest * factor ** (-i / (classes - 1))) for i in range(classes)]


@pytest.mark.parametrize(
    ("factor", "convention", "sizes"),
    [
        (10, "oltr", (69, 31, 0)),
        (50, "oltr", (41, 41, 18)),
        (100, "oltr", (35, 35, 30)),
        (200, "oltr", (30, 31, 39)),
        (100, "official", (35, 34, 31)),
    ],
)
def test_cifar100_lt_groups(factor, convention, sizes):
    groups = class_groups(longtail(factor), convention)
    assert tuple(int(groups[name].sum()) for name in GROUPS) == sizes
    assert torch.stack([*groups.values()]).sum(0).eq(1).all()  # every class in exactly one group


def test_group_bounds():
    counts = [101, 100, 99, 21, 20, 19]
    names = {
        convention: [next(n for n, m in class_groups(counts, convention).items() if m[i]) for i in range(6)]
        for convention in ("oltr", "official")
    }
    assert names["oltr"] == ["many", "medium", "medium", "medium", "medium", "few"]
    assert names["official"] == ["many", "many", "medium", "medium", "few", "few"]
    with pytest.raises(ValueError, match="'oltr' or 'official'"):
        class_groups(counts, "other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one count"):
        class_groups([[1, 2]])  # type: ignore[list-item]


def test_group_accuracy_counts_images_of_the_true_class():
    counts = [200, 150, 50]
    targets = torch.tensor([0, 0, 0, 1, 2, 2])
    predictions = torch.tensor([0, 0, 2, 0, 2, 1])
    accuracy = group_accuracy(predictions, targets, counts)
    assert accuracy == pytest.approx({"many": 50.0, "medium": 50.0})  # 2 of 4 images, not the mean of classes 1/3
    assert "few" not in accuracy
    with pytest.raises(ValueError, match=r"0\.\.2"):
        group_accuracy(predictions, targets + 1, counts)
    with pytest.raises(ValueError, match="must both be"):
        group_accuracy(predictions[:3], targets, counts)


def test_calibration_by_hand():
    # Confidence .8 on every image, 1 of 2 correct: ECE .3, NLL -(ln .8 + ln .2) / 2
    logits = torch.log(torch.tensor([[0.8, 0.2], [0.8, 0.2]]))
    result = calibration(logits, torch.tensor([0, 1]))
    assert result["ece"] == pytest.approx(0.3, abs=1e-6)
    assert result["nll"] == pytest.approx(-(math.log(0.8) + math.log(0.2)) / 2, abs=1e-6)
    # Logits that happen to lie in 0..1 are still logits.
    low = torch.tensor([[0.9, 0.1]])
    assert calibration(low, torch.tensor([0]))["ece"] == pytest.approx(1 - float(low.softmax(1)[0, 0]), abs=1e-6)
    # Bins are separate: over- and under-confidence do not cancel across bins.
    logits = torch.log(torch.tensor([[0.9, 0.1], [0.6, 0.4]]))
    assert calibration(logits, torch.tensor([1, 0]))["ece"] == pytest.approx((0.9 + 0.4) / 2, abs=1e-6)
