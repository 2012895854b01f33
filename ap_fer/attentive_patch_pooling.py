"""Attentive Patch Pooling (APP): keep the k patches whose feature vectors are largest.

    s_p = sum_c |X_cp|          the published score of patch p, from the projected features X before the position embedding
    z   = (X + P)[k largest s]  the position is added first, so a kept patch keeps its place code

No parameters, no gradient through the choice: nothing is scaled by s, and dropped patches receive exactly none.
"""

import torch
from torch import Tensor, nn

from ap_fer.token_selection import When, active, check_keep, check_when, gather_tokens, select

SCORES = ("sum", "sum_abs_1", "sum_abs_2", "max", "max_abs_1", "channel", "noise", "la")


def patch_score(x: Tensor, mode: str = "sum_abs_1") -> Tensor:
    """Score map s (B, N) of the projected features x (B, N, d), in float32.

    sum: sum_c X; sum_abs_1: sum_c |X| (published); sum_abs_2: sum_c X^2; max, max_abs_1: maxima over channels;
    channel: one channel drawn per call (the paper's "Random"); noise: uniform noise, the control without information."""
    x = x.detach().float()
    if mode == "sum":
        return x.sum(-1)
    if mode == "sum_abs_1":
        return x.abs().sum(-1)
    if mode == "sum_abs_2":
        return x.square().sum(-1)
    if mode == "max":
        return x.amax(-1)
    if mode == "max_abs_1":
        return x.abs().amax(-1)
    if mode == "channel":
        return x[..., int(torch.randint(x.shape[-1], ()))]
    if mode == "noise":
        return torch.rand(x.shape[:2]).to(x.device)  # drawn on the CPU: the same on every device
    raise ValueError(f"score={mode!r}; use one of {', '.join(SCORES)}")


class LocalAttention(nn.Module):
    """The learnable map of TransFER (LA): 1x1 conv d -> d/16, BN, ReLU, 1x1 conv -> 1, BN, sigmoid. (B, N, d) -> (B, N).

    The convolutions have biases, as in the released code: 37,059 parameters at d = 768 (37,010 without)."""

    def __init__(self, channels: int, ratio: int = 16):
        super().__init__()
        if channels % ratio:
            raise ValueError(f"score='la' needs channels divisible by {ratio}, got {channels}")
        hidden = channels // ratio
        self.net = nn.Sequential(
            nn.Conv1d(channels, hidden, 1), nn.BatchNorm1d(hidden), nn.ReLU(),
            nn.Conv1d(hidden, 1, 1), nn.BatchNorm1d(1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.transpose(1, 2))[:, 0]


class APP(nn.Module):
    """tokens, index = APP(160)(x, position): x (B, N, d) projected features, position (1, N, d) or None.

    keep: k, or None to keep all. score: see `patch_score`, or "la" (with `channels` = d), whose map also multiplies x so
    that it learns. lowest: keep the smallest scores instead (the sanity row "worst"). when: both | train | test.
    Returns (B, k, d) in raster order and the indices (B, k) kept, ascending."""

    def __init__(
        self,
        keep: int | None,
        *,
        score: str = "sum_abs_1",
        lowest: bool = False,
        when: str = "both",
        channels: int | None = None,
    ):
        super().__init__()
        if score not in SCORES:
            raise ValueError(f"score={score!r}; use one of {', '.join(SCORES)}")
        if score == "la" and channels is None:
            raise ValueError("score='la' is learnable: give channels, the width of the features")
        self.keep = None if keep is None else check_keep(keep)
        self.score, self.lowest = score, lowest
        self.when: When = check_when(when)
        self.attention = LocalAttention(channels) if score == "la" and channels is not None else None

    def forward(self, x: Tensor, position: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scores = None
        if self.attention is not None:
            scores = self.attention(x)
            x = x * scores[..., None]
        tokens = x if position is None else x + position
        n = x.shape[1]
        if self.keep is None or self.keep == n or not active(self.when, self.training):
            return tokens, torch.arange(n, device=x.device).expand(x.shape[0], -1)
        k = check_keep(self.keep, n)
        index = select(patch_score(x, self.score) if scores is None else scores, k, lowest=self.lowest)
        return gather_tokens(tokens, index), index

    def extra_repr(self) -> str:
        return f"keep={self.keep}, score={self.score}, lowest={self.lowest}, when={self.when}"
