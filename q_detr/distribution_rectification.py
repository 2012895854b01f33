"""DRD: the co-attended features of the foreground queries follow the teacher's (Eq. 14-15).

L_DRD = mean over the kept pairs of ||D~^S_j - D~^T_k*(j)||_2,   L = L_GT + lambda L_DRD,   lambda = 2.5
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from q_detr.foreground_query_matching import foreground_queries, matched_teacher_queries
from q_detr.set_prediction import giou

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
    distances, overlaps = [], []
    boxes = student["pred_boxes"].detach(), teacher["pred_boxes"].detach()
    for i, (own, other, truth) in enumerate(zip(*boxes, gt_boxes, strict=True)):
        kept = torch.arange(len(own), device=own.device)
        if select == "foreground":
            kept = foreground_queries(own, truth.to(own), tau=tau)
        partner = matched_teacher_queries(own[kept], other, one_to_one=one_to_one)
        distances.append(torch.linalg.vector_norm(ours[:, i, kept] - theirs[:, i, partner], dim=-1).flatten())
        overlaps.append(giou(own[kept], other[partner]).diagonal())
    every, pairs = torch.cat(distances), torch.cat(overlaps)
    loss = every.mean() if len(every) else 0 * ours.sum()
    return loss, {
        "pairs": len(pairs) / max(len(gt_boxes), 1),
        "pair_giou": pairs.mean().item() if len(pairs) else 0.0,
    }
