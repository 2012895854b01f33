"""The checkpoint of train.py: what it says, and the network that it holds; weights that others have published, too."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo  # pyright: ignore[reportPrivateImportUsage]
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.optim import Optimizer

from adaptive_prune.backbones import build_vit
from adaptive_prune.data import Data
from adaptive_prune.model import PrunedViT
from adaptive_prune.settings import composed, method_of, options
from adaptive_prune.stages import load_weights
from common import runs
from common.loop import Loaded

# (width, blocks, tokens, convolutional stem) of the published checkpoints -> configs/model/<name>
PUBLISHED = {
    (192, 12, 197, False): "deit_tiny", (384, 12, 197, False): "deit_small", (768, 12, 197, False): "deit_base",
    (768, 12, 577, False): "deit_base_384", (384, 16, 197, True): "lvvit_s", (512, 20, 197, True): "lvvit_m",
}  # fmt: skip


def state(
    model: Any, optimizer: Optimizer, ema: Any, data: Data, *, epoch: int, best: list[float], config: dict
) -> dict[str, Any]:
    """What a run needs to go on, and what anybody needs to use its network. best: see `metrics.merit`."""
    found = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "best": best,
        "about": {**data.about(), "keep": model.module.keep}, "config": config,
    }  # fmt: skip
    return found if ema is None else found | {"ema": ema.module.state_dict()}


def load(path: str | Path, *, vit: str | None = None, way: str | None = None, ema: bool = False) -> Loaded:
    """The network in evaluation mode, its configuration, and what to know of it; without any data.

    A checkpoint of train.py needs nothing else; way: another arm's way of dropping tokens with its weights; ema: its averaged
    weights. Any other file must be the state dict of a bare ViT (also under "model" or "state_dict", as DeiT and LV-ViT are
    published; "module." prefixes are dropped): dense unless a way is named, and vit names configs/model/<vit> where its shapes
    do not. FileNotFoundError, `runs.RunError` for a broken file, ValueError for one that does not fit."""
    found = runs.load_checkpoint(path)
    if "config" in found:
        return _own(found, path, vit=vit, way=way, ema=ema)
    if ema:
        raise ValueError(f"{path} was not written by train.py: it has no averaged weights, leave ema out")
    weights = found.get("model", found.get("state_dict", found))
    weights = {k.removeprefix("module."): v for k, v in weights.items()}
    head = weights.get("head.weight")
    stem = next((v for k, v in weights.items() if k.startswith("patch_embed.") and v.ndim == 4), None)
    if head is None or stem is None:
        raise ValueError(f"{path} holds no {'head' if head is None else 'patch_embed'} weights: no classification ViT")
    vit = vit or recognise(weights)
    if vit is None:
        raise ValueError(
            f"{path} is none of {', '.join(PUBLISHED.values())}: name its architecture, vit=<configs/model>"
        )
    side = math.isqrt(weights["pos_embed"].shape[-2] - 1) if "pos_embed" in weights else 0
    size = side * (16 if "patch_embed.conv1.weight" in weights else stem.shape[-1])
    data = ["data=imagenet", "data.root=null", f"data.size={size or 224}"]
    cfg = composed(f"model={vit}", f"method={way or 'dense'}", "arm=released", *data)
    config = runs.plain(cfg)
    model = _network(config, classes=len(head), channels=stem.shape[1], keep=None)
    weights = {k: v for k, v in weights.items() if k != "theta" or model.rule == "threshold"}
    load_weights(model, weights, path, vit)
    return Loaded(model.eval(), config, _about_released(len(head), stem.shape[1], config["data"]))


def recognise(weights: Mapping[str, Tensor]) -> str | None:
    """The name in configs/model of a published state dict, by its shapes."""
    pos = weights.get("pos_embed")
    if pos is None or "dist_token" in weights:
        return None
    depth = len({k.split(".")[1] for k in weights if k.startswith("blocks.")})
    return PUBLISHED.get((pos.shape[-1], depth, pos.shape[-2], "patch_embed.conv1.weight" in weights))


def _own(found: Mapping[str, Any], path: Any, *, vit: str | None, way: str | None, ema: bool) -> Loaded:
    if missing := {"model", "about"} - found.keys():
        raise ValueError(f"{path} is no checkpoint of adaptive_prune/train.py: it lacks {', '.join(sorted(missing))}")
    if vit:
        raise ValueError(f"vit={vit}: {path} was written by train.py and knows its architecture, leave vit out")
    if ema and "ema" not in found:
        raise ValueError(f"{path} holds no averaged weights (it was trained with train.ema=null): leave ema out")
    config, about = dict(found["config"]), found["about"]
    if way:
        config["method"] = method_of(way, config["model"])
    keep = None if way else about["keep"]
    model = _network(config, classes=len(about["classes"]), channels=about["channels"], keep=keep)
    weights = found["ema" if ema else "model"]
    weights = {k: v for k, v in weights.items() if k != "theta" or model.rule == "threshold"}
    load_weights(model, weights, path, config["model"]["vit"]["name"], lacking=("theta",) if way else ())
    return Loaded(model.eval(), config, {**about, "keep": model.keep})


def _network(config: Mapping[str, Any], *, classes: int, channels: int, keep: list[int] | None) -> PrunedViT:
    vit = build_vit(**config["model"]["vit"], num_classes=classes, in_chans=channels)
    return PrunedViT(vit, keep=keep if config["method"]["match"] is None or keep else None, **options(config))


def _about_released(classes: int, channels: int, data: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of weights that others published: ImageNet's classes and normalisation where they have 1000 classes."""
    names = [str(c) for c in range(classes)]
    if classes == 1000:
        known = ImageNetInfo("imagenet-1k")  # reads its files anew each time it is made
        names = [str(known.index_to_description(c)) for c in range(classes)]
    stats = {"mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD)}
    return {
        "classes": names, "channels": channels, "size": data["size"], "crop": data["crop_pct"], "normalise": stats,
        "released": True, "keep": None,
    }  # fmt: skip
