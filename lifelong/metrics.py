"""The accuracy matrix of a stream and its summaries, and whether the attack weight covers the background."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

PROTOCOLS = ("class_il", "continuum", "task_il")


def summaries(matrix: Tensor, counts: Sequence[int] | None = None) -> dict[str, float]:
    """Summaries of R (T, T), R[t, k] = accuracy on task k after training on task t (NaN for k > t).

    acc: mean of the last row; overall: the same weighted by `counts`, the test images per task; aia: mean over t of the mean
    of row t; learning: mean of R[k, k]; forgetting: mean over k < T-1 of the largest R[t, k], t < T-1, minus R[T-1, k];
    bwt: mean over k < T-1 of R[T-1, k] - R[k, k]. The last two are left out for one task. In the unit of R.
    ValueError for a matrix that is not square or lacks a value at or below its diagonal."""
    matrix = matrix.double()
    size = len(matrix)
    if matrix.ndim != 2 or matrix.shape[1] != size or size == 0 or matrix.tril()[_lower(size)].isnan().any():
        raise ValueError(
            f"the accuracy matrix must be square and complete at and below the diagonal, got {matrix.tolist()}"
        )
    last = matrix[-1]
    weight = torch.ones(size, dtype=torch.double) if counts is None else torch.tensor(counts, dtype=torch.double)
    result = {
        "acc": last.mean().item(),
        "overall": (last * weight / weight.sum()).sum().item(),
        "aia": torch.stack([matrix[t, : t + 1].mean() for t in range(size)]).mean().item(),
        "learning": matrix.diagonal().mean().item(),
    }
    if size > 1:
        best = torch.stack([matrix[k : size - 1, k].max() for k in range(size - 1)])
        result["forgetting"] = (best - last[:-1]).mean().item()
        result["bwt"] = (last - matrix.diagonal())[:-1].mean().item()
    return result


def _lower(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril()


def background_gap(weight: Tensor, masks: Tensor) -> float:
    """Mean of the attack weight w (N, 1, H, W) on the background minus on the foreground; masks (N, H, W) bool."""
    w = weight[:, 0].double()
    return (w[~masks].mean() - w[masks].mean()).item()


def plot_matrix(matrices: dict[str, Tensor], path: str | Path, title: str = "") -> None:
    """The accuracy matrices (percent) side by side as a PNG: rows are training stages, columns tasks."""
    figure = Figure(figsize=(3.4 * len(matrices) + 0.6, 3.4), layout="constrained")
    for ax, (name, matrix) in zip(figure.subplots(1, len(matrices), squeeze=False)[0], matrices.items(), strict=True):
        image = ax.imshow(matrix, vmin=0, vmax=100, cmap="viridis")
        size = len(matrix)
        for t in range(size):
            for k in range(t + 1 if size <= 12 else 0):
                value = float(matrix[t, k])
                ax.text(k, t, f"{value:.0f}", ha="center", va="center", fontsize=7, color="w" if value < 60 else "k")
        ax.set(title=name, xlabel="accuracy on task", ylabel="after task", xticks=range(size), yticks=range(size))
    figure.colorbar(image, ax=figure.axes, label="%", shrink=0.8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
