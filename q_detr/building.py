"""Networks of a configuration: the real-valued DETR and its quantised student, their parameter groups and statistics."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.quant.lsq import LSQQuantizer
from q_detr.detr import DETR
from q_detr.distribution_alignment import code_entropy, query_statistics
from q_detr.official_weights import is_student_key, load_real_valued
from q_detr.quantized_detr import calibrate_alignment, calibrate_student, quantize_detr
from q_detr.smca import SMCADETR

KINDS = {"detr": (DETR, "softmax"), "smca": (SMCADETR, "focal")}
STARTS = ("teacher", "stage1", "weights", "random")
DA_INITS = ("ones", "calibrated")


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
    the queries of the real-valued transformer from which the student starts, `real` or that of stage 1."""
    if da_init not in DA_INITS:
        raise ValueError(f"method.da_init={da_init!r}, allowed: {', '.join(DA_INITS)}")
    student, source = quantize_detr(real, **quant).to(images.device), real
    if stage1 is not None:
        load_real_valued(student, stage1)
        source = quantize_detr(real, **{**quant, "parts": ["backbone"], "da": "none"}).to(images.device)
        load_real_valued(source, stage1)
    if da_init == "calibrated":
        calibrate_alignment(student, source, images, mask)
    calibrate_student(student, images, mask, percentile=percentile)
    return student


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
