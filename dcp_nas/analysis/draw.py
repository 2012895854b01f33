"""Pictures of a search: the cells of a genotype, and how alpha, skips and the tangent went."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from dcp_nas.search_space import Genotype, operations

COLOURS = {
    "max": "#7f7f7f",
    "avg": "#b0b0b0",
    "skip": "#d62728",
    "sep": "#1f77b4",
    "dil": "#2ca02c",
    "noise": "#9467bd",
}


def draw_cells(genotype: Genotype, path: str | Path) -> None:
    """Both cells as graphs, one row of nodes each; operations on the edges."""
    figure, axes = plt.subplots(2, 1, figsize=(2.2 * (genotype.nodes + 2), 9), layout="constrained")
    for axis, (kind, edges) in zip(axes, (("normal", genotype.normal), ("reduction", genotype.reduce)), strict=True):
        names = ["c(k-2)", "c(k-1)", *map(str, range(genotype.nodes)), "concat"]
        where = [
            (0.0, 0.6),
            (0.0, -0.6),
            *((2.0 * (j + 1), 0.0) for j in range(genotype.nodes)),
            (2.0 * (genotype.nodes + 1), 0),
        ]
        for k, (name, source) in enumerate(edges):
            node = 2 + k // 2
            (x0, y0), (x1, y1) = where[source], where[node]
            bend = (
                (0.16 + 0.13 * (node - source - 2)) * (1 if k % 2 else -1)
                if source >= 2
                else 0.1 * (1 if source else -1)
            )
            colour = COLOURS[name.split("_")[0]]
            arrow = {
                "arrowstyle": "-|>",
                "color": colour,
                "connectionstyle": f"arc3,rad={bend}",
                "shrinkA": 14,
                "shrinkB": 14,
            }
            axis.annotate("", (x1, y1), (x0, y0), arrowprops=arrow)
            at = ((x0 + x1) / 2 + bend * (y1 - y0) / 2, (y0 + y1) / 2 - bend * (x1 - x0) / 2)
            axis.text(*at, name.replace("_conv_", " ").replace("_connect", "").replace("_pool_", " "), color=colour, fontsize=9,
                      ha="center", va="center", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
        for j in range(genotype.nodes):
            arrow = {
                "arrowstyle": "-",
                "color": "#dddddd",
                "connectionstyle": "arc3,rad=0.3",
                "shrinkA": 14,
                "shrinkB": 14,
            }
            axis.annotate("", where[-1], where[2 + j], arrowprops=arrow, zorder=0)
        for name, (x, y) in zip(names, where, strict=True):
            box = {"boxstyle": "round,pad=0.4", "facecolor": "#f2f2f2", "edgecolor": "black"}
            axis.text(x, y, name, ha="center", va="center", bbox=box)
        axis.set(xlim=(-0.7, where[-1][0] + 0.7), ylim=(-1.8, 1.5), title=f"{kind} cell", aspect="equal")
        axis.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_search(
    trajectory: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], order: str, path: str | Path
) -> None:
    """Softmax weights of the operations (mean over the edges of the normal and the reduction cell), skip connections, the cosine
    of Parent and Child gradients, the relative size of the tangent term. trajectory: one entry per phase, the start first."""
    figure, axes = plt.subplots(1, 4, figsize=(18, 4), layout="constrained")
    for axis, kind in zip(axes, ("normal", "reduce"), strict=False):
        alpha = np.array([entry[kind] for entry in trajectory])  # (phases, E, M)
        weights = np.exp(alpha - alpha.max(-1, keepdims=True))
        weights = (weights / weights.sum(-1, keepdims=True)).mean(1)
        for m, name in enumerate(operations(order)):
            axis.plot(weights[:, m], label=name, marker="o", markersize=3)
        axis.set(title=f"softmax(alpha), {kind} cell, mean over edges", xlabel="phase")
    axes[0].legend(fontsize=7)
    axes[2].step(range(len(trajectory)), [entry["skips"] for entry in trajectory], where="mid")
    axes[2].set(title="skip connections in the normal cell", xlabel="phase", ylim=(-0.2, None))
    for key, style in (("gradient_cosine", "C0o-"), ("tangent_ratio", "C3s-")):
        found = [(i + 1, row[key]) for i, row in enumerate(rows) if key in row]
        if found:
            axes[3].plot(*zip(*found, strict=True), style, label=key.replace("_", " "))
    axes[3].set(title="cos(g, t) and |tangent term| / |g|", xlabel="phase", yscale="symlog")
    axes[3].set_yscale("symlog", linthresh=1e-3)
    axes[3].axhline(0, color="black", linewidth=0.5)
    if axes[3].get_legend_handles_labels()[0]:
        axes[3].legend(fontsize=7)
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=90)
    plt.close(figure)
