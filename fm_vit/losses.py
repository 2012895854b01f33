"""The loss of FM-ViT (section 3.5): every branch is supervised alone (single path) and with all others present (cross path).

    L = L_s + L_c,   L_s = sum over m of BCE(logit^m with S = {m}),   L_c = sum over m of BCE(logit^m with S = all)

With the cross path alone a branch learns to rely on the others, and is useless without them.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch.nn.functional as F
from torch import Tensor

from fm_vit.baselines import TwoBranchCMFL, cross_modal_focal
from fm_vit.model import Logits

PATHS = ("single", "pairs", "cross")


def subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """Every non-empty subset, small ones first, in canonical order: 7 of 3 modalities."""
    return [s for size in range(1, len(modalities) + 1) for s in combinations(modalities, size)]


def training_paths(modalities: Sequence[str], kinds: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """(kind, modalities) of every path of the loss. kinds: some of single, pairs, cross; with one modality they coincide.
    ValueError for no or an unknown kind."""
    if not kinds or (unknown := set(kinds) - set(PATHS)):
        raise ValueError(
            f"loss paths {list(kinds)}, allowed: one or more of {', '.join(PATHS)}"
            + (f", not {unknown}" if kinds else "")
        )
    sizes = {"single": 1, "pairs": 2, "cross": len(modalities)}
    found = {
        s: kind for kind in PATHS if kind in kinds for s in combinations(modalities, min(sizes[kind], len(modalities)))
    }
    return [(kind, s) for s, kind in found.items()]


def path_losses(
    model: object,
    outputs: Sequence[Logits],
    kinds: Sequence[str],
    labels: Tensor,
    *,
    weights: Mapping[str, float] | None = None,
    cmfl: float = 0.5,
    alpha: float = 1.0,
    gamma: float = 3.0,
) -> dict[str, Tensor]:
    """{"loss_single": ..., "loss_cross": ...}: cross-entropy (that is, BCE), a sum over heads and paths, a mean over images.

    outputs, kinds: one per path; labels (B,), 1 live. weights: factor per kind, default 1. For `TwoBranchCMFL` the joint
    head has (1 - cmfl) CE and the branches cmfl times the cross-modal focal loss with alpha, gamma."""
    terms: dict[str, Tensor] = {}
    for logits, kind in zip(outputs, kinds, strict=True):
        if isinstance(model, TwoBranchCMFL):
            a, b = (logits[m] for m in model.modalities)
            focal = cross_modal_focal(a, b, labels, alpha=alpha, gamma=gamma) + cross_modal_focal(
                b, a, labels, alpha=alpha, gamma=gamma
            )
            value = (1 - cmfl) * F.cross_entropy(logits["joint"].float(), labels) + cmfl * focal
        else:
            value = sum(
                (F.cross_entropy(z.float(), labels) for z in logits.values()),
                start=labels.new_zeros((), dtype=labels.dtype).float(),
            )
        name = f"loss_{kind}"
        value = (weights or {}).get(kind, 1.0) * value
        terms[name] = terms[name] + value if name in terms else value
    return terms
