"""The two figures of a report: effects with their intervals, and every seed of every arm."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from common.metrics import stats
from common.metrics.claims import TESTED, Measurements, seed_effects

# Okabe-Ito colours; the verdict is also written beside each row.
COLOURS = {
    "supported": "#009E73",
    "contradicted": "#D55E00",
    "equivalent": "#0072B2",
    "inconclusive": "#7F7F7F",
    "not_run": "#BBBBBB",
}


PANEL = 24  # arms in one panel


def _fill(name: str, width: int) -> str:
    """A name on lines of at most `width`, broken after underscores where it can be."""
    return textwrap.fill(name.replace("_", "_ "), width + name.count("_")).replace("_ ", "_")


Words = dict[str, dict[str, str]]  # of a metric: {says, unit}, from claims.yaml


def plot_claims(results: list[dict[str, Any]], path: str | Path, words: Words | None = None) -> bool:
    """Forest plot of the ordering, ratio and property claims: estimate (diamond: primary), interval, one small
    dot per seed; a panel per metric. Writes `path` (PNG); returns False, and writes nothing, without any effect."""
    panels: dict[tuple[bool, str], list[dict[str, Any]]] = {}
    for r in results:
        if r["kind"] in TESTED:
            unit, ratio = _label(r["metric"], results, words or {}), r["kind"] == "ratio"
            panels.setdefault((ratio, "x" if ratio else unit), []).append(r)
    if not any(r["effect"] for r in results):
        return False
    heights = [
        sum(max(1.0, 0.4 * len(textwrap.wrap(r["statement"], 58))) for r in rows) + 1.1 + 0.4 * _axis(*kind).count("\n")
        for kind, rows in panels.items()
    ]
    figure = Figure(figsize=(11, 0.5 * sum(heights) + 0.5), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, ((ratio, unit), rows) in zip(axes, panels.items(), strict=True):
        _forest_panel(ax, ratio, rows)
        ax.set_xlabel(_axis(ratio, unit), fontsize=9)
    figure.savefig(path, dpi=130)
    return True


def _axis(ratio: bool, unit: str) -> str:
    """What a panel shows. It stands centred below the axes, where a line of more than 120 letters would leave the figure."""
    if ratio:
        return "ratio over the claimed margin (x); claimed side: right of 1"
    words = "difference over the claimed margin; claimed side: right of 0"
    line = f"{unit}: {words}"
    return line if len(line) <= 120 else f"{textwrap.fill(unit, 119)}:\n{words}"


def _forest_panel(ax: Axes, ratio: bool, rows: list[dict[str, Any]]) -> None:
    ax.axvline(1 if ratio else 0, color="black", linewidth=0.8, linestyle="--")
    for y, r in enumerate(rows):
        colour = COLOURS[r["verdict"]]
        seeds = [*seed_effects(r).values()]
        ax.plot(seeds, [y + 0.24] * len(seeds), "o", color=colour, markersize=3.5, alpha=0.6, markeredgewidth=0)
        if r["effect"]:
            e = r["effect"]
            ax.plot([e["low"], e["high"]], [y, y], color=colour, linewidth=2.4, solid_capstyle="butt")
            ax.plot(e["estimate"], y, "D" if r["primary"] else "o", color=colour, markersize=7)
        label = (
            r["verdict"]
            if r["level"] is None
            else f"{r['verdict']}\nn = {len(seeds)}, {100 * r['level']:.3g} % interval"
        )
        ax.text(
            1.01,
            y,
            label,
            color=colour if r["effect"] else "#666666",
            transform=ax.get_yaxis_transform(),
            va="center",
            fontsize=8,
        )
    ax.set_yticks(range(len(rows)), [textwrap.fill(r["statement"], 58) for r in rows], fontsize=8)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    if ratio:
        ax.set_xscale("log")
        low, high = ax.get_xlim()
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 8 * low else MaxNLocator(7))
        ax.xaxis.set_major_formatter("{x:.4g}")
        ax.xaxis.set_minor_locator(NullLocator())
    ax.tick_params(axis="x", labelsize=8)
    ax.grid(axis="x", alpha=0.25)
    ax.spines[["top", "right", "left"]].set_visible(False)


def plot_arms(
    measurements: Measurements, results: list[dict[str, Any]], metrics: list[str], folder: str | Path,
    words: Words | None = None,
) -> list[str]:  # fmt: skip
    """One panel per metric: every seed of every arm as a dot, mean and 95 % t interval below; a thin line joins the seeds of two
    arms only where one of `results` compares them. At most `PANEL` arms in a panel and two panels on a page.

    Writes arms.png, arms_2.png, ... into `folder` and returns their names; none when no arm has one of the metrics."""
    panels = []
    for metric in metrics:
        names = [a for a, runs in measurements.items() if any(metric in run for run in runs.values())]
        pairs = [r["arms"] for r in results if r["metric"] == metric and len(r["arms"]) == 2]
        names = _neighbours(names, pairs)
        for i in range(0, len(names), PANEL):
            part = {a: {s: r[metric] for s, r in measurements[a].items() if metric in r} for a in names[i : i + PANEL]}
            panels.append((_label(metric, results, words or {}), part, [p for p in pairs if set(p) <= set(part)]))
    pages: list[list] = []
    for panel in panels:  # two to a page as long as that is no taller than two screens
        if pages and len(pages[-1]) == 1 and len(pages[-1][0][1]) + len(panel[1]) <= PANEL + 8:
            pages[-1].append(panel)
        else:
            pages.append([panel])
    files = []
    for i, page in enumerate(pages):
        heights = [len(values) + 1.2 for _, values, _ in page]
        figure = Figure(figsize=(9, 0.36 * sum(heights) + 0.6), layout="constrained")
        axes = figure.subplots(len(page), 1, squeeze=False, height_ratios=heights)[:, 0]
        for ax, panel in zip(axes, page, strict=True):
            _arms_panel(ax, *panel)
        files.append("arms.png" if i == 0 else f"arms_{i + 1}.png")
        figure.savefig(Path(folder) / files[-1], dpi=110)
    return files


def _neighbours(names: list[str], pairs: list[list[str]]) -> list[str]:
    """The names with arms that a claim compares next to each other."""
    order: list[str] = []
    for name in [*(a for pair in pairs for a in pair if a in names), *names]:
        if name not in order:
            order.append(name)
    return order


def _label(metric: str, results: list[dict[str, Any]], words: Words) -> str:
    """'top-1 accuracy (%)'. Without words the metric's id, with the unit of what was published."""
    if metric in words:
        unit = words[metric]["unit"]
        return f"{words[metric]['says']} ({unit})" if unit else words[metric]["says"]
    units = {r["published"]["unit"] for r in results if r["metric"] == metric and r["published"]} - {None, ""}
    return f"{metric.replace('_', ' ')} ({units.pop()})" if len(units) == 1 else metric.replace("_", " ")


def _arms_panel(ax: Axes, label: str, values: dict[str, dict[int, float]], pairs: list[list[str]]) -> None:
    place = {arm: y for y, arm in enumerate(values)}
    for one, other in pairs:
        for seed in values[one].keys() & values[other].keys():
            points = ([values[one][seed], values[other][seed]], [place[one], place[other]])
            ax.plot(*points, "-", color="#888888", linewidth=0.5, alpha=0.55, zorder=1)
    for y, runs in enumerate(values.values()):
        x = np.array([*runs.values()], dtype=float)
        ax.plot(x, [y] * len(x), "o", color="#0072B2", markersize=4.5, alpha=0.7, markeredgewidth=0)
        ax.plot(x.mean(), y + 0.28, "D", color="black", markersize=4)
        if len(x) > 1:
            ax.plot(stats.t_interval(x), [y + 0.28] * 2, color="black", linewidth=1.3)
    ax.set_yticks(range(len(values)), [_fill(arm, 40) for arm in values], fontsize=8)
    ax.set_ylim(len(values) - 0.4, -0.5)
    ax.set_xlabel(label, fontsize=9)
    ax.tick_params(axis="x", labelsize=8)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right", "left"]].set_visible(False)
