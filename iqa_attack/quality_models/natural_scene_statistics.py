"""Natural scene statistics: local normalisation and the generalised Gaussian fits of BRISQUE and NIQE.

The shape alpha of a fit is an argmin over a grid, which has no gradient. `shape_gradient="none"` leaves alpha a
constant, as the authors' code does; "implicit" gives it the derivative of the moment equation that defines it, d
alpha = d r / r'(alpha)."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from iqa_attack.fidelities.filters import gaussian_filter

ShapeGradient = str  # none | implicit
SHIFTS = ((0, 1), (1, 0), (1, 1), (-1, 1))  # horizontal, vertical and the two diagonal neighbours
ROUNDING, FLAT = 1e-9, 1e-13  # gray levels: what is below is flat in float64, and counts as so much


def local_moments(luma: Tensor, padding: str) -> tuple[Tensor, Tensor]:
    """(mean, deviation) in 7 x 7 Gaussian windows of sigma 7/6 of luma (..., H, W)."""
    mu = gaussian_filter(luma, size=7, sigma=7 / 6, padding=padding)
    variance = gaussian_filter(luma**2, size=7, sigma=7 / 6, padding=padding) - mu**2
    return mu, (variance.abs() + 1e-8).sqrt()  # flat areas: the root has no finite slope at 0


def mscn(luma: Tensor, *, padding: str = "constant", c: float = 1.0, flat: float = FLAT) -> Tensor:
    """Mean-subtracted contrast-normalised coefficients (L - mu) / (sigma + c) of luma (B, 1, H, W) in 0..255.

    In a flat area L - mu is 0 and what remains is rounding, whose sign then decides on which side of an asymmetric Gaussian
    its products count. In float64 every such value is taken as `flat` (FLAT is what most of a 2-D window's roundings are; 0 is
    on neither side): the same on every machine. In float32 the rounding decides."""
    mu, sigma = local_moments(luma, padding)
    difference = luma - mu
    if luma.dtype == torch.float64:
        difference = torch.where(difference.abs() < ROUNDING, torch.full_like(difference, flat), difference)
    return difference / (sigma + c)


# ------------------------------------------------------------------------------------------------ moment equations
def ggd_ratio(alpha: Tensor) -> Tensor:
    """E[x^2] / E[|x|]^2 of a generalised Gaussian of shape alpha: Gamma(1/a) Gamma(3/a) / Gamma(2/a)^2. Decreasing."""
    return torch.exp(torch.lgamma(1 / alpha) + torch.lgamma(3 / alpha) - 2 * torch.lgamma(2 / alpha))


def _ggd_slope(alpha: Tensor) -> Tensor:
    psi = torch.digamma(1 / alpha) + 3 * torch.digamma(3 / alpha) - 4 * torch.digamma(2 / alpha)
    return -ggd_ratio(alpha) * psi / alpha**2


@lru_cache(maxsize=1)
def _grid() -> tuple[Tensor, Tensor]:
    """The shapes 0.2, 0.201 ... 10 and their ratio, in ascending order of the ratio."""
    alpha = torch.arange(200, 10001, dtype=torch.float64) / 1000
    return alpha.flip(0), ggd_ratio(alpha).flip(0)


def shape_of_ratio(ratio: Tensor, gradient: ShapeGradient) -> Tensor:
    """The grid shape whose E[x^2]/E[|x|]^2 is nearest to `ratio` (any shape), with the gradient that is asked for."""
    if gradient not in ("none", "implicit"):
        raise ValueError(f"shape_gradient={gradient!r}, allowed: none, implicit")
    alphas, table = (t.to(ratio.device) for t in _grid())
    r = ratio.detach().double()
    upper = torch.searchsorted(table, r).clamp(1, len(table) - 1)
    nearer = torch.where(r - table[upper - 1] <= table[upper] - r, upper - 1, upper)
    alpha = alphas[nearer]
    if gradient == "implicit":
        return alpha.to(ratio) + (ratio - ratio.detach()) / _ggd_slope(alpha).to(ratio)
    return alpha.to(ratio)


def fit_ggd(x: Tensor, gradient: ShapeGradient = "none") -> tuple[Tensor, Tensor]:
    """(alpha, sigma^2) of zero-mean samples (B, n), each (B,)."""
    second = (x**2).mean(1)
    return shape_of_ratio(second / x.abs().mean(1) ** 2, gradient), second


def fit_aggd(x: Tensor, gradient: ShapeGradient = "none") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(alpha, eta, sigma_l^2, sigma_r^2) of samples (B, n), each (B,): the asymmetric generalised Gaussian.

    sigma_l and sigma_r are the root mean squares of the negative and positive samples, eta the mean of the
    distribution. A side without samples counts as one sample of size 1e-6, so that nothing is divided by zero."""
    left, right = (x < 0).to(x), (x > 0).to(x)
    square = x**2
    left_var = ((square * left).sum(1) + 1e-12) / left.sum(1).clamp(min=1)
    right_var = ((square * right).sum(1) + 1e-12) / right.sum(1).clamp(min=1)
    sigma_l, sigma_r = left_var.sqrt(), right_var.sqrt()
    g = sigma_l / sigma_r
    r = x.abs().mean(1) ** 2 / square.mean(1)
    big_r = r * (g**3 + 1) * (g + 1) / (g**2 + 1) ** 2  # = Gamma(2/a)^2 / (Gamma(1/a) Gamma(3/a))
    # The authors take the nearest of the reciprocal table; the two differ by a fraction of a grid step at most.
    alpha = shape_of_ratio(1 / big_r, gradient)
    a = alpha
    mean = torch.exp(torch.lgamma(2 / a) - 0.5 * (torch.lgamma(1 / a) + torch.lgamma(3 / a)))
    return alpha, (sigma_r - sigma_l) * mean, left_var, right_var


def neighbour_products(m: Tensor) -> list[Tensor]:
    """Products of (B, 1, H, W) with its four neighbours, circular at the borders, each (B, H*W)."""
    return [(m * torch.roll(m, shift, dims=(2, 3))).flatten(1) for shift in SHIFTS]


def shifted(m: Tensor, dy: int, dx: int) -> Tensor:
    """(B, 1, H, W) moved so that place (i, j) holds what was at (i + dy, j + dx), dy and dx in -1..1; 0 where that is outside."""
    height, width = m.shape[2:]
    return F.pad(m, (1, 1, 1, 1))[:, :, 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]


def opencv_features(luma: Tensor, *, shape_gradient: ShapeGradient = "none") -> Tensor:
    """The 36 features as OpenCV's quality module computes them, (B, 36), of luma (B, 1, H, W) in whole gray levels 0..255.

    Unlike `brisque_features`: the borders are replicated, neighbours outside count as 0, the coefficients themselves are fitted
    by an asymmetric Gaussian, the second scale is OpenCV's INTER_CUBIC, and flat areas are on neither side."""
    features = []
    for scale in range(2):
        if scale:
            luma = halve(luma, "opencv")
        m = mscn(luma, padding="replicate", flat=0.0)
        alpha, _, left, right = fit_aggd(m.flatten(1), shape_gradient)
        features += [alpha, (left + right) / 2]
        for dy, dx in SHIFTS:
            features += fit_aggd((m * shifted(m, dy, dx)).flatten(1), shape_gradient)
    return torch.stack(features, dim=1)


def brisque_features(
    luma: Tensor,
    *,
    shape_gradient: ShapeGradient = "none",
    resize: str = "torch_aligned",
) -> Tensor:
    """The 36 features of BRISQUE, (B, 36), of luma (B, 1, H, W) in 0..255.

    Per scale: alpha and sigma^2 of the coefficients, then alpha, eta, sigma_l^2, sigma_r^2 of each neighbour product.
    resize: how the second scale is made; torch_aligned as the paper's code, antialias as MATLAB's imresize."""
    features = []
    for scale in range(2):
        if scale:
            luma = halve(luma, resize)
        m = mscn(luma)
        features += fit_ggd(m.flatten(1), shape_gradient)
        for products in neighbour_products(m):
            features += fit_aggd(products, shape_gradient)
    return torch.stack(features, dim=1)


def halve(x: Tensor, resize: str) -> Tensor:
    """Bicubic reduction to floor(H/2) x floor(W/2). opencv: INTER_CUBIC, neither aligned nor antialiased."""
    if resize not in ("torch_aligned", "antialias", "opencv"):
        raise ValueError(f"resize={resize!r}, allowed: torch_aligned, antialias, opencv")
    size = [x.shape[2] // 2, x.shape[3] // 2]
    if resize == "antialias":
        return F.interpolate(x, size=size, mode="bicubic", antialias=True)
    return F.interpolate(x, size=size, mode="bicubic", align_corners=resize == "torch_aligned")
