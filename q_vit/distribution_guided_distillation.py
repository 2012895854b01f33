"""Distribution guided distillation (DGD, Eqs. 10-11) on the similarity of queries and of keys, and DeiT's hard labels.

The released code contains no DGD. Choices that the paper leaves open are arguments; the defaults are ours."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Layers = Sequence[tuple[Tensor, Tensor]]  # (q, k) of every attention layer, each (B, H, N, D)
GUARD = 1e-12  # inside the square root of a distance: its gradient stays finite where the matrices are equal


def similarity(x: Tensor, *, norm: Literal["fro", "row"] = "fro", eps: float = 1e-6) -> Tensor:
    """G = x x^T / ||x x^T|| (Eq. 10). x: (..., N, D) -> (..., N, N), symmetric and positive semidefinite for "fro".

    norm: "fro", Frobenius norm of each matrix; "row", unit l2 norm of each row. eps bounds the norm from below.
    Invariant to x -> a x R for a != 0 and any rotation R of the D axes, the same for all tokens."""
    g = x @ x.mT
    if norm == "fro":
        size = torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True)
    elif norm == "row":
        size = torch.linalg.vector_norm(g, dim=-1, keepdim=True)
    else:
        raise ValueError(f"dgd norm={norm!r}, allowed: fro, row")
    return g / size.clamp(min=eps)


def similarity_distance(x: Tensor, target: Tensor, *, norm: Literal["fro", "row"] = "fro") -> Tensor:
    """||G_target - G_x||_F per matrix, (..., N, D) -> (...); 0 with zero gradient where they are equal, at most
    sqrt(2) for "fro". No gradient reaches `target`."""
    difference = similarity(target.detach(), norm=norm) - similarity(x, norm=norm)
    return (difference.square().sum((-2, -1)) + GUARD).sqrt() - GUARD**0.5


def dgd_loss(
    student: Layers,
    teacher: Layers,
    *,
    reduction: Literal["sum", "mean"] = "sum",
    norm: Literal["fro", "row"] = "fro",
    tokens: Literal["all", "patches"] = "all",
    prefix: tuple[int, int] = (0, 0),
    teacher_normalise: bool = False,
) -> Tensor:
    """L_DGD (Eq. 11): sum over layers and heads of ||G_q^T - G_q|| + ||G_k^T - G_k||, mean over the batch -> scalar.

    student: q, k after rectification; teacher: raw q, k of the float network. For windows, B counts windows.
    reduction: "sum" (paper) or "mean", the sum divided by its number of terms 2 L H.
    tokens: "patches" drops the first prefix = (student's, teacher's) tokens. With "all", if only the number of prefix
        tokens differs, the patch tokens alone are compared.
    teacher_normalise: compare with the teacher's q, k normalised per token, as the student's are.
    Raises ValueError when layers, heads or tokens do not correspond."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f"dgd reduction={reduction!r}, allowed: sum, mean")
    if tokens not in ("all", "patches"):
        raise ValueError(f"dgd tokens={tokens!r}, allowed: all, patches")
    if len(student) != len(teacher) or not student:
        raise ValueError(f"the student has {len(student)} attention layers, the teacher {len(teacher)}")
    first, second = prefix if tokens == "patches" or prefix[0] != prefix[1] else (0, 0)
    total, terms = student[0][0].new_zeros(()), 0
    for layer, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
        for name, x, target in zip("qk", ours, theirs, strict=True):
            x, target = x[..., first:, :], target[..., second:, :]
            if x.shape[:-1] != target.shape[:-1]:
                raise ValueError(
                    f"{name} of layer {layer}: student {tuple(x.shape)}, teacher {tuple(target.shape)}; batch, heads and "
                    "tokens must be equal (same patch size and image size)"
                )
            if teacher_normalise:
                target = F.layer_norm(target, target.shape[-1:])
            distance = similarity_distance(x.float(), target.float(), norm=norm)
            total = total + distance.sum(1).mean()
            terms += x.shape[1]
    return total / terms if reduction == "mean" else total


def hard_distillation(
    logits: Tensor | tuple[Tensor, Tensor], labels: Tensor, teacher_logits: Tensor | None, *, alpha: float = 0.5
) -> dict[str, Tensor]:
    """{"ce": (1 - alpha) CE(logits, labels), "kd": alpha CE(logits, argmax of the teacher)}, scalars; L_dist is the sum.

    logits: (B, C), or (class head, distillation head), of which the first meets the labels and the second the teacher.
    teacher_logits: (B, C); None: both meet the labels. Of equal largest teacher logits the first class counts."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}, allowed: 0..1")
    first, second = logits if isinstance(logits, tuple) else (logits, logits)
    if teacher_logits is not None and teacher_logits.shape != second.shape:
        raise ValueError(f"teacher logits {tuple(teacher_logits.shape)}, student {tuple(second.shape)}: other classes?")
    targets = labels if teacher_logits is None else teacher_logits.argmax(-1)
    return {"ce": (1 - alpha) * F.cross_entropy(first, labels), "kd": alpha * F.cross_entropy(second, targets)}
