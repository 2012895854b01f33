"""Time of really dropping tokens against the dense timm model, top-k, EViT and ToMe at equal MACs.

python bench.py [vit=deit_small_patch16_224] [budget=0.65] [batches=[1,8,32]]        writes bench.json

Weights are random, so thresholds are score quantiles of the images measured: the counts still vary by image, and the
budget is met; the baselines get the cost that AS-ViT really has. `unpruned` is the same code with nothing dropped."""

from collections.abc import Callable
from typing import Any

import timm
import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor, nn

from adaptive_prune.backbones import check_known, check_vit
from adaptive_prune.budget import check_budget
from adaptive_prune.calibrate import calibrate
from adaptive_prune.model import PrunedViT, prune
from common.metrics.timing import Bench, interleaved
from common.scripts import script

WARMUP = 5


def dense_model(name: str) -> nn.Module:
    """A random timm model. Random weights attend almost uniformly: sharpened, so that counts vary between images."""
    torch.manual_seed(0)
    dense = timm.create_model(name).eval()
    check_vit(dense)
    with torch.no_grad():
        for block in dense.blocks:  # type: ignore[union-attr]
            block.attn.qkv.weight.mul_(4)
    return dense


@torch.no_grad()
def rivals(dense: Any, x: Tensor, budget: float) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """{name: model} and {name: cost relative to dense} on the images x (B, 3, H, W)."""
    reference = prune(dense, budget=budget).eval().to(x.device)
    calibrate(reference, [x], budget, rounds=1)
    layouts = ("packed", "padded", "batch_topk", *(["bucketed"] if x.is_cuda else []))
    same = {"thresholds": reference.theta.tolist(), "budget": budget}
    models: dict[str, Any] = {name: PrunedViT(dense, inference=name, **same).eval().to(x.device) for name in layouts}
    ratio = float(models["packed"](x, details=True)[1].macs.double().mean()) / reference.cost.dense
    models |= {rule: PrunedViT(dense, rule=rule, budget=ratio).eval() for rule in ("topk", "evit", "tome")}
    models["unpruned"] = PrunedViT(dense, rule="none").eval()
    cost = {n: float(m(x, details=True)[1].macs.double().mean()) / reference.cost.dense for n, m in models.items()}
    return {"dense": dense, **models}, {"dense": 1.0, **cost}


def timed(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """A call that has finished when it returns."""

    def call() -> None:
        with torch.no_grad():
            model(x)
        if x.is_cuda:
            torch.cuda.synchronize()

    return call


def bench(cfg: DictConfig, fabric: Fabric) -> list[dict]:
    """Measures, prints, writes cfg.out and returns the rows."""
    if cfg.precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision={cfg.precision!r}, allowed: float32, bfloat16")
    if not cfg.batches or min(cfg.batches) < 1:
        raise ValueError(f"batches={list(cfg.batches)}: batch sizes of at least 1")
    check_budget(cfg.budget)
    check_known(cfg.vit)
    table, dtype = Bench(cfg.out), getattr(torch, cfg.precision)
    for batch in cfg.batches:
        dense: Any = dense_model(cfg.vit).to(fabric.device)
        size, generator = dense.patch_embed.img_size[0], torch.Generator().manual_seed(0)
        x = torch.randn(batch, 3, size, size, generator=generator) * torch.linspace(0.5, 2, batch).view(-1, 1, 1, 1)
        x = x.to(fabric.device)
        models, cost = rivals(dense, x, cfg.budget)
        dense.to(dtype)
        calls = {name: timed(model, x.to(dtype)) for name, model in models.items()}
        times = interleaved(calls, rounds=cfg.rounds, warmup=WARMUP, seconds=cfg.seconds)
        for name in models:
            if name != "dense":
                table.add(f"{cfg.vit} {name} vs dense", times[name], times["dense"], batch=batch, macs=cost[name])
        for other in ("topk", "evit", "tome"):
            table.add(f"{cfg.vit} packed vs {other}", times["packed"], times[other], batch=batch, macs=cost["packed"])
        reached, ideal = times["dense"].median / times["packed"].median, 1 / cost["packed"]
        table.add(
            f"{cfg.vit} packed: speed over dense vs the MAC ratio",
            ideal,
            reached,
            batch=batch,
            unit="x",
            macs=cost["packed"],
        )
    return table.write()


main = script("bench", bench)


if __name__ == "__main__":
    main()
