"""Multi-headed Fusion-Attention (MFA, abstract): the class token of a branch reads the patch tokens of every modality present.

    t^m  = [ LN3(c^m) ; LN2(z_patches^j) for j present, in canonical order ]
    c'^m = c^m + W_o' softmax(LN3(c^m) W_q' (t^m W_k')^T / sqrt(d_h)) (t^m W_v')

All projections and norms belong to branch m, so that a branch can be deployed alone.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusionAttention(nn.Module):
    """MFA of one branch: forward(c (B, D), [patch tokens (B, N, D) of each modality]) -> what is added to c, (B, D).

    Without positions between modalities: the order of the patches and of the modalities changes nothing."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide the width {dim}")
        self.heads = heads
        self.norm_patches, self.norm_class = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, c: Tensor, patches: Sequence[Tensor]) -> Tensor:
        query = self.norm_class(c)[:, None]
        source = torch.cat([query, *(self.norm_patches(z) for z in patches)], dim=1)
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.q, query), (self.k, source), (self.v, source))
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).flatten(1))
