"""Quadratic tasks l_k = 1/2 (phi - m_k)^T H_k (phi - m_k), on which the fusion's fixed points are known.

One shared minimiser: the iteration converges to it for any positive weights. Different minimisers: with the plain mean and
small steps to the minimiser of the sum, H_sum^-1 sum_k H_k m_k; adaptive weights move the fixed point toward harder tasks
(with two tasks in one dimension the two fixed points agree, the shift needs three). alpha only rescales the step.
"""

import torch
from torch import Tensor

from lifelong.adaptive_fusion import OnlineFusion


def iterate(
    h: Tensor,
    m: Tensor,
    start: Tensor,
    *,
    eta: float,
    alpha: float = 1.0,
    weights: str = "adaptive",
    rounds: int = 1000,
) -> Tensor:
    """phi (n,) after `rounds` of: one gradient step of rate eta per task from the same base, fusion, step alpha.

    h: (K, n, n) symmetric positive definite; m: (K, n) minimisers; start: (n,). Use float64."""
    phi = start.clone()
    for _ in range(rounds):
        fusion = OnlineFusion([phi], weights=weights)
        for h_k, m_k in zip(h, m, strict=True):
            fusion.add([phi - eta * h_k @ (phi - m_k)])
        (phi,) = fusion.result(alpha)
    return phi


def minimiser_of_sum(h: Tensor, m: Tensor) -> Tensor:
    """H_sum^-1 sum_k H_k m_k, (n,)."""
    return torch.linalg.solve(h.sum(0), torch.einsum("kij,kj->i", h, m))
