"""The logistic map of a model's scores (Eq. 5), correlations after it, the paper's SRCC over 24 points and R (Eq.
6)."""

import math
from typing import Any

import numpy as np
import torch
from scipy.optimize import least_squares
from scipy.stats import kendalltau, pearsonr, spearmanr
from scipy.stats import t as student_t
from torch import Tensor

TOP, BOTTOM = 10.0, 0.0  # b1 and b2
SMALLEST_CHANGE = 1e-8
COMPETENT = 0.8  # clean SRCC on the attacked images below which a model carries no claim


def logistic(f: Tensor, b3: float, b4: float) -> Tensor:
    """q(f) = 10 / (1 + exp(-(f - b3) / |b4|)), in 0..10."""
    return BOTTOM + (TOP - BOTTOM) * torch.sigmoid((f - b3) / abs(b4))


def fit_logistic(scores, mos) -> tuple[float, float]:
    """(b3, b4) by least squares of q(score) to mos on the 0..10 scale. ValueError for constant scores."""
    f, y = np.asarray(scores, dtype=np.float64), np.asarray(mos, dtype=np.float64)
    if len(f) < 3 or np.ptp(f) == 0 or not np.isfinite(f).all():
        raise ValueError(
            f"{len(f)} scores between {f.min():g} and {f.max():g}: no logistic can be fitted to constant scores"
        )

    def residual(p):
        return TOP / (1 + np.exp(-np.clip((f - p[0]) / (abs(p[1]) + 1e-12), -50, 50))) - y

    spread = f.std()
    starts = [(float(np.median(f)), spread * k) for k in (0.3, 1.0, 3.0)]
    best = min((least_squares(residual, s, x_scale=(spread, spread)) for s in starts), key=lambda r: r.cost)
    return float(best.x[0]), max(abs(float(best.x[1])), 1e-3 * spread)


def correlations(scores, mos) -> dict[str, float]:
    """{srcc, krcc, plcc, rmse} of scores on the 0..10 scale (after the logistic). ValueError for constant input."""
    s, y = np.asarray(scores, dtype=np.float64), np.asarray(mos, dtype=np.float64)
    if np.ptp(s) == 0 or np.ptp(y) == 0:
        raise ValueError("correlations need scores and MOS that differ between images")
    return {
        "srcc": _value(spearmanr(s, y)), "krcc": _value(kendalltau(s, y)),
        "plcc": _value(pearsonr(s, y)), "rmse": float(np.sqrt(np.mean((s - y) ** 2))),
    }  # fmt: skip


def _value(result: Any) -> float:
    return float(result.statistic)


def srcc24(before, after, mos) -> float:
    """Spearman's rho over the S images and their S counterexamples, which inherit the MOS (average ranks)."""
    s = np.concatenate([np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)])
    return _value(spearmanr(s, np.tile(np.asarray(mos, dtype=np.float64), 2)))


def stability(before, after) -> tuple[float, int]:
    """(R, how many of the S predictions did not change).

    R = mean_i ln(max{b1 - s_i, s_i - b2} / |s_i - s*_i|), natural logarithm, larger = more stable. A change below
    1e-8 counts as 1e-8 (R = 20.7 for a score of 0 or 10), so that R stays finite."""
    a, b = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if a.min() < BOTTOM - 1e-6 or a.max() > TOP + 1e-6:
        raise ValueError(
            f"scores must lie in {BOTTOM:g}..{TOP:g}, got {a.min():g}..{a.max():g}: apply the logistic first"
        )
    change = np.abs(a - b)
    still = int((change < SMALLEST_CHANGE).sum())
    return float(np.log(np.maximum(TOP - a, a - BOTTOM) / np.maximum(change, SMALLEST_CHANGE)).mean()), still


def stability_interval(before, after, level: float = 0.95) -> tuple[float, float, float]:
    """(R, low, high): a t interval of the mean over images; a single image has none (low = high = R)."""
    each = np.array([stability([b], [a])[0] for b, a in zip(before, after, strict=True)])
    if len(each) < 2:
        return float(each.mean()), float(each.mean()), float(each.mean())
    half = student_t.ppf((1 + level) / 2, len(each) - 1) * each.std(ddof=1) / math.sqrt(len(each))
    return float(each.mean()), float(each.mean() - half), float(each.mean() + half)


# --------------------------------------------------------------------------------- arithmetic of the published table
def clean_lattice(n: int = 12) -> np.ndarray:
    """Every SRCC of n untied points: 1 - sum d^2 / (n (n^2 - 1) / 6), sum d^2 even."""
    largest = n * (n * n - 1) // 3
    return 1 - np.arange(0, largest + 1, 2) / (largest / 2)


def doubled_lattice(n: int = 12) -> np.ndarray:
    """Every SRCC of 2n untied predictions against n MOS, each repeated: k / sqrt(var_pred var_mos), k an integer.

    Ranks 1 .. 2n of the predictions and average ranks 1.5, 3.5, ... of the MOS: sums of squares 1150 and 1144 for n =
    12."""
    predictions = sum((r - (2 * n + 1) / 2) ** 2 for r in range(1, 2 * n + 1))
    mos = 2 * sum((2 * i + 1.5 - (2 * n + 1) / 2) ** 2 for i in range(n))
    top = math.floor(mos)  # the covariance of equal orders
    return np.arange(-top, top + 1) / math.sqrt(predictions * mos)


def on_lattice(value: float, lattice: np.ndarray, digits: int = 4) -> bool:
    """Whether a published, rounded value is the rounding of a lattice value."""
    return bool(np.abs(lattice - value).min() <= 0.5 * 10**-digits + 1e-9)
