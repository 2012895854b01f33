"""The background attack: one-step adversarial noise where the network's spatial attention is low.

w = 1 - a^2                                                  a: attention map in (0, 1)
delta_0 ~ U(-eps_c, eps_c),   g = grad_delta CE(z(x + delta_0), y)
delta = clip(w (delta_0 + eps_c sign g), -eps_c, eps_c),     eps_c = (eps / 255) / std_c
x' = clip(x + delta, (0 - mean) / std, (1 - mean) / std)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REGIONS = ("background", "everywhere", "foreground")


def region_weight(attention: Tensor, region: str = "background") -> Tensor:
    """w from a map a (B, 1, h, w) in (0, 1): background 1 - a^2, foreground a^2, everywhere 1."""
    if region == "background":
        return 1 - attention**2
    if region == "foreground":
        return attention**2
    if region == "everywhere":
        return torch.ones_like(attention)
    raise ValueError(f"region={region!r}, allowed: {', '.join(REGIONS)}")


def background_attack(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    attention_fn: Callable[[Tensor], Tensor] | Tensor,
    eps: float = 1.0,
    *,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    region: str = "background",
    delta: Tensor | None = None,
    generator: torch.Generator | None = None,
    freeze_bn: bool = False,
) -> Tensor:
    """Attacked images x' with the shape of x; no gradient, parameters and their .grad stay as they are.

    model: images -> logits (B, C), any module. x: (B, c, H, W), normalised with mean, std (one number or one per channel).
    y: (B,). attention_fn: the map (B, 1, h, w) in (0, 1) itself or what computes it from x; resized bilinearly if its
    resolution is not that of x. eps: in steps of 1/255 of the image range. delta: the start delta_0 (default: drawn
    uniformly from `generator`). freeze_bn: running statistics do not see the crafting pass (the released code lets them).
    ValueError for eps < 0, std <= 0, an unknown region, or statistics that do not fit the channels."""
    if eps < 0:
        raise ValueError(f"eps={eps}, allowed: >= 0 (in 1/255 of the image range)")
    channels = x.shape[1]
    if len(mean) not in (1, channels) or len(std) not in (1, channels) or min(std) <= 0:
        raise ValueError(
            f"mean={tuple(mean)}, std={tuple(std)}: one value or one for each of {channels} channels, std > 0"
        )
    mu, sigma = (torch.tensor(list(s), dtype=x.dtype, device=x.device).view(1, -1, 1, 1) for s in (mean, std))
    bound = eps / 255 / sigma
    with torch.no_grad():
        attention = attention_fn if isinstance(attention_fn, Tensor) else attention_fn(x)
        w = region_weight(attention.detach(), region).to(x.dtype)
        if w.shape[-2:] != x.shape[-2:]:
            w = F.interpolate(w, size=x.shape[-2:], mode="bilinear", align_corners=False)
    if delta is None:
        delta = start_noise(x, eps, std, generator)
    delta = delta.detach().clone().requires_grad_(True)
    with frozen_statistics(model, freeze_bn), torch.enable_grad():
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x.detach() + delta), y), delta)
    with torch.no_grad():
        moved = w * (delta + bound * gradient.sign())
        moved = torch.clamp(moved, -bound, bound)
        return torch.clamp(x + moved, (0 - mu) / sigma, (1 - mu) / sigma)


def start_noise(x: Tensor, eps: float, std: Sequence[float], generator: torch.Generator | None = None) -> Tensor:
    """delta_0 with the shape of x, uniform in -eps_c .. eps_c."""
    bound = eps / 255 / torch.tensor(list(std), dtype=x.dtype, device=x.device).view(1, -1, 1, 1)
    return (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device) - 1) * bound


@contextmanager
def frozen_statistics(model: object, enabled: bool = True) -> Iterator[None]:
    """Batch norms of `model` go on using batch statistics in training mode, but do not record them."""
    modules = model.modules() if enabled and isinstance(model, nn.Module) else ()
    norms = [
        m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats and m.training
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
