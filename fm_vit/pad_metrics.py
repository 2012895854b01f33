"""Presentation attack detection metrics (ISO/IEC 30107-3), from liveness scores in 0..1; accepted as live iff score >= threshold.

All take numpy arrays: scores (n,), live (n,) bool, and where named species (n,) str, "live" for live ones. Rates are in percent.
A threshold is always chosen on other data than those that it is used on (`measure`).
    APCER  attacks accepted;  BPCER  live rejected;  ACER  their mean;  HTER  ACER at a threshold fixed on other data
ISO/IEC 30107-3 takes APCER per species and reports the worst; the literature of this field pools: both are given.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn.metrics import det_curve, roc_auc_score, roc_curve

OPERATING_POINTS = (1e-2, 1e-3, 1e-4)
THRESHOLDS = ("eer", "eer_mid", "bpcer1", "half")


@dataclass(frozen=True)
class Scored:
    """Liveness of every sample of a split, by subset of the modalities, with what the metrics need; None: not known."""

    scores: Mapping[str, np.ndarray]  # subset: (n,)
    live: np.ndarray  # (n,) bool
    species: Sequence[str] | None = None
    subject: Sequence[Any] = field(default_factory=list)  # what is resampled together
    video: Sequence[str] | None = None
    name: Sequence[str] = field(default_factory=list)

    def videos(self) -> "Scored":
        """The same of whole videos: the mean score of their frames, before any threshold. ValueError where they are not known."""
        if self.video is None:
            raise ValueError(
                "level=video: the videos of these samples are not known; data.video is the pattern of their names"
            )
        first = video_scores(np.zeros(len(self.live)), self.video)[1]
        scores = {tag: video_scores(values, self.video)[0] for tag, values in self.scores.items()}
        pick = lambda values: None if values is None else [values[i] for i in first]  # noqa: E731
        video = pick(self.video)
        return Scored(scores, self.live[first], pick(self.species), pick(self.subject) or [], video, video or [])


def measure(
    development: Scored, test: Scored, *, threshold: str, points: Sequence[float] = ()
) -> dict[str, dict[str, float]]:
    """{subset: {"threshold": ..., `summary` of the test scores}}: every subset has its own threshold, chosen by the rule
    `threshold` (see `choose_threshold`) on the development scores."""
    rows = {}
    for tag, scores in test.scores.items():
        at = choose_threshold(threshold, development.scores[tag], development.live)
        rows[tag] = {"threshold": at} | summary(scores, test.live, test.species, at, points=points)
    return rows


def over_subsets(rows: Mapping[str, Mapping[str, float]], subsets: Sequence[Sequence[str]]) -> dict[str, float]:
    """{"mean_acer": over all subsets, "gain_<subset>": the points of ACER that a subset of two or more is below the best of its
    members alone; negative where leaving the others out makes fewer errors}. rows: of `measure`, by names joined by _."""
    acer = {tuple(s): rows["_".join(s)]["acer"] for s in subsets}
    gains = {"gain_" + "_".join(s): min(acer[(m,)] for m in s) - value for s, value in acer.items() if len(s) > 1}
    return {"mean_acer": sum(acer.values()) / len(acer)} | gains


def check_threshold(kind: str) -> None:
    """ValueError for a rule that `choose_threshold` does not have."""
    if kind not in THRESHOLDS:
        raise ValueError(f"threshold={kind!r}, allowed: {', '.join(THRESHOLDS)}")


def choose_threshold(kind: str, scores: np.ndarray, live: np.ndarray) -> float:
    """A threshold from development scores. eer: the point of their ROC with the smallest |APCER - BPCER|; eer_mid: halfway from
    it to the next lower score; bpcer1: the largest that rejects at most 1 % of the live (WMCA); half: 0.5, whatever the scores.
    ValueError for another name."""
    check_threshold(kind)
    if kind == "half":
        return 0.5
    if kind == "bpcer1":
        return bpcer_threshold(scores, live, bpcer=1.0)
    return eer_threshold(scores, live, between=kind == "eer_mid")[0]


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


def apcer_by_species(scores: np.ndarray, species: Sequence[str], threshold: float) -> dict[str, float]:
    """APCER of every species of attack."""
    kinds = np.asarray(species)
    names = sorted(set(kinds.tolist()) - {"live"})
    return {name: 100 * float((np.asarray(scores)[kinds == name] >= threshold).mean()) for name in names}


def check_species(species: Sequence[str] | None, wanted: Sequence[str] | None) -> None:
    """ValueError for a species of attack that is wanted and has no sample: without one a worst case would pass unseen."""
    names = sorted(set(species or ()) - {"live"})
    if absent := sorted(set(wanted or ()) - set(names)):
        raise ValueError(
            f"no sample of the attack species {', '.join(absent)}; there are {', '.join(names) or 'none known'}"
        )


def error_rates(scores: np.ndarray, live: np.ndarray, threshold: float) -> dict[str, float]:
    """apcer (pooled), bpcer, acer at a threshold."""
    scores, live = check(scores, live)
    apcer, bpcer = 100 * float((scores[~live] >= threshold).mean()), 100 * float((scores[live] < threshold).mean())
    return {"apcer": apcer, "bpcer": bpcer, "acer": (apcer + bpcer) / 2}


def eer_threshold(scores: np.ndarray, live: np.ndarray, *, between: bool = False) -> tuple[float, float]:
    """(threshold, equal error rate in percent): the ROC point with the smallest |BPCER - APCER|, of equal ones that with the
    largest threshold.

    between: halfway to the next lower score, so that it does not depend on a single sample's rounding."""
    scores, live = check(scores, live)
    fpr, tpr, thresholds = roc_curve(live, scores, drop_intermediate=False)
    best = int(np.abs((1 - tpr) - fpr).argmin())
    below = scores[scores < thresholds[best]]
    at = float(thresholds[best]) if np.isfinite(thresholds[best]) else float(np.nextafter(scores.max(), np.inf))
    threshold = (at + float(below.max())) / 2 if between and len(below) else at
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
    scores: np.ndarray,
    live: np.ndarray,
    species: Sequence[str] | None,
    threshold: float,
    *,
    points: Sequence[float] = (),
) -> dict[str, float]:
    """apcer, bpcer, acer at a threshold fixed elsewhere (acer is then the HTER), with apcer_worst and acer_worst where species
    are known; eer_own (at a threshold of these very scores: a property of their ROC, no result) and auc; tpr_<rate> at
    `points` (false positive rates)."""
    scores, live = check(scores, live)
    found = error_rates(scores, live, threshold)
    if species is not None:
        worst = max(apcer_by_species(scores, species, threshold).values())
        found |= {"apcer_worst": worst, "acer_worst": (worst + found["bpcer"]) / 2}
    found |= {"eer_own": eer_threshold(scores, live)[1], "auc": 100 * float(roc_auc_score(live, scores))}
    return found | {f"tpr_{rate:g}": tpr_at_fpr(scores, live, rate) for rate in points}


def det_points(scores: np.ndarray, live: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(APCER, BPCER) in percent along the DET curve."""
    scores, live = check(scores, live)
    fpr, fnr, _ = det_curve(live, scores)
    return 100 * fpr, 100 * fnr
