"""Released real-valued weights of DETR and SMCA-DETR, also in the layout of Hugging Face, into a DETR or a quantised student."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import runs
from q_detr.detr import DETR

# What a student has besides the parameters of a real-valued DETR.
QUANTISER = ("step", "zero_point", "calibrated", "is_signed")
STUDENT = (".act0.", ".act1.", ".act2.", ".act3.", ".acts.", ".align.", ".relu.")

BODY = r"^model\.backbone\.(?:conv_encoder\.)?model\.(?:_backbone\.)?"
# Names of transformers' DetrForObjectDetection (versions 4 and 5, ResNet of timm or its own) and what they become, in turn.
HUGGING_FACE = tuple(
    (re.compile(pattern), official)
    for pattern, official in (
        (BODY + r"embedder\.embedder\.convolution\.", "backbone.0.body.conv1."),
        (BODY + r"embedder\.embedder\.normalization\.", "backbone.0.body.bn1."),
        (BODY + r"encoder\.stages\.(\d+)\.layers\.", lambda m: f"backbone.0.body.layer{int(m[1]) + 1}."),
        (BODY, "backbone.0.body."),
        (r"\.shortcut\.convolution\.", ".downsample.0."),
        (r"\.shortcut\.normalization\.", ".downsample.1."),
        (r"\.layer\.(\d)\.convolution\.", lambda m: f".conv{int(m[1]) + 1}."),
        (r"\.layer\.(\d)\.normalization\.", lambda m: f".bn{int(m[1]) + 1}."),
        (r"^class_labels_classifier\.", "class_embed."),
        (r"^bbox_predictor\.", "bbox_embed."),
        (r"^model\.input_projection\.", "input_proj."),
        (r"^model\.query_position_embeddings\.", "query_embed."),
        (r"^model\.(encoder|decoder)\.layernorm\.", r"transformer.\1.norm."),
        (r"^model\.(encoder|decoder)\.layers\.", r"transformer.\1.layers."),
        (r"\.(?:mlp\.)?fc([12])\.", r".linear\1."),
        (r"\.self_attn_layer_norm\.", ".norm1."),
        (r"\.encoder_attn_layer_norm\.", ".norm2."),
        (r"(encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
        (r"(decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
        (r"\.encoder_attn\.", ".multihead_attn."),
        (r"\.o_proj\.", ".out_proj."),
    )
)


def from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers' DetrForObjectDetection with the names of the official checkpoints, q, k and v joined to
    in_proj. A name that is not known stays, so that loading can report it; counters of BatchNorm go.

    ValueError if one of q, k and v is missing."""
    official: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        for pattern, replacement in HUGGING_FACE:
            key = pattern.sub(replacement, key)
        if found := re.fullmatch(r"(.*attn\.)([qkv])_proj\.(weight|bias)", key):
            parts.setdefault(f"{found[1]}in_proj_{found[3]}", {})[found[2]] = tensor
        else:
            official[key] = tensor
    for key, qkv in parts.items():
        if len(qkv) < 3:
            raise ValueError(f"{key} is made of q, k and v, but there is only {', '.join(qkv)}")
        official[key] = torch.cat([qkv["q"], qkv["k"], qkv["v"]])
    return official


def official_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by official names: {"model": tensors}, the tensors, or the layout of Hugging Face."""
    tensors = dict(state["model"] if isinstance(state.get("model"), Mapping) else state)
    return from_hugging_face(tensors) if any(k.startswith("model.") for k in tensors) else tensors


def is_student_key(key: str) -> bool:
    """Whether a state entry belongs to the student alone: quantiser, RPReLU, stem PReLU, convolution bias or DA."""
    backbone_bias = ".layer" in key and ".conv" in key and key.endswith(".bias")
    return key.rpartition(".")[2] in QUANTISER or any(s in key for s in STUDENT) or backbone_bias


def load_real_valued(model: DETR, state: Mapping[str, Any], *, new_classes: bool = False) -> list[str]:
    """Load a real-valued state dict (see `official_state`) in place; returns the keys that stay as they are.

    A real-valued model must find all of its keys; in a student exactly those of `is_student_key` may be missing. new_classes:
    keep the model's own class_embed where the number of classes differs. ValueError names keys and shapes that do not fit."""
    tensors = official_state(state)
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
