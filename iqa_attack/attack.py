"""Attack one quality model under one fidelity measure, judge the candidates, and score the counterexamples with every model.

python attack.py                                            BRISQUE, projected Chebyshev, the models of `python train.py`
python attack.py nr=cornia fr=ssim attack=random            the control at the distance of the attack (run that first)
python attack.py data=folder data.root=photos/              your own images: pictures and a CSV in the run directory
python attack.py data=folder data.root=photos/ weights=null +official.brisque.path=brisque_model_live.yml nr=brisque
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from common import runs
from common.data.files import Table
from common.loop import preflight
from common.scripts import script
from iqa_attack.checkpoint import fingerprint, load
from iqa_attack.counterexamples import Judged, describe, measure
from iqa_attack.fidelities.distances import build_fr
from iqa_attack.perceptual_attack import check_gradient, perceptual_attack
from iqa_attack.photographs.data import build_data, check_data_options
from iqa_attack.photographs.images import from_bytes, read_image, write_png
from iqa_attack.photographs.photos import QualitySet
from iqa_attack.procedures import (
    attack_of,
    candidates,
    check_procedure,
    control,
    distances_of,
    recipe_of,
    strengths_of,
)
from iqa_attack.quality_metrics import COMPETENT
from iqa_attack.quality_models.calibration import Scored, calibrate, check_calibration
from iqa_attack.quality_models.models import Models, load_official, pyiqa_metric
from iqa_attack.random_control import draw_seeds
from iqa_attack.study.pictures import panel


def load_models(cfg: DictConfig) -> Models:
    """The trained models of cfg.weights, the official ones and those of pyiqa, by name; every one maps to 0..10.

    Raises ValueError for an attacked model whose calibration is worse than cfg.calibration_floor, e.g. of a wrong sign."""
    models: dict[str, Scored] = {}
    if cfg.weights == "auto":
        auto = Path(cfg.run_root) / cfg.scale / cfg.train_arm / f"seed{cfg.seed}" / "last.ckpt"
        if not auto.is_file() and not cfg.official and not cfg.pyiqa:
            raise FileNotFoundError(
                f"no trained models in {auto}: run `python train.py method={cfg.train_arm} seed={cfg.seed}` first"
            )
        models |= dict(load(auto).model.items()) if auto.is_file() else {}  # type: ignore[operator]
    elif cfg.weights:
        models |= dict(load(cfg.weights).model.items())  # type: ignore[operator]
    for name, options in (cfg.official or {}).items():
        own = {"floor": cfg.calibration_floor, **{k: v for k, v in options.items() if k != "kind"}}
        models[str(name)] = load_official(str(options.get("kind", name)), **own)
    for name in cfg.pyiqa:
        metric = pyiqa_metric(name)
        models[name] = Scored(metric, calibrate(metric, f"pyiqa:{name}", floor=cfg.calibration_floor)).eval()
    if cfg.nr not in models:
        raise ValueError(f"nr={cfg.nr!r}, allowed here: {', '.join(models)}")
    check_calibration(cfg.nr, models[cfg.nr].calibration, cfg.calibration_floor)
    return Models(models).eval().requires_grad_(False)


def check_data(data: QualitySet, models: Models, distance) -> None:
    """Raises ValueError naming the image that is constant or too small for a model or the distance."""
    needs = {**{n: m.minimum for n, m in models.items()}, type(distance).__name__: distance.minimum}
    who = max(needs, key=lambda n: needs[n])
    for i in range(len(data)):
        image = data.image(i)
        if min(image.shape[1:]) < needs[who]:
            raise ValueError(
                f"{_file(data, i)} has {image.shape[2]} x {image.shape[1]} pixels, {who} needs {needs[who]} on each side"
            )
        if int(image.amin()) == int(image.amax()):
            raise ValueError(f"{_file(data, i)} is constant: natural scene statistics are not defined for it")


def _file(data: QualitySet, i: int) -> str:
    return str(data.images[i]) if isinstance(data.images[i], Path) else data.names[i]


def groups(data: QualitySet, done: int, size: int) -> list[list[int]]:
    """The images that are left, up to `size` of one shape together."""
    parts: list[list[int]] = []
    for i in range(done, len(data)):
        fits = parts and len(parts[-1]) < size and data.image(parts[-1][0]).shape == data.image(i).shape
        parts[-1].append(i) if fits else parts.append([i])
    return parts


@torch.no_grad()
def scores_of(models: Models, x: Tensor, x0: Tensor) -> list[dict[str, float]]:
    """Of every image its scores by every model before and after, on 0..10 and on the model's own scale (raw_)."""
    found: dict[str, list[float]] = {}
    for name, scored in models.items():
        for when, images in (("before", x0), ("after", x)):
            raw = scored.model(images)
            found[f"{when}_{name}"], found[f"raw_{when}_{name}"] = scored.scale(raw).tolist(), raw.tolist()
    return [{key: values[i] for key, values in found.items()} for i in range(len(x))]


def save_candidates(judged: Judged, x0: Tensor, names: list[str], out: Path) -> None:
    """PNG files for collect.py."""
    for k, s in np.ndindex(*judged.images.shape[:2]):
        write_png(out / "candidates" / names[s] / f"{k}.png", judged.images[k, s])
    for s, name in enumerate(names):
        write_png(out / "candidates" / name / "original.png", x0[s])


def attack_group(
    cfg: DictConfig,
    models: Models,
    distance,
    data: QualitySet,
    part: list[int],
    out: Path,
    distances: dict | None,
    device: torch.device,
) -> list[dict]:
    """The rows of a few images: every draw of a control, or the one counterexample, scored as read back from its PNG."""
    x0 = from_bytes(torch.stack([data.image(i) for i in part])).to(device)
    names, mos, judged = [data.names[i].replace("/", "_") for i in part], data.mos[part], None
    if distances is not None:
        sets = control(cfg, distance, x0, names, distances, out)
    else:
        judged = candidates(cfg, models[cfg.nr], distance, x0, names, mos)  # type: ignore[arg-type]
        sets = [judged.counterexamples(x0)]
        if cfg.save_candidates:
            save_candidates(judged, x0, names, out)
    rows: list[dict] = []
    for draw, x in enumerate(sets):
        if draw == 0:  # the file is the counterexample: nothing is scored before it has been written
            for name, image in zip(names, x, strict=True):
                write_png(out / "counterexamples" / f"{name}.png", image)
            x = torch.stack([read_image(out / "counterexamples" / f"{n}.png") for n in names]).to(device)
        scored, about = scores_of(models, x, x0), describe(x, x0, distance)
        for s, name in enumerate(names):
            row = {"image": name, "draw": draw, "mos": float(mos[s]), **{k: v[s] for k, v in about.items()}}
            rows.append(row | (judged.row(s) if judged is not None else {}) | scored[s])
            if draw == 0 and (cfg.pictures is None or part[s] < cfg.pictures):
                before, after = ({n: scored[s][f"{w}_{n}"] for n in models} for w in ("before", "after"))
                title, file = f"{name}: {cfg.nr} under {cfg.fr.kind}, {cfg.procedure}", out / "pictures" / f"{name}.png"
                panel(x0[s].cpu(), x[s].cpu(), file, title=title, before=before, after=after)
    return rows


def metrics_of(rows: list[dict], models: Models, attacked: str) -> dict[str, float]:
    """Metrics over images, averaged over the draws of a control."""
    draws = []
    for d in sorted({r["draw"] for r in rows}):
        of = [r for r in rows if r["draw"] == d]
        before, after = ({n: np.array([r[f"{w}_{n}"] for r in of]) for n in models} for w in ("before", "after"))
        mos = np.array([r["mos"] for r in of])
        rated = bool(np.isfinite(mos).all()) and len(mos) > 2 and np.ptp(mos) > 0
        found = measure(before, after, mos if rated else None, attacked)
        keys = ("distance", "visibility", "max_change", "share_above_4", "success", "below")
        draws.append(found | {k: float(np.mean([r[k] for r in of])) for k in keys if k in of[0]})
    return {k: float(np.mean([d[k] for d in draws])) for k in draws[0]}


def report(fabric: Fabric, models: Models, metrics: dict[str, float]) -> None:
    """One line a model: R with the clean SRCC on the attacked images beside it, without which R says nothing."""
    for name in models:
        clean = metrics.get(f"srcc_clean_{name}")
        srcc = "" if clean is None else f"clean SRCC {clean:.3f} -> {metrics[f'srcc24_{name}']:.3f} (24 points), "
        weak = clean is not None and clean < COMPETENT
        change, note = (
            f"mean change {metrics[f'change_{name}']:.3f}",
            f"  (not competent: below {COMPETENT})" if weak else "",
        )
        fabric.print(f"{name:10s} R {metrics[f'r_{name}']:.3f}  {srcc}{change}{note}")


def look_ahead(fabric: Fabric, cfg: DictConfig, models: Models, distance, data: QualitySet) -> None:
    """Everything found; one step of the attack on the clock, memory and hours; writes nothing."""
    x0, strength = from_bytes(data.image(0))[None].to(fabric.device), strengths_of(cfg)
    many = min(cfg.chunk, len(strength) * cfg.images_per_batch)
    recipe = {**recipe_of(cfg), "steps": 1}

    def step() -> None:
        some = strength[:1].expand(many)
        seeds = draw_seeds(cfg.seed, ["preflight"], 0)
        perceptual_attack(
            models[cfg.nr], distance, x0, some, seeds=seeds, projected=cfg.projected, chunk=many, **recipe
        )  # type: ignore[arg-type]

    problems = len(strength) * len(data)
    steps = -(-problems // many) * recipe_of(cfg).get("steps", 200)
    weights = sum(p.numel() for p in models.parameters())
    preflight(fabric, step, parameters=weights, what=f"{many} candidates of {tuple(x0.shape[2:])} pixels", steps=steps)


def check(cfg: DictConfig) -> None:
    """What can be told before anything is loaded."""
    check_procedure(cfg)
    check_data_options(cfg.data.kind, cfg.data)
    if not isinstance(cfg.pictures, int | None):
        raise ValueError(f"pictures={cfg.pictures}, allowed: a number or null for all")


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Attack every image; resumes after the last group of images that is in out/last.ckpt."""
    check(cfg)
    distance = build_fr(**cfg.fr).to(fabric.device)
    if cfg.procedure == "random":
        attack_of(cfg, out)
    models = load_models(cfg).to(fabric.device)
    data = build_data(seed=cfg.seed, parts=("attack",), **cfg.data)["attack"]
    check_data(data, models, distance)
    if cfg.target == "mos" and not bool(torch.isfinite(data.mos).all()):
        raise ValueError("target=mos: these images have no opinions, use target=model")
    if cfg.procedure == "perceptual":
        few = from_bytes(data.image(0))[None].to(fabric.device)
        check_gradient(models[cfg.nr], few, cfg.nr)
    if cfg.preflight:
        return look_ahead(fabric, cfg, models, distance, data)
    source = {**data.identity, "models": fingerprint(models)}
    distances = distances_of(cfg, out, source) if cfg.procedure == "random" else None
    if (run := runs.Run.open(out, cfg, fabric, data=source)) is not None:
        with run:
            carry_out(fabric, cfg, run, models, distance, data, distances)


def carry_out(
    fabric: Fabric, cfg: DictConfig, run: runs.Run, models: Models, distance, data: QualitySet, distances: dict | None
) -> None:
    """Group after group, the rows so far kept in last.ckpt; then the table and the metrics."""
    state: dict[str, Any] = run.load_checkpoint() or {"rows": [], "done": 0}
    count = len(strengths_of(cfg))
    fabric.print(f"{cfg.arm}: {len(data)} images from {state['done']}, {count} strengths, preset {cfg.preset}")
    for name, scored in models.items():
        fabric.print(f"{name}: {scored.calibration}")
    for part in tqdm(groups(data, state["done"], cfg.images_per_batch), desc=cfg.arm, leave=False, disable=None):
        rows = attack_group(cfg, models, distance, data, part, run.dir, distances, fabric.device)
        state = {"rows": state["rows"] + rows, "done": state["done"] + len(part), "config": run.config}
        for row in rows:
            run.log(**{k: v for k, v in row.items() if v == v})
        run.save_checkpoint(state)
        for row in [r for r in rows if r["draw"] == 0]:
            score = f"{cfg.nr} {row[f'before_{cfg.nr}']:5.2f} -> {row[f'after_{cfg.nr}']:5.2f}"
            size = f"largest change {row['max_change']:.0f}/255  visibility {row['visibility']:.2f}"
            fabric.print(f"{row['image']:24s} {score}  distance {row['distance']:.4g}  {size}")
    with Table(run.dir / "counterexamples.csv") as table:
        for row in state["rows"]:
            table.write(row)
    metrics = metrics_of(state["rows"], models, cfg.nr)
    run.finish(metrics)
    report(fabric, models, metrics)


main = script("attack", fit)


if __name__ == "__main__":
    main()
