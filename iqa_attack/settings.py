"""The settings of train.py, checked before anything is read."""

from typing import Any

from omegaconf import DictConfig

from common import runs
from iqa_attack.photographs.data import check_data_options
from iqa_attack.quality_models.models import KINDS, build_network
from iqa_attack.quality_models.statistics import check_statistics

NETWORKS = ("ma19", "unique")
LOWEST = {"epochs": 1, "batch_size": 2, "lr_step": 1, "crop": 24, "resize": 24, "test_resize": 24, "frozen_epochs": 0}


def options_of(cfg: DictConfig, name: str) -> dict[str, Any]:
    """networks.<name>, with train.epochs and train.batch_size in place of its own where they are given."""
    return {**cfg.networks[name], **{k: cfg.train[k] for k in ("epochs", "batch_size") if cfg.train[k] is not None}}


def check_training(cfg: DictConfig, world: int) -> None:
    """ValueError (TypeError for a misspelt key) for what would otherwise be found out late, before any data is read."""
    names = list(cfg.method.models)
    if unknown := set(names) - set(KINDS):
        raise ValueError(f"method.models names {sorted(unknown)}, allowed: {', '.join(KINDS)}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"method.models={names}: name at least one model, and none twice")
    check_data_options(cfg.data.kind, cfg.data)
    if cfg.data.get("attack_only"):
        raise ValueError(
            "data.attack_only=true leaves nothing to train on: use data=live, sets, photos or photo_folder"
        )
    if cfg.data.kind == "folder":
        raise ValueError("data=folder has no opinions to learn from: use photos, photo_folder, live or sets")
    for name in names:
        if cfg.data.kind == "sets" and name in ("ma19", "niqe"):
            needs = {"ma19": "learns from full-reference annotators", "niqe": "is fitted on pristine photographs"}[name]
            raise ValueError(f"{name} {needs} and needs undistorted originals: use data=photos or data=photo_folder")
        if name not in NETWORKS:
            check_statistics(name, cfg.statistics[name], cfg.data.get("root"))
            continue
        options = options_of(cfg, name)
        runs.per_device_batch(options["batch_size"], world)
        for key, low in LOWEST.items():
            if options[key] is not None and options[key] < low:
                raise ValueError(f"networks.{name}.{key}={options[key]}, allowed: >= {low}")
        build_network(name, **cfg.networks[name].model)  # a misspelt key stops here
