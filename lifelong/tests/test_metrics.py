"""The accuracy matrix, against definitions written out a second way."""

import pytest
import torch

from lifelong.metrics import background_gap, plot_matrix, summaries

NAN = float("nan")


def test_two_tasks_by_hand():
    s = summaries(torch.tensor([[0.9, NAN], [0.6, 0.8]]))
    expected = {"acc": 0.7, "aia": 0.8, "forgetting": 0.3, "bwt": -0.3, "learning": 0.85, "overall": 0.7}
    assert {k: pytest.approx(v) for k, v in expected.items()} == s


def test_against_the_definitions_in_loops():
    size = 5
    r = torch.rand(size, size, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    r[~torch.ones(size, size, dtype=torch.bool).tril()] = NAN
    s = summaries(r, [1, 2, 3, 4, 10])
    rows = r.tolist()
    forgetting = [max(rows[t][k] for t in range(k, size - 1)) - rows[-1][k] for k in range(size - 1)]
    assert s["forgetting"] == pytest.approx(sum(forgetting) / 4)
    assert s["bwt"] == pytest.approx(sum(rows[-1][k] - rows[k][k] for k in range(size - 1)) / 4)
    assert s["aia"] == pytest.approx(sum(sum(rows[t][: t + 1]) / (t + 1) for t in range(size)) / size)
    assert s["overall"] == pytest.approx(sum(a * n for a, n in zip(rows[-1], [1, 2, 3, 4, 10], strict=True)) / 20)


def test_forgetting_uses_the_best_before_the_end_not_the_first():
    s = summaries(torch.tensor([[50.0, NAN, NAN], [70.0, 60.0, NAN], [40.0, 55.0, 80.0]]))
    assert s["forgetting"] == pytest.approx((30 + 5) / 2) and s["bwt"] == pytest.approx((-10 - 5) / 2)


def test_one_task_has_no_forgetting():
    assert summaries(torch.tensor([[0.5]])) == {"acc": 0.5, "overall": 0.5, "aia": 0.5, "learning": 0.5}


@pytest.mark.parametrize("bad", [torch.zeros(2, 3), torch.tensor([[0.9, NAN], [NAN, 0.8]]), torch.zeros(0, 0)])
def test_incomplete_matrices(bad):
    with pytest.raises(ValueError, match="square and complete"):
        summaries(bad)


def test_background_gap():
    weight = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).view(1, 1, 2, 2)
    masks = torch.tensor([[[False, True], [True, False]]])
    assert background_gap(weight, masks) == pytest.approx(0.75 - 0.25)


def test_figure(tmp_path):
    plot_matrix({"class_il": torch.eye(3) * 90, "task_il": torch.eye(3)}, tmp_path / "m.png", "ari")
    assert (tmp_path / "m.png").stat().st_size > 5000
