"""Presentation attack detection metrics (section 6), from liveness scores in 0..1; accepted as live iff score >= threshold.

All take numpy arrays: scores (n,), live (n,) bool, and where named species (n,) str, "live" for live ones. Rates are in percent.
    APCER  attacks accepted;  BPCER  live rejected;  ACER  their mean;  HTER  ACER at a threshold fixed on other data
ISO/IEC 30107-3 takes APCER per species and reports the worst; the literature of this field pools: both are given.
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from sklearn.metrics import det_curve, roc_auc_score, roc_curve

OPERATING_POINTS = (1e-2, 1e-3, 1e-4)


def check(scores: np.ndarray, live: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays. ValueError for lengths that differ, scores that are not finite, or a class without a sample."""
    scores, live = np.asarray(scores, dtype=float), np.asarray(live, dtype=bool)
    if scores.shape != live.shape or scores.ndim != 1:
        raise ValueError(f"scores {scores.shape} and labels {live.shape} must be vectors of one length")
    if not np.isfinite(scores).all():
        raise ValueError(f"{(~np.isfinite(scores)).sum()} scores are not finite")
    if not live.any() or live.all():
        raise ValueError(f"needs live samples and attacks, got {live.sum()} live and {(~live).sum()} attacks")
    return scores, live


def apcer_by_species(
    scores: np.ndarray, species: Sequence[str], threshold: float, wanted: Sequence[str] | None = None
) -> dict[str, float]:
    """APCER of every species of attack. wanted: names that must be there; ValueError for one without a sample."""
    kinds = np.asarray(species)
    names = sorted(set(kinds.tolist()) - {"live"})
    if absent := sorted(set(wanted or ()) - set(names)):
        raise ValueError(f"no sample of the attack species {', '.join(absent)}; there are {', '.join(names) or 'none'}")
    return {name: 100 * float((np.asarray(scores)[kinds == name] >= threshold).mean()) for name in names}


def error_rates(scores: np.ndarray, live: np.ndarray, threshold: float) -> dict[str, float]:
    """apcer (pooled), bpcer, acer at a threshold."""
    scores, live = check(scores, live)
    apcer, bpcer = 100 * float((scores[~live] >= threshold).mean()), 100 * float((scores[live] < threshold).mean())
    return {"apcer": apcer, "bpcer": bpcer, "acer": (apcer + bpcer) / 2}


def eer_threshold(scores: np.ndarray, live: np.ndarray) -> tuple[float, float]:
    """(threshold, equal error rate in percent): the ROC point with the smallest |BPCER - APCER|.

    Of equal ones that with the largest threshold.

    The threshold lies halfway to the next lower score, so that it does not depend on a single sample's rounding."""
    scores, live = check(scores, live)
    fpr, tpr, thresholds = roc_curve(live, scores, drop_intermediate=False)
    best = int(np.abs((1 - tpr) - fpr).argmin())
    below = scores[scores < thresholds[best]]
    at = float(thresholds[best]) if np.isfinite(thresholds[best]) else float(np.nextafter(scores.max(), np.inf))
    threshold = (at + below.max()) / 2 if len(below) else at
    return threshold, 50 * float(fpr[best] + 1 - tpr[best])


def bpcer_threshold(scores: np.ndarray, live: np.ndarray, *, bpcer: float = 1.0) -> float:
    """The largest threshold that rejects at most `bpcer` percent of the live samples (the rule of WMCA, on development data)."""
    scores, live = check(scores, live)
    ordered = np.sort(scores[live])
    return float(ordered[int(np.floor(bpcer / 100 * len(ordered) + 1e-9))])


def tpr_at_fpr(scores: np.ndarray, live: np.ndarray, rate: float, *, positive: str = "live") -> float:
    """Percent of positives found at the false positive rate `rate`, linear interpolation of the ROC.

    positive: "live" (CASIA-SURF) or "attack" (detection rate at a false alarm rate among the live).
    Warns when 1 / number of negatives is above `rate`: it cannot be measured then. ValueError for another `positive`."""
    scores, live = check(scores, live)
    if positive not in ("live", "attack"):
        raise ValueError(f"positive={positive!r}, allowed: live, attack")
    truth, values = (live, scores) if positive == "live" else (~live, -scores)
    negatives = int((~truth).sum())
    if rate * negatives < 1:
        warnings.warn(f"a false positive rate of {rate:g} cannot be measured with {negatives} negatives", stacklevel=2)
    fpr, tpr, _ = roc_curve(truth, values, drop_intermediate=False)
    return 100 * float(np.interp(rate, fpr, tpr))


def video_scores(scores: np.ndarray, videos: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(mean score of each video, index of its first frame), videos in the order of their first frame; threshold afterwards."""
    names, first, group = np.unique(np.asarray(videos), return_index=True, return_inverse=True)
    means = np.bincount(group, weights=np.asarray(scores, float)) / np.bincount(group)
    order = first.argsort()
    return means[order], first[order]


def bootstrap(
    metric: Callable[[np.ndarray], float],
    groups: Sequence[object],
    *,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of metric(indices) over resampled groups (subjects): frames of a subject are not independent.

    metric: from indices into the samples to a number; it may raise ValueError for a resample without a class, which is drawn
    again. ValueError if there is one group only, or if hardly any resample is usable."""
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"a bootstrap over groups needs two or more, got {len(names)}")
    members = [np.flatnonzero(group == g) for g in range(len(names))]
    rng, values = np.random.default_rng(seed), []
    for _ in range(10 * draws):
        try:
            values.append(metric(np.concatenate([members[g] for g in rng.integers(len(names), size=len(names))])))
        except ValueError:
            continue
        if len(values) == draws:
            low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
            return float(low), float(high)
    raise ValueError(f"only {len(values)} of {10 * draws} resamples have both classes")


def summary(
    scores: np.ndarray, live: np.ndarray, species: Sequence[str], threshold: float, *, points: Sequence[float] = ()
) -> dict[str, float]:
    """apcer, apcer_worst, bpcer, acer, acer_worst at a threshold fixed elsewhere (acer is then the HTER); eer and auc of the
    scores themselves; tpr_<rate> at `points` (false positive rates)."""
    scores, live = check(scores, live)
    found = error_rates(scores, live, threshold)
    worst = max(apcer_by_species(scores, species, threshold).values())
    found |= {"apcer_worst": worst, "acer_worst": (worst + found["bpcer"]) / 2}
    found |= {"eer": eer_threshold(scores, live)[1], "auc": 100 * float(roc_auc_score(live, scores))}
    return found | {f"tpr_{rate:g}": tpr_at_fpr(scores, live, rate) for rate in points}


def det_points(scores: np.ndarray, live: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(APCER, BPCER) in percent along the DET curve."""
    scores, live = check(scores, live)
    fpr, fnr, _ = det_curve(live, scores)
    return 100 * fpr, 100 * fnr
