"""Multi-headed Fusion-Attention (MFA, abstract): the class token of a branch reads the patch tokens of every modality present.

    t^m  = [ LN3(c^m) ; LN2(z_patches^j) for j present, in canonical order ]
    c'^m = c^m + W_o' softmax(LN3(c^m) W_q' (t^m W_k')^T / sqrt(d_h)) (t^m W_v')

All projections and norms belong to branch m, so that a branch can be deployed alone.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Seen = tuple[Tensor, Tensor]  # keys and values of one modality's patches, each (B, h, N, D / h)


class FusionAttention(nn.Module):
    """MFA of one branch: two calls, because several subsets of the modalities read the same patches.

    seen = attention.look(z)            patches z (B, N, D) of one modality -> keys and values
    c = c + attention.read(c, [seen])   c (B, D), what was seen of every modality present -> (B, D)

    Without positions between modalities: the order of the patches and of the modalities changes nothing."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide the width {dim}")
        self.heads = heads
        self.norm_patches, self.norm_class = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def look(self, patches: Tensor) -> Seen:
        y = self.norm_patches(patches)
        return self._heads(self.k(y)), self._heads(self.v(y))

    def read(self, c: Tensor, seen: Sequence[Seen]) -> Tensor:
        y = self.norm_class(c)[:, None]
        k = torch.cat([self._heads(self.k(y)), *(keys for keys, _ in seen)], dim=2)
        v = torch.cat([self._heads(self.v(y)), *(values for _, values in seen)], dim=2)
        return self.proj(F.scaled_dot_product_attention(self._heads(self.q(y)), k, v).flatten(1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)
