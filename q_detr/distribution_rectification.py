"""DRD: the co-attended features of the foreground queries follow the teacher's (Eq. 14-15).

L_DRD = mean over the kept pairs of ||D~^S_j - D~^T_k*(j)||_2,   L = L_GT + lambda L_DRD,   lambda = 2.5
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from q_detr.foreground_query_matching import batched_giou, foreground_queries, matched_teacher_queries

FEATURES = {"pre_proj": "co_attended", "post_proj": "co_projected"}
LAYERS = ("all", "last")
SELECTIONS = ("foreground", "all")


def drd_loss(
    student: Mapping[str, Any], teacher: Mapping[str, Any], gt_boxes: Sequence[Tensor], *, tau: float = 0.6,
    select: str = "foreground", layers: str = "all", feature: str = "pre_proj", one_to_one: bool = False,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """(L_DRD without lambda, {"pairs": per image, "pair_giou": mean}). Works with any DETR whose outputs hold

    pred_boxes (B, Q, 4) cxcywh of the last layer and co_attended (or co_projected) (L, B, Q, d); student and teacher may
    differ in Q, not in d. gt_boxes: one (n, 4) per image. The teacher gets no gradient.
    select: "foreground" is FQM; "all" is full imitation: every student query, the same matching. layers: mean over all
    decoder layers or the last only, always with the pairs of the last layer's boxes. feature: D before (Eq. 3) or after the
    output projection. No kept pair gives 0 with a zero gradient.
    ValueError for an unknown option, tau outside 0..1 or different d."""
    for name, value, allowed in (
        ("select", select, SELECTIONS), ("layers", layers, LAYERS), ("feature", feature, tuple(FEATURES))
    ):  # fmt: skip
        if value not in allowed:
            raise ValueError(f"{name}={value!r}, allowed: {', '.join(allowed)}")
    ours, theirs = student[FEATURES[feature]], teacher[FEATURES[feature]].detach()
    if layers == "last":
        ours, theirs = ours[-1:], theirs[-1:]
    if ours.shape[-1] != theirs.shape[-1] or ours.shape[:2] != theirs.shape[:2]:
        raise ValueError(
            f"co-attended features {tuple(ours.shape)} of the student and {tuple(theirs.shape)} of the teacher: layers, batch "
            "and width (d_model) must agree"
        )
    boxes, other = student["pred_boxes"].detach(), teacher["pred_boxes"].detach()
    kept = foreground_queries(boxes, gt_boxes, tau=tau)
    if select == "all":
        kept = torch.ones_like(kept)
    partner = matched_teacher_queries(boxes, other, kept=kept if one_to_one else None)
    matched = torch.take_along_dim(theirs, partner[None, :, :, None], dim=2)
    distance = torch.linalg.vector_norm(ours[:, kept] - matched[:, kept], dim=-1)  # (layers, pairs)
    pairs = distance.shape[1]
    overlap = torch.take_along_dim(batched_giou(boxes, other), partner[..., None], dim=2)[kept]
    loss = distance.mean() if pairs else 0 * ours.sum()
    return loss, {"pairs": pairs / max(len(gt_boxes), 1), "pair_giou": overlap.mean().item() if pairs else 0.0}
