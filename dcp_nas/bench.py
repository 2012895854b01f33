"""Speed ratios from one run: the second-order rules of the search, and the packed 1x1 convolution. Writes bench.json.

python bench.py

Every row is {name, ours, baseline, ratio = baseline / ours, unit, threads, batch, isa, machine}; nothing is asserted.
"""

import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from common import runs
from common.quant.pack import binary_conv2d, pack_signs
from dcp_nas.operations import Bits
from dcp_nas.supernet import Supernet, inherit
from dcp_nas.tangent_propagation import child_gradient

SHAPES = ((108, 28), (216, 14), (432, 7))  # channels and side of the three stages of DCP-NAS-L at 224 x 224
SUPERNETS = {
    "digits": ({"channels": 4, "cells": 3, "nodes": 2, "reductions": [1], "in_channels": 1}, 8, 50),
    "C=16, 4 cells, 4 nodes": ({"channels": 16, "cells": 4, "nodes": 4, "in_channels": 3}, 16, 8),
}


def seconds(run, *, budget: float = 1.0) -> float:
    """Median time of one call after a warm-up."""
    run()
    times, end = [], time.perf_counter() + budget
    while not times or (time.perf_counter() < end and len(times) < 200):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def alpha_steps(options: dict, side: int, batch: int, repeats: int = 5) -> dict[str, float]:
    """Median seconds of the Child's alpha gradient with each rule, in alternation."""
    torch.manual_seed(0)
    parent = Supernet(num_classes=10, bits=Bits(affine=False), **options)
    child = Supernet(num_classes=10, bits=Bits("beta", "binary", affine=False), **options)
    inherit(child, parent)
    alphas = child.new_alphas(torch.Generator().manual_seed(0))
    x = torch.randn(batch, options["in_channels"], side, side)
    target = torch.randn(batch, 10).softmax(1)
    t = torch.randn(sum(a.numel() for a in alphas)) * 1e-3
    rules = {"first order": (0.0, "ggn"), "exact": (5e-3, "exact"), "ggn": (5e-3, "ggn")}
    times: dict[str, list[float]] = {name: [] for name in rules}
    for _ in range(repeats):
        for name, (lam, rule) in rules.items():
            start = time.perf_counter()
            child_gradient(lambda a: child(x, tuple(a)), alphas, target, t, lam=lam, hessian=rule)
            times[name].append(time.perf_counter() - start)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def main() -> None:
    rows = []
    common = {
        "threads": torch.get_num_threads(), "isa": torch.backends.cpu.get_cpu_capability(),
        "machine": runs.provenance()["machine"],
    }  # fmt: skip

    def row(name: str, ours: float, baseline: float, unit: str, batch: int) -> None:
        rows.append({"name": name, "ours": ours * 1e3, "baseline": baseline * 1e3, "ratio": baseline / ours, "unit": unit,
                     "batch": batch, **common})  # fmt: skip
        print(f"{name:76s} {ours * 1e3:9.3f} ms {baseline * 1e3:9.3f} ms   x{baseline / ours:.2f}", flush=True)

    for name, (options, side, batch) in SUPERNETS.items():
        times = alpha_steps(options, side, batch)
        row(f"alpha step, {name}: Gauss-Newton vs exact product", times["ggn"], times["exact"], "ms", batch)
        row(f"alpha step, {name}: Gauss-Newton vs first order", times["ggn"], times["first order"], "ms", batch)
    with torch.inference_mode():
        for channels, side in SHAPES:
            x, w = torch.randn(1, channels, side, side).sign(), torch.randn(channels, channels, 1, 1).sign()
            packed = pack_signs(x.permute(0, 2, 3, 1)), pack_signs(w.permute(0, 2, 3, 1))
            result = binary_conv2d(*packed, channels, padding=0, backend="numba").permute(0, 3, 1, 2)
            if not torch.equal(result.float(), F.conv2d(x, w)):
                raise RuntimeError(f"the packed convolution of {channels} channels is not the float one")
            last = x.contiguous(memory_format=torch.channels_last), w.contiguous(memory_format=torch.channels_last)
            half = last[0].bfloat16(), last[1].bfloat16()
            floats = {
                "eager": seconds(lambda a=x, b=w: F.conv2d(a, b)),
                "channels_last": seconds(lambda p=last: F.conv2d(*p)),
                "bf16 channels_last": seconds(lambda p=half: F.conv2d(*p)),
            }
            best = min(floats, key=floats.__getitem__)
            ours = seconds(
                lambda a=x, b=packed[1], c=channels: binary_conv2d(
                    pack_signs(a.permute(0, 2, 3, 1)), b, c, padding=0, backend="numba"
                )
            )
            row(f"1x1 convolution, {channels} channels, {side}x{side}, packing included", ours, floats[best],
                f"ms (baseline: best float, {best})", 1)  # fmt: skip
    (Path(__file__).parent / "bench.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
