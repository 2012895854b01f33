"""Attention in which dropped tokens can be looked at by nobody but themselves.

    P^[i,j] = P[j] + (1 - P[j]) [i = j],     A[i,j] = (e^(a[i,j] - max_i) P^[i,j] + eps/N) / (sum_j ... + eps)

All tokens stay in the tensor, so the policy P receives a gradient, yet the kept tokens see what real removal shows them.
"""

from typing import Literal

import torch
from torch import Tensor

RowMax = Literal["kept", "all"]


def masked_softmax(logits: Tensor, policy: Tensor, *, eps: float = 0.0, row_max: RowMax = "kept") -> Tensor:
    """Softmax over the kept keys, float32. logits: (B, H, N, N), policy: (B, N), 1 kept or 0 dropped -> (B, H, N, N).

    row_max="kept" subtracts the maximum over kept keys and the own one, and clamps the exponent at 0. The published code
    takes it over all keys ("all") with eps=1e-6: when a dropped token's logit leads by more than about 14, the kept
    exponentials sink below eps, the row turns uniform and dropped tokens come back to life. Without the clamp a lead of 88
    gives inf * 0 = NaN. eps=0 gives dropped keys exactly no attention. ValueError for another row_max or eps < 0."""
    if row_max not in ("kept", "all") or eps < 0:
        raise ValueError(f"row_max={row_max!r}, eps={eps}; allowed: row_max kept or all, eps >= 0")
    if row_max == "all" and eps == 0:
        raise ValueError("row_max='all' needs eps > 0: the kept exponentials of a row may all underflow to 0")
    a = logits.float()
    n = a.shape[-1]
    policy = policy.float()[:, None, None, :]
    allowed = policy + (1 - policy) * torch.eye(n, device=a.device)
    seen = a if row_max == "all" else a.masked_fill(allowed == 0, float("-inf"))
    weight = (a - seen.detach().amax(-1, keepdim=True)).clamp(max=0).exp() * allowed
    if eps == 0:
        return weight / weight.sum(-1, keepdim=True)
    return (weight + eps / n) / (weight.sum(-1, keepdim=True) + eps)
