"""The loss of FM-ViT: every branch is supervised alone (single path) and with all others present (cross path).

    L = L_s + L_c,   L_s = sum over m of BCE(logit^m with S = {m}),   L_c = sum over m of BCE(logit^m with S = all)

The abstract does not give it; it follows the sibling MA-ViT (single-sequence loss + cross-modal loss). With the cross path alone
a branch learns to rely on the others, and is useless without them. `pairs` adds the paths of two modalities.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from torch import Tensor

PATHS = ("single", "pairs", "cross")


def subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """Every non-empty subset, small ones first, in canonical order: 7 of 3 modalities."""
    return [s for size in range(1, len(modalities) + 1) for s in combinations(modalities, size)]


def training_paths(modalities: Sequence[str], kinds: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """(kind, modalities) of every path of the loss. kinds: some of single, pairs, cross; with one modality they coincide.
    ValueError for no or an unknown kind."""
    unknown = [k for k in kinds if k not in PATHS]
    if not kinds or unknown:
        raise ValueError(f"method.loss.paths={list(kinds)}, allowed: one or more of {', '.join(PATHS)}")
    sizes = {"single": 1, "pairs": 2, "cross": len(modalities)}
    found = {
        s: kind for kind in PATHS if kind in kinds for s in combinations(modalities, min(sizes[kind], len(modalities)))
    }
    return [(kind, s) for s, kind in found.items()]


def path_losses(
    model: Any,
    outputs: Sequence[Mapping[str, Tensor]],
    kinds: Sequence[str],
    labels: Tensor,
    *,
    weights: Mapping[str, float] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """{"loss_single": ..., "loss_cross": ...}: `model.loss` of every path, summed over the paths of a kind.

    outputs, kinds: one per path; labels (B,), 1 live. weights: factor per kind, default 1. options: of `model.loss`."""
    check_weights(weights or {})
    terms: dict[str, Tensor] = {}
    for logits, kind in zip(outputs, kinds, strict=True):
        name = f"loss_{kind}"
        value = (weights or {}).get(kind, 1.0) * model.loss(logits, labels, **options)
        terms[name] = terms[name] + value if name in terms else value
    return terms


def check_weights(weights: Mapping[str, float]) -> None:
    """ValueError for the weight of an unknown path, or a negative one."""
    if wrong := {k: w for k, w in weights.items() if k not in PATHS or not w >= 0}:
        raise ValueError(f"method.loss.weights={wrong}, allowed: numbers >= 0 for {', '.join(PATHS)}")
