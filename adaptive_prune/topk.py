"""The baselines with one number of tokens for every image: top-k on the class attention score, and EViT's fusion.

EViT (2202.07800) keeps the k tokens with the largest class attention and fuses the others into one.
"""

import torch
from torch import Tensor


def keep_top(x: Tensor, scores: Tensor, k: int, *, prefix: int = 1, fuse: bool = False) -> tuple[Tensor, Tensor]:
    """The prefix tokens and the k best patch tokens, in their order. x: (B, N, d), scores: (B, N) (the prefix part is not
    read) -> (tokens (B, prefix + k [+ 1], d), index (B, prefix + k) into N).

    fuse: the dropped tokens, times their scores, are summed into one extra token at the end, as in EViT's released code (the
    scores are the attention that the class token pays them; gradients flow through them); with nothing to drop there is none.
    ValueError unless 0 <= k <= N - prefix."""
    n = x.shape[1]
    if not 0 <= k <= n - prefix:
        raise ValueError(f"keep {k} of {n - prefix} patch tokens: the number must be in 0..{n - prefix}")
    order = scores[:, prefix:].detach().argsort(dim=1, descending=True, stable=True) + prefix
    best = order[:, :k].sort(1).values
    index = torch.cat([torch.arange(prefix, device=x.device).expand(len(x), -1), best], 1)
    kept = take(x, index)
    if fuse and k < n - prefix:
        rest = order[:, k:]
        weight = scores.gather(1, rest)[..., None].to(x.dtype)
        kept = torch.cat([kept, (take(x, rest) * weight).sum(1, keepdim=True)], 1)
    return kept, index


def take(x: Tensor, index: Tensor) -> Tensor:
    """x: (B, N, d), index: (B, n) -> (B, n, d). By whole rows, which is faster than a gather with d indices per row."""
    b, n, _ = x.shape
    rows = index + torch.arange(b, device=x.device)[:, None] * n
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, index.shape)
