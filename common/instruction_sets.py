"""Does a record hang on one instruction set?  make isa-<paper>, or python -m common.instruction_sets <paper> [--scale mini]

One recorded cell is run again twice, with this machine's own instructions and capped to AVX2, and what came out is written to
results/<scale>/isa.json, which `make report` shows. A cap acts in every library that a training calls: torch, oneDNN, OpenBLAS,
MKL and Numba choose their kernels each for itself.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common import reproduce
from common.reproduce import AVX2
from common.runs import RunError
from common.scripts import one_line, override


def compare(recorded: dict[str, float], now: dict[str, float]) -> dict[str, Any]:
    """{metrics, same, worst}: how many numbers there are, how many are the recorded ones, and [name, recorded, now] of the
    one that is farthest from its record relative to it (None if all are the same)."""
    pairs = [(name, value, now.get(name)) for name, value in recorded.items()]
    other = [pair for pair in pairs if not reproduce.same(*pair[1:])]
    worst = max(
        other, key=lambda p: float("inf") if p[2] is None else abs(p[2] - p[1]) / max(1e-12, abs(p[1])), default=None
    )
    return {"metrics": len(pairs), "same": len(pairs) - len(other), "worst": worst and list(worst)}


def measure(paper: Path, scale: str, extra: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """A row {kind, isa, cpu, cell, recorded_on, metrics, same, worst} for this machine's own instructions and for AVX2, written
    to results/<scale>/isa.json. Raises RunError without a record."""
    rows = []
    for kind, env in (("native", dict.fromkeys(AVX2)), ("AVX2", AVX2)):
        old, new = reproduce.again(paper, scale, extra=extra, env=env)
        there, here = (
            f"{r['machine']['cpu']}, {r['machine'].get('isa', 'instruction set not noted')}" for r in (old, new)
        )
        row = {"kind": kind, "cell": old["cell"], "recorded_on": there, "here": here}
        rows.append(row | compare(old["metrics"], new["metrics"]))
        print(f"{paper.name} {old['cell']}, {kind}: {rows[-1]['same']} of {rows[-1]['metrics']} numbers as recorded")
    (paper / "results" / scale / "isa.json").write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m common.instruction_sets", description="One recorded cell, natively and in AVX2."
    )
    parser.add_argument("paper")
    parser.add_argument("--scale", default="mini")
    parser.add_argument("--data", default="", help="data.root of the cell")
    parser.add_argument("--root", type=Path, default=reproduce.ROOT, help="the repository (tests use another)")
    args = parser.parse_args(argv)
    extra = (override("data.root", Path(args.data).expanduser().absolute()),) if args.data else ()
    try:
        measure(args.root.resolve() / args.paper, args.scale, extra)
    except (RunError, ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
