"""Tangent propagation: the Child's architecture gradient is drawn to the Parent's.

    f(w, alpha) = mean log p_y                     log-likelihood of the Parent; t = df/dalpha is the tangent direction
    G(alpha^)   = - KL(p || p^)                    of the Child, p the Parent's output distribution; g = dG/dalpha^
    D(alpha^)   = ||g - t||^2                      the discrepancy
    L           = - G + lambda D + mu L_R          minimised over alpha^ with
    dL/dalpha^  = - g + lambda H d                 H = d2G/dalpha^2,  d = dD/dg = 2 (g - t)

The tangent is printed as sum_n dp_n/dalpha, which is identically zero (probabilities sum to one): the gradient of
the log-likelihood is meant. G is a log-likelihood, so H = -F with a Fisher or Gauss-Newton matrix F: the sign turns.
Means over the batch are meant, or sums (`reduction`): the paper does not say. With sums over B images the tangent term is B times
larger beside g: both grow with B, D and H d with B^2. Architecture parameters are flat vectors (K,) here; `flatten`, `unflatten`
translate. On several ranks t and g are those of the whole batch before d is formed, and so is H d (`ranks`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dcp_nas.ranks import over_ranks, world_size

HESSIANS = ("exact", "ggn", "fisher_empirical", "ggn_rank1", "ggn_diag")
DISTANCES = ("frobenius", "l1", "cosine")
REDUCTIONS = ("mean", "sum")
PRODUCTS = ("forward", "double_vjp")  # how the Gauss-Newton form gets J v
Forward = Callable[[Sequence[Tensor]], Tensor]


def flatten(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of any shapes -> one vector (K,)."""
    return torch.cat([p.reshape(-1) for p in parts])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `flatten`."""
    parts = vector.split([p.numel() for p in like])
    return [v.view_as(p) for v, p in zip(parts, like, strict=True)]


def parent_tangent(logits: Tensor, labels: Tensor, alphas: Sequence[Tensor], *, reduction: str = "mean") -> Tensor:
    """t = d(mean log p_y)/dalpha = -d(cross-entropy)/dalpha, (K,). logits (B, N), labels (B,). reduction: mean | sum."""
    each = logits.log_softmax(dim=1).gather(1, labels[:, None])
    log_likelihood = each.sum() if reduction == "sum" else each.mean()
    return over_ranks(flatten(torch.autograd.grad(log_likelihood, list(alphas))).detach(), reduction)


def child_likelihood(logits: Tensor, target: Tensor) -> Tensor:
    """G per image, -KL(p || p^) <= 0. logits of the Child (B, N), target p of the Parent (B, N) -> (B,).

    ValueError for other shapes or a target that would be trained."""
    if logits.shape != target.shape or target.requires_grad:
        raise ValueError(
            f"logits {tuple(logits.shape)}, target {tuple(target.shape)}: the Parent's probabilities must have the "
            "same shape and come from torch.no_grad()"
        )
    return (target * logits.log_softmax(dim=1)).sum(1) - torch.xlogy(target, target).sum(1)


def discrepancy(g: Tensor, t: Tensor, *, distance: str = "frobenius") -> Tensor:
    """D = ||g - t||^2, ||g - t||_1, or 1 - cos(g, t); scalar."""
    if distance == "frobenius":
        return (g - t).square().sum()
    if distance == "l1":
        return (g - t).abs().sum()
    if distance == "cosine":
        return 1 - torch.cosine_similarity(g, t, dim=0)
    raise ValueError(f"distance={distance!r}, allowed: {', '.join(DISTANCES)}")


def discrepancy_gradient(g: Tensor, t: Tensor, *, distance: str = "frobenius") -> Tensor:
    """d = dD/dg at g, (K,)."""
    with torch.enable_grad():
        x = g.detach().requires_grad_()
        return torch.autograd.grad(discrepancy(x, t, distance=distance), x)[0]


def hessian_vector(g: Tensor, alphas: Sequence[Tensor], v: Tensor) -> Tensor:
    """H v by double backward. g (K,) must carry the graph of its own computation (create_graph=True)."""
    return flatten(torch.autograd.grad(g, list(alphas), grad_outputs=v)).detach()


def jacobian_vector(forward: Forward, alphas: Sequence[Tensor], v: Tensor) -> Tensor:
    """J v in forward mode, J = dlogits/dalpha (B*N, K) -> (B, N). One pass without a graph.

    The signs of a binary network pass their surrogate's derivative; a finite difference would see only jumps."""
    with torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(a.detach(), p) for a, p in zip(alphas, unflatten(v, alphas), strict=True)]
        tangent = forward_ad.unpack_dual(forward(duals)).tangent
    if tangent is None:
        raise ValueError("the logits do not depend on alpha")
    return tangent


def kept_jacobian_vector(logits: Tensor, alphas: Sequence[Tensor], v: Tensor) -> Tensor:
    """J v as `jacobian_vector`, from the graph of `logits` that is there: J^T w is linear in w, its derivative along v is J v.

    Two backward passes in place of one forward pass; every operation's backward must be differentiable in its argument."""
    w = torch.zeros_like(logits, requires_grad=True)
    product = flatten(torch.autograd.grad(logits, list(alphas), grad_outputs=w, create_graph=True))
    return torch.autograd.grad(product, w, grad_outputs=v, retain_graph=True)[0]


def ggn_vector(
    forward: Forward, logits: Tensor, alphas: Sequence[Tensor], v: Tensor, *, reduction: str = "mean", product: str = "forward"
) -> Tensor:  # fmt: skip
    """F v, F = mean_x J_x^T (diag(p^) - p^ p^T) J_x: the generalised Gauss-Newton matrix with the model's own labels.

    product: J v by one forward-mode pass (forward) or on the kept graph (double_vjp), the same up to rounding; then one backward
    pass through the graph of `logits`. No second derivative of any operation. reduction: mean | sum over the images."""
    p = logits.detach().softmax(dim=1)
    u = kept_jacobian_vector(logits, alphas, v) if product == "double_vjp" else jacobian_vector(forward, alphas, v)
    s = p * (u - (p * u).sum(1, keepdim=True)) / (len(p) if reduction == "mean" else 1)
    return flatten(torch.autograd.grad(logits, list(alphas), grad_outputs=s, retain_graph=True)).detach()


def chunk_gradients(likelihoods: Tensor, alphas: Sequence[Tensor], chunks: int) -> Tensor:
    """Gradients of the mean of G over `chunks` equal parts of the batch, on one graph: (chunks, K).

    Batch norms couple the images of a batch, so per-image gradients are those of one joint forward pass.
    ValueError if the batch does not divide."""
    if chunks < 1 or len(likelihoods) % chunks:
        raise ValueError(f"chunks={chunks} must divide the batch of {len(likelihoods)} images")
    parts = likelihoods.view(chunks, -1).mean(1)
    rows = [flatten(torch.autograd.grad(part, list(alphas), retain_graph=True)) for part in parts]
    return torch.stack(rows).detach()


def empirical_fisher_vector(gradients: Tensor, v: Tensor, *, chunk_size: int, diagonal: bool = False) -> Tensor:
    """F v with F = E[g_x g_x^T], or its diagonal. gradients: (chunks, K), means over `chunk_size` images each.

    The mean over a chunk shrinks the second moment by its size, hence the factor."""
    if diagonal:
        return chunk_size * gradients.square().mean(0) * v
    return chunk_size * (gradients * (gradients @ v)[:, None]).mean(0)


def check_rule(*, lam: float, hessian: str, distance: str, reduction: str = "mean", product: str = "forward") -> None:
    """ValueError naming what is allowed."""
    if hessian not in HESSIANS or distance not in DISTANCES or lam < 0:
        raise ValueError(
            f"hessian={hessian!r}, distance={distance!r}, lam={lam}, allowed: {', '.join(HESSIANS)}; {', '.join(DISTANCES)}; "
            "lam >= 0"
        )
    if reduction not in REDUCTIONS or product not in PRODUCTS:
        raise ValueError(
            f"reduction={reduction!r}, product={product!r}, allowed: {', '.join(REDUCTIONS)}; {', '.join(PRODUCTS)}"
        )


def child_gradient(
    forward: Forward, alphas: Sequence[Tensor], target: Tensor, t: Tensor | None, *, lam: float, hessian: str = "ggn",
    distance: str = "frobenius", chunks: int = 10, reduction: str = "mean", product: str = "forward",
) -> dict[str, Tensor]:  # fmt: skip
    """g, the tangent term lambda H d, and their sum dL/dalpha^ = -g + lambda H d, each (K,); G and D as scalars.

    forward: alphas -> logits (B, N) of the Child, without side effects. alphas: leaves with requires_grad. target (B, N): the
    Parent's probabilities. t (K,): the Parent's tangent, or None with lam = 0 (CP).
    hessian: exact (double backward) | ggn | fisher_empirical, ggn_diag (from `chunks` parts of the batch) | ggn_rank1
    (g g^T: it changes the length of g, never its direction). reduction: G is the mean over the images, or their sum; t must be of
    the same kind. product: see `ggn_vector`. ValueError for another name, or lam > 0 without t."""
    check_rule(lam=lam, hessian=hessian, distance=distance, reduction=reduction, product=product)
    if lam > 0 and t is None:
        raise ValueError(f"lam={lam} needs the Parent's tangent direction")
    logits = forward(alphas)
    each = child_likelihood(logits, target)
    total = reduction == "sum"
    objective, second = each.sum() if total else each.mean(), lam > 0
    create = second and hessian == "exact"
    g = flatten(torch.autograd.grad(objective, list(alphas), create_graph=create, retain_graph=second))
    found = {"g": over_ranks(g.detach(), reduction), "objective": over_ranks(each.mean().detach())}
    if t is None:
        return found | {"gradient": -found["g"]}
    found["discrepancy"] = discrepancy(found["g"], t, distance=distance)
    if not second:
        return found | {"gradient": -found["g"]}
    d = discrepancy_gradient(found["g"], t, distance=distance)
    if hessian == "exact":
        curvature = over_ranks(hessian_vector(g, alphas, d), reduction)
    elif hessian == "ggn":
        curvature = -over_ranks(ggn_vector(forward, logits, alphas, d, reduction=reduction, product=product), reduction)
    elif hessian == "ggn_rank1":  # of the mean gradient; the sum of B images has B times the curvature
        curvature = -found["g"] * (found["g"] @ d) / (len(each) * world_size() if total else 1)
    else:
        rows = chunk_gradients(each, alphas, chunks)
        curvature = -empirical_fisher_vector(rows, d, chunk_size=len(each) // chunks, diagonal=hessian == "ggn_diag")
        curvature = curvature * len(each) if total else curvature
    found["tangent_term"] = lam * curvature
    return found | {"gradient": -found["g"] + found["tangent_term"]}
