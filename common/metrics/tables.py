"""Numbers and claims as text: the terminal table, and the markdown tables of report.md and the READMEs."""

import textwrap
from collections.abc import Iterable
from typing import Any

import numpy as np

Result = dict[str, Any]


def number(x: float | None, digits: int = 4) -> str:
    """Four significant digits; whole numbers from 1000 on in full: 1,814,073,344; None is 'n/a'."""
    if x is None:
        return "n/a"
    if abs(x) >= 1000:
        return f"{x:,.0f}" if float(x).is_integer() else f"{x:,.1f}"
    return f"{x:.{digits}g}"


def summary(measured: dict[str, Any]) -> str:
    """One arm: 'mean +/- std (n)', a single run without std, 'n/a' without a run."""
    if measured["n"] == 0:
        return "n/a"
    if measured["n"] == 1:
        return f"{number(measured['mean'])} (1)"
    return f"{number(measured['mean'])} +/- {number(measured['std'], 2)} ({measured['n']})"


def measured_text(result: Result) -> str:
    """All arms of a claim: 'nclpp 94.1 +/- 0.3 (3) vs bsce 92.3 +/- 0.5 (3)'."""
    return " vs ".join(f"{arm} {summary(m)}" for arm, m in result["measured"].items())


def effect_text(result: Result) -> str:
    """'+1.20 [0.31, 2.09] %', a ratio as '1.8 [1.4, 2.3] x', '-' without an effect."""
    effect = result["effect"]
    if effect is None:
        return "-"
    sign = "" if effect["unit"] == "x" else "+"
    values = f"{effect['estimate']:{sign}.3g} [{effect['low']:.3g}, {effect['high']:.3g}]"
    return f"{values} {effect['unit']}" if effect["unit"] else values


def published_text(row: dict[str, Any] | None) -> str:
    """'54.2 % (Table 1, code)'; a number from memory says that it is not compared; no row is an empty cell."""
    if row is None:
        return ""
    value = "unknown" if row["value"] is None else f"{number(row['value'])} {row['unit'] or ''}".strip()
    source = f"{row['source']}, not compared" if row["source"] in ("memory", "unknown") else row["source"]
    return f"{value} ({', '.join(str(x) for x in (row['table'], source) if x)})"


def p_text(result: Result) -> str:
    """The p-value that decides: Holm-adjusted for a primary claim, plain for an exploratory one."""
    p = result["p"] if result["p_holm"] is None else result["p_holm"]
    return "-" if p is None else "<.001" if p < 0.001 else f"{p:.3f}".lstrip("0") if p < 1 else "1"


def verdict_text(result: Result) -> str:
    """The verdict, with 'exploratory' or 'single run' where that limits it."""
    note = result["note"] or ""
    labels = [word for word in ("exploratory", "single run") if word in note]
    return f"{result['verdict']} ({', '.join(labels)})" if labels else result["verdict"]


def terminal_table(results: list[Result], *, width: int = 100) -> str:
    """What a run ends with: the primary claims, each as verdict, statement, effect and arms, no line wider than `width`; then how
    many others there are and how many exact counts agree. Without a primary claim all but the exact ones are shown."""
    tested = [r for r in results if r["kind"] != "exact"]
    shown = [r for r in tested if r["primary"]] or tested
    lines, indent = [], " " * 14
    for r in shown:
        lines += textwrap.wrap(r["statement"], width, initial_indent=f"{r['verdict']:<14}", subsequent_indent=indent)
        p = "" if p_text(r) == "-" else f", p {p_text(r)}"
        detectable = "" if r["mde"] is None else f", detectable {number(r['mde'], 3)}"
        for text in (
            f"effect {effect_text(r)}{p}{detectable}" if r["effect"] else "",
            f"{r['metric']}: {measured_text(r)}",
            f"published: {published_text(r['published'])}" if r["published"] else "",
            r["note"] if r["verdict"] == "not_run" else "",
        ):
            lines += textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent) if text else []
    others, exact = len(tested) - len(shown), [r["verdict"] for r in results if r["kind"] == "exact"]
    if others:
        lines.append(f"{others} exploratory claims: see the report")
    if exact:
        lines.append(f"exact counts and identities: {exact.count('supported')} of {len(exact)} as stated")
    return "\n".join(lines)


def markdown(header: list[str], rows: Iterable[Iterable[Any]]) -> str:
    """A markdown table; pipes and line breaks inside cells are escaped."""

    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def claims_markdown(results: list[Result]) -> str:
    """Published beside measured, one row per claim."""
    header = [
        "claim",
        "kind",
        "published",
        "measured: mean +/- std (n)",
        "effect [interval]",
        "level",
        "p",
        "detectable",
        "verdict",
    ]
    rows = [
        [
            f"**{r['id']}**: {r['statement']}" if r["primary"] else f"{r['id']}: {r['statement']}",
            r["kind"],
            published_text(r["published"]),
            f"{r['metric']}: {measured_text(r)}",
            effect_text(r),
            "-" if r["level"] is None else f"{100 * r['level']:.3g} %",
            p_text(r),
            "-" if r["mde"] is None else number(r["mde"], 3),
            verdict_text(r),
        ]
        for r in results
    ]
    return markdown(header, rows)


def arms_markdown(cells: list[dict[str, Any]], metrics: list[str]) -> str:
    """Every arm that has one of the metrics: mean +/- std (n) of each over its finished runs, and seconds per run."""
    rows = []
    for arm in dict.fromkeys(c["arm"] for c in cells):
        runs = [c for c in cells if c["arm"] == arm and c["status"] == "finished"]
        if metrics and not any(m in c["metrics"] for c in runs for m in metrics):
            continue
        columns = [[c["metrics"][m] for c in runs if m in c["metrics"]] for m in metrics]
        columns.append([c["seconds"] for c in runs])
        texts = []
        for values in columns:
            std = float(np.std(values, ddof=1)) if len(values) > 1 else None
            mean = float(np.mean(values)) if values else None
            texts.append(summary({"mean": mean, "std": std, "n": len(values)}))
        rows.append([arm, *texts])
    return markdown(["arm", *metrics, "seconds"], rows)


def seeds_markdown(cells: list[dict[str, Any]], metrics: list[str]) -> str:
    """Every finished run with its metrics."""
    rows = [
        [c["arm"], c["seed"], *(number(c["metrics"].get(m), 6) for m in metrics), number(c["seconds"], 3)]
        for c in cells
        if c["status"] == "finished" and any(m in c["metrics"] for m in metrics)
    ]
    return markdown(["arm", "seed", *metrics, "seconds"], rows)
