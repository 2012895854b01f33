"""DReLU: ranks, counts, an example, and where the published choice differs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rbonn.density_relu import dense, density_channels, density_relu, rank, small_scale_channels

ALPHA = torch.tensor([0.536, 0.648, 0.571, 0.032, 0.471, 0.424, 0.292, 0.492, 0.319, 0.766])


def indices(mask):
    return set(mask.nonzero().flatten().tolist())


def test_the_two_choices_of_the_published_example():
    assert indices(small_scale_channels(ALPHA, tau=0.6, rule="official")) == {0, 6, 7, 8}
    assert indices(small_scale_channels(ALPHA, tau=0.6, rule="fixed")) == {3, 5, 6, 8}  # the four smallest


def test_ranks_are_one_based_and_ascending():
    assert rank(torch.tensor([0.3, -1.0, 0.3, 7.0])).tolist() == [2, 1, 3, 4]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=30, unique=True),
    st.sampled_from([0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0]),
)
def test_counts(values, tau):
    alpha = torch.tensor(values, dtype=torch.float64)
    c = len(values)
    official, fixed = (small_scale_channels(alpha, tau=tau, rule=r) for r in ("official", "fixed"))
    assert official.sum() == int(c * (1 - tau))  # with the rounding of floats: int(10 * (1 - 0.8)) = 1
    assert fixed.sum() == (c * round(10 - 10 * tau)) // 10  # with that of whole numbers
    assert dense(alpha, tau=tau).sum() == c - int(c * tau)
    assert not fixed.any() or alpha[fixed].max() <= alpha[~fixed].min() if (~fixed).any() else True
    if tau in (0.0, 1.0):
        assert not density_channels(alpha.view(-1, 1), 1 / alpha, tau=tau).any()


def test_rounding_of_the_two_rules():
    ten, eight = torch.arange(10.0), torch.arange(8.0)
    assert small_scale_channels(ten, tau=0.8, rule="official").sum() == 1
    assert small_scale_channels(ten, tau=0.8, rule="fixed").sum() == 2
    assert dense(eight, tau=0.6).sum() == 4 and small_scale_channels(eight, tau=0.6, rule="fixed").sum() == 3


def test_density_relu_takes_sparse_weights_with_a_large_a():
    w = torch.tensor([[0.1, 0.1], [2.0, -2.0], [0.1, -0.2], [3.0, 3.0]])
    a = torch.tensor([9.0, 8.0, 1.0, 2.0])  # dense: 0 and 1
    assert indices(density_channels(w, a, tau=0.5)) == {0}
    torch.testing.assert_close(density_relu(w, a, tau=0.5), torch.tensor([[0.1, 0.1], [0, 0], [0, 0], [0, 0]]))


def test_bad_values_are_named():
    for tau in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"tau=.*0\.\.1"):
            small_scale_channels(ALPHA, tau=tau)
    with pytest.raises(ValueError, match="rule='best', allowed"):
        small_scale_channels(ALPHA, rule="best")
