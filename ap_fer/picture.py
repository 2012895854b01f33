"""The picture of the idea at the top of the README:  python picture.py   writes pictures/idea.png.

Trains nothing: the scores are those of a fixed edge filter; it shows how patches are dropped, not what was learned."""

from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from ap_fer.attentive_patch_pooling import patch_score
from ap_fer.predict import overlay
from common.data.faces import expression_faces

SIDE = 8


def edges(images: Tensor) -> Tensor:
    """(N, 3, S, S) -> features (N, SIDE * SIDE, 1): mean gradient of grey values in a patch."""
    grey = images.mean(1, keepdim=True)
    steps = F.pad((grey[..., 1:] - grey[..., :-1]).abs(), (0, 1)) + F.pad(
        (grey[:, :, 1:] - grey[:, :, :-1]).abs(), (0, 0, 0, 1)
    )
    return F.adaptive_avg_pool2d(steps, SIDE).flatten(2).transpose(1, 2)


def draw(out: Path) -> None:
    """Two faces: the image, what stays after APP, and after ATP in later blocks."""
    images = expression_faces(2, split="test", seed=5, size=96, occluded=0.5).images
    order = patch_score(edges(images), "sum_abs_1").argsort(1, descending=True)
    figure = Figure(figsize=(7.6, 4.0), layout="constrained")
    axes = figure.subplots(2, 4)
    stages = (
        ("image", 64),
        ("APP: the k patches with\nthe largest features", 40),
        ("ATP, block 3: tokens\nthat CLS attends to", 28),
        ("ATP, block 4", 18),
    )
    for i, (row, image, places) in enumerate(zip(axes, images, order, strict=True)):
        for axis, (title, k) in zip(row, stages, strict=True):
            kept = torch.zeros(SIDE * SIDE, dtype=torch.bool)
            kept[places[:k]] = True
            axis.imshow(overlay(image, kept).clip(0, 1))
            axis.axis("off")
            if i == 0:
                axis.set_title(title, fontsize=9)
    out.parent.mkdir(exist_ok=True)
    figure.savefig(out, dpi=90)


if __name__ == "__main__":
    draw(Path(__file__).resolve().parent / "pictures/idea.png")
