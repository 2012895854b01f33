"""The vision transformer with attentive pooling on CNN features: projection, APP, blocks with ATP, norm."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ap_fer.attentive_patch_pooling import APP
from ap_fer.attentive_token_pooling import ATP
from ap_fer.token_selection import check_keep


@dataclass
class Kept:
    """What stayed, as indices of the original raster: app (B, k) after APP, blocks[l] (B, n_l) after block l."""

    app: Tensor
    blocks: list[Tensor] = field(default_factory=list)


class Attention(nn.Module):
    """Multi-head attention without qkv bias; also gives CLS's row of the scaled logits on request."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim={dim} is not divisible by heads={heads}")
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, z: Tensor, *, row: bool) -> tuple[Tensor, Tensor | None]:
        """z (B, T, d) -> W_o softmax(A) v (B, T, d), and with `row` A[:, :, CLS] (B, h, T), float32 under autocast too."""
        b, t, d = z.shape
        q, k, v = self.qkv(z).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        first = None
        if row:  # the fused kernel hides the logits: CLS's row again, T d more products; in half precision it would have ties
            first = (q[:, :, :1].float() * self.scale * k.float()).sum(-1)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(out.transpose(1, 2).reshape(b, t, d)), first


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """u = z + attention(LN(z)); u' = ATP(u); z' = u' + MLP(LN(u'))."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, atp: ATP):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp, self.atp = Attention(dim, heads), Mlp(dim, int(dim * mlp_ratio)), atp

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """z (B, 1 + N, d) -> (B, 1 + n', d) and the indices (B, n') kept among the N, None if all were."""
        index = None
        drops = self.atp.drops(z.shape[1] - self.atp.prefix)
        out, row = self.attn(self.norm1(z), row=drops)
        u = z + out
        if row is not None:
            u, index = self.atp(u, row)
        return u + self.mlp(self.norm2(u)), index


class PoolingViT(nn.Module):
    """Features (B, channels, H, W) -> CLS (B, dim) and `Kept`. atp: one `ATP` per block. kernel > 1: the projection cuts
    patches of an image itself. Keys as in the released APViT (the poolings add none, score "la" excepted)."""

    def __init__(
        self,
        *,
        channels: int,
        grid: tuple[int, int],
        dim: int,
        heads: int,
        mlp_ratio: float,
        app: APP,
        atp: Sequence[ATP],
        kernel: int = 1,
        init_std: float = 0.02,
    ):
        super().__init__()
        self.grid, n = grid, grid[0] * grid[1]
        if app.keep is not None:
            check_keep(app.keep, n)
        self.projs = nn.ModuleList([nn.Conv2d(channels, dim, kernel, kernel)])
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_pos_embed = nn.Parameter(torch.zeros(1, n, dim))
        self.cls_pos_embed = nn.Parameter(torch.zeros(1, 1, dim))
        self.app = app
        self.blocks = nn.ModuleList([Block(dim, heads, mlp_ratio, pooling) for pooling in atp])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for table in (self.patch_pos_embed, self.cls_token):  # cls_pos_embed stays zero
            nn.init.trunc_normal_(table, std=init_std)

    @property
    def rates(self) -> list[float]:
        """The keep rate of every block."""
        return [block.atp.rate for block in self.blocks]  # type: ignore[union-attr,misc]

    def forward(self, features: Tensor) -> tuple[Tensor, Kept]:
        x = self.projs[0](features)
        if tuple(x.shape[-2:]) != self.grid:
            raise ValueError(
                f"the features make a grid of {x.shape[-2]} x {x.shape[-1]}, the position table is for {self.grid[0]} x "
                f"{self.grid[1]}: resize the images, or build the model for their size (weights.py resizes the table)"
            )
        patches, index = self.app(x.flatten(2).transpose(1, 2), self.patch_pos_embed)
        kept = Kept(index)
        z = torch.cat([(self.cls_token + self.cls_pos_embed).expand(x.shape[0], -1, -1), patches], 1)
        for block in self.blocks:
            z, chosen = block(z)
            index = index if chosen is None else index.gather(1, chosen)
            kept.blocks.append(index)
        return self.norm(z)[:, 0], kept
