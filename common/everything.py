"""All ten papers, one after the other:  python -m common.everything {reproduce,verify} [--scale mini] [--root DIR]

A paper that fails does not stop the others and is named at the end; what is finished is skipped, so the same command goes on
after an interruption. SIGTERM ends everything that was started. `reproduce` ends with the pages of `make report`.
"""

import argparse
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from common import reproduce
from common.metrics import site
from common.metrics.readme import PAPERS
from common.runs import read_json

WORKERS = 2  # cells that a sweep runs at a time


def open_seconds(paper: Path, scale: str) -> float | None:
    """CPU seconds that the unfinished cells of a paper took when they were recorded; None without a record."""
    evidence = read_json(paper / "results" / scale / "provenance.json")
    if evidence is None:
        return None
    results = ((cell, read_json(paper / "runs" / scale / cell["cell"] / "result.json")) for cell in evidence["cells"])
    return sum(cell["seconds"] for cell, result in results if not result or result["status"] != "finished")


def minutes_left(papers: list[Path], scale: str) -> str:
    """'about 12 min, as recorded', with the papers that have no record."""
    known = {p.name: open_seconds(p, scale) for p in papers}
    unknown = [name for name, seconds in known.items() if seconds is None]
    total = sum(s for s in known.values() if s is not None) / WORKERS / 60
    return f"about {total:.0f} min left, as recorded" + (f" (without {', '.join(unknown)})" if unknown else "")


def each(action: str, root: Path, scale: str, **options: Any) -> dict[str, bool]:
    """Runs `common.reproduce <action>` for every paper that has the scale (verify: its record): {paper: whether it succeeded}."""
    folder = {"run": "configs/reproduce/{}", "verify": "results/{}"}[action].format(scale)
    papers = [root / name for name in PAPERS if (root / name / folder).is_dir()]
    done: dict[str, bool] = {}
    for i, paper in enumerate(papers):
        left = f", {minutes_left(papers[i:], scale)}" if action == "run" else ""
        print(f"== {paper.name}: paper {i + 1} of {len(papers)}{left}", flush=True)
        begin = time.monotonic()
        command = [sys.executable, "-m", "common.reproduce", action, paper.name, "--scale", scale, "--root", str(root)]
        done[paper.name] = reproduce._call(command, cwd=Path(__file__).resolve().parents[1], **options) == 0
        print(f"== {paper.name}: {(time.monotonic() - begin) / 60:.1f} min", flush=True)
    return done


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m common.everything", description="Reproduce or verify all ten papers, one after the other."
    )
    parser.add_argument("action", choices=["reproduce", "verify"])
    parser.add_argument("--scale", default="mini")
    parser.add_argument("--root", type=Path, default=reproduce.ROOT, help="the repository (tests use another)")
    args = parser.parse_args(argv)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, reproduce._stop)
    root = args.root.resolve()
    try:
        done = each("run" if args.action == "reproduce" else "verify", root, args.scale)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    if args.action == "reproduce":
        print(f"site: {site.build(root, root / 'runs/site')}")
    wrong = [name for name, success in done.items() if not success]
    verb = "finished" if args.action == "reproduce" else "verified"
    print(f"{len(done) - len(wrong)} of {len(done)} papers {verb} at scale {args.scale}")
    if wrong:
        print(f"not {verb}: {', '.join(wrong)}; what happened stands above", file=sys.stderr)
    return min(1, len(wrong))


if __name__ == "__main__":
    sys.exit(main())
