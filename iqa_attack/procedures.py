"""What attack.py does to a few images: candidates made by the procedure of a configuration and judged, or the random control."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from common import runs
from iqa_attack.counterexamples import Judged, judge, refine
from iqa_attack.jnd import build_observer
from iqa_attack.perceptual_attack import (
    DIRECTIONS,
    PRESETS,
    STEP_RULES,
    Step,
    grid,
    perceptual_attack,
    spsa_gradient,
    square_attack,
    start_noise,
)
from iqa_attack.photographs.images import read_image
from iqa_attack.quality_models.calibration import Scored
from iqa_attack.random_control import draw_seeds, random_at_distance, random_signs

PROCEDURES = ("perceptual", "random", "random_jnd", "spsa", "square")


def recipe_of(cfg: DictConfig) -> dict[str, Any]:
    """The preset with the keys of `recipe` that are not null in place of its own."""
    return {**PRESETS[cfg.preset], **{k: v for k, v in cfg.recipe.items() if v is not None}}


def strengths_of(cfg: DictConfig) -> Tensor:
    """(K,): values of lambda, or with cfg.projected the largest change in 0..1. Null strengths are those of the preset.

    ValueError for none, a negative one, or a projection above 255 gray levels (a lambda grid is no list of gray levels)."""
    on = recipe_of(cfg).get("lambda_on", "fidelity")
    chosen = cfg.strengths
    values = grid(cfg.preset, kind=cfg.fr.kind, projected=cfg.projected, lambda_on=on) if chosen is None else chosen
    try:
        found = torch.tensor([float(v) for v in values], dtype=torch.float64)
    except (TypeError, ValueError):
        found = torch.tensor([-1.0])
    if not len(found) or not bool((found >= 0).all()):
        raise ValueError(f"strengths={chosen}: a list of numbers >= 0 is needed, or null for those of the preset")
    if cfg.projected and bool((found > 255).any()):
        raise ValueError(
            f"strengths: {float(found.max()):g} gray levels, but projected=true takes the largest change of a value, 0..255; "
            "values of lambda belong to projected=false"
        )
    return found / 255 if cfg.projected else found


def check_procedure(cfg: DictConfig) -> None:
    """ValueError for a procedure, preset, recipe, observer or strength that does not exist, before anything is loaded."""
    for key, allowed in {"procedure": PROCEDURES, "direction": DIRECTIONS, "target": ("model", "mos")}.items():
        if cfg[key] not in allowed:
            raise ValueError(f"{key}={cfg[key]!r}, allowed: {', '.join(allowed)}")
    if cfg.preset not in PRESETS:
        raise ValueError(f"preset={cfg.preset!r}, allowed: {', '.join(PRESETS)}")
    recipe = recipe_of(cfg)
    known = {"steps", "gamma", "step_rule", "l2_scale", "lambda_on", "noise", "border", "quantised"}
    if unknown := set(recipe) - known:
        raise ValueError(f"recipe has no key {', '.join(sorted(unknown))}, allowed: {', '.join(sorted(known))}")
    for key, low in {"steps": 1, "gamma": 0, "border": 0}.items():
        if recipe.get(key) is not None and not recipe[key] >= low:
            raise ValueError(f"recipe.{key}={recipe[key]}, allowed: >= {low}")
    for key, low in {"chunk": 1, "images_per_batch": 1, "bisect": 0, "random.draws": 1, "spsa.samples": 1}.items():
        value = cfg[key] if "." not in key else cfg[key.split(".")[0]][key.split(".")[1]]
        if value < low:
            raise ValueError(f"{key}={value}, allowed: >= {low}")
    Step(recipe.get("step_rule", STEP_RULES[0]), recipe.get("gamma", 1e-3), recipe.get("l2_scale", "none"))
    start_noise((1, 3, 1, 1), [0], recipe.get("noise", "ternary"))
    for key, allowed in {"lambda_on": ("fidelity", "discrepancy"), "quantised": ("end", "every_step")}.items():
        if recipe.get(key, allowed[0]) not in allowed:
            raise ValueError(f"recipe.{key}={recipe[key]!r}, allowed: {', '.join(allowed)}")
    strengths_of(cfg)
    if cfg.bisect:
        if cfg.projected:
            raise ValueError("bisect: projected candidates are already on every gray level, use bisect=0")
        if bool((strengths_of(cfg) == 0).any()):
            raise ValueError("bisect: halves the logarithm of the strengths, which must be > 0")
    if cfg.observer:
        build_observer(cfg.observer, seed=cfg.seed)


def candidates(
    cfg: DictConfig, score: Scored, distance, x0: Tensor, names: Sequence[str], mos: Tensor, *, bars: bool = True
) -> Judged:
    """Make and judge the candidates of a few images (S, 3, H, W), as cfg.procedure says."""
    seeds = draw_seeds(cfg.seed, names, 0)
    observer = build_observer(cfg.observer, seed=cfg.seed) if cfg.observer else None
    prefixes = [f"{cfg.nr}/{cfg.fr.kind}/{n}" for n in names]
    judge_all = partial(judge, score, observer, x0, prefixes=prefixes, chunk=cfg.chunk)
    strengths, recipe = strengths_of(cfg), recipe_of(cfg)
    table = strengths[:, None].expand(-1, len(x0))
    if cfg.reuse:  # candidates that were saved for people to judge
        folder = Path(cfg.reuse).expanduser() / "candidates"
        saved = [[read_image(folder / n / f"{k}.png") for n in names] for k in range(len(strengths))]
        return judge_all(torch.stack([torch.stack(row) for row in saved]).to(x0), table)
    if cfg.procedure == "random_jnd":
        return judge_all(torch.stack([random_signs(x0, s.expand(len(x0)).to(x0), seeds) for s in strengths]), table)
    if cfg.procedure == "square":
        made = [square_attack(score, x0, float(s), steps=recipe["steps"], seed=cfg.seed) for s in strengths]
        return judge_all(torch.stack(made), table)
    if cfg.procedure == "spsa":
        recipe["gradient"] = spsa_gradient(seed=cfg.seed, **cfg.spsa)
    redraw = getattr(score.model, "redraw", None) if cfg.redraw else None
    run = partial(
        perceptual_attack, score, distance, x0, seeds=seeds, projected=cfg.projected, direction=cfg.direction, chunk=cfg.chunk,
        target=mos.to(x0) if cfg.target == "mos" else None, each_step=redraw,
        progress=partial(tqdm, leave=False, disable=None if bars else True), **recipe,
    )  # fmt: skip
    made = run(strengths)
    if cfg.redraw and hasattr(score.model, "round"):
        score.model.round = 0  # type: ignore[assignment]  # judged and scored at the places of the clean scores
    judged = judge_all(made, table)
    if cfg.bisect:
        visible_end = "low" if recipe.get("lambda_on", "fidelity") == "fidelity" else "high"
        return refine(run, judge_all, judged, rounds=cfg.bisect, visible_end=visible_end)
    return judged


# ------------------------------------------------------------------------------------------------------- the control
def attack_of(cfg: DictConfig, out: Path) -> Path:
    """The run whose distances the control `out` takes: random.source, or the attack with the same overrides less those of the
    control itself. FileNotFoundError with the command that makes it."""
    if cfg.random.source != "auto":
        source = Path(cfg.random.source).expanduser()
    else:
        source, own = Path(cfg.run_root) / cfg.scale / f"{cfg.nr}_{cfg.fr_name}_perceptual", Path(out).parts
        if own[-2] != cfg.arm and len(own) > 2 and own[-3] == cfg.arm:  # <arm>/<overrides>/seed<k>
            kept = [p for p in own[-2].split("+") if not p.startswith(("random.", "pictures"))]
            source = source / "+".join(kept) if kept else source
        source = source / f"seed{cfg.seed}"
    if not (source / "last.ckpt").is_file():
        raise FileNotFoundError(
            f"no attack in {source}: the control takes its distances, run `python attack.py nr={cfg.nr} fr={cfg.fr_name}` with "
            "the same overrides first, or name its directory with random.source="
        )
    return source


def distances_of(cfg: DictConfig, out: Path, data: dict[str, Any]) -> dict[str, float]:
    """{image: distance} of the counterexamples of that attack. ValueError for an attack on other data or of other models."""
    source = attack_of(cfg, out)
    state = runs.load_checkpoint(source / "last.ckpt")
    old = {"data": state["run"]["data"], "nr": state["config"]["nr"], "fr": state["config"]["fr"]}
    new = {"data": data, "nr": cfg.nr, "fr": runs.plain(cfg)["fr"]}
    if differs := [f"{k}: {old[k]} there, {new[k]} here" for k in old if old[k] != new[k]]:
        raise ValueError(f"the control takes the distances of {source}, but {'; '.join(differs)}")
    return {row["image"]: row["distance"] for row in state["rows"]}


def control(
    cfg: DictConfig, distance, x0: Tensor, names: Sequence[str], distances: dict[str, float], where: Path
) -> list[Tensor]:
    """cfg.random.draws random sets (S, 3, H, W) at these distances from the images."""
    if missing := [n for n in names if n not in distances]:
        raise ValueError(f"the attack of {where} is not finished or attacked other images: it lacks {missing[0]}")
    target, exact = torch.tensor([distances[n] for n in names]).to(x0), cfg.fr.kind == "chebyshev"
    return [
        random_at_distance(distance, x0, target, draw_seeds(cfg.seed, names, 1 + d), chebyshev=exact)
        for d in range(cfg.random.draws)
    ]
