"""Products of integer codes in float32: exact, and without coding a weight again that has not changed.

    product = exact_linear(centred_codes(inputs, x), weight_codes(layer, weights, layer.weight), reach(inputs) * reach(weights))

Float32 adds integers without rounding up to 2^24. A sum that could go beyond is split into parts that cannot; the parts are
added last, so that the result is the exact sum, rounded once.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.quant.lsq import LSQQuantizer

LARGEST = 2**24  # integers up to here, and their sums, are exact in float32
_memory: "weakref.WeakKeyDictionary[nn.Module, dict[str, Any]]" = weakref.WeakKeyDictionary()


def centred_codes(quantizer: LSQQuantizer, x: Tensor) -> Tensor:
    """c = clip(round(x / step), qn - z, qp - z): integers as float32, same shape as x; x is about step * c.

    Rounds before the zero point is added, as ONNX QuantizeLinear does. The fake-quantised form of training rounds after,
    which differs only where x / step lies exactly between two integers and z is odd."""
    step, low, high = remembered(quantizer, "grid", quantizer, (), lambda: _grid(quantizer))
    shape = [1] * x.ndim
    if quantizer.groups > 1:
        shape[quantizer.axis] = quantizer.groups  # pyright: ignore[reportArgumentType, reportCallIssue]
        low, high = low.view(shape), high.view(shape)
    v = (x.float() / step.view(shape)).round_()
    return v.clamp(low, high) if v.requires_grad else v.clamp_(low, high)


def _grid(quantizer: LSQQuantizer) -> tuple[Tensor, Any, Any]:
    (qn, qp), z, step = quantizer.bounds, quantizer.code_of_zero(), quantizer.effective_step().detach()
    if quantizer.groups > 1 or torch.compiler.is_compiling():
        return step, qn - z, qp - z
    return step, qn - z.item(), qp - z.item()


def weight_codes(layer: nn.Module, quantizer: LSQQuantizer, weight: Tensor) -> Tensor:
    """`centred_codes` of the weight of a layer, kept until the weight, its steps or their device change."""
    return remembered(layer, "weight", quantizer, (weight,), lambda: centred_codes(quantizer, weight.detach()))


def reach(quantizer: LSQQuantizer) -> float:
    """The largest |c| that a quantiser can give."""
    return remembered(quantizer, "reach", quantizer, (), lambda: _reach(quantizer))


def _reach(quantizer: LSQQuantizer) -> float:
    if torch.compiler.is_compiling():  # no value can be read: a bound for zero points within the codes
        return 2.0 ** (quantizer.bits + 1)
    (qn, qp), z = quantizer.bounds, quantizer.code_of_zero()
    return float(torch.maximum((qn - z).abs(), (qp - z).abs()).max())


def remembered(
    owner: nn.Module, name: str, quantizer: LSQQuantizer, tensors: tuple[Tensor, ...], make: Callable[[], Any]
) -> Any:
    """make(), or what it gave before if the state of the quantiser and `tensors` are the same objects in the same version.

    Not kept of tensors without a version (made in inference mode). What is written through `.data` is not seen."""
    tensors = (*tensors, quantizer.step, *(() if quantizer.zero_point is None else (quantizer.zero_point,)))
    if torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):
        return make()
    known = _memory.setdefault(owner, {}).get(name)
    places = quantizer.moves, tuple((t._version, t.data_ptr()) for t in tensors)
    if known is None or known[1] != places or any(ref() is not t for ref, t in zip(known[0], tensors, strict=True)):
        with torch.inference_mode(False), torch.no_grad():
            known = tuple(weakref.ref(t) for t in tensors), places, make()
        _memory[owner][name] = known
    return known[2]


def scaled(y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y scale + bias, in the memory of y where no gradient is wanted."""
    if torch.is_grad_enabled():
        return y * scale if bias is None else y * scale + bias
    return y.mul_(scale) if bias is None else y.mul_(scale).add_(bias)


def exact_linear(x: Tensor, weight: Tensor, largest: float) -> Tensor:
    """x (..., M, K) weight^T (..., N, K) in float32, both integers in float32, |x_k weight_k| <= largest: the exact sums, rounded
    once to float32."""
    terms, least = x.shape[-1], int(LARGEST // max(largest, 1))
    product = F.linear if weight.ndim == 2 else lambda a, b: a @ b.mT
    if terms <= least:
        return product(x, weight)
    if not least:
        return product(x.double(), weight.double()).float()
    parts = -(-terms // least)
    pieces = zip(x.tensor_split(parts, -1), weight.tensor_split(parts, -1), strict=True)
    if parts == 2:  # one addition rounds once
        first, second = (product(a, b) for a, b in pieces)
        return first + second
    return sum(product(a, b).double() for a, b in pieces).float()  # pyright: ignore[reportAttributeAccessIssue]
