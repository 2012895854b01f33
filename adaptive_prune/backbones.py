"""Which vision transformers can be pruned, how to build them, and what they cost."""

import os
import socket
from collections.abc import Mapping
from typing import Any

import timm
from huggingface_hub import try_to_load_from_cache
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from adaptive_prune import lvvit
from adaptive_prune.budget import ViTCost


def cost_of(vit: VisionTransformer, *, extended: bool = False) -> ViTCost:
    """The MACs of a timm ViT by number of tokens; the stem is counted from its convolutions."""
    block: Any = vit.blocks[0]
    embed: Any = vit.patch_embed
    stem = 0
    size = embed.img_size[0] * embed.img_size[1]
    for layer in embed.modules():
        if isinstance(layer, nn.Conv2d):
            size //= layer.stride[0] * layer.stride[1]
            stem += size * layer.weight.numel()
    return ViTCost(
        dim=vit.embed_dim, hidden=block.mlp.fc1.out_features, heads=block.attn.num_heads, depth=len(vit.blocks),
        patches=embed.num_patches, prefix=vit.num_prefix_tokens, stem=stem, extended=extended,
    )  # fmt: skip


def build_vit(*, name: str, num_classes: int, pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A ViT by name: lvvit_s, lvvit_m, `vit` (timm's VisionTransformer from kwargs), or any timm ViT model.

    Raises ValueError for an unknown name or a model that is no VisionTransformer."""
    check_known(name)
    if pretrained:
        check_pretrained(name)
    if name in lvvit.SIZES:
        return _whole_patches(lvvit.lvvit(name, num_classes=num_classes, **kwargs), kwargs)
    if name == "vit":
        return _whole_patches(VisionTransformer(num_classes=num_classes, **kwargs), kwargs)
    model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **kwargs)
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"model.name={name!r} is a {type(model).__name__}, no timm VisionTransformer")
    return _whole_patches(model, kwargs)


def _whole_patches(vit: Any, kwargs: Mapping[str, Any]) -> VisionTransformer:
    patch, size = vit.patch_embed.patch_size[0], kwargs.get("img_size")
    if size is not None and size % patch:
        raise ValueError(f"images of {size} x {size} cannot be cut into patches of {patch} x {patch}: change data.size")
    return vit


def check_known(name: str) -> None:
    """ValueError for a model that cannot be built by this name."""
    if name in lvvit.SIZES or name == "vit":
        return
    if name not in timm.list_models():
        close = [n for n in timm.list_models("deit*patch16*") if "distilled" not in n]
        raise ValueError(
            f"model.name={name!r}, allowed: vit, {', '.join(lvvit.SIZES)}, or a timm ViT such as {', '.join(close)}"
        )


def check_pretrained(name: str) -> int:
    """The number of classes of timm's weights for a model. ValueError at once where they cannot be had: for a model that timm has
    none of, and where neither the cache holds them nor their server can be reached."""
    check_known(name)
    cfg = timm.get_pretrained_cfg(name) if name in timm.list_models() else None
    if cfg is None or not cfg.has_weights:
        raise ValueError(
            f"start.pretrained=true: timm has no weights of {name}; give a file of yours, start.checkpoint=<file>"
        )
    files = ("model.safetensors", "pytorch_model.bin")
    here = cfg.hf_hub_id and any(isinstance(try_to_load_from_cache(cfg.hf_hub_id, f), str) for f in files)
    if not here and not {"HTTPS_PROXY", "https_proxy", "HF_ENDPOINT"} & os.environ.keys():
        try:
            socket.create_connection(("huggingface.co", 443), timeout=3).close()
        except OSError as error:
            raise ValueError(
                f"start.pretrained=true: the weights of {name} are not cached and huggingface.co is out of reach ({error}); "
                "give a local file, start.checkpoint=<file>"
            ) from error
    return cfg.num_classes


def check_vit(vit: nn.Module) -> None:
    """Raise ValueError for a model that is not a timm ViT with a class token and plain blocks."""
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"{type(vit).__name__} is no timm VisionTransformer")
    if not vit.has_class_token or vit.global_pool != "token":
        raise ValueError(
            f"global_pool={vit.global_pool!r}, class token: {vit.has_class_token}: the score is the class token's attention, and "
            "the head must read the class token (global_pool='token')"
        )
    if not isinstance(vit.patch_drop, nn.Identity) or vit.dynamic_img_size:
        raise ValueError("patch dropout and dynamic_img_size are not supported")
    for i, block in enumerate(vit.blocks):
        attn = getattr(block, "attn", None)
        if type(block) is not Block or type(attn) is not Attention or attn.gate is not None or attn.attn_drop.p:
            raise ValueError(
                f"block {i} is a {type(block).__name__} with {type(attn).__name__}: only timm's Block with its plain Attention, "
                "without gate and attention dropout, is supported"
            )
