"""Cost of ARI's parts on this machine: writes bench.json. Interleaved rounds, medians with quartiles; nothing is asserted.

python bench.py threads=1
"""

from collections.abc import Callable
from pathlib import Path

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor

from common.metrics.timing import Bench, Timing, interleaved
from common.scripts import script
from lifelong.adaptive_fusion import OnlineFusion, fusion_weights
from lifelong.meta_update import MetaOptions, meta_step
from lifelong.model import Gated, build_model


def stored_fusion(base: list[Tensor], tasks: list[list[Tensor]]) -> list[Tensor]:
    """The plain formulation: keep all task states, then weigh them."""
    out = []
    for b, states in zip(base, zip(*tasks, strict=True), strict=True):
        w = fusion_weights(torch.stack([(s - b).abs().sum() for s in states]))
        out.append((w.view(-1, *[1] * b.ndim) * torch.stack(states)).sum(0))
    return out


def fusion_times(model: Gated, rounds: int) -> dict[str, Timing]:
    """{online, stored}: fusion of ten task states. ValueError if the two disagree."""
    base = [p.detach() for p in model.parameters()]
    tasks = [[b + 0.01 * torch.randn_like(b) for b in base] for _ in range(10)]

    def online() -> list[Tensor]:
        fusion = OnlineFusion(base)
        for states in tasks:
            fusion.add(states)
        return fusion.result(1.0)

    for a, b in zip(online(), stored_fusion(base, tasks), strict=True):
        if not torch.allclose(a, b, rtol=1e-4, atol=1e-5):
            raise ValueError("the two formulations of the fusion disagree")
    return interleaved({"online": online, "stored": lambda: stored_fusion(base, tasks)}, rounds=rounds, warmup=1)


def step_times(model: Gated, batch: int, rounds: int) -> dict[str, Timing]:
    """A batch of two tasks under each arm, and one plain step of SGD on it."""
    x, y = torch.rand(batch, 3, 32, 32), torch.arange(batch) % 20
    groups, optimizer = [slice(0, 10), slice(10, 20)], torch.optim.SGD(model.parameters(), lr=1e-4)

    def arm(**options) -> Callable[[], object]:
        chosen = MetaOptions(**options)
        return lambda: meta_step(model, [optimizer], x, y, groups, alpha=0.9, options=chosen)

    def plain() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    calls = {"ari": arm(), "clean": arm(attack=None), "second": arm(attack=None, steps=2), "plain": plain}
    return interleaved(calls, rounds=rounds, warmup=1)


def bench(cfg: DictConfig) -> list[dict]:
    """Measures, prints, writes cfg.out and returns the rows."""
    torch.manual_seed(0)
    table, model = Bench(cfg.out), build_model(name="rps_net", num_classes=100)
    times = fusion_times(model, cfg.rounds)
    table.add("fusion of 10 tasks, rps_net: online vs stored states", times["online"], times["stored"], batch=0)
    times = step_times(model, cfg.batch_size, cfg.rounds)
    for name, words in (
        ("clean", "fusion without attack"),
        ("second", "second clean step"),
        ("plain", "one plain SGD step"),
    ):
        table.add(f"a batch of 2 tasks, rps_net: ARI vs {words}", times["ari"], times[name], batch=cfg.batch_size)
    return table.write()


@script("bench")
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    bench(cfg)


if __name__ == "__main__":
    main()
