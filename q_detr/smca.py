"""SMCA-DETR (Gao et al., 2021): the cross-attention scores of every head get a Gaussian bias around a predicted point."""

import torch
from torch import Tensor, nn

from q_detr.detr import DETR, MLP, DecoderLayer

SMOOTH = 8.0  # width of the Gaussian in cells


class SMCALayer(DecoderLayer):
    """A decoder layer that predicts, per query and head, an offset (`point2`) and a squared scale (`point3`) in x and y; the
    first layer also predicts the reference point (`point1`)."""

    def __init__(self, dim: int, heads: int, ffn: int, dropout: float, *, first: bool):
        super().__init__(dim, heads, ffn, dropout)
        self.heads = heads
        self.norm4 = nn.LayerNorm(dim)
        if first:
            self.point1 = MLP(dim, dim, 2)
        self.point2, self.point3 = nn.Linear(dim, 2 * heads), nn.Linear(dim, 2 * heads)

    def gaussian(self, out: Tensor, centre: Tensor, grid: Tensor) -> Tensor:
        """-|sum_xy ((centre + offset - grid)^2 scale)| / 8. out: (B, Q, dim) normed queries; centre: (B, Q, 2) in cells;
        grid: (N, 2) cell indices, x first -> (B, heads, Q, N)."""
        offset, scale = (p(out).unflatten(2, (self.heads, 2)) for p in (self.point2, self.point3))
        distance = (centre[:, :, None] + offset).unsqueeze(3) - grid  # (B, Q, heads, N, 2)
        logits = -(distance.square() * scale.square().unsqueeze(3)).sum(-1).abs() / SMOOTH
        return logits.transpose(1, 2)


class SMCADETR(DETR):
    """`DETR` with Gaussian cross-attention. Its boxes are offsets to the reference points; classes are sigmoid scores.

    learned_content: the query embedding is (Q, 2 dim), positions and initial content; False: (Q, dim), content 0."""

    def __init__(self, *, learned_content: bool = False, **options):
        self.learned_content = learned_content
        options.setdefault("queries", 300)
        super().__init__(**options)
        nn.init.constant_(self.class_embed.bias, -4.59512)
        for layer in self.transformer["decoder"].layers:  # type: ignore[union-attr]
            nn.init.zeros_(layer.point3.weight)
            nn.init.ones_(layer.point3.bias)

    def query_width(self, dim: int) -> int:
        return 2 * dim if self.learned_content else dim

    def _layer(self, index: int, sizes: tuple) -> DecoderLayer:
        return SMCALayer(*sizes, first=index == 0)

    def forward(self, images: Tensor, mask: Tensor) -> dict:
        sizes = torch.stack([(~mask).any(1).sum(1), (~mask).any(2).sum(1)], dim=1)  # (B, 2) unpadded width, height
        memory, pos, mask, (height, width) = self.encode(images, mask)
        stride = self.backbone[0].body.stride
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        grid = torch.stack([x, y], dim=-1).flatten(0, 1).to(memory)
        query_pos = self.query_embed.weight.expand(images.shape[0], -1, -1)
        x = torch.zeros_like(query_pos)
        if self.learned_content:
            query_pos, x = query_pos.chunk(2, dim=-1)
        decoder, states = self.transformer["decoder"], []
        reference = centre = None
        for layer in decoder.layers:  # type: ignore[union-attr]
            out = layer.norm4(x + query_pos)
            if centre is None:
                reference = layer.point1(out)
                centre = reference.sigmoid() * sizes[:, None].to(out) / stride
            x, d, projected = layer(x, query_pos, memory, pos, mask, layer.gaussian(out, centre, grid))
            states.append((decoder.norm(x), d, projected))  # type: ignore[operator]
        return self._heads(states, reference)
