"""What the tangent term does, on a fixed snapshot of the supernets: does a small step along it bring the Child's gradient closer?

The snapshot is the state after one Parent and one Child round. On every validation batch the discrepancy D is measured
before and after a step of given length against lambda dD/dalpha, taken exactly, in Gauss-Newton form, and at random (control).
`network=real` is the control of the theory: without signs the exact step must succeed.
"""

import math

import torch
from omegaconf import DictConfig
from torch import Tensor

from common.data.batches import Plan, stream
from dcp_nas.child_parent import ChildParentSearch
from dcp_nas.data import build_data, check_data, check_shares, split_for_search
from dcp_nas.operations import Bits
from dcp_nas.search import NETWORKS, endless
from dcp_nas.supernet import Supernet
from dcp_nas.tangent_propagation import (
    child_gradient,
    child_likelihood,
    chunk_gradients,
    discrepancy,
    discrepancy_gradient,
    empirical_fisher_vector,
    flatten,
    parent_tangent,
    unflatten,
)

STEPPED = ("exact", "ggn", "random")
COMPARED = ("ggn", "fisher_empirical", "ggn_diag", "ggn_rank1", "random")


def warm_up(search: ChildParentSearch, batches: tuple) -> None:
    """All phases of a search."""
    for phase in range(len(search.phases())):
        search.begin(phase)
        pairs = zip(endless(batches[0], phase), endless(batches[1], phase), strict=False)
        for _, (train, val) in zip(range(search.steps(phase)), pairs, strict=False):
            search.step(phase, train, val)
        search.end(phase)


def likelihood_gradient(net: Supernet, images: Tensor, target: Tensor, alphas) -> Tensor:
    """g (K,) of one batch."""
    likelihood = child_likelihood(net(images, alphas), target).mean()
    return flatten(torch.autograd.grad(likelihood, list(alphas)))


def moved(alphas, direction: Tensor, length: float):
    """alpha after a step of Euclidean `length` along `direction` (K,)."""
    step = unflatten(direction * (length / direction.norm().clamp_min(1e-30)), alphas)
    return tuple((a.detach() + s).requires_grad_() for a, s in zip(alphas, step, strict=True))


def examine(
    search: ChildParentSearch, batches: list, lengths: list[float], chunks: int, lam: float, seed: int
) -> dict[str, float]:
    """The metrics of one snapshot: per rule and length the share of batches on which D falls and the mean log(D after / before),
    the cosine of every rule's term with the exact one, and the size of the term beside g at `lam`."""
    net, alphas = search.nets["child"], search.arch["child"].alphas
    parent, parent_alphas = search.nets["parent"], search.arch["parent"].alphas
    t = torch.stack([parent_tangent(parent(x, parent_alphas), y, parent_alphas) for x, y in batches]).mean(0)
    generator = torch.Generator().manual_seed(stream(seed, 9))
    found: dict[str, list[float]] = {}

    def add(key: str, value: float) -> None:
        found.setdefault(key, []).append(value)

    for images, _ in batches:
        target = search.target(images)
        rules = {
            rule: child_gradient(lambda a, x=images: net(x, tuple(a)), alphas, target, t, lam=lam, hessian=rule)
            for rule in ("exact", "ggn")
        }
        g, d = rules["exact"]["g"], discrepancy_gradient(rules["exact"]["g"], t)
        rows = chunk_gradients(child_likelihood(net(images, alphas), target), alphas, chunks)
        size = len(images) // chunks
        terms = {rule: r["tangent_term"] for rule, r in rules.items()} | {
            "fisher_empirical": -lam * empirical_fisher_vector(rows, d, chunk_size=size),
            "ggn_diag": -lam * empirical_fisher_vector(rows, d, chunk_size=size, diagonal=True),
            "ggn_rank1": -lam * g * (g @ d),
            "random": torch.randn(len(g), generator=generator).to(g),
        }
        before = discrepancy(g, t).item()
        for rule in STEPPED:
            # The control goes along a random direction and against it, which halves its noise.
            for direction in (-terms[rule],) if rule != "random" else (-terms[rule], terms[rule]):
                for k, length in enumerate(lengths):
                    g_after = likelihood_gradient(net, images, target, moved(alphas, direction, length))
                    after = discrepancy(g_after, t).item()
                    add(f"success_{rule}_{k}", float(after < before))
                    add(f"change_{rule}_{k}", math.log(after / before))
        for rule in COMPARED:
            add(f"cosine_{rule}", torch.cosine_similarity(terms[rule], terms["exact"], dim=0).item())
        for rule in ("exact", "ggn"):
            add(f"tangent_ratio_{rule}", (terms[rule].norm() / g.norm()).item())
        add("gradient_cosine", torch.cosine_similarity(g, t, dim=0).item())
    means = {key: sum(values) / len(values) for key, values in found.items()}
    for k in range(len(lengths)):  # against the control, of the same run
        for rule in ("exact", "ggn"):
            means[f"gain_{rule}_{k}"] = means[f"success_{rule}_{k}"] - means[f"success_random_{k}"]
    return means


def check(cfg: DictConfig) -> None:
    """ValueError for what cannot be examined, before data is read. chunks, lengths: of mechanism.py only."""
    if cfg.network not in NETWORKS:
        raise ValueError(f"network={cfg.network!r}, allowed: {', '.join(NETWORKS)}")
    if cfg.batches < 1 or min(cfg.search.rounds, cfg.search.steps) < 1:
        raise ValueError(
            f"batches={cfg.batches}, search.rounds={cfg.search.rounds}, search.steps={cfg.search.steps}: all must be >= 1"
        )
    if "chunks" in cfg and (cfg.chunks < 1 or cfg.search.batch_size % cfg.chunks):
        raise ValueError(f"chunks={cfg.chunks} must divide search.batch_size={cfg.search.batch_size}")
    if "lengths" in cfg and (not cfg.lengths or min(cfg.lengths) <= 0 or cfg.lam <= 0):
        raise ValueError(f"lengths={list(cfg.lengths)}, lam={cfg.lam}: all must be positive")
    check_shares(cfg.search.shares)
    check_data(**cfg.data)


def build(cfg: DictConfig) -> tuple[ChildParentSearch, tuple, list]:
    """(search after its warm-up, its batches, the validation batches to look at)."""
    data = build_data(seed=cfg.seed, **cfg.data)
    parts = split_for_search(data, cfg.search.shares, seed=cfg.seed)
    plans = [Plan(len(p), cfg.search.batch_size, seed=stream(cfg.seed, 2, k)) for k, p in enumerate(parts)]
    batches = tuple(p.batches(plan, torch.device("cpu")) for p, plan in zip(parts, plans, strict=True))
    torch.manual_seed(stream(cfg.seed))
    nets = [
        Supernet(
            num_classes=data.classes,
            in_channels=data.channels,
            bits=Bits(**NETWORKS[n], affine=False),
            **cfg.model,
        )
        for n in ("real", cfg.network)
    ]
    search = ChildParentSearch(
        *nets, generator=torch.Generator().manual_seed(stream(cfg.seed, 1)), rounds=cfg.search.rounds, steps=cfg.search.steps,
        w=cfg.w, alpha=cfg.alpha, lam=0.0,
    )  # fmt: skip
    warm_up(search, batches)
    seen = [pair for _, pair in zip(range(cfg.batches), endless(batches[1], 999), strict=False)]
    return search, batches, seen
