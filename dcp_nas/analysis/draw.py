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
    height = 2.2 if genotype.nodes < 3 else 3.3  # long edges are bent more
    figure, axes = plt.subplots(2, 1, figsize=(2.2 * (genotype.nodes + 2), 2 * (0.8 + height)), layout="constrained")
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
        axis.set(
            xlim=(-0.7, where[-1][0] + 0.7), ylim=(-0.55 * height, 0.45 * height), title=f"{kind} cell", aspect="equal"
        )
        axis.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_search(
    trajectory: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], order: str, path: str | Path
) -> None:
    """Softmax weights of the operations, mean over the edges of each cell, with Child rounds shaded; what the networks know and
    how much alpha decides; how the gradients of Parent and Child agree and how large the tangent term is.
    trajectory: one entry per phase, the start first; rows: the means of each phase."""
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.9), layout="constrained", width_ratios=[1.2, 1.2, 1, 1])
    names, spread = operations(order), []
    for axis, kind, title in zip(axes, ("normal", "reduce"), ("normal cell", "reduction cell"), strict=False):
        alpha = np.array([entry[kind] for entry in trajectory])  # (phases, E, M)
        weights = np.exp(alpha - alpha.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        spread.append(-(weights * np.log(weights + 1e-30)).sum(-1).mean(1) / np.log(len(names)))
        for name, values in zip(names, weights.mean(1).T, strict=True):
            kind_of, _, size = name.partition("_")
            dashes = "--" if size.endswith("5x5") or name == "max_pool_3x3" else "-"
            label = name.replace("_conv_", " ").replace("_connect", "").replace("_pool_", " ")
            axis.plot(values, dashes, label=label, color=COLOURS.get(kind_of, "#000000"), marker="o", markersize=3)
        axis.axhline(1 / len(names), color="black", linewidth=0.5, linestyle=":")
        axis.set(title=title, ylabel=r"softmax($\alpha$), mean over edges", ylim=(0, None))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    curves = {
        r"accuracy on the half for $\alpha$": [
            (i + 1, row["val_accuracy"]) for i, row in enumerate(rows) if "val_accuracy" in row
        ],
        r"entropy of softmax($\alpha$)": list(enumerate(np.mean(spread, axis=0).tolist())),
    }
    axes[2].set(title="what is known, what is decided", ylabel="share of the largest", ylim=(0, 1.03))
    gradients = {"cos(g, t)": "gradient_cosine", "|tangent term| / |g|": "tangent_ratio"}
    curves_of = {
        label: [(i + 1, row[key]) for i, row in enumerate(rows) if key in row] for label, key in gradients.items()
    }
    axes[3].set(title="Parent and Child gradients", ylim=(-1, 1))
    axes[3].set_yscale("symlog", linthresh=1e-3)
    axes[3].axhline(0, color="black", linewidth=0.5)
    for axis, found in ((axes[2], curves), (axes[3], curves_of)):
        for (label, points), style in zip(found.items(), ("C0o-", "C3s-"), strict=True):
            if points:
                axis.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        if axis.lines and axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, loc="best")
    for axis in axes:
        for i, entry in enumerate(trajectory):
            if entry["phase"].startswith("child"):
                axis.axvspan(i - 1, i, color="#f0f0f0", zorder=0)
        axis.set(
            xlabel="phase (Child rounds shaded)" if len(trajectory) > 2 else "phase", xlim=(0, len(trajectory) - 1)
        )
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=100)
    plt.close(figure)
