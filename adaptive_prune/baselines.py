"""Forward passes with the same number of tokens for every image: dense, top-k, EViT and ToMe, around a `PrunedViT`."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive_prune.removal import heads, run_dense
from adaptive_prune.tome import merge, tome_cost
from adaptive_prune.topk import keep_top


class Details(NamedTuple):
    """What a forward pass did. S stages, n patch tokens.

    macs: (B,) per image, differentiable in training; kept: (B, S) patch tokens per stage; masks: (B, S, n) bool, which
    (None for ToMe, whose tokens are mixtures; a fused token of EViT counts in `kept` but has no place in the mask);
    scores: (B, S, n) that decided, 0 where a token was gone already (masked passes only);
    tokens: (B, n, C) logits of LV-ViT's auxiliary head and alive: (B, n) (masked passes only)."""

    macs: Tensor
    kept: Tensor
    masks: Tensor | None = None
    scores: Tensor | None = None
    tokens: Tensor | None = None
    alive: Tensor | None = None


def counted_pass(model: Any, images: Tensor, details: bool) -> tuple[Tensor, Details]:
    """Rules none, topk and evit of a `PrunedViT`: a dense batch throughout, in training too."""
    x, p = model.embed(images), model.cost.prefix
    b, n = len(x), model.cost.patches
    origin = torch.arange(n + p, device=x.device).expand(b, -1)
    kept, masks = [], []
    for s, blocks in enumerate(model.stages()):
        last = s == len(model.locations)
        x, scores = run_dense(blocks, x, score=None if last else model.score)
        if last:
            break
        assert scores is not None and model.keep is not None
        fused = x.shape[1]
        # EViT's fused token of an earlier stage competes like any other token.
        x, index = keep_top(x, scores, min(model.keep[s], fused - p), prefix=p, fuse=model.rule == "evit")
        kept.append(x.shape[1] - p)
        if details:
            origin = origin.gather(1, index)
            if model.rule == "evit" and x.shape[1] > index.shape[1]:
                origin = torch.cat([origin, origin.new_full((b, 1), n + p)], 1)  # a place of its own, cut off below
            mask = torch.zeros(b, n + p + 1, dtype=torch.bool, device=x.device).scatter_(1, origin, True)
            masks.append(mask[:, p : n + p])
    x = model.vit.norm(x)
    macs = x.new_full((b,), model.cost.staged(kept, model.locations), dtype=torch.float32)
    all_kept = torch.tensor(kept, device=x.device, dtype=torch.float32).expand(b, -1)
    aux = (
        model.vit.aux_head(x[:, p:])
        if model.rule == "none" and model.training and hasattr(model.vit, "aux_head")
        else None
    )
    return _read(model, x), Details(macs, all_kept, torch.stack(masks, 1) if masks else None, tokens=aux)


def merging_pass(model: Any, images: Tensor) -> tuple[Tensor, Details]:
    """ToMe: merging inside every block, with proportional attention: log size is added to the keys' logits."""
    x, p = model.embed(images), model.cost.prefix
    size = None  # until something has been merged every token counts once, and attention needs no bias
    assert model.keep is not None
    entering, merged = [], []
    for block, r in zip(model.vit.blocks, model.keep, strict=True):
        entering.append(x.shape[1] - p)
        attn: Any = block.attn
        q, k, v = (t.transpose(1, 2) for t in heads(attn, block.norm1(x)))
        bias = None if size is None else size.log()[:, None, None, :].to(q.dtype)
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attn.scale).transpose(1, 2)
        x = x + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(attn.norm(context.flatten(2))))))
        before = x.shape[1]
        if r:
            x, size = merge(x, size, k.mean(1), r, prefix=p)
        merged.append(before - x.shape[1])
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    x = model.vit.norm(x)
    kept = torch.tensor([entering[i] for i in model.locations], device=x.device, dtype=torch.float32)
    macs = x.new_full((len(x),), tome_cost(model.cost, merged), dtype=torch.float32)
    return _read(model, x), Details(macs, kept.expand(len(x), -1))


def _read(model: Any, x: Tensor) -> Tensor:
    """Logits of normed tokens (B, N, d); LV-ViT's auxiliary head has a say in evaluation only."""
    p = model.cost.prefix
    if model.training or not hasattr(model.vit, "aux_head"):
        return model.read_out(x[:, :p], None, None)
    image = torch.arange(len(x), device=x.device).repeat_interleave(x.shape[1] - p)
    return model.read_out(x[:, :p], x[:, p:].flatten(0, 1), image)
