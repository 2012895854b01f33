"""Images per second with and without pooling: the published network, its transformer alone, and onnxruntime.

python bench.py [batches=1,8] [seconds=60] [threads=2] [out=bench.json]

Random weights: the number of tokens does not depend on them. Every round runs all models once in shuffled order; medians
over rounds, at least three. `ours` is APP + ATP, `baseline` the same weights and runtime without pooling; the ideal is the
ratio of multiply-accumulates."""

import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ap_fer.cost import vit_macs
from ap_fer.export import export
from ap_fer.model import APViT

DEFAULTS = {"batches": "", "seconds": "60", "threads": "", "out": "bench.json"}
NONE: dict = {"app": {"keep": None}, "atp": {"rate": 1.0, "start": 0}}


def measure(calls: dict[str, Callable[[], object]], end: float) -> dict[str, float]:
    """{name: median seconds}; shuffled rounds until time.perf_counter() reaches `end`, at least three."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, rounds = list(calls), 0
    while rounds < 3 or time.perf_counter() < end:
        random.Random(rounds).shuffle(order)
        for name in order:
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: statistics.median(t) for name, t in times.items()}


def onnx_call(model: APViT, folder: Path, name: str, x: torch.Tensor, threads: int) -> Callable[[], object]:
    import onnxruntime

    export(model, folder / f"{name}.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])
    images = x.numpy()
    return lambda: session.run(None, {"images": images})


@torch.no_grad()
def main(args: list[str]) -> None:
    if odd := [a for a in args if "=" not in a]:
        raise SystemExit(f"{odd} is not of the form option=value")
    options = DEFAULTS | dict(a.split("=", 1) for a in args)
    if unknown := set(options) - set(DEFAULTS):
        raise SystemExit(f"unknown {sorted(unknown)}; known: {', '.join(DEFAULTS)}")
    if options["threads"]:
        torch.set_num_threads(int(options["threads"]))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    batches = [int(b) for b in (options["batches"] or ("1,64,256" if cuda else "1,8")).split(",")]
    torch.manual_seed(0)
    pooled, dense = APViT().eval(), APViT(**NONE).eval()
    dense.load_state_dict(pooled.state_dict())
    rates = pooled.vit.rates
    shape = {"channels": 256, "dim": 768, "mlp_ratio": 3}
    ideal = vit_macs(196, None, [1.0] * 8, **shape) / vit_macs(196, 160, rates, **shape)
    rows = []
    for batch in batches:
        x = torch.randn(batch, 3, 112, 112)
        calls: dict[str, Callable[[], object]] = {}
        with tempfile.TemporaryDirectory() as folder:
            if not cuda:
                for name, model in (("pooled", pooled), ("dense", dense)):
                    calls[f"onnxruntime {name}"] = onnx_call(model, Path(folder), name, x, torch.get_num_threads())
            x, features = x.to(device), torch.randn(batch, 256, 14, 14, device=device)
            for name, model in (("pooled", pooled.to(device)), ("dense", dense.to(device))):

                def call(module, inputs):
                    def run():
                        module(inputs)
                        if cuda:
                            torch.cuda.synchronize()

                    return run

                calls |= {f"whole {name}": call(model, x), f"transformer {name}": call(model.vit, features)}
            for warm in calls.values():
                warm()
            seconds = measure(calls, time.perf_counter() + float(options["seconds"]) / len(batches))
        for what in dict.fromkeys(name.rsplit(" ", 1)[0] for name in calls):
            ours, baseline = batch / seconds[f"{what} pooled"], batch / seconds[f"{what} dense"]
            bound = f", ideal {ideal:.2f}x" if what == "transformer" else ""
            print(
                f"batch {batch} {what:12s} {ours:8.2f} images/s pooled, {baseline:8.2f} without, {ours / baseline:.2f}x{bound}"
            )
            rows.append(
                {"name": f"{what}, APP + ATP against no pooling", "ours": ours, "baseline": baseline, "ratio": ours / baseline,
                 "unit": "images/s", "threads": torch.get_num_threads(), "batch": batch,
                 "isa": "cuda" if cuda else torch.backends.cpu.get_cpu_capability(),
                 "machine": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {os.cpu_count()} cores"}
            )  # fmt: skip
    Path(options["out"]).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
