"""Information rectification module (IRM): normalise queries and keys before they are quantised (Eq. 8).

Codes carry the most information when they are equiprobable; a bare step cannot centre or rescale its input, the
learned affine map of a normalised q or k can. In today's words: QK-norm, placed before the quantiser.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Form = Literal["layernorm", "paper"]
Stats = Literal["token", "head", "tensor"]


class InformationRectification(nn.Module):
    """Rectified q (or k) of shape (B, H, N, D) -> same shape; one instance for q and another for k.

    form: "layernorm", as in the released code (it made the released weights): per token and head, over D,
            w * (q - mu) / sqrt(var + eps) + c      with `weight`, `bias` of length D shared by all heads;
        "paper", Eq. 8: (q - mu + beta) / (gamma * sqrt(var + eps))      with `gamma`, `beta` per head (H, 1, 1).
        With statistics per token both agree for w = 1 / gamma, c = beta = 0.
    stats (form "paper"): mean and variance over D of each token, over (N, D) of each head, or over (B, N, D) of each head.
        The paper does not say; only "token" is independent of the rest of the image and batch. "tensor" keeps running
        statistics (momentum 0.1) and uses them in evaluation.
    Variances are biased. A constant token gives c (or beta / (gamma sqrt(eps))), never NaN."""

    def __init__(
        self, head_dim: int, num_heads: int, *, form: Form = "layernorm", stats: Stats = "token", eps: float = 1e-5
    ):
        super().__init__()
        if form not in ("layernorm", "paper"):
            raise ValueError(f"irm form={form!r}, allowed: layernorm, paper")
        if stats not in ("token", "head", "tensor") or (form == "layernorm" and stats != "token"):
            raise ValueError(f"irm stats={stats!r}, allowed: token; with form=paper also head, tensor")
        if not eps > 0:
            raise ValueError(f"irm eps={eps}, allowed: > 0")
        self.head_dim, self.num_heads, self.form, self.stats, self.eps = head_dim, num_heads, form, stats, eps
        if form == "layernorm":
            self.weight, self.bias = nn.Parameter(torch.ones(head_dim)), nn.Parameter(torch.zeros(head_dim))
        else:
            self.gamma = nn.Parameter(torch.ones(num_heads, 1, 1))
            self.beta = nn.Parameter(torch.zeros(num_heads, 1, 1))
        if stats == "tensor":
            self.register_buffer("running_mean", torch.zeros(num_heads, 1, 1))
            self.register_buffer("running_var", torch.ones(num_heads, 1, 1))

    def moments(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, biased variance) that normalise q (B, H, N, D); they broadcast against it."""
        if self.stats != "tensor":
            axes = (-1,) if self.stats == "token" else (-2, -1)
            var, mean = torch.var_mean(q, dim=axes, correction=0, keepdim=True)
            return mean, var
        if not self.training:
            return self.running_mean, self.running_var  # pyright: ignore[reportReturnType]
        var, mean = torch.var_mean(q, dim=(0, 2, 3), correction=0)
        mean, var = mean.view(-1, 1, 1), var.view(-1, 1, 1)
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)  # pyright: ignore[reportCallIssue]
            self.running_var.lerp_(var, 0.1)  # pyright: ignore[reportCallIssue]
        return mean, var

    def forward(self, q: Tensor) -> Tensor:
        if q.ndim != 4 or q.shape[1] != self.num_heads or q.shape[-1] != self.head_dim:
            raise ValueError(f"q {tuple(q.shape)}: expected (B, {self.num_heads}, N, {self.head_dim})")
        if self.form == "layernorm":
            return F.layer_norm(q, (self.head_dim,), self.weight, self.bias, self.eps)
        mean, var = self.moments(q)
        return (q - mean + self.beta) / (self.gamma * (var + self.eps).sqrt())

    def extra_repr(self) -> str:
        return f"{self.num_heads} heads x {self.head_dim}, form={self.form}, stats={self.stats}"


@torch.no_grad()
def calibrate_rectification(irm: InformationRectification, raw: Tensor, *, offset: bool) -> None:
    """Start `irm` where it changes a pre-trained network least, from raw q or k (B, H, N, D) of one batch.

    layernorm: per channel the least-squares affine map from the normalised to the raw values. paper: per head, beta = mean of
    mu and 1 / gamma = mean of sigma. offset=False leaves c (beta) at 0: right for keys, because a constant added to
    all keys changes no softmax, so restoring it would only restore what the module is there to remove."""
    raw = raw.detach().double()
    if irm.form == "layernorm":
        normal = F.layer_norm(raw, (irm.head_dim,), eps=irm.eps)
        axes = (0, 1, 2)
        # A key's mean over the tokens, per head and channel, is invisible to the softmax: it must not enter its scale.
        centre = axes if offset else (0, 2)
        centred, target = normal - normal.mean(centre, keepdim=True), raw - raw.mean(centre, keepdim=True)
        slope = (centred * target).sum(axes) / centred.square().sum(axes).clamp(min=1e-12)
        irm.weight.copy_(slope)
        irm.bias.copy_(raw.mean(axes) - slope * normal.mean(axes) if offset else torch.zeros_like(slope))
        return
    axes = {"token": -1, "head": (-2, -1), "tensor": (0, -2, -1)}[irm.stats]
    var, mean = torch.var_mean(raw, dim=axes, correction=0, keepdim=True)
    per_head = lambda t: t.expand(*t.shape[:1], irm.num_heads, *t.shape[2:]).mean(dim=(0, 2, 3)).view(-1, 1, 1)  # noqa: E731
    irm.gamma.copy_(1 / per_head((var + irm.eps).sqrt()))
    irm.beta.copy_(per_head(mean) if offset else torch.zeros_like(irm.beta))
    if irm.stats == "tensor":
        irm.running_mean.copy_(mean.view(-1, 1, 1))  # pyright: ignore[reportCallIssue]
        irm.running_var.copy_(var.view(-1, 1, 1))  # pyright: ignore[reportCallIssue]


def code_entropy(codes: Tensor, low: int, high: int) -> float:
    """Entropy in bits of integer codes in low..high, any shape; at most log2(high - low + 1).
    Raises ValueError for no codes or codes outside the bounds."""
    if codes.numel() == 0:
        raise ValueError("no codes: the entropy of an empty tensor is not defined")
    if int(codes.min()) < low or int(codes.max()) > high:
        raise ValueError(f"codes in {int(codes.min())}..{int(codes.max())}, expected {low}..{high}")
    counts = (codes.flatten().long() - low).bincount(minlength=high - low + 1).double()
    return torch.special.entr(counts / counts.sum()).sum().item() / torch.log(torch.tensor(2.0)).item()


def gaussian_code_entropy(step: float, bits: int, *, mean: float = 0.0) -> tuple[float, list[float]]:
    """(entropy in bits, probabilities) of the signed codes of x ~ N(mean, 1): what step and shift can reach.

    2 bit: 1.4594 at the initial step 2 E|x|; 1.9343 with the best step; 2 with step .67449 and mean -step / 2."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    edges = torch.tensor([-torch.inf, *((c + 0.5) * step for c in range(low, high)), torch.inf], dtype=torch.float64)
    p = torch.special.ndtr(edges - mean).diff()
    return torch.special.entr(p).sum().item() / torch.log(torch.tensor(2.0, dtype=torch.float64)).item(), p.tolist()
