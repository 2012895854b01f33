"""Checkpoints of the released code by key: its names, its state flags and what they become here.

A released layer holds `alpha`, `init_state` and, for its input, `act.{alpha, zero_point, init_state, signed}`; attention holds
`norm_q`, `norm_k` and `q_act`, `k_act`, `v_act`, `attn_act`. The architecture is the distilled DeiT with rectification."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import runs
from q_vit.model import build_float
from q_vit.quantized_vit import quantize_vit

FIELDS = {"alpha": "step", "zero_point": "zero_point", "init_state": "calibrated", "signed": "is_signed"}
QUANTIZERS = {"q_act": "q_quantizer", "k_act": "k_quantizer", "v_act": "v_quantizer", "attn_act": "p_quantizer"}
SIZES = {192: "tiny", 384: "small", 768: "base"}


def is_released(state: Mapping) -> bool:
    """Whether a checkpoint (or its "model") has the keys of the released code."""
    return "patch_embed.proj.act.alpha" in state.get("model", state)


def translate_key(key: str) -> str:
    """The key of `quantize_vit(...)` for a key of the released code; weights and biases keep theirs."""
    key = re.sub(r"\.norm_([qk])\.", r".\1_norm.", key)
    head, _, field = key.rpartition(".")
    if field not in FIELDS or not head:
        return key
    stem, _, last = head.rpartition(".")
    if last == "act":
        return f"{stem}.input_quantizer.{FIELDS[field]}"
    if last in QUANTIZERS:
        return f"{stem}.{QUANTIZERS[last]}.{FIELDS[field]}"
    return f"{head}.weight_quantizer.{FIELDS[field]}"


def translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released state dict under our keys. Its flags are floats of shape (1,), ours booleans; weights are always signed."""
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        new = translate_key(key)
        if new.endswith((".calibrated", ".is_signed")):
            value = value.reshape(()) != 0
        if new.endswith("weight_quantizer.calibrated"):
            ours[new.replace(".calibrated", ".is_signed")] = torch.tensor(True)
        ours[new] = value
    return ours


def load_released(path: str | Path, *, bits: int, check: bool = True) -> tuple[nn.Module, dict[str, Any]]:
    """(the network of a released checkpoint in evaluation mode, {"model", "bits", "irm", "quant", "classes"}: how it is built).

    path: a state dict, or one under "model". bits: of the file; its keys do not say, so `check` compares with the steps
    (`check_bits`). Size (T, S, B), heads and classes are read from the shapes. Raises what `runs.load_checkpoint` raises,
    ValueError for other keys or steps that were never initialised."""
    state = runs.load_checkpoint(path)
    state = state.get("model", state)
    if not is_released(state):
        raise ValueError(f"{path} has not the keys of the released code (patch_embed.proj.act.alpha, ...)")
    width, classes = state["pos_embed"].shape[-1], state["head.weight"].shape[0]
    if width not in SIZES:
        raise ValueError(f"{path}: width {width}, released models have {', '.join(map(str, SIZES))}")
    distilled = "_distilled" if "dist_token" in state else ""
    name = f"deit_{SIZES[width]}{distilled}_patch16_224"
    made = {"model": {"name": name}, "bits": bits, "irm": True, "quant": {"preset": "official"}}
    model = quantize_vit(build_float(name, num_classes=classes), bits=bits, irm=True, preset="official")
    ours = translate(state)
    own = model.state_dict()
    if ours.keys() != own.keys():
        different = sorted(ours.keys() ^ own.keys())
        raise ValueError(f"{path}: {len(different)} keys do not correspond to {name}, e.g. {different[:3]}")
    model.load_state_dict(ours)
    if never := [k for k in ours if k.endswith(".calibrated") and not bool(ours[k])]:
        raise ValueError(f"{path}: {len(never)} quantisers were never initialised, e.g. {never[0]}")
    if check:
        check_bits(model, bits, path)
    return model.eval(), {**made, "classes": classes}


@torch.no_grad()
def check_bits(model: nn.Module, bits: int, path: str | Path) -> None:
    """Raises ValueError if the weight steps fit another width (2, 3, 4, 8) better than `bits`: a b-bit step starts at
    2 mean|w| / sqrt(qp) and training moves it less than the factor between two widths."""
    ratios = []
    for m in model.modules():
        quantizer = getattr(m, "weight_quantizer", None)
        if quantizer is not None and quantizer.bits == bits:
            ratios.append((quantizer.step.abs().mean() / (2 * m.weight.abs().mean())).item())  # pyright: ignore
    if not ratios:
        return
    typical = sorted(ratios)[len(ratios) // 2]
    widths = {b: (2 ** (b - 1) - 1) ** -0.5 for b in (2, 3, 4, 8)}
    nearest = min(widths, key=lambda b: abs(torch.log(torch.tensor(typical / widths[b])).item()))
    if nearest != bits:
        raise ValueError(
            f"{path}: the weight steps fit {nearest} bit (typical step / 2 mean|w| = {typical:.3f}, {bits} bit starts at "
            f"{widths.get(bits, float('nan')):.3f}); give the bit width of the file, or check_bits=false"
        )
