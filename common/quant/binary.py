"""One-bit primitives: the sign, its surrogate derivatives, weight scales and the two shifted activations.

A surrogate is given by its primitive F, not by its derivative. The value is sign(x), every derivative is that of F:

    sign(x) + (F(x) - F(x).detach())

The bracket is exactly zero, so the value has two levels in any precision. First and second order, forward and
reverse mode, vmap and the double-vjp trick follow from F without a rule of their own. When no derivative can be asked
for (`torch.no_grad`) the bracket is left out and an exported graph holds one comparison and one selection.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def binary_sign(x: Tensor, *, zero: int = 1) -> Tensor:
    """sign(x) with a chosen value at 0; no gradient. x: any shape -> same shape and dtype, values in {-1, +1, zero}.

    zero: 1 for a network that can be deployed with one bit; 0 is the ternary `torch.sign` of published code. Zeros
    are common (ReLU, padding). -0.0 counts as 0. NaN has no sign bit and becomes `zero`."""
    if zero not in (1, 0, -1):
        raise ValueError(f"zero={zero!r}: the value of sign at 0 is 1, 0 or -1")
    x = x.detach()
    one = torch.ones((), dtype=x.dtype, device=x.device)
    if zero == 0:
        return torch.where(x > 0, one, torch.where(x < 0, -one, 0 * one))
    return torch.where(x < 0, -one, one) if zero == 1 else torch.where(x > 0, one, -one)


def hardtanh(x: Tensor) -> Tensor:
    """F of the straight-through estimator: F' = 1 where |x| <= 1 (boundary included), else 0; F'' = 0."""
    # torch.clamp will not do: the derivative that it gives at the boundary depends on the version.
    return torch.where(x.abs() <= 1, x, x.detach().clamp(-1, 1))


def quadratic(x: Tensor) -> Tensor:
    """F of ApproxSign (Bi-Real): F' = max(0, 2 - 2|x|), F'' = -2 sign(x) inside |x| < 1 and 0 outside.

    F = -1, x^2 + 2x, -x^2 + 2x, 1 on the four pieces, written as c (2 - |c|) with c = x clipped to [-1, 1]."""
    c = x.clamp(-1, 1)
    return c * (2 - c.abs())


def ede(x: Tensor, *, t: float, k: float | None = None) -> Tensor:
    """F of the error decay estimator (IR-Net): k tanh(t x), F' = k t (1 - tanh^2(t x)). Default k = max(1/t, 1)."""
    if not t > 0 or (k is not None and not k > 0):
        raise ValueError(f"t={t}, k={k}: both must be positive")
    return (max(1 / t, 1.0) if k is None else k) * torch.tanh(t * x)


def ede_temperature(progress: float, *, t_min: float = 0.1, t_max: float = 10.0) -> float:
    """t of `ede` after the share `progress` = epoch / epochs (0..1) of the training: t_min (t_max / t_min)^progress."""
    if not 0 <= progress <= 1 or not 0 < t_min <= t_max:
        raise ValueError(f"progress={progress} must lie in 0..1 and 0 < t_min={t_min} <= t_max={t_max}")
    return t_min * (t_max / t_min) ** progress


def identity(x: Tensor) -> Tensor:
    """F of the unclipped straight-through estimator: F' = 1 everywhere."""
    return x


SURROGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "ste": hardtanh,
    "approx": quadratic,
    "identity": identity,
}
Estimator = str | Callable[[Tensor], Tensor]


def binarize(x: Tensor, *, estimator: Estimator = "ste", zero: int = 1) -> Tensor:
    """sign(x) in the forward pass, the derivatives of F in every other.

    x: any shape -> same shape, values in {-1, +1, zero}. estimator: a name in SURROGATES or F itself, for example
    `partial(ede, t=0.1)`. In training a NaN stays NaN instead of turning into a plausible sign, and so does +-inf
    with "identity"."""
    if isinstance(estimator, str):
        if estimator not in SURROGATES:
            raise ValueError(f"estimator={estimator!r}: choose from {sorted(SURROGATES)} or pass a function F(x)")
        estimator = SURROGATES[estimator]
    return _with_derivative_of(estimator, x, binary_sign(x, zero=zero))


def _with_derivative_of(surrogate: Callable[[Tensor], Tensor], x: Tensor, value: Tensor) -> Tensor:
    # no_grad switches off reverse mode only: a forward-mode tangent must still pass.
    if not torch.is_grad_enabled() and forward_ad.unpack_dual(x).tangent is None:
        return value
    f = surrogate(x)
    return value + (f - f.detach())


def xnor_scale(w: Tensor, *, detach: bool = True) -> Tensor:
    """alpha_c = mean |w_c| over each output channel, the minimiser of ||w_c - alpha sign(w_c)||^2 (XNOR-Net).

    w: (out, ...), a convolution or linear weight -> (out, 1, ...)."""
    alpha = w.abs().mean(dim=_filter_dims(w), keepdim=True)
    return alpha.detach() if detach else alpha


def clip_ste_weight(w: Tensor, *, zero: int = 1) -> Tensor:
    """w_b = alpha_c sign(w) of ReActNet; backward dL/dw = dL/dw_b * 1{|w| <= 1}, deliberately without the factor
    alpha. (`xnor_scale(w) * binarize(w)` is the rule with that factor.) w: (out, ...) -> same shape."""
    return _with_derivative_of(hardtanh, w, (xnor_scale(w) * binary_sign(w, zero=zero)).detach())


def libra(w: Tensor) -> tuple[Tensor, Tensor]:
    """Standardised weight and shift scale of IR-Net; the binary weight is s * binarize(w~, estimator=...).

    w: (out, ...) -> w~ = (w - mean) / std per filter (unbiased std, differentiable), same shape, and
    s = 2^round(log2 mean|w~|), shape (out, 1, ...), no gradient. A constant filter gives w~ = 0 and s = 0.
    ValueError for filters of a single element, which have no standard deviation."""
    dims = _filter_dims(w)
    if w[0].numel() < 2:
        raise ValueError(f"weight of shape {tuple(w.shape)}: libra needs at least two elements per filter")
    centred = w - w.mean(dim=dims, keepdim=True)
    variance = centred.square().sum(dim=dims, keepdim=True) / (w[0].numel() - 1)
    # The floor sits under the root: its derivative is infinite at 0. A constant filter leaves rounding noise of about
    # 1e-8 |w| in `centred`; 1e-12 treats that as zero.
    degenerate = variance <= 1e-12 * w.square().mean(dim=dims, keepdim=True)
    standard = torch.where(degenerate, 0.0, centred) / torch.where(degenerate, 1.0, variance).sqrt()
    scale = torch.exp2(torch.round(torch.log2(standard.detach().abs().mean(dim=dims, keepdim=True))))
    return standard, scale


def _filter_dims(w: Tensor) -> tuple[int, ...]:
    if w.ndim < 2:
        raise ValueError(f"weight of shape {tuple(w.shape)}: expected (out, in) or (out, in, kh, kw)")
    return tuple(range(1, w.ndim))


class RSign(nn.Module):
    """sign(x + b_c) with a learnable shift per channel, init 0 (ReActNet; the shift is added, as in the published code
    and not subtracted as in its paper). x: (B, C, H, W) -> same shape. `bias`: (1, C, 1, 1)."""

    def __init__(self, channels: int, *, estimator: Estimator = "approx", zero: int = 1):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.estimator = estimator
        self.zero = zero
        binarize(torch.zeros(1), estimator=estimator, zero=zero)  # a misspelt option fails here, not at the first batch

    def forward(self, x: Tensor) -> Tensor:
        return binarize(x + self.bias, estimator=self.estimator, zero=self.zero)


class RPReLU(nn.Module):
    """PReLU_c(x + b1_c) + b2_c, shifts init 0 (ReActNet). x: (B, C, H, W) -> same shape.

    slope: initial PReLU slope; with 0 the module starts as an exact ReLU. Parameters `shift_in`, `shift_out`:
    (1, C, 1, 1); `slope`: (C,)."""

    def __init__(self, channels: int, *, slope: float = 0.25):
        super().__init__()
        if not math.isfinite(slope):
            raise ValueError(f"slope={slope}: must be finite")
        self.shift_in = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.slope = nn.Parameter(torch.full((channels,), float(slope)))
        self.shift_out = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.prelu(x + self.shift_in, self.slope) + self.shift_out
