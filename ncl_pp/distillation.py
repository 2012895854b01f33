"""Nested balanced online distillation: InterCL between experts, IntraCL between copies inside one expert.

KL(a<-b) = (1/R) sum_i sum_c p_b (log p_b - log p_a): a learns from b. Summed over classes, mean over rows,
temperature 1. Both sides receive gradient: b is pulled towards a as well, unless `detach_teacher`.

Everything is computed from log-probabilities. Handing a differentiable target that contains exact zeros to
`F.kl_div` gives NaN gradients (0 * log 0), which is what the published criterion does with its mask.
"""

from itertools import permutations

import torch
from torch import Tensor

from ncl_pp.hard_category_mining import MODES, Mode

OFFICIAL_EPS = 1e-9


def kl(
    log_p_a: Tensor,
    log_p_b: Tensor,
    weight: Tensor | None = None,
    *,
    detach_teacher: bool = False,
    official_eps: bool = False,
) -> Tensor:
    """KL(a<-b) = KL(p_b || p_a): log-probabilities (..., R, C) -> (...).

    weight: (..., R, C), multiplies every class's contribution; with the hard mask this is KL_m, which is a
    partial sum and may be negative. official_eps: log(p_a + 1e-9) as in the published code (differs below p
    of about 1e-7).
    """
    if detach_teacher:
        log_p_b = log_p_b.detach()
    if official_eps:
        log_p_a = torch.log(log_p_a.exp() + OFFICIAL_EPS)
    terms = log_p_b.exp() * (log_p_b - log_p_a)
    if weight is not None:
        terms = terms * weight
    return terms.sum(-1).mean(-1)


def _ordered_pairs(members: int) -> tuple[list[int], list[int]]:
    pairs = list(permutations(range(members), 2))
    return [a for a, _ in pairs], [b for _, b in pairs]


def bod_nclpp(
    log_p: Tensor,
    mask: Tensor | None,
    *,
    lam: float = 0.6,
    detach_teacher: bool = False,
    official_eps: bool = False,
) -> Tensor:
    """D_pp of NCL++: lam * 2 / (A (A-1)) * sum over a != b of [KL(a<-b) + KL_m(a<-b)].

    log_p: (..., A, R, C) log-probabilities of the A members. mask: bool, same shape, the mask of the
    learning member is used; None leaves the full perspective only. KL_m keeps the full softmax: it is not
    renormalised on the hard classes. -> (...); 0 for A = 1.
    """
    members = log_p.shape[-3]
    if members == 1:
        return log_p.new_zeros(log_p.shape[:-3])
    a, b = _ordered_pairs(members)
    weight = None if mask is None else 1 + mask[..., a, :, :].to(log_p.dtype)  # full and partial in one pass
    pairs = kl(
        log_p[..., a, :, :],
        log_p[..., b, :, :],
        weight,
        detach_teacher=detach_teacher,
        official_eps=official_eps,
    )
    return lam * 2 / (members * (members - 1)) * pairs.sum(-1)


def bod_ncl(
    v: Tensor,
    mask: Tensor | None,
    *,
    lam: float = 0.6,
    lam_hcm: float = 0.6,
    mode: Mode = "zero_logit",
    detach_teacher: bool = False,
    official_eps: bool = False,
) -> Tensor:
    """Distillation of NCL: lam / (A-1) * sum over a != b of KL(a<-b) on softmax(v), plus lam_hcm times the
    same on the hard classes: softmax(m * v) for `zero_logit`, softmax over the selected classes for `renorm`.

    v: (A, R, C) balanced logits. mask: bool (A, R, C) with equal row sums, the learning member's mask is
    used for both sides; None leaves the full perspective only. -> scalar, 0 for A = 1. For A = 3 the full
    part is 1.5 times that of `bod_nclpp`, so lam is not comparable between the two.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}, allowed: {', '.join(MODES)}")
    members, rows, _ = v.shape
    if members == 1:
        return v.new_zeros(())
    a, b = _ordered_pairs(members)

    def mean_kl(v_a: Tensor, v_b: Tensor) -> Tensor:
        pairs = kl(
            v_a.log_softmax(-1),
            v_b.log_softmax(-1),
            detach_teacher=detach_teacher,
            official_eps=official_eps,
        )
        return pairs.sum() / (members - 1)

    total = lam * mean_kl(v[a], v[b])
    if mask is not None:
        m = mask[a]
        if mode == "zero_logit":
            hard_a, hard_b = v[a].masked_fill(~m, 0.0), v[b].masked_fill(~m, 0.0)
        else:  # gathered, because a logit of -inf would give 0 * -inf in the KL
            hard_a, hard_b = v[a][m].view(len(a), rows, -1), v[b][m].view(len(a), rows, -1)
        total = total + lam_hcm * mean_kl(hard_a, hard_b)
    return total


def inter_cl(v: Tensor, mask: Tensor | None, **options) -> Tensor:
    """L_inter: D_pp between the experts on all M rows, every copy with the same copy of the other experts.

    v: (K, M, C) balanced logits, mask: bool (K, M, C) or None, options as `bod_nclpp` -> scalar.
    """
    return bod_nclpp(v.log_softmax(-1), mask, **options)


def intra_cl(v: Tensor, mask: Tensor | None, *, copies: int, **options) -> Tensor:
    """L_intra: D_pp between the N copies of the same images inside each expert, summed over experts.

    v: (K, N*B, C) balanced logits, rows copy-major; mask: bool (K, N*B, C) or None, of which the rows of
    copy 0 serve all copies (published code); options as `bod_nclpp` -> scalar.
    """
    v = v.unflatten(1, (copies, -1))
    if mask is not None:
        mask = mask.unflatten(1, (copies, -1))[:, :1].expand_as(v)
    return bod_nclpp(v.log_softmax(-1), mask, **options).sum()
