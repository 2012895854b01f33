"""Fusion: closed forms, limits, copies, the quadratic theory."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lifelong.adaptive_fusion import OnlineFusion, fuse, fusion_weights, step_size, update_distance
from lifelong.theory import iterate, minimiser_of_sum


def test_alpha_of_ten_tasks():
    published = [1, 0.9048, 0.8187, 0.7408, 0.6703, 0.6065, 0.5488, 0.4966, 0.4493, 0.4066]
    assert [round(step_size(t, 10), 4) for t in range(10)] == published
    assert step_size(3, 10, beta=2.0) == pytest.approx(math.exp(-0.6))


def test_an_open_stream_warns():
    with pytest.warns(UserWarning, match="unknown"):
        assert step_size(4, None) == pytest.approx(math.exp(-4 / 5))


@pytest.mark.parametrize("bad", [(-1, 5, 1.0), (5, 5, 1.0), (0, 5, -0.1)])
def test_step_size_out_of_range(bad):
    with pytest.raises(ValueError, match="allowed"):
        step_size(bad[0], bad[1], beta=bad[2])


def test_weights_by_hand():
    d = torch.tensor([0.0, 1.0, 2.0])
    torch.testing.assert_close(fusion_weights(d), torch.tensor([0.85, 1.85, 4.85]) / 7.55)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
@settings(deadline=None, max_examples=50)
def test_weights_are_a_distribution_ordered_by_distance(ds):
    d = torch.tensor(ds, dtype=torch.double)
    w = fusion_weights(d)
    assert w.sum().item() == pytest.approx(1) and (w > 0).all()
    assert (w[d.argsort()].diff() >= -1e-12).all()


def test_weights_tend_to_uniform_and_to_squared_shares():
    d = torch.tensor([1.0, 2.0, 3.0], dtype=torch.double)
    torch.testing.assert_close(
        fusion_weights(1e-6 * d), torch.full((3,), 1 / 3, dtype=torch.double), atol=1e-10, rtol=0
    )
    torch.testing.assert_close(fusion_weights(1e6 * d), d**2 / 14, atol=1e-10, rtol=0)
    assert fusion_weights(torch.full((4,), 7.0)).tolist() == [0.25] * 4


def test_the_spread_of_the_weights_by_hand():
    """Of the first tensor d = (1, 3): u = (1.85, 9.85), w = (.158, .842); the second does not move: weights 1/2."""
    base, moved = [torch.zeros(2), torch.zeros(3)], lambda d: [torch.tensor([d, 0.0]), torch.zeros(3)]
    fusion = OnlineFusion(base)
    fusion.add(moved(1.0))
    assert fusion.spread().item() == 0, "one task has all the weight, as its mean has"
    fusion.add(moved(-3.0))
    assert fusion.spread().item() == pytest.approx((9.85 / 11.7 - 0.5) / 2)
    fusion.add(moved(0.0))  # u = .85: |.85 / 12.55 - 1/3| is smaller than 9.85 / 12.55 - 1/3
    assert fusion.spread().item() == pytest.approx((9.85 / 12.55 - 1 / 3) / 2)
    plain = OnlineFusion(base, weights="mean")
    plain.add(moved(1.0))
    plain.add(moved(-3.0))
    assert plain.spread().item() == 0


def test_distances_by_hand():
    base, new = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    assert update_distance(base, new).item() == 4
    assert update_distance(base, new, distance="l1_mean").item() == 1
    assert update_distance(base, new, distance="cosine").item() == pytest.approx(1)
    assert update_distance(base, 3 * base, distance="cosine").item() == pytest.approx(0, abs=1e-6)


def states(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [{"w": torch.randn(3, 4, generator=g), "b": torch.randn(4, generator=g)} for _ in range(count)]


@pytest.mark.parametrize("distance", ["l1_sum", "l1_mean", "cosine"])
@pytest.mark.parametrize("weights", ["adaptive", "mean"])
@pytest.mark.parametrize("constant", [0.85, 5.0])
def test_online_fusion_equals_the_plain_formula(weights, distance, constant):
    base, *tasks = states(6)
    fused = fuse(base, iter(tasks), 0.7, weights, distance=distance, constant=constant)
    for name, b in base.items():  # every tensor has weights of its own
        d = torch.stack([update_distance(b, t[name], distance=distance) for t in tasks])
        w = (d**2 + constant) / (d**2 + constant).sum() if weights == "adaptive" else torch.full((5,), 0.2)
        plain = 0.7 * sum(wk * t[name] for wk, t in zip(w, tasks, strict=True)) + 0.3 * b
        torch.testing.assert_close(fused[name], plain)


def test_one_task_and_alpha_one_is_the_identity_bit_for_bit():
    base, task = states(2)
    torch.testing.assert_close(fuse(base, [task], 1.0), task, rtol=0, atol=0)
    torch.testing.assert_close(fuse(base, [task], 0.0), base, rtol=0, atol=0)


def test_snapshots_are_copies():
    """The released code stores references: every stored state then is the last one."""
    base, live = torch.zeros(3), torch.ones(3)
    fusion = OnlineFusion([base], weights="mean")
    fusion.add([live])
    live.fill_(3.0)
    fusion.add([live])
    live.fill_(100.0)
    torch.testing.assert_close(fusion.result(1.0)[0], torch.full((3,), 2.0))


def test_counters_are_taken_over_and_integers_never_fused():
    base = {"w": torch.zeros(2), "n": torch.tensor(3)}
    fused = fuse(base, [{"w": torch.ones(2), "n": torch.tensor(4)}, {"w": torch.ones(2), "n": torch.tensor(9)}], 0.5)
    assert fused["n"].item() == 9 and fused["w"].tolist() == [0.5, 0.5]


def test_no_present_task_leaves_the_base():
    base = torch.randn(3)
    torch.testing.assert_close(OnlineFusion([base]).result(0.5)[0], base, rtol=0, atol=0)


def test_bad_input():
    base, task = states(2)
    with pytest.raises(ValueError, match=r"alpha=1\.5"):
        fuse(base, [task], 1.5)
    with pytest.raises(ValueError, match="nothing to fuse"):
        fuse(base, [], 1.0)
    with pytest.raises(ValueError, match="different entries"):
        fuse(base, [{"w": task["w"]}], 1.0)
    with pytest.raises(ValueError, match="weights='median'.*adaptive, mean"):
        fuse(base, [task], 1.0, "median")
    with pytest.raises(ValueError, match="distance='l2'.*cosine"):
        fuse(base, [task], 1.0, distance="l2")
    with pytest.raises(ValueError, match="constant=0"):
        fuse(base, [task], 1.0, constant=0)
    with pytest.raises(ValueError, match="shapes of the base"):
        OnlineFusion([torch.zeros(2)]).add([torch.zeros(3)])


# ------------------------------------------------------------------------------------------------------ quadratic tasks
def quadratics(k=4, n=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(k, n, n, generator=g, dtype=torch.double)
    return a @ a.mT / n + 0.2 * torch.eye(n, dtype=torch.double), torch.randn(k, n, generator=g, dtype=torch.double)


@pytest.mark.parametrize("weights", ["adaptive", "mean"])
@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_a_shared_minimiser_is_reached_with_any_weights(weights, alpha):
    h, m = quadratics()
    m = m[:1].expand(4, 3)
    found = iterate(h, m, torch.full((3,), 5.0, dtype=torch.double), eta=0.2, alpha=alpha, weights=weights, rounds=3000)
    torch.testing.assert_close(found, m[0])


def test_the_plain_mean_reaches_the_minimiser_of_the_sum():
    h, m = quadratics()
    for alpha in (1.0, 0.5):  # alpha only rescales the step
        found = iterate(h, m, torch.zeros(3, dtype=torch.double), eta=0.05, alpha=alpha, weights="mean", rounds=5000)
        torch.testing.assert_close(found, minimiser_of_sum(h, m))


def test_adaptive_weights_move_the_fixed_point_toward_the_harder_task():
    h, m = torch.ones(3, 1, 1, dtype=torch.double), torch.tensor([[0.0], [0.0], [3.0]], dtype=torch.double)
    start = torch.zeros(1, dtype=torch.double)
    assert iterate(h, m, start, eta=0.5).item() == pytest.approx(1.211756, abs=1e-6)
    assert iterate(h, m, start, eta=0.5, weights="mean").item() == pytest.approx(1.0, abs=1e-9)
    # with two tasks both fixed points are the middle
    assert iterate(h[:2], m[1:], start, eta=0.5).item() == pytest.approx(1.5, abs=1e-9)


def test_no_warning_with_a_known_number_of_tasks():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step_size(2, 4) == pytest.approx(math.exp(-0.5))
