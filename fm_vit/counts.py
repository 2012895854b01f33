"""Count what follows from the architecture: parameters and MACs of trunks, CMTBs and branches.

python counts.py        writes runs/default/counts/seed0/result.json, in seconds, without any data or weights
"""

from typing import Any

import torch

from common.metrics.ops import count_macs, count_parameters, record_counts
from common.scripts import script
from fm_vit.baselines import ConcatFusion, CrossAttentionFusion, SharedViT, TwoBranchCMFL
from fm_vit.cross_modal_block import CrossModalBlock
from fm_vit.model import FMViT

SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # width, heads
MODALITIES = ["rgb", "depth", "ir"]
ROWS: dict[str, tuple[Any, dict[str, Any]]] = {  # the arms that have other parameters than FM-ViT, at ViT-S
    "late_fusion": (FMViT, {"after": []}),
    "no_mma": (FMViT, {"cmtb": {"mma": None}}), "no_mfa": (FMViT, {"cmtb": {"mfa": False}}),
    "neither": (FMViT, {"cmtb": {"mma": None, "mfa": False}}), "shared": (SharedViT, {}), "concat": (ConcatFusion, {}),
    "cross_attention": (CrossAttentionFusion, {}), "cmfl": (TwoBranchCMFL, {}),
}  # fmt: skip


def cmtb_parameters(dim: int) -> int:
    """16 D^2 + 21 D: two attentions with four projections each, an MLP of ratio 4, four LayerNorms."""
    return 16 * dim**2 + 21 * dim


def cmtb_macs(dim: int, modalities: int, patches: int = 196) -> int:
    """MMA D^2 (2 + 2 N) + 2 N D; MFA 2 D^2 + 2 (1 + N s)(D^2 + D); MLP 8 D^2, for s modalities present."""
    mma = dim**2 * (2 + 2 * patches) + 2 * patches * dim
    mfa = 2 * dim**2 + 2 * (1 + patches * modalities) * (dim**2 + dim)
    return mma + mfa + 8 * dim**2


def count() -> dict[str, float]:
    """Counted on the models themselves, not by the formulas; MACs of one sample at 224 x 224."""
    found: dict[str, float] = {}
    with torch.device("meta"):  # shapes only, nothing is computed
        for size, (dim, heads) in SIZES.items():
            model = FMViT(MODALITIES, vit={"name": f"vit_{size}_patch16_224"})
            branch: Any = model.branches["rgb"]
            trunk = branch.trunk
            found[f"params_trunk_{size}"] = count_parameters(trunk)["total"]
            found[f"params_block_{size}"] = count_parameters(trunk.blocks[0])["total"]
            found[f"params_cmtb_{size}"] = count_parameters(CrossModalBlock(dim, heads))["total"]
            found[f"params_branch_{size}"] = count_parameters(branch)["total"]
            found[f"params_three_{size}"] = count_parameters(model)["total"]
            image = torch.zeros(1, 3, 224, 224)
            alone = sum(count_macs(trunk, image).values())
            found[f"macs_trunk_{size}"] = alone
            found[f"macs_block_{size}"] = sum(
                v for k, v in count_macs(trunk, image).items() if k.startswith("blocks.0.")
            )
            for name, present in (("single", MODALITIES[:1]), ("fused", MODALITIES)):
                total = sum(count_macs(model, dict.fromkeys(present, image)).values())
                found[f"macs_{name}_{size}"] = total
                found[f"macs_cmtb_{name}_{size}"] = total // len(present) - alone - 2 * dim  # less trunk and head
            if size == "small":
                for arm, (kind, options) in ROWS.items():
                    names = MODALITIES[:2] if arm == "cmfl" else MODALITIES
                    rows = kind(names, vit={"name": f"vit_{size}_patch16_224"}, **options)
                    found[f"params_row_{arm}"] = count_parameters(rows)["total"]
    return found


main = script("counts", lambda cfg, fabric, out: record_counts(cfg, fabric, out, count))


if __name__ == "__main__":
    main()
