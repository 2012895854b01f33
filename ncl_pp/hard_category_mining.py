"""Hard category mining (HCM): the partial perspective of nested learning.

For every row the target and the H - 1 strongest wrong classes are selected. Two forms of the loss on them:
  zero_logit   u = m * v, cross entropy of u. The other classes stay in the denominator with logit 0, i.e.
               as the constant C - H. This is the released code and gave the published numbers. It depends
               on the scale of the counts and on a constant added to z.
  renorm       softmax over the selected classes only, as the paper describes it.
"""

import math
from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor

from ncl_pp.balanced_softmax import cross_entropy

Mode = Literal["zero_logit", "renorm"]
Select = Literal["expert0", "mean", "per_expert"]
MODES: tuple[str, ...] = get_args(Mode)
SELECTS: tuple[str, ...] = get_args(Select)


def hard_budget(num_classes: int, hard: int | float) -> int:
    """H, the number of selected classes, target included.

    hard: an int is H itself, 1..C; a float is the ratio beta in (0, 1] and H = floor(beta * C). The
    published budgets are 30 of 100, 300 of 1000, 2442 of 8142 (ratio 0.3) and 122 of 365 (give the number).
    """
    if isinstance(hard, Integral) and not isinstance(hard, bool):
        budget = int(hard)
    elif isinstance(hard, float) and 0 < hard <= 1:
        budget = math.floor(hard * num_classes + 1e-9)  # 0.29 * 100 is 28.999... in floating point
    else:
        raise ValueError(f"hard={hard!r}: give a number of classes (int) or a ratio in (0, 1] (float)")
    if not 1 <= budget <= num_classes:
        raise ValueError(f"hard={hard!r} selects H={budget} of C={num_classes} classes; allowed: 1..{num_classes}")
    return budget


@torch.no_grad()
def hard_category_mask(logits: Tensor, labels: Tensor, hard: int, *, select: Select = "expert0") -> Tensor:
    """Which classes are hard. RAW logits (K, M, C), labels (M,), budget H -> bool (K, M, C), H per row.

    The target is always selected, the others by their raw logit: balanced logits would mine head classes
    only.
    select: expert0 = expert 0 decides for all experts (published code); mean = the mean of the experts'
    logits decides (symmetric); per_expert = every expert decides for itself. Equal logits are broken
    arbitrarily. No gradient.
    """
    if select not in SELECTS:
        raise ValueError(f"select={select!r}, allowed: {', '.join(SELECTS)}")
    if not 1 <= hard <= logits.shape[-1]:
        raise ValueError(f"H={hard} hard classes of C={logits.shape[-1]}; allowed: 1..{logits.shape[-1]}")
    if select == "expert0":
        scores = logits[:1]
    elif select == "mean":
        scores = logits.mean(0, keepdim=True)
    else:
        scores = logits
    target = labels.expand(scores.shape[:2])[..., None]
    top = scores.scatter(-1, target, math.inf).topk(hard, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, top, True).expand(logits.shape)


def hard_category_loss(v: Tensor, labels: Tensor, mask: Tensor, *, mode: Mode = "zero_logit") -> Tensor:
    """L_hard of every expert: balanced logits v (K, M, C), labels (M,), bool mask (K, M, C) -> (K,).

    Mean over rows. The gradient at classes that are not selected is exactly 0 in both modes.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}, allowed: {', '.join(MODES)}")
    return cross_entropy(v.masked_fill(~mask, 0.0 if mode == "zero_logit" else -math.inf), labels)
