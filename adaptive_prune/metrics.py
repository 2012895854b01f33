"""What one evaluation reports: accuracy, cost, kept tokens per stage; with known content, whether they follow it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import binomtest, spearmanr
from torch import Tensor

from adaptive_prune.budget import ViTCost


def classification(
    logits: Tensor, labels: Tensor, macs: Tensor, kept: Tensor, cost: ViTCost
) -> tuple[dict[str, float], Tensor]:
    """Metrics and the images that are right (N,) bool.

    logits: (N, C); labels: (N,); macs: (N,); kept: (N, S) patch tokens per stage. top1, top5 in percent; gmacs: mean per
    image; macs: the same relative to dense; kept_s: mean share of the patch tokens in stage s, kept_s_std over images; kept_hard:
    Spearman correlation over images of the share that is kept (mean over stages) with the loss, 0 where all keep the same."""
    right, loss = logits.argmax(1) == labels, F.cross_entropy(logits.float(), labels, reduction="none")
    found = {"top1": 100 * right.double().mean().item(), "nll": loss.mean().item()}
    if logits.shape[1] > 5:
        top5 = (logits.topk(5, 1).indices == labels[:, None]).any(1)
        found["top5"] = 100 * top5.double().mean().item()
    found |= {"macs": macs.double().mean().item() / cost.dense, "gmacs": macs.double().mean().item() / 1e9}
    share = kept.double() / cost.patches
    for s in range(kept.shape[1]):
        found[f"kept_{s + 1}"] = share[:, s].mean().item()
        found[f"kept_{s + 1}_std"] = share[:, s].std(correction=0).item()
    if kept.shape[1]:
        found["kept_hard"] = rank_correlation(share.mean(1), loss)
    return found, right


def content(
    masks: Tensor | None, kept: Tensor, right: Tensor, truth: Mapping[str, Tensor], *, patch: int,
    locations: Sequence[int], depth: int,
) -> dict[str, float]:  # fmt: skip
    """Do the kept tokens follow the content? For data whose `truth` knows masks (N, H, W) of where objects are, and maybe
    k (N,), the number of digits; empty otherwise. Without k the amount of content is the number of patches that the object
    touches, and k = 1..4 its quarter among the images (the smallest objects: 1).

    A stage weighs as many times as it has blocks. kept_corr: Spearman correlation over images of the mean kept share
    with the amount (0 where all images keep the same); kept_k<k>: that share by k; top1_k<k>: accuracy by k, percent;
    recall: share of the objects' tokens that are kept; recall_lift: recall minus the kept share of all tokens, which is what
    chance would give; both are means over images (recall over those with an object)."""
    if not truth:
        return {}
    touched = F.max_pool2d(truth["masks"][:, None].float(), patch).flatten(1).double()  # (N, n)
    amount = truth.get("k", touched.sum(1))
    k = truth.get("k", quarters(amount))
    found = {f"top1_k{v}": 100 * right[k == v].double().mean().item() for v in k.unique().tolist()}
    if not locations:
        return found
    ends = torch.tensor([*locations[1:], depth]) - torch.tensor(list(locations))
    weight = ends.double() / ends.sum()
    patches = (truth["masks"].shape[-1] // patch) ** 2
    share = (kept.double() / patches) @ weight
    found["kept_corr"] = rank_correlation(share, amount)
    found |= {f"kept_k{v}": share[k == v].mean().item() for v in k.unique().tolist()}
    if masks is not None:
        seen = touched.sum(1) > 0
        inside = torch.einsum("nsp,np,s->n", masks.double(), touched, weight)
        recall = (inside / touched.sum(1))[seen]
        chance = torch.einsum("nsp,s->n", masks.double(), weight)[seen] / patches
        found |= {"recall": recall.mean().item(), "recall_lift": (recall - chance).mean().item()}
    return found


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of a, b (N,); 0 where one of them is the same for all."""
    if len(a) < 2 or min(a.double().std(), b.double().std()) <= 1e-12:
        return 0.0
    ranks: Any = spearmanr(a, b)
    return float(ranks.statistic)


def quarters(amount: Tensor) -> Tensor:
    """1..4 by the quartiles of amount (N,), 4 for the largest. Equal amounts are in the same quarter."""
    cuts = torch.quantile(amount.double(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    return 1 + torch.searchsorted(cuts, amount.double())


def merit(found: Mapping[str, float], target: float) -> list[float]:
    """What best.ckpt is chosen by, the larger list the better: first the budget, then top-1. found: {macs, top1} of validation.

    Top-1 alone would choose an early epoch of AS-ViT, whose thresholds have not risen yet: it drops nothing. A cost up to 2 %
    above the target counts as within it."""
    return [-max(0.0, found["macs"] - 1.02 * target), found["top1"]]


def mcnemar(a: Tensor, b: Tensor) -> dict[str, float]:
    """Exact McNemar test of two models on the same images; a, b: (N,) bool, right or wrong.

    only_a, only_b: images that only one gets right; p: two-sided, under equal chances of being the one. ValueError for
    different lengths."""
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"predictions of different images: {tuple(a.shape)} and {tuple(b.shape)}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return {"only_a": only_a, "only_b": only_b, "p": float(p)}


def histogram(kept: Tensor, *, bins: int = 10) -> list[dict[str, Any]]:
    """Counts of images by kept tokens, per stage. kept: (N, S) -> rows {stage, low, high, images}."""
    rows = []
    for s in range(kept.shape[1]):
        values = kept[:, s].double()
        low, high = values.min().item(), values.max().item()
        counts, edges = torch.histogram(
            values.cpu(), bins if high > low else 1, range=(low, high if high > low else low + 1)
        )
        for n, a, b in zip(counts.tolist(), edges.tolist(), edges[1:].tolist(), strict=False):
            rows.append({"stage": s + 1, "low": a, "high": b, "images": int(n)})
    return rows
