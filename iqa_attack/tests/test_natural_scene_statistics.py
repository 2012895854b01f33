"""Fits against closed forms and sampled data, BRISQUE's features against a second plain formulation, gradients."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate
from scipy.special import gamma
from scipy.stats import gennorm

from iqa_attack.fidelities.filters import gaussian_filter, gaussian_window
from iqa_attack.photographs.images import luma
from iqa_attack.quality_models import natural_scene_statistics as nss
from iqa_attack.quality_models.natural_scene_statistics import (
    brisque_features,
    fit_aggd,
    fit_ggd,
    ggd_ratio,
    halve,
    mscn,
    shape_of_ratio,
)

RNG = np.random.default_rng(0)


def samples(values):
    return torch.from_numpy(np.asarray(values))[None]


def test_ratio_in_closed_form():
    """pi/2 for a Gaussian (E|x| = sigma sqrt(2/pi)), 2 for a Laplacian."""
    found = ggd_ratio(torch.tensor([2.0, 1.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx([math.pi / 2, 2.0], rel=1e-12)


@pytest.mark.parametrize(("shape", "tolerance"), [(2.0, 0.03), (1.0, 0.02), (0.5, 0.02)])
def test_ggd_fit_of_samples(shape, tolerance):
    x = gennorm.rvs(shape, scale=3.0, size=1_000_000, random_state=1)
    alpha, variance = fit_ggd(samples(x))
    assert float(alpha) == pytest.approx(shape, abs=tolerance)
    assert float(variance) == pytest.approx(9 * gamma(3 / shape) / gamma(1 / shape), rel=0.02)


def test_aggd_fit_of_samples_with_two_widths():
    """An asymmetric generalised Gaussian: side l with probability b_l / (b_l + b_r), both of shape 1.5."""
    shape, bl, br, n = 1.5, 1.0, 2.0, 2_000_000
    size = np.abs(gennorm.rvs(shape, size=n, random_state=2))
    left = RNG.random(n) < bl / (bl + br)
    alpha, eta, l2, r2 = fit_aggd(samples(np.where(left, -bl * size, br * size)))
    assert float(alpha) == pytest.approx(shape, abs=0.02)
    assert float(eta) == pytest.approx((br - bl) * gamma(2 / shape) / gamma(1 / shape), rel=0.02)
    unit = gamma(3 / shape) / gamma(1 / shape)
    assert (float(l2), float(r2)) == (pytest.approx(bl**2 * unit, rel=0.02), pytest.approx(br**2 * unit, rel=0.02))


def test_aggd_of_symmetric_samples_is_the_ggd():
    half = np.abs(RNG.normal(size=100_000))
    x = samples(np.concatenate([half, -half]))
    alpha, eta, l2, r2 = fit_aggd(x)
    assert float(eta) == pytest.approx(0, abs=1e-12) and float(l2) == pytest.approx(float(r2), rel=1e-12)
    assert float(alpha) == float(fit_ggd(x)[0])


def test_shape_is_the_nearest_of_the_grid():
    ratio = torch.from_numpy(RNG.uniform(1.1, 4.0, 200))
    grid = torch.arange(200, 10001, dtype=torch.float64) / 1000
    expected = grid[(ggd_ratio(grid)[None] - ratio[:, None]).abs().argmin(1)]
    torch.testing.assert_close(shape_of_ratio(ratio, "none"), expected, rtol=0, atol=0)
    assert shape_of_ratio(torch.tensor([1.0, 1e6]), "none").tolist() == pytest.approx([10.0, 0.2])


def test_implicit_gradient_is_the_slope_of_the_inverse():
    for alpha in (0.5, 1.0, 2.0, 4.0):
        ratio = ggd_ratio(torch.tensor([alpha], dtype=torch.float64)).requires_grad_()
        shape_of_ratio(ratio, "implicit").backward()
        h = 1e-5
        up, down = (float(ggd_ratio(torch.tensor([alpha + s], dtype=torch.float64))) for s in (h, -h))
        assert ratio.grad.item() == pytest.approx(2 * h / (up - down), rel=1e-5)
    with pytest.raises(ValueError, match="shape_gradient='exact', allowed: none, implicit"):
        shape_of_ratio(ratio, "exact")


@pytest.mark.parametrize(("padding", "mode"), [("constant", "constant"), ("replicate", "nearest")])
def test_filter_and_mscn_against_scipy(padding, mode):
    x = RNG.uniform(0, 255, (20, 23))
    w = gaussian_window(7, 7 / 6).numpy()
    kernel = np.outer(w, w)
    mu = correlate(x, kernel, mode=mode)
    sigma = np.sqrt(np.abs(correlate(x**2, kernel, mode=mode) - mu**2))
    found = mscn(torch.from_numpy(x)[None, None], padding=padding)[0, 0]
    np.testing.assert_allclose(found, (x - mu) / (sigma + 1), rtol=1e-6, atol=1e-8)
    valid = gaussian_filter(torch.from_numpy(x), size=7, sigma=7 / 6, padding="valid")
    np.testing.assert_allclose(valid, mu[3:-3, 3:-3], rtol=1e-10)


def test_mscn_does_not_see_a_constant_that_is_added():
    x = torch.from_numpy(RNG.uniform(0, 200, (1, 1, 24, 24)))
    torch.testing.assert_close(mscn(x, padding="replicate"), mscn(x + 40, padding="replicate"), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(mscn(x), mscn(x + 40), atol=1e-2), "zeros outside see the constant at the border"


def plain_features(luma):
    """BRISQUE as one writes it first: NumPy, loops, boolean masks and an argmin over the grid."""
    grid = np.arange(200, 10001) / 1000
    table = gamma(1 / grid) * gamma(3 / grid) / gamma(2 / grid) ** 2
    out = []
    w = gaussian_window(7, 7 / 6).numpy()
    for x in (luma, halve(torch.from_numpy(luma)[None, None], "torch_aligned")[0, 0].numpy()):
        mu = correlate(x, np.outer(w, w), mode="constant")
        sigma = np.sqrt(np.abs(correlate(x**2, np.outer(w, w), mode="constant") - mu**2))
        m = (x - mu) / (sigma + 1)
        out += [grid[np.argmin(np.abs(np.mean(m**2) / np.mean(np.abs(m)) ** 2 - table))], np.mean(m**2)]
        for dy, dx in ((0, 1), (1, 0), (1, 1), (-1, 1)):
            p = m * np.roll(m, (dy, dx), axis=(0, 1))
            sl, sr = np.sqrt(np.mean(p[p < 0] ** 2)), np.sqrt(np.mean(p[p > 0] ** 2))
            g = sl / sr
            r = np.mean(np.abs(p)) ** 2 / np.mean(p**2) * (g**3 + 1) * (g + 1) / (g**2 + 1) ** 2
            a = grid[np.argmin(np.abs(r - 1 / table))]
            eta = (sr - sl) * gamma(2 / a) / np.sqrt(gamma(1 / a) * gamma(3 / a))
            out += [a, eta, sl**2, sr**2]
    return np.array(out)


def test_features_against_the_plain_formulation(photos):
    """On noisy images: where a codec leaves flat areas, rounding decides the sign of products that are zero."""
    noisy = [i for i, name in enumerate(photos["train"].names) if "_wn" in name][:2]
    grey = luma(photos["train"].stack()[noisy].double())
    found = brisque_features(grey)
    assert found.shape == (2, 36)
    for row, x in zip(found, grey, strict=True):
        np.testing.assert_allclose(row, plain_features(x[0].numpy()), rtol=1e-5, atol=1e-6)


SHAPES = [*range(0, 36, 18), *(18 * scale + 2 + 4 * k for scale in range(2) for k in range(4))]


def exact_shape(ratio, _):
    """Bisection of the decreasing ratio, instead of the grid."""
    low, high = torch.full_like(ratio, 0.2), torch.full_like(ratio, 10.0)
    for _ in range(80):
        mid = (low + high) / 2
        above = ggd_ratio(mid) > ratio
        low, high = torch.where(above, mid, low), torch.where(above, high, mid)
    return (low + high) / 2


@pytest.mark.parametrize("gradient", ["none", "implicit"])
def test_gradient_against_finite_differences(gradient, monkeypatch):
    """none: alpha is a constant, so that only the deviations and the means move; implicit: alpha follows its moments."""
    generator = torch.Generator().manual_seed(5)
    x = 20 + 210 * torch.rand(1, 1, 32, 32, generator=generator, dtype=torch.float64)
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    weights = torch.randn(36, generator=generator, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    frozen = []
    original = nss.shape_of_ratio
    monkeypatch.setattr(nss, "shape_of_ratio", lambda r, g: frozen.append(original(r, g)) or frozen[-1])
    (brisque_features(leaf, shape_gradient=gradient) @ weights).sum().backward()
    slope = float((leaf.grad * direction).sum())

    def value(t):
        if gradient == "none":
            again = iter(frozen)
            monkeypatch.setattr(nss, "shape_of_ratio", lambda r, g: next(again).detach())
        else:
            monkeypatch.setattr(nss, "shape_of_ratio", exact_shape)
        return float((brisque_features(x + t * direction) @ weights).sum())

    h = 1e-5
    assert slope == pytest.approx((value(h) - value(-h)) / (2 * h), rel=1e-5 if gradient == "none" else 1e-2)
