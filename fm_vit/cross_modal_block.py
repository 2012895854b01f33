"""The Cross-Modal Transformer Block (CMTB) of the abstract: MMA, then MFA, then an MLP, all on class tokens; patch tokens pass.

blocks = {"rgb": CrossModalBlock(384, 6), "ir": CrossModalBlock(384, 6)}       one per branch
((c, masks),) = cross_modal({"rgb": z_rgb, "ir": z_ir}, blocks, [["rgb", "ir"]])     z (B, 1 + N, D)

That only class tokens change, and that an MLP follows, is our reading after MA-ViT (Liu and Liang, 2022).
"""

from collections.abc import Mapping, Sequence

from timm.layers.mlp import Mlp
from torch import Tensor, nn

from fm_vit.fusion_attention import FusionAttention
from fm_vit.mutual_attention import MODES, RULES, MutualAttention, combine, select


class CrossModalBlock(nn.Module):
    """The CMTB of one branch: 16 D^2 + 21 D parameters with both attentions and mlp_ratio 4.

    mma: how the masks of the modalities are combined, None leaves MMA out; rule, share: how a mask is made. mfa: with
    MFA or without. zero_init: output projections and the last layer of the MLP start at zero, so that the block starts as
    the identity. ValueError for a value that is not allowed."""

    def __init__(
        self, dim: int, heads: int, *, mma: str | None = "union", rule: str = "top", share: float = 0.5, mfa: bool = True,
        mlp_ratio: float = 4.0, zero_init: bool = False,
    ):  # fmt: skip
        super().__init__()
        if (mma is not None and mma not in MODES) or rule not in RULES or not 0 < share <= 1:
            raise ValueError(
                f"mma={mma!r}, rule={rule!r}, share={share}, allowed: {', '.join(MODES)} or null; {', '.join(RULES)}; "
                "0 < share <= 1"
            )
        self.mode, self.rule, self.share = mma, rule, share
        self.mma = None if mma is None else MutualAttention(dim, heads)
        self.mfa = FusionAttention(dim, heads) if mfa else None
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if zero_init:
            for last in [m.proj for m in (self.mma, self.mfa) if m is not None] + [self.mlp.fc2]:
                nn.init.zeros_(last.weight)


def cross_modal(
    tokens: Mapping[str, Tensor], blocks: Mapping[str, CrossModalBlock], paths: Sequence[Sequence[str]]
) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """(class tokens (B, D), masks) of every path, a subset of the modalities in canonical order, after the CMTB of each of its
    branches; patch tokens do not change.

    tokens: (B, 1 + N, D) of every modality of any path. masks: the combined mask U (B, N) of every branch with MMA, True for
    the patches that it reads. Keys, values and own masks depend on a branch and a modality alone: the paths share them."""
    present = dict.fromkeys(m for path in paths for m in path)
    maps = {m: mma.look(tokens[m]) for m in present if (mma := blocks[m].mma) is not None}
    own = {m: select(logits.mean(1), rule=blocks[m].rule, share=blocks[m].share) for m, (logits, _) in maps.items()}
    pairs = dict.fromkeys((m, j) for path in paths for m in path for j in path)
    patches = {j: tokens[j][:, 1:] for j in present}
    seen = {(m, j): mfa.look(patches[j]) for m, j in pairs if (mfa := blocks[m].mfa) is not None}
    before = {m: tokens[m][:, 0] for m in present}
    done = []
    for path in paths:
        out, used = {}, {}
        for m in path:
            block, c = blocks[m], before[m]
            if block.mma is not None and block.mode is not None:
                used[m] = combine({j: own[j] for j in path if j in own}, m, mode=block.mode)
                c = c + block.mma.read(*maps[m], used[m])
            if block.mfa is not None:
                c = c + block.mfa.read(c, [seen[m, j] for j in path])
            out[m] = c + block.mlp(block.norm(c))
        done.append((out, used))
    return done
