"""FQM: which student queries are distilled, and from which teacher query (upper level of Q-DETR, Eq. 10-12).

Per image, from the boxes of the last decoder layer, cxcywh in 0..1, without gradient:

    G_i = max_j GIoU(b_i^GT, b_j^S);   student j is kept if GIoU(b_i^GT, b_j^S) > tau G_i for at least one i       (Eq. 10, 11)
    k*(j) = argmax_k 2 GIoU(b_j^S, b_k^T) - 5 ||b_j^S - b_k^T||_1                                                        (Eq. 12)

Two misprints of the paper: "for all i" would keep nothing when objects lie apart, the sum over k stands inside the argmax.
"""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from q_detr.set_prediction import giou

batched_giou = torch.vmap(giou)  # (B, n, 4), (B, m, 4) -> (B, n, m)


@torch.no_grad()
def foreground_queries(student_boxes: Tensor, gt_boxes: Sequence[Tensor], *, tau: float = 0.6) -> Tensor:
    """Which student queries are kept. student_boxes: (B, Q, 4); gt_boxes: an (n, 4) per image, n >= 0 -> bool (B, Q).

    The inequality is strict: tau = 1 keeps nothing. An object that no box overlaps (G_i < 0) selects nothing, for tau < 1 too,
    because then tau G_i > G_i. ValueError for tau outside 0..1."""
    if not 0 <= tau <= 1:
        raise ValueError(f"tau={tau}: must lie in 0..1")
    # (B, n, 4); the padding has no area, so its GIoU is never above 0 and it selects nothing, as an object that no box overlaps.
    truth = pad_sequence([t.to(student_boxes) for t in gt_boxes], batch_first=True)
    overlap = batched_giou(truth, student_boxes)  # (B, n, Q)
    best = overlap.amax(dim=2, keepdim=True)
    return (overlap > tau * best).any(dim=1)


@torch.no_grad()
def matched_teacher_queries(student_boxes: Tensor, teacher_boxes: Tensor, *, kept: Tensor | None = None) -> Tensor:
    """k*(j) of each student query. (B, Q, 4), (B, K, 4) -> int64 (B, Q).

    Several students may share a teacher query, in spite of the paper's wording. With kept (bool (B, Q)) the kept ones get
    different teacher queries, the assignment with the largest sum of the same score; the others stay at their argmax.
    ValueError if an image keeps more than K."""
    distance = torch.cdist(student_boxes.float(), teacher_boxes.float(), p=1)
    score = 2 * batched_giou(student_boxes, teacher_boxes) - 5 * distance
    partner = score.argmax(dim=2)
    if kept is not None:
        for i, (own, rows) in enumerate(zip(score.cpu(), kept.cpu(), strict=True)):
            if int(rows.sum()) > own.shape[1]:
                raise ValueError(f"one_to_one: {int(rows.sum())} student queries for {own.shape[1]} teacher queries")
            _, columns = linear_sum_assignment(own[rows].numpy(), maximize=True)
            partner[i, kept[i]] = torch.from_numpy(columns).to(partner.device)
    return partner
