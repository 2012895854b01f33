"""APP and ATP in any timm VisionTransformer, its weights untouched:

vit = timm.create_model("vit_tiny_patch16_224", pretrained=True)
model = PooledViT(vit, app=APP(160), rates=[1.0] * 8 + [0.9] * 4)
logits, kept = model(images, details=True)
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ap_fer.attentive_patch_pooling import APP
from ap_fer.attentive_token_pooling import ATP
from ap_fer.pooling_vit import Kept
from ap_fer.token_selection import check_rates, gather_tokens


class PooledViT(nn.Module):
    """vit: a timm VisionTransformer (plain or hybrid). app: an `APP` or None; it scores the patch embedding, before the
    position is added. rates: one keep rate per block or None; `options`: further keywords of `ATP`. Class, distillation
    and register tokens always stay. Images have the size that `vit` was made for.

    Raises ValueError where ATP finds no class token or an attention that is not timm's standard one."""

    def __init__(self, vit: Any, *, app: APP | None = None, rates: Sequence[float] | None = None, **options: Any):
        super().__init__()
        if not isinstance(vit, VisionTransformer):
            raise ValueError(f"PooledViT is for timm VisionTransformers, got {type(vit).__name__}")
        depth, self.prefix = len(vit.blocks), vit.num_prefix_tokens
        rates = check_rates([1.0] * depth if rates is None else rates, depth)
        for block, rate in zip(vit.blocks, rates, strict=True):
            if rate == 1:
                continue
            attn = getattr(block, "attn", None)
            if vit.cls_token is None:
                raise ValueError("ATP ranks tokens by the class token, this model has none (use APP alone, rates=None)")
            if type(attn) is not Attention or getattr(attn, "gate", None) is not None or not hasattr(block, "ls1"):
                raise ValueError(
                    f"ATP needs timm's standard pre-norm block, got {type(block).__name__} with {type(attn).__name__}"
                )
        self.vit: Any = vit
        self.app = APP(None) if app is None else app
        self.atp = nn.ModuleList([ATP(r, prefix=self.prefix, **options) for r in rates])

    def forward(self, images: Tensor, *, details: bool = False) -> Any:
        """images (B, C, H, W) -> the logits of `vit`, with details (logits, `Kept`)."""
        vit, p = self.vit, self.prefix
        patches = vit.patch_embed(images)
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(patches)))
        features = patches.reshape(len(patches), -1, patches.shape[-1])  # dynamic sizes come as (B, H, W, d)
        if x.shape[1] != p + features.shape[1]:
            raise ValueError("patch dropout and APP do not go together: make the model with patch_drop_rate=0")
        if self.app.attention is not None:
            raise ValueError("score='la' changes the features; in a pretrained ViT use a score without parameters")
        _, index = self.app(features)
        if index.shape[1] < features.shape[1]:
            x = gather_tokens(x, index, prefix=p)
        kept = Kept(index)
        poolings: Any = self.atp
        for block, pooling in zip(vit.blocks, poolings, strict=True):
            if pooling.drops(x.shape[1] - p):
                x, chosen = _pooled_block(block, x, pooling)
                index = index.gather(1, chosen)
            else:
                x = block(x)
            kept.blocks.append(index)
        logits = vit.forward_head(vit.norm(x))
        return (logits, kept) if details else logits


def _pooled_block(block: Any, x: Tensor, pooling: ATP) -> tuple[Tensor, Tensor]:
    """timm's block with ATP between its halves. Fused attention hides the logits; CLS's row alone costs N d."""
    attn, (b, t, _) = block.attn, x.shape
    qkv = attn.qkv(block.norm1(x)).reshape(b, t, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = attn.q_norm(qkv[0]), attn.k_norm(qkv[1]), qkv[2]
    row = (q[:, :, :1].float() * attn.scale * k.float()).sum(-1)  # in half precision the logits would have ties
    dropout = attn.attn_drop.p if attn.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=attn.scale).transpose(1, 2).flatten(2)
    u = x + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(attn.norm(out)))))
    u, chosen = pooling(u, row)
    return u + block.drop_path2(block.ls2(block.mlp(block.norm2(u)))), chosen
