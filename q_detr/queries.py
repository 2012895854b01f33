"""What distribution alignment and query matching do, drawn from checkpoints of train.py.

python queries.py scale=mini seed=100
python queries.py checkpoints='{teacher: /a/last.ckpt, baseline: null, da: null, drd: /b/last.ckpt}' data.root=/datasets/bccd

queries.png, queries.csv: the decoder's cross-attention queries as they enter the quantiser, per layer: histogram, mean, variance
and Gaussian entropy of each checkpoint. matches.png: for a few test images, the boxes of teacher and student, the student queries
that FQM keeps and the teacher boxes matched to them. The statistics are metrics of the run."""

import csv
import shutil
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from lightning_fabric import Fabric
from matplotlib.patches import Rectangle
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchvision.ops import box_convert

from common import runs
from common.scripts import script
from q_detr.checkpoint import load
from q_detr.data import Prepared, check_data
from q_detr.distribution_alignment import DistributionAlignment, query_statistics
from q_detr.foreground_query_matching import foreground_queries, matched_teacher_queries
from q_detr.held_out import held_out_batch, held_out_set

SHOWN = {
    "query_mean": ("mean", ""), "query_variance": ("variance", ""), "query_entropy": ("entropy", " nat"),
    "query_spread": ("spread", ""),
}  # fmt: skip
SHOWN_FROM = 0.3  # the focal loss gives low scores
TITLES = ("the teacher detects", "the student detects", "FQM: who learns from whom")
TRUTH = {"edgecolor": "white", "linewidth": 2.6}
TEACHER = {"edgecolor": "#f0e442", "linewidth": 1.6}
OTHER = {"edgecolor": "black", "linewidth": 1.2}
Queries = list[tuple[Tensor, Tensor | None]]


@torch.no_grad()
def cross_attention_queries(model: Any, images: Tensor, mask: Tensor) -> tuple[Queries, dict[str, Any]]:
    """([(q as it enters the quantiser, the same before gamma and beta of DA or None) of each layer], output of the network);
    q: (B, heads, Q, d)."""
    seen: Queries = []

    def look(align: torch.nn.Module, args: tuple, out: Tensor) -> None:
        before = (out - align.beta) / align.gamma if isinstance(align, DistributionAlignment) else None
        seen.append((out, before))

    layers: Any = model.transformer["decoder"].layers
    hooks = [layer.multihead_attn.align.register_forward_hook(look) for layer in layers]
    out = model(images, mask)
    for hook in hooks:
        hook.remove()
    return seen, out


def draw_histograms(queries: dict[str, Queries], out: Path) -> None:
    """queries.png, a row per layer and a column per checkpoint, on one axis per row, and its numbers in queries.csv."""
    layers = len(next(iter(queries.values())))
    size = (3.1 * len(queries), 2.3 * layers + 0.4)
    figure, axes = plt.subplots(layers, len(queries), figsize=size, squeeze=False, sharex="row", layout="constrained")
    rows = []
    for i in range(layers):
        reach = max(np.quantile(np.abs(per[i][0].numpy()), 0.999) for per in queries.values())
        edges = np.linspace(-reach, reach, 61)
        for axis, (name, per) in zip(axes[i], queries.items(), strict=True):
            q, before = per[i]
            density, _ = np.histogram(q.numpy().ravel(), edges, density=True)
            axis.stairs(density, edges, fill=True, color="#56b4e9", label="into the quantiser")
            found = query_statistics(q)
            centre = (edges[1:] + edges[:-1]) / 2
            rows += [(name, i + 1, f"{x:.5g}", f"{p:.5g}") for x, p in zip(centre, density, strict=True)]
            if before is not None:
                plain, _ = np.histogram(before.numpy().ravel(), edges, density=True)
                axis.stairs(plain, edges, color="#d55e00", label="before gamma, beta")
            mean, var = float(q.mean()), float(q.var())
            gauss = np.exp(-((centre - mean) ** 2) / (2 * var)) / np.sqrt(2 * np.pi * var)
            axis.plot(centre, gauss, color="black", linewidth=0.9, linestyle=":", label="Gaussian")
            text = "\n".join(f"{label} {found[key]:.2f}{unit}" for key, (label, unit) in SHOWN.items())
            axis.text(0.98, 0.96, text, transform=axis.transAxes, ha="right", va="top", fontsize=8)
            axis.set_yticks([])
            if i == 0:
                axis.set_title(name, fontsize=10)
            if axis is axes[i][0]:
                axis.set_ylabel(f"decoder layer {i + 1}", fontsize=9)
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(out / "queries.png", dpi=120)
    plt.close(figure)
    with (out / "queries.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("checkpoint", "layer", "q", "density"), *rows])


def foreground(outputs: dict[str, Any], loss: str) -> Tensor:
    """Largest class score of every query, (B, Q)."""
    logits = outputs["pred_logits"]
    scores = logits.softmax(-1) if loss == "softmax" else logits.sigmoid()
    return scores[..., :-1].amax(-1)


def draw_matches(
    images: list[Tensor], truth: list[Tensor], teacher: dict[str, Any], student: dict[str, Any], out: Path, *, tau: float,
    losses: tuple[str, str],
) -> None:  # fmt: skip
    """matches.png, a row per image: annotations and the teacher's boxes; the student's boxes, kept ones in colour; kept student
    boxes (solid) and their teacher boxes (dashed); a legend below. images: uint8 (3, H, W); truth: cxcywh in 0..1."""
    count = len(images)
    tall = sum(i.shape[-2] / i.shape[-1] for i in images)
    figure, axes = plt.subplots(count, 3, figsize=(7.8, 2.5 * tall + 0.9), squeeze=False, layout="constrained")
    kept = foreground_queries(student["pred_boxes"][:count], truth, tau=tau)
    partner = matched_teacher_queries(student["pred_boxes"][:count], teacher["pred_boxes"][:count])
    sure = [foreground(o, loss) >= SHOWN_FROM for o, loss in zip((teacher, student), losses, strict=True)]
    for i, image in enumerate(images):
        height, width = image.shape[-2:]
        for k, axis in enumerate(axes[i]):
            axis.imshow(image.permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
            axis.set_axis_off()
            if i == 0:
                axis.set_title(TITLES[k], fontsize=9)
        scale = torch.tensor([width, height, width, height])

        def frame(axis: Any, box: Tensor, scale: Tensor = scale, **style: Any) -> tuple[float, float]:
            x0, y0, x1, y1 = (box_convert(box, "cxcywh", "xyxy") * scale).tolist()
            axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **style))
            return (x0 + x1) / 2, (y0 + y1) / 2

        for box in truth[i]:
            for axis in axes[i][:2]:
                frame(axis, box, **TRUTH)
        for box in teacher["pred_boxes"][i][sure[0][i]]:
            frame(axes[i][0], box, **TEACHER)
        for box in student["pred_boxes"][i][sure[1][i] & ~kept[i]]:
            frame(axes[i][1], box, **OTHER)
        colours = plt.get_cmap("tab10")
        for n, j in enumerate(kept[i].nonzero().flatten().tolist()):
            style = {"edgecolor": colours(n % 10), "linewidth": 1.6}
            own, other = student["pred_boxes"][i, j], teacher["pred_boxes"][i, partner[i, j]]
            frame(axes[i][1], own, **style)
            a, b = frame(axes[i][2], own, **style), frame(axes[i][2], other, linestyle="--", **style)
            axes[i][2].plot(*zip(a, b, strict=True), color=colours(n % 10), linewidth=1.2, marker=".")
        for axis in axes[i]:  # boxes beyond the image must not shrink it
            axis.set(xlim=(0, width), ylim=(height, 0))
    _legend(figure)
    figure.savefig(out / "matches.png", dpi=110)
    plt.close(figure)


def _legend(figure: Any) -> None:
    colour = {"edgecolor": plt.get_cmap("tab10")(0), "linewidth": 1.6}
    entries = {
        "annotated object": TRUTH, f"teacher, score above {SHOWN_FROM}": TEACHER,
        f"student, score above {SHOWN_FROM}, not kept": OTHER,
        "student query that FQM keeps (a colour each)": colour,
        "the teacher's query it learns from": {**colour, "linestyle": "--"},
    }  # fmt: skip
    handles = [Rectangle((0, 0), 1, 1, facecolor="#bbbbbb", label=label, **style) for label, style in entries.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)


@torch.no_grad()
def measure(cfg: DictConfig, out: Path) -> dict[str, float]:
    """Draws both figures; returns mean, variance, entropy and spread of the queries of each checkpoint and layer."""
    base = Path(cfg.run_root) / cfg.scale
    loaded = {name: load(base / path) for name, path in cfg.checkpoints.items() if path}
    if not loaded:
        raise ValueError("checkpoints names no file")
    trained = next(iter(loaded.values())).config
    if not trained:
        raise ValueError("the first of checkpoints must be one of train.py: its data set is used")
    given = {k: v for k, v in OmegaConf.to_container(cfg.data).items() if v is not None}  # type: ignore[union-attr]
    data = {"seed": trained["seed"], **trained["data"], **given}
    check_data(data)
    held_out = held_out_set(data)
    indices = range(min(cfg.images, len(held_out)))
    images, mask, _ = held_out_batch(held_out, indices, torch.device("cpu"), data["test_side"])
    queries, outputs, found = {}, {}, {}
    for name, (network, *_) in loaded.items():
        queries[name], outputs[name] = cross_attention_queries(network, images, mask)
        for i, (q, _) in enumerate(queries[name], 1):
            found |= {f"{key}_{name}_{i}": value for key, value in query_statistics(q).items()}
    draw_histograms(queries, out)
    names = list(loaded)
    shown = [i for i in indices if len(held_out.target(i)["labels"])][: cfg.shown]
    truth = [Prepared(held_out)[i][1]["boxes"] for i in shown]
    losses = [loaded[n].about["loss"] for n in (names[0], names[-1])]
    first, last = (
        {k: outputs[n][k][torch.tensor(shown)] for k in ("pred_boxes", "pred_logits")} for n in (names[0], names[-1])
    )
    plain = [held_out.image(i).as_subclass(Tensor) for i in shown]
    draw_matches(plain, truth, first, last, out, tau=cfg.tau, losses=(losses[0], losses[1]))
    return found


@script("queries")
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    if (run := runs.Run.open(out, cfg, fabric)) is None:
        return
    with run:
        found = measure(cfg, out)
        if cfg.into_report:
            report = Path(cfg.run_root) / cfg.scale / "report"
            report.mkdir(parents=True, exist_ok=True)
            for name in ("queries.png", "queries.csv", "matches.png"):
                shutil.copy(out / name, report)
        run.finish(found)
    print(f"{len(found)} statistics, queries.png, queries.csv and matches.png in {out}")


if __name__ == "__main__":
    main()
