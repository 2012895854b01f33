"""Audit any quality model: how far can its score be moved without a visible change, and is that more than noise does?

python audit.py model=my_module:my_metric images=photos/ higher_is_better=false       any callable: (B, 3, H, W) in 0..1 -> (B,)
python audit.py model=metric.onnx images=photos/ fidelity=ssim                        an ONNX file, as a black box
python audit.py model=pyiqa:musiq images=photos/                                      needs the extra iqa
python audit.py model=brisque weights=runs/default/all/seed0/last.ckpt images=photos/

    rows = audit(metric, images, higher_is_better=False)       the same from Python

Writes a page (index.html) with original, attacked image and difference, a table, and R with its interval; goes on where it
stopped.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor

from common import runs
from common.data.files import Table, find_images, identity, output_names
from common.scripts import script
from iqa_attack.checkpoint import load
from iqa_attack.counterexamples import describe, judge
from iqa_attack.fidelities.distances import build_fr
from iqa_attack.jnd import SimulatedObserver
from iqa_attack.perceptual_attack import (
    VanishingGradient,
    check_gradient,
    grid,
    perceptual_attack,
    quantise,
    scores,
    square_attack,
)
from iqa_attack.photographs.images import check_images, read_image, write_png
from iqa_attack.quality_metrics import stability, stability_interval
from iqa_attack.quality_models.calibration import Scored, calibrate, check_calibration
from iqa_attack.quality_models.models import CallableMetric, load_any
from iqa_attack.random_control import draw_seeds, random_at_distance
from iqa_attack.study.page import write_page
from iqa_attack.study.pictures import amplified_png

PIXELS = 2**21  # in one pass: candidates of a large photograph are attacked one after the other


def has_gradient(score: Callable[[Tensor], Tensor], x0: Tensor) -> bool:
    """Whether the score of some image reacts to its pixels; a model that leaves torch on its way does not."""
    try:
        check_gradient(score, x0, "the metric")
    except (VanishingGradient, RuntimeError):
        return False
    return True


def attacked(
    scored: Scored, distance, x0: Tensor, strengths: Sequence[float], *, projected: bool, steps: int, seeds: list[int],
    black_box: bool, seed: int, **options,
) -> Tensor:  # fmt: skip
    """Candidates (K, S, 3, H, W); black_box: random squares of these gray levels, whatever the distance."""
    values = torch.tensor(list(strengths), dtype=torch.float64)
    if black_box:
        return torch.stack([square_attack(scored, x0, float(s) / 255, steps=steps, seed=seed) for s in values])
    values = values / 255 if projected else values
    return perceptual_attack(scored, distance, x0, values, seeds=seeds, projected=projected, steps=steps, **options)


def audit(
    metric: Callable[[Tensor], Tensor], images: Tensor, *, higher_is_better: bool, scale: tuple[float, float] | None = None,
    names: Sequence[str] | None = None, **options,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows {image, before, after, random, r, r_random, raw_before, ..., visibility, max_change, gradient} per image; before,
    after and random on 0..10, raw_ on the metric's own scale.

    images (S, 3, H, W) in 0..1, one size. scale: (b3, b4) of the logistic, null: `calibrate`, which refuses a wrong sign.
    random: the score after a random perturbation at the counterexample's distance. options: see `audit_scored`."""
    check_images(images, 11, "the audit")
    turned, (b3, b4) = CallableMetric(metric, higher_is_better=higher_is_better), scale or (None, None)
    scored = Scored(turned, calibrate(turned, "the metric", b3=b3, b4=b4, device=images.device)).eval()
    return audit_scored(scored, images, names=names or [f"image{i}" for i in range(len(images))], **options)


def audit_scored(
    scored: Scored, images: Tensor, *, names: Sequence[str], fidelity: str = "chebyshev", vgg16: str | None = None,
    strengths: Sequence[float] | None = None, steps: int = 40, black_box: bool | None = None, observer=None,
    out: str | Path | None = None, seed: int = 0, chunk: int | None = None, **options,
) -> list[dict[str, Any]]:  # fmt: skip
    """`audit` of a calibrated model. fidelity: chebyshev (projected), ssim, ms_ssim, lpips, dists (the last two with vgg16, a
    file). strengths: gray levels or values of lambda, null: the short grid. black_box: null takes random squares where the
    gradient vanishes; False raises VanishingGradient there. out: folder for images. chunk: candidates in one pass, null: about
    two million pixels. options: of `perceptual_attack`."""
    chunk = chunk or max(1, PIXELS // images[0, 0].numel())
    distance = build_fr(kind=fidelity, **({"weights_path": vgg16} if vgg16 else {})).to(images.device)
    x0, chebyshev = quantise(images), fidelity == "chebyshev"
    check_images(x0, max(scored.minimum, distance.minimum), "the audit")  # type: ignore[type-var]
    if black_box is None:
        black_box = not has_gradient(scored.model, x0)
    elif not black_box:
        check_gradient(scored.model, x0, "the metric")
    levels = grid("sign", kind=fidelity, projected=chebyshev or black_box, lambda_on="fidelity")
    made = attacked(
        scored, distance, x0, strengths or levels, projected=chebyshev, steps=steps, seeds=draw_seeds(seed, names, 0),
        black_box=black_box, seed=seed, chunk=chunk, **options,
    )  # fmt: skip
    table = torch.zeros(len(made), len(x0), dtype=torch.float64)
    watching = observer or SimulatedObserver()
    x = judge(scored, watching, x0, made, table, names, chunk=chunk).counterexamples(x0)
    about = describe(x, x0, distance)
    target = torch.tensor(about["distance"]).to(x0)
    noise = random_at_distance(distance, x0, target, draw_seeds(seed, names, 1), chebyshev=chebyshev)
    if out is not None:
        for i, name in enumerate(names):
            for what, image in (("original", x0[i]), ("attacked", x[i]), ("difference", amplified_png(x[i], x0[i]))):
                write_png(Path(out) / "images" / f"{name}_{what}.png", image)
    raw = {when: scores(scored.model, v, chunk) for when, v in (("before", x0), ("after", x), ("random", noise))}
    found = rows_of(scored, names, raw, {k: about[k] for k in ("distance", "visibility", "max_change")})
    return [{**row, "gradient": "none: random squares" if black_box else "exact"} for row in found]


def rows_of(
    scored: Scored, names: Sequence[str], raw: dict[str, Tensor], about: dict[str, list[float]]
) -> list[dict[str, Any]]:
    """A row per image from raw scores before, after and under noise."""
    mapped = {when: scored.scale(v).tolist() for when, v in raw.items()}
    rows = []
    for i, name in enumerate(names):
        b, a, n = (mapped[when][i] for when in ("before", "after", "random"))
        row = {"image": name, "before": b, "after": a, "random": n}
        row |= {"r": stability([b], [a])[0], "r_random": stability([b], [n])[0]}
        rows.append(row | {f"raw_{w}": float(v[i]) for w, v in raw.items()} | {k: v[i] for k, v in about.items()})
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """R of the attack and of the control over images, each with a 95 % t interval, and the mean change of the score."""
    found: dict[str, float] = {"images": len(rows)}
    for key in ("after", "random"):
        before, now = [r["before"] for r in rows], [r[key] for r in rows]
        r, low, high = stability_interval(before, now)
        name = "r" if key == "after" else "r_random"
        found |= {name: r, f"{name}_low": low, f"{name}_high": high}
        found[f"change_{key}"] = sum(abs(b - a) for b, a in zip(before, now, strict=True)) / len(rows)
    return found


# -------------------------------------------------------------------------------------------------------- the script
def check(cfg: DictConfig) -> None:
    """What can be told before anything is loaded."""
    if cfg.steps < 1:
        raise ValueError(f"steps={cfg.steps}, allowed: >= 1")
    if not isinstance(cfg.black_box, bool | None):
        raise ValueError(f"black_box={cfg.black_box}, allowed: true, false, null")
    build_fr(kind=cfg.fidelity, **({} if cfg.vgg16 is None else {"weights_path": cfg.vgg16}))
    if cfg.strengths is not None and (not cfg.strengths or min(cfg.strengths) <= 0):
        raise ValueError(f"strengths={cfg.strengths}: a list of numbers > 0, or null for the default ones")
    if cfg.strengths is not None and cfg.fidelity == "chebyshev" and max(cfg.strengths) > 255:
        raise ValueError(f"strengths={cfg.strengths}: gray levels of the largest change, 0..255")


def load_model(cfg: DictConfig, fabric: Fabric) -> Scored:
    """The model of cfg.model with its calibration."""
    if cfg.weights:
        models = load(cfg.weights).model
        if cfg.model not in models:  # type: ignore[operator]
            raise ValueError(f"model={cfg.model}, {cfg.weights} holds {', '.join(models)}")  # type: ignore[arg-type]
        found = models[cfg.model].to(fabric.device)  # type: ignore[index]
        check_calibration(cfg.model, found.calibration, cfg.calibration_floor)
        return found
    model = load_any(str(cfg.model), higher_is_better=cfg.higher_is_better).to(fabric.device)
    found = calibrate(model, str(cfg.model), b3=cfg.b3, b4=cfg.b4, floor=cfg.calibration_floor, device=fabric.device)
    return Scored(model, found).eval()


def run_audit(cfg: DictConfig, fabric: Fabric) -> dict[str, float]:
    """Audits every image of cfg.images into cfg.out; returns the summary."""
    check(cfg)
    paths = find_images(cfg.images)
    scored, out = load_model(cfg, fabric), Path(cfg.out).expanduser()
    print(f"{cfg.model}: {scored.calibration}")
    calibration = [round(v, 6) if isinstance(v, float) else v for v in scored.calibration]
    run = runs.Run.open(out, cfg, fabric, data=identity("images", paths, calibration=calibration))
    if run is None:
        return runs.read_json(out / "result.json")["metrics"]
    with run:
        state = run.load_checkpoint() or {"rows": [], "left_out": [], "done": 0}
        names, todo = output_names(paths), paths[state["done"] :]
        for i, path in enumerate(todo):
            start = time.perf_counter()
            try:
                x0 = read_image(path)[None].to(fabric.device)
                if i == 0:
                    ahead = seconds_ahead(cfg, scored, x0)
                    print(
                        f"about {ahead:.0f} s for an image of {x0.shape[3]} x {x0.shape[2]} pixels, {len(todo)} images",
                        flush=True,
                    )
                state["rows"] += [{**r, "path": str(path)} for r in audit_one(cfg, scored, x0, names[path], out)]
            except ValueError as error:
                state["left_out"].append(f"{path}: {error}")
            state["done"] += 1
            seconds = time.perf_counter() - start
            run.log(image=names[path], seconds=seconds)
            run.save_checkpoint(state)
            if i == 0:
                print(
                    f"{seconds:.1f} s for the first image, about {seconds * (len(todo) - 1) / 60:.1f} min for the rest"
                )
        found = finish(cfg, state["rows"], scored, out)
        run.finish(found)
    for line in state["left_out"]:
        print(f"left out: {line}", file=sys.stderr)
    if state["left_out"]:
        print(f"error: {len(state['left_out'])} of {len(paths)} images were left out", file=sys.stderr)
        raise SystemExit(1)
    return found


def seconds_ahead(cfg: DictConfig, scored: Scored, x0: Tensor) -> float:
    """How long an image of this size will take: a pass forward and backward on the clock, times steps and strengths."""
    blind, start = bool(cfg.black_box) or not has_gradient(scored.model, x0), time.perf_counter()
    scores(scored, x0) if blind else has_gradient(scored.model, x0)
    passed, projected = time.perf_counter() - start, blind or cfg.fidelity == "chebyshev"
    levels = cfg.strengths or grid("sign", kind=cfg.fidelity, projected=projected, lambda_on="fidelity")
    return passed * cfg.steps * len(levels)


def audit_one(cfg: DictConfig, scored: Scored, x0: Tensor, name: str, out: Path) -> list[dict[str, Any]]:
    """The row of one image."""
    if min(x0.shape[2:]) < scored.minimum:
        raise ValueError(f"{x0.shape[3]} x {x0.shape[2]} pixels, the model needs {scored.minimum} on each side")
    return audit_scored(
        scored, x0, names=[name], fidelity=cfg.fidelity, vgg16=cfg.vgg16, steps=cfg.steps, seed=cfg.seed, out=out,
        strengths=list(cfg.strengths) if cfg.strengths else None, black_box=cfg.black_box,
    )  # fmt: skip


def finish(cfg: DictConfig, rows: list[dict[str, Any]], scored: Scored, out: Path) -> dict[str, float]:
    """The table, the page and what to say at the end. ValueError where no image could be audited."""
    if not rows:
        raise ValueError(f"no image of {cfg.images} could be audited")
    with Table(out / "audit.csv") as table:
        for row in rows:
            table.write(row)
    found = summary(rows)
    write_page(
        out / "index.html", rows, found, model=str(cfg.model), fidelity=cfg.fidelity, calibration=scored.calibration
    )
    interval = "" if len(rows) < 2 else f" [{found['r_low']:.2f}, {found['r_high']:.2f}]"
    noise = f"{found['r_random']:.2f} under noise at the same distance"
    print(f"R {found['r']:.2f}{interval} under the attack, {noise}: {out / 'index.html'}")
    if any(r["gradient"] != "exact" for r in rows):
        print(
            "the model has no gradient: attacked with random squares, a weaker attack. A large R here is not robustness"
        )
    return found


main = script("audit", run_audit)


if __name__ == "__main__":
    main()
