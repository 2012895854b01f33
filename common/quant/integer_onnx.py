"""Quantised layers in the integer operators of ONNX: QuantizeLinear, MatMulInteger, ConvInteger, DequantizeLinear.

    layer = IntegerLinear(operand, weight_quantizer, weight, bias)      # operand = Operand(input_quantizer, left=True)
    torch.onnx.export(network, ..., custom_translation_table=translations())

A quantiser with step a and code of zero z becomes codes u = clip(round(x / a) + zero), of which centred ones are c = u - zero:
unsigned 8 bit for the left operand of a product, signed for the right one (the order for which x86 has instructions), from the
least code of the type on, so that the type itself clips below and a Clip above where there are fewer than 8 bits. What follows
the product of integers (one scale per output or head, bias) is float32. The same modules run in torch, with the same codes.

8 bits on an x86 CPU without VNNI: onnxruntime's sums of two products saturate there; give it the session entry
`session.x64quantprecision` = "1". Below 8 bits they cannot.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.quant.lsq import LSQQuantizer

FORMATS = ("integer", "qdq")


# PyTorch's own quantised operators do not export as these nodes, so the exporter is told what these become.
@torch.library.custom_op("integer_onnx::quantize", mutates_args=())
def quantize(x: Tensor, step: Tensor, zero: Tensor, axis: int) -> Tensor:
    """QuantizeLinear: codes of the type of `zero`, clip(round(x / step) + zero). step, zero: () or (groups,) along `axis`."""
    shape, bounds = along(axis, step, x), torch.iinfo(zero.dtype)
    codes = (x / step.view(shape)).round() + zero.view(shape)
    return codes.clamp(bounds.min, bounds.max).to(zero.dtype)


@torch.library.custom_op("integer_onnx::dequantize", mutates_args=())
def dequantize(codes: Tensor, step: Tensor, zero: Tensor, axis: int) -> Tensor:
    """DequantizeLinear: step (codes - zero)."""
    shape = along(axis, step, codes)
    return step.view(shape) * (codes.to(step.dtype) - zero.view(shape))


@torch.library.custom_op("integer_onnx::matmul", mutates_args=())
def matmul(a: Tensor, b: Tensor, a_zero: Tensor, b_zero: Tensor) -> Tensor:
    """MatMulInteger: (a - a_zero) (b - b_zero) in int32. a (..., M, K) uint8, b (..., K, N) int8, zeros ()."""
    return ((a.double() - a_zero) @ (b.double() - b_zero)).to(torch.int32)


@torch.library.custom_op("integer_onnx::scaled_matmul", mutates_args=())
def scaled_matmul(a: Tensor, b: Tensor, a_zero: Tensor, b_zero: Tensor, scale: Tensor) -> Tensor:
    """scale_n `matmul`(a, b)_n in the type of scale (N,)."""
    return matmul(a, b, a_zero, b_zero).to(scale.dtype) * scale


@torch.library.custom_op("integer_onnx::conv", mutates_args=())
def conv(
    x: Tensor, w: Tensor, zero: Tensor, strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int], group: int
) -> Tensor:  # fmt: skip
    """ConvInteger: convolution of x (B, C, H, W) uint8 minus its zero with w (O, C / group, kh, kw) int8, int32. Pads (top, left,
    bottom, right) are zeros of x - zero."""
    top, left, bottom, right = pads
    padded = F.pad(x.double() - zero, (left, right, top, bottom))
    return F.conv2d(padded, w.double(), None, strides, 0, dilations, group).to(torch.int32)


@quantize.register_fake
def _(x: Tensor, step: Tensor, zero: Tensor, axis: int) -> Tensor:
    return torch.empty_like(x, dtype=zero.dtype)


@dequantize.register_fake
def _(codes: Tensor, step: Tensor, zero: Tensor, axis: int) -> Tensor:
    return torch.empty_like(codes, dtype=step.dtype)


@matmul.register_fake
def _(a: Tensor, b: Tensor, a_zero: Tensor, b_zero: Tensor) -> Tensor:
    shape = (*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    return a.new_empty(shape, dtype=torch.int32)


@scaled_matmul.register_fake
def _(a: Tensor, b: Tensor, a_zero: Tensor, b_zero: Tensor, scale: Tensor) -> Tensor:
    return scale.new_empty((*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]))


@conv.register_fake
def _(
    x: Tensor, w: Tensor, zero: Tensor, strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int], group: int
) -> Tensor:  # fmt: skip
    around = (pads[0] + pads[2], pads[1] + pads[3])
    size = [
        (n + p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], around, dilations, w.shape[2:], strides, strict=True)
    ]
    return x.new_empty((x.shape[0], w.shape[0], *size), dtype=torch.int32)


def along(axis: int, step: Tensor, x: Tensor) -> list[int]:
    """The shape in which step, () or (groups,), stands along `axis` of x."""
    return [-1 if step.ndim and i == axis else 1 for i in range(x.ndim)]


def translations() -> dict[Any, Any]:
    """What torch.onnx.export (dynamo, opset 18) must know, its `custom_translation_table`."""
    from onnxscript import opset18

    op: Any = opset18

    def scaled(a: Any, b: Any, a_zero: Any, b_zero: Any, scale: Any) -> Any:
        # onnxruntime computes the product, the scale and a bias behind it in one pass, twice as fast, if the scale is a product
        # that it finds when the graph runs: hence a 1, the sign of the size of the batch
        one = op.Cast(op.Sign(op.Shape(a, start=0, end=1)), to=1)
        return op.Mul(op.Cast(op.MatMulInteger(a, b, a_zero, b_zero), to=1), op.Mul(one, scale))

    ops = torch.ops.integer_onnx
    return {
        ops.quantize.default: lambda x, step, zero, axis: op.QuantizeLinear(x, step, zero, axis=axis),
        ops.dequantize.default: lambda codes, step, zero, axis: op.DequantizeLinear(codes, step, zero, axis=axis),
        ops.matmul.default: lambda a, b, a_zero, b_zero: op.MatMulInteger(a, b, a_zero, b_zero),
        ops.scaled_matmul.default: scaled,
        ops.conv.default: lambda x, w, zero, strides, pads, dilations, group: op.ConvInteger(
            x, w, zero, strides=list(strides), pads=list(pads), dilations=list(dilations), group=group
        ),
    }


class Operand(nn.Module):
    """x -> integer codes of a calibrated `LSQQuantizer` of activations (B, ...), uint8 (left) or int8; centred ones are
    code - shift.

    `step`, `shift` (int32): (groups,), of one group (). Rounds before the zero is added, as ONNX does. A zero outside of the type
    (training can leave it there) has no QuantizeLinear: division, rounding, clip and cast do the same, `inside` is False.
    ValueError for an offset that is no code (zero_point="real")."""

    step: Tensor
    shift: Tensor
    zero: Tensor

    def __init__(self, quantizer: LSQQuantizer, *, left: bool):
        super().__init__()
        if quantizer.zero_point_form == "real":
            raise ValueError("an offset in units of x has no integer code: use quantisers with an integer zero point")
        self.dtype = torch.uint8 if left else torch.int8
        kind, (lowest, highest) = torch.iinfo(self.dtype), quantizer.bounds
        shift = (kind.min - lowest + quantizer.code_of_zero()).to(torch.int32)
        self.inside = bool(((shift >= kind.min) & (shift <= kind.max)).all())
        self.one_zero = self.inside and bool((shift == shift[0]).all())
        self.axis, self.groups, self.left = quantizer.axis, quantizer.groups, left
        self.first, self.last = kind.min, kind.min + highest - lowest
        self.clips = self.last < kind.max
        shape = () if quantizer.axis is None else (quantizer.groups,)
        for name, t in (
            ("step", quantizer.effective_step().detach().clone()), ("shift", shift),
            ("zero", (shift if self.inside else 0 * shift).to(self.dtype)),
        ):  # fmt: skip
            self.register_buffer(name, t.view(shape))

    def none(self) -> Tensor:
        """The zero of codes that are not shifted, ()."""
        return torch.zeros((), dtype=self.dtype)

    def product_zero(self) -> Tensor:
        """The zero that a product takes off by itself, (): that of all groups, or none."""
        return self.zero.flatten()[0] if self.one_zero else self.none()

    def forward(self, x: Tensor) -> Tensor:
        if not self.inside:
            shape = self._shape(x)
            codes = (x / self.step.view(shape)).round() + self.shift.float().view(shape)
            return codes.clamp(self.first, self.last).to(self.dtype)
        codes = quantize(x, self.step, self.zero, 0 if self.axis is None else self.axis % x.ndim)
        return codes.clamp(max=self.last) if self.clips else codes

    def dequantized(self, x: Tensor) -> Tensor:
        """x on its grid through codes: QuantizeLinear, Clip, DequantizeLinear."""
        if self.groups == 1 and self.inside:
            return dequantize(self(x), self.step, self.zero, 0)
        # onnxruntime takes DequantizeLinear and the product behind it for one operator, which has no steps along an axis
        shape = self._shape(x)
        return self.step.view(shape) * (self(x).float() - self.shift.float().view(shape))

    def _shape(self, x: Tensor) -> list[int]:
        return along(-1 if self.axis is None else self.axis % x.ndim, self.step, x)


class QDQ(nn.Module):
    """An `Operand` that gives real values again, in place of a quantiser of activations."""

    def __init__(self, quantizer: LSQQuantizer):
        super().__init__()
        self.operand = Operand(quantizer, left=True)
        self.as_nodes = self.operand.groups == 1 and self.operand.inside  # QuantizeLinear and DequantizeLinear

    def forward(self, x: Tensor) -> Tensor:
        return self.operand.dequantized(x)


def integer_product(a: Tensor, b: Tensor, left: Operand, right: Operand, scale: Tensor) -> Tensor:
    """scale sum_k (a - shift) (b - shift) of codes a (B, H, M, K), b (B, H, K, N), float32; scale broadcasts, one per head.

    Heads with zeros of their own: the sums of rows and columns are products with ones, and go off afterwards."""
    a_zero, b_zero, k = left.product_zero(), right.product_zero(), a.shape[-1]
    found = matmul(a, b, a_zero, b_zero)
    mine, other = left.shift.view(-1, 1, 1), right.shift.view(-1, 1, 1)
    if not left.one_zero:  # shift_a sum_k (b - b_zero)
        found = found - mine * matmul(torch.ones(1, k, dtype=torch.uint8), b, left.none(), b_zero)
    if not right.one_zero:  # shift_b sum_k (a - shift_a)
        rows = matmul(a, torch.ones(k, 1, dtype=torch.int8), a_zero, right.none())
        found = found - other * (rows if left.one_zero else rows - k * mine)
    return found.float() * scale


def _affine(operand: Operand, codes: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """scale_o sum_i (codes_i - shift) weight_{i,o} + bias_o: codes (..., in), weight (in, out) int8, one step of codes."""
    none = torch.zeros((), dtype=torch.int8)
    if operand.inside:
        y = scaled_matmul(codes, weight, operand.product_zero(), none, scale)
    else:
        sums = matmul(codes, weight, operand.none(), none) - operand.shift * weight.sum(0, dtype=torch.int32)
        y = sums.to(scale.dtype) * scale
    return y if bias is None else y + bias


class IntegerLinear(nn.Module):
    """x (..., in) -> scale_o sum_i c^x_i c^w_{o,i} + bias_o, (..., out).

    operand: of x, one step; weight (out, in) with its quantiser, a step per output. The weight is stored transposed, int8."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    @torch.no_grad()
    def __init__(self, operand: Operand, quantizer: LSQQuantizer, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.operand, self.bits = _one_step(operand), quantizer.bits
        self.register_buffer("weight", quantizer.codes(weight).t().contiguous().to(torch.int8))
        self.register_buffer("scale", operand.step * quantizer.effective_step())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return _affine(self.operand, self.operand(x), self.weight, self.scale, self.bias)


class IntegerConv2d(nn.Module):
    """The same for a convolution with zero padding: (B, in, H, W) -> (B, out, H', W').

    A MatMulInteger of pixels with the window of each side by side, channels last: two to three times as fast as float32 in
    onnxruntime where there are many channels. With groups it is ConvInteger, which is several times slower than float32."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    @torch.no_grad()
    def __init__(self, operand: Operand, quantizer: LSQQuantizer, layer: nn.Conv2d):
        super().__init__()
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise ValueError(f"padding {layer.padding!r} of mode {layer.padding_mode}: only zeros in numbers")
        padded = any(layer.padding)
        if not operand.inside and (padded or layer.groups > 1):
            raise ValueError("the code of zero lies outside of 8 bits: nothing to pad with")
        self.operand, self.bits = _one_step(operand), quantizer.bits
        self.kernel, self.strides, self.dilations = layer.kernel_size, list(layer.stride), list(layer.dilation)
        self.pads, self.groups = [*layer.padding, *layer.padding], layer.groups
        self.blank = int(operand.shift)  # the code of zero
        self.patches = (
            list(self.kernel) == self.strides != [1, 1] and not padded and self.dilations == [1, 1] and self.groups == 1
        )
        codes, per_output = quantizer.codes(layer.weight).to(torch.int8), (1, -1, 1, 1) if self.groups > 1 else (-1,)
        order = (1, 2, 3, 0) if self.patches else (2, 3, 1, 0)
        flat = codes.permute(order).reshape(-1, layer.out_channels).contiguous()
        self.register_buffer("weight", codes if self.groups > 1 else flat)
        self.register_buffer("scale", (operand.step * quantizer.effective_step()).view(per_output))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone().view(per_output))

    def forward(self, x: Tensor) -> Tensor:
        if self.groups > 1:
            codes, where = self.operand(x), (self.strides, self.pads, self.dilations, self.groups)
            y = conv(codes, self.weight, self.operand.zero, *where).to(self.scale.dtype) * self.scale
            return y if self.bias is None else y + self.bias
        if self.patches:
            return self._product(self._patches(self.operand(x))).permute(0, 3, 1, 2).contiguous()
        return self.channels_last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()

    def channels_last(self, x: Tensor) -> Tensor:
        """The same from (B, H, W, in) to (B, H', W', out). ValueError with groups."""
        if self.groups > 1:
            raise ValueError(f"groups={self.groups}: ConvInteger has the channels first")
        if self.patches:
            return self._product(self._patches(self.operand(x).permute(0, 3, 1, 2)))
        return self._product(self._windows(self.operand(x)))

    @torch.no_grad()
    def absorb_(self, scale: Tensor, shift: Tensor) -> "IntegerConv2d":
        """Takes scale y + shift, (out,) each, into its own scale and bias: rounded once, from float64."""
        a, b = (t.detach().double().view_as(self.scale) for t in (scale, shift))
        bias = torch.zeros_like(b) if self.bias is None else self.bias.double()
        self.scale, self.bias = (t.to(self.scale.dtype) for t in (self.scale.double() * a, bias * a + b))
        return self

    def _product(self, windows: Tensor) -> Tensor:
        return _affine(self.operand, windows, self.weight, self.scale, self.bias)

    def _patches(self, codes: Tensor) -> Tensor:
        """(B, H', W', channels x window) of windows that lie side by side, a view but for one copy."""
        (high, wide), channels = self.kernel, codes.shape[1]
        rows, columns = codes.shape[2] // high, codes.shape[3] // wide
        split = codes[:, :, : rows * high, : columns * wide].reshape(-1, channels, rows, high, columns, wide)
        return split.permute(0, 2, 4, 1, 3, 5).flatten(3)

    def _windows(self, last: Tensor) -> Tensor:
        """(B, H, W, channels) -> (B, H', W', window x channels)."""
        top, left, bottom, right = self.pads
        if any(self.pads):
            last = F.pad(last, (0, 0, left, right, top, bottom), value=self.blank)
        taps = []
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                # all taps have the same length; a stop counted from the end needs no knowledge of the size when it is traced
                rows, columns = (
                    slice(o * d, n - (k - 1 - o) * d, s)
                    for o, d, s, n, k in zip(
                        (i, j), self.dilations, self.strides, last.shape[1:3], self.kernel, strict=True
                    )
                )
                taps.append(last[:, rows, columns])
        return taps[0] if len(taps) == 1 else torch.cat(taps, -1)


class StoredWeight(nn.Module):
    """A weight as int8 codes times a step per output, whatever the argument is: in place of its quantiser.

    as_node: all of it in DequantizeLinear, for a layer whose input has one; otherwise the steps in a Mul, because onnxruntime
    takes DequantizeLinear right in front of a product with a float operand as leave to quantise that operand to 8 bits."""

    codes: Tensor
    step: Tensor

    @torch.no_grad()
    def __init__(self, weight: Tensor, quantizer: LSQQuantizer, *, as_node: bool):
        super().__init__()
        self.bits, self.as_node = quantizer.bits, as_node
        self.register_buffer("codes", quantizer.codes(weight).to(torch.int8))
        self.register_buffer("step", quantizer.effective_step().detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        if self.as_node:
            return dequantize(self.codes, self.step, torch.zeros_like(self.step, dtype=torch.int8), 0)
        codes = dequantize(self.codes, torch.ones(()), torch.zeros((), dtype=torch.int8), 0)
        return codes * self.step.view(-1, *[1] * (self.codes.ndim - 1))


def _one_step(operand: Operand) -> Operand:
    if operand.groups != 1:
        raise ValueError(f"{operand.groups} steps along the axis that a layer sums over: they cannot leave its product")
    return operand
