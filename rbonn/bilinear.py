"""The bilinear model of binary weights (Eq. of section 3.1): b = sign(w) is reconstructed as A w, A = diag(1/alpha).

    minimise over w, A:   L_S(w, A) + lambda G(w, A),   G(w, A) = || sign(w) - A w ||^2

`bilinear_binarize` is the rule of the published code, which learns alpha instead of A. The functions on A are the plain
form of the paper; the exact derivatives here are tested against finite differences.
"""

from typing import Any

import torch
from torch import Tensor

from common.quant.binary import binary_sign


def reconstruction(w: Tensor, a: Tensor, *, zero: int = 1) -> Tensor:
    """G(w, A) = sum_i ||sign(w_i) - A_ii w_i||^2. w: (out, ...), a: (out,) the diagonal of A -> scalar."""
    return (binary_sign(w, zero=zero) - _rows(a, w) * w).square().sum()


def reconstruction_grad(w: Tensor, a: Tensor, *, zero: int = 1) -> Tensor:
    """dG/dA_ii = 2 <A_ii w_i - sign(w_i), w_i>; (out,)."""
    return 2 * ((_rows(a, w) * w - binary_sign(w, zero=zero)) * w).flatten(1).sum(1)


def task_grad(grad_out: Tensor, s: Tensor, a: Tensor) -> Tensor:
    """dL_S/dA_ii = -A_ii^-2 <dL_S/da_out_i, s_i> for a_out_i = s_i / A_ii. grad_out, s: (B, out, ...); a: (out,) -> (out,)."""
    return -(grad_out * s).transpose(0, 1).flatten(1).sum(1) / a.square()


def bilinear_binarize(w: Tensor, alpha: Tensor, *, lam: float = 1e-4, const: float = 0.02, zero: int = 1) -> Tensor:
    """w_b = const * sign(w) * alpha with the gradients of the published code. With G = dL/dw_b and R = w - w_b:

        dL/dw     = G alpha + lam R                                  (no clipping at |w| = 1, no factor const)
        dL/dalpha = sum(G w) - lam sum(R const sign(w))              (over the entries of a channel)

    w: (out, ...); alpha: (out, 1, ...), >= 0. The derivative of the forward rule itself would be sum(G const sign(w));
    the published one pulls alpha like a layer whose weights are real. lam: weight of the reconstruction; its pull is
    in these gradients, the loss value does not contain it."""
    return _BilinearBinarize.apply(w, alpha, lam, const, zero)  # pyright: ignore[reportReturnType]


class _BilinearBinarize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, alpha: Tensor, lam: float, const: float, zero: int) -> Tensor:
        ctx.save_for_backward(w, alpha)
        ctx.options = lam, const, zero
        return const * binary_sign(w, zero=zero) * alpha

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        w, alpha = ctx.saved_tensors
        lam, const, zero = ctx.options
        b = const * binary_sign(w, zero=zero)
        residual = w - b * alpha
        dw = grad * alpha + lam * residual
        dalpha = (grad * w - lam * residual * b).sum_to_size(alpha.shape)
        return dw, dalpha, None, None, None


def _rows(a: Tensor, w: Tensor) -> Tensor:
    return a.reshape(-1, *[1] * (w.ndim - 1))
