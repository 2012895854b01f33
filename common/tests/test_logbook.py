"""The evidence as an open logbook, read back by the library that shows it."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from common.metrics import logbook
from common.metrics.claims import load_document
from common.metrics.site import evidence

ROOT = Path(__file__).resolve().parents[2]
trackio = pytest.importorskip("trackio.logbook")


def test_a_page_per_recorded_claim_with_command_result_and_figure(tmp_path):
    place = logbook.write(ROOT / "rbonn", tmp_path)
    project = place.parent
    pages = {page["title"]: page for page in trackio.list_pages(project)}
    found = [e for e in evidence(ROOT / "rbonn") if e.label == e.scale]
    claims = [c for c in load_document(ROOT / "rbonn")["claims"] if c["kind"] != "exact"]
    recorded = [
        c for c in claims if any(e.claims.get(c["id"], {"verdict": "not_run"})["verdict"] != "not_run" for e in found)
    ]
    assert recorded and {c["statement"] for c in recorded} <= pages.keys()
    assert "Exact counts and identities" in pages
    page = next(place.glob("pages/**/*rbonn-s-latent*/*.md"), None) or next(place.glob("pages/**/*rbonn-s-latent*.md"))
    text = page.read_text()
    assert "make reproduce-rbonn SCALE=mini ONLY=" in text and "verdict: supported (toy)" in text and "<svg" in text
    assert str(tmp_path) not in text and str(ROOT) not in text
    logbook.write(ROOT / "rbonn", tmp_path)  # in place of the one before
    assert len(trackio.list_pages(project)) == len(pages)


def test_a_logbook_of_somebody_else_above_is_not_written_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trackio.create_logbook("mine")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="holds a logbook already"):
        logbook.write(ROOT / "rbonn", tmp_path / "below")
    shutil.rmtree(tmp_path / "below")
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("verdict", "kind", "scale", "expected"),
    [
        ("supported", "ordering", "paper", "verified"), ("supported", "ordering", "mini", "toy"),
        ("supported", "released_weights", "mini", "verified"), ("contradicted", "ordering", "paper", "falsified"),
        ("contradicted", "released_weights", "real_kodak", "toy"), ("contradicted", "ordering", "real_mnist", "toy"),
        ("inconclusive", "ordering", "paper", "inconclusive"), ("equivalent", "ordering", "paper", "inconclusive"),
    ],
)  # fmt: skip
def test_only_the_published_recipe_or_released_weights_verify(verdict, kind, scale, expected):
    assert logbook.status({"verdict": verdict, "kind": kind}, scale) == expected


def test_logger_trackio_keeps_a_run_on_this_machine(tmp_path):
    code = """from pathlib import Path
from common.trackio_logger import TrackioLogger
logger = TrackioLogger(Path("somewhere/runs/default/ce/seed0"), "ncl_pp")
for step in (1, 2):
    logger.log_metrics({"loss": 1.0 / step}, step=step)
logger.finalize("finished")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TRACKIO_DIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with sqlite3.connect(tmp_path / "ncl_pp.db") as store:
        rows = store.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [(name, step, json.loads(found)) for name, step, found in rows] == [
        ("default/ce/seed0", 1, {"loss": 1.0}), ("default/ce/seed0", 2, {"loss": 0.5})
    ]  # fmt: skip
