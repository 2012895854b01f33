"""Accuracy as the literature reports it, the confusion matrix, and where the dropped patches lie."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from ap_fer.token_selection import select, to_mask


def confusion(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(C, C) counts, rows = truth. ValueError for a label outside the classes."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels span {int(labels.min())}..{int(labels.max())}, allowed 0..{classes - 1}")
    return multiclass_confusion_matrix(predictions, labels, num_classes=classes)


def classification(matrix: Tensor, names: Sequence[str]) -> dict[str, float]:
    """From a confusion matrix (C, C), rows = truth, in percent: top1 (overall, the headline), mean_class, macro_f1,
    challenge = 0.67 macro F1 + 0.33 overall (Aff-Wild2), acc_<name>. Classes without a test image are left out."""
    m = matrix.double()
    right, truth, predicted = m.diagonal(), m.sum(1), m.sum(0)
    seen = truth > 0
    recall = (right / truth)[seen]
    f1 = (2 * right / (truth + predicted))[seen]
    top1, macro = 100 * float(right.sum() / m.sum()), 100 * float(f1.mean())
    found = {"top1": top1, "mean_class": 100 * float(recall.mean()), "macro_f1": macro}
    found["challenge"] = 0.67 * macro + 0.33 * top1
    per_class = zip([n for n, s in zip(names, seen.tolist(), strict=True) if s], recall.tolist(), strict=True)
    return found | {f"acc_{name}": 100 * value for name, value in per_class}


def noise_patches(masks: Tensor, side: int) -> Tensor:
    """masks (N, S, S) bool -> (N, side * side) bool: patches of which at least half is inside the mask."""
    share = F.adaptive_avg_pool2d(masks[:, None].float(), side)
    return (share >= 0.5).flatten(1)


def dropped_on(kept: Tensor, noise: Tensor, among: Tensor | None = None) -> dict[str, float]:
    """What was dropped, against chance. kept, noise, among (N, P) bool: patches that stayed, that should go, and among
    which the choice was made (default all).

    precision: of the dropped patches, the share that is noise; chance: the share of noise among all that could go, image by
    image, which is what dropping at random gets; lift = precision - chance; recall: of the noise, the share dropped.
    Averages over the images in which patches were dropped; empty where there is none."""
    among = torch.ones_like(kept) if among is None else among
    dropped = among & ~kept
    use = dropped.any(1)
    if not use.any():
        return {}
    kept, noise, among, dropped = (t[use].double() for t in (kept, noise, among, dropped))
    precision = (dropped * noise).sum(1) / dropped.sum(1)
    chance = (among * noise).sum(1) / among.sum(1)
    found = {"precision": precision.mean(), "chance": chance.mean(), "lift": (precision - chance).mean()}
    total = (among * noise).sum(1)
    if (some := total > 0).any():
        found["recall"] = ((dropped * noise).sum(1) / total.clamp(min=1))[some].mean()
    return {name: float(value) for name, value in found.items()}


def pooling_metrics(app: Tensor, final: Tensor, truth: Mapping[str, Tensor]) -> dict[str, float]:
    """drop_*, atp_*: how well APP, and after it ATP, drops what is not the visible face; *_background, *_occluder for these
    two alone, the latter on images with an occluder; *_background_busy: on images whose surroundings have the contrast of the
    face. contrast_*: the same for keeping as many patches of the largest pixel contrast, which needs no network;
    over_contrast_* = drop_lift_* - contrast_lift_*.

    app, final (N, P) bool: kept after APP and after the last block. truth: masks face, background, occluder (N, S, S) bool,
    busy (N,) bool, contrast (N, S, S)."""
    side = round(app.shape[1] ** 0.5)
    noise = ~noise_patches(truth["face"], side) if truth else None
    found: dict[str, float] = {
        "kept_app": app.double().sum(1).mean().item(),
        "kept_last": final.double().sum(1).mean().item(),
    }
    if noise is None:
        return found
    kinds = {"": noise} | {f"_{k}": noise_patches(truth[k], side) for k in ("background", "occluder")}
    kinds["_background_busy"] = kinds["_background"] & truth["busy"][:, None]
    contrast = F.adaptive_avg_pool2d(truth["contrast"][:, None], side).flatten(1)
    rival = to_mask(select(contrast, int(app[0].sum())), app.shape[1])
    for stage, kept, among in (("drop", app, None), ("contrast", rival, None), ("atp", final, app)):
        for kind, wanted in kinds.items():
            rows = wanted.any(1)
            if rows.any():
                result = dropped_on(kept[rows], wanted[rows], None if among is None else among[rows])
                found |= {f"{stage}_{name}{kind}": value for name, value in result.items()}
    lifts = [kind for kind in kinds if f"drop_lift{kind}" in found]
    return found | {f"over_contrast{kind}": found[f"drop_lift{kind}"] - found[f"contrast_lift{kind}"] for kind in lifts}


def confusion_figure(matrix: Tensor, names: Sequence[str], path: str | Path) -> None:
    """The confusion matrix as a PNG: rows = truth, shares of a row in percent, counts in brackets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    m = matrix.double()
    share = 100 * m / m.sum(1, keepdim=True).clamp(min=1)
    figure, axis = plt.subplots(figsize=(6.4, 5.6))
    picture = axis.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=100)
    for row in range(len(names)):
        for column in range(len(names)):
            text = f"{share[row, column]:.0f}\n({int(m[row, column])})"
            colour = "white" if share[row, column] > 55 else "black"
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("predicted")
    axis.set_ylabel("truth")
    figure.colorbar(picture, ax=axis, label="% of the true class")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
