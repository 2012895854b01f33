"""Checks runs of other people that stand beside the record:  make check-runs, or python -m common.submission [<paper> ...]

A run is what `make record-<paper> SCALE=<scale> NAME=<who>` writes into `<paper>/results/external/<who>/<scale>/`. It is accepted
when its cells are those of the sweeps here, its tables agree with each other, and the verdicts follow from its numbers.
"""

import argparse
import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

from common import reproduce
from common.metrics.claims import Measurements, load_claims, test_claims
from common.metrics.readme import PAPERS
from common.runs import RunError

FILES = ("claims.json", "cells.csv", "provenance.json", "report.md")


def check(paper: Path, folder: Path) -> list[str]:
    """What is wrong with a submitted run; empty if nothing is."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        return [
            f"no {', '.join(missing)}; make record-{paper.name} SCALE={folder.name} NAME={folder.parent.name} writes them"
        ]
    try:
        claims, evidence = (json.loads((folder / name).read_text()) for name in ("claims.json", "provenance.json"))
        with (folder / "cells.csv").open(newline="") as file:
            table = {f"{row['arm']}/seed{row['seed']}": row for row in csv.DictReader(file)}
        cells = {cell["cell"]: cell for cell in evidence["cells"]}
        told = (evidence["paper"], evidence["scale"], claims["paper"], claims["scale"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        return [f"not what make record writes ({error!r})"]
    if told != (paper.name, folder.name) * 2:
        return [f"it says {told[0]}, scale {told[1]}; here it lies under {paper.name}, scale {folder.name}"]
    return [
        *_cells(paper, folder.name, cells),
        *_numbers(cells, table),
        *_verdicts(paper, folder.name, cells, claims["claims"]),
    ]


def _cells(paper: Path, scale: str, cells: dict[str, Any]) -> list[str]:
    """Every cell of the sweeps here, with the configuration that it has here."""
    try:
        wanted = {
            c.name(): c.sha
            for c in reproduce.cells(paper, scale, ("data.root=DATA",) if scale.startswith("real") else ())
        }
    except RunError as error:
        return [str(error)]
    absent = sorted(wanted.keys() - cells.keys())
    other = sorted(n for n in wanted.keys() & cells.keys() if cells[n]["config_sha256"] != wanted[n])
    stray = sorted(cells.keys() - wanted.keys())
    problems = (
        (absent, "are missing"),
        (other, "have another configuration than the sweeps here"),
        (stray, "are in no sweep here"),
    )
    return [f"{len(names)} cells {what}, e.g. {names[0]}" for names, what in problems if names]


def _numbers(cells: dict[str, Any], table: dict[str, dict[str, str]]) -> list[str]:
    """cells.csv says what provenance.json says."""
    for name, cell in cells.items():
        for metric, value in cell["metrics"].items():
            written = table.get(name, {}).get(metric)
            if not isinstance(value, int | float) or not math.isfinite(value):
                return [f"{name}: {metric} is {value!r}"]
            if not written or not math.isclose(float(written), value, rel_tol=1e-12):
                return [f"{name}: {metric} is {value} in provenance.json and {written or 'absent'} in cells.csv"]
    return []


def _verdicts(paper: Path, scale: str, cells: dict[str, Any], told: list[dict[str, Any]]) -> list[str]:
    """The verdicts that the claims here give for the numbers."""
    measured: Measurements = {}
    for name, cell in cells.items():
        arm, seed = name.rsplit("/seed", 1)
        measured.setdefault(arm, {})[int(seed)] = cell["metrics"]
    try:
        due = {r["id"]: r["verdict"] for r in test_claims(load_claims(paper), measured, scale)}
    except ValueError as error:
        return [str(error)]
    said = {r["id"]: r["verdict"] for r in told}
    return [
        f"claim {name}: {said.get(name, 'absent')}, but the numbers make it {verdict}"
        for name, verdict in due.items() if said.get(name) != verdict
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m common.submission", description="Check runs of other people.")
    parser.add_argument("papers", nargs="*", default=[], help="default: all ten")
    parser.add_argument("--root", type=Path, default=reproduce.ROOT, help="the repository (tests use another)")
    args = parser.parse_args(argv)
    found, wrong = 0, 0
    for name in args.papers or PAPERS:
        for folder in sorted(p for p in (args.root / name).glob("results/external/*/*") if p.is_dir()):
            problems = check(args.root / name, folder)
            found, wrong = found + 1, wrong + bool(problems)
            print(f"{folder.relative_to(args.root)}: {'; '.join(problems) or 'agrees with the sweeps and claims here'}")
    print(f"{found - wrong} of {found} runs of other people are in order")
    return min(1, wrong)


if __name__ == "__main__":
    sys.exit(main())
