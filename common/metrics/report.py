"""Test the claims of one paper at one scale and write the evidence.

python -m common.metrics.report <paper> <scale> [--root DIR] [--out DIR]
python -m common.metrics.report --readme [--check] [--root DIR]
"""

import argparse
import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from common.metrics import figures, tables
from common.metrics.claims import TESTED, Measurements, load_document, read_external, read_runs, test_claims
from common.metrics.readme import update_readmes
from common.runs import provenance

__all__ = ["judge_speed", "main", "update_readmes", "write_report"]

ROOT = Path(__file__).resolve().parents[2]
Cell = dict[str, Any]


def write_report(paper_dir: str | Path, scale: str, out: str | Path | None = None) -> dict[str, Any]:
    """Read `<paper_dir>/claims.yaml` and `<paper_dir>/runs/<scale>`, decide the claims, write into `out` (default
    `runs/<scale>/report`) claims.json, report.md, cells.csv, and claims.png, arms.png where there is something to draw.

    Returns the content of claims.json. Raises FileNotFoundError without claims or runs, ValueError for bad ones."""
    paper_dir = Path(paper_dir)
    runs = paper_dir / "runs" / scale
    out = Path(out) if out else runs / "report"
    document = load_document(paper_dir)
    measurements, cells = read_runs(runs)
    results = test_claims(document["claims"], measurements, scale, external=read_external(paper_dir))
    commit = _git(paper_dir, "rev-parse", "HEAD")
    # Results and READMEs are made from runs; what matters is whether the code, configs or claims were committed.
    changes = _git(paper_dir, "status", "--porcelain", "-uno", "--", "*.py", "*.yaml")
    report = {
        "paper": paper_dir.resolve().name,
        "scale": scale,
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
        "machine": _common(cells, "machine"),
        "versions": _common(cells, "versions"),
        "claims": results,
    }
    order = list(dict.fromkeys([a for r in results for a in r["arms"] if a in measurements] + sorted(measurements)))
    named = list(dict.fromkeys(r["metric"] for r in results if r["kind"] in (*TESTED, "value")))
    out.mkdir(parents=True, exist_ok=True)
    (out / "claims.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    _write_csv(cells, out / "cells.csv")
    plots = draw_figures(out)
    cells = sorted(
        cells, key=lambda c: (order.index(c["arm"]) if c["arm"] in order else len(order), c["arm"], c["seed"])
    )
    limits = paper_dir / "configs" / "reproduce" / scale / "README.md"
    text = _markdown(report, document, cells, named, plots, limits)
    (out / "report.md").write_text(text)
    return report


def draw_figures(folder: Path) -> list[str]:
    """(Re)draws claims.png and arms*.png of a report from its claims.json and cells.csv; returns their names.

    figures.json keeps a hash of that data and of the code that draws it, for `stale_figures`."""
    for old in (folder / "claims.png", *folder.glob("arms*.png")):
        old.unlink(missing_ok=True)  # a figure of an earlier report would be read as part of this one
    results = json.loads((folder / "claims.json").read_text())["claims"]
    measurements: Measurements = {}
    with (folder / "cells.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["status"] == "finished":
                kept = {k: float(v) for k, v in row.items() if v and k not in ("arm", "seed", "status", "seconds")}
                measurements.setdefault(row["arm"], {})[int(row["seed"])] = kept
    order = list(dict.fromkeys([a for r in results for a in r["arms"] if a in measurements] + sorted(measurements)))
    named = list(dict.fromkeys(r["metric"] for r in results if r["kind"] in (*TESTED, "value")))
    words = _words(folder)
    plots = ["claims.png"] if figures.plot_claims(results, folder / "claims.png", words) else []
    plots += figures.plot_arms({a: measurements[a] for a in order}, results, named, folder, words)
    _relink(folder / "report.md", plots)
    (folder / "figures.json").write_text(json.dumps({"sha256": _drawn_from(folder), "figures": plots}) + "\n")
    return plots


def _relink(page: Path, plots: list[str]) -> None:
    """report.md shows every page of the arms, where it showed the first."""
    if not page.is_file():
        return
    shown = re.compile(r"!\[([^\]]*)\]\(arms[_0-9]*\.png\)\n\n")
    if first := shown.search(text := page.read_text()):
        links = "".join(f"![{first[1]}]({name})\n\n" for name in plots if name.startswith("arms"))
        page.write_text(text[: first.start()] + links + shown.sub("", text[first.end() :]))


def stale_figures(root: Path) -> list[Path]:
    """The recorded scales whose figures are older than their data or than the code that draws them."""
    stale = []
    for claims in sorted(root.glob("*/results/*/claims.json")):
        kept = claims.with_name("figures.json")
        if not kept.is_file() or json.loads(kept.read_text())["sha256"] != _drawn_from(claims.parent):
            stale.append(claims.parent)
    return stale


def judge_speed(paper: Path, measured: Mapping[str, Mapping[int, Mapping[str, float]]], seconds: float) -> None:
    """results/bench/ of a paper and the READMEs from {arm: {seed: {metric: value}}}: every claim of scale bench with its verdict.
    seconds: what all of it took."""
    folder, about = paper / "runs/bench", provenance()
    shutil.rmtree(folder, ignore_errors=True)  # what an earlier call measured is no part of this
    each = seconds / sum(map(len, measured.values()))
    for arm, seeds in measured.items():
        for seed, metrics in seeds.items():
            place = folder / arm / f"seed{seed}"
            place.mkdir(parents=True)
            result = {
                "scale": "bench",
                "arm": arm,
                "seed": seed,
                "status": "finished",
                "seconds": each,
                "metrics": metrics,
            }
            (place / "result.json").write_text(json.dumps(result | about))
    write_report(paper, "bench", paper / "results/bench")
    update_readmes(paper.parent, check=False)
    print(f"claims of speed: {paper / 'results/bench/report.md'}")


def _drawn_from(folder: Path) -> str:
    sources = [p.read_bytes() for p in (folder / "claims.json", folder / "cells.csv", Path(figures.__file__))]
    sources.append(json.dumps(_words(folder), sort_keys=True).encode())
    return hashlib.sha256(b"".join(hashlib.sha256(source).digest() for source in sources)).hexdigest()


def _words(folder: Path) -> figures.Words:
    """What claims.yaml of the paper that a report lies in says about its metrics."""
    paper = next((p for p in folder.resolve().parents if (p / "claims.yaml").is_file()), None)
    return load_document(paper)["metrics"] if paper else {}


def warnings(cells: Sequence[Cell]) -> list[str]:
    """What makes cells incomparable: another commit, version or machine, or another config within one arm."""
    found = []
    for key in ("commit", "versions", "machine"):
        kinds: dict[str, list[Cell]] = {}
        for cell in cells:
            kinds.setdefault(json.dumps(cell.get(key), sort_keys=True), []).append(cell)
        if len(kinds) > 1:
            parts = [f"{value} in {len(group)} cells, e.g. {_name(group[0])}" for value, group in kinds.items()]
            found.append(f"cells differ in {key}: " + "; ".join(parts))
    for arm in dict.fromkeys(c["arm"] for c in cells):
        # The config hash covers the seed, so compare the configs, less every key that is the seed in all of them, or the path
        # of a run of that seed.
        configs = [(str(c["seed"]), _config(Path(c["path"]))) for c in cells if c["arm"] == arm]
        configs = [
            (seed, {k: re.sub(rf"\bseed{seed}\b", "seed", v) for k, v in config.items()}) for seed, config in configs
        ]
        names = sorted({key for _, config in configs for key in config})
        differ = [
            key for key in names
            if len({config.get(key, "(absent)") for _, config in configs}) > 1
            and any(config.get(key) != seed for seed, config in configs)
        ]  # fmt: skip
        if differ:
            found.append(f"arm {arm}: seeds differ in config: {', '.join(differ)}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0 whatever the verdicts, 1 for missing or bad input or stale READMEs."""
    parser = argparse.ArgumentParser(prog="python -m common.metrics.report", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("paper", nargs="?", help="folder of the paper, e.g. ncl_pp")
    parser.add_argument("scale", nargs="?", help="mini, full, paper, real_<set>, gpu_<set>")
    parser.add_argument("--root", type=Path, default=ROOT, help="repository root (default: where this package lies)")
    parser.add_argument("--out", type=Path, help="where to write (default: <paper>/runs/<scale>/report)")
    parser.add_argument(
        "--readme", action="store_true", help="renew what is generated in the READMEs, and the recorded figures"
    )
    parser.add_argument("--check", action="store_true", help="with --readme: write nothing, fail when one is stale")
    args = parser.parse_args(argv)
    if args.readme == bool(args.paper and args.scale) or (args.check and not args.readme):
        parser.error("give either <paper> <scale>, or --readme [--check]")
    try:
        if args.readme:
            stale = update_readmes(args.root, args.check)
            for folder in stale_figures(args.root):
                stale.append(folder / "figures.json")
                if not args.check:
                    draw_figures(folder)
            for file in stale:
                print(f"{file}: {'stale, run python -m common.metrics.report --readme' if args.check else 'updated'}")
            return int(args.check and bool(stale))
        report = write_report(args.root / args.paper, args.scale, args.out)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    out = args.out or args.root / args.paper / "runs" / args.scale / "report"
    print(
        f"{report['paper']}, scale {args.scale}\n\n{tables.terminal_table(report['claims'])}\n\nreport: {out / 'report.md'}"
    )
    return 0


def _markdown(
    report: dict[str, Any],
    document: dict[str, Any],
    cells: list[Cell],
    metrics: list[str],
    plots: list[str],
    limits: Path,
) -> str:
    finished = sum(c["status"] == "finished" for c in cells)
    state = {None: "", True: ", with uncommitted changes", False: ""}[report["dirty"]]
    parts = [
        f"# {report['paper']}, scale {report['scale']}",
        f"Basis: {document['basis']}. {finished} of {len(cells)} cells finished. "
        f"Commit {report['commit'] or 'unknown'}{state}. Machine: {_inline(report['machine'])}.",
    ]
    if found := warnings(cells):
        parts += ["## Warnings", "\n".join(f"- {w}" for w in found)]
    unfinished = [c for c in cells if c["status"] != "finished"]
    if unfinished:
        parts += ["## Cells that did not finish", "\n".join(f"- {_name(c)}: {c['status']}" for c in unfinished)]
    parts += ["## Claims: published beside measured", tables.claims_markdown(report["claims"])]
    parts.append(
        "Bold: primary, p is Holm-adjusted over the primary claims and the interval at the level at which Holm judged. "
        "Effects are signed so that the claimed side is positive (a ratio: above 1), margin taken off. Detectable: the "
        "effect that this number of seeds finds with 80 % power (two-sided 5 %)."
    )
    notes = [f"- {r['id']}: {r['note']}" for r in report["claims"] if r["note"]]
    parts += ["\n".join(notes)] * bool(notes)
    captions = {
        "claims.png": "effects with intervals; diamonds are primary claims, small dots seeds",
        "arms.png": "every seed; mean and 95 % interval; lines join arms that a claim compares",
    }
    if "claims.png" in plots:
        parts.append(f"![{captions['claims.png']}](claims.png)")
    parts += ["## Arms: mean +/- std (n)", tables.arms_markdown(cells, metrics)]
    parts += [f"![{captions['arms.png']}]({name})" for name in plots if name.startswith("arms")]
    parts.append(f"<details><summary>Every seed</summary>\n\n{tables.seeds_markdown(cells, metrics)}\n\n</details>")
    parts.append("All other metrics are in `cells.csv`.")
    rows = [[p["id"], p["table"], p["setting"], p["metric"], tables.published_text(p)] for p in document["published"]]
    parts += ["## Published numbers", tables.markdown(["id", "table", "setting", "metric", "value (source)"], rows)]
    if limits.is_file():
        parts += ["## What this scale can show / cannot show", limits.read_text().strip()]
    return "\n\n".join(parts) + "\n"


def _write_csv(cells: list[Cell], path: Path) -> None:
    metrics = sorted({m for c in cells for m in c["metrics"]})
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["arm", "seed", "status", "seconds", *metrics])
        for c in cells:
            writer.writerow(
                [c["arm"], c["seed"], c["status"], c["seconds"], *(c["metrics"].get(m, "") for m in metrics)]
            )


def _common(cells: list[Cell], key: str) -> Any:
    """The value that all cells share, or the list of different ones."""
    distinct = [json.loads(v) for v in dict.fromkeys(json.dumps(c.get(key), sort_keys=True) for c in cells)]
    return distinct[0] if len(distinct) == 1 else distinct or None


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if isinstance(value, list):
        return "; ".join(map(_inline, value))
    return "unknown" if value is None else str(value)


def _config(run_dir: Path) -> dict[str, str]:
    """config.yaml of a run as {dotted key: value}; empty without the file."""

    def flat(prefix: str, node: Any) -> dict[str, str]:
        if isinstance(node, dict):
            return {k: v for key, child in node.items() for k, v in flat(f"{prefix}.{key}", child).items()}
        return {prefix[1:]: str(node)}

    file = run_dir / "config.yaml"
    return flat("", yaml.safe_load(file.read_text())) if file.is_file() else {}


def _name(cell: Cell) -> str:
    return f"{cell['arm']}/seed{cell['seed']}"


def _git(folder: Path, *args: str) -> str | None:
    """Output of git in the folder, None without git or repository."""
    try:
        done = subprocess.run(["git", "-C", folder, *args], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
