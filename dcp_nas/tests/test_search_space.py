"""Genotypes: the parser against a brute-force one, ties, both orders, JSON, random draws, and what is refused."""

import itertools
import json

import pytest
import torch

from dcp_nas.analysis.draw import draw_cells
from dcp_nas.search_space import (
    GENOTYPES,
    ORDERS,
    Genotype,
    discretise,
    edge_nodes,
    operations,
    random_genotype,
    space_size,
)


def brute_force(alpha, names):
    """The same cell by enumeration: of all pairs of edges and all operations, the largest weights, first index first."""
    p, cell, row = alpha.softmax(-1), [], 0
    for j in (2, 3, 4, 5):
        options = []
        for i, m in itertools.product(range(j), range(len(names))):
            if names[m] != "none":
                options.append((-p[row + i, m].item(), i, m))
        best = {}
        for value, i, m in sorted(options, key=lambda o: (o[1], o[0], o[2])):
            best.setdefault(i, (value, i, m))
        cell += [(names[m], i) for _, i, m in sorted(best.values(), key=lambda o: (o[0], o[1]))[:2]]
        row += j
    return tuple(cell)


@pytest.mark.parametrize("order", ["darts", "released"])
def test_parser_equals_brute_force(order):
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        alphas = [torch.randn(14, 8, generator=generator).mul(2).round() / 2 for _ in range(2)]  # with many ties
        found = discretise(*alphas, order=order)
        assert (found.normal, found.reduce) == tuple(brute_force(a, operations(order)) for a in alphas)


def test_orders_hold_the_same_operations_and_columns_follow_the_order():
    assert (
        sorted(ORDERS["darts"]) == sorted(ORDERS["released"]) and ORDERS["darts"][0] == ORDERS["released"][-1] == "none"
    )
    alpha = torch.randn(14, 8, generator=torch.Generator().manual_seed(1))
    columns = [ORDERS["darts"].index(name) for name in ORDERS["released"]]
    assert discretise(alpha, alpha) == discretise(alpha[:, columns], alpha[:, columns], order="released")
    assert discretise(alpha, alpha) != discretise(alpha, alpha, order="released")


def test_none_is_never_chosen_but_lowers_the_weight_of_its_edge():
    alpha = torch.zeros(14, 8)
    alpha[:, 0] = 5.0  # none everywhere
    alpha[0, 0] = 0.0  # ... less on edge 0 -> 2
    found = discretise(alpha, alpha)
    assert all(name == "max_pool_3x3" for name, _ in found.normal)  # ties: the first operation
    assert found.normal[:2] == (("max_pool_3x3", 0), ("max_pool_3x3", 1))
    alpha[1, 0] = -1.0
    assert discretise(alpha, alpha).normal[:2] == (("max_pool_3x3", 1), ("max_pool_3x3", 0))  # falling weight


def test_counts_of_edges_and_of_the_space():
    assert len(edge_nodes(4)) == 14 and edge_nodes(2) == [(0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    assert [sum(node == j for _, node in edge_nodes(4)) for j in (2, 3, 4, 5)] == [2, 3, 4, 5]
    assert space_size() == 180 * 7**8 == 1_037_664_180
    assert space_size(1) == 7**2 and space_size(2) == 3 * 7**4


def test_json_round_trip_and_skips(tmp_path):
    for name, genotype in GENOTYPES.items():
        genotype.save(tmp_path / f"{name}.json")
        assert Genotype.load(tmp_path / f"{name}.json") == genotype and genotype.nodes == 4
    assert GENOTYPES["DCP_NAS_L"].skips() == 1 and GENOTYPES["DARTS_V2"].skips() == 2
    assert GENOTYPES["DCP_NAS_L"].normal[0] == ("sep_conv_5x5", 1) and GENOTYPES["DCP_NAS_L"].reduce[-1] == (
        "sep_conv_5x5",
        1,
    )
    draw_cells(GENOTYPES["TANGENT_1"], tmp_path / "cells.png")
    assert (tmp_path / "cells.png").stat().st_size > 10_000


def test_random_genotypes_are_valid_varied_and_uniform():
    drawn = [random_genotype(seed) for seed in range(300)]
    assert random_genotype(3) == drawn[3] and len(set(drawn)) == 300
    names = [name for g in drawn for name, _ in (*g.normal, *g.reduce)]
    assert set(names) == set(ORDERS["darts"]) - {"none"}
    share = names.count("skip_connect") / len(names)
    assert abs(share - 1 / 7) < 0.02
    last = [source for g in drawn for _, source in g.normal[-2:]]
    assert all(abs(last.count(i) / len(last) - 1 / 5) < 0.07 for i in range(5))
    assert random_genotype(0, nodes=2).nodes == 2


@pytest.mark.parametrize(
    ("normal", "error"),
    [
        ([["conv_7x7", 0], ["skip_connect", 1]], "operation 'conv_7x7', allowed: max_pool"),
        ([["none", 0], ["skip_connect", 1]], "operation 'none'"),
        ([["skip_connect", 2], ["skip_connect", 1]], "from node 2 to node 2: never forwards"),
        ([["skip_connect", -1], ["skip_connect", 1]], "never forwards"),
        ([["skip_connect", 1], ["max_pool_3x3", 1]], "both inputs from one predecessor"),
        ([["skip_connect", 1]], "two per node"),
        ("abc", "not a genotype, expected"),
    ],
)
def test_a_bad_genotype_names_the_edge(normal, error, tmp_path):
    file = tmp_path / "g.json"
    file.write_text(json.dumps({"normal": normal, "reduce": [["skip_connect", 0], ["skip_connect", 1]]}))
    with pytest.raises(ValueError, match=error) as caught:
        Genotype.load(file)
    assert str(file) in str(caught.value)


def test_other_bad_input_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no genotype at"):
        Genotype.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"shape \(13, 8\)"):
        discretise(torch.zeros(13, 8), torch.zeros(13, 8))
    with pytest.raises(ValueError, match="NaN"):
        discretise(torch.full((14, 8), float("nan")), torch.zeros(14, 8))
    with pytest.raises(ValueError, match="order='pcdarts', allowed"):
        operations("pcdarts")
    with pytest.raises(ValueError, match="nodes=0"):
        edge_nodes(0)
