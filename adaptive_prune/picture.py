"""Pictures: which tokens stay, after every threshold; accuracy over MACs and kept tokens over content, from recorded runs.

python picture.py                                             pictures/idea.png from runs/default/as/seed0, which train.py leaves
python picture.py weights=<checkpoint of train.py> data.root=/datasets/fashion_mnist out=kept.png
python picture.py scale=real_fashion_mnist out=pictures/real_fashion_mnist.png      from results/<scale>/cells.csv
"""

import csv
from pathlib import Path
from typing import Any

import matplotlib
import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf

from adaptive_prune.checkpoint import load
from adaptive_prune.data import Data
from adaptive_prune.evaluate import data_of
from adaptive_prune.metrics import quarters
from adaptive_prune.predict import overlay
from common.scripts import script

PAPER = Path(__file__).resolve().parent
NAMES = {
    "as": "AS-ViT", "topk_matched": "top-k, AS-ViT's mean counts", "topk_geometric": "top-k, geometric counts",
    "frozen_quantiles": "frozen quantiles", "evit": "EViT", "tome": "ToMe", "dense": "dense, fine-tuned",
}  # fmt: skip
LINES = ("as", "topk_matched", "frozen_quantiles")


def chosen(data: Data, amounts: list[int]) -> list[tuple[int, str]]:
    """(test image, its title) for each amount of content: the first with so many digits, or the first of that quarter by the size
    of its object whose class is not shown yet. ValueError for a set that does not know."""
    if not data.truth:
        raise ValueError(f"{data.name} does not know what its images show: no picture by amount of content")
    if "k" in data.truth:
        ks = data.truth["k"]
        return [(int((ks == k).nonzero()[0]), "1 digit" if k == 1 else f"{k} digits") for k in amounts]
    by_size, found = quarters(data.truth["masks"].flatten(1).sum(1)), []
    for k in amounts:
        shown = {title for _, title in found}
        at = next(
            i for i in (by_size == k).nonzero().flatten().tolist() if data.classes[int(data.test[i][1])] not in shown
        )
        found.append((at, data.classes[int(data.test[at][1])]))
    return found


@torch.no_grad()
def draw(cfg: DictConfig) -> Path:
    """One row per amount of content: the image, and what is kept in every stage, with the counts above it."""
    from matplotlib import pyplot as plt

    trained = load(cfg.weights)
    data = data_of(trained, OmegaConf.to_container(cfg.data))
    rows = chosen(data, list(cfg.amounts))
    images = torch.stack([data.test[i][0] for i, _ in rows])
    _, info = trained.model(images, details=True)
    stages, n = info.masks.shape[1:]
    figure, axes = plt.subplots(len(rows), stages + 1, figsize=(1.7 * (stages + 1), 1.75 * len(rows)), squeeze=False)
    for (_, title), axs, image, masks in zip(rows, axes, images, info.masks, strict=True):
        titles = [f"{title}, {n} tokens", *(f"threshold {s + 1}: {int(m.sum())} kept" for s, m in enumerate(masks))]
        for axis, mask, text in zip(axs, [torch.ones(n), *masks], titles, strict=True):
            axis.imshow(overlay(-image, mask))  # dark on white: what is dropped is white
            axis.set_title(text, fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
    figure.tight_layout(pad=0.4)
    return save(figure, cfg.out)


def recorded(scale: str) -> dict[str, list[dict[str, float]]]:
    """{arm, also <arm>/<overrides>: metrics of its seeds} of results/<scale>/cells.csv. FileNotFoundError without a record."""
    file, arms = PAPER / "results" / scale / "cells.csv", {}
    if not file.is_file():
        raise FileNotFoundError(f"{file}: nothing recorded at scale {scale}")
    with file.open() as lines:
        for row in csv.DictReader(lines):
            values = {k: float(v) for k, v in row.items() if v and k not in ("arm", "status")}
            arms.setdefault(row["arm"], []).append(values)
    return arms


def curves(cfg: DictConfig) -> Path:
    """Left: top-1 over MACs, a point per arm and budget, lines join the budgets of an arm; right: the share of the tokens that is
    kept, by the amount of content. Bars: standard deviation over the seeds."""
    from matplotlib import pyplot as plt

    arms = recorded(cfg.scale)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for (name, label), colour in zip(NAMES.items(), plt.get_cmap("tab10").colors, strict=False):
        budgets = [runs for arm, runs in arms.items() if arm.split("/")[0] == name and "macs" in runs[0]]
        points = sorted(_summary(runs, "macs")[:1] + _summary(runs, "top1") for runs in budgets)
        if not points:
            continue
        x, y, e = zip(*points, strict=True)
        left.errorbar(x, y, e, fmt="o-", color=colour, label=label, markersize=5, capsize=2, linewidth=1.2)
        ks = sorted(k for k in arms[name][0] if k.startswith("kept_k") and k != "kept_corr")
        if name in LINES and ks:
            y, e = zip(*(_summary(arms[name], k) for k in ks), strict=True)
            amounts = [int(k.removeprefix("kept_k")) for k in ks]
            right.errorbar(amounts, y, e, fmt="o-", color=colour, label=label, markersize=5, capsize=2)
            right.set_xticks(amounts)
    left.set(xlabel="multiply-accumulates per image, relative to the dense model", ylabel="top-1 accuracy, %")
    right.set(xlabel=cfg.content, ylabel="tokens kept, share of all (mean over blocks)")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    return save(figure, cfg.out)


def _summary(runs: list[dict[str, float]], metric: str) -> tuple[float, float]:
    values = torch.tensor([run[metric] for run in runs], dtype=torch.float64)
    return values.mean().item(), values.std().item() if len(values) > 1 else 0.0


def save(figure: Any, out: str) -> Path:
    from matplotlib import pyplot as plt

    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


@script("picture")
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    matplotlib.use("Agg")
    print(curves(cfg) if cfg.scale is not None else draw(cfg))


if __name__ == "__main__":
    main()
