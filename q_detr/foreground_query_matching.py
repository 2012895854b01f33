"""FQM: which student queries are distilled, and from which teacher query (upper level of Q-DETR, Eq. 10-12).

Per image, from the boxes of the last decoder layer, cxcywh in 0..1, without gradient:

    G_i = max_j GIoU(b_i^GT, b_j^S);   student j is kept if GIoU(b_i^GT, b_j^S) > tau G_i for at least one i       (Eq. 10, 11)
    k*(j) = argmax_k 2 GIoU(b_j^S, b_k^T) - 5 ||b_j^S - b_k^T||_1                                                        (Eq. 12)

Two misprints of the paper: "for all i" would keep nothing when objects lie apart, the sum over k stands inside the argmax.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from q_detr.set_prediction import giou


@torch.no_grad()
def foreground_queries(student_boxes: Tensor, gt_boxes: Tensor, *, tau: float = 0.6) -> Tensor:
    """Indices of the kept student queries. student_boxes: (Q, 4), gt_boxes: (n, 4) -> int64 (m,), increasing.

    The inequality is strict: tau = 1 keeps nothing. An object that no box overlaps (G_i < 0) selects nothing, for tau < 1 too,
    because then tau G_i > G_i."""
    if not 0 <= tau <= 1:
        raise ValueError(f"tau={tau}: must lie in 0..1")
    if len(gt_boxes) == 0:
        return torch.zeros(0, dtype=torch.int64, device=student_boxes.device)
    overlap = giou(gt_boxes, student_boxes)  # (n, Q)
    best = overlap.max(dim=1, keepdim=True).values
    return (overlap > tau * best).any(dim=0).nonzero().flatten()


@torch.no_grad()
def matched_teacher_queries(student_boxes: Tensor, teacher_boxes: Tensor, *, one_to_one: bool = False) -> Tensor:
    """k*(j) for each student box. (m, 4), (K, 4) -> int64 (m,).

    Several students may share a teacher query, in spite of the paper's wording; one_to_one=True solves the assignment with
    the same score instead (ValueError if m > K)."""
    distance = torch.cdist(student_boxes.float(), teacher_boxes.float(), p=1)
    score = 2 * giou(student_boxes, teacher_boxes) - 5 * distance
    if not one_to_one:
        return score.argmax(dim=1) if len(student_boxes) else torch.zeros(0, dtype=torch.int64, device=score.device)
    if len(student_boxes) > len(teacher_boxes):
        raise ValueError(f"one_to_one: {len(student_boxes)} student queries for {len(teacher_boxes)} teacher queries")
    _, columns = linear_sum_assignment(score.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(score.device)
