"""Uniform quantisation with learned steps (LSQ, LSQ+): the function with its gradients, the module with its state.

    v = x / step + round(zero_point),  q = round(clip(v, qn, qp)),  x_hat = step * (q - round(zero_point))        (Q1)

Rounding is half to even. Everything here is fake quantisation in float; `LSQQuantizer.codes` gives the integers that
`common.quant.pack` packs and multiplies.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

MIN_STEP = 1e-5  # smallest step that the forward pass uses
NEGATIVE = -1e-5  # an activation is signed if its minimum lies below


def int_bounds(bits: int, signed: bool) -> tuple[int, int]:
    """(qn, qp) = (-2^(b-1), 2^(b-1) - 1) signed, (0, 2^b - 1) unsigned, for 2..16 bits."""
    if not 2 <= bits <= 16:
        raise ValueError(f"bits={bits}: 2 to 16 are possible; one bit is the business of common.quant.binary")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


@torch.no_grad()
def quantize_codes(x: Tensor, step: Tensor, zero_point: Tensor | None, qn: int, qp: int) -> Tensor:
    """q of (Q1) as a float tensor of integers in qn..qp; no gradient. step, zero_point broadcast against x."""
    return _codes(*_in_float(x, step, zero_point), qn, qp)[1]


def uniform_quantize(
    x: Tensor, step: Tensor, zero_point: Tensor | None, qn: int, qp: int, *, grad_scale: float = 1.0
) -> Tensor:
    """x_hat of (Q1). With in = [qn <= v <= qp] on the unrounded v, z = round(zero_point) and upstream gradient g:

        dx = g * in,   dstep = s * sum(g * (in ? q - v : q - z)),   dzero_point = s * sum(-g * step * (not in))

    x: any shape -> same shape and dtype. step (positive) and zero_point (in units of the codes, None = 0) broadcast
    against x; the sums run over all elements that share them, s = grad_scale. Half precision is computed in float32,
    under autocast too. First order only."""
    if not qn < qp:
        raise ValueError(f"bounds qn={qn}, qp={qp}: qn must be smaller")
    operands = _in_float(x, step, zero_point)
    if not torch.is_grad_enabled():
        return _dequantize(*operands, qn, qp).to(x.dtype)
    return _UniformQuantize.apply(*operands, qn, qp, grad_scale).to(x.dtype)  # pyright: ignore[reportOptionalMemberAccess]


class _UniformQuantize(torch.autograd.Function):
    # The composition of division, clip, straight-through round and product has the same gradients, but keeps several
    # tensors of the size of x for the backward pass where this node keeps x. Casts stay outside: an identity `.to` in
    # the forward makes torch.compile of torch 2.11 lose the gradient of the step, silently.
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero_point: Tensor, qn: int, qp: int, grad_scale: float):
        ctx.save_for_backward(x, step, zero_point)
        ctx.bounds, ctx.grad_scale = (qn, qp), grad_scale
        return _dequantize(x, step, zero_point, qn, qp)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, step, zero_point = ctx.saved_tensors
        qn, qp = ctx.bounds
        need_x, need_step, need_zero = ctx.needs_input_grad[:3]
        v, q = _codes(x, step, zero_point, qn, qp)
        inside = (v >= qn) & (v <= qp)
        dx = dstep = dzero = None
        if need_x:
            dx = grad * inside
        if need_step:
            dstep = grad * torch.where(inside, q - v, q - zero_point.round())
            dstep = ctx.grad_scale * dstep.sum_to_size(step.shape)
        if need_zero:
            dzero = ctx.grad_scale * (-grad * step * ~inside).sum_to_size(zero_point.shape)
        return dx, dstep, dzero, None, None, None


def _in_float(x: Tensor, step: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    zero = torch.zeros((), dtype=dtype, device=x.device) if zero_point is None else zero_point.to(dtype)
    return x.to(dtype), step.to(dtype), zero


def _codes(x: Tensor, step: Tensor, zero_point: Tensor, qn: int, qp: int) -> tuple[Tensor, Tensor]:
    v = x / step + zero_point.round()
    return v, v.clamp(qn, qp).round()


def _dequantize(x: Tensor, step: Tensor, zero_point: Tensor, qn: int, qp: int) -> Tensor:
    return step * (_codes(x, step, zero_point, qn, qp)[1] - zero_point.round())


def scale_gradient(p: Tensor, scale: float) -> Tensor:
    """p with its gradient multiplied by `scale`; the forward bits are unchanged."""
    scaled = p * scale
    return p.detach() + (scaled - scaled.detach())


class LSQQuantizer(nn.Module):
    """Quantiser with a learned step (and zero point) per tensor, channel or head.

    bits: 2..8. kind: "weight" (signed) or "activation", whose axis 0 is the batch.
    axis, groups: None, 1 = one step; otherwise `groups` steps along that axis: (0, out) for a weight, (-1, C) for
        (B, N, C), (1, C) for (B, C, H, W), (1, H) for heads (B, H, N, D). The axis is never guessed from sizes.
    signed: True, False or "auto" = signed iff the calibration minimum is below -1e-5.
    zero_point: "none"; "integer" as in (Q1), learned as a float and rounded; or "real", an offset zeta in units of x:
        step * round(clip((x - zeta) / step)) + zeta (LSQ+), gradient 1 outside the clip range.
    zp_init: "zero"; "lsqplus" maps the minimum to qn; "official" = 0.1 (min - step * qn), the rule of the released code
        (wrong sign and unit for an integer zero point, kept for reproduction).
    init: "official" = one 2 mean|x| / sqrt(qp) for all groups; "per_group" = the same per group; "max" = the smallest
        step that clips nothing (a softmax map starts far too small with the others).
    grad_scale: s = 1 / sqrt(n qp) with n = all elements including the batch ("official") or the elements that share a
        step, without the batch ("per_group", the definition of LSQ); "none" = 1.

    The first forward in training mode calibrates; with torch.distributed every rank must take part and all get the
    same step. `calibrate` does it explicitly. In evaluation an uncalibrated quantiser raises RuntimeError. The state
    dict holds `step`, `zero_point` (if any) and the flags `calibrated` and `is_signed`. The forward pass raises steps
    below 1e-5 to that value while the gradient still reaches the parameter; `check_steps` reports those at or below 0.
    Keep the parameters out of weight decay, and make copies of the model (a moving average) after calibration."""

    calibrated: Tensor
    is_signed: Tensor

    def __init__(
        self,
        bits: int,
        kind: Literal["weight", "activation"],
        *,
        axis: int | None = None,
        groups: int = 1,
        signed: bool | Literal["auto"] | None = None,
        zero_point: Literal["none", "integer", "real"] = "none",
        zp_init: Literal["zero", "lsqplus", "official"] = "zero",
        init: Literal["official", "per_group", "max"] = "official",
        grad_scale: Literal["official", "per_group", "none"] = "official",
    ):
        super().__init__()
        if not 2 <= bits <= 8:
            raise ValueError(f"bits={bits}: 2 to 8 are possible (one bit: common.quant.binary; 32: no quantiser)")
        if groups < 1 or (axis is None and groups != 1):
            raise ValueError(f"groups={groups} with axis={axis}: give the axis along which the steps differ")
        if kind == "activation" and axis == 0:
            raise ValueError("axis=0 of an activation is its batch: steps cannot differ along it")
        for name, value, allowed in (
            ("kind", kind, ("weight", "activation")),
            ("signed", signed, (None, True, False, "auto")),
            ("zero_point", zero_point, ("none", "integer", "real")),
            ("zp_init", zp_init, ("zero", "lsqplus", "official")),
            ("init", init, ("official", "per_group", "max")),
            ("grad_scale", grad_scale, ("official", "per_group", "none")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: choose from {allowed}")
        self.bits, self.kind, self.axis, self.groups = bits, kind, axis, groups
        self.signed = signed if signed is not None else (True if kind == "weight" else "auto")
        self.zero_point_form, self.zp_init, self.init, self.grad_scale = zero_point, zp_init, init, grad_scale
        self.step = nn.Parameter(torch.ones(groups))
        self.zero_point = nn.Parameter(torch.zeros(groups)) if zero_point != "none" else None
        self.register_buffer("calibrated", torch.tensor(False))
        self.register_buffer("is_signed", torch.tensor(self.signed is not False))
        # Python copies of the two buffers: reading a buffer in every forward would wait for the device.
        self._calibrated, self._signed = False, self.signed is not False
        self._statistics: _Statistics | None = None
        self.moves = 0  # how often the state was moved or cast, which leaves no other trace

    def _apply(self, fn: Any, recurse: bool = True) -> "LSQQuantizer":
        self.moves += 1
        return super()._apply(fn, recurse)

    def _read_flags(self) -> None:
        self._calibrated, self._signed = bool(self.calibrated), bool(self.is_signed)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read_flags()
        if self._calibrated and self.signed not in ("auto", self._signed):
            _, prefix, *_, errors = args
            errors.append(f"{prefix}is_signed is {self._signed} in the checkpoint, the quantiser has {self.signed}")

    @property
    def bounds(self) -> tuple[int, int]:
        """(qn, qp); RuntimeError before calibration if signed="auto"."""
        if self.signed == "auto":
            self._require_calibration()
        return int_bounds(self.bits, self._signed)

    def forward(self, x: Tensor) -> Tensor:
        """x: any shape with `groups` entries along `axis` -> same shape and dtype, on the quantisation grid."""
        self._check_shape(x)
        if self._statistics is not None:
            self._statistics.add(self._grouped(x))
            return x
        if not self._calibrated:
            if self.training and not bool(self.calibrated):
                statistics = _Statistics()
                statistics.add(self._grouped(x))
                self._set_from(statistics)
            else:
                self._require_calibration()
        qn, qp = self.bounds
        scale = self._gradient_scale(x, qp)
        step, zero = self._parameters_for(x)
        if zero is None or self.zero_point_form == "integer":
            return uniform_quantize(x, step, zero, qn, qp, grad_scale=scale)
        zero = scale_gradient(zero, scale)
        centred = x.to(torch.promote_types(x.dtype, zero.dtype)) - zero
        return (uniform_quantize(centred, step, None, qn, qp, grad_scale=scale) + zero).to(x.dtype)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Integer codes q, int32 in qn..qp, same shape as x. The value of a code is step * (q - zero_point), with the
        zero point of `code_of_zero`."""
        self._check_shape(x)
        self._require_calibration()
        step, zero = self._parameters_for(x)
        if zero is not None and self.zero_point_form == "real":
            x, zero = x.to(torch.promote_types(x.dtype, zero.dtype)) - zero, None
        return quantize_codes(x, step, zero, *self.bounds).to(torch.int32)

    def effective_step(self) -> Tensor:
        """The step that the forward pass uses, (groups,): max(step, 1e-5), gradient straight to the parameter."""
        return self.step.clamp(min=MIN_STEP).detach() + (self.step - self.step.detach())

    @torch.no_grad()
    def code_of_zero(self) -> Tensor:
        """(groups,) z in x_hat = step * (q - z): round(zero_point), or -zeta / step, not an integer, for "real"."""
        if self.zero_point is None:
            return torch.zeros_like(self.step)
        if self.zero_point_form == "integer":
            return self.zero_point.round()
        return -self.zero_point / self.effective_step()

    def extra_repr(self) -> str:
        signed = self.signed if not self._calibrated else self._signed
        where = "per tensor" if self.axis is None else f"axis={self.axis}, groups={self.groups}"
        return f"{self.bits} bit, {self.kind}, {where}, signed={signed}, zero_point={self.zero_point_form}"

    def _require_calibration(self) -> None:
        if not self._calibrated:
            self._read_flags()  # the buffers may have been written from outside: DDP broadcast, a moving average
        if not self._calibrated:
            raise RuntimeError(
                f"LSQQuantizer({self.extra_repr()}) has no step yet: run one batch in training mode or under"
                " `calibrate(model)`, or load a calibrated checkpoint"
            )

    def _check_shape(self, x: Tensor) -> None:
        if self.axis is not None:
            if not -x.ndim <= self.axis < x.ndim or x.shape[self.axis] != self.groups:
                raise ValueError(f"input {tuple(x.shape)} has not {self.groups} groups along axis {self.axis}")
            if self.kind == "activation" and self.axis % x.ndim == 0:
                raise ValueError(f"input {tuple(x.shape)}: axis {self.axis} is the batch")
        if not x.is_floating_point():
            raise ValueError(f"input of type {x.dtype}: expected a floating-point tensor")

    def _parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        shape = [1] * x.ndim
        if self.axis is not None:
            shape[self.axis] = self.groups
        zero = None if self.zero_point is None else self.zero_point.view(shape)
        return self.effective_step().view(shape), zero

    def _gradient_scale(self, x: Tensor, qp: int) -> float:
        if self.grad_scale == "none":
            return 1.0
        n = x.numel()
        if self.grad_scale == "per_group":
            n = n // self.groups // (x.shape[0] if self.kind == "activation" else 1)
        return 1 / math.sqrt(max(n, 1) * qp)

    def _grouped(self, x: Tensor) -> Tensor:
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        return x.reshape(1, -1) if self.axis is None else x.movedim(self.axis, 0).reshape(self.groups, -1)

    @torch.no_grad()
    def _set_from(self, statistics: "_Statistics") -> None:
        mean, low, high, minimum = statistics.finish()
        signed = bool(minimum.min() < NEGATIVE) if self.signed == "auto" else bool(self.signed)
        qn, qp = int_bounds(self.bits, signed)
        if statistics.percentile is not None or self.init == "max":
            if self.zero_point is not None and self.zp_init == "lsqplus":
                step = (high - low) / (qp - qn)
            else:
                step = torch.maximum(high / qp, low / qn) if signed else high / qp
        else:
            if self.init == "official":
                mean, low = mean.mean().expand_as(mean), low.min().expand_as(low)
            step = 2 * mean / math.sqrt(qp)
        if bool((step < MIN_STEP).any()):
            dead = int((step < MIN_STEP).sum())
            warnings.warn(
                f"{dead} of {self.groups} steps of a quantiser would start below {MIN_STEP:g}; is its input zero?",
                stacklevel=3,
            )
            step = step.clamp(min=MIN_STEP)
        self.step.copy_(step)
        if self.zero_point is not None:
            zeta = low - step * qn  # in units of x; the same point in units of the codes is -zeta / step
            start = {
                "zero": 0 * zeta,
                "lsqplus": zeta if self.zero_point_form == "real" else -zeta / step,
                "official": 0.1 * zeta,
            }
            self.zero_point.copy_(start[self.zp_init])
        self.calibrated.fill_(True)
        self.is_signed.fill_(signed)
        self._read_flags()


class _Statistics:
    """Running mean|x|, minimum, maximum and, on request, percentiles of the groups of one quantiser, over batches and
    ranks. Percentiles are averaged over batches."""

    def __init__(self, percentile: float | None = None):
        self.percentile = percentile
        self.sums: Tensor | None = None  # rows: |x|, elements, low and high percentile, batches; (5, groups)
        self.extremes = torch.empty(0)  # rows: -min, max; (2, groups)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """x: (groups, elements)."""
        n = x.shape[1]
        if n == 0:
            raise ValueError("a quantiser cannot be calibrated on an empty batch")
        sums = x.new_zeros(5, x.shape[0], dtype=torch.float64)
        sums[0], sums[1], sums[4] = x.abs().sum(1, dtype=torch.float64), n, 1
        if self.percentile is not None:
            k = max(1, math.ceil(self.percentile * n / 100 - 1e-9))  # nearest rank; 99.9 * 1000 / 100 may exceed 999
            sums[2], sums[3] = x.kthvalue(n - k + 1, dim=1).values, x.kthvalue(k, dim=1).values
        extremes = torch.stack([-x.amin(1), x.amax(1)])
        self.extremes = extremes if self.sums is None else torch.maximum(self.extremes, extremes)
        self.sums = sums if self.sums is None else self.sums + sums

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(mean|x|, low, high, minimum), each (groups,); identical on all ranks. ValueError if not finite."""
        assert self.sums is not None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.sums, op=dist.ReduceOp.SUM)
            dist.all_reduce(self.extremes, op=dist.ReduceOp.MAX)
        if not bool(torch.isfinite(self.sums[0]).all()):
            raise ValueError("a quantiser saw NaN or infinite values during calibration")
        total, count, low, high, batches = self.sums
        minimum, maximum = -self.extremes[0], self.extremes[1]
        dtype = minimum.dtype
        if self.percentile is None:
            return (total / count).to(dtype), minimum, maximum, minimum
        return (total / count).to(dtype), (low / batches).to(dtype), (high / batches).to(dtype), minimum


@contextmanager
def calibrate(model: nn.Module, *, percentile: float | None = None) -> Iterator[None]:
    """Set all steps of `model` from the batches that run inside the block, in training or evaluation mode.

        with calibrate(model, percentile=99.99), torch.no_grad():
            for images in loader:
                model(images)

    Inside, quantisers pass their input on unquantised and collect. At the end those that saw data get their step, from
    their own `init` rule or, with `percentile` in (50, 100], from the range between the (100 - p)-th and p-th
    percentile (mean over batches; post-training quantisation). Nothing changes if the block raises.
    Under torch.distributed all ranks must run it, each with at least one batch."""
    if percentile is not None and not 50 < percentile <= 100:
        raise ValueError(f"percentile={percentile}: must lie in (50, 100]")
    quantizers = [m for m in model.modules() if isinstance(m, LSQQuantizer)]
    if not quantizers:
        raise ValueError("the model has no LSQQuantizer to calibrate")
    for q in quantizers:
        q._statistics = _Statistics(percentile)
    try:
        yield
        statistics = [q._statistics for q in quantizers]
    finally:
        for q in quantizers:
            q._statistics = None
    seen = [(q, s) for q, s in zip(quantizers, statistics, strict=True) if s is not None and s.sums is not None]
    if not seen:
        raise ValueError("no quantiser saw a batch during calibration")
    for q, s in seen:
        q._set_from(s)


def check_steps(model: nn.Module) -> None:
    """ValueError naming the calibrated quantisers whose step is not finite and positive, or whose zero point is not
    finite. Call it once per epoch: it waits for the device."""
    bad = []
    for name, m in model.named_modules():
        if not isinstance(m, LSQQuantizer) or not bool(m.calibrated):
            continue
        wrong = ~(torch.isfinite(m.step) & (m.step > 0))
        if m.zero_point is not None:
            wrong |= ~torch.isfinite(m.zero_point)
        if bool(wrong.any()):
            i = int(wrong.nonzero()[0])
            zero = "" if m.zero_point is None else f", zero point {m.zero_point[i].item():g}"
            bad.append(f"{name or 'model'}[{i}] has step {m.step[i].item():g}{zero}")
    if bad:
        raise ValueError(
            f"unusable steps in {len(bad)} quantiser(s): {'; '.join(bad[:5])}. Lower the learning rate of the steps."
        )
