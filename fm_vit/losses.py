"""The loss of FM-ViT: every branch is supervised with every subset of the modalities that it belongs to.

    L = L_s + L_p + L_c,   each the sum over its subsets S, and over m in S, of BCE(logit^m with S present)
    L_s (single): S = {m};   L_c (cross): S = all;   L_p (partial): every other subset, the pairs of three modalities

The abstract does not give it: L_s + L_c follows the sibling MA-ViT (single-sequence loss + cross-modal loss), L_p is ours. With
L_c alone a branch learns to rely on the others, and is useless without them; without L_p a pair is worse than its better half.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from torch import Tensor, nn

PATHS = ("single", "partial", "cross")


def subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """Every non-empty subset, small ones first, in canonical order: 7 of 3 modalities."""
    return [s for size in range(1, len(modalities) + 1) for s in combinations(modalities, size)]


def training_paths(modalities: Sequence[str], kinds: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """(kind, modalities) of every path of the loss. kinds: some of single, partial, cross; all three are every subset. With one
    modality single and cross coincide. ValueError for no or an unknown kind, or if there is no subset of those kinds."""
    unknown = [k for k in kinds if k not in PATHS]
    if not kinds or unknown:
        raise ValueError(f"method.loss.paths={list(kinds)}, allowed: one or more of {', '.join(PATHS)}")
    n = len(modalities)
    kind_of = {1: "single"} | dict.fromkeys(range(2, n), "partial")
    if n > 1 or "cross" in kinds:
        kind_of[n] = "cross"
    paths = [(kind_of[len(s)], s) for s in subsets(modalities) if kind_of[len(s)] in kinds]
    if not paths:
        raise ValueError(f"method.loss.paths={list(kinds)}: of {n} modalities there is no such subset")
    return paths


def path_losses(
    model: Any,
    outputs: Sequence[Mapping[str, Tensor]],
    kinds: Sequence[str],
    labels: Tensor,
    *,
    weights: Mapping[str, float] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """{"loss_single": ..., "loss_partial": ..., "loss_cross": ...}: `model.loss` of every path, summed over the paths of a kind.

    outputs, kinds: one per path; labels (B,), 1 live, 0 attack. weights: factor per kind, default 1. options: of `model.loss`.
    ValueError for other labels, or a bad weight. Labels are looked at on a CPU only: a card would have to be waited for."""
    check_weights(weights or {})
    if labels.device.type == "cpu" and (wrong := set(labels.tolist()) - {0, 1}):  # cross-entropy passes over -100
        raise ValueError(f"labels must be 1 live or 0 attack, got {sorted(wrong)[:5]}")
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


def losses(
    model: nn.Module, images: Mapping[str, Tensor], labels: Tensor, loss: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The named terms of one batch. images: modality -> (B, 3, H, W); loss: the node `method.loss`."""
    module: Any = getattr(model, "module", model)
    kinds, paths = zip(*training_paths(module.modalities, loss["paths"]), strict=True)
    outputs = model(images, paths)
    return path_losses(module, outputs, kinds, labels, **{k: v for k, v in loss.items() if k != "paths"})
