"""Audit any quality model: how far can its score be moved without a visible change?

    rows = audit(metric, images, higher_is_better=False)       metric: (B, 3, H, W) in 0..1 -> (B,)

Model, images and observer are yours; the attack and the control are those of the paper.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from iqa_attack.counterexamples import describe, judge
from iqa_attack.fidelity import Chebyshev
from iqa_attack.images import check_images, from_bytes, write_png
from iqa_attack.jnd import SimulatedObserver
from iqa_attack.nr_models import CallableMetric, Scored
from iqa_attack.perceptual_attack import check_gradient, perceptual_attack, quantise, scores, square_attack
from iqa_attack.photos import graded_photos
from iqa_attack.pictures import amplified_png
from iqa_attack.quality_metrics import fit_logistic, stability
from iqa_attack.random_control import draw_seeds, random_at_distance


def calibrate(metric: Callable[[Tensor], Tensor], *, size: int = 96) -> tuple[float, float]:
    """(b3, b4) of a metric without a scale of its own: a logistic fitted to graded distortions of the embedded
    photographs."""
    data = graded_photos(seed=0, size=size, crops_per_photo=4)["test"]
    raw = scores(metric, from_bytes(torch.stack(data.images)), 20)  # type: ignore[arg-type]
    return fit_logistic(raw.double(), data.mos)


def audit(
    metric: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    higher_is_better: bool,
    scale: tuple[float, float] | None = None,
    levels: Sequence[int] = (1, 2, 3, 4, 6, 8),
    steps: int = 40,
    black_box: bool = False,
    observer=None,
    out: str | Path | None = None,
    seed: int = 0,
    **attack,
) -> list[dict[str, float]]:
    """Rows {before, after, random, r, r_random, max_change, visibility} per image, scores on 0..10.

    images (S, 3, H, W) in 0..1, one size. scale: (b3, b4) of the logistic, null: `calibrate`. levels: projected
    Chebyshev candidates in gray levels. random: the score after random signs of the counterexample's size. out:
    folder for attacked images and differences. Raises VanishingGradient for a metric whose gradient is zero;
    black_box=True attacks it with random squares instead."""
    turned = CallableMetric(metric, higher_is_better=higher_is_better)
    check_images(images, 11, "the audit")
    x0 = quantise(images)
    if not black_box:
        check_gradient(turned, x0, "the metric")
    scored = Scored(turned, *(scale or calibrate(turned)))
    names = [f"image{i}" for i in range(len(x0))]
    strengths = torch.tensor(list(levels), dtype=torch.float64) / 255
    if black_box:
        made = torch.stack([square_attack(scored, x0, float(s), steps=steps, seed=seed) for s in strengths])
    else:
        seeds = draw_seeds(seed, names, 0)
        made = perceptual_attack(scored, Chebyshev(), x0, strengths, seeds=seeds, projected=True, steps=steps, **attack)
    judged = judge(scored, observer or SimulatedObserver(), x0, made, strengths[:, None].expand(-1, len(x0)), names)
    x = judged.counterexamples(x0)
    about = describe(x, x0, Chebyshev())
    noise = random_at_distance(
        Chebyshev(), x0, torch.tensor(about["distance"]).to(x0), draw_seeds(seed, names, 1), chebyshev=True
    )
    before, after, random = (scores(scored, v).tolist() for v in (x0, x, noise))
    if out is not None:
        for i, name in enumerate(names):
            write_png(Path(out) / f"{name}_attacked.png", x[i])
            write_png(Path(out) / f"{name}_difference.png", amplified_png(x[i], x0[i]))
    return [
        {
            "before": b, "after": a, "random": n, "r": stability([b], [a])[0], "r_random": stability([b], [n])[0],
            "max_change": about["max_change"][i], "visibility": about["visibility"][i],
        }
        for i, (b, a, n) in enumerate(zip(before, after, random, strict=True))
    ]  # fmt: skip
