"""Parameters and MACs of the architectures of the paper, measured on the models:  python counts.py

The models live on the meta device and two counts of the multiply-accumulates must agree: the formula of `budget.ViTCost`, and
the operations that torch dispatches in a dense forward pass."""

import torch
from omegaconf import DictConfig

from adaptive_prune.backbones import build_vit, cost_of
from adaptive_prune.model import PrunedViT
from common.metrics.ops import count_macs, count_parameters, record_counts
from common.scripts import script


def measure(name: str, locations: list[int], keep_rate: float) -> dict[str, float]:
    """{params, params_pruned, gmacs, gmacs_dispatched, gmacs_keep, floor, gmacs_code} of a model by name."""
    with torch.device("meta"):
        vit = build_vit(name=name, num_classes=1000)
        found: dict[str, float] = {"params": count_parameters(vit)["total"]}
        size = vit.patch_embed.img_size[0]  # type: ignore[union-attr,index]
        by_module = count_macs(vit, torch.zeros(1, 3, size, size))
    with torch.device("cpu"):
        pruned = PrunedViT(vit, locations=locations, budget=0.65)
    found["params_pruned"] = count_parameters(pruned)["total"]
    cost = pruned.cost
    kept = [int(cost.patches * keep_rate ** (s + 1)) for s in range(len(locations))]
    found |= {
        "gmacs": cost.dense / 1e9,
        "gmacs_dispatched": sum(n for m, n in by_module.items() if "head" not in m) / 1e9,
        "gmacs_with_heads": sum(by_module.values()) / 1e9,
        "gmacs_keep": cost.staged(kept, locations) / 1e9,
        "gmacs_code": cost_of(vit, extended="lvvit" in name).dense_without_prefix / 1e9,
        "floor": cost.floor(locations),
    }
    return found


def count(cfg: DictConfig) -> dict[str, float]:
    """`measure` of every architecture of cfg.locations, named <number>_<architecture>."""
    found: dict[str, float] = {}
    for name, locations in cfg.locations.items():
        found |= {f"{key}_{name}": v for key, v in measure(str(name), list(locations), cfg.keep_rate).items()}
    return found


main = script("counts", lambda cfg, fabric, out: record_counts(cfg, fabric, out, lambda: count(cfg)))


if __name__ == "__main__":
    main()
