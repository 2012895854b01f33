"""Draws pictures/idea.png: the four sensors' view of live faces and attacks, and which patches a branch reads.

python picture.py
"""

from pathlib import Path

import torch
from lightning_fabric import Fabric
from matplotlib.figure import Figure
from omegaconf import DictConfig

from common.data.presentation_attacks import CHANNELS, spoof_faces
from common.scripts import script
from fm_vit.checkpoint import load

NAMES = ["rgb", "depth", "ir"]
TITLES = {"rgb": "colour", "depth": "depth", "ir": "infrared"}


def draw(cfg: DictConfig) -> Path:
    """Three faces (live, print, glasses) by three sensors; red: the patches that the class token of every branch reads, the
    union of what each finds informative, in the network of cfg.weights."""
    model, config, about = load(cfg.weights)
    options = {k: config["data"][k] for k in ("size", "cue")}
    faces = spoof_faces(200, split="test", seed=cfg.seed, **options)
    kinds = faces.extra["attack"].tolist()
    chosen = [kinds.index(k) for k in (0, 1, 4)]
    images = {m: faces.images[chosen][:, CHANNELS[m]].expand(-1, 3, -1, -1) for m in NAMES}
    with torch.no_grad():
        alone, masks = model({m: x * 2 - 1 for m, x in images.items()}, [[m] for m in NAMES] + [NAMES], with_masks=True)
    grid = about["size"] // config["model"]["vit"]["patch_size"]
    figure = Figure(figsize=(8.4, 4.3), layout="constrained")
    axes = figure.subplots(3, 7)
    for i, kind in enumerate(("live", "print attack", "fake eyes")):
        for j, m in enumerate(NAMES):
            axes[i][j].imshow(images[m][i].permute(1, 2, 0).numpy())
            axes[i][j].set_title(TITLES[m] if i == 0 else "", fontsize=9)
            own = masks[j][-1][m][i].reshape(1, 1, grid, grid).float()
            show(axes[i][3 + j], images[m][i], own, about["size"])
            axes[i][3 + j].set_title(f"{TITLES[m]}'s own" if i == 0 else "", fontsize=9)
        union = masks[-1][-1]["rgb"][i].reshape(1, 1, grid, grid).float()
        show(axes[i][6], images["rgb"][i], union, about["size"])
        axes[i][6].set_title("all together" if i == 0 else "", fontsize=9)
        axes[i][0].set_ylabel(kind, fontsize=9)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    figure.suptitle("three sensors, and the patches (bright) that mutual attention lets a branch read", fontsize=10)
    out = Path(cfg.out).expanduser()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    print(f"written to {out}")
    return out


def show(ax, image: torch.Tensor, mask: torch.Tensor, size: int) -> None:
    """The image, dark where the mask (1, 1, grid, grid) is 0."""
    wide = torch.nn.functional.interpolate(mask, size=(size, size), mode="nearest")[0, 0]
    ax.imshow((image * (0.15 + 0.85 * wide)).permute(1, 2, 0).numpy())


@script("picture")
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    draw(cfg)


if __name__ == "__main__":
    main()
