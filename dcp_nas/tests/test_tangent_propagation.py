"""The second-order core: closed forms on a linear model, finite differences on a smooth supernet, sign traps, identities."""

import pytest
import torch
from torch import nn

from dcp_nas.operations import Bits, Sign
from dcp_nas.supernet import Supernet, inherit
from dcp_nas.tangent_propagation import (
    DISTANCES,
    HESSIANS,
    child_gradient,
    child_likelihood,
    chunk_gradients,
    discrepancy,
    discrepancy_gradient,
    empirical_fisher_vector,
    flatten,
    ggn_vector,
    jacobian_vector,
    parent_tangent,
    unflatten,
)

B, N, K = 12, 4, 6


@pytest.fixture
def linear():
    """Logits linear in theta (K,), soft targets that are not the model's: (forward, [theta], target, t)."""
    g = torch.Generator().manual_seed(0)
    design = torch.randn(B, N, K, generator=g, dtype=torch.float64)
    theta = torch.randn(K, generator=g, dtype=torch.float64).requires_grad_()
    target = torch.randn(B, N, generator=g, dtype=torch.float64).softmax(1)
    t = torch.randn(K, generator=g, dtype=torch.float64)
    return (lambda a: design @ a[0], [theta], target, t)


def objective(forward, target):
    return lambda theta: child_likelihood(forward([theta]), target).mean()


def test_the_printed_tangent_is_identically_zero(linear):
    forward, alphas, _, _ = linear
    p = forward(alphas).softmax(1)
    printed = torch.autograd.grad(p.sum(), alphas)[0]
    assert printed.abs().max() < 1e-15
    labels = torch.arange(B) % N
    t = parent_tangent(forward(alphas), labels, alphas)
    ce = torch.autograd.grad(nn.functional.cross_entropy(forward(alphas), labels), alphas)[0]
    torch.testing.assert_close(t, -ce)
    assert t.norm() > 0.1 and not t.requires_grad


def test_child_likelihood_is_minus_kl():
    g = torch.Generator().manual_seed(1)
    logits, target = torch.randn(5, 3, generator=g), torch.randn(5, 3, generator=g).softmax(1)
    expected = -(target * (target.log() - logits.log_softmax(1))).sum(1)
    torch.testing.assert_close(child_likelihood(logits, target), expected)
    assert bool((child_likelihood(logits, target) <= 0).all())
    assert child_likelihood(logits, logits.softmax(1)).abs().max() < 1e-6
    hard = torch.eye(3)[[0, 1, 2, 0, 1]]
    assert bool(child_likelihood(logits, hard).isfinite().all())  # 0 log 0 = 0
    with pytest.raises(ValueError, match="same"):
        child_likelihood(logits, target[:, :2])
    with pytest.raises(ValueError, match="no_grad"):
        child_likelihood(logits, target.clone().requires_grad_())


def test_gauss_newton_is_minus_the_hessian_of_a_linear_model_and_the_fishers_are_not(linear):
    forward, alphas, target, t = linear
    h = torch.autograd.functional.hessian(objective(forward, target), alphas[0])
    f = torch.stack([ggn_vector(forward, forward(alphas), alphas, e) for e in torch.eye(K, dtype=torch.float64)])
    torch.testing.assert_close(f, -h, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(f).min() > 0
    each = child_likelihood(forward(alphas), target)
    rows = chunk_gradients(each, alphas, B)
    empirical = torch.stack([empirical_fisher_vector(rows, e, chunk_size=1) for e in torch.eye(K, dtype=torch.float64)])
    torch.testing.assert_close(empirical, rows.T @ rows / B)
    assert (empirical + h).norm() / h.norm() > 0.3
    # the Fisher matrix with the labels of the teacher, E_{n ~ target} of score score^T
    scores = torch.stack(
        [flatten(torch.autograd.grad(forward(alphas).log_softmax(1)[b, n], alphas)) for b in range(B) for n in range(N)]
    )
    teacher = torch.einsum("s,sk,sl->kl", target.flatten() / B, scores, scores)
    assert (teacher + h).norm() / h.norm() > 0.05


@pytest.mark.parametrize("hessian", ["exact", "ggn"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_the_whole_gradient_is_that_of_the_loss(linear, hessian, distance):
    """L = -G + lam D by autograd of the plain formula. A lost minus sign in the Gauss-Newton form fails here."""
    forward, alphas, target, t = linear

    def loss(theta):
        g = torch.autograd.grad(objective(forward, target)(theta), theta, create_graph=True)[0]
        return -objective(forward, target)(theta) + 0.7 * discrepancy(g, t, distance=distance)

    expected = torch.autograd.grad(loss(alphas[0]), alphas[0])[0]
    found = child_gradient(forward, alphas, target, t, lam=0.7, hessian=hessian, distance=distance)
    torch.testing.assert_close(found["gradient"], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found["gradient"], -found["g"] + found["tangent_term"])
    if distance == "frobenius":
        f = torch.stack([ggn_vector(forward, forward(alphas), alphas, e) for e in torch.eye(K, dtype=torch.float64)])
        torch.testing.assert_close(found["tangent_term"], -2 * 0.7 * f @ (found["g"] - t))


def test_rank_one_keeps_the_direction_and_diag_is_the_diagonal(linear):
    forward, alphas, target, t = linear
    rank1 = child_gradient(forward, alphas, target, t, lam=0.7, hessian="ggn_rank1")
    g = rank1["g"]
    torch.testing.assert_close(rank1["gradient"], -g * (1 + 2 * 0.7 * g @ (g - t)))
    assert abs(torch.cosine_similarity(rank1["gradient"], g, dim=0)) > 1 - 1e-12
    rows = chunk_gradients(child_likelihood(forward(alphas), target), alphas, 3)
    torch.testing.assert_close(rows.mean(0), g)
    diag = child_gradient(forward, alphas, target, t, lam=0.7, hessian="ggn_diag", chunks=3)
    torch.testing.assert_close(diag["tangent_term"], -2 * 0.7 * 4 * rows.square().mean(0) * (g - t))
    full = child_gradient(forward, alphas, target, t, lam=0.7, hessian="fisher_empirical", chunks=3)
    torch.testing.assert_close(full["tangent_term"], -2 * 0.7 * 4 * (rows.T @ rows / 3) @ (g - t))
    assert torch.cosine_similarity(full["gradient"], g, dim=0).abs() < 0.999


def test_chunk_size_restores_the_scale_of_per_image_gradients():
    """For independent zero-mean gradients, b E[mean mean^T] = E[g g^T]; without the factor it is b times too small."""
    g = torch.Generator().manual_seed(0)
    per_image, v = torch.randn(6000, 3, generator=g), torch.tensor([1.0, -2.0, 0.5])
    truth = empirical_fisher_vector(per_image, v, chunk_size=1)
    chunked = empirical_fisher_vector(per_image.view(600, 10, 3).mean(1), v, chunk_size=10)
    assert (chunked - truth).norm() / truth.norm() < 0.15


def test_without_lambda_the_gradient_is_minus_g_bit_for_bit_and_equal_tangents_give_zero(linear):
    forward, alphas, target, t = linear
    plain = child_gradient(forward, alphas, target, None, lam=0.0)
    for hessian in HESSIANS:
        found = child_gradient(forward, alphas, target, t, lam=0.0, hessian=hessian)
        assert torch.equal(found["gradient"], -plain["g"]) and "tangent_term" not in found
    for hessian in HESSIANS:
        found = child_gradient(forward, alphas, target, plain["g"], lam=0.7, hessian=hessian, chunks=3)
        assert found["discrepancy"] == 0 and found["tangent_term"].abs().max() == 0


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_and_their_derivatives(distance):
    g, t = torch.tensor([3.0, -4.0, 0.0], dtype=torch.float64), torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    value = {"frobenius": 4 + 36 + 4, "l1": 2 + 6 + 2, "cosine": 1 - (3 - 8) / (5 * 3)}[distance]
    assert discrepancy(g, t, distance=distance).item() == pytest.approx(value)
    d, h = discrepancy_gradient(g, t, distance=distance), 1e-6
    for k in range(3):
        e = torch.zeros(3, dtype=torch.float64)
        e[k] = h
        slope = (discrepancy(g + e, t, distance=distance) - discrepancy(g - e, t, distance=distance)) / (2 * h)
        assert d[k].item() == pytest.approx(slope.item(), abs=1e-8)


def smooth_supernet():
    """A tiny real-valued supernet without kinks: PReLU by tanh, max pooling by average pooling, float64."""
    torch.manual_seed(0)
    net = Supernet(
        num_classes=4, in_channels=1, channels=2, cells=2, nodes=1, reductions=[1], bits=Bits(affine=False)
    ).double()
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.PReLU):
                setattr(module, name, nn.Tanh())
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(3, child.stride, 1))
    g = torch.Generator().manual_seed(1)
    alphas = tuple((100 * a.detach()).double().requires_grad_() for a in net.new_alphas(g))
    x = torch.randn(6, 1, 4, 4, generator=g, dtype=torch.float64)
    target = torch.randn(6, 4, generator=g, dtype=torch.float64).softmax(1)
    t = 0.1 * torch.randn(sum(a.numel() for a in alphas), generator=g, dtype=torch.float64)
    return net, alphas, x, target, t


def test_exact_product_equals_finite_differences_of_the_discrepancy():
    net, alphas, x, target, t = smooth_supernet()
    forward = lambda a: net(x, tuple(a))  # noqa: E731
    found = child_gradient(forward, alphas, target, t, lam=1.0, hessian="exact")["tangent_term"]

    def d_at(vector):
        parts = [p.detach().requires_grad_() for p in unflatten(vector, alphas)]
        g = torch.autograd.grad(child_likelihood(forward(parts), target).mean(), parts)
        return discrepancy(flatten(g), t).item()

    here, h = flatten([a.detach() for a in alphas]), 1e-5
    numeric = torch.tensor(
        [(d_at(here + h * e) - d_at(here - h * e)) / (2 * h) for e in torch.eye(len(here), dtype=torch.float64)]
    )
    assert (found - numeric).norm() / numeric.norm() < 1e-6


def test_forward_mode_is_the_jacobian_on_real_and_on_binary_networks():
    net, alphas, x, _, t = smooth_supernet()
    u = jacobian_vector(lambda a: net(x, tuple(a)), alphas, t)
    h, step = 1e-6, unflatten(t, alphas)
    ahead, behind = (net(x, tuple(a + s * h * d for a, d in zip(alphas, step, strict=True))) for s in (1, -1))
    torch.testing.assert_close(u, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-8)
    binary = Supernet(
        num_classes=4,
        in_channels=1,
        channels=2,
        cells=2,
        nodes=1,
        reductions=[1],
        bits=Bits("beta", "binary", affine=False),
    ).double()
    u = jacobian_vector(lambda a: binary(x, tuple(a)), alphas, t)
    dummy = torch.zeros_like(u).requires_grad_()  # the double-vjp trick as the second formulation
    vjp = flatten(torch.autograd.grad(binary(x, alphas), alphas, grad_outputs=dummy, create_graph=True))
    torch.testing.assert_close(u, torch.autograd.grad(vjp, dummy, grad_outputs=t)[0])
    ahead, behind = (binary(x, tuple(a + s * h * d for a, d in zip(alphas, step, strict=True))) for s in (1, -1))
    assert (u - (ahead - behind) / (2 * h)).norm() / u.norm() > 0.03  # jumps and the surrogate differ


def test_sign_has_the_second_derivative_of_its_surrogate():
    """A custom backward that is not itself differentiable would give zero here."""
    x = torch.tensor([-1.5, -0.5, 0.25, 0.75], dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(Sign()(x).sum(), x, create_graph=True)[0]
    torch.testing.assert_close(first, torch.tensor([0.0, 1.0, 1.5, 0.5], dtype=torch.float64))
    second = torch.autograd.grad(first.sum(), x)[0]
    torch.testing.assert_close(second, torch.tensor([0.0, 2.0, -2.0, -2.0], dtype=torch.float64))


def test_on_a_real_supernet_gauss_newton_agrees_near_the_target_and_both_lower_the_discrepancy():
    torch.manual_seed(0)
    options = {"num_classes": 4, "in_channels": 1, "channels": 2, "cells": 2, "nodes": 1, "reductions": [1]}
    parent, child = (Supernet(**options, bits=Bits(affine=False)).double() for _ in range(2))
    inherit(child, parent)
    alphas = tuple(a.detach().double().requires_grad_() for a in parent.new_alphas(torch.Generator().manual_seed(0)))
    x, y = torch.randn(8, 1, 8, 8, dtype=torch.float64), torch.arange(8) % 4
    with torch.no_grad():
        target = (parent(x, alphas) + 0.05 * torch.randn(8, 4, dtype=torch.float64)).softmax(1)
    t = parent_tangent(parent(x, alphas), y, alphas)
    forward = lambda a: child(x, tuple(a))  # noqa: E731
    terms = {h: child_gradient(forward, alphas, target, t, lam=1.0, hessian=h) for h in ("exact", "ggn")}
    exact, ggn = (terms[h]["tangent_term"] for h in ("exact", "ggn"))
    assert torch.cosine_similarity(exact, ggn, dim=0) > 0.95
    for term in (exact, ggn):
        after = tuple(a.detach() - 1e-3 * d / term.norm() for a, d in zip(alphas, unflatten(term, alphas), strict=True))
        moved = child_gradient(forward, tuple(a.requires_grad_() for a in after), target, t, lam=0.0)["discrepancy"]
        assert moved < terms["exact"]["discrepancy"]


def test_bad_input_is_refused(linear):
    forward, alphas, target, t = linear
    for bad in ({"hessian": "kfac"}, {"distance": "l2"}, {"lam": -1.0}):
        with pytest.raises(ValueError, match="allowed: exact"):
            child_gradient(forward, alphas, target, t, **{"lam": 1.0, **bad})
    with pytest.raises(ValueError, match="needs the Parent's tangent"):
        child_gradient(forward, alphas, target, None, lam=1.0)
    with pytest.raises(ValueError, match="chunks=5 must divide the batch of 12"):
        child_gradient(forward, alphas, target, t, lam=1.0, hessian="fisher_empirical", chunks=5)
    with pytest.raises(ValueError, match="do not depend on alpha"):
        jacobian_vector(lambda a: torch.zeros(2, 3), alphas, t)


@pytest.mark.parametrize("hessian", HESSIANS)
def test_a_sum_over_the_batch_makes_the_tangent_term_larger_beside_g_by_the_batch(linear, hessian):
    """G and t grow with B, and so do D and H d with B^2: the choice is a choice of lambda."""
    forward, alphas, target, t = linear
    options = {"lam": 0.1, "hessian": hessian, "chunks": 3}
    mean = child_gradient(forward, alphas, target, t, **options)
    total = child_gradient(forward, alphas, target, B * t, reduction="sum", **options)
    torch.testing.assert_close(total["g"], B * mean["g"])
    torch.testing.assert_close(total["tangent_term"], B * B * mean["tangent_term"])
    torch.testing.assert_close(total["objective"], mean["objective"])
    labels = torch.arange(B) % N
    torch.testing.assert_close(
        parent_tangent(forward(alphas), labels, alphas, reduction="sum"),
        B * parent_tangent(forward(alphas), labels, alphas),
    )
    for wrong in ({"reduction": "max"}, {"product": "finite"}):
        with pytest.raises(ValueError, match=next(iter(wrong.values()))):
            child_gradient(forward, alphas, target, t, **options, **wrong)


def test_the_product_on_the_kept_graph_is_the_one_of_forward_mode():
    net, alphas, x, target, t = smooth_supernet()
    shape = {"num_classes": 4, "in_channels": 1, "channels": 2, "cells": 2, "nodes": 1, "reductions": [1]}
    binary = Supernet(**shape, bits=Bits("beta", "binary", affine=False)).double()
    for model in (net, binary):
        both = [
            child_gradient(lambda a, m=model: m(x, tuple(a)), alphas, target, t, lam=1.0, product=p)["gradient"]
            for p in ("forward", "double_vjp")
        ]
        torch.testing.assert_close(*both, rtol=1e-9, atol=1e-12)
