"""DRD: the co-attended features of the foreground queries follow the teacher's (Eq. 14-15).

L_DRD = mean over the kept pairs of ||D~^S_j - D~^T_k*(j)||_2,   L = L_GT + lambda L_DRD,   lambda = 2.5
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from q_detr.foreground_query_matching import batched_giou, foreground_queries, matched_teacher_queries

FEATURES = {"pre_proj": "co_attended", "post_proj": "co_projected"}
LAYERS = ("all", "last")
SELECTIONS = ("foreground", "all")
PARTNERS = ("boxes", "index")
DISTANCES = ("euclidean", "cosine")


def check_options(
    *, tau: float = 0.6, select: str = "foreground", layers: str = "all", feature: str = "pre_proj", one_to_one: bool = False,
    partner: str = "boxes", distance: str = "euclidean",
) -> None:  # fmt: skip
    """ValueError for an option of `drd_loss` that it does not know, or options that exclude each other."""
    for name, value, allowed in (
        ("select", select, SELECTIONS), ("layers", layers, LAYERS), ("feature", feature, tuple(FEATURES)),
        ("partner", partner, PARTNERS), ("distance", distance, DISTANCES),
    ):  # fmt: skip
        if value not in allowed:
            raise ValueError(f"{name}={value!r}, allowed: {', '.join(allowed)}")
    if not 0 <= tau <= 1:
        raise ValueError(f"tau={tau}: must lie in 0..1")
    if one_to_one and partner == "index":
        raise ValueError("one_to_one=true chooses partners by their boxes: not with partner=index")


def layer_weight(weight: float, *, layers: int, of: int | None) -> float:
    """lambda for a network of `layers` decoder layers. of: the layers of the network that lambda was found for (6 in the paper),
    None to take it as it is. The detection loss is a sum over decoder layers and L_DRD a mean: one lambda weighs 6 / layers times
    as much in a smaller network."""
    return weight if of is None else weight * layers / of


def drd_loss(
    student: Mapping[str, Any], teacher: Mapping[str, Any], gt_boxes: Sequence[Tensor], *, tau: float = 0.6,
    select: str = "foreground", layers: str = "all", feature: str = "pre_proj", one_to_one: bool = False,
    partner: str = "boxes", distance: str = "euclidean",
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """(L_DRD without lambda, {"pairs": per image, "pair_giou": mean}). Works with any DETR whose outputs hold

    pred_boxes (B, Q, 4) cxcywh of the last layer and co_attended (or co_projected) (L, B, Q, d); student and teacher may
    differ in Q, not in d. gt_boxes: one (n, 4) per image. The teacher gets no gradient.
    select: "foreground" is FQM; "all" is full imitation: every student query, the same matching. layers: mean over all
    decoder layers or the last only, always with the pairs of the last layer's boxes. feature: D before (Eq. 3) or after the
    output projection. No kept pair gives 0 with a zero gradient. Two controls that are not the paper's: partner "index" takes the
    teacher query of the same index in place of the best box; distance "cosine" is 1 - cos of the angle, without lengths.
    ValueError for an unknown option, tau outside 0..1 or different d."""
    check_options(
        tau=tau,
        select=select,
        layers=layers,
        feature=feature,
        one_to_one=one_to_one,
        partner=partner,
        distance=distance,
    )
    ours, theirs = student[FEATURES[feature]], teacher[FEATURES[feature]].detach()
    if layers == "last":
        ours, theirs = ours[-1:], theirs[-1:]
    if ours.shape[-1] != theirs.shape[-1] or ours.shape[:2] != theirs.shape[:2]:
        raise ValueError(
            f"co-attended features {tuple(ours.shape)} of the student and {tuple(theirs.shape)} of the teacher: layers, batch "
            "and width (d_model) must agree"
        )
    boxes, other = student["pred_boxes"].detach(), teacher["pred_boxes"].detach()
    if partner == "index" and boxes.shape[1] != other.shape[1]:
        raise ValueError(f"partner=index: {boxes.shape[1]} student queries for {other.shape[1]} teacher queries")
    kept = foreground_queries(boxes, gt_boxes, tau=tau)
    if select == "all":
        kept = torch.ones_like(kept)
    if partner == "index":
        match = torch.arange(boxes.shape[1], device=boxes.device).expand(len(boxes), -1)
    else:
        match = matched_teacher_queries(boxes, other, kept=kept if one_to_one else None)
    image, query = kept.nonzero(as_tuple=True)
    a, b = ours[:, image, query], theirs[:, image, match[image, query]]  # (layers, pairs, d)
    if distance == "euclidean":
        gap = torch.linalg.vector_norm(a - b, dim=-1)
    else:
        gap = 1 - F.cosine_similarity(a, b, dim=-1)
    pairs = gap.shape[1]
    overlap = torch.take_along_dim(batched_giou(boxes, other), match[..., None], dim=2)[image, query]
    loss = gap.mean() if pairs else 0 * ours.sum()
    log = {"pairs": pairs / max(len(gt_boxes), 1), "pair_giou": overlap.mean().double() if pairs else 0.0}
    return loss, log
