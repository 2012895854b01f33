"""The loss of the two-stage training: cross-entropy with the soft labels of a real-valued teacher."""

import torch.nn.functional as F
from torch import Tensor


def distribution_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_b sum_n -softmax(t_b)_n log_softmax(s_b)_n = KL + H(teacher), temperature 1. Logits (B, N) -> scalar.

    ValueError for different shapes (a teacher with other classes) or a teacher that would be trained."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"student logits {tuple(student.shape)}, teacher logits {tuple(teacher.shape)}: "
            "the teacher must have the same classes"
        )
    if teacher.requires_grad:
        raise ValueError("the teacher's logits require a gradient; compute them under torch.no_grad()")
    return F.cross_entropy(student, teacher.softmax(1))
