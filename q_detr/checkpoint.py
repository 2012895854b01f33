"""Official real-valued weights into a DETR or a quantised student."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from common import runs
from q_detr.detr import DETR

# What a student has besides the parameters of a real-valued DETR.
QUANTISER = ("step", "zero_point", "calibrated", "is_signed")
STUDENT = (".act0.", ".act1.", ".act2.", ".act3.", ".acts.", ".align.", ".relu.")


def is_student_key(key: str) -> bool:
    """Whether a state entry belongs to the student alone: quantiser, RPReLU, stem PReLU, convolution bias or DA."""
    backbone_bias = ".layer" in key and ".conv" in key and key.endswith(".bias")
    return key.rpartition(".")[2] in QUANTISER or any(s in key for s in STUDENT) or backbone_bias


def load_real_valued(model: DETR, state: Mapping[str, Any], *, new_classes: bool = False) -> list[str]:
    """Load a real-valued state dict (official: {"model": ...}) in place; returns the keys that stay as they are.

    A real-valued model must find all of its keys; in a student exactly those of `is_student_key` may be missing. new_classes:
    keep the model's own class_embed where the number of classes differs. ValueError names keys and shapes that do not fit."""
    tensors: dict[str, Tensor] = dict(state.get("model", state))
    own = model.state_dict()
    wrong = [k for k in own if k in tensors and tensors[k].shape != own[k].shape]
    left = [k for k in wrong if new_classes and k.startswith("class_embed.")]
    for key in left:
        del tensors[key]
    wrong = [k for k in wrong if k not in left]
    missing = [k for k in own if k not in tensors and k not in left and not is_student_key(k)]
    extra = [k for k in tensors if k not in own]
    if missing or extra or wrong:
        shapes = [f"{k} {tuple(tensors[k].shape)} for {tuple(own[k].shape)}" for k in wrong]
        parts = [
            f"{len(ks)} {what}, e.g. {ks[0]}"
            for what, ks in (("missing", missing), ("not in the model", extra), ("of another shape", shapes))
            if ks
        ]
        hint = " (another number of classes: new_classes=true keeps the rest)" if "class_embed" in str(shapes) else ""
        raise ValueError(f"the weights do not fit the model: {'; '.join(parts)}{hint}")
    return sorted(model.load_state_dict(tensors, strict=False).missing_keys)


def load_weights(model: DETR, path: str | Path, *, new_classes: bool = False) -> list[str]:
    """`load_real_valued` from a file; FileNotFoundError or `runs.RunError` if it cannot be read."""
    return load_real_valued(model, runs.load_checkpoint(path), new_classes=new_classes)


def student_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that get no weight decay: those of the student alone."""
    return [n for n, _ in model.named_parameters() if is_student_key(n)]
