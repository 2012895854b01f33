"""What a number of tokens costs, the budget loss, and the token counts that meet a budget.

1 MAC counts 1; only matrix products count (norms, activations, biases, heads do not), as in the paper's GMACs of DeiT.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

Form = Literal["relative", "absolute_gmacs"]


@dataclass(frozen=True)
class ViTCost:
    """MACs of a vision transformer. `tokens` may be integers (then the result is exact) or tensors (differentiable).

    dim, hidden: widths of tokens and MLP; depth: blocks; patches, prefix: tokens of each kind; stem: MACs of the patch
    embedding. extended adds the small terms that the released LV-ViT code counts (softmax, norms, GELU, biases, ...)."""

    dim: int
    hidden: int
    heads: int
    depth: int
    patches: int
    prefix: int
    stem: int
    extended: bool = False

    def attention(self, n: Any) -> Any:
        """QKV, QK^T, AV and output projection on n tokens: 4 d^2 n + 2 d n^2."""
        return 4 * self.dim**2 * n + 2 * self.dim * n * n

    def mlp(self, n: Any) -> Any:
        """Both layers of the MLP on n tokens: 2 d hidden n."""
        return 2 * self.dim * self.hidden * n

    def block(self, n: Any) -> Any:
        """F(n) of one block, n tokens with the prefix tokens included."""
        macs = self.attention(n) + self.mlp(n)
        if self.extended:  # softmax 5Hn^2, scale Hn^2, output bias, residuals, norms, GELU, MLP biases
            macs += 6 * self.heads * n * n + (1 + 2 + 10 + 1) * self.dim * n + (8 + 1) * self.hidden * n
        return macs

    def total(self, tokens: Sequence[Any]) -> Any:
        """Stem and blocks; tokens: the number that each block sees, prefix included. ValueError for a wrong length."""
        if len(tokens) != self.depth:
            raise ValueError(f"{len(tokens)} token counts for {self.depth} blocks")
        return self.stem + sum(self.block(n) for n in tokens)

    def staged(self, kept: Sequence[Any], locations: Sequence[int]) -> Any:
        """Cost when kept[s] patch tokens remain from block locations[s] on; numbers or (B,) tensors."""
        ends = [*locations, self.depth]
        macs = self.stem + ends[0] * self.block(self.patches + self.prefix)
        for n, start, end in zip(kept, ends, ends[1:], strict=False):
            macs = macs + (end - start) * self.block(n + self.prefix)
        return macs

    @property
    def dense(self) -> int:
        """Nothing dropped."""
        return self.total([self.patches + self.prefix] * self.depth)

    @property
    def dense_without_prefix(self) -> int:
        """The F_full of the released code, which forgets the class token: 4.57364 G for DeiT-S, not 4.5985 G."""
        return self.total([self.patches] * self.depth)

    def floor(self, locations: Sequence[int]) -> float:
        """The least cost relative to dense: no patch token survives the first location."""
        return self.staged([0] * len(locations), locations) / self.dense


def budget_loss(macs: Tensor, cost: ViTCost, target: float, *, form: Form = "relative", mean: Tensor | None = None):
    """L_budget. macs: (B,) per image, differentiable; target: t in (0, 1].

    relative [paper]: |mean F / F_dense - t|; absolute_gmacs [code]: |mean F - t F_full| in GMACs, which acts F_full times
    stronger (4.57 for DeiT-S) and whose F_full leaves the class token out. mean: the mean over all devices; given, its
    sign decides while the gradient stays local, which is the gradient of |mean over devices| once DDP has averaged.
    Raises ValueError for another form or target."""
    check_budget(target)
    if form not in ("relative", "absolute_gmacs"):
        raise ValueError(f"budget.form={form!r}, allowed: relative, absolute_gmacs")
    average = macs.mean()
    if mean is not None:
        average = average + (mean - average).detach()
    if form == "relative":
        return (average / cost.dense - target).abs()
    return (average - target * cost.dense_without_prefix).abs() / 1e9


def check_budget(target: float, *, floor: float = 0.0) -> float:
    """The budget t, checked: in (0, 1] and not below what the first blocks cost anyway. ValueError says which."""
    if not 0 < target <= 1:
        raise ValueError(f"budget {target} must be in (0, 1], the cost relative to the dense model")
    if target < floor:
        raise ValueError(
            f"budget {target} is below the floor {floor:.4f}: that much is spent before the first location and on the "
            "prefix tokens. Raise the budget or drop tokens earlier"
        )
    return target


def bisect(cost_of: Callable[[float], float], target: float, low: float, high: float, *, steps: int = 60) -> float:
    """The largest x in [low, high] (to within halvings) whose non-decreasing cost is at most `target`."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if cost_of(middle) <= target else (low, middle)
    return low


def keep_counts(cost: ViTCost, locations: Sequence[int], target: float, *, extra: int = 0) -> list[int]:
    """Patch tokens per stage n rho, n rho^2, ... with the keep rate rho that costs `target` of dense, see `round_counts`.

    extra: tokens that come on top in every stage (EViT's fused one)."""
    check_budget(target, floor=cost.floor(locations))

    def at(rho: float) -> list[float]:
        return [cost.patches * rho ** (s + 1) for s in range(len(locations))]

    rho = bisect(lambda r: _relative(cost, locations, at(r), extra), target, 0.0, 1.0)
    return round_counts(cost, locations, at(rho), target, extra=extra)


def round_counts(
    cost: ViTCost,
    locations: Sequence[int],
    counts: Sequence[float],
    target: float,
    *,
    extra: int = 0,
    at_least: bool = False,
) -> list[int]:
    """Whole, non-increasing counts per stage near `counts`, the nearest in cost to `target` (relative to dense): the floors
    are raised one token at a time, where most is missing, and the best of these is taken.

    at_least: the first of these that costs no less than the target, so that a control is never the cheaper one."""
    whole = [min(int(c), cost.patches) for c in counts]
    tried = [list(whole)]
    while _relative(cost, locations, whole, extra) < target:
        room = [s for s in range(len(whole)) if whole[s] < (whole[s - 1] if s else cost.patches)]
        if not room:
            break
        whole[max(room, key=lambda s: counts[s] - whole[s])] += 1
        tried.append(list(whole))
    return whole if at_least else min(tried, key=lambda c: abs(_relative(cost, locations, c, extra) - target))


def _relative(cost: ViTCost, locations: Sequence[int], counts: Sequence[float], extra: int) -> float:
    return cost.staged([c + extra for c in counts], locations) / cost.dense
