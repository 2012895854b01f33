"""Draws pictures/idea.png from embedded data: which tokens stay on three grids of digits, after every threshold.

python picture.py                                             needs runs/default/as/seed0, which python train.py leaves
python picture.py weights=<checkpoint of train.py> out=idea.png
"""

from pathlib import Path

import matplotlib
import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig

from adaptive_prune.checkpoint import load
from adaptive_prune.evaluate import data_of
from adaptive_prune.predict import overlay
from common.scripts import script


@torch.no_grad()
def draw(cfg: DictConfig) -> Path:
    """One row per number of digits of cfg.digits: the grid, and what is kept in every stage, with the counts above it."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    trained = load(cfg.weights)
    data = data_of(trained, {})
    rows = [int((data.truth["k"] == k).nonzero()[0]) for k in cfg.digits]
    images = torch.stack([data.test[i][0] for i in rows])
    _, info = trained.model(images, details=True)
    stages, n = info.masks.shape[1:]
    figure, axes = plt.subplots(len(rows), stages + 1, figsize=(1.7 * (stages + 1), 1.75 * len(rows)), squeeze=False)
    for k, axs, image, masks in zip(cfg.digits, axes, images, info.masks, strict=True):
        title = "1 digit" if k == 1 else f"{k} digits"
        titles = [f"{title}, {n} tokens", *(f"threshold {s + 1}: {int(m.sum())} kept" for s, m in enumerate(masks))]
        for axis, mask, text in zip(axs, [torch.ones(n), *masks], titles, strict=True):
            axis.imshow(overlay(1 - image, mask))  # dark digits: what is dropped is white
            axis.set_title(text, fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
    figure.tight_layout(pad=0.4)
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out


@script("picture")
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    print(draw(cfg))


if __name__ == "__main__":
    main()
