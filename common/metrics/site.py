"""The evidence as pages that open from disk:  make report, or python -m common.metrics.site [--out runs/site]

index.html: what the ten abstracts claim, with the verdicts here; guide.html: which method to take, and what is wrong in published
code and papers; speed.html: every recorded bench; <paper>.html: every claim of a paper with its interval, arms,
figures, decision table, deviations, equations, provenance. The record and what this machine made (runs/) stand side by side.
"""

import argparse
import csv
import json
import re
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import markdown

from common.metrics import tables
from common.metrics.claims import VERDICTS, load_document
from common.metrics.readme import PAPERS, render_deployment, scale_order
from common.runs import read_json

ROOT = Path(__file__).resolve().parents[2]
Result = dict[str, Any]


@dataclass
class Evidence:
    """What one report says: `label` is its scale, with ', this machine' or ', <who>' where it is not the record."""

    label: str
    scale: str
    folder: Path
    claims: dict[str, Result]
    about: dict[str, Any]

    @property
    def figures(self) -> list[Path]:
        names = ["claims.png", "arms.png"]
        return [self.folder / n for n in names if (self.folder / n).is_file()] + sorted(self.folder.glob("arms_*.png"))


def evidence(paper: Path) -> list[Evidence]:
    """The recorded scales of a paper, the best first, then other people's runs and the reports under runs/."""
    found = []
    files = [(file, "") for file in paper.glob("results/*/claims.json")]
    files += [(file, f", {file.parts[-3]}") for file in paper.glob("results/external/*/*/claims.json")]
    files += [(file, ", this machine") for file in paper.glob("runs/*/report/claims.json")]
    for file, who in files:
        content = json.loads(file.read_text())
        claims = {r["id"]: r for r in content.pop("claims")}
        found.append(Evidence(content["scale"] + who, content["scale"], file.parent, claims, content))
    return sorted(found, key=lambda e: (e.label != e.scale, scale_order(e.scale)))


# --------------------------------------------------------------------------------------------------------------- drawing
def forest(result: Result, width: int = 220, height: int = 22) -> dict[str, float] | None:
    """Where interval and estimate of one claim lie in a drawing with the claim's border in the middle; None without an effect."""
    effect = result["effect"]
    if effect is None:
        return None
    centre = 1.0 if result["kind"] == "ratio" else 0.0
    reach = 1.1 * max(abs(effect[k] - centre) for k in ("low", "high", "estimate")) or 1.0
    x = {k: width / 2 * (1 + (effect[k] - centre) / reach) for k in ("low", "high", "estimate")}
    return x | {"width": width, "height": height, "middle": width / 2}


def learning_curves(paper: Path, scale: str, most: int = 12) -> list[dict[str, Any]]:
    """The first loss of every run of a scale on this machine by epoch, in drawings of 220 x 60 points."""
    found = []
    for file in sorted((paper / "runs" / scale).rglob("metrics.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        names = [k for k, v in (rows[-1] if rows else {}).items() if "loss" in k and isinstance(v, int | float)]
        values = [r[names[0]] for r in rows if names and isinstance(r.get(names[0]), int | float)]
        if len(values) < 2 or "report" in file.parts:
            continue
        low, high = min(values), max(values)
        points = [
            (220 * i / (len(values) - 1), 56 - 52 * (v - low) / ((high - low) or 1.0)) for i, v in enumerate(values)
        ]
        found.append({
            "name": file.parent.relative_to(paper / "runs" / scale).as_posix(), "what": names[0].replace("_", " "),
            "first": tables.number(values[0]), "last": tables.number(values[-1]),
            "points": " ".join(f"{x:.1f},{y:.1f}" for x, y in points),
        })  # fmt: skip
    return found[:most]


def arms(found: Evidence) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the metrics that the claims of a report name: mean +/- std (seeds) of every arm."""
    metrics = list(dict.fromkeys(r["metric"] for r in found.claims.values() if r["kind"] != "exact"))
    with (found.folder / "cells.csv").open(newline="") as file:
        cells = [row for row in csv.DictReader(file) if row["status"] == "finished"]
    rows = []
    for arm in dict.fromkeys(c["arm"] for c in cells):
        texts = []
        for metric in metrics:
            values = [float(c[metric]) for c in cells if c["arm"] == arm and c.get(metric)]
            mean, std = (
                (statistics.mean(values) if values else None),
                (statistics.stdev(values) if values[1:] else None),
            )
            texts.append(tables.summary({"n": len(values), "mean": mean, "std": std}) if values else "")
        if any(texts):
            rows.append([arm, *texts])
    return [m.replace("_", " ") for m in metrics], rows


# ----------------------------------------------------------------------------------------------------------------- text
def section(readme: str, title: str) -> str:
    """The text under the first heading `## <title>...` of a README; empty without it."""
    match = re.search(rf"^## {re.escape(title)}[^\n]*\n(.*?)(?=^## |\Z)", readme, flags=re.M | re.S)
    return match[1].strip() if match else ""


def html(text: str, up: str) -> str:
    """Markdown as HTML; relative links and pictures begin at `up`, the way from the page to where the text lies."""
    text = re.sub(r"\]\((?!https?:|#|/)([^)]+)\)", rf"]({up}\1)", text)
    return markdown.markdown(text, extensions=["tables", "fenced_code", "sane_lists"])


def command(paper: str, claim: Result, scale: str) -> str:
    """The shell line that makes the numbers of a claim."""
    if claim["kind"] == "released_weights":
        return f"make evaluate-{paper} WEIGHTS=<checkpoint> DATA=<folder>"
    if scale == "bench":
        return f"make bench-{paper} ARGS=record=true"
    data = " DATA=<folder>" if scale.startswith(("paper", "real_", "gpu_")) else ""
    return f"make reproduce-{paper} SCALE={scale}{data} ONLY={claim['id']}"


def anchor(claim: str, label: str) -> str:
    """The id of a claim's row on the page of its paper."""
    return f"{claim}-{label.replace(', ', '-').replace(' ', '-')}"


def _tests(ids: list[str], by_id: dict[str, Any], found: list[Evidence]) -> list[tuple[Any, str, Result]]:
    """(claim, label, result) of the claims that were run, at every scale."""
    tests = [(by_id[i], e.label, e.claims[i]) for i in ids for e in found if i in e.claims]
    return [t for t in tests if t[2]["verdict"] != "not_run"]


def sentences(document: dict[str, Any], found: list[Evidence]) -> list[dict[str, Any]]:
    """What the abstract claims, each with [(claim, label, result)] of every test of it at every scale where there is one."""
    by_id = {c["id"]: c for c in document["claims"]}
    rows = []
    for row in document["abstract"]:
        tests = _tests(row["claims"], by_id, found)
        waiting = [by_id[i] for i in row["claims"] if all(i != claim["id"] for claim, _, _ in tests)]
        verdicts = {result["verdict"] for _, _, result in tests} | ({"not_run"} if waiting else set())
        rows.append(
            {"says": row["says"], "tests": tests, "waiting": waiting, "verdicts": sorted(verdicts or {"untested"})}
        )
    return rows


def advice(document: dict[str, Any], found: list[Evidence]) -> list[dict[str, Any]]:
    """Which method to take, as HTML, each with [(claim, label, result)] of the recorded claims that carry it."""
    by_id = {c["id"]: c for c in document["claims"]}
    rows = []
    for row in document["advice"]:
        tests = _tests(row["claims"], by_id, found)
        rows.append({**row, "take": inline(row["take"]), "says": inline(row["says"]), "tests": tests})
    return rows


def defects(document: dict[str, Any]) -> list[dict[str, str]]:
    """What is wrong in published code and text, as HTML, each with the file and the name of the test that shows it."""
    rows = []
    for row in document["defects"]:
        file, _, name = row["test"].partition("::")
        rows.append({**row, "says": inline(row["says"]), "here": inline(row["here"]), "file": file, "name": name})
    return rows


def speed(paper: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """(file, rows as `timing.Bench` writes them) of every recorded bench of a paper."""
    files = [
        *sorted((paper / "results/bench").glob("bench*.json")),
        *sorted((paper / "results/deploy").glob("bench*.json")),
    ]
    return [(file.relative_to(paper.parent).as_posix(), json.loads(file.read_text())) for file in files]


def inline(text: str) -> str:
    """One paragraph of markdown as HTML without its <p>."""
    return markdown.markdown(text).removeprefix("<p>").removesuffix("</p>")


def tally(results: Iterable[Result]) -> str:
    counts = Counter(r["verdict"] for r in results if r["kind"] != "exact")
    return ", ".join(f"{counts[v]} {v.replace('_', ' ')}" for v in VERDICTS if counts[v]) or "none"


# ---------------------------------------------------------------------------------------------------------------- pages
def page_of(paper: Path, out: Path) -> dict[str, Any]:
    """All that the page of a paper shows; copies its figures to out/<paper>/."""
    document, found, up = load_document(paper), evidence(paper), f"../../{paper.name}/"
    readme = (paper / "README.md").read_text() if (paper / "README.md").is_file() else ""
    scales = []
    for e in found:
        place = out / paper.name / e.label.replace(", ", "_").replace(" ", "_")
        place.mkdir(parents=True, exist_ok=True)
        for figure in e.figures:
            shutil.copy(figure, place)
        rows = [(c, e.claims[c["id"]]) for c in document["claims"] if c["id"] in e.claims]
        header, table = arms(e)
        limits = paper / "configs/reproduce" / e.scale / "README.md"
        scales.append({
            "label": e.label, "scale": e.scale, "words": document["metrics"], "about": e.about, "header": header, "arms": table,
            "rows": [r for r in rows if r[0]["kind"] != "exact"], "exact": [r for r in rows if r[0]["kind"] == "exact"],
            "figures": [(place / f.name).relative_to(out).as_posix() for f in e.figures],
            "limits": html(limits.read_text(), f"{up}{e.folder.relative_to(paper)}/") if limits.is_file() else "",
            "curves": learning_curves(paper, e.scale) if e.label != e.scale else [],
            "isa": read_json(e.folder / "isa.json") or [],
        })  # fmt: skip
    known = {i for e in found for i in e.claims}
    deployment = render_deployment(paper)
    return {
        "name": paper.name, "idea": PAPERS.get(paper.name, ""), "basis": document["basis"],
        "title": (re.search(r"^# (.+)", readme, flags=re.M) or [None, paper.name])[1],
        "abstract": sentences(document, found), "scales": scales, "up": up,
        "waiting": [c for c in document["claims"] if c["id"] not in known],
        "tallies": [(e.label, tally(e.claims.values())) for e in found],
        "exact": _exact(found), "deployment": html(deployment, up) if deployment else "",
        "outcome": html(section(readme, "What came out"), up), "deviations": html(section(readme, "Deviations"), up),
        "advice": advice(document, found), "defects": defects(document), "speed": speed(paper),
        "equations": [(r["source"], r["says"], *_code(r["code"])) for r in document["equations"]],
        "published": [p for p in document["published"] if p["source"] != "ours"],
    }  # fmt: skip


def _exact(found: list[Evidence]) -> str:
    results: dict[str, set[str]] = {}
    for e in found:
        for r in e.claims.values():
            if r["kind"] == "exact":
                results.setdefault(r["id"], set()).add(r["verdict"])
    right = sum(verdicts == {"supported"} for verdicts in results.values())
    return f"{right} of {len(results)}" if results else ""


def _code(code: str) -> tuple[str, str]:
    module, _, name = code.partition(":")
    return name, f"../../{module.replace('.', '/')}.py"


def build(root: Path, out: Path) -> Path:
    """Writes the pages into `out` and returns its index.html. ValueError or FileNotFoundError name a broken record."""
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {
        "forest": forest, "command": command, "effect": tables.effect_text, "measured": tables.measured_text,
        "p_text": tables.p_text, "published": tables.published_text, "verdict_text": tables.verdict_text,
        "anchor": anchor, "number": tables.number, "verdicts": [*VERDICTS, "untested"],
    }  # fmt: skip
    template = environment.get_template("site.html")
    papers = [page_of(root / name, out) for name in PAPERS if (root / name / "claims.yaml").is_file()]
    # A row is hidden when every verdict in it is: one rule for each combination that there is.
    together = {(v,) for v in VERDICTS} | {tuple(row["verdicts"]) for p in papers for row in p["abstract"]}
    environment.globals["shown"] = sorted(together)
    for paper in papers:
        (out / f"{paper['name']}.html").write_text(template.render(paper=paper, papers=papers))
    for page in ("guide", "speed"):
        (out / f"{page}.html").write_text(template.render(paper=None, page=page, papers=papers))
    index = out / "index.html"
    index.write_text(template.render(paper=None, papers=papers))
    return index


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m common.metrics.site", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--root", type=Path, default=ROOT, help="repository root (default: where this package lies)")
    parser.add_argument("--out", type=Path, help="where to write (default: <root>/runs/site)")
    args = parser.parse_args(argv)
    try:
        print(f"site: {build(args.root, args.out or args.root / 'runs/site')}")
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
