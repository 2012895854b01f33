"""Draws the picture of the README: what DA does to the queries, and which boxes FQM matches.

python picture.py [out=results/idea.png]      trains a teacher and two students on generated scenes, a few minutes
"""

import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from hydra import compose
from lightning_fabric import Fabric
from matplotlib.patches import Rectangle
from omegaconf import DictConfig
from torch import Tensor
from torchvision.ops import box_convert

from common.scripts import script
from q_detr.checkpoint import load
from q_detr.data import Prepared
from q_detr.foreground_query_matching import foreground_queries, matched_teacher_queries
from q_detr.held_out import held_out_batch, held_out_set
from q_detr.queries import cross_attention_queries, foreground
from q_detr.train import fit

IMAGES, COLOURS = 60, ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#0072b2", "#f0e442", "#000000")


def train(fabric: Fabric, folder: Path, name: str, *overrides: str) -> Path:
    """last.ckpt of an arm of a tiny SMCA-DETR, which learns sooner than a plain DETR."""
    cfg = compose("config", [f"arm={name}", "model.kind=smca", "fabric.accelerator=cpu", *overrides])
    fit(cfg, fabric, folder / name)
    return folder / name / "last.ckpt"


def histograms(axes: list, queries: dict[str, Tensor]) -> None:
    """Queries (B, heads, Q, d) of one decoder layer as they enter the quantiser, a panel for each checkpoint."""
    for axis, (title, q), colour in zip(axes, queries.items(), ("#999999", "#56b4e9"), strict=True):
        values = q.flatten().numpy()
        axis.hist(values, bins=np.linspace(-4, 4, 65), density=True, color=colour)
        spread = q.var(-1).log().std()
        axis.set_title(f"{title}\nvariance per query: spread {spread:.2f}", fontsize=9)
        axis.set_yticks([])
        axis.set_xlabel("query entering the 8-bit quantiser", fontsize=8)
        axis.tick_params(labelsize=8)


def matches(axis, image: Tensor, truth: Tensor, teacher: dict, student: dict) -> None:
    """Kept student boxes (solid) and the teacher boxes that they learn from (dashed); other student boxes thin and grey."""
    height, width = image.shape[-2:]
    axis.imshow(image.permute(1, 2, 0).numpy(), extent=(0, width, height, 0))

    def frame(box: Tensor, **style) -> tuple[float, float]:
        x0, y0, x1, y1 = (box_convert(box, "cxcywh", "xyxy") * torch.tensor([width, height, width, height])).tolist()
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **style))
        return (x0 + x1) / 2, (y0 + y1) / 2

    kept = foreground_queries(student["pred_boxes"], [truth])[0]
    partner = matched_teacher_queries(student["pred_boxes"], teacher["pred_boxes"])[0]
    for j, keep in enumerate(kept.tolist()):
        if not keep:
            frame(student["pred_boxes"][0, j], edgecolor="#dddddd", linewidth=0.8)
            continue
        colour = COLOURS[j % len(COLOURS)]
        a = frame(student["pred_boxes"][0, j], edgecolor=colour, linewidth=2)
        b = frame(teacher["pred_boxes"][0, partner[j]], edgecolor=colour, linewidth=2, linestyle="--")
        axis.plot(*zip(a, b, strict=True), color=colour, linewidth=1, marker=".")
    axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])


@torch.no_grad()
def draw(teacher_file: Path, students: dict[str, Path], out: Path) -> None:
    teacher = load(teacher_file)
    held_out = held_out_set({"seed": 0, **teacher.config["data"]})
    images, mask, _ = held_out_batch(held_out, range(IMAGES), torch.device("cpu"), None)
    queries, outputs = {}, {}
    for title, file in students.items():
        seen, outputs[title] = cross_attention_queries(load(file).model, images, mask)
        queries[title] = seen[-1][0]
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
    histograms(list(axes[:2]), queries)
    theirs, ours = teacher.model(images, mask), outputs[list(students)[-1]]
    items = Prepared(held_out)
    full = [i for i in range(IMAGES) if len(items[i][1]["boxes"]) == 3]
    full = sorted(full, key=lambda i: -float(foreground(theirs, teacher.about["loss"])[i].topk(3).values.min()))[:2]
    for axis, i in zip(axes[2:], full, strict=True):
        pair = ({k: o[k][i : i + 1] for k in ("pred_boxes", "pred_logits")} for o in (theirs, ours))
        matches(axis, held_out.image(i).as_subclass(Tensor), items[i][1]["boxes"], *pair)
        axis.set_title(
            "FQM: student boxes (solid) near objects\nand the teacher's they learn from (dashed)", fontsize=9
        )
    figure.savefig(out, dpi=90)
    plt.close(figure)


@script("picture")
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        teacher = train(fabric, folder, "teacher", "method=teacher", "train.epochs=10")
        own = [f"teacher.weights={teacher}", "method.start=teacher", "train.epochs=2"]
        students = {
            "2-bit baseline": train(fabric, folder, "baseline", "method=baseline", *own),
            "Q-DETR: with DA": train(fabric, folder, "drd", "method=drd", *own),
        }
        draw(teacher, students, Path(cfg.out).expanduser())
    print(f"written to {cfg.out}")


if __name__ == "__main__":
    main()
