"""Test a checkpoint of train.py on every subset of its modalities, with thresholds from the validation split.

python evaluate.py weights=runs/default/fmvit/seed0/last.ckpt
python evaluate.py weights=... data.root=/datasets/WMCA level=video threshold=bpcer1 out=report
Writes the matrix of subsets and metrics as CSV and figure, and DET curves.
"""

import csv
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from common import runs
from fm_vit.data import Data, build_data
from fm_vit.losses import subsets
from fm_vit.pad_metrics import (
    OPERATING_POINTS,
    apcer_by_species,
    bootstrap,
    bpcer_threshold,
    check,
    det_points,
    eer_threshold,
    error_rates,
    summary,
    video_scores,
)  # fmt: skip
from fm_vit.train import build, describe, predict

LEVELS, THRESHOLDS = ("frame", "video"), ("eer", "bpcer1", "half")


def load(path: str, data: Mapping[str, Any] | None = None) -> tuple[Any, DictConfig, list[str]]:
    """(model in evaluation mode, configuration, modalities of its data) of a checkpoint of train.py. data: keys of the data to
    replace, null leaves them. ValueError for a file that train.py did not write."""
    state = runs.load_checkpoint(path)
    if missing := {"model", "config", "modalities"} - state.keys():
        raise ValueError(f"{path} is no checkpoint of fm_vit/train.py: it lacks {', '.join(sorted(missing))}")
    cfg: Any = OmegaConf.create(state["config"])
    cfg.data.update({k: v for k, v in (data or {}).items() if v is not None})
    if "pretrained" in cfg.model.vit:
        cfg.model.vit.pretrained = False
    model = build(cfg, state["modalities"])
    model.load_state_dict(state["model"])
    return model.eval(), cfg, state["modalities"]


def choose_threshold(kind: str, scores: np.ndarray, live: np.ndarray) -> float:
    """eer: equal error rate; bpcer1: 1 % of the live rejected (WMCA); half: 0.5, which needs no development data.
    ValueError for another name."""
    if kind not in THRESHOLDS:
        raise ValueError(f"threshold={kind!r}, allowed: {', '.join(THRESHOLDS)}")
    if kind == "half":
        return 0.5
    return eer_threshold(scores, live)[0] if kind == "eer" else bpcer_threshold(scores, live, bpcer=1.0)


def at_level(scores: np.ndarray, split: Any, level: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """scores, live, species, subject of frames, or of videos (mean score, before any threshold)."""
    if level not in LEVELS:
        raise ValueError(f"level={level!r}, allowed: {', '.join(LEVELS)}")
    if level == "frame":
        return scores, split.live, split.species, split.subject
    means, first = video_scores(scores, split.video.tolist())
    return means, split.live[first], split.species[first], split.subject[first]


def evaluate(cfg: DictConfig) -> dict[str, dict[str, float]]:
    """Prints, writes and returns {subset: metrics}; see configs/evaluate.yaml."""
    model, trained, modalities = load(cfg.weights, cfg.data)
    fabric = runs.launch(cfg.fabric)
    data: Data = build_data(seed=trained.seed, **trained.data)
    print(describe(data))
    wrapped = fabric.setup_module(model)
    options = {"batch_size": cfg.batch_size, "workers": data.workers}
    dev = predict(fabric, wrapped, data.splits["validation"].samples, modalities, **options)
    test = predict(fabric, wrapped, data.splits["test"].samples, modalities, **options)
    rows, curves = {}, {}
    for names in subsets(model.modalities):
        tag = "_".join(names)
        threshold = choose_threshold(
            cfg.threshold, *at_level(dev[tag].numpy(), data.splits["validation"], cfg.level)[:2]
        )
        scores, live, species, subject = at_level(test[tag].numpy(), data.splits["test"], cfg.level)
        found = {"threshold": threshold} | summary(scores, live, species.tolist(), threshold, points=OPERATING_POINTS)
        found |= {
            f"apcer_{k}": v for k, v in apcer_by_species(scores, species.tolist(), threshold, cfg.species).items()
        }
        if cfg.bootstrap:
            low, high = bootstrap(_acer(scores, live, threshold), subject.tolist(), draws=cfg.bootstrap)
            found |= {"acer_low": low, "acer_high": high}
        rows[tag], curves[tag] = found, det_points(*check(scores, live))
        print(f"{tag:16s} " + "  ".join(f"{k} {v:.4g}" for k, v in found.items()))
    if fabric.is_global_zero:
        _write(Path(cfg.out), rows, curves)
        if cfg.record:
            _record(cfg, trained, rows, len(data.splits["test"]), fabric.device)
    return rows


def _acer(scores: np.ndarray, live: np.ndarray, threshold: float):
    return lambda at: error_rates(scores[at], live[at], threshold)["acer"]


def _write(out: Path, rows: dict[str, dict[str, float]], curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    metrics = list(next(iter(rows.values())))
    with (out / "subsets.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["subset", *metrics])
        writer.writerows([tag, *(f"{row[m]:.6g}" for m in metrics)] for tag, row in rows.items())
    plot_matrix(rows, out / "subsets.png")
    plot_det(curves, out / "det.png")
    print(f"written to {out}: subsets.csv, subsets.png, det.png")


def plot_matrix(rows: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Subsets against error rates in percent, darker is worse."""
    metrics = [m for m in next(iter(rows.values())) if m.startswith(("acer", "apcer", "bpcer", "eer"))]
    values = np.array([[row[m] for m in metrics] for row in rows.values()])
    figure = Figure(figsize=(0.8 * len(metrics) + 2.2, 0.42 * len(rows) + 1.6), layout="constrained")
    ax: Axes = figure.subplots()
    ax.imshow(values, cmap="Oranges", vmin=0, vmax=60, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            ax.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=8)
    ax.set_xticks(range(len(metrics)), [m.replace("_", "\n") for m in metrics], fontsize=8)
    ax.set_yticks(range(len(rows)), [t.replace("_", " + ") for t in rows], fontsize=8)
    ax.set_title("error rates in percent, one threshold per subset", fontsize=9)
    figure.savefig(path, dpi=130)


def plot_det(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """BPCER against APCER of every subset, logarithmic."""
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    ax: Axes = figure.subplots()
    for tag, (apcer, bpcer) in curves.items():
        ax.plot(np.clip(apcer, 0.05, None), np.clip(bpcer, 0.05, None), label=tag.replace("_", " + "), linewidth=1.4)
    ax.set(xscale="log", yscale="log", xlim=(0.05, 100), ylim=(0.05, 100), xlabel="APCER (%)", ylabel="BPCER (%)")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def _record(cfg: DictConfig, trained: DictConfig, rows: dict, n: int, device: Any) -> None:
    digest = hashlib.sha256(Path(cfg.weights).expanduser().read_bytes()).hexdigest()
    tag = list(rows)[-1]
    record = {"claim": None, "value": rows[tag]["acer"], "weights_sha256": digest, "n": n, "data": trained.data.name}
    record |= {"level": cfg.level, "threshold": cfg.threshold, "metrics": rows}
    target = Path(cfg.record_to) / f"{digest[:12]}_{trained.data.name}_{cfg.level}_{cfg.threshold}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record | runs.provenance(device), indent=1) + "\n")
    print(f"recorded in {target}")


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    evaluate(cfg)


if __name__ == "__main__":
    main()
