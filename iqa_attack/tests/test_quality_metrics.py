"""Logistic, R, the 24-point SRCC, the arithmetic of the published table, exact claims."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from common.metrics.claims import load_document
from iqa_attack.counterexamples import measure
from iqa_attack.counts import count, published_table
from iqa_attack.quality_metrics import (
    clean_lattice,
    correlations,
    doubled_lattice,
    fit_logistic,
    logistic,
    on_lattice,
    srcc24,
    stability,
)
from iqa_attack.tables import summarise

PAPER = Path(__file__).resolve().parents[1]


@given(st.floats(-50, 50), st.floats(0.1, 20), st.floats(-30, 30))
def test_logistic_in_closed_form(b3, b4, d):
    at = torch.tensor([b3, b3 + d, b3 - d], dtype=torch.float64)
    q = logistic(at, b3, b4)
    assert float(q[0]) == pytest.approx(5) and float(q[1] + q[2]) == pytest.approx(10)
    leaf = torch.tensor(b3, dtype=torch.float64, requires_grad=True)
    logistic(leaf, b3, -b4).backward()
    assert float(leaf.grad) == pytest.approx(10 / (4 * b4))


def test_fit_finds_the_constants_and_refuses_constant_scores():
    f = np.linspace(-3, 8, 40)
    q = logistic(torch.from_numpy(f), 2.0, 1.3).numpy()
    assert fit_logistic(f, q) == (pytest.approx(2.0, abs=1e-4), pytest.approx(1.3, abs=1e-4))
    noisy = fit_logistic(100 * f + 7, np.clip(q + np.random.default_rng(0).normal(0, 0.3, 40), 0, 10))
    assert noisy[0] == pytest.approx(207, abs=30) and noisy[1] == pytest.approx(130, abs=30)
    with pytest.raises(ValueError, match="constant scores"):
        fit_logistic(np.ones(5), np.arange(5))


def test_stability():
    assert stability([0.0, 10.0], [10.0, 0.0])[0] == pytest.approx(0)
    assert stability([0.0, 10.0], [1.0, 9.0])[0] == pytest.approx(math.log(10))
    assert stability([2.0], [4.0])[0] == pytest.approx(math.log(8 / 2))
    assert stability([8.0], [7.0])[0] == pytest.approx(math.log(8))
    r, still = stability([5.0, 5.0], [5.0, 4.0])
    assert still == 1 and r == pytest.approx((math.log(5 / 1e-8) + math.log(5)) / 2)
    with pytest.raises(ValueError, match="apply the logistic first"):
        stability([57.0], [40.0])


def test_srcc_over_both_versions_inherits_the_mos():
    before, after, mos = [1.0, 2, 3, 4], [2.5, 1.5, 3.5, 0.5], [1.0, 2, 3, 4]
    ranks = rankdata(before + after), rankdata(mos + mos)
    assert srcc24(before, after, mos) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert srcc24(before, before, mos) == pytest.approx(1)
    found = correlations(before, mos)
    assert found["srcc"] == found["krcc"] == pytest.approx(1) and found["rmse"] == 0
    with pytest.raises(ValueError, match="differ between images"):
        correlations([1.0, 1.0], [1.0, 2.0])


def test_lattices_hold_every_srcc():
    rng = np.random.default_rng(0)
    clean, doubled = clean_lattice(12), doubled_lattice(12)
    assert clean[0] == 1 and clean[-1] == -1 and len(clean) == 287
    for _ in range(30):
        assert np.abs(clean - spearmanr(rng.permutation(12), np.arange(12))[0]).min() < 1e-12
        value = spearmanr(rng.permutation(24), np.tile(np.arange(12), 2))[0]
        assert np.abs(doubled - value).min() < 1e-12
    assert doubled.max() == pytest.approx(1144 / math.sqrt(1150 * 1144))
    assert on_lattice(0.9231, clean) and not on_lattice(0.9241, clean)


def test_the_published_table_is_complete_and_starred_on_the_diagonal():
    table = published_table()
    models, fidelities = ("brisque", "cornia", "ma19", "unique"), ("chebyshev", "dists", "lpips", "ssim")
    assert set(table) == {(m, a, f, e) for m in ("srcc", "r") for a in models for f in fidelities for e in models}
    assert (
        table["srcc", "brisque", "chebyshev", "brisque"] == 0.0959 and table["r", "unique", "lpips", "unique"] == 0.0927
    )
    assert table["r", "cornia", "lpips", "brisque"] == 1.74 and table["srcc", "ma19", "chebyshev", "brisque"] == 0.6103


def test_every_exact_claim_has_its_count():
    found = count()
    exact = [c for c in load_document(PAPER)["claims"] if c["kind"] == "exact"]
    assert len(exact) >= 10
    for claim in exact:
        assert abs(found[claim["metric"]] - claim["published"]["value"]) <= claim["tol"], claim["id"]
    assert found["table_r_unique_max"] < found["table_r_others_min"], "UNIQUE is the least stable (claim C3)"


def test_measure_and_summarise():
    before = {"a": np.array([2.0, 5.0, 8.0]), "b": np.array([3.0, 4.0, 6.0]), "c": np.array([1.0, 2.0, 3.0])}
    after = {"a": np.array([8.0, 5.5, 1.0]), "b": before["b"] + 0.1, "c": before["c"] + 0.2}
    m = measure(before, after, np.array([1.0, 5.0, 9.0]), "a")
    assert m["r_intra"] == m["r_a"] and m["r_transfer"] == pytest.approx((m["r_b"] + m["r_c"]) / 2)
    assert (
        m["change_intra"] == pytest.approx((6 + 0.5 + 7) / 3)
        and m["srcc_clean_a"] == 1
        and m["share_up"] == pytest.approx(2 / 3)
    )
    other = measure(before, {**before, "b": after["a"]}, np.array([1.0, 5.0, 9.0]), "b")
    s = summarise({("a", "ssim"): m, ("b", "ssim"): other})
    assert s["r_diagonal"] == pytest.approx((m["r_a"] + other["r_b"]) / 2)
    assert s["r_off"] == pytest.approx(np.mean([m["r_b"], m["r_c"], other["r_a"], other["r_c"]]))
    assert s["r_gap"] == pytest.approx(s["r_off"] - s["r_diagonal"])
    assert s["r_extreme_gap"] == pytest.approx(min(m["r_b"], m["r_c"], other["r_a"]) - max(m["r_a"], other["r_b"]))
    assert s["r_gap_competent"] == pytest.approx(s["r_gap"]) and s["cells_below_floor"] == 0
    unrated = measure(before, after, None, "a")
    assert "srcc24_a" not in unrated and unrated["r_a"] == m["r_a"]


def test_a_model_below_the_floor_carries_no_primary_claim():
    """Cells of an attacked model below the floor, and evaluations by one, are left out of *_competent; a model that was not
    declared as well; where none is left there is no number (the claim is then not run, not false)."""

    def cell(attacked, **srcc):
        r = {n: 1.0 if n == attacked else 3.0 + ("abc".index(n)) for n in "abc"}
        return {f"r_{n}": v for n, v in r.items()} | {f"srcc_clean_{n}": v for n, v in srcc.items()} | {
            f"change_{n}": 4.0 - "abc".index(n) if n == attacked else 0.1 for n in "abc"
        }  # fmt: skip

    cells = {(n, "ssim"): cell(n, a=0.9, b=0.8, c=0.79) for n in "abc"}
    s = summarise(cells)
    assert s["cells_below_floor"] == 1 and s["share_below_floor"] == pytest.approx(1 / 3)
    assert s["r_off"] == pytest.approx(4) and s["r_off_competent"] == pytest.approx(3.5), "c evaluates nothing"
    assert s["change_diagonal_smallest"] == 2 and s["change_diagonal_smallest_competent"] == 3
    assert s["r_extreme_gap"] == 2 and s["r_extreme_gap_competent"] == 2
    assert s["srcc_clean_diagonal_competent"] == pytest.approx(0.85)
    declared = summarise(cells, carries=["a", "c"])
    assert declared["cells_below_floor"] == 2 and declared["r_diagonal_competent"] == 1
    assert "r_gap_competent" not in declared, "nobody is left to transfer to"
    none = summarise(cells, floor=0.95)
    assert "r_diagonal_competent" not in none and none["r_diagonal"] == 1 and none["cells_below_floor"] == 3
