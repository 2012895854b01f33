"""Float backbones by name, their weights, the stressed teacher, and the student that starts from a teacher."""

import copy
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    Attention,  # pyright: ignore[reportPrivateImportUsage]
    VisionTransformer,
)
from torch import Tensor, nn

from common import runs
from q_vit.information_rectification import InformationRectification, calibrate_rectification
from q_vit.quantized_vit import Tapped, quantize_vit

OWN = {"vit": VisionTransformer, "vit_distilled": VisionTransformerDistilled}
PAPER = (
    *(f"deit_{size}{token}_patch16_224" for size in ("tiny", "small", "base") for token in ("", "_distilled")),
    *(f"swin_{size}_patch4_window7_224" for size in ("tiny", "small")),
)


def build_float(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    pretrained: bool = False,
    file: str | None = None,
    **options: Any,
) -> nn.Module:
    """A real-valued network (B, in_channels, H, W) -> logits.

    name: vit | vit_distilled (timm's classes; options: img_size, patch_size, embed_dim, depth, num_heads, ...) or a timm
    model by name, of which the paper uses those in `PAPER`. pretrained: timm's weights (downloads, or from `file`); another
    number of classes than theirs gets new heads.
    A distilled network returns (class logits, distillation logits) in training and their mean in evaluation."""
    if file is not None and not (pretrained and Path(file).expanduser().is_file()):
        raise ValueError(f"model.file={file}: needs model.pretrained=true and a file that is there")
    if name in OWN:
        if pretrained:
            raise ValueError(f"model.pretrained=true: {name!r} has no published weights; train it with method=fp")
        model = OWN[name](num_classes=num_classes, in_chans=in_channels, **options)
    elif timm.is_model(name):
        if pretrained and file is None:
            require_published_weights(name)
        overlay = {"file": str(Path(file).expanduser())} if file is not None else None
        model = timm.create_model(
            name, pretrained=pretrained, pretrained_cfg_overlay=overlay, num_classes=num_classes, in_chans=in_channels,
            **options,
        )  # fmt: skip
    else:
        close = ", ".join(timm.list_models(f"*{name[:8]}*")[:5]) or "see timm.list_models()"
        raise ValueError(f"model.name={name!r}, allowed: vit, vit_distilled or a timm model ({close})")
    if isinstance(model, VisionTransformerDistilled):
        model.set_distilled_training(True)
    return model


def published_classes(name: str) -> int | None:
    """The number of classes of timm's weights of a model; None where there are none."""
    found = timm.get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(name) else None
    return found.num_classes if found is not None and found.has_weights else None


def require_published_weights(name: str) -> None:
    """RunError, at once and not after a minute of retries, where timm's weights are neither in the cache nor to be fetched."""
    found = timm.get_pretrained_cfg(name, allow_unregistered=True)
    hub = getattr(found, "hf_hub_id", None)
    files = ("model.safetensors", "pytorch_model.bin")
    if hub and any(isinstance(try_to_load_from_cache(hub, f), str) for f in files):
        return
    host = urlparse(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        if hub and os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
            raise OSError("HF_HUB_OFFLINE is set")
        if hub:
            socket.create_connection((host.hostname or "", host.port or 443), timeout=5).close()
    except OSError as error:
        raise runs.RunError(
            f"cannot fetch the pretrained weights of {name} ({host.hostname}: {error}); give model.file=<its weights on this "
            "disk>, or model.pretrained=false with teacher.weights=<checkpoint>"
        ) from error


def load_weights(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Load a float checkpoint of train.py or a plain state dict (also under the key "model"), in place; returns what the
    checkpoint says of itself ("about"), {} for a plain state dict.

    Raises FileNotFoundError, `runs.RunError` for a broken file, ValueError naming keys or shapes that do not fit."""
    whole = runs.load_checkpoint(path)
    if not isinstance(whole, Mapping):
        raise ValueError(f"{path} is no checkpoint: it holds a {type(whole).__name__}")
    state = whole.get("model", whole)
    own = model.state_dict()
    wrong = [k for k in own if k in state and state[k].shape != own[k].shape]
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra or wrong:
        quantised = any(k.endswith((".step", ".alpha")) for k in extra)
        hint = "it is a quantised model, a float one is needed" if quantised else "another architecture or class count?"
        parts = [
            f"{n} {what}, e.g. {ks[0]}"
            for what, ks in (("missing", missing), ("not in the model", extra), ("of another shape", wrong))
            if (n := len(ks))
        ]
        raise ValueError(f"{path} does not fit the model ({hint}): {'; '.join(parts)}")
    model.load_state_dict(state)
    return dict(whole.get("about") or {})


def check_stress(model: nn.Module, *, scale: float = 3.0, shift: float = 3.0) -> list[Attention]:
    """The attention layers that `stress` would change. ValueError where it cannot."""
    attentions = [m for m in model.modules() if isinstance(m, Attention)]
    if not attentions or not scale > 0 or not -1e6 < shift < 1e6:
        raise ValueError(f"stress needs a timm ViT, scale > 0 and a finite shift (scale={scale}, shift={shift})")
    if any(m.qkv.bias is None for m in attentions):
        raise ValueError("stress needs a bias in qkv: the shift is added there")
    return attentions


@torch.no_grad()
def stress(model: nn.Module, images: Tensor, *, scale: float = 3.0, shift: float = 3.0) -> None:
    """Make q and k of a float ViT badly distributed without changing its function, in place.

    For head h, s_h = 1 / scale or scale in turn: W_q, b_q are multiplied and W_k, b_k divided by s_h; then every component
    of the head's key bias gets shift * std(k) / s_h, std over all keys of the head for `images`. The first leaves q k^T as it is,
    the second adds a constant to a row of scores, which the softmax ignores. A synthetic test of rectification,
    not a property of any published network. Raises ValueError without timm Attention or without a qkv bias."""
    attentions = check_stress(model, scale=scale, shift=shift)
    training = model.training
    taps = Tapped(model.eval(), "raw")
    for i, m in enumerate(attentions):
        k = taps(images)[1][i][1]  # earlier layers are changed already, their function is not
        std = k.double().std(dim=(0, 2, 3)).to(k.dtype)  # of the keys before they are scaled
        s = torch.where(torch.arange(m.num_heads, device=k.device) % 2 == 0, 1 / scale, scale)
        weight, bias = (t.view(3, m.num_heads, m.head_dim, *t.shape[1:]) for t in (m.qkv.weight, m.qkv.bias))
        weight[0].mul_(s.view(-1, 1, 1))
        weight[1].div_(s.view(-1, 1, 1))
        bias[0].mul_(s.view(-1, 1))
        bias[1].div_(s.view(-1, 1)).add_((shift * std / s).view(-1, 1))
    taps.remove()
    model.train(training)


def build_student(
    teacher: nn.Module, images: Tensor, *, irm: bool, irm_init: str = "calibrated", bits: int, **quant: Any
) -> nn.Module:
    """The quantised student of a float network, its weights included, with every step set from `images` (B, C, H, W).

    irm_init: "calibrated" starts rectification where it nearly preserves the network's q and k, "unit" at weight 1, bias 0
    (the released code). Other keywords as `quantize_vit`. The steps come from one forward pass in training mode, in which each
    quantiser sees the quantised output of those before it."""
    if irm_init not in ("calibrated", "unit"):
        raise ValueError(f"irm_init={irm_init!r}, allowed: calibrated, unit")
    student = quantize_vit(teacher, irm=irm, bits=bits, **quant)
    if irm and irm_init == "calibrated":
        taps = Tapped(copy.deepcopy(teacher).eval(), "raw")
        with torch.no_grad():
            raw = taps(images)[1]
        pairs = [m for m in student.modules() if isinstance(getattr(m, "q_norm", None), InformationRectification)]
        for m, (q, k) in zip(pairs, raw, strict=True):
            calibrate_rectification(m.q_norm, q, offset=True)  # pyright: ignore[reportArgumentType]
            calibrate_rectification(m.k_norm, k, offset=False)  # pyright: ignore[reportArgumentType]
    first_forward(student, images)
    return student


@torch.no_grad()
def first_forward(model: nn.Module, images: Tensor) -> None:
    """Calibrate in the released way, in the first training forward, with every random layer switched off."""
    training = model.training
    model.train()
    for m in model.modules():
        if type(m).__name__ in ("Dropout", "DropPath", "PatchDropout"):
            m.eval()
    model(images)
    model.train(training)


def prefix_tokens(model: nn.Module) -> int:
    """Tokens before the patches: class, distillation, register; 0 for Swin."""
    return getattr(model, "num_prefix_tokens", 0)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; steps, zero points, biases, norms and rectification without."""
    decay = {id(p): p.ndim > 1 and not n.endswith((".gamma", ".beta")) for n, p in model.named_parameters()}
    groups = [[p for p in model.parameters() if p.requires_grad and decay[id(p)] is flag] for flag in (True, False)]
    return [{"params": g, "weight_decay": wd} for g, wd in zip(groups, (weight_decay, 0.0), strict=True) if g]


def network(about: Mapping[str, Any]) -> nn.Module:
    """The network that a checkpoint describes under about["network"], float or quantised, with weights to be loaded."""
    made = about["network"]
    model = build_float(
        **{**made["model"], "pretrained": False, "file": None}, num_classes=len(about["classes"]), in_channels=about["channels"]
    )  # fmt: skip
    if made["bits"] == 32 and not made["irm"]:
        return model
    return quantize_vit(model, bits=made["bits"], irm=made["irm"], **made["quant"])
