"""Adaptive fusion of task-specific parameters, and the step toward them (Reptile's outer step).

    phi_f = sum_k w_k phi_k,   w_k = u_k / sum_j u_j,   u_k = d_k^2 + 0.85,   d_k = |phi_k - phi_b|_1     per tensor
    phi  <- alpha phi_f + (1 - alpha) phi_b,   alpha = exp(-beta t / K)

A task whose inner updates moved a tensor further gets more weight in it. d is a sum, so it grows with the tensor: for a
large one 0.85 is irrelevant and the hardest task takes nearly all the weight, for a small one the mean is plain.
In the released code the phi_k share the memory of the live parameters: all of them are the last state, and any weights
give that state. Here they are copies.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

WEIGHTS = ("adaptive", "mean")
DISTANCES = ("l1_sum", "l1_mean", "cosine")


def step_size(task: int, total: int | None, *, beta: float = 1.0) -> float:
    """alpha = exp(-beta task / total): 1 for the first task, smaller for later ones.

    task: t = 0, 1, ...; total: K, the number of tasks of the stream, or None for an open stream, where t + 1 stands in
    for it (with a warning: alpha then falls to exp(-beta) at once). ValueError unless 0 <= task < total and beta >= 0."""
    if task < 0 or (total is not None and task >= total) or beta < 0:
        raise ValueError(f"task={task}, total={total}, beta={beta}, allowed: 0 <= task < total (or None), beta >= 0")
    if total is None:
        warnings.warn("the number of tasks is unknown: alpha = exp(-beta t / (t + 1))", stacklevel=2)
        total = task + 1
    return math.exp(-beta * task / total)


def update_distance(base: Tensor, updated: Tensor, *, distance: str = "l1_sum") -> Tensor:
    """d >= 0, a scalar, between a tensor and its update: l1_sum | l1_mean (per element) | cosine (1 - cosine, 0..2)."""
    if distance == "l1_sum":
        return (updated - base).abs().sum()
    if distance == "l1_mean":
        return (updated - base).abs().mean()
    if distance == "cosine":
        return (1 - torch.cosine_similarity(base.flatten(), updated.flatten(), dim=0)).clamp(min=0)
    raise ValueError(f"distance={distance!r}, allowed: {', '.join(DISTANCES)}")


def fusion_weights(distances: Tensor, *, constant: float = 0.85) -> Tensor:
    """w (K,) from d (K,): (d^2 + constant) / sum; non-negative, they add up to 1."""
    u = distances**2 + constant
    return u / u.sum()


class OnlineFusion:
    """The weighted mean while the tasks come by: one running mean per tensor, whatever their number.

    mean <- mean + u_k / (u_1 + ... + u_k) (phi_k - mean). With one task this is phi_1 bit for bit.
    base: the tensors phi_b that distances refer to. ValueError for bad options.
    """

    def __init__(
        self, base: Sequence[Tensor], *, weights: str = "adaptive", distance: str = "l1_sum", constant: float = 0.85
    ):
        if weights not in WEIGHTS or distance not in DISTANCES:
            allowed = f"weights: {', '.join(WEIGHTS)}; distance: {', '.join(DISTANCES)}"
            raise ValueError(f"weights={weights!r}, distance={distance!r}, allowed are {allowed}")
        if constant <= 0:
            raise ValueError(f"constant={constant}, allowed: > 0 (a tensor that no task moved needs a weight)")
        self.base, self.weights, self.distance, self.constant = list(base), weights, distance, constant
        self.mean: list[Tensor] = []
        self.total: list[Tensor] = []
        self.shares: list[Tensor] = []  # u of every task, (tensors,)

    @torch.no_grad()
    def add(self, tensors: Iterable[Tensor]) -> None:
        """Take in the parameters of one more task (copied, so they may change afterwards)."""
        tensors = list(tensors)
        if [t.shape for t in tensors] != [b.shape for b in self.base]:
            raise ValueError("the tensors of a task must have the shapes of the base, in its order")
        u = [self._weight(b, t) for b, t in zip(self.base, tensors, strict=True)]
        self.shares.append(torch.stack(u).float() if u else torch.ones(1))
        if not self.mean:
            self.mean, self.total = [t.clone() for t in tensors], u
            return
        self.total = [a + b for a, b in zip(self.total, u, strict=True)]
        for mean, t, share, total in zip(self.mean, tensors, u, self.total, strict=True):
            mean.lerp_(t, (share / total).to(mean.dtype))

    def _weight(self, base: Tensor, updated: Tensor) -> Tensor:
        dtype = torch.promote_types(base.dtype, torch.float32)  # halves would overflow in d^2
        if self.weights == "mean":
            return torch.ones((), dtype=dtype, device=base.device)
        return update_distance(base.to(dtype), updated.to(dtype), distance=self.distance) ** 2 + self.constant

    def spread(self) -> Tensor:
        """How far the weights are from the plain mean, 0..1: the largest |w_k - 1/K| of a tensor, mean over tensors."""
        if len(self.shares) < 2:
            return torch.zeros(())
        w = torch.stack(self.shares)
        return (w / w.sum(0) - 1 / len(w)).abs().amax(0).mean()

    @torch.no_grad()
    def result(self, alpha: float) -> list[Tensor]:
        """alpha phi_f + (1 - alpha) phi_b; phi_b itself if no task was added."""
        if not self.mean:
            return [b.clone() for b in self.base]
        return [b.lerp(m, alpha) for b, m in zip(self.base, self.mean, strict=True)]


def fuse(
    base_state: Mapping[str, Tensor],
    task_states: Iterable[Mapping[str, Tensor]],
    alpha: float,
    weights: str = "adaptive",
    *,
    distance: str = "l1_sum",
    constant: float = 0.85,
) -> dict[str, Tensor]:
    """alpha sum_k w_k task_states[k] + (1 - alpha) base_state, for every floating-point entry.

    Works on the state dicts of any module; the states may come from a generator. Other entries (counters) are those of
    the last task. Pass dict(model.named_parameters()) to leave running statistics out. 0 <= alpha <= 1.
    ValueError for options out of range, no task, or keys that differ."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}, allowed: 0..1")
    names = [name for name, value in base_state.items() if value.is_floating_point()]
    online = OnlineFusion([base_state[n] for n in names], weights=weights, distance=distance, constant=constant)
    last: Mapping[str, Tensor] | None = None
    for last in task_states:
        if last.keys() != base_state.keys():
            differing = sorted(set(last) ^ set(base_state))
            raise ValueError(f"task and base states have different entries: {', '.join(differing[:5])}")
        online.add(last[n] for n in names)
    if last is None:
        raise ValueError("task_states is empty, there is nothing to fuse")
    fused = dict(zip(names, online.result(alpha), strict=True))
    return {name: fused[name] if name in fused else last[name].clone() for name in base_state}
