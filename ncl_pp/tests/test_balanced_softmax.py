import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ncl_pp.balanced_softmax import (
    adjust_to_prior,
    balanced_logits,
    balanced_softmax_loss,
    check_class_counts,
    cross_entropy,
)


def cifar100_lt_counts():
    return torch.tensor([int(500 * 100 ** (-i / 99)) for i in range(100)])


@pytest.mark.parametrize(("label", "expected"), [(0, 3.077036), (99, 7.682206)])
def test_zero_logits_give_the_log_inverse_class_frequency(label, expected):
    z = torch.zeros(1, 1, 100, dtype=torch.float64)
    loss = balanced_softmax_loss(z, torch.tensor([label]), cifar100_lt_counts())
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.01, 100), st.floats(-20, 20))
def test_invariant_to_the_scale_of_counts_and_to_a_constant(seed, scale, shift):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(2, 3, 5, generator=g, dtype=torch.float64)
    n = torch.randint(1, 1000, (5,), generator=g).double()
    y = torch.randint(0, 5, (3,), generator=g)
    loss = balanced_softmax_loss(z, y, n)
    assert_close(balanced_softmax_loss(z + shift, y, scale * n), loss)
    assert_close(balanced_softmax_loss(z, y, torch.full_like(n, scale)), cross_entropy(z, y))


def test_mean_over_rows_separately_for_every_expert():
    z = torch.tensor([[[0.0, 1.0], [2.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    y, n = torch.tensor([1, 1]), torch.tensor([3, 1])
    first = (math.log(3 + math.e) - 1 + math.log(3 * math.e**2 + 1)) / 2
    expected = torch.tensor([first, math.log(4)], dtype=torch.float64)
    assert_close(balanced_softmax_loss(z, y, n), expected)


def test_gradient_rows_sum_to_zero():
    z = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    balanced_softmax_loss(z, torch.tensor([0, 1, 5, 2]), torch.arange(1, 7)).sum().backward()
    assert z.grad is not None
    assert_close(z.grad.sum(-1), torch.zeros(2, 4, dtype=torch.float64), atol=1e-15, rtol=0)


def test_prior_is_added_along_the_class_axis():
    v = balanced_logits(torch.zeros(3, 2, 3), torch.tensor([1, 2, 4]))
    assert_close(v[2, 1], torch.tensor([1.0, 2.0, 4.0]).log())


@pytest.mark.parametrize("counts", [[3, 1], (3.0, 1.0), torch.tensor([3, 1], dtype=torch.int16)])
def test_counts_of_any_container_become_integers(counts):
    assert torch.equal(check_class_counts(counts), torch.tensor([3, 1]))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([5, 0, 3, -1], "2 of 4 classes .* classes 1, 3;"),
        ([0.5, 0.3, 0.2], "frequencies"),
        ([float("nan"), 2.0], "whole numbers"),
        ([], "one count per class"),
        ([[1, 2]], "one count per class"),
    ],
)
def test_bad_counts_are_named(counts, message):
    with pytest.raises(ValueError, match=message):
        check_class_counts(counts)


def test_test_prior():
    z = torch.tensor([[0.0, 1.0, 0.5]])
    assert_close(adjust_to_prior(z, torch.ones(3)).softmax(-1), z.softmax(-1))
    assert torch.equal(adjust_to_prior(z, torch.ones(3)).argmax(-1), z.argmax(-1))
    assert adjust_to_prior(z, torch.tensor([8.0, 1.0, 1.0])).argmax().item() == 0
    with pytest.raises(ValueError, match="3 classes"):
        adjust_to_prior(z, torch.ones(2))
    with pytest.raises(ValueError, match="positive"):
        adjust_to_prior(z, torch.tensor([1.0, 0.0, 1.0]))
