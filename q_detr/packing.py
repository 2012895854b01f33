"""Packed files of this folder's networks: which weights, and `common.quant.packed_weights` with them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from common.quant import packed_weights
from common.quant.lsq import LSQQuantizer
from q_detr.detr import DETR


def quantised_weights(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter, LSQQuantizer]]:
    """{name of the weight: (its layer, the weight, its quantiser)}."""
    found = {}
    for name, m in model.named_modules():
        for weight, quantizer in (("weight", "weight_quant"), ("in_proj_weight", "in_proj_quant")):
            if isinstance(q := getattr(m, quantizer, None), LSQQuantizer):
                found[f"{name}.{weight}"] = (m, getattr(m, weight), q)
    return found


def pack(model: nn.Module) -> dict[str, Any]:
    """What export.py saves of a calibrated student, see `common.quant.packed_weights.pack`."""
    return packed_weights.pack(model, _weights(model))


def unpack(model: DETR, file: Mapping[str, Any]) -> DETR:
    """`model` (of the architecture, any weights) with the weights of a packed file: the network that was packed, bit for bit."""
    packed_weights.unpack(model, _weights(model), file)
    return model


def _weights(model: nn.Module) -> packed_weights.Weights:
    return {n: (weight, q) for n, (_, weight, q) in quantised_weights(model).items()}
