"""Counts, choice and gather: the arithmetic of both poolings."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ap_fer.attentive_patch_pooling import APP
from ap_fer.token_selection import (
    active,
    check_keep,
    check_rates,
    check_when,
    gather_tokens,
    keep_count,
    select,
    to_mask,
    token_schedule,
)  # fmt: skip

PUBLISHED = [1.0] * 4 + [0.9] * 4


def test_keep_counts_are_floors_with_a_guard_against_binary_fractions():
    assert [keep_count(n, 0.9) for n in (160, 144, 129, 116)] == [144, 129, 116, 104]
    assert int(100 * 0.29) == 28 and keep_count(100, 0.29) == 29
    assert keep_count(3, 0.1) == 1 and keep_count(7, 1.0) == 7
    assert keep_count(10, 0.99) == 9, "not rounded up"


def test_the_published_token_schedules():
    assert [1 + n for n in token_schedule(196, 160, PUBLISHED)] == [161] * 5 + [145, 130, 117, 105]
    assert [1 + n for n in token_schedule(196, None, PUBLISHED)] == [197] * 5 + [1 + 176, 1 + 158, 1 + 142, 1 + 127]
    port = ([1.0] * 6 + [0.9] * 6)[:8]  # of the PaddlePaddle port: twelve entries for eight blocks
    assert [1 + n for n in token_schedule(196, 160, port)] == [161] * 7 + [145, 130]
    with pytest.raises(ValueError, match="keep=197 of 196"):
        token_schedule(196, 197, PUBLISHED)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 30), st.data())
def test_the_choice_is_the_k_best_ascending_and_unique(batch, n, data):
    k = data.draw(st.integers(1, n))
    levels = data.draw(st.integers(1, 4))  # few levels: many ties
    scores = torch.randint(levels, (batch, n), generator=torch.Generator().manual_seed(n * k)).float()
    for lowest in (False, True):
        index = select(scores, k, lowest=lowest)
        assert index.shape == (batch, k) and (index.diff(dim=1) > 0).all() and index.min() >= 0 and index.max() < n
        values = scores.gather(1, index).sort(1).values
        expected = scores.sort(1, descending=not lowest).values[:, :k].sort(1).values
        torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("keep", [24.5, 0, -3, 0.9])
def test_a_number_of_patches_is_a_whole_one(keep):
    """Never cut off, and never 'allowed are 1..0'."""
    with pytest.raises(ValueError, match=rf"keep={keep} of 36 patches; allowed are 1..36 \(or null"):
        check_keep(keep, 36)
    with pytest.raises(ValueError, match=rf"keep={keep}; allowed are whole numbers from 1 on"):
        APP(keep)
    assert check_keep(24.0, 36) == 24 and APP(24.0).keep == 24


def test_half_precision_scores_are_compared_in_float32_and_carry_no_gradient():
    scores = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    assert not select(scores, 2).requires_grad
    assert select(torch.tensor([[1, 3, 2]], dtype=torch.bfloat16), 2).tolist() == [[1, 2]]


def test_gather_takes_whole_tokens_of_the_right_image():
    x = torch.arange(2 * 4 * 3).view(2, 4, 3).float()
    out = gather_tokens(x, torch.tensor([[0, 3], [1, 2]]))
    assert out.tolist() == [x[0, [0, 3]].tolist(), x[1, [1, 2]].tolist()]
    out = gather_tokens(x, torch.tensor([[0, 1], [0, 2]]), prefix=1)
    assert out.tolist() == [x[0, [0, 1, 2]].tolist(), x[1, [0, 1, 3]].tolist()]
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)  # as features of a CNN come
    assert torch.equal(gather_tokens(strided, torch.tensor([[0], [2]]), prefix=1), x[[[0], [1]], [[0, 1], [0, 3]]])
    x.requires_grad_()
    gather_tokens(x, torch.tensor([[0, 1], [0, 2]]), prefix=1).mul(
        torch.tensor([1.0, 2, 3])[None, :, None]
    ).sum().backward()
    assert x.grad is not None and x.grad[..., 0].tolist() == [[1, 2, 3, 0], [1, 2, 0, 3]]
    assert to_mask(torch.tensor([[0, 2]]), 4).tolist() == [[True, False, True, False]]


def test_when_a_pooling_works():
    table = {w: [active(check_when(w), training) for training in (True, False)] for w in ("both", "train", "test")}
    assert table == {"both": [True, True], "train": [True, False], "test": [False, True]}
    with pytest.raises(ValueError, match="when='never'; use one of both, train, test"):
        check_when("never")


@pytest.mark.parametrize("rates", [[0.5] * 3, [0.0, 1.0], [1.1, 1.0], [-0.1, 1.0]])
def test_bad_rates(rates):
    with pytest.raises(ValueError, match="keep rates"):
        check_rates(rates, 2)


@pytest.mark.parametrize("keep", [0, -3, 11])
def test_bad_keep_numbers(keep):
    with pytest.raises(ValueError, match=f"keep={keep} of 10 patches; allowed are 1..10"):
        check_keep(keep, 10)
