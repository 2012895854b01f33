"""Full-reference distances that need no weights: Chebyshev, SSIM, MS-SSIM.

Each is a module: forward(x, x0), both (B, 3, H, W) in 0..1 -> (B,) >= 0, zero for equal images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iqa_attack.fidelities.filters import gaussian_filter

C1, C2 = 0.01**2, 0.03**2
MS_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def grey(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W), ITU-R 601 luma, range kept."""
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def ssim_maps(x: Tensor, y: Tensor, *, padding: str = "valid") -> tuple[Tensor, Tensor]:
    """(SSIM, contrast-structure) maps of x, y (B, C, H, W) in 0..1: 11 x 11 Gaussian windows of sigma 1.5.

    padding: valid (MATLAB's convention: whole windows only) or replicate, reflect (a map as large as the image;
    reflect is torchmetrics' convention). Population
    covariances."""
    if padding not in ("valid", "replicate", "reflect"):
        raise ValueError(f"padding={padding!r}, allowed: valid, replicate, reflect")
    if min(x.shape[2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11 x 11 pixels, got {x.shape[2]} x {x.shape[3]}")
    stack = gaussian_filter(torch.stack([x, y, x * x, y * y, x * y]), size=11, sigma=1.5, padding=padding)
    mx, my, xx, yy, xy = stack
    cs = (2 * (xy - mx * my) + C2) / (xx - mx**2 + yy - my**2 + C2)
    return (2 * mx * my + C1) / (mx**2 + my**2 + C1) * cs, cs


def ssim(x: Tensor, y: Tensor, *, padding: str = "valid", downsample: bool = False) -> Tensor:
    """Mean SSIM (B,) of x, y (B, C, H, W) in 0..1, over channels and places.

    downsample: first average over f x f blocks, f = max(1, round(min(H, W) / 256)), as the authors' MATLAB function
    does."""
    if downsample and (f := max(1, round(min(x.shape[2:]) / 256))) > 1:
        x, y = F.avg_pool2d(x, f), F.avg_pool2d(y, f)
    return ssim_maps(x, y, padding=padding)[0].mean((1, 2, 3))


class Chebyshev(nn.Module):
    """The largest change of any pixel and channel. Its gradient touches one value of an image."""

    minimum = 1

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        return (x - x0).abs().flatten(1).amax(1)


class SSIM(nn.Module):
    """1 - SSIM. color: grey (the paper's text) or rgb (its code); padding "valid" leaves pixels at the border nearly
    free."""

    minimum = 11

    def __init__(self, *, color: str = "grey", padding: str = "replicate"):
        super().__init__()
        if color not in ("grey", "rgb"):
            raise ValueError(f"color={color!r}, allowed: grey, rgb")
        self.color, self.padding = color, padding

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        x, x0 = (grey(x), grey(x0)) if self.color == "grey" else (x, x0)
        return 1 - ssim(x, x0, padding=self.padding)


class MSSSIM(nn.Module):
    """1 - MS-SSIM over five scales, grey. Sides of at least 161 pixels, so that the last scale holds a window.

    last: padding of the last scale; torchmetrics reflects there."""

    minimum = 161

    def __init__(self, *, last: str = "valid"):
        super().__init__()
        self.last = last

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        if min(x.shape[2:]) < self.minimum:
            raise ValueError(f"MS-SSIM needs sides of at least {self.minimum} pixels, got {x.shape[2]} x {x.shape[3]}")
        x, x0, product = grey(x), grey(x0), x.new_ones(len(x))
        for i, weight in enumerate(MS_WEIGHTS):
            final = i == len(MS_WEIGHTS) - 1
            full, cs = ssim_maps(x, x0, padding=self.last if final else "valid")
            value = (full if final else cs).mean((1, 2, 3))
            product = product * value.clamp(min=1e-6) ** weight
            x, x0 = F.avg_pool2d(x, 2), F.avg_pool2d(x0, 2)
        return 1 - product
