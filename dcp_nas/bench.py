"""Speed ratios from one run: the second-order rules of the search, and the packed 1x1 convolution. Writes bench.json.

python bench.py threads=1

Interleaved rounds, medians with quartiles; ratio = baseline / ours; nothing is asserted.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from omegaconf import DictConfig

from common.metrics.timing import Bench, Timing, interleaved
from common.quant.pack import binary_conv2d, pack_signs
from common.scripts import script
from dcp_nas.operations import Bits
from dcp_nas.supernet import Supernet, inherit
from dcp_nas.tangent_propagation import child_gradient

SHAPES = ((108, 28), (216, 14), (432, 7))  # channels and side of the three stages of DCP-NAS-L at 224 x 224
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


@torch.inference_mode()
def convolutions(channels: int, side: int, rounds: int) -> dict[str, Timing]:
    """A 1x1 convolution of signs: packed (packing of the input included) and as float. ValueError if they disagree."""
    x, w = torch.randn(1, channels, side, side).sign(), torch.randn(channels, channels, 1, 1).sign()
    weights = pack_signs(w.permute(0, 2, 3, 1))

    def packed() -> torch.Tensor:
        return binary_conv2d(pack_signs(x.permute(0, 2, 3, 1)), weights, channels, padding=0, backend="numba")

    if not torch.equal(packed().permute(0, 3, 1, 2).float(), F.conv2d(x, w)):
        raise ValueError(f"the packed convolution of {channels} channels is not the float one")
    last = x.contiguous(memory_format=torch.channels_last), w.contiguous(memory_format=torch.channels_last)
    half = last[0].bfloat16(), last[1].bfloat16()
    calls: dict[str, Callable[[], object]] = {
        "packed": packed,
        "eager": lambda: F.conv2d(x, w),
        "channels_last": lambda: F.conv2d(*last),
        "bf16 channels_last": lambda: F.conv2d(*half),
    }
    return interleaved(calls, rounds=rounds)


def bench(cfg: DictConfig) -> list[dict]:
    """Measures, prints, writes cfg.out and returns the rows."""
    table = Bench(cfg.out)
    for name, (options, side, batch) in SUPERNETS.items():
        found = alpha_steps(options, side, batch, cfg.rounds)
        table.add(f"alpha step, {name}: Gauss-Newton vs exact product", found["ggn"], found["exact"], batch=batch)
        for rule, kind in (("ggn", "forward mode"), ("ggn kept", "kept graph"), ("exact", "exact product")):
            table.add(f"alpha step, {name}: {kind} vs first order", found[rule], found["first order"], batch=batch)
    for channels, side in SHAPES:
        found = convolutions(channels, side, cfg.rounds)
        best = min((k for k in found if k != "packed"), key=lambda k: found[k].median)
        table.add(f"1x1 convolution, {channels} channels, {side}x{side} vs {best}", found["packed"], found[best])
    return table.write()


main = script("bench", bench)


if __name__ == "__main__":
    main()
