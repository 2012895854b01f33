"""Cost of ARI's parts on this machine: writes bench.json. Nothing here is asserted anywhere.

python bench.py
"""

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from common import runs
from lifelong.adaptive_fusion import OnlineFusion, fusion_weights
from lifelong.meta_update import MetaOptions, meta_step
from lifelong.model import build_model


def seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """The fastest of some calls after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def stored_fusion(base: list[Tensor], tasks: list[list[Tensor]]) -> list[Tensor]:
    """The plain formulation: keep all task states, then weigh them."""
    out = []
    for b, states in zip(base, zip(*tasks, strict=True), strict=True):
        w = fusion_weights(torch.stack([(s - b).abs().sum() for s in states]))
        out.append((w.view(-1, *[1] * b.ndim) * torch.stack(states)).sum(0))
    return out


def main() -> None:
    torch.manual_seed(0)
    rows = []

    def row(name: str, ours: float, baseline: float, unit: str, batch: int) -> None:
        about = {"threads": torch.get_num_threads(), "batch": batch, "isa": torch.backends.cpu.get_cpu_capability()}
        machine = runs.provenance()["machine"]["cpu"] or platform.machine()
        rows.append(
            {
                "name": name,
                "ours": ours,
                "baseline": baseline,
                "ratio": baseline / ours,
                "unit": unit,
                **about,
                "machine": machine,
            }
        )
        print(f"{name:60s} {ours:.4g} against {baseline:.4g} {unit}, ratio {baseline / ours:.2f}")

    model = build_model(name="rps_net", num_classes=100)
    base = [p.detach() for p in model.parameters()]
    tasks = [[b + 0.01 * torch.randn_like(b) for b in base] for _ in range(10)]

    def online() -> list[Tensor]:
        fusion = OnlineFusion(base)
        for states in tasks:
            fusion.add(states)
        return fusion.result(1.0)

    row(
        "fusion of 10 tasks, rps_net: online, stored states",
        seconds(online),
        seconds(lambda: stored_fusion(base, tasks)),
        "s",
        0,
    )

    x, y = torch.rand(32, 3, 32, 32), torch.arange(32) % 20
    groups = [slice(0, 10), slice(10, 20)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step(**options) -> float:
        chosen = MetaOptions(**options)
        return seconds(lambda: meta_step(model, [optimizer], x, y, groups, alpha=0.9, options=chosen), repeats=2)

    def plain() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    ari, clean = step(), step(attack=None)
    row("a batch of 2 tasks, rps_net: ARI, fusion without attack", ari, clean, "s", 32)
    row("a batch of 2 tasks, rps_net: ARI, second clean step", ari, step(attack=None, steps=2), "s", 32)
    row("a batch, rps_net: ARI with 2 tasks, one plain SGD step", ari, seconds(plain, 2), "s", 32)
    (Path(__file__).parent / "bench.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
