"""Claims as data: read `claims.yaml`, read the finished runs, decide each claim.

Effects are signed so that the claimed side is positive (ordering, property) or above 1 (ratio), with
s = +1 for `better: higher` and -1 for lower:
ordering  s (a - b) - margin;  ratio  (a / b)^s / margin;  property  s (a - margin).
A property that is a correlation (`fisher_z: true`) is tested on Fisher's z = artanh r, and its interval turned back into r: the
t interval of correlations themselves would leave -1..1.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from common.metrics import stats
from common.scripts import arm_name

BASES = ("text+code", "text", "code", "reconstruction")
SOURCES = ("paper", "code", "cited", "ours", "memory", "unknown")  # ours: a count of our own, published by nobody
COMPARABLE = ("paper", "code", "cited", "ours")  # a number from memory is shown, never compared
TESTED = ("ordering", "ratio", "property")  # kinds with a t test
COMPARED = ("exact", "value", "released_weights")  # kinds that need a published number
VERDICTS = ("supported", "contradicted", "equivalent", "inconclusive", "not_run")
STATUSES = ("running", "finished", "failed")
SCALE = re.compile(r"mini|full|paper|bench|(real|gpu)_\w+")  # bench: times of one machine, see bench.py
MIN_SEEDS = 3
MAX_PRIMARY = 3

_PUBLISHED_KEYS = {"id", "table", "setting", "metric", "value", "unit", "source"}
_ROWS = {
    "abstract": {"says", "claims"}, "advice": {"task", "take", "says", "claims"}, "defects": {"where", "says", "here", "test"},
    "equations": {"source", "says", "code"},
}  # fmt: skip
_CLAIM_KEYS = {"id", "statement", "kind", "scale", "primary", "published", "metric", "arms"}
_CLAIM_OPTIONAL = {"better", "margin", "tol", "note", "front", "gated", "fisher_z"}

Measurements = dict[str, dict[int, dict[str, float]]]


# ---------------------------------------------------------------------------------------------- claims.yaml


def load_claims(paper_dir: str | Path) -> list[dict[str, Any]]:
    """The claims of `<paper_dir>/claims.yaml`, see `load_document`."""
    return load_document(paper_dir)["claims"]


def load_document(paper_dir: str | Path) -> dict[str, Any]:
    """Read and check `<paper_dir>/claims.yaml`; return {basis, abstract, advice, defects, metrics, published, claims, equations},
    with defaults.

    abstract: what the paper's abstract claims, in order, as {says, claims: ids of the claims that test it, maybe none}.
    advice: which method to take, {task, take, says, claims: ids of the claims that carry it}.
    defects: what is wrong in published code or text, {where, says, here: what is done about it, test: file::name}.
    metrics: what a figure calls a metric, {id: {says, unit}}.
    In the result `scale` is a list, `published` of a claim is its published row or None, `margin` and `tol` are
    floats, `better` and `note` may be None. For kind ratio, margin is a factor (default 1) and tol is relative.
    Raises FileNotFoundError, or ValueError naming file, claim and fix."""
    path = Path(paper_dir) / "claims.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no claims there; write basis, published and claims")
    try:
        document = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # libyaml: tenfold
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    optional = {"abstract", "advice", "defects", "metrics", "equations"}
    _check_keys(f"{path}", document, {"basis", "published", "claims"}, optional)
    _check(document["basis"] in BASES, f"{path}: basis {document['basis']!r}", f"use one of {BASES}")
    rows = [_published_row(f"{path}: published[{i}]", row) for i, row in enumerate(document["published"] or [])]
    by_id = {row["id"]: row for row in rows}
    _check_unique(path, "published", [row["id"] for row in rows])
    claims = [_claim(f"{path}: claims[{i}]", c, by_id, path) for i, c in enumerate(document["claims"] or [])]
    _check_unique(path, "claim", [c["id"] for c in claims])
    for scale in sorted({s for c in claims for s in c["scale"]}):
        primary = [c["id"] for c in claims if c["primary"] and scale in c["scale"]]
        _check(
            len(primary) <= MAX_PRIMARY,
            f"{path}: claims {primary} are all primary at scale {scale!r}",
            f"keep at most {MAX_PRIMARY} and set primary: false on the others",
        )
    lists = {key: document.get(key) or [] for key in _ROWS}
    for key, found in lists.items():
        for i, row in enumerate(found):
            _check_keys(f"{path}: {key}[{i}]", row, _ROWS[key], set())
            unknown = sorted(set(row.get("claims", [])) - {c["id"] for c in claims})
            _check(not unknown, f"{path}: {key}[{i}]: no claims {unknown}", "name claims of this file, or write []")
    metrics = _metrics(path, document.get("metrics") or {})
    return {"basis": document["basis"], **lists, "metrics": metrics, "published": rows, "claims": claims}


def _metrics(path: Path, metrics: dict[str, Any]) -> dict[str, dict[str, str]]:
    for name, row in metrics.items():
        _check_keys(f"{path}: metrics {name}", row, {"says"}, {"unit"})
    return {name: {"unit": "", **row} for name, row in metrics.items()}


def _published_row(where: str, row: Any) -> dict[str, Any]:
    _check_keys(where, row, _PUBLISHED_KEYS, set())
    where = f"{where} {row['id']!r}"
    _check(isinstance(row["id"], str), f"{where}: id", "use a short name")
    _check(row["source"] in SOURCES, f"{where}: source {row['source']!r}", f"use one of {SOURCES}")
    if row["value"] is not None:
        row = row | {"value": _number(where, row, "value", row["value"])}
    return row


def _claim(where: str, raw: Any, published: dict[str, dict], path: Path) -> dict[str, Any]:
    _check_keys(where, raw, _CLAIM_KEYS, _CLAIM_OPTIONAL)
    where = f"{path}: claim {raw['id']!r}"
    kind, arms, better = raw["kind"], raw["arms"], raw.get("better")
    _check(kind in TESTED + COMPARED, f"{where}: kind {kind!r}", f"use one of {TESTED + COMPARED}")
    _check(isinstance(raw["id"], str), f"{where}: id", "use a short name")
    _check(isinstance(raw["primary"], bool), f"{where}: primary {raw['primary']!r}", "use true or false")
    _check(isinstance(raw["metric"], str), f"{where}: metric {raw['metric']!r}", "name one metric")
    scales = [raw["scale"]] if isinstance(raw["scale"], str) else raw["scale"]
    _check(
        isinstance(scales, list) and bool(scales) and all(SCALE.fullmatch(str(s)) for s in scales),
        f"{where}: scale {raw['scale']!r}",
        "use mini, full, paper, bench, real_<set>, gpu_<set> or a list of these",
    )
    wanted = 2 if kind in ("ordering", "ratio") else 1
    _check(
        isinstance(arms, list) and len(set(map(str, arms))) == len(arms) == wanted,
        f"{where}: arms {arms!r}",
        "list [claimed better, other], two different arms" if wanted == 2 else "list exactly one arm, [arm]",
    )
    _check(
        better in ("higher", "lower") or (better is None and kind in COMPARED),
        f"{where}: better {better!r}",
        "use higher or lower",
    )
    margin = _number(where, raw, "margin", raw.get("margin", 1 if kind == "ratio" else 0))
    tol = _number(where, raw, "tol", raw.get("tol", 0))
    _check(tol >= 0, f"{where}: tol {tol}", "use a number >= 0")
    _check(kind != "ratio" or margin > 0, f"{where}: margin {margin}", "a ratio's margin is a factor > 0")
    _check(kind in TESTED or margin == 0, f"{where}: margin {margin}", f"a claim of kind {kind} uses tol only")
    _check(kind != "value" or tol > 0, f"{where}: tol {tol}", "declare the tolerance of a value, tol > 0")
    fisher = bool(raw.get("fisher_z", False))
    _check(
        not fisher or (kind == "property" and margin == 0), f"{where}: fisher_z", "it is for a property with margin 0"
    )
    row = raw["published"]
    _check(
        row is None or row in list(published),
        f"{where}: published {row!r} does not exist",
        f"use one of {[*published]} or null",
    )
    row = None if row is None else published[row]
    if kind in COMPARED:
        usable = row is not None and row["value"] is not None and row["source"] in COMPARABLE
        found = "null" if row is None else f"{row['id']} = {row['value']} from {row['source']}"
        _check(
            usable,
            f"{where}: kind {kind} compares with a published number but published is {found}",
            f"name a row with a value and a source in {COMPARABLE}",
        )
    return {
        **{key: raw[key] for key in ("id", "statement", "kind", "primary", "metric")},
        "arms": [arm_name(arm) for arm in arms],  # as their directories are called
        **{"scale": scales, "published": row, "better": better, "margin": margin, "tol": tol, "note": raw.get("note")},
        "front": bool(raw.get("front", False)),  # shown on the first screen of the README
        # a run whose baseline is not competent has no such metric: left out and named
        "gated": bool(raw.get("gated", False)),
        "fisher_z": fisher,
    }


def _check(condition: bool, problem: str, fix: str) -> None:
    if not condition:
        raise ValueError(f"{problem}; {fix}")


def _check_keys(where: str, mapping: Any, required: set[str], optional: set[str]) -> None:
    _check(isinstance(mapping, dict), f"{where}: {mapping!r} is not a mapping", f"write {sorted(required)}")
    missing, unknown = required - set(mapping), set(mapping) - required - optional
    name = f"{where} {mapping['id']!r}" if "id" in mapping else where
    _check(not missing, f"{name}: missing {sorted(missing)}", "add them")
    _check(not unknown, f"{name}: unknown {sorted(map(str, unknown))}", f"allowed are {sorted(required | optional)}")


def _check_unique(path: Path, what: str, ids: list[str]) -> None:
    twice = sorted({str(i) for i in ids if ids.count(i) > 1})
    _check(not twice, f"{path}: {what} ids used twice: {twice}", "give every entry its own id")


def _number(where: str, mapping: dict, key: str, value: Any) -> float:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    _check(ok, f"{where}: {key} {mapping.get(key)!r}", "write a finite number (YAML needs a dot: 1.0e-3)")
    return value


# ------------------------------------------------------------------------------------------------- evidence


def read_runs(runs_dir: str | Path) -> tuple[Measurements, list[dict[str, Any]]]:
    """Read every `<arm>/seed<k>/result.json` below `runs_dir` = `<paper>/runs/<scale>`.

    The arm is the directory path between the scale folder and `seed<k>`, e.g. `nclpp/optim.lr=0.1`.
    Returns ({arm: {seed: metrics}} of the finished runs, all cells sorted by arm and seed: the content of the file
    with `arm`, `seed` and `path` (relative)). Raises FileNotFoundError without the folder, ValueError naming a file
    that is not a result, or whose recorded seed or scale differs from where it lies (a copied run)."""
    runs_dir = Path(runs_dir)
    if not runs_dir.is_dir():
        raise FileNotFoundError(f"{runs_dir}: no runs there; train the arms of this scale first")
    cells = []
    for file in runs_dir.rglob("result.json"):
        place = file.parent.relative_to(runs_dir)
        seed = re.fullmatch(r"seed(\d+)", place.name)
        _check(seed is not None and len(place.parts) > 1, f"{file}: not in <arm>/seed<k>", "move it or delete it")
        try:
            cell = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: not valid JSON ({error}); delete it and run the cell again") from error
        missing = {"scale", "seed", "status", "metrics", "seconds"} - set(cell)
        _check(not missing, f"{file}: missing {sorted(missing)}", "run the cell again")
        _check(cell["status"] in STATUSES, f"{file}: status {cell['status']!r}", f"use one of {STATUSES}")
        here = (runs_dir.resolve().name, int(seed[1]))  # pyright: ignore[reportOptionalSubscript]
        recorded = (cell["scale"], cell["seed"])
        _check(recorded == here, f"{file}: recorded as scale, seed {recorded}", f"its folder says {here}; run it again")
        cells.append(cell | {"arm": place.parent.as_posix(), "path": file.parent.as_posix()})
    cells.sort(key=lambda cell: (cell["arm"], cell["seed"]))
    measurements: Measurements = {}
    for cell in cells:
        if cell["status"] == "finished":
            measurements.setdefault(cell["arm"], {})[cell["seed"]] = cell["metrics"]
    return measurements, cells


def read_external(paper_dir: str | Path) -> dict[str, list[dict[str, Any]]]:
    """Records of released weights in `<paper>/results/external/*.json`: {claim, value, weights_sha256, n}.

    claim: the id of the claim that the record answers, or null; n: number of test images. Returns {claim id: records,
    each with its file's `name`}. ValueError for a bad one."""
    records: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(Path(paper_dir).glob("results/external/*.json")):
        try:
            record = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: not valid JSON ({error}); write claim, value, weights_sha256, n") from error
        missing = {"claim", "value", "weights_sha256", "n"} - set(record)
        _check(not missing, f"{file}: missing {sorted(missing)}", "write claim, value, weights_sha256, n")
        _number(f"{file}", record, "value", record["value"])
        sha = str(record["weights_sha256"])
        _check(bool(re.fullmatch("[0-9a-f]{64}", sha)), f"{file}: weights_sha256 {sha!r}", "write 64 hex digits")
        _check(isinstance(record["n"], int) and record["n"] > 0, f"{file}: n {record['n']!r}", "write a count > 0")
        if record["claim"] is not None:  # a record that answers no claim is kept for the reader
            records.setdefault(record["claim"], []).append(record | {"name": file.stem})
    return records


# ------------------------------------------------------------------------------------------------- verdicts


def test_claims(
    claims: list[dict[str, Any]],
    measurements: Measurements,
    scale: str,
    *,
    external: dict[str, list[dict[str, Any]]] | None = None,
) -> list[dict[str, Any]]:
    """Decide every one of `claims` (see `load_claims`) that is made at `scale`.

    measurements: {arm: {seed: {metric: value}}} of finished runs. external: see `read_external`.
    Returns one dict per claim: id, statement, kind, primary, published (the row or None), measured {arm: {mean, std,
    n, seeds}}, effect {estimate, low, high, n, unit} or None, mde, verdict, p, p_holm, level, metric, arms, better,
    margin, tol, note. The interval is the t interval at `level`, the level at which Holm judged the claim (95 % for
    exploratory ones), so it excludes "no effect" exactly when the verdict is supported or contradicted. Holm runs
    over all primary claims with a t test; one that could not be run keeps its place (p = 1), so that leaving
    a claim out never makes the others easier. ValueError: metric missing or not finite in a finished run."""
    external = external or {}
    known = [c["id"] for c in claims if c["kind"] == "released_weights"]
    stray = sorted(set(external) - set(known))
    _check(not stray, f"external records for {stray}", f"name one of the released_weights claims {known}")
    results = [_measure(c, measurements, external.get(c["id"], [])) for c in claims if scale in c["scale"]]
    effects = {r["id"]: np.array([*seed_effects(r, log=True).values()]) for r in results if r["kind"] in TESTED}
    for result in results:
        if result["kind"] in TESTED and len(effects[result["id"]]) >= MIN_SEEDS:
            result["p"] = stats.t_test(effects[result["id"]])
    family = [r for r in results if r["primary"] and r["kind"] in TESTED]
    p_values = [1.0 if r["p"] is None else r["p"] for r in family]
    for result, p_holm, level in zip(family, stats.holm(p_values), stats.holm_levels(p_values), strict=True):
        if result["p"] is not None:
            result.update(p_holm=p_holm, level=level)
    for result in results:
        if result["kind"] in COMPARED:
            _compare(result)
        elif result["p"] is not None:
            _judge(result, effects[result["id"]])
        else:
            have = len(effects[result["id"]])
            _note(result, f"{have} of at least {MIN_SEEDS} finished seeds{' in common' * (len(result['arms']) > 1)}")
    return results


def seed_effects(result: dict[str, Any], *, log: bool = False) -> dict[int, float]:
    """{seed: effect} of one result of `test_claims` over the seeds its arms have in common, signed so that positive
    (ratio: above 1) is the claimed side and with the margin taken off. log=True: ratios as logarithms, correlations as
    Fisher's z."""
    values = [{int(k): v for k, v in result["measured"][arm]["seeds"].items()} for arm in result["arms"]]
    seeds = sorted(set.intersection(*map(set, values)))
    sign = 1 if result["better"] == "higher" else -1
    ratio, fisher = result["kind"] == "ratio", result.get("fisher_z", False)
    columns = np.array([[v[s] for s in seeds] for v in values], dtype=float).reshape(len(values), -1)
    largest = np.abs(columns).max(initial=0)
    if ratio:
        columns, margin = np.log(columns), math.log(result["margin"])
        largest = 1.0
    else:
        margin = result["margin"]
    if fisher:
        columns = np.arctanh(columns)
    if result["kind"] == "property":
        effects = sign * (columns[0] - margin)
    else:
        effects = sign * (columns[0] - columns[1]) - margin
    # Equal up to rounding is equal: otherwise .3 - .2 and .2 - .1 would pass for random variation.
    if len(effects) and np.ptp(effects) <= 1e-12 * max(largest, abs(margin)):
        mean = float(effects.mean())
        effects = np.full_like(effects, 0.0 if abs(mean) <= 1e-12 * max(largest, abs(margin)) else mean)
    if not log:
        effects = np.exp(effects) if ratio else np.tanh(effects) if fisher else effects
    return dict(zip(seeds, effects.tolist(), strict=True))


def _measure(claim: dict[str, Any], measurements: Measurements, records: list[dict[str, Any]]) -> dict[str, Any]:
    """The result of a claim before any test: what was measured, everything else not run."""
    if claim["kind"] == "released_weights":
        measured = {claim["arms"][0]: _summary({r["name"]: float(r["value"]) for r in records})}
    else:
        measured = {
            arm: _summary(
                {
                    str(s): _value(claim, arm, s, run)
                    for s, run in sorted(measurements.get(arm, {}).items())
                    if claim["metric"] in run or not claim["gated"]
                }
            )
            for arm in claim["arms"]
        }
    result: dict[str, Any] = {key: claim[key] for key in ("id", "statement", "kind", "primary", "published")}
    result |= {"measured": measured, "effect": None, "mde": None, "verdict": "not_run"}
    result |= {"p": None, "p_holm": None, "level": None}
    result |= {key: claim[key] for key in ("metric", "arms", "better", "margin", "tol", "note")}
    if claim["kind"] in TESTED and not claim["primary"]:
        _note(result, "exploratory, not adjusted for multiplicity")
    if claim.get("fisher_z"):
        result["fisher_z"] = True
        _note(result, "interval of a correlation through Fisher's z")
    if claim["gated"]:
        lack = {
            arm: [s for s, run in measurements.get(arm, {}).items() if claim["metric"] not in run]
            for arm in claim["arms"]
        }
        if out := [f"{arm} {', '.join(map(str, sorted(seeds)))}" for arm, seeds in lack.items() if seeds]:
            _note(result, f"left out below the declared floor: seeds of {'; '.join(out)}")
    counts = {arm: m["n"] for arm, m in measured.items()}
    if len(counts) == 2 and len({tuple(m["seeds"]) for m in measured.values()}) > 1:
        _note(result, f"arms differ in their finished seeds ({counts}); only common seeds are tested")
    if records:
        _note(result, "; ".join(f"{r['name']}: sha256 {r['weights_sha256'][:12]}, n = {r['n']}" for r in records))
    return result


def _value(claim: dict[str, Any], arm: str, seed: int, metrics: dict[str, Any]) -> float:
    run, metric = f"run {arm}/seed{seed}", claim["metric"]
    _check(metric in metrics, f"{run}: finished without metric {metric!r}", f"it has {sorted(metrics)}")
    value = metrics[metric]
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    _check(number, f"{run}: metric {metric!r} is {value!r}", "a finished run records finite numbers")
    _check(
        not claim.get("fisher_z") or abs(value) < 1,
        f"{run}: metric {metric!r} is {value}",
        "a correlation is inside -1..1",
    )
    _check(claim["kind"] != "ratio" or value > 0, f"{run}: metric {metric!r} is {value}", "a ratio needs values > 0")
    return value


def _summary(seeds: dict[str, float]) -> dict[str, Any]:
    values, n = list(seeds.values()), len(seeds)
    # An exact count stays exact: the mean of equal integers is that integer.
    mean = None if n == 0 else values[0] if len(set(values)) == 1 else float(np.mean(values))
    return {"mean": mean, "std": float(np.std(values, ddof=1)) if n > 1 else None, "n": n, "seeds": seeds}


def _note(result: dict[str, Any], text: str) -> None:
    result["note"] = f"{result['note']}; {text}" if result["note"] else text


def _compare(result: dict[str, Any]) -> None:
    """exact and released_weights: every value within tol of the published one; value: the mean of the seeds."""
    summary = result["measured"][result["arms"][0]]
    if summary["n"] == 0:
        return
    values = [summary["mean"]] if result["kind"] == "value" else summary["seeds"].values()
    slack = 1 + 1e-9  # |.8 - .5| <= .3 must hold in binary, too
    close = all(abs(v - result["published"]["value"]) <= result["tol"] * slack for v in values)
    result["verdict"] = "supported" if close else "contradicted"
    if result["kind"] == "value" and summary["n"] == 1:
        _note(result, "single run")


def _judge(result: dict[str, Any], effects: np.ndarray) -> None:
    """Verdict, interval and detectable effect of a claim with a t test. effects: (n,), logs for a ratio, Fisher's z for a
    correlation."""
    ratio, fisher = result["kind"] == "ratio", result.get("fisher_z", False)
    if result["level"] is None:
        result["level"] = 1 - stats.ALPHA
    low, high = stats.t_interval(effects, result["level"])
    estimate, mde = float(effects.mean()), stats.minimum_detectable_effect(effects)
    p = result["p"] if result["p_holm"] is None else result["p_holm"]
    # A margin belongs to superiority; equivalence is about the difference itself (property: the distance to the bound).
    shift = {"ordering": result["margin"], "ratio": math.log(result["margin"]) if ratio else 0.0, "property": 0.0}
    tol = math.log1p(result["tol"]) if ratio else math.atanh(result["tol"]) if fisher else result["tol"]
    if p <= stats.ALPHA:
        result["verdict"] = "supported" if estimate > 0 else "contradicted"
    elif stats.equivalent(effects + shift[result["kind"]], tol):
        result["verdict"] = "equivalent"
        _note(result, f"90 % interval of the difference within +-{result['tol']:g}")
    else:
        result["verdict"] = "inconclusive"
    if np.ptp(effects) == 0:
        _note(result, f"all {len(effects)} seeds give the same effect: the t interval is degenerate")
    if ratio or fisher:
        estimate, low, high, mde = ((math.exp if ratio else math.tanh)(x) for x in (estimate, low, high, mde))
    unit = "x" if ratio else (result["published"] or {}).get("unit")
    result["effect"] = {"estimate": estimate, "low": low, "high": high, "n": len(effects), "unit": unit}
    result["mde"] = mde
