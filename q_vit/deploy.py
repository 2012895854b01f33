"""A quantised network with the integer operators of ONNX in place of its quantisers.

deployed = deploy(student)          # runs in torch as before; export.py writes it
"""

import copy
from typing import Any

import torch
from torch import nn

from common.quant.integer_onnx import FORMATS, QDQ, IntegerConv2d, IntegerLinear, Operand, StoredWeight
from common.quant.lsq import LSQQuantizer
from q_vit.quantized_vit import QuantConv2d, QuantLinear


def why_not_integer(model: nn.Module) -> str | None:
    """Why no product of a network, or not every one that should, can run on integers, in one line; None where they can."""
    inputs = {n: m.input_quantizer for n, m in model.named_modules() if isinstance(m, QuantLinear | QuantConv2d)}
    whole = {n: q for n, q in inputs.items() if isinstance(q, LSQQuantizer)}
    if inside := [n for n, q in whole.items() if q.groups > 1]:
        return (
            f"{len(inside)} layers, {inside[0]} first, have a step per input channel, inside the sum of the product "
            "(method.quant.preset=official): train with preset=deployable, or export format=qdq"
        )
    products = [m for m in model.modules() if isinstance(getattr(m, "q_quantizer", None), LSQQuantizer)]
    if not whole and not products:
        return (
            "no product has two quantised operands (bits=32, or weights alone): there is nothing to compute in integers"
        )
    return None


@torch.no_grad()
def deploy(model: nn.Module, form: str = "integer") -> nn.Module:
    """A copy of a calibrated network in evaluation, whose quantisers are operators of ONNX.

    form: "integer" (products on integers wherever both operands are quantised) or "qdq" (quantise, dequantise, float products:
    every preset). A layer that is not quantised stays float. ValueError with the reason where "integer" cannot be."""
    if form not in FORMATS:
        raise ValueError(f"format={form!r}, allowed: {', '.join(FORMATS)}")
    if form == "integer" and (reason := why_not_integer(model)):
        raise ValueError(reason)
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        for name, m in list(parent.named_children()):
            if isinstance(m, QuantLinear | QuantConv2d):
                setattr(parent, name, _layer(m, form))
            elif isinstance(m, LSQQuantizer) and name in ("q_quantizer", "k_quantizer", "v_quantizer", "p_quantizer"):
                left = name in ("q_quantizer", "p_quantizer")
                setattr(parent, name, Operand(m, left=left) if form == "integer" else QDQ(m))
    return model


def _layer(m: Any, form: str) -> nn.Module:
    a, w = m.input_quantizer, m.weight_quantizer
    if form == "integer" and isinstance(a, LSQQuantizer):
        operand = Operand(a, left=True)
        return IntegerConv2d(operand, w, m) if isinstance(m, nn.Conv2d) else IntegerLinear(operand, w, m.weight, m.bias)
    m.input_quantizer = QDQ(a) if isinstance(a, LSQQuantizer) else a
    m.weight_quantizer = StoredWeight(m.weight, w, as_node=isinstance(a, LSQQuantizer) and m.input_quantizer.as_nodes)
    m.integer = False
    return m
