"""The perceptual attack: change the prediction as much as possible while a full-reference distance stays small.

    x* = argmax  (s(x) - c)^2 - lambda D(x, x0)
    lambda_on="fidelity":     J = disc - lambda D      (the lambda of the released code)
    lambda_on="discrepancy":  J = lambda disc - D      (the paper's Eq. 2)

Both have the same maximiser for lambda and 1/lambda. `s` maps images (B, 3, H, W) in 0..1 to scores (B,) in 0..10.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from common.data.batches import stream

Score = Callable[[Tensor], Tensor]
Distance = Callable[[Tensor, Tensor], Tensor]

STEP_RULES = ("sign", "l2", "adam", "adam_restart")
DIRECTIONS = ("square", "up", "down", "both")
# lambda of the released code, on the fidelity; 0 is "enhancement": no fidelity at all
CODE_LAMBDAS = (
    0, 0.2, 0.4, 0.6, 0.8, 1, 3, 5, 7, 9, 20, 40, 60, 80, 100, 300, 500, 700, 900, 2e3, 4e3, 6e3, 8e3, 1e4, 3e4, 5e4, 7e4, 9e4,
    2e5, 6e5, 1e6, 5e6, 9e6,
)  # fmt: skip
SHORT_LAMBDAS = (
    30,
    100,
    300,
    1000,
    3000,
    10000,
    30000,
    100000,
)  # ours: candidates on both sides of the threshold of visibility
LAGRANGIAN_LAMBDAS = (0.1, 1, 10, 100, 1000)  # ours: of Chebyshev without projection, where lambda restrains little
SHORT_LEVELS, LEVELS = (
    (1, 2, 3, 4, 5, 6, 8, 10),
    tuple(range(1, 33)),
)  # gray levels; 1..32 as the released driver most likely
# A recipe and its start noise; `grid` has its candidates. Sign steps take the place of l2 steps for Chebyshev.
PRESETS = {
    "official": {"step_rule": "adam_restart", "gamma": 5e-3, "lambda_on": "fidelity", "steps": 200, "noise": "ternary"},
    "paper": {
        "step_rule": "l2", "l2_scale": "rms", "gamma": 1e-3, "lambda_on": "discrepancy", "steps": 200, "noise": "ternary",
    },
    "paper_chebyshev": {"step_rule": "sign", "gamma": 1e-3, "lambda_on": "discrepancy", "steps": 200, "noise": "ternary"},
    "paper_literal": {
        "step_rule": "l2", "l2_scale": "none", "gamma": 1e-3, "lambda_on": "discrepancy", "steps": 200, "noise": "ternary",
    },
    "sign": {"step_rule": "sign", "gamma": 1e-3, "lambda_on": "fidelity", "steps": 40, "noise": "ternary"},
}  # fmt: skip


def grid(preset: str | None, *, kind: str, projected: bool, lambda_on: str) -> tuple[float, ...]:
    """The strengths of the candidates of a preset, mildest or weakest restraint first: gray levels where the distance `kind` is
    projected, else values of lambda in the convention of lambda_on (the grids are those of the fidelity; on the discrepancy
    they are the reciprocals).

    sign has short grids, every other preset the 32 candidates of the paper."""
    short = preset == "sign"
    if projected:
        return SHORT_LEVELS if short else LEVELS
    values = LAGRANGIAN_LAMBDAS if kind == "chebyshev" and short else SHORT_LAMBDAS if short else CODE_LAMBDAS[1:]
    return tuple(float(v) for v in values) if lambda_on == "fidelity" else tuple(1 / v for v in values)


class VanishingGradient(ValueError):
    """The gradient of a score is zero on every image tried: rounding, uint8 or an argmin inside it, not robustness."""


def quantise(x: Tensor) -> Tensor:
    """To the 8-bit lattice k/255 in 0..1. Idempotent."""
    return (x.clamp(0, 1) * 255).round() / 255


def start_noise(shape: Sequence[int], seeds: Sequence[int], kind: str) -> Tensor:
    """(B, 3, H, W) of gray levels / 255, image b drawn from seeds[b]. kind: ternary (-1, 0, 1) or official (-1, 0)."""
    if kind not in ("ternary", "official", "none"):
        raise ValueError(f"noise={kind!r}, allowed: ternary, official, none")
    if kind == "none":
        return torch.zeros(tuple(shape))
    high = 2 if kind == "ternary" else 1
    draws = [torch.randint(-1, high, tuple(shape[1:]), generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(draws) / 255


def discrepancy(s: Tensor, c: Tensor, direction: str) -> Tensor:
    """(s - c)^2, or the signed surrogates +(s - c) for up and -(s - c) for down."""
    if direction == "square":
        return (s - c) ** 2
    return s - c if direction == "up" else c - s


def objective(disc: Tensor, d: Tensor, lam: Tensor, lambda_on: str) -> Tensor:
    """J per image, see the head of the file."""
    if lambda_on not in ("fidelity", "discrepancy"):
        raise ValueError(f"lambda_on={lambda_on!r}, allowed: fidelity, discrepancy")
    return disc - lam * d if lambda_on == "fidelity" else lam * disc - d


def unit_l2(g: Tensor) -> Tensor:
    """g (B, ...) with ||g||_2 = 1 per image; a zero gradient stays zero."""
    norm = g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return g / norm.clamp(min=1e-30)


class Step:
    """One ascent step: `Step(...)(g)` -> the change of x. gamma is a length in the rule's norm.

    sign: gamma sign(g). l2: gamma g/||g||_2, with l2_scale="rms" times sqrt(3HW), so that gamma is the RMS change of
    a pixel. adam: Adam. adam_restart: the released code, whose optimiser begins anew in every step: nearly gamma
    sign(g)."""

    def __init__(self, rule: str, gamma: float | Tensor, l2_scale: str = "none"):
        if rule not in STEP_RULES or l2_scale not in ("none", "rms"):
            raise ValueError(f"step_rule={rule!r}, l2_scale={l2_scale!r}, allowed: {', '.join(STEP_RULES)}; none, rms")
        self.rule, self.gamma, self.l2_scale = rule, gamma, l2_scale
        self.t, self.m, self.v = 0, torch.zeros(()), torch.zeros(())

    def __call__(self, g: Tensor) -> Tensor:
        if self.rule == "sign":
            return self.gamma * g.sign()
        u = unit_l2(g)
        if self.rule == "l2":
            return self.gamma * u * (g[0].numel() ** 0.5 if self.l2_scale == "rms" else 1.0)
        if self.rule == "adam_restart":
            return self.gamma * u / (u.abs() + 1e-8)
        self.t += 1
        self.m, self.v = 0.9 * self.m + 0.1 * u, 0.999 * self.v + 0.001 * u**2
        mean, square = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
        return self.gamma * mean / (square.sqrt() + 1e-8)


def autograd_gradient(value: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Gradient of sum(value(x)); the images of a batch do not depend on each other."""
    x = x.detach().requires_grad_()
    total = value(x).sum()
    if not total.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(total, x)[0]


def attack_batch(
    score: Score,
    distance: Distance,
    x0: Tensor,
    lam: Tensor,
    start: Tensor,
    *,
    steps: int,
    gamma: float | Tensor,
    step_rule: str,
    lambda_on: str,
    direction: str,
    l2_scale: str = "none",
    eps: Tensor | None = None,
    target: Tensor | None = None,
    border: int = 0,
    quantised: str = "end",
    gradient: Callable = autograd_gradient,
    each_step: Callable[[], None] | None = None,
) -> Tensor:
    """`steps` steps for a batch of independent problems; returns images on the 8-bit lattice.

    x0, start: (B, 3, H, W); lam (B,); eps (B,): largest change per value (projection), or None; target (B,): c of the
    objective, default s(x0). border: pixels at the edge that are left alone. quantised: "every_step" shows the
    objective the rounded image (straight through), "end" rounds once. each_step is called before every gradient (new
    random patches)."""
    if quantised not in ("end", "every_step"):
        raise ValueError(f"quantised={quantised!r}, allowed: end, every_step")
    with torch.no_grad():
        c = score(x0) if target is None else target
    bound = None if eps is None else eps.view(-1, 1, 1, 1)
    inside = torch.ones_like(x0[:1, :1])
    if border:
        inside[..., :border, :] = inside[..., -border:, :] = inside[..., :border] = inside[..., -border:] = 0

    def project(x: Tensor) -> Tensor:
        if bound is not None:
            x = torch.minimum(torch.maximum(x, x0 - bound), x0 + bound)
        return x.clamp(0, 1)

    def value(x: Tensor) -> Tensor:
        if quantised == "every_step":
            x = x + (quantise(x) - x).detach()
        disc = discrepancy(score(x), c, direction)
        return disc if bound is not None else objective(disc, distance(x, x0), lam, lambda_on)

    step, x = Step(step_rule, gamma, l2_scale), project(x0 + start * inside)
    for _ in range(steps):
        if each_step:
            each_step()
        g = gradient(value, x).nan_to_num(0.0, 0.0, 0.0)  # as the released code: a NaN does not move a pixel
        x = project(x + step(g * inside))
    return quantise(x)


def perceptual_attack(
    score: Score, distance: Distance, images: Tensor, strengths: Tensor, *, seeds: Sequence[int], projected: bool = False,
    steps: int = 200, gamma: float = 1e-3, step_rule: str = "sign", lambda_on: str = "fidelity", direction: str = "square",
    noise: str = "ternary", chunk: int = 64, progress: Callable = iter, target: Tensor | None = None, **options,
) -> Tensor:  # fmt: skip
    """Candidates (K, S, 3, H, W) on the 8-bit lattice for images (S, 3, H, W) and strengths (K,) or (K, S).

    strengths: values of lambda, or with `projected` of eps (then the step is 1.5 eps / steps, the projected recipe of
    the released driver, and gamma is not used). seeds: one per image, for the start noise: the same for all K.
    direction "both" runs up and down and keeps, candidate by candidate, the larger change of the score after
    rounding. chunk: images per backward pass. The result does not depend on which images are attacked together (up to
    rounding of floating-point sums)."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r}, allowed: {', '.join(DIRECTIONS)}")
    if len(seeds) != len(images):
        raise ValueError(f"{len(seeds)} seeds for {len(images)} images")
    if direction == "both":
        call = partial(
            perceptual_attack, score, distance, images, strengths, seeds=seeds, projected=projected, steps=steps, gamma=gamma,
            step_rule=step_rule, lambda_on=lambda_on, noise=noise, chunk=chunk, progress=progress, target=target, **options,
        )  # fmt: skip
        up, down = call(direction="up"), call(direction="down")
        base = scores(score, images, chunk)
        rise, fall = ((scores(score, x.flatten(0, 1), chunk).view(len(x), -1) - base).abs() for x in (up, down))
        return torch.where((rise >= fall)[..., None, None, None], up, down)
    k, s = len(strengths), len(images)
    strength = strengths.to(images) if strengths.ndim == 2 else strengths.to(images)[:, None].expand(k, s)
    if strength.shape != (k, s):
        raise ValueError(f"strengths of shape {tuple(strengths.shape)}, allowed: (K,) or (K, {s})")
    flat, x0 = strength.reshape(-1), images.repeat(k, 1, 1, 1)
    start = start_noise(images.shape, seeds, noise).to(images).repeat(k, 1, 1, 1)
    c = None if target is None else target.to(images).repeat(k)
    out = []
    for i in progress(range(0, k * s, chunk)):
        part = slice(i, i + chunk)
        eps = flat[part] if projected else None
        step = gamma if eps is None else (1.5 * eps / steps).view(-1, 1, 1, 1)
        out.append(
            attack_batch(
                score, distance, x0[part], flat[part], start[part], steps=steps, gamma=step,
                step_rule="sign" if projected else step_rule, lambda_on=lambda_on, direction=direction, eps=eps,
                target=None if c is None else c[part], **options,
            )
        )  # fmt: skip
    return torch.cat(out).view(k, s, *images.shape[1:])


@torch.no_grad()
def scores(score: Score, images: Tensor, chunk: int = 64) -> Tensor:
    """score of many images (N, 3, H, W), `chunk` at a time."""
    return torch.cat([score(part) for part in images.split(chunk)])


def check_gradient(score: Score, images: Tensor, name: str) -> None:
    """Raises VanishingGradient if the score of no image reacts to its pixels: neither at the image nor beside it."""
    noise = start_noise(images.shape, range(len(images)), "ternary").to(images)
    for x in (images, (images + noise).clamp(0, 1)):
        if autograd_gradient(score, x).nan_to_num().abs().sum() > 0:
            return
    raise VanishingGradient(
        f"the gradient of {name} is zero on all {len(images)} images: something in it rounds, converts to uint8 or looks "
        f"up a table. This is not robustness. Attack it as a black box: attack=spsa or attack=square"
    )


# ------------------------------------------------------------------------------------------------------- black boxes
def spsa_gradient(samples: int = 16, delta: float = 2 / 255, seed: int = 0) -> Callable:
    """A gradient for `attack_batch` from values alone: two-sided differences along random signs (SPSA), averaged."""
    count = [0]

    @torch.no_grad()
    def gradient(value: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        count[0] += 1
        generator, total = torch.Generator().manual_seed(stream(seed, count[0])), torch.zeros_like(x)
        for _ in range(samples):
            d = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
            slope = (value(x + delta * d) - value(x - delta * d)) / (2 * delta)
            total += slope.view(-1, 1, 1, 1) * d
        return total / samples

    return gradient


@torch.no_grad()
def square_attack(score: Score, images: Tensor, eps: float, *, steps: int, seed: int, share: float = 0.1) -> Tensor:
    """Square attack on the change of the score: random squares of +-eps, kept where |s - s(x0)| grows. (S, 3, H, W),
    8 bit.

    Needs no gradient, only `steps` + 2 scores per image. share: area of the first squares; it falls as the search
    goes on."""
    generator = torch.Generator().manual_seed(seed)
    n, c, h, w = images.shape

    def signs(*shape: int) -> Tensor:
        return (torch.randint(0, 2, shape, generator=generator) * 2 - 1).to(images)

    base = score(images)
    best = quantise((images + eps * signs(n, c, 1, w)).clamp(0, 1))  # vertical stripes
    change = (score(best) - base).abs()
    for t in range(steps):
        side = max(1, round((share * (1 - t / steps) ** 2 * h * w) ** 0.5))
        side = min(side, h, w)
        trial = best.clone()
        y = torch.randint(0, h - side + 1, (n,), generator=generator)
        x = torch.randint(0, w - side + 1, (n,), generator=generator)
        values = signs(n, c, 1, 1) * eps
        for i in range(n):
            at = (i, slice(None), slice(int(y[i]), int(y[i]) + side), slice(int(x[i]), int(x[i]) + side))
            trial[at] = quantise((images[at] + values[i]).clamp(0, 1))
        found = (score(trial) - base).abs()
        better = found > change
        best[better], change = trial[better], torch.maximum(found, change)
    return best
