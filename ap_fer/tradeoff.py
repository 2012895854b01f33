"""Accuracy over cost, every arm of a scale:  python tradeoff.py scale=mini   draws accuracy_over_macs.png from its runs.

python tradeoff.py scale=mini recorded=true      draws the recorded figure again, from results/mini/cells.csv"""

import csv
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from lightning_fabric import Fabric
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox
from omegaconf import DictConfig

from common import runs
from common.metrics import stats
from common.metrics.claims import Measurements, read_runs
from common.scripts import script

PAPER = Path(__file__).resolve().parent
NAMES = {
    "stem": "CNN stem alone", "none": "all patches", "app": "APP", "app_atp": "APP + ATP", "atp": "ATP",
    "la": "APP, learnable score (LA)", "random": "random patches", "worst": "smallest features",
    "random_both": "random patches and tokens", "face_net": "CNN, first half of its training",
    "plain_vit": "no CNN: image patches", "cnn_only": "CNN with average pooling", "app_sum": "APP, plain sum",
    "app_sum_abs_2": "APP, sum of squares", "app_max": "APP, maximum", "app_max_abs_1": "APP, largest magnitude",
    "app_channel": "APP, a channel at random", "atp_sum_abs_1": "ATP, sum of magnitudes", "atp_max": "ATP, maximum",
    "atp_softmax": "ATP, after the softmax", "atp_random": "ATP, tokens at random",
    "app_test_only": "APP in testing only", "app_train_only": "APP in training only",
}  # fmt: skip
FAMILIES = {"app": "#0072B2", "app_atp": "#56B4E9", "atp": "#009E73", "random": "#D55E00", "worst": "#CC79A7"}
FILE = "accuracy_over_macs.png"
SETTINGS = {"method.app.keep": "k =", "method.atp.rate": "rate", "method.atp.start": "from block"}


def points(found: Measurements) -> dict[str, tuple[float, np.ndarray]]:
    """{arm: (millions of multiply-accumulates for one face, top-1 of every seed)} of the arms that were trained to the end of the
    long schedule."""
    return {
        arm: (next(iter(seeds.values()))["mmacs"], np.array([m["top1"] for m in seeds.values()]))
        for arm, seeds in found.items()
        if all({"mmacs", "top1"} <= m.keys() for m in seeds.values()) and not arm.split("/")[0].endswith("_short")
    }


def label(arm: str) -> str:
    """app/method.app.keep-16 -> APP, k = 16"""
    name, _, setting = arm.partition("/")
    for key, words in SETTINGS.items():
        setting = setting.replace(f"{key}-", f"{words} ").replace(f"{key}=", f"{words} ")
    return ", ".join(part for part in (NAMES.get(name, name.replace("_", " ")), setting) if part)


def beside(costs: list[float], step: float) -> list[float]:
    """Where arms of these costs are drawn: those of one cost side by side in their order, `step` apart."""
    return [c + step * (costs[:i].count(c) - (costs.count(c) - 1) / 2) for i, c in enumerate(costs)]


def draw(found: Measurements, path: Path) -> int:
    """Mean and 95 % interval over seeds of every arm; returns the number of arms. ValueError without any."""
    if not (arms := points(found)):
        raise ValueError("no finished run has both top1 and mmacs: train the arms of this scale first")
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axis = figure.subplots()
    ordered = sorted(arms, key=lambda arm: -arms[arm][1].mean())
    costs = [arms[arm][0] for arm in ordered]
    dots = {}
    for arm, x in zip(ordered, beside(costs, 0.014 * ((max(costs) - min(costs)) or 1.0)), strict=True):
        top1, colour = arms[arm][1], FAMILIES.get(arm.split("/")[0], "#555555")
        interval = stats.t_interval(top1) if len(top1) > 1 else (top1.mean(), top1.mean())
        axis.plot([x, x], interval, color=colour, linewidth=1.2, alpha=0.6)
        dots[arm] = axis.plot(x, top1.mean(), "o", color=colour, markersize=5)[0]
    axis.axhline(100 / 7, color="black", linewidth=0.8, linestyle=":")
    axis.annotate("chance", (axis.get_xlim()[0], 100 / 7), xytext=(3, 3), textcoords="offset points", fontsize=7)
    axis.margins(x=0.14)
    axis.set_xlabel(
        "millions of multiply-accumulates for one face, stem and transformer; arms of one cost stand side by side"
    )
    axis.set_ylabel("accuracy, clean and occluded faces together (%)")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    name_dots(axis, dots, costs)
    figure.savefig(path, dpi=110)
    return len(arms)


def name_dots(axis: Axes, dots: dict[str, Line2D], costs: list[float]) -> None:
    """Writes every arm's label beside the dots of its cost, on the first free place from the height of its dot on."""
    figure: Any = axis.figure
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    figure.set_layout_engine("none")  # from here on places are known in pixels
    renderer, to_pixels = canvas.get_renderer(), axis.transData
    boxes = {arm: dot.get_window_extent(renderer) for arm, dot in dots.items()}
    frame = axis.get_window_extent(renderer)
    taken = [
        line.get_window_extent(renderer) for line in axis.lines if line.get_linestyle() == "-"
    ]  # dots and intervals
    for (arm, box), cost in zip(boxes.items(), costs, strict=True):
        text = axis.text(0, 0, label(arm), fontsize=7, color=dots[arm].get_color(), va="center")
        size = text.get_window_extent(renderer)
        row = [other for other, c in zip(boxes.values(), costs, strict=True) if c == cost]
        sides = (max(b.x1 for b in row) + 5, min(b.x0 for b in row) - 5 - size.width)
        middle = (box.y0 + box.y1) / 2
        places = itertools.product(range(-200, 201, 5), sides)
        for up, left in sorted(
            places, key=lambda p: abs(p[0]) + (0 if p[1] == sides[0] else 30)
        ):  # rather right than near
            place = Bbox.from_bounds(left, middle + up - size.height / 2, size.width, size.height)
            inside = frame.x0 <= place.x0 and place.x1 <= frame.x1 and frame.y0 <= place.y0 and place.y1 <= frame.y1
            if inside and not any(place.padded(3).overlaps(other) for other in taken):
                break
        taken.append(place)
        at = to_pixels.inverted().transform((place.x0, middle + up))
        end = to_pixels.inverted().transform((place.x0 - 1 if left == sides[0] else place.x1 + 1, middle + up))
        x, y = np.asarray(dots[arm].get_xydata())[0].tolist()
        text.set_position((at[0], at[1]))
        axis.plot(
            [x, end[0]], [y, end[1]], color=dots[arm].get_color(), linewidth=0.4, alpha=0.7, scalex=False, scaley=False
        )


def recorded(scale: str) -> Measurements:
    """The finished cells of results/<scale>/cells.csv. FileNotFoundError for a scale that is not recorded."""
    found: Measurements = {}
    with (PAPER / "results" / scale / "cells.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["status"] == "finished":
                cell = {key: float(row[key]) for key in ("mmacs", "top1") if row.get(key)}
                found.setdefault(row["arm"], {})[int(row["seed"])] = cell
    return found


def collect(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Draws the figure of the scale's runs into out, and with cfg.into_report into its report; with cfg.recorded that of the
    record, in its place."""
    if cfg.recorded:
        path = PAPER / "results" / cfg.scale / FILE
        print(f"{draw(recorded(cfg.scale), path)} arms: {path}")
        return
    if (run := runs.Run.open(out, cfg, fabric)) is None:
        return
    with run:
        scale = Path(cfg.run_root) / cfg.scale
        arms = draw(read_runs(scale)[0], out / FILE)
        if cfg.into_report:
            (scale / "report").mkdir(parents=True, exist_ok=True)
            shutil.copy(out / FILE, scale / "report" / FILE)
        run.finish({"arms": arms})
    print(f"{arms} arms: {out / FILE}")


main = script("tradeoff", collect)


if __name__ == "__main__":
    main()
