"""Ma19: convolutions with generalised divisive normalisation and spatial pyramid max pooling, learned from noisy
annotators (Ma et al. 2019)."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iqa_attack.photographs.images import check_images

LEVELS = (1, 2, 3)
BINS = sum(n * n for n in LEVELS)


class GDN(nn.Module):
    """y_i = x_i / sqrt(beta_i + sum_j gamma_ji x_j^2), over channels. gamma starts at a multiple of the identity; with 1 and
    1e-4, as in the released code, every output starts near the sign of its input.

    `project()` keeps both positive; call it after every optimiser step."""

    def __init__(self, channels: int, *, gamma: float = 1.0, beta: float = 1e-4):
        super().__init__()
        self.gamma = nn.Parameter(gamma * torch.eye(channels))
        self.beta = nn.Parameter(torch.full((channels,), beta))

    def forward(self, x: Tensor) -> Tensor:
        pool = F.conv2d(x**2, self.gamma.T[:, :, None, None], self.beta)
        return x * pool.rsqrt()

    @torch.no_grad()
    def project(self) -> None:
        self.gamma.clamp_(min=2e-10)
        self.beta.clamp_(min=1e-6)


def spatial_pyramid(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 14 C): maxima over a 1 x 1, 2 x 2 and 3 x 3 grid, H and W at least 3.

    Windows and strides are ceil(side / n) with the rest as padding, unlike those of AdaptiveMaxPool2d."""
    parts = []
    for n in LEVELS:
        kernel = [math.ceil(side / n) for side in x.shape[2:]]
        pad = [(k * n - side + 1) // 2 for k, side in zip(kernel, x.shape[2:], strict=True)]
        # -inf outside, and more of it after the end: the windows of a small side (e.g. 4 in 3) would begin outside
        # otherwise
        extra = [k * n - side - p for k, side, p in zip(kernel, x.shape[2:], pad, strict=True)]
        padded = F.pad(x, (pad[1], max(extra[1], 0), pad[0], max(extra[0], 0)), value=-math.inf)
        parts.append(F.max_pool2d(padded, kernel, kernel)[:, :, :n, :n].flatten(1))
    return torch.cat(parts, dim=1)


class Ma19(nn.Module):
    """forward: images (B, 3, H, W) in 0..1 -> quality (B,), larger = better. `distribution` also gives the variance.

    pooling "gap": global average pooling in place of the pyramid (the paper's ablation). gamma, beta: where the normalisations
    start."""

    minimum = 24

    def __init__(self, *, width: int = 48, pooling: str = "spp", gamma: float = 1.0, beta: float = 1e-4):
        super().__init__()
        if pooling not in ("spp", "gap"):
            raise ValueError(f"pooling={pooling!r}, allowed: spp, gap")
        if gamma <= 0 or beta <= 0:
            raise ValueError(f"gamma={gamma}, beta={beta}, allowed: > 0")
        self.width, self.pooling = width, pooling
        channels = [3, width, width, width, width]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(channels))
        self.norms = nn.ModuleList(GDN(width, gamma=gamma, beta=beta) for _ in self.convs)
        self.fc1 = nn.Linear(width * (BINS if pooling == "spp" else 1), 128)
        self.fc2 = nn.Linear(128, 2)
        for conv in self.convs:
            nn.init.xavier_uniform_(conv.weight)  # type: ignore[arg-type]

    def distribution(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mean (B,), variance (B,)) of the quality."""
        check_images(x, self.minimum, "Ma19", flat=True)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x))
            if i < len(self.convs) - 1:
                x = F.max_pool2d(x, 2)
        x = spatial_pyramid(x) if self.pooling == "spp" else x.mean((2, 3))
        out = self.fc2(F.relu(self.fc1(x)))
        return out[:, 0], out[:, 1].exp()

    def forward(self, x: Tensor) -> Tensor:
        return self.distribution(x)[0]

    def project(self) -> None:
        for norm in self.norms:
            norm.project()  # type: ignore[operator]

    def options(self) -> dict:
        return {"width": self.width, "pooling": self.pooling}


class Annotators(nn.Module):
    """K full-reference models as annotators of pairs, each with a latent sensitivity and specificity.

    forward: the negative log likelihood of their votes, network and annotators learned together."""

    def __init__(self, count: int):
        super().__init__()
        self.sensitivity = nn.Parameter(torch.full((count,), 2.0))  # logits
        self.specificity = nn.Parameter(torch.full((count,), 2.0))

    def forward(self, better: Tensor, votes: Tensor) -> Tensor:
        """better (P,): probability that the first of a pair is better; votes (P, K) in {0, 1}. Mean over pairs.

        P(votes) = p prod_k sens_k^v (1 - sens_k)^(1-v) + (1 - p) prod_k spec_k^(1-v) (1 - spec_k)^v"""
        a, b = self.sensitivity, self.specificity
        if_better = (votes * F.logsigmoid(a) + (1 - votes) * F.logsigmoid(-a)).sum(1)
        if_worse = ((1 - votes) * F.logsigmoid(b) + votes * F.logsigmoid(-b)).sum(1)
        p = better.clamp(1e-6, 1 - 1e-6)
        return -torch.logaddexp(p.log() + if_better, (-p).log1p() + if_worse).mean()


def probability_better(mean: Tensor, variance: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """P(image i is better than image j) = Phi((mu_i - mu_j) / sqrt(v_i + v_j))."""
    z = (mean[i] - mean[j]) / (variance[i] + variance[j] + 1e-8).sqrt()
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))
