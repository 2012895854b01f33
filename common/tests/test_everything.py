"""One command over all papers: a failing one does not stop the others, and the time left comes from the record."""

import json

import pytest

from common import everything, reproduce
from common.metrics import site


@pytest.fixture
def root(tmp_path, monkeypatch):
    for paper in ("ncl_pp", "q_vit", "rbonn"):
        (tmp_path / paper / "configs/reproduce/mini").mkdir(parents=True)
        (tmp_path / paper / "results/mini").mkdir(parents=True)
    cells = [{"cell": f"ce/seed{k}", "seconds": 60.0} for k in (100, 101)]
    for paper in ("ncl_pp", "q_vit"):
        (tmp_path / paper / "results/mini/provenance.json").write_text(json.dumps({"cells": cells}))
    monkeypatch.setattr(site, "build", lambda root, out: out / "index.html")
    return tmp_path


@pytest.mark.parametrize("action", ["reproduce", "verify"])
def test_a_paper_that_fails_is_named_and_the_others_are_done(action, root, monkeypatch, capsys):
    called = []

    def call(command, **_):
        called.append(command[3:5])
        return 1 if command[4] == "q_vit" else 0

    monkeypatch.setattr(reproduce, "_call", call)
    assert everything.main([action, "--root", str(root)]) == 1
    verb = "run" if action == "reproduce" else "verify"
    assert called == [[verb, "ncl_pp"], [verb, "q_vit"], [verb, "rbonn"]]
    said = capsys.readouterr()
    assert "2 of 3 papers" in said.out and "q_vit; what happened" in said.err
    assert ("site: " in said.out) == (action == "reproduce")
    monkeypatch.setattr(reproduce, "_call", lambda *_, **__: 0)
    assert everything.main([action, "--root", str(root)]) == 0


def test_what_is_finished_is_not_counted_again(root):
    paper = root / "ncl_pp"
    assert everything.open_seconds(paper, "mini") == 120 and everything.open_seconds(root / "rbonn", "mini") is None
    (paper / "runs/mini/ce/seed100").mkdir(parents=True)
    for status, left in (("failed", 120), ("finished", 60)):
        (paper / "runs/mini/ce/seed100/result.json").write_text(json.dumps({"status": status}))
        assert everything.open_seconds(paper, "mini") == left
    text = everything.minutes_left([paper, root / "q_vit", root / "rbonn"], "mini")
    assert text == "about 2 min left, as recorded (without rbonn)"
