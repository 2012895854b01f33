"""Why counterexamples do (not) transfer: where each model is sensitive, and what the gradients and the counterexamples of two
models have in common, on the images that are attacked.

python sensitivity.py                               the models of `python train.py`
python sensitivity.py attacked=[brisque,cornia]     and the counterexamples of finished attacks
"""

from collections.abc import Callable, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor

from common import runs
from common.scripts import script
from iqa_attack.checkpoint import fingerprint, load
from iqa_attack.perceptual_attack import autograd_gradient
from iqa_attack.photographs.data import build_data
from iqa_attack.photographs.images import luma, read_image
from iqa_attack.photographs.photos import QualitySet
from iqa_attack.quality_models.models import Models
from iqa_attack.study.pictures import sensitivity_maps

BORDER = 8
Attacks = dict[str, dict[str, dict[str, Any]]]  # {attacked: {image: row of attack.py}}


def energy(g: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, H, W): the squared length of the gradient (or of a change) of every pixel."""
    return g.pow(2).sum(1)


def spread(e: Tensor) -> Tensor:
    """(sum e)^2 / (N sum e^2) of energies (B, H, W): the share of the pixels that carry it. 1: all alike, 1/N: a single one."""
    e = e.flatten(1)
    return e.sum(1) ** 2 / (e.shape[1] * e.pow(2).sum(1))


def colour(g: Tensor) -> Tensor:
    """Share (B,) of the energy of g (B, 3, H, W) that no change of luma has: 0 for a model that sees luma alone."""
    w = g.new_tensor([0.2989, 0.5870, 0.1140])
    seen = (g * w.view(1, 3, 1, 1)).sum(1).pow(2) / w.pow(2).sum()
    return 1 - seen.flatten(1).sum(1) / energy(g).flatten(1).sum(1)


def edges(e: Tensor, x: Tensor) -> Tensor:
    """Share (B,) of the energy (B, H, W) that lies on the quarter of the pixels of x (B, 3, H, W) with the largest luma gradient
    (Sobel, borders replicated). 0.25: as much as anywhere."""
    sobel = x.new_tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])[None, None]
    grey = F.pad(luma(x), (1, 1, 1, 1), mode="replicate")
    steep = F.conv2d(grey, torch.cat([sobel, sobel.transpose(2, 3)])).pow(2).sum(1).flatten(1)
    top = steep.topk(steep.shape[1] // 4, dim=1).indices
    return e.flatten(1).gather(1, top).sum(1) / e.flatten(1).sum(1)


def border(e: Tensor, width: int = BORDER) -> Tensor:
    """Mean energy (B,) of the pixels within `width` of the border over that of all. 1: as much as anywhere."""
    inside = e[:, width:-width, width:-width]
    outer = (e.sum((1, 2)) - inside.sum((1, 2))) / (e[0].numel() - inside[0].numel())
    return outer / e.mean((1, 2))


def alike(a: Tensor, b: Tensor) -> Tensor:
    """|cosine| (B,) of two changes or gradients (B, 3, H, W): up and down are the same direction."""
    return F.cosine_similarity(a.flatten(1).double(), b.flatten(1).double(), dim=1).abs()


def gradients(score: Callable[[Tensor], Tensor], images: Tensor, chunk: int = 4) -> Tensor:
    """The gradient (B, 3, H, W) of the scores at images (B, 3, H, W)."""
    return torch.cat([autograd_gradient(score, part) for part in images.split(chunk)])


def mean(values: Tensor) -> float:
    """Of the images where it is defined: a model whose gradient vanishes has no direction there. NaN for none."""
    return float(values[values.isfinite()].double().mean())


def describe(name: str, g: Tensor, x: Tensor) -> dict[str, float]:
    """Of one model: spread_, colour_, edges_, border_<name> and how many images have a gradient at all."""
    e = energy(g)
    found = {"spread": spread(e), "colour": colour(g), "edges": edges(e, x), "border": border(e)}
    share = float((e.flatten(1).sum(1) > 0).double().mean())
    return {f"{k}_{name}": mean(v) for k, v in found.items()} | {f"reacting_{name}": share}


def moved_by_others(rows: Attacks) -> float:
    """How far the counterexamples of other models move a model, in units of how far its own do: the mean over ordered pairs
    of mean |change of b's score on a's| / mean |change on b's own|."""

    def change(attacked: str, model: str) -> float:
        return float(np.mean([abs(r[f"after_{model}"] - r[f"before_{model}"]) for r in rows[attacked].values()]))

    return float(np.mean([change(a, b) / max(change(b, b), 1e-8) for a, b in permutations(rows, 2)]))


def read_attacks(cfg: DictConfig, fr: str) -> Attacks:
    """{attacked: {image: row}} of the finished attacks under fr. FileNotFoundError naming the first that is missing."""
    found = {}
    for nr in cfg.attacked:
        where = folder(cfg, nr, fr)
        if (runs.read_json(where / "result.json") or {}).get("status") != "finished":
            raise FileNotFoundError(f"no finished attack in {where}: run `python attack.py nr={nr} fr={fr}` first")
        found[nr] = {row["image"]: row for row in runs.load_checkpoint(where / "last.ckpt")["rows"]}
    return found


def folder(cfg: DictConfig, nr: str, fr: str) -> Path:
    """The run of attack.py."""
    return Path(cfg.run_root) / cfg.scale / f"{nr}_{fr}_perceptual" / f"seed{cfg.seed}"


def compare(parts: dict[str, Tensor], what: str) -> dict[str, float]:
    """cosine_<what>_<a>_<b>: the mean |cosine| over images of every pair of models; cosine_<what>: over all pairs."""
    found = {f"cosine_{what}_{a}_{b}": mean(alike(parts[a], parts[b])) for a, b in combinations(parts, 2)}
    return found | ({f"cosine_{what}": float(np.mean(list(found.values())))} if found else {})


def of_attacks(cfg: DictConfig, attacks: dict[str, Attacks], names: Sequence[str], x0: Tensor) -> dict[str, float]:
    """cosine_<fr> of the changes (all attacks on an image start from the same noise), moved_by_others_<fr> and its mean."""
    found: dict[str, float] = {}
    for fr, rows in attacks.items():
        files = {nr: [folder(cfg, nr, fr) / f"counterexamples/{n.replace('/', '_')}.png" for n in names] for nr in rows}
        found |= compare({nr: torch.stack([read_image(f) for f in files[nr]]) - x0 for nr in rows}, fr)
        found[f"moved_by_others_{fr}"] = moved_by_others(rows)
    return found | {"moved_by_others": float(np.mean([found[f"moved_by_others_{fr}"] for fr in attacks]))}


def read(cfg: DictConfig) -> tuple[Models, QualitySet]:
    """The models of a training and the images that are attacked. ValueError or FileNotFoundError for what is not there."""
    if cfg.attacked and (len(cfg.attacked) < 2 or not cfg.fidelity):
        raise ValueError(
            f"attacked={list(cfg.attacked)}, fidelity={list(cfg.fidelity)}: two models and a measure are needed"
        )
    weights = Path(cfg.run_root) / cfg.scale / cfg.train_arm / f"seed{cfg.seed}" / "last.ckpt"
    models, config, _ = load(weights)
    if unknown := set(cfg.attacked) - set(models):  # type: ignore[arg-type]
        raise ValueError(f"attacked names {', '.join(sorted(unknown))}, {weights} holds {', '.join(models)}")  # type: ignore[arg-type]
    options = {**config["data"], **({"root": cfg.data.root} if cfg.data.root else {})}
    return models, build_data(seed=cfg.seed, parts=("attack",), **options)["attack"]  # type: ignore[return-value]


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Writes the metrics and sensitivity.png."""
    models, data = read(cfg)
    attacks = {fr: read_attacks(cfg, fr) for fr in cfg.fidelity} if cfg.attacked else {}
    if (run := runs.Run.open(out, cfg, fabric, data={**data.identity, "models": fingerprint(models)})) is not None:
        with run:
            x0 = data.stack()
            g = {name: gradients(scored.model, x0) for name, scored in models.items()}  # type: ignore[operator]
            metrics = {k: v for name in g for k, v in describe(name, g[name], x0).items()}
            metrics |= compare(g, "gradients")
            metrics |= of_attacks(cfg, attacks, data.names, x0) if attacks else {}
            maps = {name: energy(v).sqrt()[: cfg.pictures] for name, v in g.items()}
            sensitivity_maps(x0[: cfg.pictures], maps, out / "sensitivity.png")
            run.finish({k: v for k, v in metrics.items() if v == v})
            print("\n".join(f"{k:32s} {v:.4g}" for k, v in metrics.items()))


main = script("sensitivity", fit)


if __name__ == "__main__":
    main()
