"""The control of an attack: random perturbations at the same distance, image by image."""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.data.batches import stream
from iqa_attack.perceptual_attack import Distance, quantise


def normal(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """(B, C, H, W) standard normal numbers, image b drawn from seeds[b]."""
    return torch.stack([torch.randn(tuple(shape[1:]), generator=torch.Generator().manual_seed(s)) for s in seeds])


def random_signs(x0: Tensor, eps: Tensor, seeds: Sequence[int]) -> Tensor:
    """x0 +- eps per value with random signs, on the 8-bit lattice; x0 (B, 3, H, W), eps (B,)."""
    return quantise(x0 + eps.view(-1, 1, 1, 1) * normal(x0.shape, seeds).sign().to(x0))


@torch.no_grad()
def random_at_distance(
    distance: Distance, x0: Tensor, target: Tensor, seeds: Sequence[int], *, chebyshev: bool, rounds: int = 25
) -> Tensor:
    """Random images (B, 3, H, W) on the 8-bit lattice at distance `target` (B,) from x0.

    chebyshev: signs of that size, the strongest noise at this distance. Otherwise Gaussian noise whose deviation is
    found by bisection on the distance after rounding; target 0 gives x0 itself."""
    if chebyshev:
        return random_signs(x0, target, seeds)
    noise = normal(x0.shape, seeds).to(x0)
    low, high = torch.zeros_like(target), torch.ones_like(target)
    best, error = x0.clone(), torch.full_like(target, torch.inf)
    for _ in range(rounds):
        sigma = (low + high) / 2
        x = quantise(x0 + sigma.view(-1, 1, 1, 1) * noise)
        d = distance(x, x0)
        closer = (d - target).abs() < error
        best[closer], error = x[closer], torch.minimum((d - target).abs(), error)
        low, high = torch.where(d < target, sigma, low), torch.where(d < target, high, sigma)
    best[target == 0] = x0[target == 0]
    return best


def draw_seeds(seed: int, names: Sequence[str], draw: int) -> list[int]:
    """A seed per image, from its name: which images are attacked together does not matter."""
    return [stream(seed, draw, *name.encode()) for name in names]
