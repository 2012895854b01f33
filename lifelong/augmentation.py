"""Raw images in memory -> what the network sees: augmentation in whole batches on the device, then normalisation."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Prepare:
    """images (B, C, H, W), uint8 0..255 or float 0..1 -> float (B, C, size, size), normalised with mean and std.

    With a generator (training): random crop after zero padding by `padding`, horizontal flip, rotation by up to `rotation`
    degrees, or a random resized crop (scale 0.08..1, aspect 3/4..4/3), all in one bilinear resampling. Without (test): the
    central size x size pixels. A separate draw for every image. ValueError for values out of range."""

    def __init__(
        self,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        size: int,
        padding: int = 0,
        flip: bool = False,
        rotation: float = 0.0,
        resized_crop: bool = False,
    ):
        if len(mean) != len(std) or min(std) <= 0 or padding < 0 or rotation < 0 or size < 1:
            raise ValueError(f"mean={list(mean)}, std={list(std)}, padding={padding}, rotation={rotation}, size={size}")
        self.mean, self.std, self.size = tuple(mean), tuple(std), size
        self.padding, self.flip, self.rotation, self.resized_crop = padding, flip, rotation, resized_crop

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        random = self.padding or self.flip or self.rotation or self.resized_crop
        if generator is not None and random:
            grid = F.affine_grid(self._draw(x, generator), [*x.shape[:2], self.size, self.size], align_corners=False)
            x = F.grid_sample(x, grid, align_corners=False)
        elif x.shape[-1] != self.size or x.shape[-2] != self.size:
            top, left = ((n - self.size) // 2 for n in x.shape[-2:])
            if min(top, left) < 0:
                raise ValueError(f"images of {tuple(x.shape[-2:])} are smaller than data.size={self.size}")
            x = x[..., top : top + self.size, left : left + self.size]
        mean, std = (torch.tensor(s, device=x.device).view(1, -1, 1, 1) for s in (self.mean, self.std))
        return (x - mean) / std

    def _draw(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Output-to-input maps (B, 2, 3) in half image widths."""
        u = torch.rand(len(x), 6, generator=generator, device=generator.device).to(x.device)
        sign = torch.where(u[:, 0] < (0.5 if self.flip else 0.0), -1.0, 1.0)
        angle = (2 * u[:, 1] - 1) * math.radians(self.rotation)
        if self.resized_crop:
            area, ratio = 0.08 + 0.92 * u[:, 2], torch.exp((2 * u[:, 3] - 1) * math.log(4 / 3))
            w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
            dx, dy = (1 - w) * (2 * u[:, 4] - 1), (1 - h) * (2 * u[:, 5] - 1)
        else:
            w = h = torch.ones_like(angle)
            steps = ((2 * self.padding + 1) * u[:, 4:]).floor() - self.padding  # whole pixels: exact copies
            dx, dy = (2 * steps / x.shape[-1]).unbind(1)
        c, s = angle.cos(), angle.sin()
        return torch.stack([torch.stack([sign * c * w, -s * w, dx], 1), torch.stack([sign * s * h, c * h, dy], 1)], 1)
