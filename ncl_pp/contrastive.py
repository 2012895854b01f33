"""Self-supervision of NCL (the predecessor; NCL++ has none): one MoCo branch per expert.

L_con^k = CE([q . k+, q . queue] / T, 0). The query is the expert's feature of the classification view, the
key comes from a momentum encoder on a second view, negatives from a queue of earlier keys.
"""

from collections.abc import Iterable, Sequence
from copy import deepcopy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def info_nce(query: Tensor, key: Tensor, queue: Tensor, *, temperature: float = 0.2) -> Tensor:
    """query, key (B, dim) and queue columns (dim, Q), all of unit length -> scalar, mean over the B queries."""
    positive = (query * key).sum(1, keepdim=True)
    logits = torch.cat([positive, query @ queue], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def check_queue(queue: int, batch: int) -> None:
    """ValueError unless the queue holds a whole number of batches: images per step over all ranks."""
    if queue % batch:
        raise ValueError(f"queue={queue} is no multiple of the global batch {batch}")


def _world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _gather(x: Tensor) -> Tensor:
    """Concatenate the first axis over all ranks, without gradient."""
    parts = [torch.empty_like(x) for _ in range(_world()[1])]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _projection(features: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, dim))


class MomentumContrast(nn.Module):
    """Momentum encoders, projection heads and key queues of all experts.

    backbones: the experts' backbones, images -> (B, feature_dim). They stay outside: this module owns the
    query heads (trainable), the momentum copies (no gradient) and the queues (buffers, so that they are
    saved and resumed).
    queue: Q, a multiple of the global batch. Published: CIFAR dim 64, Q 1024; Places-LT dim 1024, Q 65536.

    One step: `loss = contrast(features, view2)`, backward, optimiser step, `contrast.update(backbones)`.

    official_quirks reproduces the published code: key backbones with an initialisation of their own (to be
    handed in as `key_backbones`), key heads that are random and never updated, an effective momentum of
    momentum ** K, batch statistics left out of the average. There, `update` comes before the optimiser
    step.
    """

    queue: Tensor
    pointer: Tensor

    def __init__(
        self,
        backbones: Iterable[nn.Module],
        feature_dim: int,
        *,
        dim: int = 64,
        queue: int = 1024,
        temperature: float = 0.2,
        momentum: float = 0.999,
        official_quirks: bool = False,
        key_backbones: Iterable[nn.Module] | None = None,
    ):
        super().__init__()
        backbones = list(backbones)
        if min(dim, queue, len(backbones)) < 1:
            raise ValueError(f"dim={dim}, queue={queue}, {len(backbones)} backbones; allowed: >= 1")
        if not temperature > 0 or not 0 <= momentum < 1:
            raise ValueError(f"temperature={temperature} must be > 0, momentum={momentum} in [0, 1)")
        if official_quirks != (key_backbones is not None):
            raise ValueError("key_backbones (freshly initialised) go with official_quirks=True, and only with it")
        self.temperature, self.momentum, self.official_quirks = temperature, momentum, official_quirks
        self.heads = nn.ModuleList(_projection(feature_dim, dim) for _ in backbones)
        if key_backbones is None:
            self.key_backbones = nn.ModuleList(deepcopy(b) for b in backbones)
            self.key_heads = deepcopy(self.heads)
        else:
            self.key_backbones = nn.ModuleList(key_backbones)
            self.key_heads = nn.ModuleList(_projection(feature_dim, dim) for _ in backbones)
        if len(self.key_backbones) != len(backbones):
            raise ValueError(f"{len(self.key_backbones)} key_backbones for {len(backbones)} backbones")
        self.key_backbones.requires_grad_(False)
        self.key_heads.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(len(backbones), dim, queue), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    def forward(self, features: Tensor, view2: Tensor) -> Tensor:
        """Features of the classification view (K, B, feature_dim) with gradient; second view (B, C, H, W).

        -> sum over experts of L_con^k, a float32 scalar. The keys enter the queue. Across ranks the B's
        must agree. ValueError if Q is no multiple of the global batch or the shapes do not fit.
        """
        experts, batch = features.shape[:2]
        rank, world = _world()
        size = self.queue.shape[-1]
        if experts != len(self.heads) or len(view2) != batch:
            raise ValueError(
                f"features {tuple(features.shape)} and {len(view2)} images, expected ({len(self.heads)}, B, d) and B"
            )
        check_queue(size, batch * world)
        keys = self._keys(view2)
        queries = torch.stack([head(f) for head, f in zip(self.heads, features, strict=True)])
        own = keys[:, rank * batch : (rank + 1) * batch]
        with torch.autocast(features.device.type, enabled=False):
            queries = F.normalize(queries.float(), dim=-1)
            # The queue is overwritten below, backward needs it as it is now.
            terms = [
                info_nce(q, k, negatives, temperature=self.temperature)
                for q, k, negatives in zip(queries, own, self.queue.clone(), strict=True)
            ]
        start = int(self.pointer)
        self.queue[:, :, start : start + batch * world] = keys.transpose(1, 2)
        self.pointer.fill_((start + batch * world) % size)
        return torch.stack(terms).sum()

    @torch.no_grad()
    def update(self, backbones: Sequence[nn.Module] | nn.ModuleList) -> None:
        """Exponential moving average of the experts' backbones and query heads, after the optimiser step."""
        if self.official_quirks:
            momentum = self.momentum ** len(self.heads)
            for key, query in zip(self.key_backbones, backbones, strict=True):
                _average(key.parameters(), query.parameters(), momentum)
            return
        for key, query in zip([*self.key_backbones, *self.key_heads], [*backbones, *self.heads], strict=True):
            _average(key.parameters(), query.parameters(), self.momentum)
            _average(key.buffers(), query.buffers(), self.momentum)

    @torch.no_grad()
    def _keys(self, images: Tensor) -> Tensor:
        """Unit-length float32 keys of the global batch, (K, world * B, dim), in rank order.

        With several ranks the images are shuffled between them, so that the batch statistics of a rank do
        not give its positives away. In one process the order means nothing to batch normalisation.
        """
        rank, world = _world()
        if world == 1:
            return self._encode(images)
        images = _gather(images)
        order = torch.randperm(len(images), device=images.device)
        dist.broadcast(order, src=0)
        shuffled = _gather(self._encode(images[order.chunk(world)[rank]]).transpose(0, 1))
        return shuffled[order.argsort()].transpose(0, 1)

    def _encode(self, images: Tensor) -> Tensor:
        pairs = zip(self.key_backbones, self.key_heads, strict=True)
        return F.normalize(torch.stack([head(backbone(images)) for backbone, head in pairs]).float(), dim=-1)


def _average(keys: Iterable[Tensor], queries: Iterable[Tensor], momentum: float) -> None:
    for key, query in zip(keys, queries, strict=True):
        if key.is_floating_point():
            key.lerp_(query.to(key), 1 - momentum)
        else:
            key.copy_(query)  # the batch counter of batch normalisation
