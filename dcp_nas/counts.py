"""Parameters, 1-bit weights, multiply-accumulates, OPs and memory of the published genotypes, and the size of the search space.

python counts.py            print them;   the same numbers are the `exact` claims of claims.yaml
"""

import torch

from common.metrics.ops import count_parameters, layer_ops, memory_mbit, ops_bnn64, parameter_bits, record_counts
from common.scripts import script
from dcp_nas.network import Network
from dcp_nas.operations import BinaryConv2d, Bits
from dcp_nas.search_space import GENOTYPES, space_size

# name: (genotype, C, L), at 224 x 224 with 1000 classes
NETWORKS = {
    "dcp_nas_l_108_10": ("DCP_NAS_L", 108, 10),
    "dcp_nas_l_48_10": ("DCP_NAS_L", 48, 10),
    "dcp_nas_l_36_10": ("DCP_NAS_L", 36, 10),
    "dcp_nas_l_48_14": ("DCP_NAS_L", 48, 14),
    "darts_v2_48_14": ("DARTS_V2", 48, 14),
    "chl_i6_108_10": ("CHL_I6", 108, 10),
    "tangent_1_108_10": ("TANGENT_1", 108, 10),
    "tangent_2_108_10": ("TANGENT_2", 108, 10),
}


def count(network: torch.nn.Module, image: torch.Tensor) -> dict[str, float]:
    """params; weights_w1a1, weights_w1a32 (1-bit weights with binary and real inputs); macs_w1a1, macs_w1a32, macs_fp;
    ops_all (all 1-bit MACs / 64), ops (only W1A1 MACs / 64), both rounded; mbit_binary (the 1-bit weights alone) and mbit
    (the rest with 32 bits), rounded to two digits."""
    binary = {name: m for name, m in network.named_modules() if isinstance(m, BinaryConv2d)}
    layers = layer_ops(network, image, bits={name: (1, m.act_bits) for name, m in binary.items()})
    sizes = parameter_bits(network, {f"{name}.weight": 1 for name in binary})
    weights = {bits: sum(m.weight.numel() for m in binary.values() if m.act_bits == bits) for bits in (1, 32)}
    macs = {
        key: sum(x.macs for x in layers if (x.weight_bits, x.act_bits) == key) for key in ((1, 1), (1, 32), (32, 32))
    }
    return {
        "params": count_parameters(network)["total"],
        "weights_w1a1": weights[1],
        "weights_w1a32": weights[32],
        "macs_w1a1": macs[1, 1],
        "macs_w1a32": macs[1, 32],
        "macs_fp": macs[32, 32],
        "ops_all": round(ops_bnn64(layers, weight_only=True)),
        "ops": round(ops_bnn64(layers)),
        "mbit_binary": round(memory_mbit({1: sizes.get(1, 0)}), 2),
        "mbit": round(memory_mbit(sizes), 2),
    }


def measure(name: str) -> dict[str, float]:
    """`count` of one network of NETWORKS for one 224 x 224 image and 1000 classes, on the meta device. ValueError for another."""
    if name not in NETWORKS:
        raise ValueError(f"network {name!r}, allowed: {', '.join(NETWORKS)}")
    genotype, channels, cells = NETWORKS[name]
    with torch.device("meta"):
        options = {"num_classes": 1000, "channels": channels, "cells": cells, "stem": "imagenet"}
        network = Network(GENOTYPES[genotype], bits=Bits("m", "binary"), **options)
        return count(network, torch.empty(1, 3, 224, 224))


def measured() -> dict[str, float]:
    """`measure` of every network as <network>_<count>, and the size of the search space."""
    found = {f"{name}_{key}": value for name in NETWORKS for key, value in measure(name).items()}
    return {**found, "space_size": space_size()}


main = script("counts", lambda cfg, fabric, out: record_counts(cfg, fabric, out, measured))


if __name__ == "__main__":
    main()
