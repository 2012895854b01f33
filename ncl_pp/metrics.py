"""What is reported of K experts: accuracy single and together, by class group, their disagreement, calibration (6.4)."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.metrics.classification import calibration, class_groups
from ncl_pp.model import ensemble

Groups = Literal["oltr", "official", "thirds"]


def groups_of(class_counts: Sequence[int], convention: Groups = "oltr") -> dict[str, Tensor]:
    """{many, medium, few}: boolean masks (C,) over the classes.

    oltr, official: by fixed thresholds, see `common.metrics.classification.class_groups`; thirds: the C//3 most and C//3
    least frequent classes and the rest, for sets whose counts are far below the thresholds (ties by class id).
    """
    if convention != "thirds":
        return class_groups(class_counts, convention)
    order = torch.argsort(torch.as_tensor(class_counts), descending=True, stable=True)
    third = len(order) // 3
    masks = {name: torch.zeros(len(order), dtype=torch.bool) for name in ("many", "medium", "few")}
    masks["many"][order[:third]] = True
    masks["medium"][order[third : len(order) - third]] = True
    masks["few"][order[len(order) - third :]] = True
    return masks


def disagreement(logits: Tensor) -> dict[str, float]:
    """How much experts differ, logits (K, M, C), K >= 2.

    kl: mean over ordered pairs i != j and images of KL(softmax(z_i) || softmax(z_j)), nats;
    argmax: fraction of images on which not all experts predict the same class.
    """
    log_p = logits.double().log_softmax(-1)
    k = len(log_p)
    pairs = [
        F.kl_div(log_p[j], log_p[i], reduction="batchmean", log_target=True)
        for i in range(k)
        for j in range(k)
        if i != j
    ]
    predictions = logits.argmax(-1)
    return {
        "disagreement_kl": torch.stack(pairs).mean().item(),
        "disagreement_argmax": (predictions != predictions[:1]).any(0).double().mean().item(),
    }


def per_class_accuracy(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Accuracy in percent of every class (C,), NaN where there is no image."""
    correct = torch.zeros(classes, dtype=torch.double).index_add_(0, labels, (predictions == labels).double())
    return 100 * correct / labels.bincount(minlength=classes)


def expert_metrics(
    logits: Tensor, labels: Tensor, class_counts: Sequence[int], *, groups: Groups = "oltr", prior: Tensor | None = None
) -> dict[str, float]:
    """All numbers of one evaluation, accuracies in percent over images.

    logits: raw, (K, M, C); labels: (M,). prior: test class frequencies (C,) to add as log prior, None for a balanced
    test set. single: mean over experts; best, worst: of the experts; ensemble: mean of the raw logits.
    """
    logits, labels = logits.double(), labels.long()
    if prior is not None:
        logits = logits + (prior.double() / prior.sum()).log()
    together = ensemble(logits)
    correct = torch.cat([logits, together[None]]).argmax(-1) == labels
    accuracy = 100 * correct.double().mean(1)
    single = accuracy[:-1]
    result = {"top1": single.mean().item(), "top1_ensemble": accuracy[-1].item()}
    if len(logits) > 1:
        result |= {"top1_best": single.max().item(), "top1_worst": single.min().item(), **disagreement(logits)}
    for name, mask in groups_of(class_counts, groups).items():
        chosen = mask[labels]
        if chosen.any():
            result[f"top1_{name}"] = 100 * correct[:-1, chosen].double().mean().item()
            result[f"top1_ensemble_{name}"] = 100 * correct[-1, chosen].double().mean().item()
    return result | calibration(together.float(), labels)
