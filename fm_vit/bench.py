"""Latency of flexible inference as ratios of one run: one branch, all branches, and a zero-filled fusion model that needs all.

python bench.py [model.vit.name=vit_small_patch16_224] [batch=1] [threads=2]
"""

import json
import os
import platform
import statistics
import time
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from common import runs
from fm_vit.baselines import ConcatFusion
from fm_vit.model import FMViT

MODALITIES = ["rgb", "depth", "ir"]


@torch.inference_mode()
def bench(cfg: DictConfig) -> list[dict]:
    """Interleaved rounds after a warm-up; medians. Weights are random: the time does not depend on them."""
    torch.set_num_threads(cfg.threads)
    vit = runs.plain(cfg.model.vit)
    flexible, filled = FMViT(MODALITIES, vit=vit).eval(), ConcatFusion(MODALITIES, vit=vit).eval()
    size = flexible.branches["rgb"].trunk.patch_embed.img_size[0]  # type: ignore[union-attr]
    images = {m: torch.randn(cfg.batch, 3, size, size) for m in MODALITIES}
    alone = {"rgb": images["rgb"]}
    calls = {
        "one branch, RGB": lambda: flexible(alone), "three branches": lambda: flexible(images),
        "zero-filled fusion, RGB": lambda: filled(alone),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(cfg.rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_ >= 2:
                times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in times.items()}
    machine = {
        "machine": platform.processor() or platform.machine(),
        "isa": os.environ.get("ONEDNN_MAX_CPU_ISA", "native"),
    }
    rows = []
    for name in ("one branch, RGB", "three branches"):
        ratio = median["zero-filled fusion, RGB"] / median[name]
        rows.append({
            "name": name, "ours": median[name], "baseline": median["zero-filled fusion, RGB"], "ratio": ratio, "unit": "s",
            "threads": cfg.threads, "batch": cfg.batch, **machine,
        })  # fmt: skip
        print(f"{name:16s} {1000 * median[name]:8.1f} ms   {ratio:.2f}x the speed of zero-filled fusion with RGB given")
    Path(cfg.out).write_text(json.dumps(rows, indent=1) + "\n")
    return rows


@hydra.main(version_base="1.3", config_path="configs", config_name="bench")
def main(cfg: DictConfig) -> None:
    bench(cfg)


if __name__ == "__main__":
    main()
