"""DReLU, the choice of the channels that are backtracked, and what the published code does instead.

The paper: D(x_i) = 1 iff the rank of x_i (1-based, ascending) exceeds T = int(C tau), and

    DReLU(w_i, A_i) = w_i  if not D(||w_i||_1) and D(A_i), else 0

that is, channels with sparse weights (small L1 norm) and a dense A = 1/alpha (small scale).
"""

import math

import torch
from torch import Tensor


def rank(x: Tensor) -> Tensor:
    """Ascending ranks 1..C of x (C,); equal values in their order."""
    ranks = torch.empty_like(x, dtype=torch.long)
    ranks[x.argsort(stable=True)] = torch.arange(1, len(x) + 1, device=x.device)
    return ranks


def dense(x: Tensor, *, tau: float = 0.6) -> Tensor:
    """D(x): True for the C - int(C tau) largest of x (C,). ValueError unless 0 <= tau <= 1."""
    return rank(x) > int(len(x) * check_tau(tau))


def density_channels(w: Tensor, a: Tensor, *, tau: float = 0.6) -> Tensor:
    """The channels that the paper backtracks, bool (C,). w: (C, ...); a: (C,), diagonal of A. None for tau = 0 or 1."""
    return ~dense(w.abs().flatten(1).sum(1), tau=tau) & dense(a, tau=tau)


def density_relu(w: Tensor, a: Tensor, *, tau: float = 0.6) -> Tensor:
    """DReLU(w, A): w with the rows of all other channels set to 0. w: (C, ...); a: (C,), diagonal of A -> as w."""
    return w * density_channels(w, a, tau=tau).view(-1, *[1] * (w.ndim - 1))


def small_scale_channels(alpha: Tensor, *, tau: float = 0.6, rule: str = "fixed") -> Tensor:
    """The channels that the published code backtracks, from alpha alone (the norm of w plays no part). (C,) -> bool (C,).

    fixed: the T = floor(C (1 - tau)) channels with the smallest alpha, which is D(A) of the paper up to rounding.
    official: T = int(C (1 - tau)); channel k is chosen iff argsort(alpha)[k] < T. The code takes argsort for the rank,
    so the choice is T channels at positions that have little to do with their scale; it gave the published numbers."""
    check_tau(tau)
    if rule == "official":
        return alpha.argsort(stable=True) < int(len(alpha) * (1 - tau))
    if rule == "fixed":
        return rank(alpha) <= math.floor(len(alpha) * (1 - tau) + 1e-9)
    raise ValueError(f"rule={rule!r}, allowed: fixed, official")


def check_tau(tau: float) -> float:
    """tau itself. ValueError unless 0 <= tau <= 1."""
    if not 0 <= tau <= 1:
        raise ValueError(f"tau={tau}, allowed: 0..1, the share of channels that are not dense")
    return tau
