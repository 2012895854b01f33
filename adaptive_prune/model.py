"""AS-ViT around any timm VisionTransformer with a class token, and the baselines at the same places.

model = prune(timm.create_model("deit_small_patch16_224", pretrained=True), locations=(4, 7, 10), budget=0.65)
logits, info = model(images, details=True)          # training: masked attention, every token stays
loss = cross_entropy(logits, y) + 2 * model.budget_loss(info.macs)
model.eval()(images)                                # really drops tokens, per image at any batch size
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adaptive_prune.adaptive_threshold import (
    check_locations,
    check_thresholds,
    default_temperature,
    initial_thresholds,
    threshold_mask,
)
from adaptive_prune.backbones import check_vit, cost_of
from adaptive_prune.budget import Form, budget_loss, check_budget, keep_counts
from adaptive_prune.class_attention_score import Score, class_attention, token_score
from adaptive_prune.masked_attention import RowMax, masked_softmax
from adaptive_prune.removal import Packed, finish_block, heads, run_blocks, run_dense, upload
from adaptive_prune.tome import merge, merge_counts, tome_cost
from adaptive_prune.topk import keep_top

RULES = ("none", "threshold", "topk", "evit", "tome")
INFERENCE = ("packed", "padded", "bucketed", "batch_topk", "masked")
Inference = Literal["packed", "padded", "bucketed", "batch_topk", "masked"]


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


class PrunedViT(nn.Module):
    """A timm ViT (`self.vit`) that drops patch tokens before the blocks `locations`, and its thresholds `theta` (S,).

    images: (B, C, H, W), normalised as the ViT wants them. Returns logits (B, classes), with details=True also `Details`.

    rule: threshold (AS-ViT), none, topk, evit, tome. budget: t in (0, 1], cost relative to dense; topk, evit and tome take
    their counts from it unless `keep` gives them (patch tokens per stage; for tome: merges per block).
    thresholds, temperature: None for the paper's values scaled to the number of tokens. score: weighted | mean.
    mask: attention (the paper) | activation (ablation: dropped tokens are zeroed in training). cumulative: a dropped token
    stays dropped; False as published (theta_s then gets no gradient from later stages). eps, row_max: see
    `masked_softmax`. inference: packed | padded | bucketed | batch_topk (the released code at batch > 1: results depend on
    the batch) | masked. extended_cost: also count the small terms that the released LV-ViT code counts.

    A state dict of the bare timm model loads, too; only `theta` is missing then (strict=False).
    Raises ValueError for a model without class token or of another kind, and for values outside what is allowed."""

    def __init__(
        self,
        vit: VisionTransformer,
        *,
        rule: str = "threshold",
        locations: Sequence[int] = (4, 7, 10),
        budget: float | None = None,
        thresholds: Sequence[float] | None = None,
        temperature: float | None = None,
        keep: Sequence[int] | None = None,
        score: Score = "weighted",
        mask: Literal["attention", "activation"] = "attention",
        cumulative: bool = True,
        eps: float = 0.0,
        row_max: RowMax = "kept",
        inference: Inference = "packed",
        extended_cost: bool = False,
    ):
        super().__init__()
        check_vit(vit)
        allowed = {
            "rule": (rule, RULES),
            "mask": (mask, ("attention", "activation")),
            "inference": (inference, INFERENCE),
            "score": (score, ("weighted", "mean")),
        }
        for name, (value, choices) in allowed.items():
            if value not in choices:
                raise ValueError(f"{name}={value!r}, allowed: {', '.join(choices)}")
        masked_softmax(torch.zeros(1, 1, 1, 1), torch.ones(1, 1), eps=eps, row_max=row_max)  # checks both
        self.vit: Any = vit
        self.rule, self.mask = rule, mask
        self.score: Score = score
        self.cumulative, self.eps = cumulative, eps
        self.row_max: RowMax = row_max
        self.inference: Inference = inference
        self.cost = cost_of(vit, extended=extended_cost)
        self.locations = () if rule == "none" else check_locations(locations, self.cost.depth)
        stages, n = len(self.locations), self.cost.patches
        self.temperature = default_temperature(n) if temperature is None else float(temperature)
        self.budget = budget
        if budget is not None and rule != "none":
            check_budget(budget, floor=0.0 if rule == "tome" else self.cost.floor(self.locations))
        self.keep = self._counts(keep)
        if rule == "threshold":
            theta = check_thresholds(initial_thresholds(n, stages) if thresholds is None else thresholds, stages)
            self.theta = nn.Parameter(theta)
        self.register_load_state_dict_pre_hook(_accept_bare)

    def _counts(self, keep: Sequence[int] | None) -> list[int] | None:
        if self.rule in ("none", "threshold"):
            if keep is not None:
                raise ValueError(f"rule={self.rule!r} takes no token counts (keep={list(keep)})")
            return None
        if keep is None:
            if self.budget is None:
                raise ValueError(f"rule={self.rule!r} needs a budget or the counts (keep)")
            if self.rule == "tome":
                return merge_counts(self.cost, self.budget)
            return keep_counts(self.cost, self.locations, self.budget, extra=int(self.rule == "evit"))
        found = [int(k) for k in keep]
        if self.rule == "tome":
            if len(found) != self.cost.depth or min(found) < 0:
                raise ValueError(f"keep={found}: tome needs one number of merges >= 0 per block ({self.cost.depth})")
            return found
        bounds = [self.cost.patches, *found]
        if len(found) != len(self.locations) or any(not 0 <= b <= a for a, b in zip(bounds, found, strict=False)):
            raise ValueError(
                f"keep={found}: one count per location ({len(self.locations)}), not increasing, in 0..{self.cost.patches}"
            )
        return found

    # --------------------------------------------------------------------------------------------------------- forward
    def forward(self, images: Tensor, *, details: bool = False) -> Any:
        if images.ndim != 4:
            raise ValueError(f"images must be (B, C, H, W), got {tuple(images.shape)}")
        size = getattr(self.vit.patch_embed, "img_size", None)
        if size is not None and tuple(images.shape[-2:]) != tuple(size):
            raise ValueError(
                f"images are {images.shape[-2]} x {images.shape[-1]}, the position embedding is for {size[0]} x {size[1]}: "
                f"resize them, or build the model with timm.create_model(..., img_size={images.shape[-1]}), which "
                "interpolates the embedding of the weights it loads"
            )
        if self.rule == "tome":
            logits, info = self._tome(images)
        elif self.rule in ("topk", "evit", "none"):
            logits, info = self._top(images, details)
        elif self.training or self.inference == "masked":
            logits, info = self._masked(images)
        else:
            logits, info = self._remove(images, details)
        return (logits, info) if details else logits

    def _embed(self, images: Tensor) -> Tensor:
        vit = self.vit
        return vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))

    def _stages(self) -> list[Any]:
        bounds = [0, *self.locations, self.cost.depth]
        return [self.vit.blocks[a:b] for a, b in pairwise(bounds)]

    def _masked(self, images: Tensor) -> tuple[Tensor, Details]:
        """Section 3.3: every token stays, dropped ones are hidden from the others. Differentiable in theta."""
        x, p = self._embed(images), self.cost.prefix
        b = len(x)
        alive = torch.ones(b, self.cost.patches, device=x.device)
        policy, row, found, scores = None, None, [], []
        for i, block in enumerate(self.vit.blocks):
            if i in self.locations:
                assert row is not None
                m = threshold_mask(row, self.theta[len(found)], temperature=self.temperature)
                scores.append(row * (alive.detach() if found else 1))
                alive = m * alive if self.cumulative else m
                found.append(alive)
                policy = torch.cat([alive.new_ones(b, p), alive], 1)
            q, k, v = (t.transpose(1, 2) for t in heads(block.attn, block.norm1(x)))
            with torch.autocast(x.device.type, enabled=False):  # scores near 0.003 need float32
                if policy is None or self.mask == "activation":
                    context = F.scaled_dot_product_attention(q, k, v, scale=block.attn.scale)
                    a = class_attention(q[:, :, 0], k, scale=block.attn.scale) if i + 1 in self.locations else None
                else:
                    logits = (q.float() * block.attn.scale) @ k.float().transpose(-2, -1)
                    weight = masked_softmax(logits, policy, eps=self.eps, row_max=self.row_max)
                    context, a = (weight @ v.float()).to(v.dtype), weight[:, :, 0].transpose(1, 2)
                context = context.transpose(1, 2)
                if i + 1 in self.locations:
                    assert a is not None
                    row = token_score(a, context, kind=self.score)[:, p:]
            x = finish_block(block, x, context)
            if policy is not None and self.mask == "activation":
                x = x * policy[..., None].to(x.dtype)
        x = self.vit.norm(x)
        masks = torch.stack(found, 1) if found else alive.new_ones(b, 0, self.cost.patches)
        kept = masks.sum(-1)
        macs = self.cost.staged(kept.unbind(1), self.locations) + torch.zeros_like(alive[:, 0])
        tokens = self.vit.aux_head(x[:, p:]) if hasattr(self.vit, "aux_head") else None
        at = alive.detach().bool().nonzero() if not self.training and tokens is not None else None
        logits = self._read_out(x[:, :p], *((x[at[:, 0], at[:, 1] + p], at[:, 0]) if at is not None else (None, None)))
        stacked = torch.stack(scores, 1).detach() if scores else None
        return logits, Details(macs, kept.detach(), masks.detach().bool(), stacked, tokens, alive.detach())

    def _remove(self, images: Tensor, details: bool) -> tuple[Tensor, Details]:
        """Section 3.5: dropped tokens leave the tensor. One device synchronisation per threshold."""
        tokens = Packed.of(self._embed(images))
        layout: Any = "packed" if self.inference == "batch_topk" else self.inference
        lengths, masks = [], []
        for s, blocks in enumerate(self._stages()):
            last = s == len(self.locations)
            x, scores = run_blocks(blocks, tokens, layout=layout, score=None if last else self.score)
            tokens.x = x
            if last:
                break
            assert scores is not None
            keep = (tokens.origin < self.cost.prefix) | (scores > self.theta[s])
            known = None
            if self.inference == "batch_topk":
                keep, known = self._batch_average(tokens, scores, keep)
            tokens = tokens.keep(keep, known)
            lengths.append(tokens.lengths)
            if details:
                masks.append(self._places(tokens))
        x = self.vit.norm(tokens.x)
        at = tokens.first()
        prefix = torch.stack([x[at + i] for i in range(self.cost.prefix)], 1)
        if hasattr(self.vit, "aux_head"):
            tokens.x = x
            patch = tokens.keep(tokens.origin >= self.cost.prefix, [n - self.cost.prefix for n in tokens.lengths])
            logits = self._read_out(prefix, patch.x, patch.image)
        else:
            logits = self._read_out(prefix, None, None)
        kept = upload([n for stage in lengths for n in stage], x.device).reshape(len(lengths), len(images)).T
        kept = kept - self.cost.prefix
        macs = self.cost.staged(kept.double().unbind(1), self.locations)
        macs = (macs + torch.zeros(len(images), dtype=torch.double, device=x.device)).float()
        return logits, Details(macs, kept.float(), torch.stack(masks, 1) if masks else None)

    def _batch_average(self, tokens: Packed, scores: Tensor, keep: Tensor) -> tuple[Tensor, list[int]]:
        """The released code at batch > 1: the k best tokens of every image, k = floor of the batch's mean count."""
        b, n = len(tokens.lengths), tokens.lengths[0]
        k = int(keep.sum()) // b - self.cost.prefix
        order = scores.view(b, n)[:, self.cost.prefix :].argsort(dim=1, descending=True, stable=True)[:, :k]
        mask = torch.zeros(b, n, dtype=torch.bool, device=scores.device).scatter_(1, order + self.cost.prefix, True)
        mask[:, : self.cost.prefix] = True
        return mask.flatten(), [k + self.cost.prefix] * b

    def _places(self, tokens: Packed) -> Tensor:
        mask = torch.zeros(
            len(tokens.lengths), self.cost.patches + self.cost.prefix, dtype=torch.bool, device=tokens.x.device
        )
        mask[tokens.image, tokens.origin] = True
        return mask[:, self.cost.prefix :]

    def _top(self, images: Tensor, details: bool) -> tuple[Tensor, Details]:
        """The same number of tokens for every image: a dense batch throughout, in training too. Rules none, topk, evit."""
        x, p = self._embed(images), self.cost.prefix
        b, n = len(x), self.cost.patches
        origin = torch.arange(n + p, device=x.device).expand(b, -1)
        kept, masks = [], []
        for s, blocks in enumerate(self._stages()):
            last = s == len(self.locations)
            x, scores = run_dense(blocks, x, score=None if last else self.score)
            if last:
                break
            assert scores is not None and self.keep is not None
            fused = x.shape[1]
            # EViT's fused token of an earlier stage competes like any other token.
            x, index = keep_top(x, scores.detach(), min(self.keep[s], fused - p), prefix=p, fuse=self.rule == "evit")
            kept.append(x.shape[1] - p)
            if details:
                origin = origin.gather(1, index)
                if self.rule == "evit" and x.shape[1] > index.shape[1]:
                    origin = torch.cat([origin, origin.new_full((b, 1), n + p)], 1)  # a place of its own, cut off below
                mask = torch.zeros(b, n + p + 1, dtype=torch.bool, device=x.device).scatter_(1, origin, True)
                masks.append(mask[:, p : n + p])
        x = self.vit.norm(x)
        tokens = x[:, p:].flatten(0, 1), torch.arange(b, device=x.device).repeat_interleave(x.shape[1] - p)
        logits = self._read_out(
            x[:, :p], *(tokens if not self.training and hasattr(self.vit, "aux_head") else (None, None))
        )
        macs = x.new_full((b,), self.cost.staged(kept, self.locations), dtype=torch.float32)
        all_kept = torch.tensor(kept, device=x.device, dtype=torch.float32).expand(b, -1)
        return logits, Details(macs, all_kept, torch.stack(masks, 1) if masks else None)

    def _tome(self, images: Tensor) -> tuple[Tensor, Details]:
        """Token merging inside every block, with proportional attention: log size is added to the keys' logits."""
        x, p = self._embed(images), self.cost.prefix
        size = x.new_ones(x.shape[:2])
        assert self.keep is not None
        entering, merged = [], []
        for block, r in zip(self.vit.blocks, self.keep, strict=True):
            entering.append(x.shape[1] - p)
            attn: Any = block.attn
            q, k, v = (t.transpose(1, 2) for t in heads(attn, block.norm1(x)))
            bias = size.log()[:, None, None, :].to(q.dtype)
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attn.scale).transpose(1, 2)
            x = x + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(attn.norm(context.flatten(2))))))
            before = x.shape[1]
            x, size = merge(x, size, k.mean(1), r, prefix=p)
            merged.append(before - x.shape[1])
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        x = self.vit.norm(x)
        b = len(x)
        tokens = x[:, p:].flatten(0, 1), torch.arange(b, device=x.device).repeat_interleave(x.shape[1] - p)
        logits = self._read_out(
            x[:, :p], *(tokens if not self.training and hasattr(self.vit, "aux_head") else (None, None))
        )
        kept = torch.tensor([entering[i] for i in self.locations], device=x.device, dtype=torch.float32)
        macs = x.new_full((b,), tome_cost(self.cost, merged), dtype=torch.float32)
        return logits, Details(macs, kept.expand(b, -1))

    def _read_out(self, prefix: Tensor, tokens: Tensor | None, image: Tensor | None) -> Tensor:
        """Logits from normed prefix tokens (B, P, d); LV-ViT adds its surviving tokens (T, d) in evaluation."""
        if tokens is None or image is None:
            return self.vit.forward_head(prefix)
        return self.vit.packed_logits(prefix[:, 0], tokens, image)

    def budget_loss(self, macs: Tensor, *, form: Form = "relative", mean: Tensor | None = None) -> Tensor:
        """L_budget for this model's budget, see `adaptive_prune.budget.budget_loss`."""
        if self.budget is None:
            raise ValueError("this model has no budget: prune(..., budget=0.65)")
        return budget_loss(macs, self.cost, self.budget, form=form, mean=mean)


def prune(model: VisionTransformer, *, locations: Sequence[int] = (4, 7, 10), budget: float = 0.65, **options: Any):
    """AS-ViT around `model` (any timm VisionTransformer with a class token, or LV-ViT). Options: see `PrunedViT`."""
    return PrunedViT(model, locations=locations, budget=budget, **options)


def _accept_bare(module: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """A state dict of the bare ViT loads as that of `vit.`; thresholds that are not finite are refused."""
    own = [k for k in state if k.startswith(prefix)]
    if own and not any(k.startswith(f"{prefix}vit.") for k in own):
        for key in own:
            if key != f"{prefix}theta":
                state[f"{prefix}vit.{key[len(prefix) :]}"] = state.pop(key)
    theta = state.get(f"{prefix}theta")
    if theta is not None:
        check_thresholds(theta, len(module.locations))
