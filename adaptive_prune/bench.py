"""Images per second of really dropping tokens against the dense timm model, ToMe and EViT at equal MACs.

python bench.py [model=deit_small_patch16_224] [budget=0.65] [batches=1,8] [seconds=60]        writes bench.json

Weights are random, so thresholds are score quantiles of the images measured: the counts still vary by image, and the
budget is met; EViT and ToMe get the cost that AS-ViT really has. Every round runs all models once, in shuffled order; medians
over rounds. The seconds cover everything, at least three rounds are run. On CUDA in bfloat16 and with `bucketed`, too."""

import json
import math
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import timm
import torch

from adaptive_prune.calibrate import calibrate
from adaptive_prune.model import PrunedViT, prune

DEFAULTS = {"model": "deit_small_patch16_224", "budget": "0.65", "batches": "", "seconds": "60", "out": "bench.json"}


def measure(models: dict, x: torch.Tensor, end: float) -> dict[str, list[float]]:
    """{name: seconds per call} of shuffled rounds, at least three, until time.perf_counter() reaches `end`.

    The models must have run on x before."""
    times: dict[str, list[float]] = {name: [] for name in models}
    order, rounds = list(models), 0
    if x.is_cuda:
        torch.cuda.synchronize()
    while rounds < 3 or time.perf_counter() < end:
        random.Random(rounds).shuffle(order)
        for name in order:
            start = time.perf_counter()
            models[name](x)
            if x.is_cuda:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return times


@torch.no_grad()
def main(args: list[str]) -> None:
    stop = time.perf_counter()
    if odd := [a for a in args if "=" not in a]:
        raise SystemExit(f"{odd} is not of the form option=value")
    options = dict(a.split("=", 1) for a in args)
    if unknown := set(options) - set(DEFAULTS):
        raise SystemExit(f"unknown {sorted(unknown)}; known: {', '.join(DEFAULTS)}")
    options = DEFAULTS | options
    stop += float(options["seconds"])
    cuda = torch.cuda.is_available()
    batches = [int(b) for b in (options["batches"] or ("1,64,256" if cuda else "1,8")).split(",")]
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    torch.manual_seed(0)
    dense = timm.create_model(options["model"]).eval()
    for block in dense.blocks:  # random weights attend almost uniformly: sharpen, so that counts vary between images
        block.attn.qkv.weight.mul_(4)
    size = dense.patch_embed.img_size[0]
    rows = []
    for i, batch in enumerate(batches):
        share = math.sqrt(batch) / sum(map(math.sqrt, batches[i:]))  # of what is left: large batches need more
        end = time.perf_counter() + share * (stop - time.perf_counter())
        x = torch.randn(batch, 3, size, size) * torch.linspace(0.5, 2, batch).view(-1, 1, 1, 1)
        reference = prune(dense.float().cpu(), budget=float(options["budget"])).eval()
        reference.to(device)
        calibrate(reference, [x.to(device)], float(options["budget"]), rounds=1)
        theta = reference.theta.tolist()
        dense, x = dense.to(device, dtype), x.to(device, dtype)
        same = {"thresholds": theta, "budget": float(options["budget"])}
        models = {"dense": dense} | {
            name: PrunedViT(dense, inference=name, **same).eval()
            for name in ("packed", "padded", "batch_topk", *(["bucketed"] if cuda else []))
        }
        for model in list(models.values())[1:]:
            model.theta.data = model.theta.data.to(device)
        _, info = models["packed"](x, details=True)
        cost = models["packed"].cost
        ratio = float(info.macs.double().mean()) / cost.dense
        models |= {rule: PrunedViT(dense, rule=rule, budget=ratio).eval() for rule in ("evit", "tome")}
        dense(x)  # this and the passes that report the cost are the warm-up
        others = {name: m for name, m in models.items() if name != "dense"}
        macs = {name: float(m(x, details=True)[1].macs.double().mean()) / cost.dense for name, m in others.items()}
        times = measure(models, x, end)
        rate = {name: batch / statistics.median(t) for name, t in times.items()}
        least, most = (info.kept.int().aminmax(dim=0)[m].tolist() for m in (0, 1))
        print(
            f"batch {batch}: AS-ViT keeps {least} to {most} tokens per stage, {ratio:.3f} of the MACs, ideal {1 / ratio:.2f}x"
        )
        for name, found in rate.items():
            low, high = (batch / q for q in statistics.quantiles(times[name], n=4)[::-2])
            print(f"  {name:12s}{found:9.2f} images/s  [{low:.2f}, {high:.2f}]  {found / rate['dense']:.2f}x  "
                  f"{macs.get(name, 1.0):.3f} MACs  {len(times[name])} rounds")  # fmt: skip
        pairs = [(n, "dense") for n in rate if n != "dense"] + [("packed", "tome"), ("packed", "evit")]
        rows += [
            {"name": f"{options['model']} {a} against {b}", "ours": rate[a], "baseline": rate[b], "ratio": rate[a] / rate[b],
             "unit": "images/s", "threads": torch.get_num_threads(), "batch": batch,
             "isa": "cuda" if cuda else torch.backends.cpu.get_cpu_capability(),
             "machine": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {os.cpu_count()} cores"}
            for a, b in pairs
        ]  # fmt: skip
        share = rate["packed"] / rate["dense"] * ratio
        print(f"  packed reaches {100 * share:.0f} % of the ideal MAC ratio")
        rows.append({**rows[-1], "name": f"{options['model']} packed, share of the ideal MAC ratio",
                     "ours": rate["packed"] / rate["dense"], "baseline": 1 / ratio, "ratio": share, "unit": "x"})  # fmt: skip
    Path(options["out"]).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
