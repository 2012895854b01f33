"""The figures of an evaluation: subsets against error rates, DET curves, and the patches that mutual attention selects."""

import math
from collections.abc import Mapping, Sequence
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


def plot_selection(
    images: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray], read: np.ndarray, kinds: Sequence[str], path: Path
) -> None:
    """Faces against sensors: the patches that each branch finds informative by itself, others dark; then how many branches
    chose a patch, with a number on those that are read when all sensors are there.

    images: (n, 3, H, W) in 0..1 of every modality; own: (n, N) bool of every modality; read: (n, N) bool, N a square; kinds: of
    every face."""
    names, n = list(images), len(kinds)
    side, height = math.isqrt(read.shape[1]), next(iter(images.values())).shape[2]
    figure = Figure(figsize=(1.5 * (len(names) + 1) + 0.9, 1.5 * n + 0.9), layout="constrained")
    axes = figure.subplots(n, len(names) + 1, squeeze=False)
    votes = sum(own[m].astype(int) for m in names).reshape(n, side, side)  # type: ignore[union-attr]
    for i in range(n):
        for ax, m in zip(axes[i], names, strict=False):
            bright = np.kron(own[m][i].reshape(side, side), np.ones((height // side, height // side)))
            ax.imshow(images[m][i].transpose(1, 2, 0) * (0.25 + 0.75 * bright[..., None]))
        last: Axes = axes[i, -1]
        last.imshow(votes[i], cmap="Greens", vmin=0, vmax=len(names))
        for y, x in zip(*np.nonzero(read[i].reshape(side, side)), strict=True):
            last.text(x, y, votes[i, y, x], ha="center", va="center", fontsize=6)
        axes[i, 0].set_ylabel(kinds[i], fontsize=8)
    for ax, title in zip(axes[0], [*names, "chosen by"], strict=True):
        ax.set_title(title, fontsize=9)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    shares = ", ".join(f"{m} {100 * own[m].mean():.0f} %" for m in names)
    figure.suptitle(f"patches chosen: {shares}; read with all sensors: {100 * read.mean():.0f} %", fontsize=9)
    figure.savefig(path, dpi=130)
