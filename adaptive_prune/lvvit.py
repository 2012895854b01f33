"""LV-ViT-S and -M, which timm does not have, with the parameter names of the published checkpoints.

A timm VisionTransformer with a convolutional stem, residual branches divided by 2, no QKV bias, and an auxiliary head that
classifies every token. At inference logits = head(class) + 0.5 max over tokens of aux_head(token).
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

SIZES = {
    "lvvit_s": {"embed_dim": 384, "num_heads": 6, "depth": 16},
    "lvvit_m": {"embed_dim": 512, "num_heads": 8, "depth": 20},
}
LOCATIONS = {"lvvit_s": (5, 9, 13), "lvvit_m": (6, 11, 16)}


class ConvStem(nn.Module):
    """Three convolutions at half resolution, then patches of 8 x 8 of those: (B, 3, H, W) -> (B, H W / 256, d)."""

    def __init__(self, *, img_size: int = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 384, **_):
        super().__init__()
        self.img_size, self.patch_size = (img_size, img_size), (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.proj = nn.Conv2d(64, embed_dim, patch_size // 2, stride=patch_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = self.bn3(self.conv3(x)).relu()
        return self.proj(x).flatten(2).transpose(1, 2)


class Shrink(nn.Module):
    """x / by: stands where timm's blocks have their layer scale, without a parameter."""

    def __init__(self, by: float):
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x / self.by


class LVViT(VisionTransformer):
    """LV-ViT. Images (B, 3, img_size, img_size), normalised; logits (B, num_classes)."""

    def __init__(self, *, skip_lam: float = 2.0, num_classes: int = 1000, **kwargs):
        layer_norm = nn.LayerNorm  # eps 1e-5, unlike timm's ViT
        super().__init__(
            mlp_ratio=3, qkv_bias=False, norm_layer=layer_norm, embed_layer=ConvStem, num_classes=num_classes, **kwargs
        )
        self.aux_head = nn.Linear(self.embed_dim, num_classes)
        for block in self.blocks:
            block.ls1, block.ls2 = Shrink(skip_lam), Shrink(skip_lam)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Class logits of normed tokens (B, N, d): with the auxiliary term in evaluation mode only, as published."""
        out = super().forward_head(x[:, :1], pre_logits)
        if self.training or pre_logits or x.shape[1] == 1:
            return out
        return out + 0.5 * self.aux_head(x[:, 1:]).amax(1)

    def packed_logits(self, classes: Tensor, tokens: Tensor, image: Tensor) -> Tensor:
        """The same from normed class tokens (B, d) and the surviving tokens (T, d) of the images (T,): an image without a
        survivor has the class logits alone."""
        logits = self.head(self.head_drop(classes))
        aux = self.aux_head(tokens)
        best = aux.new_full(logits.shape, float("-inf"))
        best = best.scatter_reduce(0, image[:, None].expand_as(aux), aux, "amax")
        return logits + 0.5 * torch.where(best.isinf(), 0.0, best)


def lvvit(name: str = "lvvit_s", **kwargs) -> LVViT:
    """LV-ViT by size; kwargs of timm's VisionTransformer (num_classes, img_size, ...). ValueError for another name."""
    if name not in SIZES:
        raise ValueError(f"model {name!r}, allowed: {', '.join(SIZES)}")
    return LVViT(**{**SIZES[name], **kwargs})
