"""Multiply-accumulates, OPs and sizes of DETR and its students under the convention of the paper (Table 3)."""

import copy
import re
from collections.abc import Mapping

import torch

from common.metrics.ops import LayerOps, count_macs, ops_halving, parameter_bits
from q_detr.detr import DETR
from q_detr.quantized_detr import QuantConv2d, QuantLinear, quantize_detr

REAL = ("conv1", "input_proj", "heads")  # real-valued in the paper's OPs
KINDS = {  # pattern of the module: the group of its own products
    r"backbone\.0\.body\.conv1": "conv1",
    r"backbone\..*\.downsample\.": "downsample",
    r"backbone\.": "backbone",
    r"input_proj": "input_proj",
    r"(class|bbox)_embed": "heads",
    r".*encoder.*\.self_attn": "enc_proj",
    r".*encoder.*\.linear": "enc_ffn",
    r".*decoder.*\.self_attn": "dec_self_proj",
    r".*decoder.*\.multihead_attn": "dec_cross_proj",
    r".*decoder.*\.linear": "dec_ffn",
}


def meta_detr(backbone: str = "resnet50", num_classes: int = 91, cls: type[DETR] = DETR) -> DETR:
    """A model of the paper's shapes without memory."""
    with torch.device("meta"):
        return cls(num_classes=num_classes, backbone=backbone).eval()


def mac_table(model: DETR, height: int, width: int) -> dict[str, int]:
    """MACs of one image by group. Attention products ("..._attention") stand apart from the projections ("..._proj"). The heads
    count once, for the last decoder layer, as inference needs them. model: real-valued, on the meta device."""
    image = torch.empty(1, 3, height, width, device="meta")
    mask = torch.zeros(1, height, width, dtype=torch.bool, device="meta")
    model = copy.deepcopy(model).requires_grad_(False)  # the counter asks views of parameters for a gradient function
    own = count_macs(model, image, mask)
    tokens = _tokens(model, image)
    layers = len(model.transformer["decoder"].layers)  # type: ignore[arg-type]
    table: dict[str, int] = {}
    for name, macs in own.items():
        group = next((g for pattern, g in KINDS.items() if re.match(pattern, name)), None)
        if group is None:
            raise ValueError(f"no group for the MACs of {name}")
        if group == "heads":
            macs //= layers
        if name.endswith(("self_attn", "multihead_attn")):
            n_q = tokens if "encoder" in name else model.queries
            n_k = model.queries if "decoder" in name and name.endswith("self_attn") else tokens
            projections = (n_q + 2 * n_k) * model.dim**2
            products = group.replace("proj", "attention")
            table[products] = table.get(products, 0) + macs - projections
            macs = projections
        table[group] = table.get(group, 0) + macs
    return table


def ops(
    table: Mapping[str, int], bits: int, *, attention_bits: int | None = None, quantize_downsample: bool = True
) -> float:
    """OPs of the paper: real-valued MACs + {1/32, 1/16, 1/8, 1/4} of the {2, 3, 4, 8}-bit MACs.

    The paper counts attention products at the model's bits (attention_bits None), although their operands have 8. Without
    quantize_downsample the down-sampling convolutions are real-valued, as in the released code."""
    real = REAL if quantize_downsample else (*REAL, "downsample")
    layers = []
    for group, macs in table.items():
        width = 32 if group in real else bits
        if group.endswith("attention") and attention_bits is not None:
            width = attention_bits
        layers.append(LayerOps(group, macs, width, width))
    return ops_halving(layers)


def size_mib(model: DETR, *, bits: int = 32) -> float:
    """MiB (2^20 bytes) of all parameters: weights of quantised layers at `bits` (the stem at 8), everything else at 32."""
    widths: dict[str, int] = {}
    if bits < 32:
        model = quantize_detr(model, bits=bits)
        for name, m in model.named_modules():
            if isinstance(m, QuantLinear | QuantConv2d):
                widths[f"{name}.weight"] = m.weight_quant.bits  # type: ignore[assignment]
            elif name.endswith(("self_attn", "multihead_attn")):
                widths[f"{name}.in_proj_weight"] = bits
    return sum(width * n for width, n in parameter_bits(model, widths).items()) / 8 / 2**20


def _tokens(model: DETR, image: torch.Tensor) -> int:
    with torch.no_grad():
        return model.backbone[0].body(image)[0, 0].numel()  # type: ignore[operator]
