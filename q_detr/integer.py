"""A student whose products run on 8-bit integers: the operators of ONNX in place of quantised layers and attention products.

integers_(student)                  # in place; export.py format=integer writes it
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.quant.binary import RPReLU
from common.quant.integer_onnx import IntegerConv2d, IntegerLinear, Operand, integer_product
from common.quant.lsq import LSQQuantizer
from q_detr.detr import Attention
from q_detr.integer_backbone import FEW, Bend, integer_stages_
from q_detr.quantized_detr import QuantConv2d, QuantLinear


def why_not_integer(model: nn.Module) -> str | None:
    """Why the products of a network cannot run on integers, in one line; None where they can."""
    inputs = {n: m for n, m in model.named_modules() if _is_input(n) and isinstance(m, LSQQuantizer)}
    if not inputs:
        return "no product has two quantised operands (bits=32): there is nothing to compute in integers"
    if real := [n for n, m in inputs.items() if m.zero_point_form == "real"]:
        return (
            f"{len(real)} inputs, {real[0]} first, have a real offset, which is no code (method.quant.quantizer=lsqplus): "
            "train with quantizer=lsq or released, or export format=qdq"
        )
    # steps of heads (quant_q, ...) do not lie inside a sum; act_quant and input_q, ... do
    if inside := [n for n, m in inputs.items() if m.groups > 1 and not n.rpartition(".")[2].startswith("quant_")]:
        return (
            f"{len(inside)} inputs, {inside[0]} first, have a step per channel, inside the sum of the product "
            "(method.quant.act_granularity=per_channel): train with per_tensor, or export format=qdq"
        )
    return None


def _is_input(name: str) -> bool:
    """Of a layer (act_quant, input_q, ...), or an operand of attention (quant_q, ...)."""
    return name.rpartition(".")[2] in ("act_quant", *(f"{kind}_{x}" for kind in ("input", "quant") for x in "qkva"))


class IntegerAttention(nn.Module):
    """`Attention` in evaluation with its projections and both products on integers; an operand without a quantiser stays float.

    Takes and gives what `q_detr.detr.Attention` does."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.dim, self.heads, self.align = attention.dim, attention.heads, attention.align
        self.out_proj = _layer(attention.out_proj)
        self.project = nn.ModuleList(_projection(attention, i) for i in range(3))
        for name, left in (("q", True), ("k", False), ("a", True), ("v", False)):
            quantizer = getattr(attention, f"quant_{name}")
            whole = isinstance(quantizer, LSQQuantizer)
            setattr(self, name, Operand(quantizer, left=left) if whole else quantizer)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (
            p(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for p, x in zip(self.project, (query, key, value), strict=True)
        )
        scores = _product(self.align(q), k, self.q, self.k, (self.dim // self.heads) ** -0.5)
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None], -torch.inf)
        if bias is not None:
            scores = scores + bias
        d = _product(scores.softmax(-1), v.mT, self.a, self.v, 1.0).transpose(1, 2).flatten(2)
        return self.out_proj(d), d


def _product(a: Tensor, b: Tensor, left: Any, right: Any, factor: float) -> Tensor:
    """factor Q(a) Q(b)^T per head: (B, H, M, K), (B, H, N, K) -> (B, H, M, N)."""
    if isinstance(left, Operand) and isinstance(right, Operand):
        return integer_product(left(a), right(b).mT, left, right, (left.step * right.step * factor).view(-1, 1, 1))
    return left(a) @ right(b).mT * factor


def _projection(attention: Attention, i: int) -> nn.Module:
    """Of query, key or value: the i-th part of the projection in common, which has a step per output."""
    quantizer, operand = attention.in_proj_quant, getattr(attention, f"input_{'qkv'[i]}")
    rows = slice(i * attention.dim, (i + 1) * attention.dim)
    if isinstance(quantizer, LSQQuantizer) and isinstance(operand, LSQQuantizer):
        whole = IntegerLinear(Operand(operand, left=True), quantizer, attention.in_proj_weight, attention.in_proj_bias)
        whole.weight, whole.scale = whole.weight[:, rows].contiguous(), whole.scale[rows].clone()
        whole.bias = None if whole.bias is None else whole.bias[rows].clone()
        return whole
    return _FloatLinear(operand, quantizer(attention.in_proj_weight)[rows], attention.in_proj_bias[rows])


class _FloatLinear(nn.Module):
    """Real products with a weight on its grid, for an input that has no step (the first content of the decoder is 0)."""

    def __init__(self, operand: nn.Module, weight: Tensor, bias: Tensor):
        super().__init__()
        self.operand = operand
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.operand(x), self.weight, self.bias)  # type: ignore[arg-type]


def _layer(m: nn.Module) -> nn.Module:
    """A quantised layer on integers; any other as it is, as is the convolution of an image, which integers do not speed up."""
    if isinstance(m, nn.Conv2d) and m.in_channels <= FEW:
        return m
    operand, quantizer = getattr(m, "act_quant", None), getattr(m, "weight_quant", None)
    if not (isinstance(operand, LSQQuantizer) and isinstance(quantizer, LSQQuantizer)):
        return m
    if isinstance(m, QuantConv2d):
        return IntegerConv2d(Operand(operand, left=True), quantizer, m)
    assert isinstance(m, QuantLinear)
    return IntegerLinear(Operand(operand, left=True), quantizer, m.weight, m.bias)


@torch.no_grad()
def integers_(model: nn.Module) -> int:
    """Replaces the quantised layers and attentions of a calibrated student in evaluation; returns how many products run on
    integers. ValueError with the reason where they cannot."""
    if (reason := why_not_integer(model)) is not None:
        raise ValueError(reason)
    integer_stages_(model.backbone[0].body)  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
    for parent in list(model.modules()):
        for name, m in list(parent.named_children()):
            if isinstance(m, Attention):
                setattr(parent, name, IntegerAttention(m))
            elif isinstance(m, QuantLinear | QuantConv2d):
                setattr(parent, name, _layer(m))
            elif isinstance(m, RPReLU | nn.PReLU):
                setattr(parent, name, Bend(m, axis=1))
    found = list(model.modules())
    layers = sum(isinstance(m, IntegerLinear | IntegerConv2d) for m in found)
    pairs = [(a.q, a.k) for a in found if isinstance(a, IntegerAttention)] + [
        (a.a, a.v) for a in found if isinstance(a, IntegerAttention)
    ]
    return layers + sum(isinstance(one, Operand) and isinstance(other, Operand) for one, other in pairs)
