"""Draws pictures/idea.png: what three sensors see of live faces and attacks, and how the branches of FM-ViT use it.

python picture.py
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from omegaconf import DictConfig
from PIL import Image

from common.data.presentation_attacks import CHANNELS, spoof_faces
from common.scripts import script

NAMES = {"rgb": "colour", "depth": "depth", "ir": "infrared"}
ROWS = {0: "live", 1: "print", 4: "fake eyes"}  # by species
COLOURS = {"rgb": "#4878cf", "depth": "#6acc65", "ir": "#d65f5f"}


def draw(cfg: DictConfig) -> Path:
    """Left: three faces of the generator by three sensors, and the patches in which the attack is: hardly to be seen in colour,
    clear and at the same place in depth and infrared. Right: one branch per sensor and what each class token reads."""
    faces = spoof_faces(60, split="test", seed=cfg.seed, size=48)
    places, kinds = (faces.masks, faces.extra["attack"].tolist())  # pyright: ignore[reportOptionalSubscript]
    figure = Figure(figsize=(9.2, 3.7), layout="constrained")
    grid = figure.add_gridspec(3, 8)
    for i, (kind, row) in enumerate(ROWS.items()):
        k = kinds.index(kind)
        images = {m: faces.images[k, CHANNELS[m]].expand(3, -1, -1) for m in NAMES}
        where = torch.nn.functional.max_pool2d(places[k][None].float(), 8)  # type: ignore[index]  # patches of 8 x 8
        wide = where.repeat_interleave(8, 1).repeat_interleave(8, 2)
        shown = [*images.values(), images["rgb"] * (0.15 + 0.85 * wide)]
        for j, (title, image) in enumerate(zip([*NAMES.values(), "where it is"], shown, strict=True)):
            ax = figure.add_subplot(grid[i, j])
            ax.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
            ax.set(xticks=[], yticks=[])
            ax.set_title(title if i == 0 else "", fontsize=9)
            ax.set_ylabel(row if j == 0 else "", fontsize=9)
    branches(figure.add_subplot(grid[:, 4:]))
    out = Path(cfg.out).expanduser()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    with Image.open(out) as image:  # 128 colours are a third of the bytes
        small = image.convert("RGB").quantize(128)
    small.save(out, optimize=True)
    print(f"written to {out}")
    return out


def branches(ax) -> None:
    """Three branches, the cross-modal block, and the score of whichever sensors are there."""
    ax.set(xlim=(0, 10), ylim=(0, 9.4))
    ax.axis("off")
    for i, (m, name) in enumerate(NAMES.items()):
        y = 7.2 - 2.6 * i
        box(ax, 0.2, y, 2.5, f"{name}\nViT", COLOURS[m])
        box(ax, 7.6, y, 2.2, "class token\nlive?", COLOURS[m])
        for j in range(3):  # every branch reads the patches of all
            ax.annotate(
                "", (7.5, y + 0.6), (5.9, 7.8 - 2.6 * j), arrowprops={"arrowstyle": "->", "color": "0.6", "lw": 0.8}
            )
        ax.annotate("", (3.5, y + 0.6), (2.9, y + 0.6), arrowprops={"arrowstyle": "->", "color": "0.3"})
    ax.add_patch(FancyBboxPatch((3.5, 1.7), 2.3, 7.0, boxstyle="round,pad=0.1", facecolor="0.95", edgecolor="0.4"))
    text = "mutual attention:\nread the patches\nthat ANY sensor\nfinds informative\n\nfusion attention:\nthen those of all"
    ax.text(4.65, 5.2, text, ha="center", va="center", fontsize=7.8)
    ax.text(
        5, 0.5, "score: mean over the sensors that are there; absent is absent, not zeros", ha="center", fontsize=8.5
    )


def box(ax, x: float, y: float, width: float, text: str, colour: str) -> None:
    ax.add_patch(
        FancyBboxPatch((x, y), width, 1.3, boxstyle="round,pad=0.1", facecolor=colour, alpha=0.35, edgecolor=colour)
    )
    ax.text(x + width / 2, y + 0.65, text, ha="center", va="center", fontsize=8.5)


main = script("picture", draw)


if __name__ == "__main__":
    main()
