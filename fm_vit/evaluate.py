"""Test a checkpoint of train.py on every subset of its modalities, with thresholds from the validation split.

python evaluate.py weights=runs/default/fmvit/seed0/last.ckpt
python evaluate.py weights=... data.root=/datasets/WMCA level=video threshold=bpcer1 out=report
Writes subsets.csv (a row per subset), species.csv (APCER of every species), the scores of both splits, and three figures.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf

from common.data.batches import to_float
from common.metrics.external import check_claim, write_record
from common.scripts import script
from fm_vit.checkpoint import data_of, load
from fm_vit.data import Data
from fm_vit.figures import plot_det, plot_matrix, plot_selection
from fm_vit.pad_metrics import (
    OPERATING_POINTS,
    Scored,
    apcer_by_species,
    bootstrap,
    check_species,
    check_threshold,
    det_points,
    error_rates,
    measure,
)  # fmt: skip
from fm_vit.train import chosen, predict
from fm_vit.triplets import unpack

PAPER = Path(__file__).resolve().parent
LEVELS = ("frame", "video")
Rows = dict[str, dict[str, float]]


def evaluate(cfg: DictConfig, fabric: Fabric) -> Rows:
    """Prints, writes and returns {subset: metrics}; see configs/evaluate.yaml."""
    check(cfg)
    trained = load(cfg.weights)
    given: Any = OmegaConf.to_container(cfg.data, resolve=True)
    data = data_of(trained, given, splits=("validation", "test"))
    fabric.print(str(data))
    model = fabric.setup_module(trained.model)
    development, _ = predict(fabric, model, data, "validation", batch_size=cfg.batch_size)
    test, _ = predict(fabric, model, data, "test", batch_size=cfg.batch_size)
    frames = {"validation": development, "test": test}
    if cfg.level == "video":
        development, test = development.videos(), test.videos()
    check_species(test.species, cfg.species)
    rows = measure(development, test, threshold=cfg.threshold, points=OPERATING_POINTS)
    if cfg.bootstrap:
        rows = intervals(rows, test, draws=cfg.bootstrap)
    for tag, row in rows.items():
        fabric.print(f"{tag:16s} " + "  ".join(f"{k} {v:.4g}" for k, v in row.items()))
    if fabric.is_global_zero:
        out = Path(cfg.out).expanduser()
        write(out, rows, test, {f"{name}_frame": s for name, s in frames.items()})
        draw_selection(model, data, out / "selection.png", device=fabric.device)
        if cfg.level == "video":
            for name, scored in (("validation", development), ("test", test)):
                write_scores(out / f"scores_{name}_video.csv", scored)
        print(
            f"{cfg.level} level, {len(test.live):,} samples, threshold {cfg.threshold} of the validation split: written to {out}"
        )
        if cfg.record:
            whole = list(rows)[-1]  # all modalities
            write_record(
                cfg.record_to or PAPER / "results/external", weights=cfg.weights, value=rows[whole]["acer"], n=len(test.live),
                data=f"{data.name}_{cfg.level}_{cfg.threshold}", metrics=rows[whole], claim=cfg.claim, device=fabric.device,
                subsets=rows,
            )  # fmt: skip
    return rows


def check(cfg: DictConfig) -> None:
    """ValueError for a level, a rule or a claim that does not exist, before anything is loaded."""
    check_claim(PAPER, cfg.claim)
    check_threshold(cfg.threshold)
    if cfg.level not in LEVELS or cfg.bootstrap < 0:
        raise ValueError(f"level={cfg.level!r}, bootstrap={cfg.bootstrap}, allowed: {', '.join(LEVELS)}; >= 0")


def intervals(rows: Rows, test: Scored, *, draws: int) -> Rows:
    """acer_low and acer_high of every subset: resampled by subject (of unknown ones by video), never by frame. Left out, with a
    line that says so, where neither is known."""
    if len(set(test.subject)) == len(test.live) and test.video is None:
        print("no intervals: neither subjects nor videos are known here, and frames of one video are not independent")
        return rows
    found = {}
    for tag, row in rows.items():
        scores, at = test.scores[tag], row["threshold"]
        low, high = bootstrap(
            lambda i, s=scores, t=at: error_rates(s[i], test.live[i], t)["acer"], test.subject, draws=draws
        )
        found[tag] = row | {"acer_low": low, "acer_high": high}
    return found


@torch.no_grad()
def draw_selection(model: Any, data: Data, path: Path, *, device: torch.device) -> None:
    """The patches that MMA selects on the first test face of every species; nothing for a network that has no masks."""
    module, part = model.module, data.splits["test"]
    if not module.selects:
        return
    kinds = part.species or ["live" if live else "attack" for live in part.live]
    picks = [kinds.index(kind) for kind in sorted(set(kinds), key=lambda k: (k != "live", k))]
    packed = to_float(torch.stack([part.samples[i][0] for i in picks])).to(device)
    names = module.modalities
    _, masks = model(chosen(model, packed, data), [*([m] for m in names), names], with_masks=True)
    own = {m: masks[k][-1][m].cpu().numpy() for k, m in enumerate(names)}  # alone the combined mask is the own one
    images = unpack(packed.cpu(), data.modalities, mean=0, std=1)
    read = masks[-1][-1][names[0]].cpu().numpy()
    shown = {m: images[m].numpy() for m in names}
    plot_selection(shown, own, read, [kinds[i] for i in picks], path)


def write(out: Path, rows: Rows, test: Scored, scores: dict[str, Scored]) -> None:
    """The tables and figures of a report."""
    out.mkdir(parents=True, exist_ok=True)
    metrics = list(next(iter(rows.values())))
    _csv(
        out / "subsets.csv",
        ["subset", *metrics],
        ([tag, *(f"{row[m]:.6g}" for m in metrics)] for tag, row in rows.items()),
    )
    if test.species is not None:
        rates = {tag: apcer_by_species(test.scores[tag], test.species, row["threshold"]) for tag, row in rows.items()}
        names = list(next(iter(rates.values())))
        _csv(out / "species.csv", ["subset", *names], ([t, *(f"{r[n]:.6g}" for n in names)] for t, r in rates.items()))
    for name, scored in scores.items():
        write_scores(out / f"scores_{name}.csv", scored)
    plot_matrix(rows, out / "subsets.png")
    plot_det({tag: det_points(test.scores[tag], test.live) for tag in rows}, out / "det.png")


def write_scores(path: Path, scored: Scored) -> None:
    """A row per sample: name, video, subject, species, live, and the liveness by every subset of the modalities."""
    unknown = [""] * len(scored.live)
    columns: dict[str, Sequence[Any]] = {
        "name": scored.name, "video": scored.video or unknown, "subject": scored.subject, "species": scored.species or unknown,
        "live": scored.live.astype(int).tolist(),
    } | {tag: [f"{v:.9g}" for v in np.asarray(values, float)] for tag, values in scored.scores.items()}  # fmt: skip
    _csv(path, list(columns), zip(*columns.values(), strict=True))


def _csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


main = script("evaluate", evaluate)


if __name__ == "__main__":
    main()
