"""Decoupled optimisation: its identity cases, its psi gradient against autograd, which columns are active."""

import pytest
import torch

from dcp_nas.decoupled_optimisation import Decoupled, active_operations
from dcp_nas.operations import Bits
from dcp_nas.supernet import Supernet


def leaf(seed=0, shape=(5, 8)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_active_columns_by_rank_of_the_mean_norm():
    norms = torch.tensor([[0.0, 1.0, 5.0, 2.0], [0.0, 9.0, 1.0, 2.0]])  # means 0, 5, 3, 2 -> ranks 1, 4, 3, 2
    assert active_operations(norms, tau=0.5).tolist() == [[False, True, True, False]] * 2
    assert active_operations(norms, tau=0.5, granularity="edge_op").tolist() == [
        [False, False, True, True],
        [False, True, False, True],
    ]
    assert active_operations(norms, tau=0.6).sum(1).tolist() == [2, 2]  # int(4 * 0.6) = 2
    assert not active_operations(norms, tau=1.0).any() and active_operations(norms, tau=0.0).all()
    ties = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    assert active_operations(ties, tau=0.5).tolist() == [[False, False, True, True]]  # broken by the index
    for bad in ({"tau": 1.5}, {"tau": 0.5, "granularity": "edge"}):
        with pytest.raises(ValueError, match="allowed"):
            active_operations(norms, **bad)


def test_norms_follow_the_conventions_of_the_paper():
    torch.manual_seed(0)
    net = Supernet(
        num_classes=3,
        in_channels=1,
        channels=2,
        cells=3,
        nodes=1,
        reductions=[1],
        bits=Bits("beta", "binary", affine=False),
    )
    norms = net.operation_norms(reduction=False)
    names = {n: k for k, n in enumerate(("none", "max", "avg", "skip", "sep3", "sep5", "dil3", "dil5"))}
    assert norms.shape == (2, 8) and norms[:, names["none"]].eq(0).all() and norms[:, names["skip"]].eq(1).all()
    assert norms[:, names["max"]].allclose(torch.tensor(1 / 81)) and norms[:, names["avg"]].equal(
        norms[:, names["max"]]
    )
    cells = [c for c in net.cells if not c.reduction]
    expected = []
    for cell in cells:  # beta o sign(w): its square is beta^2
        convs = [m for m in cell.mixed[1].ops[names["dil5"]].modules() if hasattr(m, "beta")]
        expected.append(
            sum((c.beta**2).sum() * c.weight[0].numel() for c in convs) / sum(c.weight.numel() for c in convs)
        )
    torch.testing.assert_close(norms[1, names["dil5"]], torch.stack(expected).mean().detach())
    assert active_operations(norms, tau=0.6)[:, names["skip"]].all()


def test_without_psi_or_active_columns_nothing_is_added():
    for psi, tau in ((0.0, 0.5), (0.3, 1.0)):
        alpha = leaf()
        rule = Decoupled(alpha, eta=0.1, eta_psi=0.0, psi=psi)
        rule.before_step(torch.randn(5, 8))
        before = alpha.detach().clone()
        assert rule.after_step(active_operations(torch.rand(5, 8), tau=tau)) == 0.0
        assert torch.equal(alpha.detach(), before)


def test_the_backtracking_adds_the_old_alpha_in_the_active_entries_only():
    alpha, active = leaf(), active_operations(torch.rand(5, 8, generator=torch.Generator().manual_seed(2)), tau=0.6)
    rule = Decoupled(alpha, eta=0.1, eta_psi=0.0, psi=0.2)
    old = alpha.detach().clone()
    rule.before_step(torch.zeros(5, 8))
    with torch.no_grad():
        alpha.sub_(0.5)  # the optimizer's step
    size = rule.after_step(active)
    expected = old - 0.5 + torch.where(active, 0.1 * 0.2 * old, 0.0)
    torch.testing.assert_close(alpha.detach(), expected)
    assert size == pytest.approx(torch.where(active, 0.02 * old, 0.0).norm().item(), rel=1e-5)


def test_psi_gradient_is_that_of_autograd_and_psi_stays_non_negative():
    alpha = leaf()
    rule = Decoupled(alpha, eta=0.1, eta_psi=2.0, psi=0.2)
    active = active_operations(torch.rand(5, 8, generator=torch.Generator().manual_seed(3)), tau=0.4)
    target = torch.randn(5, 8, generator=torch.Generator().manual_seed(4))
    old = base = alpha.detach().clone()
    for step in range(6):
        gradient = 40 * (alpha.detach() - target)
        psi_before = rule.psi.clone()
        if step:  # dL/dpsi through alpha~ = base + eta psi alpha_old, with L = 20 |alpha~ - target|^2
            psi = psi_before.clone().requires_grad_()
            value = 20 * (base + torch.where(active, 0.1 * psi[:, None] * old, 0.0) - target).square().sum()
            expected = torch.autograd.grad(value, psi)[0]
            torch.testing.assert_close(rule.psi_gradient(gradient), expected, rtol=1e-4, atol=1e-5)
            assert expected.abs().max() > 0
        rule.before_step(gradient)
        torch.testing.assert_close(rule.psi, (psi_before - 2.0 * rule.psi_gradient(gradient)).abs())
        assert bool((rule.psi >= 0).all())
        old = alpha.detach().clone()
        with torch.no_grad():
            alpha.sub_(0.01 * gradient)
        base = alpha.detach().clone()
        rule.after_step(active)
    assert not torch.equal(rule.psi, torch.full((5,), 0.2))


def test_state_round_trip_and_bad_values():
    alpha = leaf()
    rule = Decoupled(alpha, eta=0.1, eta_psi=0.1)
    rule.before_step(torch.ones(5, 8))
    rule.after_step(torch.ones(5, 8, dtype=torch.bool))
    other = Decoupled(leaf(), eta=0.1, eta_psi=0.1)
    other.load_state_dict(rule.state_dict())
    assert torch.equal(other.psi_gradient(torch.ones(5, 8)), rule.psi_gradient(torch.ones(5, 8)))
    with pytest.raises(ValueError, match="eta=-1"):
        Decoupled(alpha, eta=-1, eta_psi=0.1)
