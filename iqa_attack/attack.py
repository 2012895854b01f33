"""Attack one quality model under one fidelity measure, judge the candidates, and score the counterexamples with every
model.

python attack.py                                            BRISQUE, projected Chebyshev, the models of `python
train.py`
python attack.py nr=cornia fr=ssim attack=random            the control at the distance of the attack (run that first)
python attack.py data=folder data.root=photos/              your own images: pictures and a CSV in the run directory
python attack.py data=folder data.root=photos/ weights=null +official.brisque.path=svm_model.mat nr=brisque
"""

import csv
from functools import partial
from pathlib import Path

import hydra
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from common import runs
from iqa_attack.counterexamples import Judged, describe, judge, measure, refine
from iqa_attack.data import build_data
from iqa_attack.fr_models import build_fr
from iqa_attack.images import from_bytes, read_image, write_png
from iqa_attack.jnd import build_observer
from iqa_attack.nr_models import Scored, load_official, load_trained, pyiqa_metric
from iqa_attack.perceptual_attack import PRESETS, check_gradient, perceptual_attack, spsa_gradient, square_attack
from iqa_attack.photos import QualitySet
from iqa_attack.pictures import panel
from iqa_attack.quality_metrics import fit_logistic
from iqa_attack.random_control import draw_seeds, random_at_distance, random_signs

PROCEDURES = ("perceptual", "random", "random_jnd", "spsa", "square")


def load_models(cfg: DictConfig) -> dict[str, Scored]:
    """The trained models of cfg.weights, the official ones and those of pyiqa, by name; every one maps to 0..10."""
    models: dict[str, Scored] = {}
    if cfg.weights == "auto":
        auto = Path(cfg.run_root) / cfg.scale / cfg.train_arm / f"seed{cfg.seed}" / "last.ckpt"
        if not auto.is_file() and not cfg.official and not cfg.pyiqa:
            raise FileNotFoundError(
                f"no trained models in {auto}: run `python train.py method={cfg.train_arm} seed={cfg.seed}` first"
            )
        models |= load_trained(auto) if auto.is_file() else {}
    elif cfg.weights:
        models |= load_trained(cfg.weights)
    for name, options in (cfg.official or {}).items():
        models[str(name)] = load_official(
            str(options.get("kind", name)), **{k: v for k, v in options.items() if k != "kind"}
        )
    if cfg.pyiqa:
        reference = build_data(seed=0, kind="photos")["test"]
        images, mos = torch.stack([reference.image(i) for i in range(0, len(reference), 3)]), reference.mos[::3]
        for (
            name
        ) in cfg.pyiqa:  # no logistic is published: one is fitted to graded distortions of the embedded photographs
            metric = pyiqa_metric(name)
            with torch.no_grad():
                raw = torch.cat([metric(from_bytes(x)) for x in images.split(20)])
            models[name] = Scored(metric, *fit_logistic(raw, mos)).eval().requires_grad_(False)
    if cfg.nr not in models:
        raise ValueError(f"nr={cfg.nr!r}, allowed here: {', '.join(models)}")
    return models


def strengths_of(cfg: DictConfig) -> Tensor:
    """(K,): lambda, or with cfg.fr_projected the eps in 0..1. ValueError for none, or a lambda < 0."""
    values = torch.tensor([float(v) for v in cfg.strengths], dtype=torch.float64)
    if not len(values) or bool((values < 0).any()):
        raise ValueError(f"strengths={list(cfg.strengths)}: a list of numbers >= 0 is needed")
    return values / 255 if cfg.projected else values


def candidates(
    cfg: DictConfig, models: dict[str, Scored], distance, x0: Tensor, names: list[str], mos: Tensor
) -> Judged:
    """Make and judge the candidates of a few images (S, 3, H, W), as cfg.procedure says."""
    score, seeds = models[cfg.nr], draw_seeds(cfg.seed, names, 0)
    observer = build_observer(cfg.observer, seed=cfg.seed) if cfg.observer else None
    judge_all = partial(
        judge, score, observer, x0, prefixes=[f"{cfg.nr}/{cfg.fr.kind}/{n}" for n in names], chunk=cfg.chunk
    )
    strengths = strengths_of(cfg)
    table = strengths[:, None].expand(-1, len(x0))
    if cfg.reuse:  # candidates that were saved for people to judge
        saved = [
            [read_image(Path(cfg.reuse) / "candidates" / n / f"{k}.png") for n in names] for k in range(len(strengths))
        ]
        return judge_all(torch.stack([torch.stack(row) for row in saved]).to(x0), table)
    if cfg.procedure == "random_jnd":
        made = [random_signs(x0, s.expand(len(x0)).to(x0), seeds) for s in strengths]
        return judge_all(torch.stack(made), table)
    if cfg.procedure == "square":
        made = [square_attack(score, x0, float(s), steps=cfg.recipe.steps, seed=cfg.seed) for s in strengths]
        return judge_all(torch.stack(made), table)
    recipe = {**(PRESETS[cfg.preset] if cfg.preset else {}), **{k: v for k, v in cfg.recipe.items() if v is not None}}
    if cfg.procedure == "spsa":
        recipe["gradient"] = spsa_gradient(seed=cfg.seed, **cfg.spsa)
    inner = getattr(score.model, "redraw", None) if cfg.redraw else None
    bar = partial(tqdm, leave=False, disable=None)
    run = partial(
        perceptual_attack, score, distance, x0, seeds=seeds, projected=cfg.projected, direction=cfg.direction, chunk=cfg.chunk,
        target=mos.to(x0) if cfg.target == "mos" else None, each_step=inner, progress=bar, **recipe,
    )  # fmt: skip
    judged = judge_all(run(strengths), table)
    if cfg.bisect:
        return refine(lambda s: run(s), judge_all, judged, rounds=cfg.bisect, visible_end=_visible_end(cfg, recipe))
    return judged


def _visible_end(cfg: DictConfig, recipe: dict) -> str:
    if cfg.projected:
        raise ValueError("bisect: projected candidates are already on every gray level, use bisect=0")
    return "low" if recipe.get("lambda_on", "fidelity") == "fidelity" else "high"


def control(cfg: DictConfig, distance, x0: Tensor, names: list[str]) -> list[Tensor]:
    """cfg.random.draws random sets (S, 3, H, W) at the distances of the counterexamples of the attack that
    cfg.random.source names."""
    source = Path(cfg.run_root) / cfg.scale / f"{cfg.nr}_{cfg.fr_name}_perceptual" / f"seed{cfg.seed}"
    source = source if cfg.random.source == "auto" else Path(cfg.random.source)
    if not (source / "last.ckpt").is_file():
        raise FileNotFoundError(
            f"no attack in {source}: the control takes its distances, run `python attack.py nr={cfg.nr} fr={cfg.fr_name}` first"
        )
    rows = {row["image"]: row for row in runs.load_checkpoint(source / "last.ckpt")["rows"]}
    if missing := [n for n in names if n not in rows]:
        raise ValueError(f"{source} attacked other images: it lacks {missing[0]}")
    target = torch.tensor([rows[n]["distance"] for n in names]).to(x0)
    exact = cfg.fr.kind == "chebyshev"
    return [
        random_at_distance(distance, x0, target, draw_seeds(cfg.seed, names, 1 + d), chebyshev=exact)
        for d in range(cfg.random.draws)
    ]


def check_data(data: QualitySet, models: dict[str, Scored], distance) -> None:
    """Raises ValueError naming the image that is constant or too small for a model or the distance."""
    needs = {**{n: m.minimum for n, m in models.items()}, type(distance).__name__: distance.minimum}
    who = max(needs, key=lambda n: needs[n])
    for i in range(len(data)):
        image = data.image(i)
        if min(image.shape[1:]) < needs[who]:
            raise ValueError(
                f"{data.names[i]} has {image.shape[2]} x {image.shape[1]} pixels, {who} needs {needs[who]} on each side"
            )
        if int(image.amin()) == int(image.amax()):
            raise ValueError(f"{data.names[i]} is constant: natural scene statistics are not defined for it")


def groups(data: QualitySet, done: int, size: int) -> list[list[int]]:
    """The images that are left, up to `size` of one shape together."""
    parts: list[list[int]] = []
    for i in range(done, len(data)):
        fits = parts and len(parts[-1]) < size and data.image(parts[-1][0]).shape == data.image(i).shape
        parts[-1].append(i) if fits else parts.append([i])
    return parts


@torch.no_grad()
def table_row(models: dict[str, Scored], x: Tensor, x0: Tensor) -> list[dict[str, float]]:
    """Scores of every model before and after, per image."""
    found = {n: (m(x0).tolist(), m(x).tolist()) for n, m in models.items()}
    return [
        {f"{when}_{n}": pair[k][i] for n, pair in found.items() for k, when in enumerate(("before", "after"))}
        for i in range(len(x))
    ]


def attack_group(cfg: DictConfig, models, distance, data: QualitySet, part: list[int], out: Path, device) -> list[dict]:
    """The rows of a few images: every draw of a control, or the one counterexample, scored as read back from its
    PNG."""
    x0 = from_bytes(torch.stack([data.image(i) for i in part])).to(device)
    names, mos = [data.names[i].replace("/", "_") for i in part], data.mos[part]
    judged, _base = None, table_row(models, x0, x0)
    if cfg.procedure == "random":
        sets = control(cfg, distance, x0, names)
    else:
        judged = candidates(cfg, models, distance, x0, names, mos)
        sets = [judged.counterexamples(x0)]
        if cfg.save_candidates:
            for k, s in np.ndindex(*judged.images.shape[:2]):
                write_png(out / "candidates" / names[s] / f"{k}.png", judged.images[k, s])
            for s, name in enumerate(names):
                write_png(out / "candidates" / name / "original.png", x0[s])
    rows: list[dict] = []
    for draw, x in enumerate(sets):
        if draw == 0:  # the file is the counterexample: nothing is scored before it has been written
            for name, image in zip(names, x, strict=True):
                write_png(out / "counterexamples" / f"{name}.png", image)
            x = torch.stack([read_image(out / "counterexamples" / f"{n}.png") for n in names]).to(device)
        scored, about = table_row(models, x, x0), describe(x, x0, distance)
        for s, name in enumerate(names):
            row = {"image": name, "draw": draw, "mos": float(mos[s]), **{k: v[s] for k, v in about.items()}}
            if judged is not None:
                k = int(judged.chosen[s])
                row |= {"success": k >= 0, "candidate": k, "strength": float(judged.strengths[max(k, 0), s]) if k >= 0 else 0.0,
                        "below": int(judged.below[:, s].sum()), "candidates": len(judged.below)}  # fmt: skip
            rows.append(row | scored[s])
        if draw == 0:
            for s, name in enumerate(names):
                if cfg.pictures is not None and part[s] >= cfg.pictures:
                    continue
                before, after = ({n: scored[s][f"{w}_{n}"] for n in models} for w in ("before", "after"))
                title = f"{name}: {cfg.nr} under {cfg.fr.kind}, {cfg.procedure}"
                panel(
                    x0[s].cpu(), x[s].cpu(), out / "pictures" / f"{name}.png", title=title, before=before, after=after
                )
    return rows


def metrics_of(rows: list[dict], models, attacked: str) -> dict[str, float]:
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


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Attack every image; resumes after the last group of images that is in out/last.ckpt."""
    if cfg.procedure not in PROCEDURES or (cfg.preset and cfg.preset not in PRESETS):
        raise ValueError(
            f"procedure={cfg.procedure!r}, preset={cfg.preset!r}, allowed: {', '.join(PROCEDURES)}; {', '.join(PRESETS)}"
        )
    strengths_of(cfg)
    distance = build_fr(**cfg.fr).to(fabric.device)
    models = {n: m.to(fabric.device) for n, m in load_models(cfg).items()}
    data = build_data(seed=cfg.seed, **cfg.data)["attack"]
    check_data(data, models, distance)
    if cfg.target == "mos" and not bool(torch.isfinite(data.mos).all()):
        raise ValueError("target=mos: these images have no opinions, use target=model")
    if cfg.procedure == "perceptual":
        few = from_bytes(data.image(0))[None].to(fabric.device)
        check_gradient(models[cfg.nr], few, cfg.nr)
    if cfg.preflight:
        fabric.print(f"preflight: {len(data)} images, {len(cfg.strengths)} candidates each, models {', '.join(models)}")
        return
    run = runs.Run.open(out, cfg, fabric)
    if run is None:
        return
    with run:
        state = run.load_checkpoint() or {"rows": [], "done": 0}
        fabric.print(
            f"{cfg.arm}: {len(data)} images from {state['done']}, {len(cfg.strengths)} strengths, preset {cfg.preset}"
        )
        parts = groups(data, state["done"], cfg.images_per_batch)
        for part in tqdm(parts, desc=cfg.arm, leave=False, disable=None):
            rows = attack_group(cfg, models, distance, data, part, out, fabric.device)
            state = {"rows": state["rows"] + rows, "done": state["done"] + len(part)}
            for row in rows:
                run.log(**{k: v for k, v in row.items() if v == v})
            run.save_checkpoint(state)
            for row in [r for r in rows if r["draw"] == 0]:
                score = f"{cfg.nr} {row[f'before_{cfg.nr}']:5.2f} -> {row[f'after_{cfg.nr}']:5.2f}"
                size = f"largest change {row['max_change']:.0f}/255  visibility {row['visibility']:.2f}"
                fabric.print(f"{row['image']:24s} {score}  distance {row['distance']:.4g}  {size}")
        with (out / "counterexamples.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(state["rows"][0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(state["rows"])
        metrics = metrics_of(state["rows"], models, cfg.nr)
        run.finish(metrics)
        for name in models:
            srcc = (
                f"SRCC {metrics[f'srcc_clean_{name}']:.3f} -> {metrics[f'srcc24_{name}']:.3f} (24 points), "
                if f"srcc24_{name}" in metrics
                else ""
            )
            competent = "" if metrics.get(f"srcc_clean_{name}", 1) >= 0.8 else "  (not competent: clean SRCC below 0.8)"
            fabric.print(
                f"{name:10s} R {metrics[f'r_{name}']:.3f}  {srcc}mean change {metrics[f'change_{name}']:.3f}{competent}"
            )


@hydra.main(version_base="1.3", config_path="configs", config_name="attack")
def main(cfg: DictConfig) -> None:
    out = HydraConfig.get().runtime.output_dir
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    try:
        fit(cfg, runs.launch(cfg.fabric), Path(out))
    finally:
        runs.remove_if_empty(out, cfg.run_root)


if __name__ == "__main__":
    main()
