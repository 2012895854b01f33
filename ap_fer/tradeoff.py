"""Accuracy over cost, every arm of a scale:  python tradeoff.py scale=mini   draws accuracy_over_macs.png from its runs."""

import shutil
from pathlib import Path

import numpy as np
from lightning_fabric import Fabric
from matplotlib.figure import Figure
from omegaconf import DictConfig

from common import runs
from common.metrics import stats
from common.metrics.claims import Measurements, read_runs
from common.scripts import script

NAMES = {
    "stem": "CNN stem alone", "none": "all patches", "app": "APP", "app_atp": "APP + ATP", "atp": "ATP",
    "la": "learnable score (LA)", "random": "random patches", "worst": "smallest features",
    "random_both": "random patches and tokens", "plain_vit": "no CNN: image patches", "cnn_only": "CNN with average pooling",
}  # fmt: skip
FAMILIES = {"app": "#0072B2", "app_atp": "#56B4E9", "atp": "#009E73", "random": "#D55E00", "worst": "#CC79A7"}
FILE = "accuracy_over_macs.png"


def points(found: Measurements) -> dict[str, tuple[float, np.ndarray]]:
    """{arm: (millions of multiply-accumulates for one face, top-1 of every seed)} of the arms that were trained to the end of the
    long schedule."""
    return {
        arm: (next(iter(seeds.values()))["mmacs"], np.array([m["top1"] for m in seeds.values()]))
        for arm, seeds in found.items()
        if all({"mmacs", "top1"} <= m.keys() for m in seeds.values()) and not arm.split("/")[0].endswith("_short")
    }


def label(arm: str) -> str:
    """app/method.app.keep=16 -> APP, k = 16"""
    name, _, setting = arm.partition("/")
    for key, words in (
        ("method.app.keep=", "k = "),
        ("method.atp.rate=", "rate "),
        ("method.atp.start=", "from block "),
    ):
        setting = setting.replace(key, words)
    return ", ".join(part for part in (NAMES.get(name, name.replace("_", " ")), setting) if part)


def draw(found: Measurements, path: Path) -> int:
    """Mean and 95 % interval over seeds of every arm; returns the number of arms. ValueError without any."""
    if not (arms := points(found)):
        raise ValueError("no finished run has both top1 and mmacs: train the arms of this scale first")
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axis = figure.subplots()
    for arm, (cost, top1) in sorted(arms.items(), key=lambda item: item[1][0]):
        colour = FAMILIES.get(arm.split("/")[0], "#555555")
        interval = stats.t_interval(top1) if len(top1) > 1 else (top1.mean(), top1.mean())
        axis.plot([cost, cost], interval, color=colour, linewidth=1.2, alpha=0.6)
        axis.plot(cost, top1.mean(), "o", color=colour, markersize=5)
        axis.annotate(
            label(arm), (cost, top1.mean()), xytext=(5, 3), textcoords="offset points", fontsize=7, color=colour
        )
    axis.axhline(100 / 7, color="black", linewidth=0.8, linestyle=":")
    axis.annotate("chance", (axis.get_xlim()[0], 100 / 7), xytext=(3, 3), textcoords="offset points", fontsize=7)
    axis.margins(x=0.12)
    axis.set_xlabel("millions of multiply-accumulates for one face, stem and transformer")
    axis.set_ylabel("accuracy, clean and occluded faces together (%)")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    return len(arms)


def collect(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Draws the figure of the scale's runs into out, and with cfg.into_report into its report."""
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
