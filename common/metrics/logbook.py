"""The evidence of a paper as an open logbook, a page per claim:  make logbook-<paper>

Writes `runs/logbook/<paper>/.trackio/logbook`, which `trackio logbook serve` shows and `trackio logbook publish` would put on the
web: that step is the user's, nothing here does it. Needs `pip install .[logbook]`.

A logbook's words for an outcome are coarser than ours. A claim counts as verified or falsified only where the published recipe or
the released weights were run; at any other scale the evidence is a toy, whatever its verdict.
"""

import argparse
import contextlib
import shutil
import sys
from pathlib import Path
from typing import Any

from common.metrics import tables
from common.metrics.claims import load_document
from common.metrics.readme import PAPERS
from common.metrics.site import ROOT, Evidence, command, evidence, forest

Result = dict[str, Any]


def status(result: Result, scale: str) -> str:
    """verified | falsified | toy | inconclusive: what the logbook says of one verdict at one scale."""
    if result["verdict"] not in ("supported", "contradicted"):
        return "inconclusive"
    if result["verdict"] == "supported":
        return "verified" if scale == "paper" or result["kind"] == "released_weights" else "toy"
    return "falsified" if scale == "paper" else "toy"


def write(paper: Path, out: Path) -> Path:
    """Writes the logbook of the recorded claims of `paper` into `out`, in place of one that is there, and returns its folder.

    RuntimeError without trackio; ValueError where a folder above `out` has a logbook, which would be written to."""
    try:
        from trackio import logbook  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RuntimeError(f"{error}: a logbook needs trackio, pip install '.[logbook]'") from error
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / ".trackio", ignore_errors=True)
    if (other := logbook.find_project_dir(out)) is not None:
        raise ValueError(f"{other} holds a logbook already: give --out a folder that is not below it")
    document, found = load_document(paper), [e for e in evidence(paper) if e.label == e.scale]
    with contextlib.chdir(out):  # it writes where it stands
        place = logbook.create_logbook(f"{paper.name}: {PAPERS.get(paper.name, 'reproduction')}")
    exact = []
    for claim in document["claims"]:
        results = [(e, e.claims[claim["id"]]) for e in found if claim["id"] in e.claims]
        results = [(e, r) for e, r in results if r["verdict"] != "not_run"]
        if claim["kind"] == "exact":
            exact += [(claim, r) for _, r in results[:1]]
        elif results:
            _page(logbook, place, paper, claim, results)
    if exact:
        page = logbook.ensure_page(place, "Exact counts and identities", status="toy")
        rows = [
            [c["statement"], tables.published_text(c["published"]), tables.measured_text(r), r["verdict"]]
            for c, r in exact
        ]
        logbook.add_markdown_cell(place, page, tables.markdown(["count", "stated (source)", "here", "verdict"], rows))
    return logbook.logbook_root(place)


def _page(logbook: Any, place: Path, paper: Path, claim: Result, results: list[tuple[Evidence, Result]]) -> None:
    """The page of one claim: what is claimed, and per scale the command, its result and the figure of that scale's claims."""
    best, first = results[0]
    page = logbook.ensure_page(place, claim["statement"], status=status(first, best.scale))
    role = "primary, tested with Holm's correction" if claim["primary"] else "exploratory"
    published = tables.published_text(claim["published"]) or "no number"
    logbook.add_markdown_cell(
        place, page, f"**{claim['statement']}**\n\nPublished: {published}. Kind: {claim['kind']}, {role}; id `{claim['id']}`.",
        title="The claim",
    )  # fmt: skip
    for found, result in results:
        machine = found.about.get("machine")
        cpu = machine["cpu"] if isinstance(machine, dict) else "several machines"
        where = f"commit {str(found.about.get('commit'))[:12]}; {cpu}"
        lines = [
            f"verdict: {result['verdict']} ({status(result, found.scale)})",
            f"{result['metric']}: {tables.measured_text(result)}",
            f"effect, claimed side positive: {tables.effect_text(result)}" if result["effect"] else "", where,
        ]  # fmt: skip
        logbook.add_code_cell(
            place, page, "\n".join(line for line in lines if line), title=found.scale,
            code_text=command(paper.name, claim, found.scale), language="bash",
        )  # fmt: skip
        if (drawn := drawing(result)) is not None:
            logbook.add_figure_cell(
                place, page, html=drawn, title=f"Effect and interval at {found.scale}, claimed side to the right"
            )


def drawing(result: Result) -> str | None:
    """The interval of an effect about the border of the claim, as SVG; None without an effect."""
    if (at := forest(result, 440, 44)) is None:
        return None
    return (
        f'<svg viewBox="0 0 440 44" width="440" height="44">'
        f'<line x1="{at["middle"]:.1f}" x2="{at["middle"]:.1f}" y1="0" y2="44" stroke="#999" stroke-dasharray="3 3"/>'
        f'<line x1="{at["low"]:.1f}" x2="{at["high"]:.1f}" y1="22" y2="22" stroke="#0060a0" stroke-width="3"/>'
        f'<circle cx="{at["estimate"]:.1f}" cy="22" r="6" fill="#0060a0"/></svg>'
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m common.metrics.logbook", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("paper", choices=list(PAPERS))
    parser.add_argument("--out", type=Path, help="where to write (default: runs/logbook/<paper>)")
    args = parser.parse_args(argv)
    try:
        place = write(ROOT / args.paper, (args.out or ROOT / "runs/logbook" / args.paper).expanduser().resolve())
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"logbook: {place}\nto look at it: cd {place.parents[1]} && trackio logbook serve; publishing is up to you")
    return 0


if __name__ == "__main__":
    sys.exit(main())
