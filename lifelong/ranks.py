"""Several processes on one batch. Every rank draws the whole batch alike, takes the rows rank, rank + world, ... of it, and works
out its share of every mean: sums over its rows, divided by the rows of the whole batch. What the ranks find adds up to what one
process finds, whatever the size of their shares, none at all included (a task of three images on four ranks)."""

from collections.abc import Iterable, Mapping

import torch
from lightning_fabric import Fabric
from torch import Tensor

from common.loop import gather


class Ranks:
    """The place of this process among those of a launched `fabric`; without one, or with one process, all rows are its own."""

    def __init__(self, fabric: Fabric | None = None):
        self.fabric = fabric
        self.rank, self.world = (0, 1) if fabric is None else (fabric.global_rank, fabric.world_size)

    def mine(self, rows: Tensor) -> Tensor:
        """The rows (n, ...) of this rank."""
        return rows[self.rank :: self.world]

    def add(self, parameters: Iterable[Tensor], terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over ranks: of the gradients, in place, and of the terms, which are returned detached. One message."""
        found = {name: value.detach() for name, value in terms.items()}
        if self.fabric is None or self.world == 1:
            return found
        parts = [p.grad for p in parameters if p.grad is not None] + [v.float() for v in found.values()]
        flat = self.fabric.all_reduce(torch.cat([t.flatten() for t in parts]), reduce_op="sum")
        for part, total in zip(parts, flat.split([t.numel() for t in parts]), strict=True):  # type: ignore[union-attr]
            part.copy_(total.view_as(part))
        return dict(zip(found, parts[len(parts) - len(found) :], strict=True))

    def gather(self, share: Tensor, size: int) -> Tensor:
        """The `size` rows of all ranks in order, of which `share` holds those of this rank; on the device of `share`."""
        if self.fabric is None or self.world == 1:
            return share
        return gather(self.fabric, {"rows": share}, size)["rows"].to(share.device)
