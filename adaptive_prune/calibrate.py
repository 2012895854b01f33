"""Thresholds for a budget without training: a baseline, and a way to retarget a model."""

import math
from collections.abc import Iterable

import torch
from lightning_fabric import Fabric
from torch import Tensor

from adaptive_prune.budget import check_budget, keep_counts
from adaptive_prune.data import Data
from adaptive_prune.model import PrunedViT
from common.data.batches import Plan


@torch.no_grad()
def calibrate(model: PrunedViT, batches: Iterable[Tensor], budget: float, *, rounds: int = 3) -> float:
    """Set theta without training so that the mean cost over the image batches is about `budget`; returns that cost.

    Stage by stage, theta_s is the score quantile that keeps the counts of `keep_counts`; `rounds` times the target is then
    moved by what is still missing (counts that vary cost more than their mean); the nearest round stays. A training-free
    baseline, not AS-ViT: scores that no budget has shaped keep more tokens of simple images. Raises ValueError for another
    rule."""
    if model.rule != "threshold":
        raise ValueError(f"calibrate sets thresholds, but this model's rule is {model.rule!r}")
    images, was, layout = list(batches), model.training, model.inference
    model.eval()
    floor = model.cost.floor(model.locations)
    target, nearest, best = check_budget(budget, floor=floor), math.inf, model.theta.clone()
    try:
        model.inference = "masked"
        for _ in range(rounds):
            counts = keep_counts(model.cost, model.locations, target)
            model.theta.fill_(-1.0)
            for s, k in enumerate(counts):
                scores = torch.cat([model(x, details=True)[1].scores[:, s].flatten() for x in images])
                model.theta[s] = quantile(scores, k * len(scores) // model.cost.patches)
            macs = torch.cat([model(x, details=True)[1].macs for x in images])
            achieved = float(macs.mean()) / model.cost.dense
            if abs(achieved - budget) < abs(nearest - budget):
                nearest, best = achieved, model.theta.clone()
            target = min(1.0, max(floor, target + budget - achieved))
        model.theta.copy_(best)
    finally:
        model.inference = layout
        model.train(was)
    return nearest


def quantile(scores: Tensor, take: int) -> Tensor:
    """A threshold that `take` of the scores (n,) exceed: halfway between two of them, so that rounding decides nothing; the ends
    keep all or none."""
    best = scores.sort(descending=True).values
    below = best[take] if take < len(best) else best[-1] - 1
    above = best[take - 1] if take else best[0] + 1
    return (above + below) / 2


def calibrate_on(fabric: Fabric, model: PrunedViT, data: Data, images: int, budget: float, batch_size: int) -> float:
    """`calibrate` on the first `images` training images, the same on every rank; returns the cost."""
    size = min(batch_size, data.train_size)
    batches: list[Tensor] = []
    for x, _ in data.batches(Plan(data.train_size, size, seed=0), 1, fabric.device):
        batches.append(x)
        if sum(map(len, batches)) >= images:
            break
    batches[-1] = batches[-1][: len(batches[-1]) - max(0, sum(map(len, batches)) - images)]
    cost = calibrate(model, batches, budget)
    if fabric.world_size > 1:
        model.theta.data.copy_(fabric.broadcast(model.theta.data, src=0))
    return cost
