"""Configurations of train.py: composing them, what `PrunedViT` takes from them, and checking them before anything is read."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from timm.data import Mixup  # pyright: ignore[reportPrivateImportUsage]

from adaptive_prune.backbones import build_vit
from adaptive_prune.budget import budget_loss
from adaptive_prune.data import GREY, check_data
from adaptive_prune.model import RULES, PrunedViT
from common import runs

CONFIGS = Path(__file__).resolve().parent / "configs"
DATA = {
    "root": None,
    "size": 24,
    "grid": 3,
    "repeats": 1,
    "crop_pct": 0.875,
}  # of `build_data`, where a set leaves them out
SCHEDULES = ("stages", "geometric")


def composed(*overrides: str) -> DictConfig:
    """The configuration of train.py with these overrides, inside a script or outside."""
    if GlobalHydra.instance().is_initialized():
        return compose("config", overrides=list(overrides))
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def method_of(arm: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """The node `method` of an arm for a node `model` (whose locations it takes)."""
    cfg = composed(f"method={arm}", f"arm={arm}")
    OmegaConf.set_struct(cfg, False)
    cfg.model = dict(model)
    return OmegaConf.to_container(cfg.method, resolve=True)  # type: ignore[return-value]


def options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of `PrunedViT` that a configuration fixes, all but `keep`."""
    m, parity = config["method"], config["parity"]
    return {
        **{k: m[k] for k in ("rule", "locations", "thresholds", "temperature", "score", "mask", "inference")},
        "budget": config["budget"]["target"], "extended_cost": parity["extended_cost"],
        "cumulative": not parity["separate_masks"], "row_max": "all" if parity["softmax"] else "kept",
        "eps": 1e-6 if parity["softmax"] else 0.0,
    }  # fmt: skip


def start_of(start: Mapping[str, Any]) -> str:
    """Where the starting weights come from: checkpoint | arm | pretrained | random, the first of these that is set.

    ValueError if none is, or if a checkpoint and timm's weights are."""
    if start["checkpoint"] and start["pretrained"]:
        raise ValueError("start.checkpoint and start.pretrained=true are two starts: set one of them")
    for kind in ("checkpoint", "arm", "pretrained", "random"):
        if start[kind]:
            return kind
    raise ValueError(
        "no start: set start.arm=pretrain, start.checkpoint=<file> or start.pretrained=true (start.random=true trains from "
        "random weights, as method=pretrain does)"
    )


def check(cfg: DictConfig) -> None:
    """ValueError or TypeError for every value that could only fail later, before data are read or anything is trained."""
    config = runs.plain(cfg)
    method, train, start = config["method"], config["train"], start_of(config["start"])
    weights = method["losses"]
    if negative := [f"method.losses.{k}={v}" for k, v in weights.items() if v < 0]:
        raise ValueError(f"{', '.join(negative)} must be >= 0")
    if start == "random" and (weights["distill"] or weights["token"]):
        raise ValueError(
            "method.losses.distill needs a teacher, the dense start, and start.random has none: set start.arm, .checkpoint or "
            ".pretrained, or distill and token to 0"
        )
    if train["epochs"] < 1 or (train["clip"] is not None and not train["clip"] > 0):
        raise ValueError(
            f"train.epochs={train['epochs']}, train.clip={train['clip']}: epochs must be >= 1, clip above 0 (null clips nothing)"
        )
    if train["ema"] is not None and not 0 < train["ema"] < 1:
        raise ValueError(f"train.ema={train['ema']} must lie between 0 and 1, or be null")
    if not all(0 <= b < 1 for b in config["optim"]["betas"]) or len(config["optim"]["betas"]) != 2:
        raise ValueError(f"optim.betas={config['optim']['betas']}: two numbers in 0 .. 1, 1 excluded")
    if train["mixup"]:
        Mixup(**train["mixup"], num_classes=2)  # a misspelt key fails here
        if (train["batch_size"] // train["accumulation"]) % 2:
            raise ValueError("train.mixup pairs the images of a micro-batch: their number must be even")
    _check_counts(config)
    check_data(**{**DATA, **config["data"]})
    channels = 1 if config["data"]["name"] in GREY else 3  # the stem is a part of the floor
    with torch.device("meta"):
        vit = build_vit(**config["model"]["vit"], num_classes=2, in_chans=channels)
    with torch.device("cpu"):
        # The counts of a matched arm come from a finished run: any will do here.
        keep = [0] * len(method["locations"]) if method["match"] else method["keep"]
        model = PrunedViT(vit, keep=keep, **options(config))
    if weights["budget"]:
        budget_loss(torch.ones(1), model.cost, config["budget"]["target"], form=config["budget"]["form"])


def _check_counts(config: Mapping[str, Any]) -> None:
    m = config["method"]
    if m["rule"] not in RULES:
        raise ValueError(f"rule={m['rule']!r}, allowed: {', '.join(RULES)}")
    if m["schedule"] not in SCHEDULES:
        raise ValueError(f"method.schedule={m['schedule']!r}, allowed: {', '.join(SCHEDULES)}")
    if m["match"] and (m["rule"] != "topk" or m["keep"]):
        raise ValueError(
            f"method.match={m['match']} gives top-k the counts of a finished run: it needs rule=topk and keep=null"
        )
    if m["calibrate"] is not None and (m["rule"] != "threshold" or m["calibrate"] < 1 or m["losses"]["budget"]):
        raise ValueError(
            f"method.calibrate={m['calibrate']} sets thresholds on so many images: at least 1, rule=threshold, losses.budget=0"
        )
    if m["losses"]["budget"] and m["rule"] != "threshold":
        raise ValueError(
            f"method.losses.budget={m['losses']['budget']}: rule={m['rule']} learns no thresholds, set it to 0"
        )
    if not math.isfinite(config["budget"]["target"]):
        raise ValueError(f"budget.target={config['budget']['target']} must be finite")
