"""Classification metrics beside top-1: accuracy of class groups by training count, calibration."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

GROUPS = ("many", "medium", "few")
Convention = Literal["oltr", "official"]


def class_groups(class_counts: Sequence[int] | Tensor, convention: Convention = "oltr") -> dict[str, Tensor]:
    """{many, medium, few}: boolean masks (C,) over the classes, by number of training images.

    class_counts: (C,). "oltr" is the rule of the literature, many > 100, medium 20..100, few < 20; "official"
    that of some released scripts, >= 100, 21..99, <= 20. Raises ValueError for another convention."""
    counts = torch.as_tensor(class_counts)
    if counts.ndim != 1 or (counts < 0).any():
        raise ValueError(f"class_counts must be one count >= 0 per class, got {class_counts}")
    if convention == "oltr":
        many, few = counts > 100, counts < 20
    elif convention == "official":
        many, few = counts >= 100, counts <= 20
    else:
        raise ValueError(f"convention {convention!r}; use 'oltr' or 'official'")
    return {"many": many, "medium": ~(many | few), "few": few}


def group_accuracy(
    predictions: Tensor, targets: Tensor, class_counts: Sequence[int] | Tensor, convention: Convention = "oltr"
) -> dict[str, float]:
    """Accuracy in percent over the test images of each class group; a group without images is left out.

    predictions, targets: (N,) class indices. Raises ValueError for shapes that differ or a target
    outside the classes."""
    if predictions.shape != targets.shape or targets.ndim != 1:
        raise ValueError(f"predictions {tuple(predictions.shape)} and targets {tuple(targets.shape)} must both be (N,)")
    groups = class_groups(class_counts, convention)
    classes = len(groups["many"])
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise ValueError(f"targets span {int(targets.min())}..{int(targets.max())}; allowed are 0..{classes - 1}")
    correct = (predictions == targets).double()
    member = {name: mask.to(targets.device)[targets] for name, mask in groups.items()}
    return {name: 100 * correct[m].mean().item() for name, m in member.items() if m.any()}


def calibration(logits: Tensor, targets: Tensor, *, bins: int = 15) -> dict[str, float]:
    """Expected calibration error (0..1, equal-width bins, L1) and mean negative log-likelihood (nats).

    logits: (N, C) before softmax, or log probabilities of an ensemble; targets: (N,) class indices."""
    probabilities = logits.float().softmax(1)
    ece = multiclass_calibration_error(probabilities, targets, num_classes=logits.shape[1], n_bins=bins, norm="l1")
    return {"ece": ece.item(), "nll": F.cross_entropy(logits.float(), targets).item()}
