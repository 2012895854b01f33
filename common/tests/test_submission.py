"""Runs of other people: what is in order is accepted, and a number, a verdict or a cell that was changed is named."""

import csv
import json
import shutil

import pytest

from common import reproduce, submission
from common.metrics import report
from common.tests.test_reproduce import in_this_process, toy  # noqa: F401  # a paper of seven cells

pytestmark = pytest.mark.usefixtures("unpainted")


@pytest.fixture
def run(toy, in_this_process):  # noqa: F811
    (toy / "break").unlink(missing_ok=True)
    in_this_process()
    assert reproduce.run(toy, "mini") == 0
    theirs = reproduce.record(toy, "mini", name="someone")
    assert theirs == toy / "results/external/someone/mini"
    yield toy, theirs
    shutil.rmtree(toy / "results/external")


def change(file, edit):
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def test_what_record_writes_is_accepted_and_every_change_is_named(run, capsys):
    paper, folder = run
    kept = {name: (folder / name).read_text() for name in submission.FILES}
    root = ["--root", str(paper.parent)]
    assert submission.check(paper, folder) == [] and submission.main(root) == 0
    assert "1 of 1 runs of other people are in order" in capsys.readouterr().out

    def problems(name, edit):
        change(folder / name, edit)
        found = submission.check(paper, folder)
        (folder / name).write_text(kept[name])
        return found[0]

    def better(evidence):
        evidence["cells"][1]["metrics"]["top1"] = 2.0

    assert "is 2.0 in provenance.json and" in problems("provenance.json", better)
    claim = json.loads(kept["claims.json"])["claims"][0]
    other = "contradicted" if claim["verdict"] != "contradicted" else "supported"
    said = problems("claims.json", lambda c: c["claims"][0].update(verdict=other))
    assert said == f"claim better: {other}, but the numbers make it {claim['verdict']}"
    assert "1 cells are missing" in problems("provenance.json", lambda e: e["cells"].pop())
    tuned = problems("provenance.json", lambda e: e["cells"][2].update(config_sha256="0" * 64))
    assert "1 cells have another configuration than the sweeps here" in tuned
    assert "it says ncl_pp, scale full" in problems("provenance.json", lambda e: e.update(scale="full"))
    (folder / "cells.csv").unlink()
    assert "no cells.csv; make record-ncl_pp SCALE=mini NAME=someone" in submission.check(paper, folder)[0]
    assert submission.main(root) == 1


def test_both_tables_changed_together_change_the_verdict(run):
    """The verdict is computed again, so that numbers cannot be improved without it, nor the verdict without the numbers."""
    paper, folder = run

    def worse(evidence):
        for cell in evidence["cells"]:
            if cell["cell"].startswith("student"):
                cell["metrics"]["top1"] -= 50

    change(folder / "provenance.json", worse)
    with (folder / "cells.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["top1"] = str(float(row["top1"]) - 50) if row["arm"] == "student" else row["top1"]
    with (folder / "cells.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert "but the numbers make it contradicted" in submission.check(paper, folder)[0]


def test_a_name_is_a_folder_name(run):
    with pytest.raises(reproduce.RunError, match="NAME=../x"):
        reproduce.record(run[0], "mini", name="../x")
    assert report.stale_figures(run[0].parent) == []
