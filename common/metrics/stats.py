"""The statistics behind the claims: t interval and test, Holm's procedure, equivalence, detectable effect.

Every function takes the effects of the seeds as a one-dimensional array; positive means the claimed side.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtr, stdtrit

ALPHA = 0.05


def t_test(effects: np.ndarray) -> float:
    """Two-sided p-value of the one-sample t test of mean 0. effects: (n,), n >= 2.

    Without variance the test is degenerate: 1 if all effects are 0, else 0."""
    mean, error = _mean_and_error(effects)
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stdtr(len(effects) - 1, -abs(mean) / error))


def t_interval(effects: np.ndarray, level: float = 1 - ALPHA) -> tuple[float, float]:
    """Two-sided t interval of the mean at confidence `level` in (0, 1). effects: (n,), n >= 2."""
    mean, error = _mean_and_error(effects)
    half = float(stdtrit(len(effects) - 1, (1 + level) / 2)) * error
    return mean - half, mean + half


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values in the order given: running maximum of (m - rank) p, at most 1 (Holm 1979)."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        running = max(running, min(1.0, (len(p_values) - rank) * float(p_values[i])))
        adjusted[i] = running
    return adjusted


def holm_levels(p_values: Sequence[float]) -> list[float]:
    """Confidence levels at which Holm judged each hypothesis, in the order given.

    A rejected hypothesis of rank k (from 0) was judged at alpha / (m - k). The procedure stops at the first that
    is not rejected; that one and all later ones are judged at its alpha. The t interval at this level therefore
    excludes 0 exactly when Holm rejects."""
    adjusted, m = holm(p_values), len(p_values)
    order = np.argsort(p_values, kind="stable")
    rejected = sum(p <= ALPHA for p in adjusted)
    levels = [0.0] * m
    for rank, i in enumerate(order):
        levels[i] = 1 - ALPHA / (m - min(rank, rejected))
    return levels


def equivalent(effects: np.ndarray, tol: float) -> bool:
    """Two one-sided tests at 5 %: the 90 % interval of the mean lies inside [-tol, tol]. False for tol = 0."""
    low, high = t_interval(effects, 1 - 2 * ALPHA)
    return tol > 0 and -tol <= low and high <= tol


def minimum_detectable_effect(effects: np.ndarray) -> float:
    """(t_.975 + t_.8) sd / sqrt(n) with n - 1 degrees of freedom: 80 % power, two-sided 5 %, this design."""
    _, error = _mean_and_error(effects)
    df = len(effects) - 1
    return float(stdtrit(df, 1 - ALPHA / 2) + stdtrit(df, 0.8)) * error


def _mean_and_error(effects: np.ndarray) -> tuple[float, float]:
    """Mean and standard error of the mean."""
    if len(effects) < 2:
        raise ValueError(f"a t interval needs at least 2 effects, got {len(effects)}")
    if np.ptp(effects) == 0:  # exactly: the mean of equal floats may be off by a rounding error
        return float(effects[0]), 0.0
    return float(np.mean(effects)), float(np.std(effects, ddof=1)) / len(effects) ** 0.5
