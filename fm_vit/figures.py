"""The figures of an evaluation: subsets against error rates, and DET curves."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SHOWN = {"acer": "ACER", "apcer": "APCER", "apcer_worst": "APCER, worst\nspecies", "bpcer": "BPCER"}


def plot_matrix(rows: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Subsets against error rates in percent at each subset's development threshold, darker is worse."""
    metrics = [m for m in SHOWN if m in next(iter(rows.values()))]
    values = np.array([[row[m] for m in metrics] for row in rows.values()])
    figure = Figure(figsize=(1.1 * len(metrics) + 2.8, 0.42 * len(rows) + 1.6), layout="constrained")
    ax: Axes = figure.subplots()
    ax.imshow(values, cmap="Oranges", vmin=0, vmax=60, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            ax.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=8)
    ax.set_xticks(range(len(metrics)), [SHOWN[m] for m in metrics], fontsize=8)
    labels = [f"{t.replace('_', ' + ')}  (at {row['threshold']:.3f})" for t, row in rows.items()]
    ax.set_yticks(range(len(rows)), labels, fontsize=8)
    ax.set_title("error rates in percent on test, one development threshold per subset", fontsize=9)
    figure.savefig(path, dpi=130)


def plot_det(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """BPCER against APCER of every subset, logarithmic."""
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    ax: Axes = figure.subplots()
    for tag, (apcer, bpcer) in curves.items():
        ax.plot(np.clip(apcer, 0.05, None), np.clip(bpcer, 0.05, None), label=tag.replace("_", " + "), linewidth=1.4)
    ax.set(xscale="log", yscale="log", xlim=(0.05, 100), ylim=(0.05, 100), xlabel="APCER (%)", ylabel="BPCER (%)")
    ax.set_title("test scores, every threshold", fontsize=9)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
