"""Speed and size of the found network with one bit per weight, beside every float form of it on this CPU, and of the second-order
rules of the search. Writes bench.json; minutes.

python bench.py                                                    DCP-NAS-L at 224 x 224, batch 1 and 8, 1 and 2 threads
python bench.py weights=model.packed.pt search=false               any classifier of train.py or export.py
python bench.py search=false out=results/deploy/bench.json         what the README's table is made from

Interleaved rounds, medians with quartiles; ratio = baseline / ours; nothing is asserted. The baseline of a network is the fastest
of eager, channels_last, compiled (fp32 and bf16) and onnxruntime; norms are folded in all of them.
"""

from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import nn

from common.metrics.deployment import Forms, add_accuracy, add_sizes, time_network, usable_threads
from common.metrics.timing import Bench, Timing, interleaved
from common.scripts import script
from dcp_nas.checkpoint import load
from dcp_nas.counts import NETWORKS, measure
from dcp_nas.deploy import pack_
from dcp_nas.network import Network
from dcp_nas.operations import Bits
from dcp_nas.search_space import GENOTYPES
from dcp_nas.supernet import Supernet, inherit
from dcp_nas.tangent_propagation import child_gradient

PAPER = Path(__file__).resolve().parent
ARM = "dcp_ggn"
SUPERNETS = {
    "digits": ({"channels": 4, "cells": 3, "nodes": 2, "reductions": [1], "in_channels": 1}, 8, 50),
    "C=16, 4 cells, 4 nodes": ({"channels": 16, "cells": 4, "nodes": 4, "in_channels": 3}, 16, 8),
}
RULES = {
    "first order": {"lam": 0.0},
    "exact": {"lam": 5e-3, "hessian": "exact"},
    "ggn": {"lam": 5e-3, "hessian": "ggn"},
    "ggn kept": {"lam": 5e-3, "hessian": "ggn", "product": "double_vjp"},
}


def alpha_steps(options: dict, side: int, batch: int, rounds: int) -> dict[str, Timing]:
    """The Child's alpha gradient with each rule."""
    torch.manual_seed(0)
    parent = Supernet(num_classes=10, bits=Bits(affine=False), **options)
    child = Supernet(num_classes=10, bits=Bits("beta", "binary", affine=False), **options)
    inherit(child, parent)
    alphas = child.new_alphas(torch.Generator().manual_seed(0))
    x = torch.randn(batch, options["in_channels"], side, side)
    target = torch.randn(batch, 10).softmax(1)
    t = torch.randn(sum(a.numel() for a in alphas)) * 1e-3
    calls = {
        name: lambda rule=rule: child_gradient(lambda a: child(x, tuple(a)), alphas, target, t, **rule)
        for name, rule in RULES.items()
    }
    return interleaved(calls, rounds=rounds, warmup=1)


def subject(weights: str | None) -> tuple[str, nn.Module, torch.Tensor]:
    """(name, network with one bit per weight, an image (1, C, H, W)) of a file, or of the published cell with random weights and
    the statistics of random images in its norms."""
    if weights is None:
        torch.manual_seed(0)
        genotype, channels, cells = NETWORKS["dcp_nas_l_108_10"]
        options = {"num_classes": 1000, "channels": channels, "cells": cells, "stem": "imagenet"}
        name, image = "DCP-NAS-L", torch.zeros(1, 3, 224, 224)
        network: nn.Module = Network(GENOTYPES[genotype], bits=Bits("m", "binary"), **options)
        with torch.no_grad():
            network.train()(torch.randn(2, 3, 224, 224))
    else:
        network, _, about = load(weights)
        name, image = Path(weights).name, torch.zeros(1, about["channels"], about["size"], about["size"])
    pack_(network)
    return name, network, image


@torch.inference_mode()
def on_bits(table: Bench, cfg: DictConfig) -> None:
    """The network in use beside its float forms."""
    name, network, image = subject(cfg.weights)
    add_sizes(table, name, network)
    if cfg.weights is None:
        found = measure("dcp_nas_l_108_10")
        macs = found["macs_w1a1"] + found["macs_w1a32"] + found["macs_fp"]
        table.add(f"{name}, OPs", found["ops"], macs, unit="OPs", kind="ops", network=name)
        add_accuracy(table, name, PAPER / "results/mini/cells.csv", arm=ARM, metric="top1", data="the digits miniature")
    forms = Forms(network, image, compiled=cfg.compiled)
    time_network(
        table, name, forms, image, batches=cfg.batches, threads=usable_threads(cfg.threads), rounds=cfg.rounds
    )  # fmt: skip


def bench(cfg: DictConfig) -> list[dict]:
    """Measures, prints, writes cfg.out and returns the rows."""
    table = Bench(cfg.out)
    for name, (options, side, batch) in SUPERNETS.items() if cfg.search else ():
        found = alpha_steps(options, side, batch, cfg.rounds)
        table.add(f"alpha step, {name}: Gauss-Newton vs exact product", found["ggn"], found["exact"], batch=batch)
        for rule, kind in (("ggn", "forward mode"), ("ggn kept", "kept graph"), ("exact", "exact product")):
            table.add(f"alpha step, {name}: {kind} vs first order", found[rule], found["first order"], batch=batch)
    on_bits(table, cfg)
    return table.write()


main = script("bench", bench)


if __name__ == "__main__":
    main()
