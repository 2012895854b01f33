"""The values of a configuration of train.py, all checked before data is read or a teacher trained."""

import math
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from common.metrics.detection import DIFFICULT
from q_detr.building import DA_INITS, STARTS, build_real
from q_detr.data import check_data
from q_detr.detr import DETR, check_backbone_weights
from q_detr.distribution_rectification import check_options
from q_detr.quantized_detr import quantize_detr
from q_detr.schedule import lr_factor


def check(cfg: DictConfig) -> None:
    """ValueError, or FileNotFoundError for a file of weights, naming what cannot be."""
    check_data(cfg.data)
    lr_factor(0, steps=1, **cfg.schedule)
    if not (cfg.train.clip_norm > 0 and math.isfinite(cfg.train.clip_norm)):
        raise ValueError(f"train.clip_norm={cfg.train.clip_norm}, allowed: > 0")
    if cfg.evaluate.difficult not in DIFFICULT:
        raise ValueError(f"evaluate.difficult={cfg.evaluate.difficult!r}, allowed: {', '.join(DIFFICULT)}")
    if (floor := cfg.evaluate.floor) is not None and not (isinstance(floor, int | float) and 0 <= floor <= 100):
        raise ValueError(f"evaluate.floor={floor}, allowed: null or a number in 0..100")
    for key in ("teacher.weights", "start.weights"):
        if (path := OmegaConf.select(cfg, key)) and not Path(path).expanduser().is_file():
            raise FileNotFoundError(f"no checkpoint at {path} ({key})")
    _check_method(cfg)
    _check_networks(cfg)


def _check_method(cfg: DictConfig) -> None:
    method = cfg.method
    for key, value, allowed in (("start", method.start, STARTS), ("da_init", method.da_init, DA_INITS)):
        if value not in allowed:
            raise ValueError(f"method.{key}={value!r}, allowed: {', '.join(allowed)}")
    if method.start == "weights" and cfg.start.weights is None:
        raise ValueError("method.start=weights needs start.weights=<checkpoint or official weights>")
    if not method.quantised and method.start not in ("random", "weights"):
        raise ValueError(f"method.start={method.start}: the real-valued network starts at random or from weights")
    if method.start == "teacher" and cfg.teacher.model:
        raise ValueError("method.start=teacher needs teacher.model={}: networks of one shape. Use method.start=weights")
    if method.percentile is not None and not 50 < method.percentile <= 100:
        raise ValueError(f"method.percentile={method.percentile}, allowed: null or a number in (50, 100]")
    drd = OmegaConf.to_container(method.drd, resolve=True)
    weight, of = drd.pop("weight"), drd.pop("lambda_for_layers")  # type: ignore[union-attr, call-arg]
    if weight < 0 or (of is not None and of < 1):
        raise ValueError(f"method.drd.weight={weight} must be >= 0, lambda_for_layers={of} null or >= 1")
    if weight and not method.quantised:
        raise ValueError(f"method.drd.weight={weight}: a real-valued network has no teacher to learn from")
    check_options(**drd)  # type: ignore[arg-type]


def _check_networks(cfg: DictConfig) -> None:
    """Builds both networks without memory."""
    options = OmegaConf.to_container(cfg.model, resolve=True)
    if cfg.method.start == "random" and options["weights"] is not None:  # type: ignore[index, call-overload]
        check_backbone_weights(options["backbone"], options["weights"])  # type: ignore[index, call-overload]

    def shape(**changes: object) -> DETR:
        with torch.device("meta"):
            return build_real(**{**options, **changes, "weights": None}, num_classes=2)  # type: ignore[dict-item]

    model = shape()
    if not cfg.method.quantised:
        return
    quantize_detr(model, **OmegaConf.to_container(cfg.method.quant, resolve=True))  # type: ignore[arg-type]
    teacher = shape(**OmegaConf.to_container(cfg.teacher.model, resolve=True))  # type: ignore[arg-type]
    sizes = [(m.dim, len(m.transformer["decoder"].layers)) for m in (model, teacher)]  # type: ignore[arg-type]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the student has width {sizes[0][0]} and {sizes[0][1]} decoder layers, the teacher {sizes[1][0]} and {sizes[1][1]}: "
            "teacher.model must leave both as they are"
        )
    if cfg.method.drd.partner == "index" and model.queries != teacher.queries:
        raise ValueError(
            f"method.drd.partner=index: {model.queries} student queries for {teacher.queries} teacher queries"
        )
