"""What quantisation does to the attention of networks, side by side: histograms of queries and keys, entropy of their codes,
attention distance, and the divergence of attention maps from those of the first network.

python diagnose.py weights=[runs/default/fp/seed0/last.ckpt,runs/default/both/seed0/last.ckpt] out=diagnose.png

Writes the figure and, beside it, all that it is drawn from as JSON."""

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
BINS = 60
Row = dict[str, list[Any]]  # what: an entry per block


@torch.no_grad()
def diagnose(model: nn.Module, images: Tensor, reference: list[Tensor] | None) -> tuple[Row, list[Tensor]]:
    """({what: an entry per block}, attention maps) of a ViT on images (B, C, H, W).

    attention_distance in pixels; q_variance, k_variance before quantisation; q_entropy, k_entropy in bits, [] for real q and k;
    q_histogram, k_histogram: {low, high, density}; attention_divergence in nats from the maps `reference`, where those have the
    same shape. ValueError for windows (Swin), which have no common grid."""
    quantised = any(isinstance(m, QuantAttention) for m in model.modules())
    taps = Tapped(model.eval(), "pre_quant" if quantised else "raw")
    qk = taps(images)[1]
    taps.remove()
    if qk[0][0].shape[0] != len(images):
        raise ValueError("diagnose is for ViT and DeiT: the windows of Swin have no common grid")
    maps, prefix = attention_maps(model, images), prefix_tokens(model)
    size: Any = model.patch_embed
    found: Row = {
        "attention_distance": [attention_distance(p, size.grid_size, prefix=prefix) * size.patch_size[0] for p in maps]
    }
    for which, values in (("q", [q for q, _ in qk]), ("k", [k for _, k in qk])):
        found[f"{which}_variance"] = [x.double().var(correction=0).item() for x in values]
        found[f"{which}_entropy"] = code_entropies(model, images, which)  # pyright: ignore[reportArgumentType]
        found[f"{which}_histogram"] = [histogram(x) for x in values]
    if reference is not None and [p.shape for p in reference] == [p.shape for p in maps]:
        found["attention_divergence"] = [attention_divergence(a, b) for a, b in zip(reference, maps, strict=True)]
    return found, maps


def histogram(values: Tensor) -> dict[str, Any]:
    """{low, high, density: of BINS equal bins between them} of all values but the outermost half percent on each side."""
    flat = values.flatten().double().cpu().numpy()
    low, high = np.quantile(flat, [0.005, 0.995])
    if low == high:  # one value
        low, high = low - 0.5, high + 0.5
    density, _ = np.histogram(flat, BINS, range=(low, high), density=True)
    return {"low": float(low), "high": float(high), "density": [round(float(d), 5) for d in density]}


# ----------------------------------------------------------------------------------------------------------- the figure
def draw(table: dict[str, Row], out: Path) -> None:
    """The figure of {name of a network: its numbers}: a column of histograms per network, a ridge per block, and below them
    four numbers of every block, a colour per network."""
    networks, blocks = list(table), len(next(iter(table.values()))["q_variance"])
    figure = plt.figure(figsize=(max(2.2 * len(networks), 10), 5.4 + 0.25 * blocks), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[1 + 0.25 * blocks, 1.5])
    top, bottom = parts
    axes = top.subplots(2, len(networks), sharex="row", sharey=True, squeeze=False)
    for line, (which, word) in enumerate((("q", "queries"), ("k", "keys"))):
        for axis, name, colour in zip(axes[line], networks, _colours(table), strict=True):
            _ridges(axis, table[name][f"{which}_histogram"], table[name][f"{which}_entropy"], colour)
            axis.set_xlabel(f"value of {word}", fontsize=8)
        axes[line, 0].set_ylabel(f"{word}: block", fontsize=8)
    for axis, name, colour in zip(axes[0], networks, _colours(table), strict=True):
        axis.set_title(name, fontsize=10, color=colour)
    axes[0, 0].set(yticks=range(blocks), yticklabels=range(1, blocks + 1), ylim=(blocks - 0.8, -1.05))
    top.suptitle("Before quantisation; at the right the entropy of the codes", fontsize=10)
    _lines(bottom.subplots(1, 4), table, networks[0])
    figure.savefig(out, dpi=100)
    plt.close(figure)


def _colours(table: dict[str, Row]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(table))]


def _ridges(axis: Any, histograms: list[dict[str, Any]], entropies: list[float], colour: str) -> None:
    """The density of every block above its line, scaled to its own highest bin."""
    for block, h in enumerate(histograms):
        density = np.asarray(h["density"])
        edges = np.linspace(h["low"], h["high"], len(density) + 1)
        axis.stairs(block - 0.85 * density / density.max(), edges, baseline=block, fill=True, color=colour, alpha=0.6)
        if entropies:
            place = {"transform": axis.get_yaxis_transform(), "ha": "right", "va": "bottom", "fontsize": 7}
            axis.text(0.99, block - 0.3, f"{entropies[block]:.2f} bit", **place)
    axis.tick_params(labelsize=7)


def _lines(axes: Any, table: dict[str, Row], first: str) -> None:
    """Entropy, variance, attention distance and divergence by block."""
    blocks = range(1, len(table[first]["q_variance"]) + 1)
    for (name, row), colour in zip(table.items(), _colours(table), strict=True):
        entropy = [(a + b) / 2 for a, b in zip(row["q_entropy"], row["k_entropy"], strict=True)]
        series = (entropy, row["q_variance"], row["attention_distance"], row.get("attention_divergence"))
        for axis, values in zip(axes, series, strict=True):
            if values:
                axis.plot(blocks, values, "o-", color=colour, markersize=4, label=name)
    titles = (
        ("entropy of the codes (mean of q, k)", "bit"), ("variance of the queries", "squared units of q"),
        ("attention distance", "pixels"), ("divergence of the attention maps", f"nats, from {first}"),
    )  # fmt: skip
    for axis, (title, unit) in zip(axes, titles, strict=True):
        axis.set_xlabel("block", fontsize=8)
        axis.set_ylabel(unit, fontsize=8)
        axis.set_xticks(blocks)
        axis.set_title(title, fontsize=8.5)
        axis.tick_params(labelsize=7)
    axes[0].figure.legend(
        *axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=8
    )


def run(cfg: DictConfig, fabric: Fabric) -> dict[str, Row]:
    """Writes cfg.out and the JSON beside it; returns {network: {what: an entry per block}}."""
    weights = [cfg.weights] if isinstance(cfg.weights, str) else list(cfg.weights)
    out, table, reference = Path(cfg.out).expanduser(), {}, None
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"out={cfg.out}: give a name that ends in .png, .pdf or .svg")
    if cfg.names is not None and not len(cfg.names) == len(set(cfg.names)) == len(weights):
        raise ValueError(f"names={list(cfg.names)}: give {len(weights)} different names, one per network")
    for i, path in enumerate(weights):
        trained = load(path, bits=cfg.bits)
        test, _ = test_images(trained, cfg.data)
        images = torch.stack([test[i][0] for i in range(min(cfg.statistics_images, len(test)))]).to(fabric.device)  # type: ignore[arg-type]
        found, maps = diagnose(trained.model.to(fabric.device), images, reference)
        reference = reference or maps
        name = cfg.names[i] if cfg.names else trained.config.get("arm") or Path(path).stem
        table[name if name not in table else f"{name} {i + 1}"] = found
    if len(depths := {len(row["q_variance"]) for row in table.values()}) > 1:
        raise ValueError(f"networks of {sorted(depths)} blocks cannot be set side by side: give networks of one depth")
    for name in [n for n, row in table.items() if len(table) > 1 and "attention_divergence" not in row][1:]:
        print(f"{name}: other tokens or heads than the first network, no divergence of attention")
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(table, out)
    out.with_suffix(".json").write_text(json.dumps(table) + "\n")
    print(f"{len(table)} networks, {cfg.statistics_images} images: {out}, {out.with_suffix('.json')}")
    return table


main = script("diagnose", run)


if __name__ == "__main__":
    main()
