"""What is reported of the experts, on logits small enough to check by hand."""

import math

import pytest
import torch

from ncl_pp.evaluate import reweighted, test_prior
from ncl_pp.metrics import disagreement, expert_metrics, groups_of, per_class_accuracy

LOGITS = torch.tensor([[[3.0, 0, 0], [0, 1, 0], [0, 2, 0]], [[2.0, 0, 0], [2.5, 0, 0], [0, 0, 1.0]]])  # (K=2, M=3, C=3)
LABELS = torch.tensor([0, 1, 2])


def test_single_is_the_mean_of_experts_and_ensemble_averages_raw_logits():
    m = expert_metrics(LOGITS, LABELS, [10, 5, 1], groups="thirds")
    assert m["top1"] == pytest.approx(100 * (2 / 3 + 2 / 3) / 2)
    assert m["top1_ensemble"] == pytest.approx(100 / 3)  # rows 2 and 3 follow the larger logit, which is wrong
    assert m["top1_many"] == 100 and m["top1_ensemble_medium"] == 0 and m["top1_few"] == 50
    assert m["disagreement_argmax"] == pytest.approx(2 / 3)


def test_a_constant_added_to_one_expert_changes_nothing_but_a_factor_may():
    shifted = LOGITS + torch.tensor([7.0, 0.0])[:, None, None]
    a, b = (expert_metrics(z, LABELS, [10, 5, 1], groups="thirds") for z in (LOGITS, shifted))
    assert a["top1_ensemble"] == b["top1_ensemble"]
    scaled = LOGITS * torch.tensor([5.0, 1.0])[:, None, None]
    assert expert_metrics(scaled, LABELS, [10, 5, 1], groups="thirds")["top1_ensemble"] == pytest.approx(200 / 3)


def test_disagreement_is_the_mean_kl_over_ordered_pairs():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    value = disagreement(torch.stack([p.log(), q.log()])[:, None])
    assert value["disagreement_kl"] == pytest.approx((0.510826 + 0.368064) / 2, abs=1e-6)
    assert disagreement(torch.zeros(3, 4, 5)) == {"disagreement_kl": 0.0, "disagreement_argmax": 0.0}


def test_uniform_prior_changes_nothing_and_a_skewed_one_does():
    counts = [10, 5, 1]
    base = expert_metrics(LOGITS, LABELS, counts, groups="thirds")
    assert expert_metrics(LOGITS, LABELS, counts, groups="thirds", prior=torch.ones(3)) == pytest.approx(base)
    skewed = expert_metrics(LOGITS, LABELS, counts, groups="thirds", prior=torch.tensor([1e-6, 1.0, 1e-6]))
    assert skewed["top1"] == pytest.approx(100 / 3)


def test_priors_by_name():
    counts = [100, 10, 1]
    assert test_prior("uniform", counts, 50) is None
    torch.testing.assert_close(test_prior("train", counts, 50), torch.tensor([100, 10, 1], dtype=torch.double) / 111)
    forward, backward = test_prior("forward", counts, 4), test_prior("backward", counts, 4)
    torch.testing.assert_close(forward, torch.tensor([4, 2, 1], dtype=torch.double) / 7)
    torch.testing.assert_close(backward, forward.flip(0))
    with pytest.raises(ValueError, match=r"prior='upward'.*uniform, train, forward, backward"):
        test_prior("upward", counts, 4)
    assert reweighted(torch.tensor([100.0, 50.0, math.nan]), torch.tensor([0.5, 0.25, 0.25])) == pytest.approx(
        62.5 / 0.75
    )


def test_thirds_follow_the_counts_not_the_class_order():
    masks = groups_of([1, 100, 50, 7, 3], "thirds")
    assert {k: m.nonzero().flatten().tolist() for k, m in masks.items()} == {
        "many": [1],
        "medium": [2, 3, 4],
        "few": [0],
    }


def test_per_class_accuracy_of_an_absent_class_is_nan():
    values = per_class_accuracy(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 3)
    assert values[0] == 50 and values[1] == 100 and values[2].isnan()
