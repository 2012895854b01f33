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
    b, n, d = x.shape
    r = min(r, (n - prefix) // 2)
    if r <= 0:
        return x, size
    metric = F.normalize(keys[:, prefix:], dim=-1)
    score, partner = (metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)).max(-1)
    order = score.argsort(dim=1, descending=True, stable=True)
    source, stay = order[:, :r], order[:, r:].sort(1).values
    # Rows of the flat (B N, d): moving whole rows is several times faster than gather and scatter with d indices per row.
    first = torch.arange(b, device=x.device)[:, None] * n
    leave, to = first + prefix + 2 * source, first + prefix + 1 + 2 * partner.gather(1, source)
    ends = [torch.arange(prefix, device=x.device), torch.arange(prefix + 1, n, 2, device=x.device)]
    remain = torch.cat([first + ends[0], first + prefix + 2 * stay, first + ends[1]], 1)

    def merged(rows: Tensor) -> Tensor:
        """Sums of the rows (B N, ...) that go together -> (B, n, ...)."""
        summed = rows.index_add(0, to.flatten(), rows.index_select(0, leave.flatten()))
        return summed.index_select(0, remain.flatten()).unflatten(0, remain.shape)

    weight = x.new_ones(b, n) if size is None else size
    sizes = merged(weight.flatten())
    return merged((x if size is None else x * size[..., None]).flatten(0, 1)) / sizes[..., None], sizes


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
