"""What the second-order term costs: CPU time of alternating steps with the exact product, with Gauss-Newton, without."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from dcp_nas.child_parent import ChildParentSearch
from dcp_nas.tangent_propagation import child_gradient, child_likelihood, flatten, parent_tangent


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def explicit_hessian(search: ChildParentSearch, images: Tensor, target: Tensor) -> Tensor:
    """H (K, K), one double backward per row: what forming the matrix would cost."""
    net, alphas = search.nets["child"], search.arch["child"].alphas
    likelihood = child_likelihood(net(images, alphas), target).mean()
    g = flatten(torch.autograd.grad(likelihood, list(alphas), create_graph=True))
    rows = []
    for k in range(len(g)):
        unit = torch.zeros_like(g)
        unit[k] = 1.0
        rows.append(flatten(torch.autograd.grad(g, list(alphas), grad_outputs=unit, retain_graph=True)))
    return torch.stack(rows)


def measure(search: ChildParentSearch, batches: tuple, seen: list, *, repeats: int, hessian: bool) -> dict[str, float]:
    """Median CPU seconds over `repeats` alternating steps, and their ratios.

    alpha step of the Child with each rule; weight steps and the Parent's alpha step, which every search pays; the ratio of whole
    searches exact / ggn and of the alpha steps alone. hessian: also one step with the matrix formed row by row."""
    net, alphas = search.nets["child"], search.arch["child"].alphas
    images, labels = seen[0]
    train = next(iter(batches[0].epoch(1)))
    batch = (train[0][0], train[1])
    t = parent_tangent(search.nets["parent"](images, alphas), labels, alphas)
    target = search.target(images)

    def alpha_step(lam: float, rule: str) -> Callable[[], object]:
        return lambda: child_gradient(lambda a: net(images, tuple(a)), alphas, target, t, lam=lam, hessian=rule)

    calls: dict[str, Callable[[], object]] = {
        "first_order": alpha_step(0.0, "ggn"), "exact": alpha_step(5e-3, "exact"), "ggn": alpha_step(5e-3, "ggn"),
        "parent_weights": lambda: search.weight_step("parent", 0, batch),
        "child_weights": lambda: search.weight_step("child", 0, batch),
        "parent_alpha": lambda: parent_tangent(search.nets["parent"](images, alphas), labels, alphas),
    }  # fmt: skip
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(cpu_seconds(call))
    median = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    others = median["parent_weights"] + median["child_weights"] + median["parent_alpha"]
    found = {f"seconds_{name}": value for name, value in median.items()}
    found["alpha_exact_over_ggn"] = median["exact"] / median["ggn"]
    found["search_exact_over_ggn"] = (others + median["exact"]) / (others + median["ggn"])
    found["search_ggn_over_first_order"] = (others + median["ggn"]) / (others + median["first_order"])
    if hessian:
        seconds = cpu_seconds(lambda: explicit_hessian(search, images, target))
        found["seconds_explicit"] = seconds
        found["search_explicit_over_ggn"] = (others + seconds) / (others + median["ggn"])
    return found
