"""What a setting costs: multiply-accumulates by formula, and the convention behind the published "12.67 G FLOPs"."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from ap_fer.token_selection import token_schedule


def vit_macs(
    n: int, keep: int | None, rates: Sequence[float], *, channels: int, dim: int, mlp_ratio: float, kernel: int = 1
) -> int:
    """MACs of projection and blocks for one image of n patches: sum over blocks of 4 N d^2 + 2 N^2 d + 2 N' d m, tokens with
    CLS, N before and N' after the block's pooling. Norms, activations and the head are not in it."""
    counts = [c + 1 for c in token_schedule(n, keep, rates)]
    hidden, total = int(dim * mlp_ratio), n * channels * kernel * kernel * dim
    for before, after in pairwise(counts):
        total += 4 * before * dim**2 + 2 * before**2 * dim + 2 * after * dim * hidden
    return total


def norm_elements(model: nn.Module, *inputs: torch.Tensor) -> dict[str, int]:
    """{"bn", "ln"}: elements that leave the BatchNorms and the LayerNorms in one evaluation-mode forward pass."""
    found, handles = {"bn": 0, "ln": 0}, []

    def counter(kind: str):
        def hook(_module: nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
            found[kind] += output.numel()

        return hook

    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            handles.append(module.register_forward_hook(counter("bn")))
        elif isinstance(module, nn.LayerNorm):
            handles.append(module.register_forward_hook(counter("ln")))
    training = model.training
    with torch.no_grad():
        model.eval()(*inputs)
    model.train(training)
    for handle in handles:
        handle.remove()
    return found


def published_flops(macs: int, elements: dict[str, int]) -> int:
    """The "FLOPs" of this literature: MACs + 2 per BatchNorm element + 5 per LayerNorm element, as fvcore counts them."""
    return macs + 2 * elements["bn"] + 5 * elements["ln"]
