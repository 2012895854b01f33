"""Separable filtering as two matrix products: several times faster on a CPU than one-channel convolutions, backward
above all."""

from functools import lru_cache

import torch
from torch import Tensor

PADDINGS = ("constant", "replicate", "reflect", "valid")


def gaussian_window(size: int, sigma: float) -> Tensor:
    """(size,) float64 weights that sum to one; a window is their outer product."""
    x = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    w = torch.exp(-(x**2) / (2 * sigma**2))
    return w / w.sum()


@lru_cache(maxsize=64)
def _matrix(n: int, size: int, sigma: float, padding: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(m, n): row i holds the window around output i, and what falls outside as the padding says."""
    window, r = gaussian_window(size, sigma), size // 2
    centres = torch.arange(r, n - r) if padding == "valid" else torch.arange(n)
    source = centres[:, None] + torch.arange(-r, r + 1)
    weights = window.expand(len(centres), size).clone()
    if padding == "constant":
        weights[(source < 0) | (source >= n)] = 0
    if padding == "reflect":
        source = torch.where(source < 0, -source, torch.where(source >= n, 2 * (n - 1) - source, source))
    matrix = torch.zeros(len(centres), n, dtype=torch.float64)
    matrix.scatter_add_(1, source.clamp(0, n - 1), weights)
    return matrix.to(device, dtype)


def gaussian_filter(x: Tensor, *, size: int, sigma: float, padding: str) -> Tensor:
    """(..., H, W) filtered with a size x size Gaussian. padding: constant (zeros), replicate, or valid (whole windows
    only)."""
    if padding not in PADDINGS:
        raise ValueError(f"padding={padding!r}, allowed: {', '.join(PADDINGS)}")
    rows, columns = (_matrix(n, size, sigma, padding, x.dtype, x.device) for n in x.shape[-2:])
    return rows @ x @ columns.T
