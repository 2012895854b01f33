"""APViT as one module: stem, transformer with poolings, linear head; and its baselines by configuration.

model = APViT(num_classes=7)                    # the published network: IR-50, 8 blocks, k = 160, ATP 0.9 in blocks 5 to 8
logits = model(images)                          # images (B, 3, 112, 112), ImageNet-normalised RGB
logits, kept = model(images, details=True)      # which of the 14 x 14 patches stayed after APP and every block
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ap_fer.attentive_patch_pooling import APP
from ap_fer.attentive_token_pooling import ATP
from ap_fer.ir50 import IR50, ConvStem
from ap_fer.pooling_vit import Kept, PoolingViT
from ap_fer.token_selection import check_rates

STEMS = ("ir50", "conv", "patches")


class APViT(nn.Module):
    """stem: ir50 (units, widths: its stages) | conv (widths, strides, kernels) | patches (squares of `patch` pixels).

    depth: transformer blocks, 0: none, the CNN alone: pool=mean averages its features, pool=flatten is the output layer of face
    networks (BN, dropout, every place its own weights). app: keywords of `APP`; atp:
    keywords of `ATP` with either `rates`, one per block, or `rate` from block `start` on (counted from 0). init_std: of the
    transformer's weights, positions and class token; the published 0.02 is for a width of 768.
    Raises ValueError for anything that does not fit together."""

    def __init__(
        self,
        *,
        num_classes: int = 7,
        image_size: int = 112,
        stem: str = "ir50",
        units: Sequence[int] = (3, 4, 14),
        widths: Sequence[int] = (64, 128, 256),
        strides: Sequence[int] = (2, 2),
        kernels: Sequence[int] = (3, 3),
        patch: int = 8,
        dim: int = 768,
        depth: int = 8,
        pool: str = "mean",
        heads: int = 8,
        mlp_ratio: float = 3.0,
        init_std: float = 0.02,
        app: Mapping[str, Any] | None = None,
        atp: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if stem not in STEMS:
            raise ValueError(f"stem={stem!r}; use one of {', '.join(STEMS)}")
        if stem == "patches" and not depth:
            raise ValueError("depth=0 averages the features of a CNN stem; stem='patches' has none")
        if pool not in ("mean", "flatten"):
            raise ValueError(f"pool={pool!r}; use one of mean, flatten")
        self.extractor: nn.Module = nn.Identity()
        channels, stride, projection = 3, patch, patch
        if stem != "patches":
            cnn = IR50(units=units, widths=widths) if stem == "ir50" else ConvStem(widths, strides, kernels)
            self.extractor, channels, stride, projection = cnn, cnn.out_channels, cnn.stride, 1
        if image_size < stride or image_size % stride:
            raise ValueError(f"image_size={image_size} is not a positive multiple of the stem's stride {stride}")
        self.image_size, self.num_classes, self.stride = image_size, num_classes, stride
        for module in self.extractor.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
        self.vit, side, width = None, image_size // stride, dim if depth else channels
        self.output_layer: nn.Module | None = None
        if not depth and pool == "flatten":
            self.output_layer, width = (
                nn.Sequential(nn.BatchNorm2d(channels), nn.Dropout(), nn.Flatten()),
                channels * side**2,
            )
        if depth:
            app_options: dict[str, Any] = {"keep": 160} if app is None else dict(app)
            self.vit = PoolingViT(
                channels=channels, grid=(side, side), dim=dim, heads=heads, mlp_ratio=mlp_ratio, kernel=projection,
                init_std=init_std,
                app=APP(**app_options, channels=dim), atp=token_poolings(depth, atp),
            )  # fmt: skip
        self.head = nn.ModuleDict({"fc": nn.Linear(width, num_classes)})
        nn.init.zeros_(self.head["fc"].weight)  # type: ignore[arg-type]  # logits 0 and loss ln C at step 0
        nn.init.zeros_(self.head["fc"].bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor, *, details: bool = False) -> Any:
        """images (B, 3, S, S) -> logits (B, C), with details (logits, `Kept`; None without transformer)."""
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, self.image_size, self.image_size):
            raise ValueError(
                f"images are {tuple(images.shape)}, the model takes (B, 3, {self.image_size}, {self.image_size})"
            )
        features, kept = self.extractor(images), None
        if self.vit is not None:
            features, kept = self.vit(features)
        else:
            features = features.mean((2, 3)) if self.output_layer is None else self.output_layer(features)
        logits = self.head["fc"](features)
        return (logits, kept) if details else logits

    @property
    def patches(self) -> int:
        """Patch tokens before any pooling, N."""
        return (self.image_size // self.stride) ** 2


def token_poolings(depth: int, options: Mapping[str, Any] | None) -> list[ATP]:
    """One `ATP` per block. options: keywords of `ATP`, and rates, or rate and start; None: the published 0.9 in the
    second half. ValueError for both, a start outside 0..depth or a wrong number of rates."""
    found = {"rate": 0.9, "start": depth // 2} if options is None else dict(options)
    rates, rate, start = (found.pop(name, None) for name in ("rates", "rate", "start"))
    if rates is None:
        if rate is None or start is None:
            raise ValueError("atp needs rates (one per block), or rate and start")
        if not 0 <= start <= depth:
            raise ValueError(f"atp.start={start}; allowed are 0..{depth} blocks ({depth}: none pools)")
        rates = [1.0] * start + [rate] * (depth - start)
    return [ATP(r, **found) for r in check_rates(rates, depth)]


__all__ = ["APViT", "Kept", "token_poolings"]
