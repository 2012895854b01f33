"""Score, thresholds, masked attention, budget and distillation against closed forms and plain second formulations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_prune.adaptive_threshold import (
    check_locations,
    check_thresholds,
    default_temperature,
    initial_thresholds,
    threshold_mask,
)
from adaptive_prune.budget import ViTCost, budget_loss, check_budget, keep_counts, round_counts
from adaptive_prune.class_attention_score import (
    class_attention,
    class_attention_packed,
    head_importance,
    token_score,
)
from adaptive_prune.distillation import logit_kl, token_kl
from adaptive_prune.masked_attention import masked_softmax

DEIT_S = ViTCost(dim=384, hidden=1536, heads=6, depth=12, patches=196, prefix=1, stem=196 * 384 * 768)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------------------------------- score
def test_score_equals_the_plain_sum_over_heads():
    a, o = torch.rand(2, 5, 3, generator=gen()), torch.randn(2, 5, 3, 4, generator=gen(1))
    s = token_score(a, o)
    for b in range(2):
        for i in range(5):
            norms = [math.sqrt(sum(float(x) ** 2 for x in o[b, i, h])) for h in range(3)]
            expected = sum(n / sum(norms) * float(a[b, i, h]) for h, n in enumerate(norms))
            assert float(s[b, i]) == pytest.approx(expected, rel=1e-5)


def test_importance_sums_to_one_and_the_score_is_a_convex_combination():
    a, o = torch.rand(3, 7, 4, generator=gen()), torch.randn(3, 7, 4, 8, generator=gen(1))
    torch.testing.assert_close(head_importance(o).sum(-1), torch.ones(3, 7))
    s = token_score(a, o)
    assert (s <= a.amax(-1) + 1e-6).all() and (s >= a.amin(-1) - 1e-6).all()
    same_norm = torch.nn.functional.normalize(o, dim=-1)
    torch.testing.assert_close(token_score(a, same_norm), a.mean(-1))
    torch.testing.assert_close(token_score(a, o, kind="mean"), a.mean(-1))
    with pytest.raises(ValueError, match="score='max', allowed"):
        token_score(a, o, kind="max")


def test_score_passes_gradients_to_attention_and_context():
    a = torch.rand(4, 3, generator=gen(), requires_grad=True)
    o = torch.randn(4, 3, 2, generator=gen(1), requires_grad=True)
    token_score(a, o)[0].backward()
    assert a.grad[0].abs().sum() > 0 and o.grad[0].abs().sum() > 0 and a.grad[1:].abs().sum() == 0


def test_class_row_is_the_first_row_of_attention_dense_and_packed():
    q, k = torch.randn(2, 3, 6, 4, generator=gen()), torch.randn(2, 3, 6, 4, generator=gen(1))
    full = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)[:, :, 0].transpose(1, 2)
    torch.testing.assert_close(class_attention(q[:, :, 0], k, scale=0.5), full)
    image = torch.tensor([0] * 6 + [1] * 4)
    packed = torch.cat([k[0].transpose(0, 1), k[1, :, :4].transpose(0, 1)])
    rows = class_attention_packed(q[:, :, 0], packed, image, scale=0.5)
    torch.testing.assert_close(rows[:6], full[0])
    second = (q[1, :, :1] @ k[1, :, :4].transpose(-2, -1) * 0.5).softmax(-1)[:, 0].T
    torch.testing.assert_close(rows[6:], second)
    valid = torch.arange(6) < torch.tensor([[6], [4]])
    torch.testing.assert_close(class_attention(q[:, :, 0], k, scale=0.5, valid=valid)[1, :4], second)


# ----------------------------------------------------------------------------------------------------------- threshold
def test_mask_is_exactly_zero_or_one_and_strict():
    s = torch.tensor([0.0029, 0.003, 0.0031], dtype=torch.float64)
    assert threshold_mask(s, torch.tensor(0.003, dtype=torch.float64)).tolist() == [0.0, 0.0, 1.0]


def test_mask_gradient_is_that_of_the_sigmoid():
    s = torch.tensor([0.0029, 0.003, 0.00305, 0.5], dtype=torch.float64, requires_grad=True)
    theta = torch.tensor(0.003, dtype=torch.float64, requires_grad=True)
    threshold_mask(s, theta, temperature=1e4).sum().backward()
    m = torch.sigmoid(1e4 * (s - theta)).detach()
    torch.testing.assert_close(s.grad, 1e4 * m * (1 - m))
    torch.testing.assert_close(theta.grad, -s.grad.sum())
    assert s.grad[3] == 0 and s.grad[1] == 2500


def test_half_precision_scores_are_refused():
    with pytest.raises(ValueError, match="float32"):
        threshold_mask(torch.zeros(2, dtype=torch.bfloat16), torch.tensor(0.0))


def test_scaled_defaults():
    assert initial_thresholds() == pytest.approx([0.001, 0.002, 0.003]) and default_temperature() == 1e4
    assert initial_thresholds(36) == pytest.approx([0.196 / 36, 0.392 / 36, 0.588 / 36])
    assert default_temperature(36) == pytest.approx(1836.7, abs=0.1)


@given(st.lists(st.floats(0, 0.02), min_size=1, max_size=30), st.floats(-0.01, 0.02), st.floats(0, 0.01))
@settings(deadline=None, max_examples=50)
def test_raising_a_threshold_never_keeps_more(scores, theta, more):
    s = torch.tensor(scores)
    low, high = (threshold_mask(s, torch.tensor(t)) for t in (theta, theta + more))
    assert (high <= low).all() and set(low.tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("bad", [[0, 4], [4, 4], [7, 4], [4, 12], [-1]])
def test_bad_locations(bad):
    with pytest.raises(ValueError, match=r"locations=.*1\.\.11"):
        check_locations(bad, 12)


def test_bad_thresholds():
    with pytest.raises(ValueError, match="4 thresholds for 3"):
        check_thresholds([0.0] * 4, 3)
    with pytest.raises(ValueError, match="finite"):
        check_thresholds([0.0, float("nan"), 1.0], 3)


# ---------------------------------------------------------------------------------------------------- masked attention
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_masked_softmax_is_the_softmax_of_the_kept(eps):
    a = 3 * torch.randn(2, 3, 6, 6, generator=gen())
    policy = torch.tensor([[1, 1, 0, 1, 0, 1], [1, 0, 0, 0, 1, 1.0]])
    out = masked_softmax(a, policy, eps=eps)
    torch.testing.assert_close(out.sum(-1), torch.ones(2, 3, 6), rtol=0, atol=1e-6)
    for b in range(2):
        kept = policy[b].bool()
        torch.testing.assert_close(
            out[b][:, kept][:, :, kept], a[b][:, kept][:, :, kept].softmax(-1), rtol=1e-5, atol=1e-5
        )
        leak = out[b][:, kept][:, :, ~kept]
        assert (leak == 0).all() if eps == 0 else ((leak > 0) & (leak <= eps / 6)).all()
        own = out[b].diagonal(dim1=-2, dim2=-1)[:, ~kept]
        assert (own > 0).all(), "a dropped token still sees itself"


def test_a_dropped_token_with_the_largest_logit_stays_dropped():
    a, policy = torch.zeros(1, 1, 4, 4), torch.tensor([[1, 1, 1, 0.0]])
    for lead in (20.0, 100.0):
        a[..., 3] = lead
        out = masked_softmax(a, policy, eps=1e-6)[0, 0, 0]
        torch.testing.assert_close(out, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0]), rtol=0, atol=1e-6)
        revived = masked_softmax(a, policy, eps=1e-6, row_max="all")[0, 0, 0]
        assert revived[3] > 0.1, "the published maximum brings it back"


def test_gradients_stay_finite_and_reach_the_policy():
    a = torch.zeros(1, 1, 3, 3)
    a[..., 2] = 100.0
    a.requires_grad_()
    policy = torch.tensor([[1.0, 1.0, 0.0]], requires_grad=True)
    (masked_softmax(a, policy) * torch.arange(9.0).view(3, 3)).sum().backward()
    assert a.grad.isfinite().all() and policy.grad.isfinite().all() and policy.grad[0, 2] != 0


def test_policy_gradient_equals_finite_differences():
    a = torch.randn(1, 2, 4, 4, generator=gen())
    w = torch.randn(1, 2, 4, 4, generator=gen(1)).double()
    policy = torch.tensor([[1.0, 1.0, 1.0, 1.0]], requires_grad=True)
    (masked_softmax(a, policy).double() * w).sum().backward()
    h, found = 1e-2, []
    for j in range(4):
        up, down = (policy.detach().clone() for _ in range(2))
        up[0, j], down[0, j] = 1 + h, 1 - h
        found.append((((masked_softmax(a, up) - masked_softmax(a, down)).double() * w).sum() / (2 * h)).item())
    torch.testing.assert_close(policy.grad[0], torch.tensor(found), rtol=1e-2, atol=1e-3)


def test_bad_softmax_options():
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="row_max='rows'"):
        masked_softmax(x, torch.ones(1, 1), row_max="rows")
    with pytest.raises(ValueError, match="eps > 0"):
        masked_softmax(x, torch.ones(1, 1), row_max="all")


# -------------------------------------------------------------------------------------------------------------- budget
def test_macs_of_a_block():
    assert DEIT_S.block(197) == 12 * 384**2 * 197 + 2 * 384 * 197**2
    assert DEIT_S.dense == pytest.approx(4.5985e9, abs=5e4) and DEIT_S.dense_without_prefix == pytest.approx(
        4.57364e9, abs=5e3
    )
    assert DEIT_S.staged([137, 96, 67], (4, 7, 10)) == pytest.approx(3.13215e9, abs=5e3)
    assert DEIT_S.staged([196] * 3, (4, 7, 10)) == DEIT_S.dense
    assert DEIT_S.floor((4, 7, 10)) == pytest.approx(0.3448, abs=5e-5)


@given(st.integers(1, 400))
@settings(deadline=None, max_examples=30)
def test_cost_rises_with_every_token(n):
    assert DEIT_S.block(n + 1) > DEIT_S.block(n)


@pytest.mark.parametrize(("dim", "gap"), [(192, 0.00712), (384, 0.02486), (768, 0.09218)])
def test_the_released_budget_forgets_the_class_token(dim, gap):
    cost = ViTCost(dim=dim, hidden=4 * dim, heads=1, depth=12, patches=196, prefix=1, stem=196 * dim * 768)
    macs = torch.tensor([float(cost.dense)], dtype=torch.float64)
    assert budget_loss(macs, cost, 1.0) == 0
    assert float(budget_loss(macs, cost, 1.0, form="absolute_gmacs")) == pytest.approx(gap, abs=1e-5)


def test_budget_gradient_has_the_sign_of_the_excess_and_follows_the_mean_of_all_devices():
    macs = torch.tensor([0.8, 0.6]).double() * DEIT_S.dense
    macs.requires_grad_()
    for mean, sign in ((None, 1), (0.4 * DEIT_S.dense, -1)):
        mean = None if mean is None else torch.tensor(mean, dtype=torch.float64)
        loss = budget_loss(macs, DEIT_S, 0.5, mean=mean)
        (grad,) = torch.autograd.grad(loss, macs)
        torch.testing.assert_close(grad, torch.full((2,), sign / 2 / DEIT_S.dense, dtype=torch.float64))
        assert loss.item() == pytest.approx(0.2 if mean is None else 0.1)


def test_the_budget_is_that_of_the_mean_image_not_of_every_image():
    """Images on both sides of it: |mean - t|, not the mean of |F - t|."""
    macs = (torch.tensor([0.9, 0.3]).double() * DEIT_S.dense).requires_grad_()
    loss = budget_loss(macs, DEIT_S, 0.5)
    assert loss.item() == pytest.approx(0.1)
    (grad,) = torch.autograd.grad(loss, macs)
    torch.testing.assert_close(grad, torch.full((2,), 0.5 / DEIT_S.dense, dtype=torch.float64))


def test_counts_meet_the_budget_by_bisection():
    for target in (0.4, 0.5, 0.65, 0.9, 1.0):
        kept = keep_counts(DEIT_S, (4, 7, 10), target)
        assert kept == sorted(kept, reverse=True)
        assert DEIT_S.staged(kept, (4, 7, 10)) / DEIT_S.dense == pytest.approx(target, abs=0.001)
    assert keep_counts(DEIT_S, (4, 7, 10), 1.0) == [196] * 3
    fused = keep_counts(DEIT_S, (4, 7, 10), 0.5, extra=1)
    assert DEIT_S.staged([k + 1 for k in fused], (4, 7, 10)) / DEIT_S.dense == pytest.approx(0.5, abs=0.001)
    assert (
        round_counts(DEIT_S, (4, 7, 10), [9.9, 9.9, 9.9], DEIT_S.staged([10] * 3, (4, 7, 10)) / DEIT_S.dense)
        == [10] * 3
    )


@pytest.mark.parametrize(("target", "floor", "error"), [(0.0, 0, "in "), (1.2, 0, "in "), (0.3, 0.345, "floor 0.3450")])
def test_bad_budgets(target, floor, error):
    with pytest.raises(ValueError, match=f"budget {target} .*{error}"):
        check_budget(target, floor=floor)
    with pytest.raises(ValueError, match="form='gmacs', allowed"):
        budget_loss(torch.ones(1), DEIT_S, 0.5, form="gmacs")


# -------------------------------------------------------------------------------------------------------- distillation
def test_kl_is_of_the_teacher_and_a_batch_mean():
    s, t = torch.randn(3, 5, generator=gen()), torch.randn(3, 5, generator=gen(1))
    p, q = t.softmax(1), s.softmax(1)
    torch.testing.assert_close(logit_kl(s, t), (p * (p / q).log()).sum() / 3)
    assert not torch.isclose(logit_kl(s, t), logit_kl(t, s)) and logit_kl(s, s).abs() < 1e-6


def test_token_kl_is_the_mean_over_alive_tokens():
    s, t = torch.randn(2, 3, 5, generator=gen()), torch.randn(2, 3, 5, generator=gen(1))
    alive = torch.tensor([[1, 0, 1], [0, 0, 1.0]])
    plain = [logit_kl(s[b, i][None], t[b, i][None]) for b, i in ((0, 0), (0, 2), (1, 2))]
    torch.testing.assert_close(token_kl(s, t, alive), torch.stack(plain).mean())
    assert token_kl(s, t, torch.zeros(2, 3)) == 0
    s.requires_grad_()
    alive.requires_grad_()
    assert torch.autograd.grad(token_kl(s, t, alive), alive, allow_unused=True) == (None,), (
        "no gate learns to hide a token"
    )
