"""Packed files of this folder's networks: which weights, and `common.quant.packed_weights` with them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from common.quant import packed_weights
from common.quant.lsq import LSQQuantizer


def quantised_weights(model: nn.Module) -> dict[str, tuple[Any, LSQQuantizer]]:
    """{name of the weight: (its layer, its quantiser)}."""
    layers = ((n, m, getattr(m, "weight_quantizer", None)) for n, m in model.named_modules())
    return {f"{n}.weight": (m, q) for n, m, q in layers if isinstance(q, LSQQuantizer)}


def pack(model: nn.Module) -> dict[str, Any]:
    """What export.py saves of a calibrated network, see `common.quant.packed_weights.pack`."""
    return packed_weights.pack(model, _weights(model))


def unpack(model: nn.Module, file: Mapping[str, Any]) -> nn.Module:
    """`model` (of the architecture, any weights) with the weights of a packed file: the network that was packed, bit for bit."""
    return packed_weights.unpack(model, _weights(model), file)


def _weights(model: nn.Module) -> packed_weights.Weights:
    return {n: (m.weight, q) for n, (m, q) in quantised_weights(model).items()}
