"""What is generated in the READMEs: the first screen of a paper, its results/README.md, and the table of the root.

From claims.yaml and results/<scale>/."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

from common.metrics import tables
from common.metrics.claims import VERDICTS, load_document

PAPERS = {
    "ncl_pp": "experts learn long tails together",
    "dcp_nas": "a real parent guides 1-bit search",
    "fm_vit": "one anti-spoofing model, any sensors",
    "q_detr": "2-bit detectors imitate rectified queries",
    "ap_fer": "attention drops patches of face images",
    "q_vit": "2-bit transformers keep attention's information",
    "iqa_attack": "invisible changes fool quality models",
    "adaptive_prune": "each image keeps the tokens it needs",
    "rbonn": "recurrent bilinear updates for binary networks",
    "lifelong": "attack backgrounds, fuse learners, forget less",
}
BEGIN, END = "<!-- evidence:begin -->", "<!-- evidence:end -->"
DEPLOY = ("<!-- deploy:begin -->", "<!-- deploy:end -->")
EQUATIONS = ("<!-- equations:begin -->", "<!-- equations:end -->")
LIBRARY = ("<!-- library:begin -->", "<!-- library:end -->")
EMBEDDED = ("mini", "full")  # embedded data; every other scale is real data
FRONT = 5  # rows on a first screen
MAPPED = 5  # equations in a README, all of them in results/README.md


def render_front(paper_dir: str | Path) -> str:
    """At most five rows of a paper's evidence: claim | paper | here | verdict. Claims marked `front` come first, then the primary
    ones, then others, each at its best recorded scale (real images before embedded ones, more seeds before fewer); none without
    a verdict."""
    document, recorded = load_document(paper_dir), _recorded(Path(paper_dir))
    rows = []
    for claim in document["claims"]:
        found = [(scale, by_id[claim["id"]]) for scale, by_id in recorded.items() if claim["id"] in by_id]
        found = [(scale, r) for scale, r in found if r["verdict"] != "not_run" and r["kind"] != "exact"]
        if found:
            scale, result = min(found, key=lambda f: _strength(*f))
            order = (not claim["front"], not claim["primary"], scale_order(scale))
            text = [claim["statement"], tables.published_text(claim["published"]), f"{_effect(result)} ({scale})"]
            rows.append((order, [*text, tables.verdict_text(result)]))
    chosen = [row for _, row in sorted(rows, key=lambda r: r[0])[:FRONT]]
    exact = [r for by_id in recorded.values() for r in by_id.values() if r["kind"] == "exact"]
    right = {r["id"] for r in exact if r["verdict"] == "supported"} - {
        r["id"] for r in exact if r["verdict"] == "contradicted"
    }
    total = len({r["id"] for r in exact})
    counts = f" Exact counts: {len(right)} of {total} as stated." if exact else ""
    table = (
        tables.markdown(["claim", "paper", "here, with interval (scale)", "verdict"], chosen)
        if chosen
        else "Nothing recorded yet."
    )
    return f"{table}\n\nEvery claim at every scale: [results](results/README.md).{counts}"


def render_equations(paper_dir: str | Path, *, most: int = MAPPED, up: str = "") -> str:
    """Where the paper's equations stand in the code: the first `most` rows, and where the others are. up: path to the folder."""
    rows, equations = [], load_document(paper_dir)["equations"]
    for row in equations[:most]:
        module, _, name = row["code"].partition(":")
        file = module.split(".", 1)[1].replace(".", "/") + ".py"
        rows.append([row["source"], row["says"], f"[`{name}`]({up}{file})"])
    table = tables.markdown(["source", "what it says", "code"], rows)
    return (
        table if len(equations) <= most else f"{table}\n\nAll {len(equations)}: [results](results/README.md#equations)."
    )


def render_deployment(paper_dir: str | Path) -> str | None:
    """The recorded bench of a network on bits or on 8-bit integers: bytes and milliseconds of every kind, in the least and the
    most that was measured; None without results/deploy/bench.json."""
    file = Path(paper_dir) / "results/deploy/bench.json"
    if not file.is_file():
        return None
    rows = json.loads(file.read_text())
    if any(r.get("kind") == "integer" for r in rows):
        from common.metrics.integer_deployment import render  # it times networks, too: not without need

        return render(rows)
    by_kind = {
        kind: [r for r in rows if r.get("kind") == kind] for kind in ("network", "bytes", "ops", "accuracy", "layer")
    }
    settings, size = by_kind["network"], by_kind["bytes"][0]
    chosen = sorted(settings, key=lambda r: (r["threads"], r["batch"]))
    chosen = [chosen[0], chosen[-1]] if len(chosen) > 1 else chosen
    bits = "bits, real-valued rest "
    kinds = {
        "float32": ([k for k in chosen[0]["forms"] if "fp32" in k], size["baseline"]),
        "bfloat16": ([k for k in chosen[0]["forms"] if k.startswith("bf16")], size["bf16"]),
        bits + "float32": (["packed", "packed compiled"], size["ours"]),
        bits + "bfloat16": (["packed, rest bf16", "packed, rest bf16 compiled"], size["ours"]),
    }  # fmt: skip
    table = []
    for kind, (names, nbytes) in kinds.items():
        cells = []
        for row in chosen:
            best = min((n for n in names if n in row["forms"]), key=lambda n: row["forms"][n][0])
            median, low, high = row["forms"][best]
            which = (
                " ".join(w for w in best.split() if w not in ("fp32", "bf16", "packed", "packed,", "rest")) or "eager"
            )
            cells.append(f"{median:.1f} [{low:.1f}, {high:.1f}], {which}")
        table.append([kind, f"{nbytes / 1e6:.1f}", *cells])
    header = [
        f"{settings[0]['network']} in",
        "MB",
        *(f"ms: batch {r['batch']}, {_threads(r['threads'])}" for r in chosen),
    ]
    notes = _deployment_notes(settings, by_kind) + _other_instructions(file.parent)
    return tables.markdown(header, table) + "\n\n" + " ".join(notes)


def _other_instructions(folder: Path) -> list[str]:
    """A sentence per bench_<instruction set>.json: what the same bench gave with fewer instructions."""
    sentences = []
    for file in sorted(folder.glob("bench_*.json")):
        rows = [r for r in json.loads(file.read_text()) if r.get("kind") == "network"]
        by_threads = {
            n: [f"{r['ratio']:.2f}" for r in rows if r["threads"] == n] for n in sorted({r["threads"] for r in rows})
        }
        ratios = "; ".join(f"x {' and '.join(found)} on {_threads(n)}" for n, found in by_threads.items())
        batches = " and ".join(str(b) for b in sorted({r["batch"] for r in rows}))
        without = "".join(f"; without {form}: {why}" for form, why in rows[0].get("skipped", {}).items())
        sentences.append(
            f"With {rows[0]['isa']}, over the fastest float form there: {ratios} (batch {batches}{without})."
        )
    return sentences


def _deployment_notes(settings: list[dict[str, Any]], by_kind: dict[str, list[dict[str, Any]]]) -> list[str]:
    ratios, limits = [r["ratio"] for r in settings], [r["limit"] for r in settings]
    machine = settings[0]["machine"]
    notes = [
        f"Over the fastest float form: x {min(ratios):.2f} to {max(ratios):.2f}; with binary layers that take no time it would "
        f"be x {min(limits):.2f} to {max(limits):.2f}."
    ]
    if layers := [r["ratio"] for r in by_kind["layer"]]:
        notes.append(
            f"A binary layer alone, over float32 in the library's own order: x {min(layers):.1f} to {max(layers):.1f}."
        )
    notes += [f"In theory (OPs, another thing): x {r['ratio']:.2f}." for r in by_kind["ops"]]
    notes += [
        f"Top-1 of `{r['arm']}` on {r['data']}: {r['ours']:.1f} +/- {r['std']:.1f} % ({r['seeds']} seeds), the same in every row "
        "but bfloat16, which was not evaluated." for r in by_kind["accuracy"]
    ]  # fmt: skip
    notes.append(
        f"Medians and quartiles of one run, 224 x 224, random weights; {machine.get('cpu', 'unknown')}, {settings[0]['isa']}."
    )
    return notes


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def render_results(paper_dir: str | Path) -> str:
    """results/README.md: a table per recorded scale with every claim, what is not run yet, the exact counts, the figures."""
    paper_dir = Path(paper_dir)
    document, recorded = load_document(paper_dir), _recorded(paper_dir)
    parts = [
        f"# All results of {paper_dir.name}",
        "Generated from `claims.yaml` and the recorded runs. Bold: primary (p adjusted by Holm, the interval at the level "
        "at which Holm judged). Effects are signed so that the claimed side is positive (a ratio: above 1). Detectable: the "
        "effect that "
        "this number of seeds finds with 80 % power. A paper's number stands beside ours only to be read; at a scale other than "
        "`paper` it was measured on other data.",
    ]
    for scale in sorted(recorded, key=scale_order):
        by_id = recorded[scale]
        rows = [
            _result_row(paper_dir, c, scale, by_id[c["id"]])
            for c in document["claims"]
            if c["id"] in by_id and c["kind"] != "exact"
        ]
        parts += [
            f"## {_title(scale)}",
            f"`{_made_by(paper_dir.name, scale)}`; [report]({scale}/report.md) with every arm and seed.",
        ]
        parts.append(
            tables.markdown(
                ["claim", "paper", "measured: mean +/- std (seeds)", "effect", "p", "detectable", "verdict", "time"],
                rows,
            )
        )
        if (paper_dir / "results" / scale / "claims.png").is_file():
            parts.append(f"![effects with their intervals, {scale}]({scale}/claims.png)")
    known = {i for by_id in recorded.values() for i in by_id}
    waiting = [
        [c["statement"], tables.published_text(c["published"]), _command(paper_dir.name, c)]
        for c in document["claims"]
        if c["id"] not in known
    ]
    if waiting:
        parts += ["## Not run yet", tables.markdown(["claim", "paper", "command"], waiting)]
    parts += _exact_part(document, recorded)
    if document["equations"]:
        parts += ["## Equations", render_equations(paper_dir, most=len(document["equations"]), up="../")]
    parts += _guide_parts(document)
    rows = [
        [p["table"], p["setting"], p["metric"], tables.published_text(p)]
        for p in document["published"]
        if p["source"] != "ours"
    ]
    if rows:
        parts += ["## Published numbers", tables.markdown(["where", "setting", "metric", "value (source)"], rows)]
    return "\n\n".join(parts) + "\n"


def _result_row(paper_dir: Path, claim: dict[str, Any], scale: str, result: dict[str, Any]) -> list[str]:
    statement = f"**{claim['statement']}**" if claim["primary"] else claim["statement"]
    return [
        statement, tables.published_text(claim["published"]), f"{claim['metric']}: {tables.measured_text(result)}",
        _effect(result), tables.p_text(result), "-" if result["mde"] is None else tables.number(result["mde"], 3),
        tables.verdict_text(result), _seconds(paper_dir / "results" / scale / "cells.csv", claim["arms"]),
    ]  # fmt: skip


def _exact_part(document: dict[str, Any], recorded: dict[str, dict]) -> list[str]:
    rows, right = [], 0
    for claim in (c for c in document["claims"] if c["kind"] == "exact"):
        found = next((by_id[claim["id"]] for by_id in recorded.values() if claim["id"] in by_id), None)
        verdict = "not_run" if found is None else found["verdict"]
        right += verdict == "supported"
        here = "" if found is None else tables.measured_text(found)
        rows.append([claim["statement"], tables.published_text(claim["published"]), here, verdict])
    if not rows:
        return []
    table = tables.markdown(["count", "stated (source)", "here", "verdict"], rows)
    summary = f"{right} of {len(rows)} exact counts and identities as stated"
    return ["## Exact", f"<details><summary>{summary}</summary>\n\n{table}\n\n</details>"]


def _guide_parts(document: dict[str, Any]) -> list[str]:
    """Which method to take, and what is wrong in published code and text."""
    parts, rows = [], [[r["task"], r["take"], r["says"]] for r in document["advice"]]
    if rows:
        parts += ["## Which method should I take?", tables.markdown(["task", "take", "because"], rows)]
    tests = [(r, *r["test"].split("::")) for r in document["defects"]]
    rows = [[r["where"], r["says"], r["here"], f"[`{name}`](../../{file})"] for r, file, name in tests]
    if rows:
        header = ["where", "what happens", "here", "shown by"]
        parts += ["## What is wrong in published code and text", tables.markdown(header, rows)]
    return parts


def render_library(root: str | Path) -> str:
    """What can be imported from where, a row per paper: the names of `equations:` by module."""
    rows = []
    for paper in PAPERS:
        modules: dict[str, list[str]] = {}
        for row in load_document(Path(root) / paper)["equations"]:
            module, _, name = row["code"].partition(":")
            names = modules.setdefault(module, [])
            if (first := name.split(".")[0]) not in names:
                names.append(first)
        text = "; ".join(f"`{m}`: {', '.join(f'`{n}`' for n in names)}" for m, names in modules.items())
        rows.append([f"[`{paper}`]({paper}/results/README.md#equations)", text])
    return tables.markdown(["paper", "module: names"], rows)


def render_root_table(root: str | Path) -> str:
    """One row per paper: the idea in about six words, its best evidence in one clause, the tally of verdicts."""
    rows = []
    for paper, idea in PAPERS.items():
        folder = Path(root) / paper
        if not (folder / "claims.yaml").is_file():
            rows.append([f"`{paper}`", idea, "not started", ""])
            continue
        recorded = _recorded(folder)
        tally = [f"{s}: {_tally(list(recorded[s].values()))}" for s in sorted(recorded, key=scale_order)]
        rows.append(
            [f"[`{paper}`]({paper}/README.md)", idea, _best(folder, recorded), "<br>".join(tally) or "none recorded"]
        )
    return tables.markdown(["paper", "idea", "best evidence here", "all verdicts"], rows)


def _best(folder: Path, recorded: dict[str, dict]) -> str:
    """The claim marked `front` first, else the first primary one, at its best scale, in one clause."""
    claims = sorted(load_document(folder)["claims"], key=lambda c: (not c["front"], not c["primary"]))
    for claim in claims:
        found = [(scale, by_id[claim["id"]]) for scale, by_id in recorded.items() if claim["id"] in by_id]
        found = [(scale, r) for scale, r in found if r["verdict"] != "not_run" and r["kind"] != "exact"]
        if found:
            scale, result = min(found, key=lambda f: _strength(*f))
            return f"{claim['statement'].rstrip('.')}: {_effect(result)}, **{result['verdict']}** ({scale})"
    return "none recorded"


def _effect(result: dict[str, Any]) -> str:
    """The effect with its interval, and the margin that was taken off; without a test what was measured."""
    if result["effect"] is None:
        return tables.measured_text(result)
    plain = 1 if result["kind"] == "ratio" else 0
    margin = result.get("margin", plain)
    beyond = "" if margin == plain else f" beyond {'a factor of ' if plain else ''}{tables.number(margin, 3)}"
    return f"{tables.effect_text(result)}{beyond}"


def _strength(scale: str, result: dict[str, Any]) -> tuple[int, int, int]:
    """Sorts records of one claim: real images before embedded ones, more seeds before fewer, then the order of scales."""
    seeds = max((m["n"] for m in result["measured"].values()), default=0)
    kind = scale_order(scale)[0]
    return min(kind, scale_order("full")[0]), -seeds, kind


def scale_order(scale: str) -> tuple[int, str]:
    kinds = ("paper", "gpu", "real", "full", "mini", "bench")
    return next(i for i, kind in enumerate(kinds) if scale.startswith(kind)), scale


def _title(scale: str) -> str:
    if scale == "paper":
        return "Here, paper scale"
    if scale == "bench":
        return "Here, speed on one machine, `bench`"
    return f"Here, embedded data, `{scale}`" if scale in EMBEDDED else f"Here, real images, `{scale}`"


def _tally(results: list[dict[str, Any]]) -> str:
    """'2 supported, 1 contradicted; exact 9/9': exact claims would drown the tested ones."""
    exact = [r["verdict"] == "supported" for r in results if r["kind"] == "exact"]
    counts = Counter(r["verdict"] for r in results if r["kind"] != "exact")
    text = ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v]) or "no claim tested"
    return f"{text}; exact {sum(exact)}/{len(exact)}" if exact else text


def update_readmes(root: str | Path, check: bool) -> list[Path]:
    """Renew the generated blocks in the README of every started paper and of the root, and results/README.md.

    Returns the files that were out of date; with check=True nothing is written. Raises FileNotFoundError for a README that is
    missing, ValueError for one without its markers."""
    root, fresh = Path(root), {}
    for paper in PAPERS:
        folder = root / paper
        if not (folder / "claims.yaml").is_file():
            continue
        text = _filled(folder / "README.md", _read(folder / "README.md"), (BEGIN, END), render_front(folder))
        if load_document(folder)["equations"]:
            text = _filled(folder / "README.md", text, EQUATIONS, render_equations(folder))
        if (deployment := render_deployment(folder)) is not None:
            text = _filled(folder / "README.md", text, DEPLOY, deployment)
        fresh[folder / "README.md"] = text
        fresh[folder / "results/README.md"] = render_results(folder)
    front, text = root / "README.md", _read(root / "README.md")
    fresh[front] = _filled(front, text, (BEGIN, END), render_root_table(root))
    if LIBRARY[0] in text:
        fresh[front] = _filled(front, fresh[front], LIBRARY, render_library(root))
    stale = [file for file, text in fresh.items() if not file.is_file() or file.read_text() != text]
    for file in () if check else stale:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(fresh[file])
    return stale


def _filled(file: Path, text: str, markers: tuple[str, str], block: str) -> str:
    head, begin, rest = text.partition(markers[0])
    _, end, tail = rest.partition(markers[1])
    if not begin or not end:
        raise ValueError(
            f"{file}: no block for what is generated; add the lines {markers[0]} and {markers[1]} where it belongs"
        )
    return f"{head}{begin}\n{block}\n{end}{tail}"


def _recorded(paper_dir: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """{scale: {claim id: result}} of the recorded evidence, the best scale first."""
    found = {}
    for file in sorted(paper_dir.glob("results/*/claims.json"), key=lambda f: scale_order(f.parent.name)):
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


def _command(paper: str, claim: dict[str, Any]) -> str:
    if claim["kind"] == "released_weights":
        return f"`make evaluate-{paper} WEIGHTS= DATA=`"
    scale = "mini" if "mini" in claim["scale"] else claim["scale"][0]
    if scale == "mini":
        return f"`make reproduce-{paper}`"
    only = f" ONLY={claim['id']}" if scale == "paper" else ""
    return f"`{_made_by(paper, scale)}{only}`"


def _made_by(paper: str, scale: str) -> str:
    return f"make bench-{paper} ARGS=record=true" if scale == "bench" else f"make reproduce-{paper} SCALE={scale}"


def _read(file: Path) -> str:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing; write it with the lines {BEGIN} and {END} where the table belongs")
    return file.read_text()
