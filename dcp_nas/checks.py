"""What can be wrong with the configuration of a training, found before data is read, a cell searched or a file written."""

from typing import Any

from dcp_nas.checkpoint import check_start, check_teacher, stage_path, try_network
from dcp_nas.data import SIDES, check_data
from dcp_nas.genotypes import check_genotype
from dcp_nas.search_space import random_genotype

OPTIMIZERS = ("adam", "adamw", "sgd")


def check_training(cfg: Any) -> None:
    """ValueError, FileNotFoundError or TypeError for what would otherwise be found out after the data, or a search, or never."""
    check_data(**cfg.data)
    check_genotype(cfg.genotype)
    check_start(cfg.stage, stage_path(cfg, cfg.init))
    check_teacher(cfg.teacher, stage_path(cfg, cfg.teacher))
    if cfg.optim.name not in OPTIMIZERS:
        raise ValueError(f"optim.name={cfg.optim.name!r}, allowed: {', '.join(OPTIMIZERS)}")
    positive = {
        "train.clip": cfg.train.clip,
        "train.epochs": cfg.train.epochs,
        "evaluate.batch_size": cfg.evaluate.batch_size,
    }
    if bad := [f"{k}={v}" for k, v in positive.items() if v is not None and v <= 0]:
        raise ValueError(f"{', '.join(bad)} must be positive")
    weights = {"train.auxiliary_weight": cfg.train.auxiliary_weight, "stage.reconstruction": cfg.stage.reconstruction}
    if bad := [f"{k}={v}" for k, v in (weights | dict(cfg.optim)).items() if k != "name" and v < 0]:
        raise ValueError(f"{', '.join(bad)} must not be negative")
    try_network(cfg, random_genotype(0, nodes=1), 10, 3, cfg.data.get("size") or SIDES[cfg.data.name])
