"""Thresholds for a budget without training: a baseline, and a way to retarget a model."""

from collections.abc import Iterable

import torch
from torch import Tensor

from adaptive_prune.budget import check_budget, keep_counts
from adaptive_prune.model import PrunedViT


@torch.no_grad()
def calibrate(model: PrunedViT, batches: Iterable[Tensor], budget: float, *, rounds: int = 3) -> float:
    """Set theta without training so that the mean cost over the image batches is about `budget`; returns that cost.

    Stage by stage, theta_s is the score quantile that keeps the counts of `keep_counts`; `rounds` times the target is then
    moved by what is still missing (counts that vary cost more than their mean). A training-free baseline, not AS-ViT: in
    the specification's trials it was less accurate than top-k on the same scores. Raises ValueError for another rule."""
    if model.rule != "threshold":
        raise ValueError(f"calibrate sets thresholds, but this model's rule is {model.rule!r}")
    images, was, layout = list(batches), model.training, model.inference
    model.eval()
    target, achieved = check_budget(budget, floor=model.cost.floor(model.locations)), 1.0
    try:
        model.inference = "masked"
        for _ in range(rounds):
            counts = keep_counts(model.cost, model.locations, target)
            model.theta.fill_(-1.0)
            for s, k in enumerate(counts):
                scores = torch.cat([model(x, details=True)[1].scores[:, s].flatten() for x in images])
                take = k * len(scores) // model.cost.patches
                best = scores.sort(descending=True).values
                # halfway between two scores, so that rounding decides nothing; the ends keep all or none
                below = best[take] if take < len(best) else best[-1] - 1
                above = best[take - 1] if take else best[0] + 1
                model.theta[s] = (above + below) / 2
            macs = torch.cat([model(x, details=True)[1].macs for x in images])
            achieved = float(macs.mean()) / model.cost.dense
            target = min(1.0, max(model.cost.floor(model.locations), target + budget - achieved))
    finally:
        model.inference = layout
        model.train(was)
    return achieved
