"""The bilinear model of binary weights: b = sign(w) is reconstructed as A w, A = diag(1/alpha).

    minimise over w, A:   L_S(w, A) + lambda G(w, A),   G(w, A) = || sign(w) - A w ||^2

`reconstruction`, `reconstruction_grad` and `task_grad` are the plain form of the paper; their derivatives are exact. The
published code learns alpha instead of A. What acts here in training, in two parts that a test shows to be its backward rule:

    forward and backward pass   `bilinear_binarize(lam=0)`: the task loss alone
    at the optimizer step       the gradients of `constraint`: the pull of lambda, once per step, never scaled
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


def constraint(w: Tensor, alpha: Tensor, *, lam: float = 1e-4, const: float = 0.02, zero: int = 1) -> Tensor:
    """lam / 2 || w - const sign(w) alpha ||^2 with the signs held fixed: the bilinear constraint in terms of alpha -> scalar.

    Its gradients, with R = w - const sign(w) alpha, are lam R for w and -lam sum(R const sign(w)) for alpha: the terms with lam
    of `bilinear_binarize`. `RBConv2d` adds them at the optimizer step. w: (out, ...); alpha: (out, 1, ...), >= 0."""
    return lam / 2 * (w - const * binary_sign(w, zero=zero) * alpha).square().sum()


SCALE_GRADS = ("released", "exact")


def bilinear_binarize(
    w: Tensor, alpha: Tensor, *, lam: float = 1e-4, const: float = 0.02, zero: int = 1, scale_grad: str = "released"
) -> Tensor:
    """w_b = const * sign(w) * alpha with the gradients of the published code. With G = dL/dw_b and R = w - w_b:

        dL/dw     = G alpha + lam R                                  (no clipping at |w| = 1, no factor const)
        dL/dalpha = sum(G w) - lam sum(R const sign(w))              (over the entries of a channel)

    w: (out, ...); alpha: (out, 1, ...), >= 0. lam: weight of the reconstruction; its pull is in these gradients, the loss value
    does not contain it. scale_grad: released, as above, pulls alpha like a layer whose weights are real; exact, the derivative of
    the forward rule itself, has sum(G const sign(w)) in the place of sum(G w). ValueError for another name."""
    if scale_grad not in SCALE_GRADS:
        raise ValueError(f"scale_grad={scale_grad!r}, allowed: {', '.join(SCALE_GRADS)}")
    return _BilinearBinarize.apply(w, alpha, lam, const, zero, scale_grad)  # pyright: ignore[reportReturnType]


class _BilinearBinarize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, alpha: Tensor, lam: float, const: float, zero: int, scale_grad: str) -> Tensor:
        ctx.save_for_backward(w, alpha)
        ctx.options = lam, const, zero, scale_grad
        return const * binary_sign(w, zero=zero) * alpha

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        w, alpha = ctx.saved_tensors
        lam, const, zero, scale_grad = ctx.options
        b = const * binary_sign(w, zero=zero)
        residual = w - b * alpha
        dw = grad * alpha + lam * residual
        through = w if scale_grad == "released" else b
        dalpha = (grad * through - lam * residual * b).sum_to_size(alpha.shape)
        return dw, dalpha, None, None, None, None


def _rows(a: Tensor, w: Tensor) -> Tensor:
    return a.reshape(-1, *[1] * (w.ndim - 1))
