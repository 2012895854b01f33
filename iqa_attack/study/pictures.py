"""Pictures of an attack: original, attacked, amplified difference and quality map side by side; the transfer matrix."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from iqa_attack.fidelities.fidelity import grey, ssim_maps

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def amplified(x: Tensor, x0: Tensor, factor: float) -> Tensor:
    """0.5 + factor (x - x0), clamped: grey where nothing changed."""
    return (0.5 + factor * (x - x0)).clamp(0, 1)


def panel(
    x0: Tensor, x: Tensor, path: str | Path, *, title: str, before: dict[str, float], after: dict[str, float]
) -> None:
    """Four pictures of one image (3, H, W) and the scores of every model before and after, as PNG."""
    largest = float((x - x0).abs().max())
    factor = 0.5 / largest if largest > 0 else 1.0
    quality = ssim_maps(grey(x[None]), grey(x0[None]), padding="replicate")[0][0, 0]
    figure, axes = plt.subplots(1, 5, figsize=(14, 3.2), width_ratios=[1, 1, 1, 1.12, 0.9], layout="constrained")
    shown = (
        (x0, "original"),
        (x, "attacked"),
        (amplified(x, x0, factor), f"difference x {factor:.0f}, largest {255 * largest:.0f}/255"),
    )
    for ax, (image, label) in zip(axes[:3], shown, strict=True):
        ax.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        ax.set_title(label, fontsize=9)
    drawn = axes[3].imshow(
        quality.numpy(), cmap="viridis", vmin=min(0.8, float(quality.min())), vmax=1, interpolation="nearest"
    )
    axes[3].set_title("quality map (SSIM)", fontsize=9)
    figure.colorbar(drawn, ax=axes[3], fraction=0.046)
    for ax in axes:
        ax.set_axis_off()
    lines = [
        f"{'score, 0..10':14s}{'before':>7s}{'after':>7s}",
        *(f"{n:14s}{b:7.2f}{after[n]:7.2f}" for n, b in before.items()),
    ]
    axes[4].text(0, 0.5, "\n".join(lines), family="monospace", fontsize=9, va="center", transform=axes[4].transAxes)
    figure.suptitle(title, fontsize=10)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def transfer_matrix(
    r: np.ndarray, evaluated: Sequence[str], attacked: Sequence[str], path: str | Path, *, title: str
) -> None:
    """r (evaluated, attacked): R of every model (rows) on the counterexamples of every model (columns), as PNG."""
    figure, ax = plt.subplots(figsize=(1.4 + 1.1 * len(attacked), 1.2 + 0.6 * len(evaluated)), layout="constrained")
    drawn = ax.imshow(r, cmap="viridis", vmin=0, vmax=max(5.0, float(np.nanmax(r))), aspect="auto")
    for (i, j), value in np.ndenumerate(r):
        ax.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value < 3 else "black", fontsize=9)
    ax.set_xticks(range(len(attacked)), attacked, rotation=30, ha="right", fontsize=8)
    ax.set_yticks(range(len(evaluated)), evaluated, fontsize=8)
    ax.set_xlabel("counterexamples of")
    ax.set_ylabel("evaluated")
    ax.set_title(title, fontsize=10)
    figure.colorbar(drawn, ax=ax, label="R, larger = more stable")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def amplified_png(x: Tensor, x0: Tensor) -> Tensor:
    """The difference so amplified that its largest value reaches the end of the range."""
    largest = float((x - x0).abs().max())
    return amplified(x, x0, 0.5 / largest) if largest > 0 else torch.full_like(x, 0.5)


def sensitivity_maps(x: Tensor, maps: dict[str, Tensor], path: str | Path) -> None:
    """Of every image (n, 3, H, W) the sizes of the gradients (n, H, W) of every model, each up to its 99th percentile, as PNG."""
    figure, axes = plt.subplots(
        len(x), 1 + len(maps), figsize=(2.3 * (1 + len(maps)), 2.4 * len(x)), layout="constrained", squeeze=False
    )
    for i, row in enumerate(axes):
        row[0].imshow(x[i].permute(1, 2, 0).numpy(), interpolation="nearest")
        for ax, (name, found) in zip(row[1:], maps.items(), strict=True):
            top = max(float(found[i].flatten().double().quantile(0.99)), 1e-30)
            ax.imshow((found[i] / top).clamp(0, 1).numpy(), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
            if i == 0:
                ax.set_title(name, fontsize=9)
        for ax in row:
            ax.set_axis_off()
    axes[0, 0].set_title("image", fontsize=9)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)
