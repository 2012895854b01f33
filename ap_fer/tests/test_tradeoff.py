"""The figure of accuracy over cost takes every arm of the long schedule, and only those."""

import json

import numpy as np
import pytest

from ap_fer import tradeoff
from ap_fer.tests.helpers import config
from common import runs
from common.metrics.claims import read_runs


def write_runs(root):
    """Three arms of two seeds, one of the short schedule, and counts without an accuracy."""
    cells = {"stem": (2.25, 60), "app/method.app.keep=16": (3.0, 50), "none": (6.0, 61), "none_short": (6.0, 40)}
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
    assert found.keys() == {"stem", "app/method.app.keep=16", "none"}
    assert found["none"][0] == 6.0 and found["none"][1].tolist() == [61, 63]
    assert tradeoff.label("app/method.app.keep=16") == "APP, k = 16" and tradeoff.label("none") == "all patches"
    assert tradeoff.label("app_sum") == "app sum" and tradeoff.label("atp/method.atp.rate=0.9") == "ATP, rate 0.9"
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
