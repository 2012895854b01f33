"""The picture of the idea at the top of the README:  python picture.py   writes pictures/idea.png from the embedded digits."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch

from common.data.digits import split_per_class
from common.data.longtail import long_tail_counts
from ncl_pp.transforms import AffineNoise

GREY, HARD, TRUE = "#C8C8C8", "#D55E00", "#009E73"


def draw(out: Path) -> None:
    """A long tail of classes; one image, four augmented copies; two experts that learn from each other on the hard classes."""
    train, _ = split_per_class(permute_classes=True, seed=0)
    counts = long_tail_counts(100, 50, 10)
    figure = Figure(figsize=(10, 3.4))
    tail = figure.add_axes((0.04, 0.17, 0.2, 0.62))
    tail.bar(range(10), counts, color="#0072B2")
    tail.set(xticks=[], xlabel="classes, most frequent first", ylabel="training images")
    tail.set_title("a long tail of classes", fontsize=10)
    tail.spines[["top", "right"]].set_visible(False)

    image = train.images[train.targets == 9][:1].repeat(4, 1, 1, 1)
    noise = AffineNoise()
    copies = noise(image, *noise.draw(image.shape, torch.Generator().manual_seed(3)))
    for n, copy in enumerate(copies):
        axis = figure.add_axes((0.30, 0.70 - 0.2 * n, 0.07, 0.19))
        axis.imshow(copy[0], cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
    figure.text(0.335, 0.915, "N copies of an image", ha="center", fontsize=10)

    rng, panels = np.random.default_rng(1), {}
    for k, x in enumerate((0.46, 0.75)):
        for n in range(2):
            axis = figure.add_axes((x, 0.53 - 0.42 * n, 0.2, 0.28))
            scores = rng.uniform(0.05, 0.45, 10)
            scores[[1, 5, 7]] = rng.uniform(0.6, 0.95, 3)
            scores[9] = 0.8
            axis.bar(range(10), scores, color=[TRUE if c == 9 else HARD if c in (1, 5, 7) else GREY for c in range(10)])
            axis.set(xticks=[], yticks=[], ylim=(0, 1.1))
            axis.spines[["top", "right"]].set_visible(False)
            panels[k, n] = axis
        figure.text(x + 0.1, 0.915, f"expert {k + 1}", ha="center", fontsize=10)
    arrow = {
        "coordsA": "axes fraction",
        "coordsB": "axes fraction",
        "arrowstyle": "<->",
        "linewidth": 1.6,
        "color": "black",
    }
    for n in range(2):
        figure.add_artist(ConnectionPatch((1.02, 0.5), (-0.02, 0.5), axesA=panels[0, n], axesB=panels[1, n], **arrow))
    for k in range(2):
        figure.add_artist(ConnectionPatch((0.5, -0.06), (0.5, 1.1), axesA=panels[k, 0], axesB=panels[k, 1], **arrow))
    figure.text(0.705, 0.70, "Inter", ha="center", fontsize=9)
    for x in (0.565, 0.855):
        figure.text(x, 0.455, "Intra", ha="left", fontsize=9)
    figure.text(
        0.70,
        0.02,
        "green: the class, orange: its hard classes; distilled on all classes and, nested, on these",
        ha="center",
        fontsize=9,
    )
    out.parent.mkdir(exist_ok=True)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    draw(Path(__file__).resolve().parent / "pictures/idea.png")
