"""Really dropping tokens, a different number per image, at any batch size.

The tokens of a batch lie one image after the other in one matrix (T, d). Norms, projections and MLPs run on it once, with
no waste; only attention must know where an image ends. How it learns that is the layout:

packed    attention per image: a loop on CPU, a variable-length kernel on CUDA in half precision (see `ragged_kernel`)
padded    (B, longest, d) with a key mask: simple, exports, as slow as the fullest image of the batch
bucketed  images sorted by length, padded within groups of similar length; regrouped only where tokens are dropped

All give equal results, and no image's result depends on the others of its batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive_prune.class_attention_score import Score, class_attention, class_attention_packed, token_score

Layout = Literal["packed", "padded", "bucketed"]


def upload(values: Sequence[int], device: torch.device) -> Tensor:
    """Numbers of the host as an int64 tensor (n,) on the device. From pinned memory, so that the host does not wait."""
    found = torch.tensor(values, dtype=torch.int64)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)


@dataclass
class Packed:
    """Tokens of B images, one image after the other, prefix (class) tokens first in each.

    x: (T, d); lengths: tokens of each image, on the host; image, origin: (T,) which image a token belongs to and where in
    the full sequence it stood."""

    x: Tensor
    lengths: list[int]
    image: Tensor
    origin: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Packed":
        """From a dense batch (B, N, d)."""
        b, n, _ = x.shape
        at = torch.arange(b * n, device=x.device)
        return cls(x.flatten(0, 1), [n] * b, at // n, at % n)

    def first(self) -> Tensor:
        """(B,) where each image begins."""
        lengths = upload(self.lengths, self.x.device)
        return lengths.cumsum(0) - lengths

    def keep(self, mask: Tensor, lengths: list[int] | None = None) -> "Packed":
        """The tokens where mask (T,) is true, in order. One device synchronisation, none if the lengths are known."""
        if lengths is None and len(self.lengths) == 1:  # one image: the places of its tokens say how many they are
            index = mask.nonzero().flatten()
            lengths = [len(index)]
        else:
            if lengths is None:
                zeros = torch.zeros(len(self.lengths), dtype=torch.int64, device=mask.device)
                lengths = zeros.index_add(0, self.image, mask.long()).tolist()
            total = sum(lengths)
            rank = mask.long().cumsum(0) - 1
            index = torch.empty(
                total + 1, dtype=torch.int64, device=mask.device
            )  # the last place takes what is dropped
            index.scatter_(0, torch.where(mask, rank, total), torch.arange(len(mask), device=mask.device))
            index = index[:total]
        # index_select moves whole rows: four times as fast on a CPU as x[index].
        return Packed(self.x.index_select(0, index), lengths, self.image[index], self.origin[index])


def heads(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K, V of a timm attention, each (..., H, d_h), from normed tokens (..., d)."""
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(-3)
    return attn.q_norm(q), attn.k_norm(k), v


def finish_block(block: Any, x: Tensor, context: Tensor) -> Tensor:
    """The rest of a timm block after attention. x: (..., d) its input, context: (..., H, d_h)."""
    attn = block.attn
    out = attn.proj_drop(attn.proj(attn.norm(context.flatten(-2))))
    x = x + block.drop_path1(block.ls1(out))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def run_blocks(
    blocks: Sequence[Any], tokens: Packed, *, layout: Layout = "packed", score: Score | None = None
) -> tuple[Tensor, Tensor | None]:
    """Blocks on the tokens in a layout; returns x (T, d) and, for a `score`, S (T,) of the last block.

    Where all images have the same number of tokens, every layout is one dense batch. ValueError for another layout."""
    if layout not in ("packed", "padded", "bucketed"):
        raise ValueError(f"layout={layout!r}, allowed: packed, padded, bucketed")
    b, lengths = len(tokens.lengths), tokens.lengths
    if min(lengths) == max(lengths):
        x, s = run_dense(blocks, tokens.x.unflatten(0, (b, lengths[0])), score=score)
        return x.flatten(0, 1), None if s is None else s.flatten()
    if layout == "packed":
        return _run_packed(blocks, tokens, score)
    groups = [list(range(b))] if layout == "padded" else _buckets(lengths)
    device, first = tokens.x.device, tokens.first()
    begin, rows, xs, scores = [0] * b, 0, [], []  # begin: where an image stands among the padded rows of all groups
    for group in groups:
        longest = max(lengths[i] for i in group)
        for i in group:
            begin[i], rows = rows, rows + longest
        at, start = torch.arange(longest, device=device), first[upload(group, device)][:, None]
        valid = at < upload([lengths[i] for i in group], device)[:, None]
        x, s = run_dense(blocks, tokens.x[torch.where(valid, start + at, start)], score=score, valid=valid)
        xs.append(x.flatten(0, 1))
        if s is not None:
            scores.append(s.flatten())
    # Indices instead of the masks: indexing with a mask waits for the device to count it.
    back = (upload(begin, device) - first)[tokens.image] + torch.arange(len(tokens.x), device=device)
    return torch.cat(xs)[back], torch.cat(scores)[back] if scores else None


def _buckets(lengths: list[int]) -> list[list[int]]:
    """Images sorted by length, cut where a group would waste more than an eighth of its longest image on its shortest."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    groups: list[list[int]] = []
    for i in order:
        if groups and 8 * lengths[i] >= 7 * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def run_dense(
    blocks: Sequence[Any], x: Tensor, *, score: Score | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Blocks on (B, n, d) with fused attention; keys where valid (B, n) is false are not seen. S: (B, n) of the last."""
    mask = None if valid is None else valid[:, None, None, :]
    s = None
    for i, block in enumerate(blocks):
        q, k, v = (t.transpose(1, 2) for t in heads(block.attn, block.norm1(x)))
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=block.attn.scale)
        context = context.transpose(1, 2)
        if score and i == len(blocks) - 1:
            with torch.autocast(x.device.type, enabled=False):
                row = class_attention(q[:, :, 0], k, scale=block.attn.scale, valid=valid)
                s = token_score(row, context, kind=score)
        x = finish_block(block, x, context)
    return x, s


def _run_packed(blocks: Sequence[Any], tokens: Packed, score: Score | None) -> tuple[Tensor, Tensor | None]:
    x, s, first = tokens.x, None, tokens.first()
    ends = image_ends(tokens.lengths, x.device) if x.is_cuda else None  # once for all blocks
    for i, block in enumerate(blocks):
        q, k, v = heads(block.attn, block.norm1(x))
        context = ragged_attention(q, k, v, tokens.lengths, scale=block.attn.scale, ends=ends)
        if score and i == len(blocks) - 1:
            with torch.autocast(x.device.type, enabled=False):
                row = class_attention_packed(q[first], k, tokens.image, scale=block.attn.scale)
                s = token_score(row, context, kind=score)
        x = finish_block(block, x, context)
    return x, s


def ragged_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], *, scale: float, ends: Tensor | None = None
) -> Tensor:
    """Attention within each image of a packed batch. q, k, v: (T, H, d_h); lengths: tokens per image -> (T, H, d_h).

    How, says `ragged_kernel`. ends: 0 and where each image ends, int32 on the device, for the variable-length kernel."""
    kernel = ragged_kernel(q.device, q.dtype)
    if kernel == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        ends = image_ends(lengths, q.device) if ends is None else ends
        return cast(Tensor, varlen_attn(q, k, v, ends, ends, max(lengths), max(lengths), scale=scale))
    if kernel == "padded":
        return padded_attention(q, k, v, lengths, scale=scale)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    parts = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
    out = [F.scaled_dot_product_attention(*part, scale=scale) for part in parts]
    return torch.cat(out, 2)[0].transpose(0, 1)


def image_ends(lengths: list[int], device: torch.device) -> Tensor:
    """(B + 1,) int32: 0 and where each image ends."""
    return upload([0, *lengths], device).cumsum(0).int()


def ragged_kernel(device: torch.device, dtype: torch.dtype) -> Literal["loop", "varlen", "padded"]:
    """loop: one image after the other, the fastest on a CPU. varlen: the variable-length flash kernel, for half precision on
    cards of compute capability 8.0 or more where torch has it. padded: float32, and every other card (the paper's has 7.5)."""
    if device.type != "cuda":
        return "loop"
    half = dtype in (torch.float16, torch.bfloat16)
    return "varlen" if half and _has_varlen() and _capability(device) >= (8, 0) else "padded"


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _has_varlen() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return False
    return True


def padded_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], *, scale: float) -> Tensor:
    """The same as `ragged_attention` with a key mask on Q, K, V padded to the longest image."""
    n = upload(lengths, q.device)
    image = torch.arange(len(lengths), device=q.device).repeat_interleave(n, output_size=len(q))
    at = torch.arange(len(q), device=q.device) - (n.cumsum(0) - n)[image]
    valid = torch.arange(max(lengths), device=q.device) < n[:, None]
    padded = [t.new_zeros(*valid.shape, *t.shape[1:]).index_put((image, at), t).transpose(1, 2) for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*padded, attn_mask=valid[:, None, None, :], scale=scale)
    return out.transpose(1, 2)[image, at]
