"""Multi-headed Mutual-Attention (MMA, abstract): the class token of a branch reads the patches that matter, where "matter"
may be decided by the other modalities.

    map^m = q^m (k^m)^T / sqrt(d_h),   M^m = Gamma_lambda(mean over heads of map^m) in {0, 1}^N
    U^m   = the union (or another combination) of M^j over the modalities j that are present
    c^m   = z_cls^m + W_o softmax(map^m where U^m, else -inf) v^m

The selection is hard: gradients flow through map^m and v^m of branch m only. The abstract says no more than that each branch
mines informative patch tokens; the top-lambda mask Gamma follows the sibling MA-ViT (Liu and Liang, 2022), the union is ours.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

RULES = ("top", "mean", "max")
MODES = ("own", "others", "union", "intersection")


def select(relevance: Tensor, *, rule: str = "top", share: float = 0.5) -> Tensor:
    """Gamma: which patches are informative. relevance: (B, N), any real numbers -> bool (B, N), at least one True per row.

    top: the ceil(share N) largest, of equal ones the first; mean: those above the mean of the row (the first of all if none
    is); max: those of at least min + share (max - min), which is "> lambda max" made independent of the origin of the logits.
    ValueError for another rule or share outside (0, 1]."""
    if rule not in RULES or not 0 < share <= 1:
        raise ValueError(f"rule={rule!r}, share={share}, allowed: {', '.join(RULES)} and 0 < share <= 1")
    relevance = relevance.detach().float()
    if rule == "top":
        count = math.ceil(share * relevance.shape[1] - 1e-9)
        # Ranks by comparison: exact with ties on every device, and exportable, which a stable sort is not.
        mine, other = relevance[:, :, None], relevance[:, None, :]
        n = relevance.shape[1]
        earlier = torch.ones(n, n, dtype=torch.bool, device=relevance.device).tril(-1)
        return ((other > mine) | ((other == mine) & earlier)).sum(2) < count
    low, high = relevance.amin(1, keepdim=True), relevance.amax(1, keepdim=True)
    if rule == "max":
        return relevance >= low + share * (high - low)
    chosen = relevance > relevance.mean(1, keepdim=True)
    chosen[:, 0] |= ~chosen.any(1)  # all equal
    return chosen


def combine(masks: Mapping[str, Tensor], name: str, *, mode: str = "union") -> Tensor:
    """U of branch `name` from the masks M (B, N) of all modalities present, bool (B, N) with at least one True per row.

    others without another modality, and an empty intersection, fall back to the own mask. ValueError for another mode."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}, allowed: {', '.join(MODES)}")
    own = masks[name]
    if mode == "own" or len(masks) == 1:
        return own
    if mode == "intersection":
        common = torch.stack([*masks.values()]).all(0)
        return torch.where(common.any(1, keepdim=True), common, own)
    used = [mask for other, mask in masks.items() if mode == "union" or other != name]
    return torch.stack(used).any(0)


class MutualAttention(nn.Module):
    """MMA of one branch: two calls, because the masks of all branches come first.

    logits, values = attention.look(z)                   z (B, 1 + N, D) -> (B, h, N), (B, h, N, D / h)
    c = z[:, 0] + attention.read(logits, values, mask)   mask (B, N) bool -> (B, D)
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide the width {dim}")
        self.heads = heads
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def look(self, z: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(z)
        q = self.q(y[:, :1]).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k = self.k(y[:, 1:]).unflatten(2, (self.heads, -1)).transpose(1, 2)
        v = self.v(y[:, 1:]).unflatten(2, (self.heads, -1)).transpose(1, 2)
        return (q @ k.mT).squeeze(2) * q.shape[-1] ** -0.5, v

    def read(self, logits: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        masked = logits.masked_fill(
            ~mask[:, None], torch.finfo(logits.dtype).min
        )  # not -inf: NaN-proof in half precision
        weights = masked.softmax(dim=-1)
        return self.proj((weights[:, :, None] @ values).flatten(1))
