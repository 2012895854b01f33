"""Networks of a configuration: the real-valued DETR, its quantised student, both from a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import runs
from common.quant.lsq import LSQQuantizer
from q_detr.checkpoint import is_student_key, load_real_valued, official_state
from q_detr.detr import DETR
from q_detr.distribution_alignment import code_entropy, query_statistics
from q_detr.quantized_detr import calibrate_alignment, calibrate_student, quantize_detr
from q_detr.smca import SMCADETR

KINDS = {"detr": (DETR, "softmax"), "smca": (SMCADETR, "focal")}
STARTS = ("teacher", "stage1", "weights", "random")


def build_real(kind: str, *, num_classes: int, **options: Any) -> DETR:
    """A real-valued network: kind detr | smca, options as `DETR`."""
    if kind not in KINDS:
        raise ValueError(f"model.kind={kind!r}, allowed: {', '.join(KINDS)}")
    return KINDS[kind][0](num_classes=num_classes, **options)


def build_student(
    real: DETR, images: Tensor, mask: Tensor, *, quant: Mapping[str, Any], da_init: str = "ones",
    percentile: float | None = None, stage1: Mapping[str, Any] | None = None,
) -> DETR:  # fmt: skip
    """The student of a real-valued network with every step set from one batch.

    stage1: state of a network whose backbone is quantised already; its steps are kept. da_init: gamma "ones", or "calibrated" by
    the queries of `real`."""
    if da_init not in ("ones", "calibrated"):
        raise ValueError(f"method.da_init={da_init!r}, allowed: ones, calibrated")
    student = quantize_detr(real, **quant).to(images.device)
    if stage1 is not None:
        load_real_valued(student, stage1)
    if da_init == "calibrated":
        calibrate_alignment(student, real, images, mask)
    calibrate_student(student, images, mask, percentile=percentile)
    return student


def rebuild(path: str | Path) -> tuple[DETR, dict[str, Any]]:
    """(network in evaluation mode, checkpoint) of a checkpoint of train.py. ValueError for another file."""
    state = runs.load_checkpoint(path)
    if missing := {"model", "config", "classes"} - state.keys():
        raise ValueError(f"{path} is no checkpoint of q_detr/train.py: it lacks {', '.join(sorted(missing))}")
    config = state["config"]
    model = build_real(**{**config["model"], "weights": None}, num_classes=state["classes"])
    if config["method"]["quantised"]:
        model = quantize_detr(model, **config["method"]["quant"])
    model.load_state_dict(state["model"])
    return model.eval(), state


def official_options(state: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of `build_real` for an official state dict, read from its keys and shapes (heads are 8 in all of them).

    ValueError if it is none of DETR or SMCA-DETR."""
    state = official_state(state)
    body = "backbone.0.body."
    if "class_embed.weight" not in state or f"{body}conv1.weight" not in state:
        raise ValueError(
            "neither a checkpoint of q_detr/train.py nor weights of DETR or SMCA-DETR with a ResNet backbone"
        )
    bottleneck, deep = f"{body}layer1.0.conv3.weight" in state, f"{body}layer3.22.conv1.weight" in state
    depths = {
        side: len({k.split(".")[3] for k in state if k.startswith(f"transformer.{side}.layers.")})
        for side in ("encoder", "decoder")
    }
    queries, width = state["query_embed.weight"].shape
    classes, dim = state["class_embed.weight"].shape
    smca = any(".point2." in k for k in state)
    found = {
        "kind": "smca" if smca else "detr", "num_classes": classes - 1, "queries": queries, "dim": dim,
        "backbone": "resnet101" if deep else "resnet50" if bottleneck else "resnet18",
        "ffn": len(state["transformer.encoder.layers.0.linear1.weight"]),
        "encoder_layers": depths["encoder"], "decoder_layers": depths["decoder"],
    }  # fmt: skip
    return found | ({"learned_content": width == 2 * dim} if smca else {})


def load_official(path: str | Path) -> tuple[DETR, str]:
    """(real-valued network in evaluation mode, its loss kind) of official DETR or SMCA-DETR weights."""
    state = runs.load_checkpoint(path)
    options = official_options(state)
    model = build_real(**options)
    load_real_valued(model, state)
    return model.eval(), KINDS[options["kind"]][1]


def parameter_groups(model: DETR, *, lr: float, backbone_lr: float, weight_decay: float, quant_lr: float) -> list[dict]:
    """Backbone at its own rate; what the student has besides the real-valued network at quant_lr, without weight decay."""
    groups: dict[str, list[nn.Parameter]] = {"main": [], "backbone": [], "quantiser": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            group = "quantiser" if is_student_key(name) else "backbone" if name.startswith("backbone") else "main"
            groups[group].append(p)
    rates = {"main": lr, "backbone": backbone_lr, "quantiser": quant_lr}
    return [
        {"params": ps, "lr": rates[k], "base_lr": rates[k], "weight_decay": 0.0 if k == "quantiser" else weight_decay}
        for k, ps in groups.items()
        if ps
    ]


@torch.no_grad()
def keep_steps_positive(model: nn.Module) -> None:
    """Steps that an update took to zero or below go back to the smallest that is used."""
    for m in model.modules():
        if isinstance(m, LSQQuantizer):
            m.step.clamp_(min=1e-5)


@torch.no_grad()
def cross_attention_statistics(model: DETR, images: Tensor, mask: Tensor) -> dict[str, float]:
    """`query_statistics` of the decoder's cross-attention queries as they enter the quantiser, mean over layers; with a quantiser
    also `query_code_entropy`, that of its codes in bits."""
    seen: list[dict[str, float]] = []

    def look(attention: Any, args: tuple) -> None:
        (q,) = args
        found = query_statistics(q)
        if isinstance(attention.quant_q, LSQQuantizer):
            found["query_code_entropy"] = code_entropy(attention.quant_q.codes(q))
        seen.append(found)

    hooks = [
        layer.multihead_attn.quant_q.register_forward_pre_hook(lambda m, args, a=layer.multihead_attn: look(a, args))
        for layer in model.transformer["decoder"].layers  # type: ignore[union-attr]
    ]
    model(images, mask)
    for hook in hooks:
        hook.remove()
    return {k: sum(s[k] for s in seen) / len(seen) for k in seen[0]}
