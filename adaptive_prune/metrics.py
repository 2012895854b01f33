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
    image; macs: the same relative to dense; kept_s: mean share of the patch tokens in stage s, kept_s_std over images."""
    right = logits.argmax(1) == labels
    found = {"top1": 100 * right.double().mean().item(), "nll": F.cross_entropy(logits.float(), labels).item()}
    if logits.shape[1] > 5:
        top5 = (logits.topk(5, 1).indices == labels[:, None]).any(1)
        found["top5"] = 100 * top5.double().mean().item()
    found |= {"macs": macs.double().mean().item() / cost.dense, "gmacs": macs.double().mean().item() / 1e9}
    share = kept.double() / cost.patches
    for s in range(kept.shape[1]):
        found[f"kept_{s + 1}"] = share[:, s].mean().item()
        found[f"kept_{s + 1}_std"] = share[:, s].std(correction=0).item()
    return found, right


def content(
    masks: Tensor | None, kept: Tensor, right: Tensor, truth: Mapping[str, Tensor], *, patch: int,
    locations: Sequence[int], depth: int,
) -> dict[str, float]:  # fmt: skip
    """Do the kept tokens follow the content? For data whose `truth` knows k (N,), the number of digits, and masks
    (N, H, W) of where they are; empty otherwise.

    A stage weighs as many times as it has blocks. kept_corr: Spearman correlation over images of the mean kept share
    with k (0 where all images keep the same); kept_k<k>: that share by k; top1_k<k>: accuracy by k, percent;
    recall: share of the digits' tokens that are kept; recall_lift: recall minus the kept share of all tokens, which is what
    chance would give; both are means over images."""
    if "k" not in truth:
        return {}
    k = truth["k"]
    found = {f"top1_k{v}": 100 * right[k == v].double().mean().item() for v in k.unique().tolist()}
    if not locations:
        return found
    ends = torch.tensor([*locations[1:], depth]) - torch.tensor(list(locations))
    weight = ends.double() / ends.sum()
    patches = (truth["masks"].shape[-1] // patch) ** 2
    share = (kept.double() / patches) @ weight
    ranks: Any = spearmanr(share, k) if share.std() > 1e-12 else None
    found["kept_corr"] = 0.0 if ranks is None else float(ranks.statistic)
    found |= {f"kept_k{v}": share[k == v].mean().item() for v in k.unique().tolist()}
    if masks is not None:
        digit = F.max_pool2d(truth["masks"][:, None].float(), patch).flatten(1).double()  # (N, n)
        inside = torch.einsum("nsp,np,s->n", masks.double(), digit, weight)
        recall = inside / digit.sum(1)
        chance = torch.einsum("nsp,s->n", masks.double(), weight) / patches
        found |= {"recall": recall.mean().item(), "recall_lift": (recall - chance).mean().item()}
    return found


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
