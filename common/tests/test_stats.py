"""Holm, the t interval and equivalence against hand-worked examples and scipy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from common.metrics import stats


def test_t_test_and_interval_agree_with_scipy():
    x = np.array([1.1, 2.6, 1.5, -0.2])
    reference = ttest_1samp(x, 0)
    assert stats.t_test(x) == pytest.approx(reference.pvalue, rel=1e-12)
    for level in (0.9, 0.95, 1 - 0.05 / 3):
        low, high = reference.confidence_interval(level)
        assert stats.t_interval(x, level) == pytest.approx((low, high), rel=1e-10)


def test_t_interval_by_hand():
    # n = 3, mean 2, sd 1: half width 4.302653 / sqrt(3)
    assert stats.t_interval(np.array([1.0, 2.0, 3.0])) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-6)


def test_holm_by_hand():
    # sorted .01 .02 .04 -> 3 x .01 = .03, 2 x .02 = .04, 1 x .04 = .04 (order of the input kept)
    assert stats.holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    # the running maximum: .02 x 3 = .06 lifts the second, whose own product .025 x 2 = .05 is smaller
    assert stats.holm([0.02, 0.025, 0.9]) == pytest.approx([0.06, 0.06, 0.9])
    assert stats.holm([0.6, 0.7]) == [1.0, 1.0]
    assert stats.holm([]) == [] and stats.holm_levels([]) == []


def test_holm_levels_by_hand():
    assert stats.holm_levels([0.04, 0.01, 0.02]) == pytest.approx([0.95, 1 - 0.05 / 3, 0.975])
    # Stops at the second (.03 > .025): that one and the third are judged at .025, though .04 < .05.
    assert stats.holm_levels([0.04, 0.001, 0.03]) == pytest.approx([0.975, 1 - 0.05 / 3, 0.975])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
@settings(deadline=None, max_examples=50)
def test_levels_reproduce_holm(p_values):
    adjusted, levels = stats.holm(p_values), stats.holm_levels(p_values)
    for p, p_holm, level in zip(p_values, adjusted, levels, strict=True):
        if abs(p_holm - 0.05) > 1e-9:
            assert (p <= 1 - level) == (p_holm <= 0.05)


def test_equivalence_needs_the_whole_90_percent_interval():
    x = np.array([-0.1, 0.0, 0.1, 0.05])
    low, high = stats.t_interval(x, 0.9)
    assert stats.equivalent(x, max(-low, high) * 1.001)
    assert not stats.equivalent(x, max(-low, high) * 0.999)
    assert not stats.equivalent(x, 0.0)
    assert not stats.equivalent(np.zeros(3), 0.0) and stats.equivalent(np.zeros(3), 0.1)


def test_no_variance_is_degenerate_not_nan():
    same = np.full(3, 0.1)  # its mean is not exactly .1 in floating point
    assert stats.t_test(same) == 0.0 and stats.t_interval(same) == (0.1, 0.1)
    assert stats.t_test(np.zeros(4)) == 1.0
    assert stats.minimum_detectable_effect(same) == 0.0
    with pytest.raises(ValueError, match="at least 2"):
        stats.t_test(np.array([1.0]))


def test_minimum_detectable_effect_by_hand():
    # n = 3, sd 1: (4.302653 + 1.060660) / sqrt(3)
    assert stats.minimum_detectable_effect(np.array([1.0, 2.0, 3.0])) == pytest.approx(3.096510, abs=1e-5)
