"""Learned thresholds and the straight-through mask.

m = 1[S > theta] forward,    dm/dS = T s (1 - s) = -dm/dtheta with s = sigmoid(T (S - theta)) backward
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

TOKENS = 196  # of the paper's 224 x 224 images: what its constants refer to


def initial_thresholds(tokens: int = TOKENS, stages: int = 3) -> list[float]:
    """(0.001, 0.002, 0.003) at 196 patch tokens [code], far below the uniform score 1/196: nearly all tokens are kept.

    Scores scale with 1/tokens, and so do these; a further stage adds another step of 0.196/tokens."""
    return [0.001 * (s + 1) * TOKENS / tokens for s in range(stages)]


def default_temperature(tokens: int = TOKENS) -> float:
    """T = 1e4 at 196 patch tokens [paper, code]; proportional to the number of tokens, as 1/T is a step of the score."""
    return 1e4 * tokens / TOKENS


def threshold_mask(scores: Tensor, theta: Tensor, *, temperature: float = 1e4) -> Tensor:
    """1 where S > theta (strictly), else 0, exactly; the gradient is that of sigmoid(T (S - theta)).

    scores: (...) float32; theta: scalar. Half precision would quantise theta near 0.003 in steps of 0.02/T (fp16) or
    0.15/T (bf16): ValueError for scores or theta that are not at least float32."""
    if torch.finfo(scores.dtype).bits < 32 or torch.finfo(theta.dtype).bits < 32:
        raise ValueError(
            f"scores are {scores.dtype} and theta {theta.dtype}: compute them outside autocast, in float32"
        )
    soft = torch.sigmoid(temperature * (scores - theta))
    # Added this way round the forward value stays exactly 0 or 1: soft - soft.detach() is 0.
    return (scores > theta).to(scores.dtype) + (soft - soft.detach())


def check_locations(locations: Sequence[int], depth: int) -> tuple[int, ...]:
    """The blocks (0-based) before which tokens are dropped, checked: strictly increasing, in 1..depth-1.

    Raises ValueError; location 0 has no score yet, which comes from the block before."""
    found = tuple(int(p) for p in locations)
    if any(not 1 <= p < depth for p in found) or any(a >= b for a, b in pairwise(found)):
        raise ValueError(
            f"locations={list(found)}: tokens are dropped before these blocks (0-based), which must increase strictly and "
            f"lie in 1..{depth - 1}; before block 0 there is no score yet"
        )
    return found


def check_thresholds(thresholds: Sequence[float] | Tensor, stages: int) -> Tensor:
    """Thresholds as a float32 (stages,) tensor. ValueError for another number of them or one that is not finite."""
    theta = torch.as_tensor(thresholds, dtype=torch.float32).flatten()
    if len(theta) != stages:
        raise ValueError(f"{len(theta)} thresholds for {stages} locations: one threshold per location")
    if not bool(theta.isfinite().all()):
        raise ValueError(f"thresholds {theta.tolist()} must be finite; < 0 keeps every token, >= 1 none")
    return theta
