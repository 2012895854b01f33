"""Token merging (ToMe, 2210.09461): in every block the r most similar pairs of tokens become one, no parameters."""

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive_prune.budget import ViTCost, bisect, check_budget


def merge(x: Tensor, size: Tensor | None, keys: Tensor, r: int, *, prefix: int = 1) -> tuple[Tensor, Tensor | None]:
    """Bipartite soft matching: patch tokens are split into even and odd ones, every even one looks for the odd one with the
    most similar key, and the r most similar pairs are averaged with their sizes as weights.

    x: (B, N, d); size: (B, N) how many patches a token stands for, None: one each; keys: (B, N, d_h), the mean over heads.
    Returns x and size with min(r, number of even - odd pairs) fewer tokens: prefix, unmerged even, odd. The order does not
    matter to attention."""
    d = x.shape[-1]
    r = min(r, (x.shape[1] - prefix) // 2)
    if r <= 0:
        return x, size
    metric = F.normalize(keys[:, prefix:], dim=-1)
    score, partner = (metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)).max(-1)
    order = score.argsort(dim=1, descending=True, stable=True)
    source, stay = order[:, :r], order[:, r:].sort(1).values
    target = partner.gather(1, source)
    size = x.new_ones(x.shape[:2]) if size is None else size

    def merged(t: Tensor, at: Tensor, to: Tensor, rest: Tensor) -> Tensor:
        """Sums of what goes together; t: (B, N, ...), the others (B, n, ...) indices along its second dimension."""
        even, odd = t[:, prefix::2], t[:, prefix + 1 :: 2]
        return torch.cat([t[:, :prefix], even.gather(1, rest), odd.scatter_add(1, to, even.gather(1, at))], 1)

    sizes = merged(size, source, target, stay)
    wide = [i[..., None].expand(-1, -1, d) for i in (source, target, stay)]
    return merged(x * size[..., None], *wide) / sizes[..., None], sizes


def tome_cost(cost: ViTCost, merged: list[int]) -> int:
    """MACs when block l merges merged[l] tokens between its attention and its MLP."""
    n, macs = cost.patches + cost.prefix, cost.stem
    for r in merged:
        macs += cost.attention(n) + cost.mlp(n - r)
        n -= r
    return macs


def merge_counts(cost: ViTCost, target: float) -> list[int]:
    """Tokens to merge in each block, as even as possible, such that the cost is the largest within target * dense.

    At most half of a block's patch tokens can be merged. ValueError if not even that meets the target."""
    check_budget(target)

    def counts(rate: float) -> list[int]:
        n, out, owed = cost.patches, [], 0.0
        for _ in range(cost.depth):
            owed += rate
            out.append(min(int(owed), n // 2))
            owed -= int(owed)
            n -= out[-1]
        return out

    most = tome_cost(cost, counts(cost.patches)) / cost.dense
    if target < most:
        raise ValueError(
            f"budget {target}: ToMe cannot go below {most:.4f} here, merging half of the tokens in every block"
        )
    top = float(cost.patches)
    found = counts(top - bisect(lambda x: tome_cost(cost, counts(top - x)) / cost.dense, target, 0.0, top))
    while True:  # one rate for all blocks is coarse: take back single merges as long as the budget allows
        fewer = [[r - (i == block) for i, r in enumerate(found)] for block in range(cost.depth) if found[block]]
        fewer = [f for f in fewer if tome_cost(cost, f) <= target * cost.dense]
        if not fewer:
            return found
        found = max(fewer, key=lambda f: tome_cost(cost, f))
