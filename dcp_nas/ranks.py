"""A search on several devices: means over the ranks that every derivative passes.

Each rank holds its share of a batch and its copy of the networks and of alpha. With L the mean of the ranks' losses, the mean over
the ranks of what autograd finds on each is dL/dx, as long as whatever the ranks exchange in the forward pass is exchanged in
every derivative, too: in reverse, forward and second-order mode. In one process all of this is the identity.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Mean(torch.autograd.Function):
    """y = mean over the ranks of x, on every rank. It is linear and its own adjoint, so one rule serves every mode."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x.contiguous().clone()
        dist.all_reduce(y)
        return y / dist.get_world_size()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _Mean.apply(grad)  # type: ignore[return-value]

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:  # type: ignore[override]
        return _Mean.apply(tangent)  # type: ignore[return-value]


def over_ranks(x: Tensor, reduction: str = "mean") -> Tensor:
    """The mean of x over the ranks, or with "sum" their sum; x of any shape, equal on all of them."""
    world = world_size()
    if world == 1:
        return x
    mean: Tensor = _Mean.apply(x)  # type: ignore[assignment]
    return mean * world if reduction == "sum" else mean


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Every .grad becomes its mean over the ranks, in one exchange."""
    if world_size() == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    mean = over_ranks(torch.cat([g.reshape(-1) for g in grads]))
    for grad, part in zip(grads, mean.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def batch_normed(x: Tensor, *, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x (B, C, H, W) normalised by the statistics of the batch, which is that of all ranks. weight, bias: (C,) or None.

    torch's synchronised norm exists on GPUs only and has neither a forward mode nor a second derivative."""
    if world_size() == 1:
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    centred = x - over_ranks(x.mean(dim=(0, 2, 3), keepdim=True))
    y = centred * (over_ranks(centred.square().mean(dim=(0, 2, 3), keepdim=True)) + eps).rsqrt()
    return y if weight is None or bias is None else y * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


class BatchStatistics(nn.BatchNorm2d):
    """A norm that always uses the statistics of the batch: those of a supernet would belong to no architecture."""

    def __init__(self, channels: int, *, eps: float = 1e-5, affine: bool = False):
        super().__init__(channels, eps=eps, affine=affine, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return batch_normed(x, eps=self.eps, weight=self.weight, bias=self.bias)
