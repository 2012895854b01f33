"""The figure of accuracy over cost takes every arm of the long schedule, and only those."""

import itertools
import json

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ap_fer import tradeoff
from ap_fer.tests.helpers import config
from common import runs
from common.metrics.claims import read_runs


def write_runs(root):
    """Three arms of two seeds, one of the short schedule, and counts without an accuracy."""
    cells = {"stem": (2.25, 60), "app/method.app.keep-16": (3.0, 50), "none": (6.0, 61), "none_short": (6.0, 40)}
    for arm, (cost, top1) in cells.items():
        for seed in (0, 1):
            folder = root / arm / f"seed{seed}"
            folder.mkdir(parents=True)
            metrics = {"top1": top1 + 2 * seed, "mmacs": cost}
            content = {"scale": root.name, "seed": seed, "status": "finished", "metrics": metrics, "seconds": 1.0}
            (folder / "result.json").write_text(json.dumps(content))
    (root / "counts/seed0").mkdir(parents=True)
    counts = {"scale": root.name, "seed": 0, "status": "finished", "metrics": {"params": 3}, "seconds": 1.0}
    (root / "counts/seed0/result.json").write_text(json.dumps(counts))


def test_points_are_cost_and_the_accuracies_of_the_seeds(tmp_path):
    write_runs(tmp_path / "tiny")
    found = tradeoff.points(read_runs(tmp_path / "tiny")[0])
    assert found.keys() == {"stem", "app/method.app.keep-16", "none"}
    assert found["none"][0] == 6.0 and found["none"][1].tolist() == [61, 63]
    names = {
        "app/method.app.keep=16": "APP, k = 16", "app/method.app.keep-16": "APP, k = 16", "none": "all patches",
        "atp/method.atp.rate-0.9": "ATP, rate 0.9", "app_sum": "APP, plain sum", "random_k": "random k",
    }  # fmt: skip
    assert {arm: tradeoff.label(arm) for arm in names} == names
    with pytest.raises(ValueError, match="no finished run has both top1 and mmacs"):
        tradeoff.draw({"counts": {0: {"params": 3.0}}}, tmp_path / "x.png")


def test_the_script_draws_into_the_report(tmp_path, fabric, monkeypatch):
    write_runs(tmp_path / "tiny")
    drawn = []
    monkeypatch.setattr(tradeoff.stats, "t_interval", lambda v: drawn.append(np.array(v)) or (v.min(), v.max()))
    cfg = config("tradeoff", f"run_root={tmp_path}", "scale=tiny", "into_report=true")
    tradeoff.collect(cfg, fabric, tmp_path / "tiny/tradeoff/seed0")
    assert (tmp_path / "tiny/report/accuracy_over_macs.png").stat().st_size > 10_000 and len(drawn) == 3
    assert runs.read_json(tmp_path / "tiny/tradeoff/seed0/result.json")["metrics"] == {"arms": 3}


def test_arms_of_one_cost_stand_side_by_side_in_their_order():
    assert tradeoff.beside([4.0, 6.0, 4.0, 4.0, 6.0], 0.1) == pytest.approx([3.9, 5.95, 4.0, 4.1, 6.05])
    assert tradeoff.beside([2.0], 0.1) == [2.0]


def test_no_two_labels_lie_on_each_other_and_none_outside(tmp_path, monkeypatch):
    """Twelve arms of one cost within two points, neighbours in cost on either side, one at the edge."""
    found, drawn = {}, []
    for i in range(12):
        found[f"arm_of_one_cost_{i}"] = {s: {"mmacs": 4.0, "top1": 60 + i / 6 + s} for s in (0, 1, 2)}
    for arm, cost in (("close_to_the_others", 4.1), ("the_most_expensive_of_all_of_them", 6.0), ("cheap", 2.0)):
        found[arm] = {s: {"mmacs": cost, "top1": 61.0 + s} for s in (0, 1, 2)}
    monkeypatch.setattr(tradeoff, "Figure", lambda **options: drawn.append(Figure(**options)) or drawn[-1])
    assert tradeoff.draw(found, tmp_path / "f.png") == 15
    (axis,), canvas = drawn[0].axes, FigureCanvasAgg(drawn[0])
    canvas.draw()
    texts = [t for t in axis.texts if t.get_text() != "chance"]
    assert sorted(t.get_text() for t in texts) == sorted(tradeoff.label(arm) for arm in found)
    boxes = [t.get_window_extent(canvas.get_renderer()) for t in texts]
    dots = [line.get_window_extent(canvas.get_renderer()) for line in axis.lines if line.get_marker() == "o"]
    assert len(dots) == 15 and not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert not any(box.overlaps(dot) for box in boxes for dot in dots)
    frame = axis.get_window_extent(canvas.get_renderer()).expanded(1.001, 1.001)
    assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 and frame.y0 <= b.y0 and b.y1 <= frame.y1 for b in boxes)


def test_the_recorded_figure_is_drawn_again_from_the_recorded_cells(tmp_path, fabric, monkeypatch):
    monkeypatch.setattr(tradeoff, "PAPER", tmp_path)
    folder, drawn = tmp_path / "results/tiny", []
    folder.mkdir(parents=True)
    rows = ["arm,seed,status,seconds,mmacs,top1", "app,100,finished,1,4,61", "app,101,finished,1,4,63",
            "none,100,finished,1,6,60", "none,101,failed,1,6,99", "counts,0,finished,1,,"]  # fmt: skip
    (folder / "cells.csv").write_text("\n".join(rows) + "\n")
    original = tradeoff.draw
    monkeypatch.setattr(
        tradeoff, "draw", lambda found, path: drawn.append(tradeoff.points(found)) or original(found, path)
    )
    tradeoff.collect(config("tradeoff", "scale=tiny", "recorded=true"), fabric, tmp_path / "out")
    assert {arm: (cost, top1.tolist()) for arm, (cost, top1) in drawn[0].items()} == {
        "app": (4, [61, 63]),
        "none": (6, [60]),
    }
    assert (folder / tradeoff.FILE).stat().st_size > 10_000 and not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError):
        tradeoff.recorded("full")
