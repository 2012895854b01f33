"""DETR (Carion et al., 2020) with the parameter names of the official checkpoints, and places for quantisers.

A place is an attribute that holds `nn.Identity()` and that `q_detr.quantized_detr` fills, so the real-valued and the quantised
network share one forward pass. Sequences are (B, tokens, d). H', W' = size of the stride-32 map, N = H'W' tokens.
"""

import math
import socket
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from common import runs

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")


def pad_images(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Images (3, H_i, W_i) -> batch (B, 3, max H, max W), zeros at the bottom and right, and mask (B, H, W), True = padding."""
    height, width = max(i.shape[-2] for i in images), max(i.shape[-1] for i in images)
    batch = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool, device=images[0].device)
    for i, image in enumerate(images):
        batch[i, :, : image.shape[-2], : image.shape[-1]] = image
        mask[i, : image.shape[-2], : image.shape[-1]] = False
    return batch, mask


def sine_positions(mask: Tensor, dim: int, *, temperature: float = 10000.0) -> Tensor:
    """Sine encoding of the unpadded cells, normalised to 2 pi. mask: (B, H', W') -> (B, dim, H', W'), y before x."""
    inside = ~mask
    parts = []
    index = torch.arange(dim // 2, dtype=torch.float32, device=mask.device)
    divisor = temperature ** (2 * torch.div(index, 2, rounding_mode="floor") / (dim // 2))
    for axis in (1, 2):
        cells = inside.cumsum(axis, dtype=torch.float32)
        last = cells[:, -1:] if axis == 1 else cells[:, :, -1:]
        angles = (cells / (last + 1e-6) * 2 * math.pi).unsqueeze(-1) / divisor
        parts.append(torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=4).flatten(3))
    return torch.cat(parts, dim=3).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Multi-head attention with the parameters of `nn.MultiheadAttention` (Eq. 3).

    Order: project, split heads, `align` the query, quantise q and k, scores / sqrt(d), masks, softmax, dropout, quantise A
    and v, D = A v. Returns (out_proj(D), D), D the co-attended feature (B, Q, dim)."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim={dim} is not a multiple of heads={heads}")
        self.dim, self.heads, self.dropout = dim, heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.zeros_(self.out_proj.bias)
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.in_proj_quant = nn.Identity()
        self.input_q, self.input_k, self.input_v = nn.Identity(), nn.Identity(), nn.Identity()
        self.align = nn.Identity()
        self.quant_q, self.quant_k, self.quant_a, self.quant_v = (nn.Identity() for _ in range(4))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """query: (B, Q, dim); key, value: (B, N, dim); mask: (B, N), True = ignore; bias: (B, heads, Q, N) of the scores."""
        weights = self.in_proj_quant(self.in_proj_weight).chunk(3)
        biases = self.in_proj_bias.chunk(3)
        inputs = self.input_q(query), self.input_k(key), self.input_v(value)
        q, k, v = (self._split(F.linear(x, w, b)) for x, w, b in zip(inputs, weights, biases, strict=True))
        q, k = self.quant_q(self.align(q)), self.quant_k(k)
        scores = q @ k.mT / math.sqrt(self.dim // self.heads)
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None], -math.inf)
        if bias is not None:
            scores = scores + bias
        attention = self.quant_a(F.dropout(scores.softmax(-1), self.dropout, self.training))
        d = (attention @ self.quant_v(v)).transpose(1, 2).flatten(2)
        return self.out_proj(d), d

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class EncoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int, ffn: int, dropout: float):
        super().__init__()
        self.self_attn = Attention(dim, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, pos: Tensor, mask: Tensor | None) -> Tensor:
        q = x + pos
        x = self.norm1(x + self.dropout(self.self_attn(q, q, x, mask)[0]))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu()))))


class DecoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int, ffn: int, dropout: float):
        super().__init__()
        self.self_attn = Attention(dim, heads, dropout)
        self.multihead_attn = Attention(dim, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, query_pos: Tensor, memory: Tensor, pos: Tensor, mask: Tensor | None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> (object queries, co-attended feature D, projected D), each (B, Q, dim)."""
        q = x + query_pos
        x = self.norm1(x + self.dropout(self.self_attn(q, q, x)[0]))
        out, d = self.multihead_attn(x + query_pos, memory + pos, memory, mask, bias)
        x = self.norm2(x + self.dropout(out))
        x = self.norm3(x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu()))))
        return x, d, out


class Stack(nn.Module):
    """`layers` and, in the decoder, the `norm` that every layer's output passes."""

    def __init__(self, layers: Sequence[nn.Module], norm: nn.Module | None = None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if norm is not None:
            self.norm = norm


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int, out: int, layers: int = 3):
        super().__init__()
        widths = [dim, *[hidden] * (layers - 1), out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


def check_backbone_weights(name: str, weights: str) -> None:
    """ValueError unless `weights` is a file or names torchvision's weights for the backbone."""
    if name not in RESNETS:
        raise ValueError(f"model.weights={weights}: backbone={name} has no published weights, use model.weights=null")
    known = [w.name for w in torchvision.models.get_model_weights(name)]
    if weights not in known and not Path(weights).expanduser().is_file():
        raise ValueError(f"model.weights={weights} is no file and no weights of torchvision: {', '.join(known)}")


def _load_classifier(net: nn.Module, name: str, weights: str) -> None:
    """torchvision's weights, by name (downloaded once) or from a file in its layout, into its ResNet."""
    check_backbone_weights(name, weights)
    if Path(weights).expanduser().is_file():
        state = runs.load_checkpoint(weights)
    else:
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(10.0)
        try:
            state = torchvision.models.get_model_weights(name)[weights].get_state_dict(progress=False)
        except OSError as error:
            raise FileNotFoundError(
                f"model.weights={weights} cannot be downloaded ({error}): get torchvision's file for {name} by other means "
                "and give model.weights=<file>, or start.weights=<weights of a DETR> with method.start=weights"
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
    found = net.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")}, strict=False)
    wrong = [*(k for k in found.missing_keys if not k.startswith("fc.")), *found.unexpected_keys]
    if wrong := [k for k in wrong if not k.endswith("num_batches_tracked")]:
        raise ValueError(f"model.weights={weights} does not fit {name}: {len(wrong)} names, e.g. {wrong[0]}")


class ResNetBody(nn.Module):
    """torchvision's ResNet without pooling and classifier, frozen BatchNorm. (B, 3, H, W) -> (B, C, H / 32, W / 32).

    weights: a name of torchvision's, or a file in its layout."""

    def __init__(self, name: str, *, weights: str | None = None, dilation: bool = False):
        super().__init__()
        if name not in RESNETS:
            raise ValueError(f"backbone={name!r}, allowed: {', '.join(RESNETS)}, tiny")
        options: dict[str, Any] = {"replace_stride_with_dilation": [False, False, True]} if dilation else {}
        net = getattr(torchvision.models, name)(norm_layer=FrozenBatchNorm2d, **options)
        if weights is not None:
            _load_classifier(net, name, weights)
        self.out_channels: int = net.fc.in_features
        self.stride = 16 if dilation else 32
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class TinyBody(nn.Module):
    """Four 3x3 convolutions with ReLU, stride 8, for images of 48 to 96 pixels. (B, 3, H, W) -> (B, C, H / 8, W / 8)."""

    def __init__(self, widths: Sequence[int] = (16, 48, 64, 64)):
        super().__init__()
        self.out_channels, self.stride = widths[-1], 8
        channels = [3, *widths]
        strides = [2] * 3 + [1] * (len(widths) - 3)
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=s, padding=1)
            for a, b, s in zip(channels, channels[1:], strides, strict=False)
        )  # fmt: skip
        for conv in self.layers:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")  # type: ignore[arg-type]
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.acts = nn.ModuleList(nn.ReLU() for _ in widths)

    def forward(self, x: Tensor) -> Tensor:
        for conv, act in zip(self.layers, self.acts, strict=True):
            x = act(conv(x))
        return x


class Backbone(nn.Module):
    """Holds `body`, which gives the official keys their prefix backbone.0.body."""

    def __init__(self, body: ResNetBody | TinyBody):
        super().__init__()
        self.body = body


class DETR(nn.Module):
    """num_classes: largest label + 1 (91 for COCO's ids); the last of the num_classes + 1 logits is "no object".

    backbone: resnet18 | 34 | 50 | 101 (weights: a name of torchvision's, e.g. "IMAGENET1K_V1", or a file) or tiny (widths).
    freeze: the stem and layer1 are not trained, as in the official code (ResNets only)."""

    layer_type: type[DecoderLayer] = DecoderLayer

    def __init__(
        self, *, num_classes: int, backbone: str = "resnet50", weights: str | None = None, dilation: bool = False,
        widths: Sequence[int] = (16, 48, 64, 64), freeze: bool = True, queries: int = 100, dim: int = 256, heads: int = 8,
        ffn: int = 2048, encoder_layers: int = 6, decoder_layers: int = 6, dropout: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        if num_classes < 1 or queries < 1 or dim % 4:
            raise ValueError(f"num_classes={num_classes}, queries={queries} must be >= 1 and dim={dim} a multiple of 4")
        self.num_classes, self.dim, self.queries = num_classes, dim, queries
        body = TinyBody(widths) if backbone == "tiny" else ResNetBody(backbone, weights=weights, dilation=dilation)
        if freeze and backbone != "tiny":
            for name, p in body.named_parameters():
                p.requires_grad_(name.startswith(("layer2", "layer3", "layer4")))
        sizes = (dim, heads, ffn, dropout)
        encoder = Stack([EncoderLayer(*sizes) for _ in range(encoder_layers)])
        decoder = Stack([self._layer(i, sizes) for i in range(decoder_layers)], nn.LayerNorm(dim))
        self.transformer = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
        for p in self.transformer.parameters():
            if p.ndim > 1:
                nn.init.xavier_uniform_(p)
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.bbox_embed = MLP(dim, dim, 4)
        self.query_embed = nn.Embedding(queries, self.query_width(dim))
        self.input_proj = nn.Conv2d(body.out_channels, dim, 1)
        self.backbone = nn.ModuleList([Backbone(body)])

    def query_width(self, dim: int) -> int:
        return dim

    def _layer(self, index: int, sizes: tuple) -> DecoderLayer:
        return self.layer_type(*sizes)

    def encode(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """-> memory (B, N, dim), positions (B, N, dim), mask (B, N), (H', W')."""
        if images.ndim != 4 or mask.shape != (images.shape[0], *images.shape[2:]):
            raise ValueError(f"images {tuple(images.shape)} and mask {tuple(mask.shape)}: (B, 3, H, W) and (B, H, W)")
        features = self.backbone[0].body(images)  # type: ignore[operator]
        mask = F.interpolate(mask[:, None].float(), size=features.shape[-2:])[:, 0].bool()
        pos = sine_positions(mask, self.dim).flatten(2).transpose(1, 2).to(features.dtype)
        x, mask, size = self.input_proj(features).flatten(2).transpose(1, 2), mask.flatten(1), features.shape[-2:]
        for layer in self.transformer["encoder"].layers:  # type: ignore[union-attr]
            x = layer(x, pos, mask)
        return x, pos, mask, (size[0], size[1])

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Any]:
        """images: (B, 3, H, W), ImageNet-normalised; mask: (B, H, W), True = padding (see `pad_images`).

        -> pred_logits (B, Q, num_classes + 1), pred_boxes (B, Q, 4) cxcywh in 0..1, aux_outputs: the same of the layers before
        the last, co_attended and co_projected (layers, B, Q, dim): D of the cross-attention before and after out_proj."""
        memory, pos, mask, _ = self.encode(images, mask)
        query_pos = self.query_embed.weight.expand(images.shape[0], -1, -1)
        x = torch.zeros_like(query_pos)
        decoder, states = self.transformer["decoder"], []
        for layer in decoder.layers:  # type: ignore[union-attr]
            x, d, out = layer(x, query_pos, memory, pos, mask)
            states.append((decoder.norm(x), d, out))  # type: ignore[operator]
        return self._heads(states)

    def _heads(self, states: list[tuple[Tensor, Tensor, Tensor]], reference: Tensor | None = None) -> dict[str, Any]:
        hidden, d, out = (torch.stack(s) for s in zip(*states, strict=True))
        logits, boxes = self.class_embed(hidden), self.bbox_embed(hidden)
        if reference is not None:
            boxes = torch.cat([boxes[..., :2] + reference, boxes[..., 2:]], dim=-1)
        layers = [{"pred_logits": a, "pred_boxes": b} for a, b in zip(logits, boxes.sigmoid(), strict=True)]
        return {**layers[-1], "aux_outputs": layers[:-1], "co_attended": d, "co_projected": out}
