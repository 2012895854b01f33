"""Weights in the formats in which they are published, by key: face.evoLVe's IR-50, the old 768-wide "ViT-small", the
released APViT. Key names and layouts follow those projects; their files were not available here, see the README."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ap_fer.ir50 import IR50, UNITS
from ap_fer.model import APViT
from ap_fer.pooling_vit import PoolingViT
from common import runs

State = dict[str, Tensor]


def read_state(path: str | Path) -> State:
    """The tensors of a checkpoint by key, also below "state_dict" or "model", without "module." in front.

    FileNotFoundError, `runs.RunError` for a broken file or one with pickled objects, ValueError without tensors."""
    content = runs.load_checkpoint(path)
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    state = {k.removeprefix("module."): v for k, v in content.items() if isinstance(v, Tensor)}
    if not state:
        raise ValueError(f"{path} holds no tensors by name")
    return state


def load_ir50(extractor: nn.Module, state: Mapping[str, Tensor]) -> None:
    """face.evoLVe's IR-50 into the stem. Its 24 units are numbered through (body.<0..23>): 3, 4, 14 and a fourth stage of 3,
    which is left out like the output layer."""
    if not isinstance(extractor, IR50):
        raise ValueError(f"start.ir50 is for stem=ir50, this model's stem is {type(extractor).__name__}")
    found: State = {}
    for key, value in state.items():
        flat = re.fullmatch(r"body\.(\d+)\.((?:res|shortcut)_layer\..+)", key)
        if flat is None:
            if key.startswith("input_layer."):
                found[key] = value
            continue
        unit = int(flat[1])
        for stage, number in enumerate(UNITS):
            if unit < number:
                found[f"body.{stage}.{unit}.{flat[2]}"] = value
                break
            unit -= number
    _load(extractor, found, "face.evoLVe IR-50 (input_layer.*, body.<0..23>.*)", unused=len(state) - len(found))


def load_vit_small(vit: PoolingViT | None, state: Mapping[str, Tensor]) -> None:
    """The old timm "ViT-small" (768 wide, 8 blocks, 8 heads, MLP ratio 3) into the transformer: blocks, norm, class token; its
    position table is split into P_cls (row 0) and P (resized bilinearly where the grid differs); patch embedding and the
    1000-way head are dropped, the projection stays new.

    Raises ValueError for another network, such as today's timm vit_small_patch16_224 (384 wide)."""
    if vit is None:
        raise ValueError("start.vit is for a model with transformer blocks, this one has none (depth=0)")
    wanted = {"cls_token", "pos_embed"}
    if missing := wanted - set(state):
        raise ValueError(f"not a ViT checkpoint: it lacks {', '.join(sorted(missing))}")
    width, ours = state["cls_token"].shape[-1], vit.cls_token.shape[-1]
    blocks = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    if width != ours or blocks != len(vit.blocks):
        raise ValueError(
            f"this ViT is {width} wide with {blocks} blocks, the model {ours} with {len(vit.blocks)}. APViT starts from the old "
            "timm ViT-small (vit_small_p16_224-15ec54c9.pth: 768 wide, 8 blocks); today's vit_small_patch16_224 (384 wide, 12 "
            "blocks) is another network"
        )
    found = {k: v for k, v in state.items() if k.startswith(("blocks.", "norm.")) or k == "cls_token"}
    table = state["pos_embed"]
    found |= {"cls_pos_embed": table[:, :1], "patch_pos_embed": resize_position(table[:, 1:], vit.grid)}
    new = [k for k in vit.state_dict() if k.startswith(("projs.", "app."))]
    _load(vit, found, "old timm ViT-small", unused=len(state) - len(found) + 1, new=new)  # one table became two


def load_released(model: APViT, state: Mapping[str, Tensor]) -> None:
    """The released APViT (extractor.*, vit.*, head.fc.*) into a model of the same shape; the position table is resized."""
    if "head.fc.weight" not in state or not any(k.startswith("extractor.") for k in state):
        raise ValueError("not a released APViT checkpoint: its keys are extractor.*, vit.*, head.fc.*")
    if model.vit is None:
        raise ValueError("the released APViT has transformer blocks, this model has none (depth=0)")
    found, classes = dict(state), len(state["head.fc.weight"])
    if classes != model.num_classes:
        raise ValueError(f"the checkpoint has {classes} classes, the data set {model.num_classes}")
    if "vit.patch_pos_embed" in found:
        found["vit.patch_pos_embed"] = resize_position(found["vit.patch_pos_embed"], model.vit.grid)
    _load(model, found, "released APViT")


def resize_position(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch position table (1, N, d) of a square grid -> (1, grid[0] * grid[1], d), bilinear; the same grid: unchanged.

    Raises ValueError if N is no square."""
    n, side = table.shape[1], math.isqrt(table.shape[1])
    if side * side != n:
        raise ValueError(
            f"the position table has {n} rows, not those of a square grid; train positions for grids that are not square"
        )
    if (side, side) == tuple(grid):
        return table
    square = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bilinear", align_corners=False)
    return resized.flatten(2).transpose(1, 2)


def _load(
    module: nn.Module, state: Mapping[str, Tensor], what: str, *, unused: int = 0, new: Sequence[str] = ()
) -> None:
    """Strict by key and shape, with one error that names what differs, or one line that says what was loaded. unused: tensors of
    the file that this network has no place for; new: its own that no such file has."""
    own: Any = module.state_dict()
    counters = {k for k in own if k.endswith("num_batches_tracked")}  # old files do not have them
    missing, unexpected = sorted(set(own) - set(state) - counters - set(new)), sorted(set(state) - set(own))
    shapes = [
        f"{k} {tuple(v.shape)} for {tuple(own[k].shape)}"
        for k, v in state.items()
        if k in own and v.shape != own[k].shape
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"these weights are not those of {what} for this model: missing {missing[:3]}, unexpected {unexpected[:3]}, "
            f"other shapes {shapes[:3]}"
        )
    module.load_state_dict(dict(state), strict=False)
    untouched = f"; from random weights: {', '.join(new)}" if new else ""
    print(f"loaded {what}: {len(state)} tensors, {unused} of the file not used{untouched}")
