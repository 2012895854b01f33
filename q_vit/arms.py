"""What an arm is made of: a configuration that was checked before anything is read, a float teacher, a student."""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
from torch import nn
from torch.optim import Optimizer

from common.data.batches import stream
from common.loop import once
from common.quant.lsq import calibrate
from q_vit.data import Data, check_data, look
from q_vit.distribution_guided_distillation import dgd_loss
from q_vit.model import (
    build_float,
    build_student,
    check_stress,
    load_weights,
    parameter_groups,
    published_classes,
    stress,
)
from q_vit.quantized_vit import Tapped, quantize_vit
from q_vit.schedule import lr_at

CHOICES = {"distill": ("hard", "none"), "start": ("teacher", "random"), "irm_init": ("calibrated", "unit")}


class Arm(NamedTuple):
    """student: with every step set; teacher: frozen, None for the float network; note: what a preflight had to make up."""

    student: nn.Module
    teacher: nn.Module | None
    note: str = ""


def is_float(method: Mapping[str, Any]) -> bool:
    """Whether a method leaves the network as it is, so that it needs no teacher."""
    return method["bits"] == 32 and not method["irm"]


def make_optimizer(model: nn.Module, optim: Mapping[str, Any]) -> Optimizer:
    """An optimiser of timm by name; steps, zero points, biases, norms and rectification never decay."""
    options = dict(optim)
    groups = parameter_groups(model, options.pop("weight_decay"))
    return create_optimizer_v2(groups, opt=options.pop("name"), weight_decay=0.0, **options)


# -------------------------------------------------------------------------------------------------------------- checks
def check(cfg: DictConfig) -> None:
    """ValueError for every value that would otherwise be found out after data was read or a teacher trained.

    The networks are built on the meta device, so that names, sizes and options meet the code that uses them."""
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    method = config["method"]
    for key, allowed in CHOICES.items():
        if method[key] not in allowed:
            raise ValueError(f"method.{key}={method[key]}, allowed: {', '.join(allowed)}")
    if method["percentile"] is not None and not 50 < method["percentile"] <= 100:
        raise ValueError(f"method.percentile={method['percentile']}, allowed: above 50, at most 100")
    lr_at(0, base_lr=cfg.optim.lr, steps=1, epochs=1, **cfg.schedule)
    if is_float(method) and method["start"] == "teacher":
        raise ValueError(
            "method.bits=32 without rectification is the float network, which starts from random weights and has no teacher: "
            "use method=fp, or method.irm=true for a student that is not quantised"
        )
    check_data(**config["data"])
    if cfg.train.eval_every and not (cfg.data.validation or cfg.data.name == "folder"):
        raise ValueError(
            f"train.eval_every={cfg.train.eval_every}: there is no validation split; set images aside with data.validation"
        )
    seen = look(cfg.data.name, **{k: v for k, v in config["data"].items() if k in ("size", "crop_pct")})
    if not is_float(method):
        _check_teacher_is_there(config)
    once(
        _step_on_shapes,
        json.dumps({"seen": seen} | {key: config[key] for key in ("method", "model", "optim", "teacher")}),
    )


def _step_on_shapes(parts: str) -> None:
    """A tenth of a second, and the same for all seeds and rates of a sweep."""
    config = json.loads(parts)
    method, seen = config["method"], config["seen"]
    model = _on_meta(config["model"], seen)
    student = quantize_vit(model, bits=method["bits"], irm=method["irm"], **method["quant"])
    try:
        make_optimizer(nn.Linear(1, 1), config["optim"])
    except ValueError as error:
        raise ValueError(f"optim.name={config['optim']['name']}: {error}") from error
    if not is_float(method):
        Tapped(student, method["dgd"]["student_tap"])
        _check_teacher(config, seen, model)


def _check_teacher_is_there(config: Mapping[str, Any]) -> None:
    weights, options = config["teacher"]["weights"], config["model"] | (config["teacher"]["model"] or {})
    if weights not in (None, "auto") and not Path(weights).expanduser().is_file():
        raise FileNotFoundError(f"no teacher at {weights} (teacher.weights): give a checkpoint, auto or null")
    if weights is None and not options.get("pretrained", False):
        raise ValueError("teacher.weights is null and the model is not pretrained: the teacher would be random")


def _on_meta(options: Mapping[str, Any], seen: Mapping[str, Any]) -> nn.Module:
    """The float network without weights. ValueError where it is not made for the images of the data set."""
    try:
        with torch.device("meta"):
            model = build_float(
                **{**options, "pretrained": False, "file": None}, num_classes=2, in_channels=seen["channels"]
            )
    except AssertionError as error:
        raise ValueError(f"model: {error}") from error
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None and tuple(size) != (seen["size"], seen["size"]):
        raise ValueError(
            f"the model is made for images of {size[0]} x {size[1]}, the data set gives {seen['size']}: set "
            f"{'' if 'img_size' in options else '+'}model.img_size={seen['size']} or data.size={size[0]}"
        )
    return model


def _check_teacher(config: Mapping[str, Any], seen: Mapping[str, Any], model: nn.Module) -> None:
    method, teacher, options = config["method"], config["teacher"], config["model"]
    dgd = dict(method["dgd"])
    if teacher["model"] and method["start"] == "teacher" and not options.get("pretrained"):
        raise ValueError(
            "method.start=teacher, but teacher.model makes the teacher another network: use method.start=random, or a student "
            "with model.pretrained=true"
        )
    other = _on_meta(options | (teacher["model"] or {}), seen)
    if teacher["stress"]:
        check_stress(other, **teacher["stress"])
    weight, _ = dgd.pop("weight"), dgd.pop("student_tap")
    if not 0 <= weight < float("inf"):
        raise ValueError(f"method.dgd.weight={weight}, allowed: >= 0")
    images = torch.empty(2, seen["channels"], seen["size"], seen["size"], device="meta")
    (_, ours), (_, theirs) = (Tapped(m.eval(), "raw")(images) for m in (model, other))
    if weight:
        dgd_loss(
            ours, theirs, prefix=(getattr(model, "num_prefix_tokens", 0), getattr(other, "num_prefix_tokens", 0)), **dgd
        )
    else:
        dgd_loss(ours, ours, **dgd)


def notices(cfg: DictConfig, world: int) -> list[str]:
    """What makes the numbers of several devices or micro-steps differ from those of one whole batch."""
    quant, found = cfg.method.quant, []
    rule = quant.grad_scale or ("official" if quant.preset == "official" else "per_group")
    if world * cfg.train.accumulation > 1 and cfg.method.bits < 32 and rule == "official":
        found.append(
            "notice: the released rule scales the gradient of a step by the images of one micro-batch of one device, so the "
            "numbers differ from those of the whole batch; method.quant.grad_scale=per_group does not"
        )
    if world > 1 and cfg.method.irm and quant.irm_stats == "tensor":
        found.append("notice: irm_stats=tensor takes the statistics of each device by itself")
    return found


# --------------------------------------------------------------------------------------------------- teacher, student
def build(cfg: DictConfig, data: Data, weights: Path | None) -> Arm:
    """The networks of a configuration, with weights drawn from its seed and every step set.

    weights: of the teacher; None takes timm's, or in a preflight a network of that shape as it is drawn."""
    torch.manual_seed(stream(cfg.seed))
    method, own = cfg.method, cfg.teacher.model or {}
    options: Any = OmegaConf.to_container(cfg.model)
    options |= {"num_classes": len(data.names), "in_channels": data.look["channels"]}
    if is_float(method):
        return Arm(build_float(**options), None)
    start = None
    if method.start == "random":
        start = build_float(**{**options, "pretrained": False, "file": None})
    elif own:
        start = build_float(**options)
    teacher, note = _teacher({**options, **own}, data, weights, auto=cfg.teacher.weights == "auto")
    images = data.first(cfg.train.calibration_images, cfg.seed)
    if cfg.teacher.stress:
        stress(teacher, images, **cfg.teacher.stress)
    start = teacher if start is None else start
    student = build_student(start, images, irm=method.irm, irm_init=method.irm_init, bits=method.bits, **method.quant)
    if method.percentile is not None:
        with calibrate(student, percentile=method.percentile), torch.no_grad():
            student(images)
    return Arm(student, teacher.eval().requires_grad_(False), note)


def _teacher(options: dict[str, Any], data: Data, weights: Path | None, *, auto: bool) -> tuple[nn.Module, str]:
    """(float network with its weights, a note). ValueError where they were made for other classes or another normalisation."""
    if weights is not None:
        teacher = build_float(**{**options, "pretrained": False, "file": None})
        about = load_weights(teacher, weights)
        for key, mine in (("classes", data.names), ("normalise", data.look["normalise"])):
            if key in about and about[key] != mine:
                raise ValueError(
                    f"the teacher {weights} was trained with other {key}: {about[key]}, the data has {mine}"
                )
        return teacher, ""
    if auto:
        return build_float(
            **{**options, "pretrained": False, "file": None}
        ), "the teacher is a network of its shape, not trained"
    published = published_classes(options["name"])
    if published is not None and published != len(data.names):
        raise ValueError(
            f"the pretrained teacher {options['name']} has {published} classes, the data has {len(data.names)}: its head would "
            "be random. Train one with method=fp, then teacher.weights=<its last.ckpt>"
        )
    return build_float(**options), ""


def digest(model: nn.Module) -> str:
    """A short hash of the weights of a network."""
    found = sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]
