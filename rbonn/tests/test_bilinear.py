"""The bilinear model: derivatives against finite differences, the published backward against a float64 reimplementation."""

import pytest
import torch
import torch.nn.functional as F

from rbonn.bilinear import bilinear_binarize, constraint, reconstruction, reconstruction_grad, task_grad


def numeric(f, a, eps=1e-6):
    out = torch.zeros_like(a)
    for i in range(len(a)):
        step = torch.zeros_like(a)
        step[i] = eps
        out[i] = (f(a + step) - f(a - step)) / (2 * eps)
    return out


def test_derivative_of_the_whole_objective_by_a_matches_finite_differences():
    g = torch.Generator().manual_seed(0)
    w = torch.randn(3, 2, 3, 3, generator=g, dtype=torch.float64)
    x = torch.randn(4, 2, 5, 5, generator=g, dtype=torch.float64).sign()
    target = torch.randn(4, 3, 3, 3, generator=g, dtype=torch.float64)
    a, lam = torch.tensor([0.5, 1.3, 2.0], dtype=torch.float64), 0.3
    s = F.conv2d(x, w.sign())

    def out(a):
        return s / a.view(1, -1, 1, 1)

    def objective(a):
        return (out(a) - target).square().sum() / 2 + lam * reconstruction(w, a)

    grad_out = out(a) - target
    exact = task_grad(grad_out, s, a) + lam * reconstruction_grad(w, a)
    torch.testing.assert_close(exact, numeric(objective, a), rtol=1e-6, atol=1e-6)


def test_best_a_makes_the_reconstruction_gradient_vanish():
    w = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    best = w.abs().sum(1) / w.square().sum(1)  # <A w - b, w> = 0
    torch.testing.assert_close(reconstruction_grad(w, best), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    assert reconstruction(w, best * 1.01) > reconstruction(w, best) < reconstruction(w, best * 0.99)


def reference(w, alpha, grad, lam, c):
    """The published rule, entry by entry."""
    dw, dalpha = torch.zeros_like(w), torch.zeros_like(alpha)
    for o in range(w.shape[0]):
        for i in range(w.shape[1]):
            for j in range(w.shape[2]):
                v, g, a = w[o, i, j, 0].item(), grad[o, i, j, 0].item(), alpha[o].item()
                b = c * (1 if v >= 0 else -1)
                r = v - b * a
                dw[o, i, j, 0] = lam * r + g * a
                dalpha[o] += g * v - lam * r * b
    return dw, dalpha


@pytest.mark.parametrize("lam", [0.0, 1e-4, 0.5])
def test_backward_is_the_published_rule(lam):
    g = torch.Generator().manual_seed(2)
    w = (3 * torch.randn(4, 3, 5, 1, generator=g, dtype=torch.float64)).requires_grad_()  # beyond 1: nothing is clipped
    s = torch.randn(4, 1, 1, 1, generator=g, dtype=torch.float64).requires_grad_()
    grad = torch.randn(4, 3, 5, 1, generator=g, dtype=torch.float64)
    bilinear_binarize(w, s.abs(), lam=lam, const=0.02).backward(grad)
    dw, dalpha = reference(w.detach(), s.detach().abs(), grad, lam, 0.02)
    torch.testing.assert_close(w.grad, dw, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(s.grad, s.detach().sign() * dalpha, rtol=1e-12, atol=1e-14)


def test_lambda_zero_leaves_no_reconstruction_in_the_gradient():
    w = torch.randn(2, 3, 3, 3, requires_grad=True)
    bilinear_binarize(w, torch.ones(2, 1, 1, 1), lam=0.0).backward(torch.zeros(2, 3, 3, 3))
    assert not w.grad.any()
    bilinear_binarize(w, torch.ones(2, 1, 1, 1), lam=1.0).backward(torch.zeros(2, 3, 3, 3))
    torch.testing.assert_close(w.grad, w.detach() - 0.02 * w.detach().sign())


def test_value_ignores_the_size_of_w_and_counts_zero_as_plus_one():
    w = torch.tensor([[[[0.0, -0.0, 2.0, -1e-9]]]])
    alpha = torch.full((1, 1, 1, 1), 5.0)
    expected = torch.tensor([[[[0.1, 0.1, 0.1, -0.1]]]])
    torch.testing.assert_close(bilinear_binarize(w, alpha), expected)
    torch.testing.assert_close(bilinear_binarize(3 * w, alpha), expected)
    assert bilinear_binarize(w, alpha, zero=0)[0, 0, 0, :2].eq(0).all()


@pytest.mark.parametrize("lam", [1e-4, 0.5])
def test_the_constraint_at_the_step_and_the_published_backward_rule_are_one(lam):
    """Task gradients through the backward pass, plus those of `constraint`, are the gradients of the whole rule."""
    g = torch.Generator().manual_seed(5)
    w = (3 * torch.randn(4, 3, 2, 2, generator=g, dtype=torch.float64)).requires_grad_()
    s = torch.randn(4, 1, 1, 1, generator=g, dtype=torch.float64).requires_grad_()
    grad = torch.randn(4, 3, 2, 2, generator=g, dtype=torch.float64)
    whole = torch.autograd.grad(bilinear_binarize(w, s.abs(), lam=lam), (w, s), grad)
    task = torch.autograd.grad(bilinear_binarize(w, s.abs(), lam=0.0), (w, s), grad)
    pull = torch.autograd.grad(constraint(w, s.abs(), lam=lam), (w, s))
    for a, b, c in zip(whole, task, pull, strict=True):
        torch.testing.assert_close(a, b + c, rtol=1e-12, atol=1e-15)
        assert c.abs().max() > 0


def test_the_true_derivative_by_alpha_is_that_of_finite_differences_and_the_released_one_is_not():
    g = torch.Generator().manual_seed(6)
    w = torch.randn(3, 2, 3, 3, generator=g, dtype=torch.float64)
    x = torch.randn(2, 2, 5, 5, generator=g, dtype=torch.float64).sign()
    alpha = torch.tensor([0.5, 1.3, 2.0], dtype=torch.float64)

    def objective(a):
        return F.conv2d(x, bilinear_binarize(w, a.view(3, 1, 1, 1), lam=0.0, scale_grad="exact")).square().sum()

    found = {}
    for name in ("exact", "released"):
        a = alpha.clone().requires_grad_()
        out = F.conv2d(x, bilinear_binarize(w, a.view(3, 1, 1, 1), lam=0.0, scale_grad=name))
        found[name] = torch.autograd.grad(out.square().sum(), a)[0]
    torch.testing.assert_close(found["exact"], numeric(objective, alpha), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found["released"], found["exact"])
    with pytest.raises(ValueError, match="scale_grad='true', allowed: released, exact"):
        bilinear_binarize(w, alpha.view(3, 1, 1, 1), scale_grad="true")
