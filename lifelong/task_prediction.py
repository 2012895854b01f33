"""Inference with a data continuum: which task a chunk of test samples comes from, and the copy of the model adapted to it.

The vote uses that p consecutive samples come from one task. Plain class-incremental inference has p = 1: accuracies with
p > 1 know more and are not comparable with those of other methods.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lifelong.batches import cut
from lifelong.meta_update import group_bce


def group_scores(logits: Tensor, groups: Sequence[slice]) -> Tensor:
    """(N, C) raw logits -> (N, K): the largest logit of every task's group."""
    return torch.stack([logits[:, g].amax(1) for g in groups], 1)


def vote(scores: Tensor, p: int = 20) -> Tensor:
    """(N, K) scores of consecutive samples of ONE task -> (N,) voted tasks: argmax of the mean over chunks of p.

    A shorter last chunk votes for itself. ValueError for p < 1."""
    if p < 1:
        raise ValueError(f"p={p}, allowed: >= 1 consecutive samples of one task")
    return torch.cat([chunk.mean(0).argmax().expand(len(chunk)) for chunk in scores.split(p)])


def within_group(logits: Tensor, group: slice) -> Tensor:
    """(N, C) -> (N,) classes: the argmax among the classes of one task."""
    return logits[:, group].argmax(1) + group.start


def adapt(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    group: slice,
    *,
    generator: torch.Generator,
    lr: float = 1e-3,
    batch_size: int = 64,
    epochs: int = 1,
) -> nn.Module:
    """A copy of `model` trained on the exemplars of one task (Adam, BCE on the task's logits); `model` is not changed.

    images: (n, c, H, W), normalised; labels: (n,) in the group. A small last batch joins the one before it."""
    model = copy.deepcopy(model)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    with torch.enable_grad():
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator, device=generator.device).to(images.device)
            for batch in cut(order, batch_size):
                optimizer.zero_grad(set_to_none=True)
                group_bce(model(images[batch]), labels[batch], group).backward()
                optimizer.step()
    return model.eval()
