"""The exact numbers of networks and sets, and that claims.yaml compares with them."""

from pathlib import Path

import pytest
import torch

from common.data.longtail import long_tail_counts
from common.metrics.claims import load_document
from common.metrics.classification import class_groups
from ncl_pp.counts import count

PAPER = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def found():
    return count()


@pytest.mark.parametrize(
    ("imbalance", "c10", "c100", "groups"),
    [
        (10, 20431, 19573, (69, 31, 0)),
        (50, 13996, 12608, (41, 41, 18)),
        (100, 12406, 10847, (35, 35, 30)),
        (200, 11203, 9502, (30, 31, 39)),
    ],
)
def test_long_tail_totals_and_groups(found, imbalance, c10, c100, groups):
    assert found[f"images_c10_if{imbalance}"] == c10 and found[f"images_c100_if{imbalance}"] == c100
    assert tuple(found[f"classes_{g}_c100_if{imbalance}"] for g in ("many", "medium", "few")) == groups


def test_ends_of_the_profiles_and_the_class_with_exactly_20_images():
    for n_max, classes, imbalance, ends in (
        (5000, 10, 100, (5000, 50)), (500, 100, 100, (500, 5)), (5000, 10, 50, (5000, 100)), (500, 100, 50, (500, 10)),
    ):  # fmt: skip
        counts = long_tail_counts(n_max, imbalance, classes)
        assert (counts[0], counts[-1]) == ends
    masks = class_groups(long_tail_counts(500, 100, 100), "official")
    assert tuple(int(m.sum()) for m in masks.values()) == (35, 34, 31)


def test_groups_of_places_by_both_rules():
    """131/163/71 and 132/156/77 classes: the two rules differ for counts of exactly 100, 20 and 100."""
    counts = [101] * 131 + [100] * 1 + [50] * 156 + [20] * 6 + [19] * 71
    sizes = {c: tuple(int(m.sum()) for m in class_groups(counts, c).values()) for c in ("oltr", "official")}
    assert sizes == {"oltr": (131, 163, 71), "official": (132, 156, 77)}


def test_networks(found):
    expected = {
        "params_resnet32_c10": 464_154, "params_resnet32_c100": 470_004, "params_resnet50_imagenet": 25_557_032,
        "params_resnet50_inat": 40_190_990, "params_resnext50_imagenet": 25_028_904, "params_resnet152_places": 58_891_693,
        "macs_resnet32_c100": 68_868_352,
    }  # fmt: skip
    assert {k: found[k] for k in expected} == expected
    giga = {"resnet50_imagenet": 4.089, "resnext50_imagenet": 4.230, "resnet152_imagenet": 11.51}
    for name, value in giga.items():
        assert found[f"macs_{name}"] / 1e9 == pytest.approx(value, abs=5e-3 if value > 10 else 5e-4)
    assert torch.get_default_device().type == "cpu", "the meta device must not leak"


def test_every_exact_claim_has_its_count(found):
    exact = [c for c in load_document(PAPER)["claims"] if c["kind"] == "exact"]
    assert len(exact) >= 10
    for claim in exact:
        assert claim["arms"] == ["counts"] and claim["published"]["source"] in ("code", "ours")
        assert abs(found[claim["metric"]] - claim["published"]["value"]) <= claim["tol"], claim["id"]
