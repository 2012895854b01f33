"""The schema of claims.yaml, reading of runs, and every verdict."""

import copy
import json
import math

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from common.metrics import claims as c
from common.metrics import stats

ROW = {
    "id": "t1",
    "table": "Table 1",
    "setting": "C100",
    "metric": "top1",
    "value": 50.0,
    "unit": "%",
    "source": "paper",
}


def claim(**changes):
    base = {
        "id": "c1",
        "statement": "a beats b",
        "kind": "ordering",
        "scale": "mini",
        "primary": True,
        "published": None,
        "metric": "top1",
        "arms": ["a", "b"],
        "better": "higher",
    }
    return base | changes


def single(kind, **changes):
    return claim(**({"kind": kind, "arms": ["a"], "published": "t1"} | changes))


@pytest.fixture
def load(tmp_path):
    def write_and_load(*claims, published=(ROW,), **top):
        document = {"basis": "text", "published": list(published), "claims": list(claims)} | top
        (tmp_path / "claims.yaml").write_text(yaml.safe_dump(document))
        return c.load_claims(tmp_path)

    return write_and_load


def runs(metric="top1", **arms):
    """runs(a=[..], b=[..]) -> measurements with seeds 100, 101, ..."""
    return {arm: {100 + i: {metric: v} for i, v in enumerate(values)} for arm, values in arms.items()}


def decide(load, raw, measurements, **kwargs):
    return c.test_claims(load(raw), measurements, "mini", **kwargs)[0]


# ------------------------------------------------------------------------------------------------- claims.yaml


def test_defaults_are_filled_in(load, tmp_path):
    loaded = load(claim(published="t1"), claim(id="c2", kind="ratio", scale=["mini", "real_mnist"]))
    assert loaded[0]["published"] == ROW and loaded[0]["scale"] == ["mini"]
    assert (loaded[0]["margin"], loaded[1]["margin"], loaded[1]["tol"]) == (0, 1, 0)
    assert c.load_document(tmp_path)["basis"] == "text"


def test_sentences_of_the_abstract_name_claims_and_metrics_have_words(load, tmp_path):
    load(claim(), abstract=[{"says": "it works", "claims": ["c1"]}, {"says": "anywhere", "claims": []}],
         metrics={"top1": {"says": "top-1 accuracy", "unit": "%"}, "r": {"says": "stability"}})  # fmt: skip
    document = c.load_document(tmp_path)
    assert [row["claims"] for row in document["abstract"]] == [["c1"], []]
    assert document["metrics"]["r"] == {"says": "stability", "unit": ""}
    with pytest.raises(ValueError, match="no claims .'c2'.; name claims of this file"):
        load(claim(), abstract=[{"says": "it works", "claims": ["c2"]}])
    advice = {"task": "few images", "take": "the plain arm", "says": "it is better", "claims": ["c3"]}
    with pytest.raises(ValueError, match=r"advice\[0\]: no claims .'c3'.; name claims"):
        load(claim(), advice=[advice])
    with pytest.raises(ValueError, match=r"defects\[0\]: missing .'test'."):
        load(claim(), defects=[{"where": "released code", "says": "a sign", "here": "the other sign"}])
    with pytest.raises(ValueError, match="metrics top1: unknown .'units'."):
        load(claim(), metrics={"top1": {"says": "top-1 accuracy", "units": "%"}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "order"}, "kind 'order'"),
        ({"typo": 1}, r"unknown \['typo'\]"),
        ({"published": "t9"}, "published 't9' does not exist"),
        ({"arms": ["a"]}, "two different arms"),
        ({"arms": ["a", "a"]}, "two different arms"),
        ({"arms": "ab"}, "two different arms"),
        ({"better": "more"}, "better 'more'"),
        ({"better": None}, "better None"),
        ({"scale": "minni"}, "scale 'minni'"),
        ({"scale": []}, "scale"),
        ({"primary": 1}, "primary 1"),
        ({"margin": "1e-3"}, "margin '1e-3'"),
        ({"tol": -1}, "tol -1"),
        ({"kind": "ratio", "margin": 0}, "margin 0"),
        ({"kind": "property"}, "exactly one arm"),
    ],
)
def test_bad_claims_are_refused_with_file_claim_and_fix(load, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        load(claim(**changes))
    assert "claims.yaml" in str(error.value) and "c1" in str(error.value) and ";" in str(error.value)


@pytest.mark.parametrize("source", ["memory", "unknown"])
@pytest.mark.parametrize("kind", ["exact", "value", "released_weights"])
def test_numbers_from_memory_are_never_compared(load, kind, source):
    raw = single(kind, tol=1)
    assert load(raw)
    with pytest.raises(ValueError, match=f"from {source}"):
        load(raw, published=[ROW | {"source": source}])
    assert load(claim(published="t1"), published=[ROW | {"source": source}])  # shown beside an ordering


def test_other_errors_of_the_schema(load, tmp_path):
    missing = claim()
    del missing["metric"]
    for call, message in [
        (lambda: load(missing), r"missing \['metric'\]"),
        (lambda: load(claim(), basis="guess"), "basis 'guess'"),
        (lambda: load(claim(), published=[ROW | {"source": "blog"}]), "source 'blog'"),
        (lambda: load(claim(), published=[ROW, ROW]), "published ids used twice"),
        (lambda: load(claim(), claim()), "claim ids used twice"),
        (lambda: load(single("exact"), published=[ROW | {"value": None}]), "t1 = None"),
        (lambda: load(single("value")), "declare the tolerance"),
        (lambda: load(single("exact", margin=1)), "margin 1"),
        (lambda: load(*[claim(id=f"c{i}") for i in range(4)]), "at most 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert load(*[claim(id=f"c{i}", scale="mini" if i < 3 else "full") for i in range(4)])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        c.load_claims(tmp_path / "nowhere")


# -------------------------------------------------------------------------------------------------------- runs


def write_run(root, arm, seed, status="finished"):
    folder = root / arm / f"seed{seed}"
    folder.mkdir(parents=True)
    cell = {"scale": "mini", "arm": "lies", "seed": seed, "status": status, "metrics": {"top1": 1.0}, "seconds": 2.0}
    (folder / "result.json").write_text(json.dumps(cell))
    return folder / "result.json"


def test_the_arm_is_the_path(tmp_path):
    root = tmp_path / "runs" / "mini"
    write_run(root, "nclpp", 101)
    write_run(root, "nclpp/optim.lr=0.1", 100)
    write_run(root, "ce", 100, status="failed")
    measurements, cells = c.read_runs(root)
    assert measurements == {"nclpp": {101: {"top1": 1.0}}, "nclpp/optim.lr=0.1": {100: {"top1": 1.0}}}
    assert [(x["arm"], x["seed"], x["status"]) for x in cells] == [
        ("ce", 100, "failed"),
        ("nclpp", 101, "finished"),
        ("nclpp/optim.lr=0.1", 100, "finished"),
    ]


def test_bad_runs_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no runs"):
        c.read_runs(tmp_path / "runs" / "mini")
    for name, changes, message in [
        ("copied", {"seed": 7}, r"recorded as scale, seed \('mini', 7\)"),
        ("scale", {"scale": "full"}, "recorded as"),
        ("status", {"status": "done"}, "status 'done'"),
    ]:
        root = tmp_path / name / "mini"
        file = write_run(root, "a", 1)
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        with pytest.raises(ValueError, match=message) as error:
            c.read_runs(root)
        assert str(file) in str(error.value)
    file.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        c.read_runs(root)
    file.rename(root / "result.json")
    with pytest.raises(ValueError, match="not in <arm>/seed<k>"):
        c.read_runs(root)


# ---------------------------------------------------------------------------------------------------- verdicts


def test_ordering_is_paired(load):
    # Seeds differ by 30 points, the arms by 1: only a paired test sees it.
    a, b = [61.0, 76.1, 90.9, 81.0], [60.0, 75.0, 90.0, 80.1]
    result = decide(load, claim(published="t1"), runs(a=a, b=b))
    assert result["verdict"] == "supported"
    assert result["effect"]["estimate"] == pytest.approx(0.975)
    assert result["effect"]["unit"] == "%" and result["effect"]["n"] == 4
    d = np.array([1.0, 1.1, 0.9, 0.9])
    assert (result["effect"]["low"], result["effect"]["high"]) == pytest.approx(stats.t_interval(d))
    assert result["measured"]["a"]["std"] == pytest.approx(np.std(a, ddof=1))
    assert result["measured"]["a"]["seeds"] == {"100": 61.0, "101": 76.1, "102": 90.9, "103": 81.0}
    # Pairs are made by seed, not by position.
    shuffled = {"a": runs(a=a)["a"], "b": dict(reversed(runs(b=b)["b"].items()))}
    assert decide(load, claim(), shuffled)["effect"]["estimate"] == pytest.approx(0.975)
    assert decide(load, claim(arms=["b", "a"]), runs(a=a, b=b))["verdict"] == "contradicted"


def test_better_lower_turns_the_sign(load):
    low, high = [1.0, 1.1, 1.2], [2.0, 2.2, 2.1]
    supported = decide(load, claim(better="lower"), runs(a=low, b=high))
    assert supported["verdict"] == "supported" and supported["effect"]["estimate"] == pytest.approx(1.0)
    assert decide(load, claim(better="higher"), runs(a=low, b=high))["verdict"] == "contradicted"
    ratio = decide(load, claim(kind="ratio", better="lower"), runs(a=[1.0, 1.0, 1.0], b=[2.0, 4.0, 8.0]))
    assert ratio["effect"]["estimate"] == pytest.approx(4.0)  # the other over the claimed one
    bound = decide(load, single("property", better="lower", margin=3), runs(a=low))
    assert bound["verdict"] == "supported" and bound["effect"]["estimate"] == pytest.approx(1.9)
    assert decide(load, single("property", better="higher", margin=3), runs(a=low))["verdict"] == "contradicted"


def test_margin_is_taken_off(load):
    data = runs(a=[3.0, 3.1, 2.9], b=[1.0, 1.0, 1.0])
    assert decide(load, claim(margin=1), data)["effect"]["estimate"] == pytest.approx(1.0)
    assert decide(load, claim(margin=1), data)["verdict"] == "supported"
    assert decide(load, claim(margin=2), data)["verdict"] == "inconclusive"
    assert decide(load, claim(margin=3), data)["verdict"] == "contradicted"


def test_ratio_is_on_logs(load):
    data = runs(a=[2.0, 8.0, 4.0], b=[1.0, 2.0, 1.0])
    result = decide(load, claim(kind="ratio", margin=1.5), data)
    logs = np.log([2, 4, 4]) - math.log(1.5)
    effect = result["effect"]
    assert effect["unit"] == "x"
    assert effect["estimate"] == pytest.approx(32 ** (1 / 3) / 1.5)  # geometric mean
    assert (math.log(effect["low"]), math.log(effect["high"])) == pytest.approx(stats.t_interval(logs))
    assert result["mde"] == pytest.approx(math.exp(stats.minimum_detectable_effect(logs)))
    with pytest.raises(ValueError, match=r"a/seed100.*needs values > 0"):
        decide(load, claim(kind="ratio"), runs(a=[0.0, 1.0, 1.0], b=[1.0, 1.0, 1.0]))


def test_equivalence_is_about_the_unshifted_difference(load):
    data = runs(a=[1.02, 1.0, 0.97], b=[1.0, 1.0, 1.0])
    assert decide(load, claim(tol=0.1), data)["verdict"] == "equivalent"
    assert decide(load, claim(tol=0.02), data)["verdict"] == "inconclusive"
    assert decide(load, claim(), data)["verdict"] == "inconclusive"
    # About 0 and far below margin 10: contradicted comes first. Below a margin it cannot resolve: equivalent.
    assert decide(load, claim(tol=0.1, margin=10), data)["verdict"] == "contradicted"
    assert decide(load, claim(tol=0.1, margin=0.03), data)["verdict"] == "equivalent"
    assert decide(load, claim(kind="ratio", tol=0.1), data)["verdict"] == "equivalent"
    assert decide(load, claim(kind="ratio", tol=0.02), data)["verdict"] == "inconclusive"


def test_no_variance_is_said(load):
    up, zero = runs(a=[0.3, 0.4, 0.5], b=[0.2, 0.3, 0.4]), runs(a=[0.3, 0.4, 0.5], b=[0.3, 0.4, 0.5])
    for raw in (claim(), claim(kind="ratio", arms=["b", "a"])):
        data = runs(a=[1.0, 2.0, 4.0], b=[2.0, 4.0, 8.0]) if raw["kind"] == "ratio" else up
        result = decide(load, raw, data)
        assert result["verdict"] == "supported" and "degenerate" in result["note"]
        assert result["effect"]["low"] == result["effect"]["high"] == result["effect"]["estimate"]
    assert decide(load, claim(arms=["b", "a"]), up)["verdict"] == "contradicted"
    assert decide(load, claim(), zero)["verdict"] == "inconclusive"
    assert decide(load, claim(tol=0.1), zero)["verdict"] == "equivalent"
    # .3 - .2 and .2 - .1 differ by rounding only, and less margin .1 that is no effect, not one of 1e-17.
    assert decide(load, claim(margin=0.1), runs(a=[0.3, 0.2, 0.4], b=[0.2, 0.1, 0.3]))["verdict"] == "inconclusive"


def test_fewer_than_three_common_seeds_is_not_run(load):
    data = {"a": {s: {"top1": 1.0 + s} for s in (1, 2, 3)}, "b": {s: {"top1": 0.0} for s in (2, 3, 4)}}
    result = decide(load, claim(), data)
    assert (result["verdict"], result["effect"], result["p"], result["mde"]) == ("not_run", None, None, None)
    assert result["measured"]["a"]["n"] == 3 and "2 of at least 3" in result["note"]
    nothing = decide(load, claim(), {})
    assert nothing["verdict"] == "not_run" and nothing["measured"]["b"] == {
        "mean": None,
        "std": None,
        "n": 0,
        "seeds": {},
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "1", True])
def test_a_finished_run_without_its_number_is_an_error(load, bad):
    data = runs(a=[1.0, 2.0, bad], b=[1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"a/seed102.*'top1'"):
        decide(load, claim(), data)
    with pytest.raises(ValueError, match=r"a/seed100: finished without metric 'top1'.*\['acc'\]"):
        decide(load, claim(), runs("acc", a=[1.0, 1.0, 1.0], b=[1.0, 1.0, 1.0]))


def test_exact_every_seed_value_the_mean(load):
    exact, value = single("exact", tol=0.3), single("value", tol=0.3)
    near, far_and_near = runs(a=[50.3, 49.7]), runs(a=[50.4, 49.6])
    assert decide(load, exact, near)["verdict"] == "supported"
    assert decide(load, exact, far_and_near)["verdict"] == "contradicted"
    assert decide(load, value, far_and_near)["verdict"] == "supported"
    assert decide(load, value, runs(a=[50.31]))["verdict"] == "contradicted"
    assert "single run" in decide(load, value, runs(a=[50.0]))["note"]
    assert decide(load, exact, {})["verdict"] == "not_run"
    result = decide(load, single("exact"), runs(a=[50]))
    assert result["verdict"] == "supported" and result["effect"] is None and result["p"] is None
    # |.8 - .5| <= .3 is false in floating point
    assert (
        decide(lambda raw: load(raw, published=[ROW | {"value": 0.5}]), exact, runs(a=[0.8]))["verdict"] == "supported"
    )


def test_released_weights_come_from_external_records(load, tmp_path):
    raw = single("released_weights", tol=0.1)
    assert decide(load, raw, runs(a=[50.0] * 3))["verdict"] == "not_run"  # our own runs are not released weights
    folder = tmp_path / "results" / "external"
    folder.mkdir(parents=True)
    record = {"claim": "c1", "value": 50.05, "weights_sha256": "ab" * 32, "n": 10000}
    (folder / "someone.json").write_text(json.dumps(record))
    result = decide(load, raw, {}, external=c.read_external(tmp_path))
    assert result["verdict"] == "supported" and result["measured"]["a"]["seeds"] == {"someone": 50.05}
    assert "abababababab" in result["note"] and "10000" in result["note"]
    (folder / "other.json").write_text(json.dumps(record | {"value": 60}))
    assert decide(load, raw, {}, external=c.read_external(tmp_path))["verdict"] == "contradicted"
    with pytest.raises(ValueError, match=r"external records for \['c1'\]"):
        decide(load, claim(), {}, external=c.read_external(tmp_path))
    for changes in ({"weights_sha256": "abc"}, {"n": 0}, {"value": math.nan}):
        (folder / "other.json").write_text(json.dumps(record | changes))
        with pytest.raises(ValueError, match=next(iter(changes))):
            c.read_external(tmp_path)


# ------------------------------------------------------------------------------------------------- multiplicity


def family(n=3, **changes):
    return [claim(id=f"c{i}", metric=f"m{i}", **changes) for i in range(n)]


def simulate(rng, seeds, effects, sd=1.0):
    noise = rng.normal(0, sd, (2, seeds, len(effects))) + rng.normal(0, 5, (1, seeds, 1))  # a seed moves both arms
    noise[0] += np.asarray(effects)
    names = [f"m{i}" for i in range(len(effects))]
    return {
        arm: {100 + s: dict(zip(names, noise[i, s].tolist(), strict=True)) for s in range(seeds)}
        for i, arm in enumerate("ab")
    }


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_aa_null_families_are_rarely_decided(load, seeds):
    """Two equal arms, three primary claims: 'supported' anywhere in at most 5 % of families (two-sided: about 2.5 %),
    and decided either way in at most 5 %, both up to three standard errors of the simulation."""
    loaded, rng, repetitions = load(*family()), np.random.default_rng(seeds), 600
    verdicts = [
        {r["verdict"] for r in c.test_claims(loaded, simulate(rng, seeds, [0, 0, 0]), "mini")}
        for _ in range(repetitions)
    ]
    limit = 0.05 + 3 * math.sqrt(0.05 * 0.95 / repetitions)
    supported, decided = (
        np.mean([bool(v & s) for v in verdicts]) for s in ({"supported"}, {"supported", "contradicted"})
    )
    assert supported <= 0.05 and decided <= limit
    assert decided > 0.01  # a test that never decides would pass the lines above


def test_power_at_the_minimum_detectable_effect(load):
    """A true effect of the size of the mean stated mde is found in about 80 % of unadjusted tests."""
    loaded, rng, seeds = load(*family(1, primary=False)), np.random.default_rng(0), 6
    sd = math.sqrt(2)  # of a difference of two arms with unit noise
    true = (2.570582 + 0.919544) * sd / math.sqrt(seeds)
    results = [c.test_claims(loaded, simulate(rng, seeds, [true]), "mini")[0] for _ in range(500)]
    power = np.mean([r["verdict"] == "supported" for r in results])
    assert 0.72 < power < 0.88
    assert np.median([r["mde"] for r in results]) == pytest.approx(true, rel=0.1)


def test_holm_runs_over_primary_t_tests_only(load):
    base = {"m0": [1.0, 1.3, 1.2, 1.1], "m1": [0.5, 1.5, 1.1, 0.9], "m2": [1.0, -1.0, 0.2, 0.1]}
    data = {
        "a": {s: {m: v[s] for m, v in base.items()} for s in range(4)},
        "b": {s: dict.fromkeys(base, 0.0) for s in range(4)},
    }
    raws = family()
    results = c.test_claims(load(*raws), data, "mini")
    p = [stats.t_test(np.array(v)) for v in base.values()]
    assert [r["p"] for r in results] == pytest.approx(p)
    assert [r["p_holm"] for r in results] == pytest.approx(stats.holm(p))
    assert [r["level"] for r in results] == pytest.approx([1 - 0.05 / 3, 0.975, 0.95])
    # An exploratory or exact claim, or one of another scale, takes no place in the family.
    raws[1] |= {"primary": False}
    extra = single("exact", id="e", metric="m0")
    other = claim(id="f", scale="full")
    results = c.test_claims(load(*raws, extra, other), data, "mini")
    assert results[0]["p_holm"] == pytest.approx(2 * p[0]) and results[1]["p_holm"] is None
    assert "exploratory" in results[1]["note"] and [r["id"] for r in results] == ["c0", "c1", "c2", "e"]
    # A declared primary claim that was not run keeps its place.
    raws[2] |= {"arms": ["a", "missing"]}
    assert c.test_claims(load(*raws), data, "mini")[0]["p_holm"] == pytest.approx(2 * p[0])


def test_a_gated_claim_leaves_out_the_runs_without_its_metric_and_names_them(load):
    data = runs(a=[60.0, 62.0, 61.0, 63.0], b=[50.0, 50.5, 51.0, 51.5])
    del data["a"][102]["top1"]
    (found,) = c.test_claims(load(claim(gated=True)), data, "mini")
    assert found["measured"]["a"]["n"] == 3 and found["effect"]["n"] == 3 and found["verdict"] == "supported"
    assert found["effect"]["estimate"] == pytest.approx(np.mean([10.0, 11.5, 11.5]))
    assert "left out below the declared floor: seeds of a 102" in found["note"]
    with pytest.raises(ValueError, match="top1"):
        c.test_claims(load(claim()), data, "mini")


def test_the_interval_of_a_correlation_comes_through_fishers_z(load):
    r = [0.85, 0.91, 0.80, 0.16, 0.60]
    raw = single("property", published=None, better="higher", fisher_z=True)
    (found,) = c.test_claims(load(raw), runs(a=r), "mini")
    z = np.arctanh(r)
    expected = np.tanh([z.mean(), *stats.t_interval(z, found["level"])])
    assert [found["effect"][k] for k in ("estimate", "low", "high")] == pytest.approx(expected) and expected[2] < 1
    assert found["p"] == pytest.approx(stats.t_test(z)) and "Fisher" in found["note"]
    assert found["mde"] == pytest.approx(math.tanh(stats.minimum_detectable_effect(z)))
    assert list(c.seed_effects(found).values()) == pytest.approx(r)
    with pytest.raises(ValueError, match="inside -1..1"):
        c.test_claims(load(raw), runs(a=[0.5, 1.0, 0.2]), "mini")
    for wrong in (claim(fisher_z=True), raw | {"margin": 0.5}):
        with pytest.raises(ValueError, match="fisher_z; it is for a property with margin 0"):
            load(wrong)


values = st.lists(st.floats(-3, 3).map(lambda x: round(x, 3)), min_size=4, max_size=4)


@given(st.lists(values, min_size=3, max_size=3), st.sampled_from(["ordering", "property"]), st.sampled_from([0, 0.5]))
@settings(deadline=None, max_examples=50)
def test_interval_and_verdict_agree(columns, kind, margin):
    raws = family(kind=kind, margin=margin, arms=["a"] if kind == "property" else ["a", "b"])
    loaded = [c_ | {"scale": ["mini"], "tol": 0.0, "note": None, "gated": False} for c_ in raws]
    data = {"a": {s: {f"m{i}": v[s] for i, v in enumerate(columns)} for s in range(4)}}
    data["b"] = {s: dict.fromkeys(("m0", "m1", "m2"), 0.0) for s in range(4)}
    for r in c.test_claims(loaded, copy.deepcopy(data), "mini"):
        effect = r["effect"]
        expected = "supported" if effect["low"] > 0 else "contradicted" if effect["high"] < 0 else "inconclusive"
        assert r["verdict"] == expected
        assert effect["low"] <= effect["estimate"] <= effect["high"]
