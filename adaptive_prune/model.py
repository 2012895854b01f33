"""AS-ViT around any timm VisionTransformer with a class token, and the baselines at the same places.

model = prune(timm.create_model("deit_small_patch16_224", pretrained=True), locations=(4, 7, 10), budget=0.65)
logits, info = model(images, details=True)          # training: masked attention, every token stays
loss = cross_entropy(logits, y) + 2 * model.budget_loss(info.macs)
model.eval()(images)                                # really drops tokens, per image at any batch size
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

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
from adaptive_prune.baselines import Details, counted_pass, merging_pass
from adaptive_prune.budget import Form, budget_loss, check_budget, keep_counts
from adaptive_prune.class_attention_score import Score, class_attention, token_score
from adaptive_prune.masked_attention import RowMax, masked_softmax
from adaptive_prune.removal import Packed, finish_block, heads, run_blocks, upload
from adaptive_prune.tome import merge_counts

RULES = ("none", "threshold", "topk", "evit", "tome")
INFERENCE = ("packed", "padded", "bucketed", "batch_topk", "masked")
Inference = Literal["packed", "padded", "bucketed", "batch_topk", "masked"]


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
        if len(images) == 0:
            logits, info = self._nothing(images)
        elif self.rule == "tome":
            logits, info = merging_pass(self, images)
        elif self.rule in ("topk", "evit", "none"):
            logits, info = counted_pass(self, images, details)
        elif self.training or self.inference == "masked":
            logits, info = self._masked(images)
        else:
            logits, info = self._remove(images, details)
        return (logits, info) if details else logits

    def _nothing(self, images: Tensor) -> tuple[Tensor, Details]:
        """An empty batch: logits (0, classes)."""
        stages, n = len(self.locations), self.cost.patches
        empty = images.new_zeros(0, dtype=torch.float32)
        masks = empty.new_zeros(0, stages, n, dtype=torch.bool)
        return images.new_zeros(0, self.vit.num_classes), Details(empty, empty.new_zeros(0, stages), masks)

    def embed(self, images: Tensor) -> Tensor:
        """Tokens (B, prefix + n, d) with their positions, before the first block."""
        vit = self.vit
        return vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))

    def stages(self) -> list[Any]:
        """The blocks between the locations."""
        bounds = [0, *self.locations, self.cost.depth]
        return [self.vit.blocks[a:b] for a, b in pairwise(bounds)]

    def _masked(self, images: Tensor) -> tuple[Tensor, Details]:
        """Every token stays, dropped ones are hidden from the others. Differentiable in theta."""
        x, p = self.embed(images), self.cost.prefix
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
        logits = self.read_out(x[:, :p], *((x[at[:, 0], at[:, 1] + p], at[:, 0]) if at is not None else (None, None)))
        stacked = torch.stack(scores, 1).detach() if scores else None
        return logits, Details(macs, kept.detach(), masks.detach().bool(), stacked, tokens, alive.detach())

    def _remove(self, images: Tensor, details: bool) -> tuple[Tensor, Details | None]:
        """Dropped tokens leave the tensor. One device synchronisation per threshold. Without `details` none are computed."""
        tokens = Packed.of(self.embed(images))
        layout: Any = "packed" if self.inference == "batch_topk" else self.inference
        lengths, masks = [], []
        for s, blocks in enumerate(self.stages()):
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
            logits = self.read_out(prefix, patch.x, patch.image)
        else:
            logits = self.read_out(prefix, None, None)
        if not details:
            return logits, None
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

    def read_out(self, prefix: Tensor, tokens: Tensor | None, image: Tensor | None) -> Tensor:
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
