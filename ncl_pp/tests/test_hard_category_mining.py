import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ncl_pp.balanced_softmax import balanced_logits, balanced_softmax_loss
from ncl_pp.hard_category_mining import hard_budget, hard_category_loss, hard_category_mask


def example(experts=3, rows=4, classes=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(experts, rows, classes, generator=g, dtype=torch.float64)
    return z, torch.randint(0, classes, (rows,), generator=g), torch.randint(1, 99, (classes,), generator=g)


def hcm(z, y, n, hard, mode):
    return hard_category_loss(balanced_logits(z, n), y, hard_category_mask(z, y, hard), mode=mode)


def test_worked_example():
    z, y, n = torch.tensor([[[0.0, 1.0, 0.0]]], dtype=torch.float64), torch.tensor([0]), torch.tensor([10, 4, 2])
    assert balanced_softmax_loss(z, y, n).item() == pytest.approx(0.827378, abs=1e-6)
    assert hcm(z, y, n, 2, "zero_logit").item() == pytest.approx(0.782674, abs=1e-6)
    assert hcm(z, y, n, 2, "renorm").item() == pytest.approx(0.735877, abs=1e-6)


def test_only_zero_logit_depends_on_shift_and_scale():
    z, y, n = example()
    frequencies = n / n.sum()
    for mode, invariant in (("zero_logit", False), ("renorm", True)):
        loss = hcm(z, y, n, 3, mode)
        assert torch.allclose(hcm(z + 5, y, n, 3, mode), loss) is invariant
        assert torch.allclose(hcm(z, y, frequencies, 3, mode), loss) is invariant


def test_all_classes_hard_is_the_full_loss():
    z, y, n = example()
    for mode in ("zero_logit", "renorm"):
        assert_close(hcm(z, y, n, 7, mode), balanced_softmax_loss(z, y, n))


def test_one_hard_class_is_the_target_alone():
    z, y, n = example(rows=1)
    odds = n[y] * z[:, 0, y[0]].exp()
    assert_close(hcm(z, y, n, 1, "zero_logit"), torch.log(1 + 6 / odds))
    assert_close(hcm(z, y, n, 1, "renorm"), torch.zeros(3, dtype=torch.float64))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9999), st.integers(1, 7), st.sampled_from(["expert0", "mean", "per_expert"]))
def test_mask_selects_the_target_and_the_strongest_others(seed, hard, select):
    z, y, _ = example(seed=seed)
    mask = hard_category_mask(z, y, hard, select=select)
    assert mask.shape == z.shape and mask.dtype == torch.bool
    assert (mask.sum(-1) == hard).all()
    for k in range(3):
        scores = {"expert0": z[0], "mean": z.mean(0), "per_expert": z[k]}[select]
        for row in range(4):
            target = int(y[row])
            assert mask[k, row, target]
            chosen = [float(s) for c, s in enumerate(scores[row]) if mask[k, row, c] and c != target]
            others = [float(s) for c, s in enumerate(scores[row]) if not mask[k, row, c]]
            assert not chosen or not others or min(chosen) > max(others)


def test_published_mask_belongs_to_expert_0_alone():
    z, y, _ = example()
    mask = hard_category_mask(z, y, 3)
    assert torch.equal(hard_category_mask(torch.stack([z[0], z[2] * 9, -z[1]]), y, 3), mask)
    assert torch.equal(mask[0], mask[2])
    assert not torch.equal(hard_category_mask(z[[1, 0, 2]], y, 3), mask)
    by_mean = hard_category_mask(z, y, 3, select="mean")
    assert torch.equal(hard_category_mask(z[[1, 0, 2]], y, 3, select="mean"), by_mean)


def test_weakest_target_is_still_selected_and_no_gradient_flows():
    z = torch.tensor([[[-100.0, 3.0, 2.0, 1.0]]], requires_grad=True)
    mask = hard_category_mask(z, torch.tensor([0]), 2)
    assert mask.tolist() == [[[True, True, False, False]]]
    assert not mask.requires_grad


@pytest.mark.parametrize("mode", ["zero_logit", "renorm"])
def test_gradient_is_exactly_zero_off_the_mask(mode):
    z, y, n = example()
    z.requires_grad_()
    mask = hard_category_mask(z, y, 3)
    hard_category_loss(balanced_logits(z, n), y, mask, mode=mode).sum().backward()
    assert z.grad is not None
    assert (z.grad[~mask] == 0).all() and (z.grad[mask] != 0).all()
    balanced_rows = z.grad.sum(-1).abs() < 1e-14
    assert balanced_rows.all() if mode == "renorm" else not balanced_rows.any()


@pytest.mark.parametrize(
    ("classes", "hard", "expected"),
    [
        *[(100, 0.3, 30), (1000, 0.3, 300), (8142, 0.3, 2442), (10, 0.3, 3), (365, 122, 122), (365, 0.3, 109)],
        *[(100, 0.29, 29), (100, 1.0, 100), (100, 1, 1), (5, 5, 5)],
    ],
)
def test_budget(classes, hard, expected):
    assert hard_budget(classes, hard) == expected


@pytest.mark.parametrize("hard", [0, 11, -1, 0.0, 1.5, 0.05, math.nan, True, "3", None])
def test_bad_budget(hard):
    with pytest.raises(ValueError, match="hard="):
        hard_budget(10, hard)


def test_misspelt_choices():
    z, y, _ = example()
    with pytest.raises(ValueError, match=r"select='first', allowed: expert0, mean, per_expert"):
        hard_category_mask(z, y, 3, select="first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mode='zero', allowed: zero_logit, renorm"):
        hard_category_loss(z, y, z > 0, mode="zero")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"H=8 hard classes of C=7"):
        hard_category_mask(z, y, 8)
