"""The full-reference distances by name."""

from torch import nn

from iqa_attack.fidelities.deep_fidelity import DISTS, LPIPS
from iqa_attack.fidelities.fidelity import MSSSIM, SSIM, Chebyshev

KINDS: dict[str, type[nn.Module]] = {
    "chebyshev": Chebyshev,
    "ssim": SSIM,
    "ms_ssim": MSSSIM,
    "lpips": LPIPS,
    "dists": DISTS,
}


def build_fr(*, kind: str, **options) -> nn.Module:
    """A distance by name: forward(x, x0), (B, 3, H, W) in 0..1 -> (B,). ValueError for an unknown one, or LPIPS and
    DISTS without weights."""
    if kind not in KINDS:
        raise ValueError(f"fr.kind={kind!r}, allowed: {', '.join(KINDS)}")
    return KINDS[kind](**options).eval().requires_grad_(False)
