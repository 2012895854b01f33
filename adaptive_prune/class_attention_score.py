"""The score of a token: class attention, weighted by how important each head is for that token.

    R[i,h] = ||O[i,h]|| / (sum_h' ||O[i,h']|| + 1e-8),      S[i] = sum_h R[i,h] A[cls,i,h]

A: attention of the class token, O: the context A V of a head before the output projection. No parameters. Tensors are
laid out (..., tokens, heads), which serves padded batches (B, n, H) and packed ones (T, H) alike.
"""

from typing import Literal

import torch
from torch import Tensor

Score = Literal["weighted", "mean"]


def head_importance(context: Tensor) -> Tensor:
    """R: the share of each head in a token's context norm. context: (..., H, d_h) -> (..., H), sums to 1 over heads."""
    norm = context.float().norm(dim=-1)
    return norm / (norm.sum(-1, keepdim=True) + 1e-8)


def token_score(class_attention: Tensor, context: Tensor, *, kind: Score = "weighted") -> Tensor:
    """S of every token, float32. class_attention: (..., H) from the class token to it; context: (..., H, d_h) -> (...).

    weighted: S = sum_h R_h A_h, so min_h A_h <= S <= max_h A_h (up to the 1e-8); mean: the ablation R = 1/H. Both have
    the same scale, thresholds are comparable. Gradients flow through A and O. ValueError for another kind."""
    if kind not in ("weighted", "mean"):
        raise ValueError(f"score={kind!r}, allowed: weighted, mean")
    a = class_attention.float()
    return a.mean(-1) if kind == "mean" else (head_importance(context) * a).sum(-1)


def class_attention(q_class: Tensor, k: Tensor, *, scale: float, valid: Tensor | None = None) -> Tensor:
    """The class token's row of softmax(Q K^T scale), which fused attention does not return: d n MACs per image.

    q_class: (B, H, d_h), k: (B, H, N, d_h), valid: (B, N) bool or None -> (B, N, H), float32, 0 at invalid keys."""
    logits = torch.einsum("bhd,bhnd->bnh", q_class.float(), k.float()) * scale
    if valid is not None:
        logits = logits.masked_fill(~valid[..., None], float("-inf"))
    return logits.softmax(1)


def class_attention_packed(q_class: Tensor, k: Tensor, image: Tensor, *, scale: float) -> Tensor:
    """The same for tokens of B images one after the other. q_class: (B, H, d_h), k: (T, H, d_h), image: (T,) the image
    of each token -> (T, H): a softmax over the tokens of an image."""
    logits = (q_class.float()[image] * k.float()).sum(-1) * scale
    images, index = len(q_class), image[:, None].expand_as(logits)
    top = logits.new_full((images, logits.shape[1]), float("-inf")).scatter_reduce(0, index, logits, "amax")
    weight = (logits - top[image]).exp()
    return weight / weight.new_zeros(images, weight.shape[1]).index_add(0, image, weight)[image]
