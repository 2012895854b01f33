"""What quantisation does to the attention of networks, side by side: histograms of queries and keys, entropy of their codes,
attention distance, and the divergence of attention maps from those of the first network.

python diagnose.py weights=[runs/default/fp/seed0/last.ckpt,runs/default/both/seed0/last.ckpt] out=diagnose.png

Writes the figure and, beside it, the numbers as JSON."""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor, nn

from common.scripts import script
from q_vit.checkpoint import load
from q_vit.evaluate import test_images
from q_vit.metrics import attention_distance, attention_divergence, attention_maps, code_entropies
from q_vit.model import prefix_tokens
from q_vit.quantized_vit import QuantAttention, Tapped

COLOURS = ("#777777", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")


@torch.no_grad()
def diagnose(
    model: nn.Module, images: Tensor, reference: list[Tensor] | None
) -> tuple[dict[str, Any], list[Tensor], list]:
    """({what: a number per block}, attention maps, (q, k) per block before quantisation) of a ViT.

    reference: maps of another network, from which the divergence is taken. ValueError for windows (Swin)."""
    quantised = any(isinstance(m, QuantAttention) for m in model.modules())
    taps = Tapped(model.eval(), "pre_quant" if quantised else "raw")
    qk = taps(images)[1]
    taps.remove()
    if qk[0][0].shape[0] != len(images):
        raise ValueError("diagnose is for ViT and DeiT: the windows of Swin have no common grid")
    maps, prefix = attention_maps(model, images), prefix_tokens(model)
    size: Any = model.patch_embed
    found = {
        "attention_distance": [attention_distance(p, size.grid_size, prefix=prefix) * size.patch_size[0] for p in maps],
        "q_variance": [q.double().var(correction=0).item() for q, _ in qk],
        "k_variance": [k.double().var(correction=0).item() for _, k in qk],
    }
    found |= {"q_entropy": code_entropies(model, images, "q"), "k_entropy": code_entropies(model, images, "k")}
    if reference is not None and [p.shape for p in reference] == [p.shape for p in maps]:
        found["attention_divergence"] = [attention_divergence(a, b) for a, b in zip(reference, maps, strict=True)]
    return found, maps, qk


def _histogram(axis: Any, values: Tensor, colour: str, name: str) -> None:
    flat = values.flatten().float().cpu()
    low, high = np.quantile(flat.numpy(), [0.005, 0.995])
    axis.hist(flat.clamp(float(low), float(high)).numpy(), 60, histtype="step", density=True, color=colour, label=name)


def draw(names: list[str], numbers: list[dict[str, Any]], qk: list[list[tuple[Tensor, Tensor]]], out: Path) -> None:
    """The figure, a colour per network: queries and keys of (up to four) blocks, and four numbers of every block."""
    blocks = len(qk[0])
    shown = sorted({round(i * (blocks - 1) / 3) for i in range(4)})
    figure, axes = plt.subplots(3, 4, figsize=(13, 8), layout="constrained")
    for axis in axes[:2, len(shown) :].flat:
        axis.set_axis_off()
    for k, (row, pairs) in enumerate(zip(numbers, qk, strict=True)):
        colour = COLOURS[k % len(COLOURS)]
        for column, block in enumerate(shown):
            for line, (which, values) in enumerate(zip(("queries", "keys"), pairs[block], strict=True)):
                _histogram(axes[line, column], values, colour, names[k])
                axes[line, column].set_title(f"{which} before quantisation, block {block + 1}", fontsize=9)
                axes[line, column].set(xlabel="value", ylabel="density")
        series = {"attention_distance": row["attention_distance"], "variance": row["q_variance"]}
        if row["q_entropy"]:
            series["entropy"] = [(a + b) / 2 for a, b in zip(row["q_entropy"], row["k_entropy"], strict=True)]
        series |= {"divergence": row["attention_divergence"]} if "attention_divergence" in row else {}
        for axis, what in zip(axes[2], ("entropy", "variance", "attention_distance", "divergence"), strict=True):
            if what in series:
                axis.plot(range(1, blocks + 1), series[what], "o-", color=colour, markersize=4)
    titles = (
        ("entropy of the codes of q and k", "bits"), ("variance of the queries", "squared units of q"),
        ("attention distance", "pixels"), (f"divergence of attention from {names[0]}", "nats"),
    )  # fmt: skip
    for axis, (title, unit) in zip(axes[2], titles, strict=True):
        axis.set(xlabel="block", ylabel=unit, xticks=range(1, blocks + 1))
        axis.set_title(title, fontsize=9)
    axes[0, 0].legend(frameon=False, fontsize=7)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def run(cfg: DictConfig, fabric: Fabric) -> dict[str, dict[str, Any]]:
    """Writes cfg.out and the JSON beside it; returns {network: {what: a number per block}}."""
    weights = [cfg.weights] if isinstance(cfg.weights, str) else list(cfg.weights)
    out, numbers, pairs, names, reference = Path(cfg.out).expanduser(), [], [], [], None
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"out={cfg.out}: give a name that ends in .png, .pdf or .svg")
    for path in weights:
        trained = load(path, bits=cfg.bits)
        test, _ = test_images(trained, cfg.data)
        images = torch.stack([test[i][0] for i in range(min(cfg.statistics_images, len(test)))]).to(fabric.device)  # type: ignore[arg-type]
        found, maps, qk = diagnose(trained.model.to(fabric.device), images, reference)
        reference = reference or maps
        name = trained.config.get("arm") or Path(path).stem
        names.append(name if name not in names else f"{name} {len(names) + 1}")
        numbers.append(found)
        pairs.append(qk)
    if len(depths := {len(qk) for qk in pairs}) > 1:
        raise ValueError(f"networks of {sorted(depths)} blocks cannot be set side by side: give networks of one depth")
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(names, numbers, pairs, out)
    table = dict(zip(names, numbers, strict=True))
    out.with_suffix(".json").write_text(json.dumps(table, indent=1) + "\n")
    print(f"{len(names)} networks, {cfg.statistics_images} images: {out}, {out.with_suffix('.json')}")
    return table


main = script("diagnose", run)


if __name__ == "__main__":
    main()
