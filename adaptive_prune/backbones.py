"""Which vision transformers can be pruned, how to build them, and what they cost."""

from typing import Any

import timm
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
    if name in lvvit.SIZES:
        if pretrained:
            raise ValueError(f"model.pretrained: {name} is not in timm; give its checkpoint file as start.checkpoint")
        return lvvit.lvvit(name, num_classes=num_classes, **kwargs)
    if name == "vit":
        return VisionTransformer(num_classes=num_classes, **kwargs)
    if name not in timm.list_models():
        close = [n for n in timm.list_models("deit*patch16*") if "distilled" not in n]
        raise ValueError(
            f"model.name={name!r}, allowed: vit, {', '.join(lvvit.SIZES)}, or a timm ViT such as {', '.join(close)}"
        )
    model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **kwargs)
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"model.name={name!r} is a {type(model).__name__}, no timm VisionTransformer")
    return model


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
