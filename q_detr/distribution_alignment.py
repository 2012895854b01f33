"""DA: the decoder queries of the student are normalised before they are quantised (inner level of Q-DETR, Eq. 9).

    q* = (q - mu(q)) / sqrt(sigma^2(q) + eps) * gamma + beta

A Gaussian of variance s^2 has the entropy 1/2 log(2 pi e s^2), so that fixing the second moment fixes the information of the
query. (The paper prints this entropy without the e.)
"""

import math

import torch
from torch import Tensor, nn


class DistributionAlignment(nn.Module):
    """q: (B, heads, Q, d) -> same shape. mu and the unbiased variance are those of each query in each head, over d.

    gamma (init 1) and beta (init 0): (d,), shared by the heads. No running statistics: training and evaluation agree. It is a
    layer norm over d but for the unbiased variance of the released code."""

    def __init__(self, width: int, *, eps: float = 1e-5):
        super().__init__()
        if width < 2:
            raise ValueError(f"width={width}: a variance needs at least two components per head")
        self.gamma, self.beta, self.eps = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), eps

    def forward(self, q: Tensor) -> Tensor:
        variance, mean = torch.var_mean(q, dim=-1, keepdim=True, correction=1)
        return (q - mean) / torch.sqrt(variance + self.eps) * self.gamma + self.beta


def gaussian_entropy(variance: Tensor) -> Tensor:
    """1/2 log(2 pi e variance), in nats."""
    return 0.5 * (math.log(2 * math.pi * math.e) + variance.log())


@torch.no_grad()
def query_statistics(q: Tensor) -> dict[str, float]:
    """Of queries (B, heads, Q, d), each query in each head by itself over d: average of the mean, of the unbiased variance and
    of the Gaussian entropy in nats, and `query_spread`, the standard deviation of log variance over queries and heads."""
    variance, mean = torch.var_mean(q.double(), dim=-1, correction=1)
    variance = variance.clamp(min=1e-12)
    return {
        "query_mean": mean.mean().item(), "query_variance": variance.mean().item(),
        "query_entropy": gaussian_entropy(variance).mean().item(), "query_spread": variance.log().std().item(),
    }  # fmt: skip


@torch.no_grad()
def code_entropy(codes: Tensor) -> float:
    """Entropy in bits of integer codes (B, heads, Q, d), of each head by itself, mean over heads: at most the codes' width."""
    total = 0.0
    for head in codes.unbind(1):
        share = torch.unique(head, return_counts=True)[1].double() / head.numel()
        total -= (share * share.log2()).sum().item()
    return total / codes.shape[1]
