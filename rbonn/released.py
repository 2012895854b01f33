"""Checkpoints of the published codes: ReActNet (ResNet-18/34 and ReActNet-A) and RBONN (ResNet-18), loaded by key.

Layout: the state dict itself or under "state_dict", names with or without the "module." of nn.DataParallel. ReActNet-A keeps its
binary weights as (N, 1) columns under `weights`."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rbonn.model import RESNETS
from rbonn.network import build_network

_RESNET = [
    (r"\.move0\.bias$", ".sign.bias"), (r"\.binary_conv\.weights?$", ".conv.weight"), (r"\.binary_conv\.", ".conv."),
    (r"(layer\d+\.\d+)\.bn1\.", r"\1.norm."), (r"\.move1\.bias$", ".act.shift_in"), (r"\.prelu\.weight$", ".act.slope"),
    (r"\.move2\.bias$", ".act.shift_out"), (r"\.downsample\.", ".shortcut."),
]  # fmt: skip
_REACTNET_A = [
    (r"^feature\.0\.conv1\.", "stem.0."), (r"^feature\.0\.bn1\.", "stem.1."),
    (r"\.move11\.bias$", ".sign1.bias"), (r"\.move21\.bias$", ".sign2.bias"),
    (r"\.binary_3x3\.", ".conv1."), (r"\.binary_pw\.", ".conv2.0."), (r"\.binary_pw_down1\.", ".conv2.0."),
    (r"\.binary_pw_down2\.", ".conv2.1."), (r"\.bn1\.", ".norm1."), (r"\.bn2\.", ".norm2.0."), (r"\.bn2_1\.", ".norm2.0."),
    (r"\.bn2_2\.", ".norm2.1."), (r"\.move12\.bias$", ".act1.shift_in"), (r"\.prelu1\.weight$", ".act1.slope"),
    (r"\.move13\.bias$", ".act1.shift_out"), (r"\.move22\.bias$", ".act2.shift_in"), (r"\.prelu2\.weight$", ".act2.slope"),
    (r"\.move23\.bias$", ".act2.shift_out"), (r"\.weights$", ".weight"),
]  # fmt: skip


def is_released(state: Mapping) -> bool:
    """Whether `state` has the names of the published codes."""
    return any(re.search(r"\.move(0|11)\.bias$", str(k)) for k in _state(state))


def load_released(state: Mapping, *, zero: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """(network of a published checkpoint in evaluation mode, the arguments of `build_network` that make it).

    state: what torch.load gives. Depth, classes and kind (RBONN has scale_factor, ReActNet has not) follow from its keys.
    zero: value of sign(0); the published codes use 0. ValueError naming missing, unexpected or misshapen entries."""
    tensors = _state(state)
    if not is_released(state) or "fc.weight" not in tensors:
        raise ValueError(
            "no ReActNet or RBONN checkpoint: it has no '<block>.move0.bias', '<block>.move11.bias' or 'fc.weight'"
        )
    bilinear = any(k.endswith(".scale_factor") for k in tensors)
    method = {"weights": "bilinear", "recurrent": "drelu_official"} if bilinear else {"weights": "xnor"}
    build: dict[str, Any] = {"method": {**method, "activations": "binary"}, "sign_zero": zero}
    build |= {"classes": len(tensors["fc.weight"]), "channels": 3, "model": {"name": "reactnet_a"}}
    if any(".move11." in k for k in tensors):
        renamed = {
            re.sub(r"^feature\.(\d+)", lambda m: f"blocks.{int(m[1]) - 1}", k): v
            for k, v in _rename(tensors, _REACTNET_A)
        }
    else:
        counts = tuple(
            len({k.split(".")[1] for k in tensors if k.startswith(f"layer{i}.")}) for i in range(1, 5)
        )  # fmt: skip
        if counts not in RESNETS.values():
            raise ValueError(f"blocks per stage {counts}, known: {', '.join(map(str, RESNETS.values()))}")
        build["model"] = {"name": "react_resnet", "layers": list(counts)}
        renamed = dict(_rename(tensors, _RESNET))
    model = build_network(**build)
    expected = model.state_dict()
    for k, v in renamed.items():  # (N, 1) columns of ReActNet-A
        if k in expected and v.shape != expected[k].shape and v.shape == (expected[k].numel(), 1):
            renamed[k] = v.view_as(expected[k])
    wrong = [f"missing {k}" for k in expected.keys() - renamed.keys()] + [
        f"unexpected {k}" for k in renamed.keys() - expected.keys()
    ]
    wrong += [
        f"{k} {tuple(renamed[k].shape)} instead of {tuple(v.shape)}"
        for k, v in expected.items()
        if k in renamed and renamed[k].shape != v.shape
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} entries do not fit: {'; '.join(sorted(wrong)[:5])}")
    model.load_state_dict(renamed)
    return model.eval(), build


def _state(state: Mapping) -> dict[str, Tensor]:
    inner = state.get("state_dict", state)
    inner = inner if isinstance(inner, Mapping) else {}
    return {str(k).removeprefix("module."): v for k, v in inner.items() if isinstance(v, Tensor)}


def _rename(tensors: Mapping[str, Tensor], rules: list[tuple[str, str]]):
    for key, value in tensors.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        yield key, value
