"""Operation counts and storage of the paper's models under named conventions."""

import re

import torch
from torch import nn

from common.metrics.ops import LayerOps, count_macs, memory_mbit, parameter_bits
from q_vit.model import build_float
from q_vit.quantized_vit import edge_layers

CONVENTIONS = ("lane", "bops64", "bops1024")
BLOCK_LINEARS = re.compile(r"(^|\.)(qkv|proj|fc1|fc2|reduction)$")


def float_model(name: str, *, size: int = 224) -> nn.Module:
    """A network of the paper for size x size images on the meta device: shapes without weights."""
    with torch.device("meta"):
        return build_float(name, num_classes=1000, img_size=size).eval()


def edge_names(model: nn.Module) -> set[str]:
    """Names of the patch embedding's projection and the classifiers."""
    edges = {id(layer) for layer in edge_layers(model)}
    return {name for name, m in model.named_modules() if id(m) in edges}


def layers(
    name: str, bits: int, *, edge_bits: int = 8, attention_bits: int | None = None, size: int = 224
) -> list[LayerOps]:
    """MACs of one image by module with operand widths. `blocks.i.attn` itself holds the two attention products, whose
    operands have attention_bits (default: bits)."""
    model = float_model(name, size=size)
    edges = edge_names(model)
    found = []
    for module, macs in count_macs(model, torch.empty(1, 3, size, size, device="meta")).items():
        if module in edges:
            width = edge_bits
        elif BLOCK_LINEARS.search(module):
            width = bits
        else:
            width = bits if attention_bits is None else attention_bits
        found.append(LayerOps(module, macs, width, width))
    return found


def mac_table(name: str) -> dict[str, int]:
    """{patch, linears, attention (the two products together), head, total, without_attention} of one 224 x 224 image."""
    sums = {"patch": 0, "linears": 0, "attention": 0, "head": 0}
    for layer in layers(name, 32, edge_bits=32):
        if layer.name == "patch_embed.proj":
            kind = "patch"
        elif layer.name.startswith("head"):
            kind = "head"
        else:
            kind = "linears" if BLOCK_LINEARS.search(layer.name) else "attention"
        sums[kind] += layer.macs
    total = sum(sums.values())
    return sums | {"total": total, "without_attention": total - sums["attention"]}


def storage_mb(name: str, bits: int, *, edge_bits: int = 8) -> float:
    """Megabytes (1e6 bytes): weights of the block's linears at `bits`, of patch embedding and classifiers at edge_bits, biases
    and everything else as float32; steps not counted."""
    model = float_model(name)
    edges, widths = edge_names(model), {}
    for module, m in model.named_modules():
        if module in edges:
            widths[f"{module}.weight"] = edge_bits
        elif isinstance(m, nn.Linear) and BLOCK_LINEARS.search(module):
            widths[f"{module}.weight"] = bits
    return memory_mbit(parameter_bits(model, widths)) / 8


def extra_parameters(model: nn.Module) -> dict[str, int]:
    """{quantizers: steps and zero points, irm: of rectification} of a quantised model."""
    counts = {"quantizers": 0, "irm": 0}
    for name, p in model.named_parameters():
        if name.endswith((".step", ".zero_point")):
            counts["quantizers"] += p.numel()
        elif re.search(r"\.[qk]_norm\.", name):
            counts["irm"] += p.numel()
    return counts
