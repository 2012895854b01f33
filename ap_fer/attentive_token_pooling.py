"""Attentive Token Pooling (ATP): between attention and MLP of a block, keep the tokens CLS attends to most.

    A   = q k^T / sqrt(d_h)                 (B, h, 1+N, 1+N)
    u   = z + W_o softmax(A) v              attention uses all tokens of the block
    t_j = sum_heads A[head, CLS, j]         raw logits, before the softmax: what produced the published numbers
    z'  = u' + MLP(LN(u')),  u' = u[CLS and the floor(N r) largest t]

Attention costs N tokens, the MLP those that are kept. No parameters, and no gradient through the choice.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from ap_fer.token_selection import When, active, check_rates, check_when, gather_tokens, keep_count, select

Source = Literal["logits", "softmax"]
SCORES = ("sum", "sum_abs_1", "max", "random")
SOURCES = ("logits", "softmax")


def token_score(row: Tensor, mode: str = "sum", *, source: str = "logits", prefix: int = 1) -> Tensor:
    """Score t (B, N) of the patch tokens from CLS's row of the scaled logits, row (B, h, prefix + N).

    mode: sum over heads (published), sum_abs_1, max, random (uniform noise). source: logits, or softmax over the row first.
    A softmax is monotone within a head, but the sum over heads of it is not: the orders differ."""
    if source not in SOURCES:
        raise ValueError(f"source={source!r}; use one of {', '.join(SOURCES)}")
    row = row.detach().float()
    if source == "softmax":
        row = row.softmax(-1)
    row = row[..., prefix:]
    if mode == "sum":
        return row.sum(1)
    if mode == "sum_abs_1":
        return row.abs().sum(1)
    if mode == "max":
        return row.amax(1)
    if mode == "random":
        return torch.rand(row.shape[0], row.shape[2]).to(row.device)
    raise ValueError(f"score={mode!r}; use one of {', '.join(SCORES)}")


class ATP(nn.Module):
    """kept, index = ATP(0.9)(u, row): u (B, prefix + N, d) after the attention residual, row (B, h, prefix + N).

    rate: r in (0, 1]; the first `prefix` tokens (CLS, registers) always stay. lowest, when: see `APP`.
    Returns (B, prefix + n', d) in raster order and the indices (B, n') of the kept patch tokens among the N."""

    def __init__(
        self,
        rate: float,
        *,
        score: str = "sum",
        source: str = "logits",
        lowest: bool = False,
        when: str = "both",
        prefix: int = 1,
    ):
        super().__init__()
        (self.rate,) = check_rates([rate], 1)
        if score not in SCORES:
            raise ValueError(f"score={score!r}; use one of {', '.join(SCORES)}")
        if source not in SOURCES:
            raise ValueError(f"source={source!r}; use one of {', '.join(SOURCES)}")
        self.score, self.source, self.lowest, self.prefix = score, source, lowest, prefix
        self.when: When = check_when(when)

    def drops(self, n: int) -> bool:
        """Whether any of n patch tokens would go; if not, the row of logits is not needed."""
        return keep_count(n, self.rate) < n and active(self.when, self.training)

    def forward(self, u: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        n, p = u.shape[1] - self.prefix, self.prefix
        if not self.drops(n):
            return u, torch.arange(n, device=u.device).expand(u.shape[0], -1)
        scores = token_score(row, self.score, source=self.source, prefix=p)
        index = select(scores, keep_count(n, self.rate), lowest=self.lowest)
        return gather_tokens(u, index, prefix=p), index

    def extra_repr(self) -> str:
        return f"rate={self.rate}, score={self.score}, source={self.source}, lowest={self.lowest}, when={self.when}"
