"""From candidates to counterexamples: attack, let an observer judge, keep the largest change below the JND, measure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iqa_attack.jnd import below_jnd, select, straddle, visibility
from iqa_attack.perceptual_attack import Score, scores
from iqa_attack.quality_metrics import correlations, srcc24, stability


@dataclass(frozen=True)
class Judged:
    """Candidates of S images. images (K, S, 3, H, W) on the 8-bit lattice; strengths, change, below: (K, S); chosen
    (S,), -1: none."""

    images: Tensor
    strengths: Tensor
    change: Tensor
    below: Tensor
    chosen: Tensor

    def counterexamples(self, x0: Tensor) -> Tensor:
        """(S, 3, H, W); the image itself where no candidate is below the JND."""
        picked = self.images[self.chosen.clamp(min=0), torch.arange(len(x0))]
        return torch.where((self.chosen >= 0).view(-1, 1, 1, 1).to(picked.device), picked, x0)

    def row(self, s: int) -> dict[str, Any]:
        """What became of image s: whether there is a counterexample, which candidate it is, how many were below the JND."""
        k = int(self.chosen[s])
        strength = float(self.strengths[max(k, 0), s]) if k >= 0 else 0.0
        below = int(self.below[:, s].sum())
        return {"success": k >= 0, "candidate": k, "strength": strength, "below": below, "candidates": len(self.below)}


@torch.no_grad()
def judge(
    score: Score, observer, x0: Tensor, images: Tensor, strengths: Tensor, prefixes: Sequence[str], *, chunk: int = 64
) -> Judged:
    """observer null: nobody judges, the last candidate is taken. prefixes: "<nr>/<fr>/<image>" of every image."""
    k, s = images.shape[:2]
    base = scores(score, x0, chunk)
    change = (scores(score, images.flatten(0, 1), chunk).view(k, s) - base).cpu()
    if observer is None:
        return Judged(images, strengths, change, torch.ones(k, s, dtype=torch.bool), torch.full((s,), k - 1))
    names = [f"{p}/{i}" for i in range(k) for p in prefixes]
    below = below_jnd(observer, images.flatten(0, 1), x0.repeat(k, 1, 1, 1), names).view(k, s)
    return Judged(images, strengths, change, below, select(change, below))


def refine(
    attack: Callable[[Tensor], Tensor],
    judge_all: Callable[[Tensor, Tensor], Judged],
    judged: Judged,
    *,
    rounds: int,
    visible_end: str,
) -> Judged:
    """`rounds` more candidates per image, by bisection of the strength around the JND. attack: strengths (1, S) ->
    candidates."""
    for _ in range(rounds):
        new = straddle(judged.strengths, judged.below, visible_end=visible_end)[None]
        images, strengths = torch.cat([judged.images, attack(new)]), torch.cat([judged.strengths, new])
        judged = judge_all(images, strengths)
    return judged


@torch.no_grad()
def describe(x: Tensor, x0: Tensor, distance) -> dict[str, list[float]]:
    """Of every counterexample: distance, visibility in JNDs, largest change in gray levels, share of values that
    change by 4 or more."""
    levels = ((x - x0).abs().flatten(1) * 255).round()
    return {
        "distance": distance(x, x0).tolist(), "visibility": visibility(x, x0).tolist(), "max_change": levels.amax(1).tolist(),
        "share_above_4": (levels >= 4).float().mean(1).tolist(),
    }  # fmt: skip


def measure(
    before: dict[str, np.ndarray], after: dict[str, np.ndarray], mos: np.ndarray | None, attacked: str
) -> dict[str, float]:
    """Metrics of one set of counterexamples from scores (S,) per model: R, how many did not move, mean change, and
    with MOS the correlations.

    r_intra and r_transfer: R of the attacked model, and the mean R of the others (only with others)."""
    found: dict[str, float] = {}
    for name, b in before.items():
        a = after[name]
        found[f"r_{name}"], found[f"still_{name}"] = stability(b, a)
        found[f"change_{name}"] = float(np.abs(a - b).mean())
        if mos is not None:
            found[f"srcc_clean_{name}"] = correlations(b, mos)["srcc"]
            found[f"srcc24_{name}"] = srcc24(b, a, mos)
            if np.ptp(a) > 0:
                found |= {f"{k}12_{name}": v for k, v in correlations(a, mos).items()}
    others = [n for n in before if n != attacked]
    for key in ("r", "change", *(("srcc24", "srcc_clean") if mos is not None else ())):
        found[f"{key}_intra"] = found[f"{key}_{attacked}"]
        if others:
            found[f"{key}_transfer"] = float(np.mean([found[f"{key}_{n}"] for n in others]))
    up = after[attacked] > before[attacked]
    found["share_up"] = float(up.mean())
    return found
