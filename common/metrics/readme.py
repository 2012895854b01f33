"""The evidence tables of the READMEs, generated from claims.yaml and results/<scale>/."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

from common.metrics import tables
from common.metrics.claims import COMPARABLE, VERDICTS, load_document

PAPERS = {
    "ncl_pp": "nested collaborative learning for long-tailed recognition",
    "dcp_nas": "child-parent architecture search for 1-bit CNNs",
    "fm_vit": "flexible-modal transformer for face anti-spoofing",
    "q_detr": "low-bit quantized detection transformer",
    "ap_fer": "attentive pooling for facial expression recognition",
    "q_vit": "fully quantized low-bit vision transformer",
    "iqa_attack": "perceptual attacks on no-reference image quality models",
    "adaptive_prune": "learnable adaptive token pruning",
    "rbonn": "recurrent bilinear optimization of binary networks",
    "lifelong": "lifelong learning by meta-learning and associative memory",
}
BEGIN, END = "<!-- evidence:begin -->", "<!-- evidence:end -->"
MINIATURE = ("mini", "full")  # embedded data; every other scale is real data


def render_readme_table(paper_dir: str | Path) -> str:
    """The results table of one paper, one row per claim: published beside what `results/<scale>/` records. Claims of
    kind exact are many and agree; they fold away below.

    A claim without recorded evidence has an empty cell and the verdict not_run. Time is the recorded time of the
    claim's arms. Raises what `load_document` raises, ValueError for an unreadable record."""
    paper_dir = Path(paper_dir)
    document, recorded = load_document(paper_dir), _recorded(paper_dir)
    rows = []
    for claim in document["claims"]:
        found = {s: by_id[claim["id"]] for s, by_id in recorded.items() if claim["id"] in by_id}
        scales = list(dict.fromkeys([*claim["scale"], *found]))
        verdicts = {s: tables.verdict_text(found[s]) if s in found else "not_run" for s in scales}
        times = {s: _seconds(paper_dir / "results" / s / "cells.csv", claim["arms"]) for s in found}
        rows.append(
            [
                f"**{claim['statement']}**" if claim["primary"] else claim["statement"],
                tables.published_text(claim["published"]),
                _labelled({s: _here(r) for s, r in found.items() if s not in MINIATURE}, always=True),
                _labelled({s: _here(r) for s, r in found.items() if s in MINIATURE}),
                _labelled(verdicts),
                _command(paper_dir.name, claim),
                _labelled({s: t for s, t in times.items() if t}),
            ]
        )
    header = [
        "claim",
        "published",
        "here, paper scale",
        "here, miniature, mean +/- std (seeds)",
        "verdict",
        "command",
        "time",
    ]
    exact = [row for claim, row in zip(document["claims"], rows, strict=True) if claim["kind"] == "exact"]
    others = [row for claim, row in zip(document["claims"], rows, strict=True) if claim["kind"] != "exact"]
    table = tables.markdown(header, others)
    if not exact:
        return table
    right = sum("supported" in row[4] for row in exact)
    summary = f"Exact counts and identities: {right} of {len(exact)} measured as published"
    return f"{table}\n\n<details><summary>{summary}</summary>\n\n{tables.markdown(header, exact)}\n\n</details>"


def render_root_table(root: str | Path) -> str:
    """One row per paper: idea (the first heading of its README), basis, first published number, recorded verdicts."""
    rows = []
    for paper, idea in PAPERS.items():
        folder = Path(root) / paper
        if not (folder / "claims.yaml").is_file():
            rows.append([f"`{paper}`", idea, "", "", "not started"])
            continue
        document = load_document(folder)
        headings = [x for x in _read(folder / "README.md").splitlines() if x.startswith("# ")]
        rows_usable = [r for r in document["published"] if r["value"] is not None and r["source"] in COMPARABLE]
        row = next(iter(rows_usable), None)
        headline = "unknown" if row is None else f"{row['setting']}: {row['metric']} {tables.published_text(row)}"
        if row is not None and document["published"][0]["value"] is None:  # the first entry is the paper's own
            headline = f"its own: unknown; beside it: {headline}"
        texts = [f"{s}: {_tally(list(by_id.values()))}" for s, by_id in _recorded(folder).items()]
        name = headings[0][2:].strip() if headings else idea
        rows.append(
            [
                f"[`{paper}`]({paper}/README.md)",
                name,
                document["basis"],
                headline,
                "<br>".join(texts) or "none recorded",
            ]
        )
    return tables.markdown(["paper", "idea", "basis", "headline published number", "recorded verdicts"], rows)


def _tally(results: list[dict[str, Any]]) -> str:
    """'2 supported, 1 contradicted; exact counts 9/9': exact claims would drown the tested ones."""
    exact = [r["verdict"] == "supported" for r in results if r["kind"] == "exact"]
    counts = Counter(r["verdict"] for r in results if r["kind"] != "exact")
    text = ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v]) or "no claim tested"
    return f"{text}; exact counts {sum(exact)}/{len(exact)}" if exact else text


def update_readmes(root: str | Path, check: bool) -> list[Path]:
    """Rewrite the block between the evidence markers in the README of every started paper and of the root.

    Returns the files whose block was out of date; with check=True nothing is written. Raises FileNotFoundError for
    a README that is missing, ValueError for one without the two markers."""
    root, stale = Path(root), []
    blocks = {
        root / paper / "README.md": render_readme_table(root / paper)
        for paper in PAPERS
        if (root / paper / "claims.yaml").is_file()
    }
    blocks[root / "README.md"] = render_root_table(root)
    for file, block in blocks.items():
        text = _read(file)
        head, begin, rest = text.partition(BEGIN)
        _, end, tail = rest.partition(END)
        if not begin or not end:
            raise ValueError(f"{file}: no evidence block; add the lines {BEGIN} and {END} where the table belongs")
        fresh = f"{head}{BEGIN}\n{block}\n{END}{tail}"
        if fresh != text:
            stale.append(file)
            if not check:
                file.write_text(fresh)
    return stale


def _recorded(paper_dir: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """{scale: {claim id: result}} of the recorded evidence, miniature first."""
    found = {}
    files = paper_dir.glob("results/*/claims.json")
    for file in sorted(files, key=lambda f: (f.parent.name not in MINIATURE, f.parent.name != "mini", f.parent.name)):
        try:
            found[file.parent.name] = {r["id"]: r for r in json.loads(file.read_text())["claims"]}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: not a claims record ({error!r}); record this scale again") from error
    return found


def _seconds(csv_file: Path, arms: list[str]) -> str:
    """Run time of all finished cells of the arms, e.g. '2.5 min'; empty without a record."""
    if not csv_file.is_file():
        return ""
    with csv_file.open(newline="") as file:
        cells = [row for row in csv.DictReader(file) if row["arm"] in arms and row["status"] == "finished"]
    seconds = sum(float(row["seconds"]) for row in cells)
    if not cells:
        return ""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.1f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _here(result: dict[str, Any]) -> str:
    if all(m["n"] == 0 for m in result["measured"].values()):
        return ""
    text = tables.measured_text(result)
    return text if result["effect"] is None else f"{text}; effect {tables.effect_text(result)}"


def _labelled(by_scale: dict[str, str], *, always: bool = False) -> str:
    """Texts of several scales in one cell, with the scale's name where there is more than one."""
    by_scale = {s: t for s, t in by_scale.items() if t}
    if len(by_scale) == 1 and not always:
        return next(iter(by_scale.values()))
    return "<br>".join(f"{s}: {t}" for s, t in by_scale.items())


def _command(paper: str, claim: dict[str, Any]) -> str:
    if claim["kind"] == "released_weights":
        return f"`make evaluate-{paper} WEIGHTS= DATA=`"
    scale = "mini" if "mini" in claim["scale"] else claim["scale"][0]
    extra = {"mini": "", "paper": f" SCALE=paper ONLY={claim['id']}"}.get(scale, f" SCALE={scale}")
    return f"`make reproduce-{paper}{extra}`"


def _read(file: Path) -> str:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing; write it with the lines {BEGIN} and {END} where the table belongs")
    return file.read_text()
