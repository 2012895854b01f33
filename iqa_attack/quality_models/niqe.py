"""NIQE: the distance of an image's patch statistics from those of pristine images (Mittal et al. 2013; an extra, no claim
of the paper uses it).

The pristine model comes from a file in the published formats, or is fitted here on pristine photographs.
"""

from pathlib import Path

import numpy as np
import scipy.io
import torch
from torch import Tensor, nn

from iqa_attack.photographs.images import check_images
from iqa_attack.quality_models.natural_scene_statistics import (
    ShapeGradient,
    fit_aggd,
    halve,
    local_moments,
    mscn,
    neighbour_products,
)


class Niqe(nn.Module):
    """forward: images (B, 3, H, W) in 0..1 -> quality (B,), larger = better: minus the distance.

    patch: side of a patch. luma: "rounded" to whole gray levels, as the published numbers are (the gradient passes straight
    through), or "exact"; the two differ by up to 0.3."""

    mean: Tensor
    covariance: Tensor

    def __init__(self, *, patch: int = 96, shape_gradient: ShapeGradient = "implicit", luma: str = "rounded"):
        super().__init__()
        if luma not in ("rounded", "exact"):
            raise ValueError(f"luma={luma!r}, allowed: rounded, exact")
        self.luma = luma
        if patch % 2:
            raise ValueError(f"patch={patch} must be even: the second scale halves it")
        self.patch, self.shape_gradient, self.minimum = patch, shape_gradient, patch
        self.register_buffer("mean", torch.zeros(36, dtype=torch.float64))
        self.register_buffer("covariance", torch.eye(36, dtype=torch.float64))

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, patches, 36) features and (B, patches) mean local deviation of the whole patches of the images.

        The luma is 16..235 of BT.601, in float64; the second scale is MATLAB's antialiased bicubic half."""
        check_images(x, self.patch, "NIQE")
        rows, columns = x.shape[2] // self.patch, x.shape[3] // self.patch
        x = x.double()
        weights = x.new_tensor([65.481, 128.553, 24.966]).view(1, 3, 1, 1)
        y = 16 + (x * weights).sum(1, keepdim=True)[:, :, : rows * self.patch, : columns * self.patch]
        if self.luma == "rounded":
            y = y + (y.round() - y).detach()
        parts, sharpness = [], torch.zeros(0)
        for scale in range(2):
            side = self.patch // (scale + 1)
            if scale:
                y = halve(y, "antialias")
            m = _patches(mscn(y, padding="replicate"), side)
            if not scale:
                sharpness = _patches(local_moments(y, "replicate")[1], side).mean((1, 2, 3)).view(len(x), -1)
            a, _, l2, r2 = fit_aggd(m.flatten(1), self.shape_gradient)
            bl, br = _widths(a, l2, r2)
            part = [a, (bl + br) / 2]
            for products in neighbour_products(m):
                a, eta, l2, r2 = fit_aggd(products, self.shape_gradient)
                part += [a, eta, *_widths(a, l2, r2)]
            parts.append(torch.stack(part, 1).view(len(x), rows * columns, 18))
        return torch.cat(parts, -1), sharpness

    def forward(self, x: Tensor) -> Tensor:
        f = self.features(x)[0].double()
        if f.shape[1] < 2:
            raise ValueError(
                f"NIQE needs two whole patches of {self.patch} pixels for a covariance, got {x.shape[2]} x {x.shape[3]} pixels"
            )
        difference = (f.mean(1) - self.mean).unsqueeze(-1)
        centred = f - f.mean(1, keepdim=True)
        covariance = centred.transpose(1, 2) @ centred / (f.shape[1] - 1)
        inverse = torch.linalg.pinv((covariance + self.covariance) / 2, hermitian=True)
        squared = (difference.transpose(1, 2) @ inverse @ difference).flatten()
        return -squared.clamp(min=1e-12).sqrt().to(x.dtype)

    def options(self) -> dict:
        return {"patch": self.patch, "shape_gradient": self.shape_gradient, "luma": self.luma}


def _widths(alpha: Tensor, left_var: Tensor, right_var: Tensor) -> tuple[Tensor, Tensor]:
    """Scale parameters beta = sigma sqrt(Gamma(1/a) / Gamma(3/a)) of the two sides."""
    factor = torch.exp(0.5 * (torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha)))
    return left_var.sqrt() * factor, right_var.sqrt() * factor


def _patches(x: Tensor, side: int) -> Tensor:
    """(B, 1, H, W) -> (B * patches, 1, side, side), row by row."""
    b, _, h, w = x.shape
    x = x.view(b, h // side, side, w // side, side).transpose(2, 3)
    return x.reshape(-1, 1, side, side)


@torch.no_grad()
def fit_niqe(images: list[Tensor], *, patch: int = 96, sharpest: float = 0.75, **options) -> Niqe:
    """The pristine model of photographs (3, H, W): mean and covariance over patches at least `sharpest` times as
    sharp as the sharpest patch of their image. ValueError if fewer than 40 patches remain."""
    model, kept = Niqe(patch=patch, **options), []
    for image in images:
        features, sharpness = model.features(image[None])
        kept.append(features[0][sharpness[0] > sharpest * sharpness[0].max()])
    f = torch.cat(kept).double()
    if len(f) < 40:
        raise ValueError(
            f"only {len(f)} sharp patches of {patch} pixels, at least 40 are needed: more or larger photographs"
        )
    model.mean.copy_(f.mean(0))
    model.covariance.copy_(torch.cov(f.T))
    return model.eval()


def load_niqe(path: str | Path, **options) -> Niqe:
    """A published pristine model: .npz (mu_pris_param, cov_pris_param) or .mat (mu_prisparam, cov_prisparam).

    Raises FileNotFoundError or ValueError naming the file."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no NIQE model {path}")
    if path.suffix not in (".npz", ".mat"):
        raise ValueError(f"{path}: suffix {path.suffix!r}, allowed are .npz, .mat")
    raw = scipy.io.loadmat(path) if path.suffix == ".mat" else np.load(path, allow_pickle=False)
    found = {k.replace("pris_param", "prisparam"): np.asarray(raw[k]) for k in raw if not k.startswith("__")}
    mean, covariance = found.get("mu_prisparam"), found.get("cov_prisparam")
    if mean is None or covariance is None or mean.size != 36 or covariance.shape != (36, 36):
        shapes = {k: v.shape for k, v in found.items()}
        raise ValueError(
            f"{path} is no NIQE model: it needs a mean of 36 and a covariance of 36 x 36, it holds {shapes}"
        )
    model = Niqe(**options)
    model.mean.copy_(torch.from_numpy(mean.ravel()))
    model.covariance.copy_(torch.from_numpy(covariance))
    return model.eval()
