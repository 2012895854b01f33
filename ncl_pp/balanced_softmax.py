"""Balanced softmax: the "B" of balanced individual learning and balanced online distillation.

v_c = z_c + log n_c,   p = softmax(v),   L_all = -(1/M) sum_i log p(y_i | x_i).
Training sees the prior of the train split; testing with z alone is then Bayes-optimal for a uniform test
prior.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def check_class_counts(class_counts: Tensor | Iterable[float]) -> Tensor:
    """Training images per class, by class id -> int64 (C,).

    Raises ValueError unless there is one whole number >= 1 per class. Frequencies are refused although
    balanced
    softmax would not notice them: hard category mining depends on the scale of the counts.
    """
    if not isinstance(class_counts, Tensor):
        class_counts = torch.as_tensor(list(class_counts))
    if class_counts.ndim != 1 or class_counts.numel() == 0:
        raise ValueError(f"class_counts must hold one count per class, got shape {tuple(class_counts.shape)}")
    whole = class_counts.to(torch.int64)
    if not torch.equal(whole.to(class_counts.dtype), class_counts):
        raise ValueError("class_counts must be whole numbers of training images, not frequencies or weights")
    empty = (whole < 1).nonzero().flatten().tolist()
    if empty:
        shown = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        raise ValueError(
            f"{len(empty)} of {len(whole)} classes have a count below 1 (log 0): classes {shown}; "
            "drop them or use a train split that contains them"
        )
    return whole


def balanced_logits(logits: Tensor, class_counts: Tensor) -> Tensor:
    """v = z + log n. logits (..., C), class_counts (C,) positive -> (..., C)."""
    return logits + class_counts.to(logits.dtype).log()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of every expert: logits (K, M, C), labels (M,) int64 -> (K,), mean over the M rows."""
    experts, rows, _ = logits.shape
    per_row = F.cross_entropy(logits.flatten(0, 1), labels.repeat(experts), reduction="none")
    return per_row.view(experts, rows).mean(1)


def balanced_softmax_loss(logits: Tensor, labels: Tensor, class_counts: Tensor) -> Tensor:
    """L_all of every expert: raw logits (K, M, C), labels (M,), class_counts (C,) -> (K,), mean over rows."""
    return cross_entropy(balanced_logits(logits, class_counts), labels)


def adjust_to_prior(logits: Tensor, prior: Tensor) -> Tensor:
    """Logits for a known test prior: z + log pi. logits (..., C), prior (C,) positive, any scale -> (..., C).

    Raises ValueError for a prior of another length or with an entry that is not positive and finite.
    """
    if prior.shape != logits.shape[-1:]:
        raise ValueError(f"prior has shape {tuple(prior.shape)}, the logits have {logits.shape[-1]} classes")
    if not (torch.isfinite(prior) & (prior > 0)).all():
        raise ValueError("every entry of the test prior must be positive and finite")
    return logits + (prior / prior.sum()).log().to(logits)
