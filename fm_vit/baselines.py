"""The models that FM-ViT is compared with, on the same trunks and behind the same interface (see `fm_vit.model`).

Late fusion and single-modality ViTs are `FMViT` without CMTBs, or with one modality.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fm_vit.model import LIVE, FMViT, Logits, build_trunk, check_images, repeated

FILLS = ("zero", "black")


def linear_head(features: int) -> nn.Linear:
    head = nn.Linear(features, 2)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


class SharedViT(nn.Module):
    """One ViT for all modalities: each is classified alone, the score is the mean over those present."""

    selects = False  # no masks, see FMViT

    def __init__(self, modalities: Sequence[str], *, vit: Mapping[str, Any]):
        super().__init__()
        self.modalities = list(modalities)
        self.trunk = build_trunk(**vit)
        self.head = linear_head(self.trunk.embed_dim)

    def forward(self, images: Mapping[str, Tensor], paths: Sequence[Sequence[str]] | None = None) -> Any:
        names = check_images(images, self.modalities, self.trunk)
        features = self.trunk(torch.cat([repeated(images[m]) for m in names]))
        logits = dict(zip(names, self.head(features).chunk(len(names)), strict=True))
        return logits if paths is None else [{m: logits[m] for m in names if m in path} for path in paths]

    score = staticmethod(FMViT.score)
    loss = staticmethod(FMViT.loss)


class ZeroFilled(nn.Module):
    """Base of the fusion models that need every modality: absent ones are filled in.

    fill: "zero", images of zeros after normalisation; "black", black images before it, -1 with (x - 0.5) / 0.5. One convention in
    training and test; the published benchmark trains with black and tests with zero, which `train_fill` reproduces.
    dropout: probability per image and modality, except the first, of being filled in during training.
    ValueError for another fill or a probability outside 0..1."""

    selects = False

    def __init__(
        self, modalities: Sequence[str], *, vit: Mapping[str, Any], dropout: float = 0.0, fill: str = "zero",
        train_fill: str | None = None,
    ):  # fmt: skip
        super().__init__()
        if fill not in FILLS or train_fill not in (None, *FILLS) or not 0 <= dropout <= 1:
            raise ValueError(
                f"fill={fill!r}, train_fill={train_fill!r}, dropout={dropout}, allowed: {', '.join(FILLS)}; 0..1"
            )
        self.modalities, self.dropout = list(modalities), dropout
        self.fill, self.train_fill = fill, train_fill or fill
        self.trunks = nn.ModuleDict({m: build_trunk(**vit) for m in self.modalities})
        self.dim: int = self.trunks[self.modalities[0]].embed_dim  # pyright: ignore

    def forward(self, images: Mapping[str, Tensor], paths: Sequence[Sequence[str]] | None = None) -> Any:
        check_images(images, self.modalities, self.trunks[self.modalities[0]])
        outputs = [self._fuse({m: x for m, x in images.items() if m in path}) for path in paths or [list(images)]]
        return outputs if paths is not None else outputs[0]

    def _fuse(self, images: Mapping[str, Tensor]) -> Logits:
        value = {"zero": 0.0, "black": -1.0}[self.train_fill if self.training else self.fill]
        like = repeated(next(iter(images.values())))
        filled = {}
        for i, m in enumerate(self.modalities):
            x = repeated(images[m]) if m in images else torch.full_like(like, value)
            if self.training and self.dropout and i:
                gone = torch.rand(len(x), device=x.device) < self.dropout
                x = torch.where(gone[:, None, None, None], torch.full_like(x, value), x)
            filled[m] = x
        return {"fused": self.fuse(filled)}

    def fuse(self, images: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, 2) from all modalities."""
        raise TypeError(f"{type(self).__name__} defines no fusion")

    @staticmethod
    def score(logits: Logits) -> Tensor:
        return logits["fused"].float().softmax(-1)[:, LIVE]

    loss = staticmethod(FMViT.loss)


class ConcatFusion(ZeroFilled):
    """Class tokens of one trunk per modality, concatenated, and a linear classifier."""

    def __init__(self, modalities: Sequence[str], **options: Any):
        super().__init__(modalities, **options)
        self.head = linear_head(self.dim * len(self.modalities))

    def fuse(self, images: Mapping[str, Tensor]) -> Tensor:
        return self.head(torch.cat([self.trunks[m](x) for m, x in images.items()], dim=1))


class CrossAttentionFusion(ZeroFilled):
    """The cross-attention of the flexible-modal benchmark: the channels of every other modality attend to those of the first.

    With patch features F (C, N): F_m' = softmax(F_m F_1^T) F_1, then 1x1 convolution, batch norm and ReLU, added to F_m;
    the mean over patches of all modalities is concatenated and classified."""

    def __init__(self, modalities: Sequence[str], **options: Any):
        super().__init__(modalities, **options)
        others = self.modalities[1:]
        self.mix = nn.ModuleDict(
            {
                m: nn.Sequential(nn.Conv1d(self.dim, self.dim, 1, bias=False), nn.BatchNorm1d(self.dim), nn.ReLU())
                for m in others
            }
        )
        self.head = linear_head(self.dim * len(self.modalities))

    def fuse(self, images: Mapping[str, Tensor]) -> Tensor:
        features = {m: self.trunks[m].forward_features(x)[:, 1:].mT for m, x in images.items()}  # pyright: ignore
        first = features[self.modalities[0]]
        for m, mix in self.mix.items():
            attended = (features[m] @ first.mT).softmax(-1) @ first
            features[m] = features[m] + mix(attended)
        return self.head(torch.cat([f.mean(2) for f in features.values()], dim=1))


class TwoBranchCMFL(nn.Module):
    """RGB-D with the cross-modal focal loss: a head per branch and a joint one on both class tokens."""

    selects = False

    def __init__(self, modalities: Sequence[str], *, vit: Mapping[str, Any]):
        super().__init__()
        if len(modalities) != 2:
            raise ValueError(f"cmfl joins two modalities, got {list(modalities)}")
        self.modalities = list(modalities)
        self.trunks = nn.ModuleDict({m: build_trunk(**vit) for m in self.modalities})
        dim: int = self.trunks[self.modalities[0]].embed_dim  # pyright: ignore
        self.heads = nn.ModuleDict({m: linear_head(dim) for m in self.modalities})
        self.joint = linear_head(2 * dim)

    def forward(self, images: Mapping[str, Tensor], paths: Sequence[Sequence[str]] | None = None) -> Any:
        names = check_images(images, self.modalities, self.trunks[self.modalities[0]])
        features = {m: self.trunks[m](repeated(images[m])) for m in names}
        outputs = []
        for path in paths or [names]:
            out = {m: self.heads[m](features[m]) for m in names if m in path}
            if len(out) == 2:
                out["joint"] = self.joint(torch.cat([*features.values()], dim=1))
            outputs.append(out)
        return outputs if paths is not None else outputs[0]

    @staticmethod
    def score(logits: Logits) -> Tensor:
        """Of the joint head where both modalities are there, else of the one that is."""
        head = logits.get("joint", next(iter(logits.values())))
        return head.float().softmax(-1)[:, LIVE]

    def loss(
        self, logits: Logits, labels: Tensor, *, cmfl: float = 0.5, alpha: float = 1.0, gamma: float = 3.0
    ) -> Tensor:
        """(1 - cmfl) CE of the joint head + cmfl (CMFL of one branch + CMFL of the other). ValueError for cmfl outside 0..1, or
        alpha <= 0 or gamma < 0, or a path without both modalities."""
        if not 0 <= cmfl <= 1 or alpha <= 0 or gamma < 0:
            raise ValueError(
                f"method.loss: cmfl={cmfl}, alpha={alpha}, gamma={gamma}, allowed: 0 <= cmfl <= 1, alpha > 0, gamma >= 0"
            )
        if "joint" not in logits:
            raise ValueError("method.loss.paths: the cross-modal focal loss needs both modalities, paths [cross]")
        a, b = (logits[m] for m in self.modalities)
        focal = cross_modal_focal(a, b, labels, alpha=alpha, gamma=gamma)
        focal = focal + cross_modal_focal(b, a, labels, alpha=alpha, gamma=gamma)
        return (1 - cmfl) * F.cross_entropy(logits["joint"].float(), labels) + cmfl * focal


def cross_modal_focal(
    logits: Tensor, other: Tensor, labels: Tensor, *, alpha: float = 1.0, gamma: float = 3.0
) -> Tensor:
    """CMFL of one branch: mean of -alpha (1 - w)^gamma log p, w = q 2 p q / (p + q), p and q the probabilities of the true
    class from this branch and the other. logits, other: (B, 2); labels: (B,). The weight of an image that both branches
    know falls; gradients flow through p and q."""
    log_p = F.log_softmax(logits.float(), -1).gather(1, labels[:, None]).squeeze(1)
    p, q = log_p.exp(), other.float().softmax(-1).gather(1, labels[:, None]).squeeze(1)
    w = q * 2 * p * q / (p + q).clamp_min(1e-12)
    return (-alpha * (1 - w).clamp_min(0) ** gamma * log_p).mean()
