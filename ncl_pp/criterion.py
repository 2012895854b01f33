"""The NCL++ criterion, and every ablation of it, from raw logits of K experts on N copies of B images."""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ncl_pp.balanced_softmax import balanced_logits, check_class_counts, cross_entropy
from ncl_pp.distillation import bod_ncl, inter_cl, intra_cl
from ncl_pp.hard_category_mining import (
    MODES,
    SELECTS,
    Mode,
    Select,
    hard_budget,
    hard_category_loss,
    hard_category_mask,
)

NORMS = ("nclpp", "ncl")
PARTIALS = (True, False, "inter", "intra")


class NCLPlusLoss(nn.Module):
    """L = sum_k (w_ce L_all^k + w_hcm L_hard^k) + L_inter + L_intra.

    class_counts: training images per class (C,), whole numbers, in the order of the class ids.
    hard: budget H (int) or ratio beta (float) of hard category mining, target included.
    lam: distillation weight. lam_hcm: weight of the partial part, used by norm="ncl" only.
    copies: N, augmented copies per image.
    w_ce, w_hcm: weights of the individual losses. w_hcm=0 switches mining off altogether: no `hcm` term, and
        distillation on the full perspective only.
    inter, intra: distil between experts / between copies. partial: nested (True), full perspective only
        (False), or nested in one of the two terms only ("inter" | "intra").
    norm: normalisation and partial part of the distillation, "nclpp" or "ncl" (CVPR 2022; has no intra term).
    mode, select: see `hard_category_mining`. balanced: False drops the prior (plain cross entropy).
    detach_teacher, official_eps: see `distillation`.

    ValueError for a class without images, H outside 1..C, a misspelt choice; at the call for shapes that do
    not fit and labels outside 0..C-1.
    """

    class_counts: Tensor

    def __init__(
        self,
        class_counts: Tensor | Iterable[float],
        *,
        hard: int | float = 0.3,
        lam: float = 0.6,
        lam_hcm: float = 0.6,
        copies: int = 1,
        w_ce: float = 1.0,
        w_hcm: float = 1.0,
        inter: bool = True,
        intra: bool = True,
        partial: bool | Literal["inter", "intra"] = True,
        norm: Literal["nclpp", "ncl"] = "nclpp",
        mode: Mode = "zero_logit",
        select: Select = "expert0",
        balanced: bool = True,
        detach_teacher: bool = False,
        official_eps: bool = False,
    ):
        super().__init__()
        for name, value, allowed in (
            ("norm", norm, NORMS),
            ("mode", mode, MODES),
            ("select", select, SELECTS),
            ("partial", partial, PARTIALS),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}, allowed: {', '.join(map(str, allowed))}")
        for name, value in (("lam", lam), ("lam_hcm", lam_hcm), ("w_ce", w_ce), ("w_hcm", w_hcm)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value!r}, allowed: finite and >= 0")
        if copies < 1 or copies != int(copies):
            raise ValueError(f"copies={copies!r}, allowed: a whole number >= 1")
        if norm == "ncl" and intra and copies > 1:
            raise ValueError(f"norm='ncl' has no distillation between copies (copies={copies}): set intra=False")
        # Integers, so that module.half() leaves them exact.
        self.register_buffer("class_counts", check_class_counts(class_counts))
        self.hard = hard_budget(len(self.class_counts), hard)
        self.lam, self.lam_hcm, self.w_ce, self.w_hcm = lam, lam_hcm, w_ce, w_hcm
        self.copies, self.inter, self.intra, self.partial = int(copies), inter, intra, partial
        self.norm, self.balanced = norm, balanced
        self.mode: Mode = mode
        self.select: Select = select
        self.kl_options = {"detach_teacher": detach_teacher, "official_eps": official_eps}

    def forward(self, logits: Tensor | Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Raw logits (K, N*B, C), or K tensors (N*B, C), rows copy-major; labels (B,) integers in 0..C-1.

        -> the weighted terms, scalars in float32 (float64 stays): `ce`, `hcm` unless w_hcm=0, `inter` if
        K > 1, `intra` if N > 1. Their sum is the loss: summed over experts, mean over rows.
        """
        z, labels = self._checked(logits, labels)
        if z.dtype in (torch.float16, torch.bfloat16):
            z = z.float()  # autocast keeps it so: no operation below is on its list for half precision
        v = balanced_logits(z, self.class_counts) if self.balanced else z
        terms = {"ce": self.w_ce * cross_entropy(v, labels).sum()}
        mask = None
        if self.w_hcm:
            mask = hard_category_mask(z, labels, self.hard, select=self.select)
            terms["hcm"] = self.w_hcm * hard_category_loss(v, labels, mask, mode=self.mode).sum()
        if self.inter and len(v) > 1:
            nested = mask if self.partial in (True, "inter") else None
            if self.norm == "ncl":
                options = {"lam_hcm": self.lam_hcm, "mode": self.mode, **self.kl_options}
                terms["inter"] = bod_ncl(v, nested, lam=self.lam, **options)
            else:
                terms["inter"] = inter_cl(v, nested, lam=self.lam, **self.kl_options)
        if self.intra and self.copies > 1:
            nested = mask if self.partial in (True, "intra") else None
            terms["intra"] = intra_cl(v, nested, copies=self.copies, lam=self.lam, **self.kl_options)
        return terms

    def _checked(self, logits: Tensor | Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits as (K, M, C) and labels tiled to (M,), or ValueError."""
        if not isinstance(logits, Tensor):
            shapes = [tuple(z.shape) for z in logits]
            if not shapes or len(set(shapes)) > 1:
                raise ValueError(f"every expert needs logits of one shape (N*B, C), got {shapes}")
            logits = torch.stack(tuple(logits))
        classes = len(self.class_counts)
        if logits.ndim != 3 or logits.shape[-1] != classes or not logits.is_floating_point():
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} ({logits.dtype}), expected floats of shape "
                f"(experts, rows, {classes}): there are {classes} class counts"
            )
        rows = logits.shape[1]
        if rows == 0 or rows % self.copies:
            raise ValueError(f"{rows} rows cannot be split into copies={self.copies} of the same images")
        if labels.shape != (rows // self.copies,) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} ({labels.dtype}), expected {rows // self.copies} "
                f"integers: one per image, {rows} rows = copies={self.copies} x images"
            )
        low, high = (int(x) for x in labels.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(f"labels span {low}..{high}, allowed: 0..{classes - 1}")
        return logits, labels.long().repeat(self.copies)
