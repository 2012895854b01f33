"""Top-k, EViT's fusion and ToMe against plain loops."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils._python_dispatch import TorchDispatchMode

from adaptive_prune.budget import ViTCost
from adaptive_prune.model import PrunedViT
from adaptive_prune.tome import merge, merge_counts, tome_cost
from adaptive_prune.topk import keep_top

COST = ViTCost(dim=32, hidden=64, heads=4, depth=6, patches=36, prefix=1, stem=36 * 32 * 16)


def test_top_k_keeps_the_best_in_their_order():
    x = torch.arange(10.0).view(1, 5, 2)
    scores = torch.tensor([[9.0, 0.1, 0.4, 0.3, 0.2]])
    kept, index = keep_top(x, scores, 2)
    assert index.tolist() == [[0, 2, 3]] and torch.equal(kept, x[:, [0, 2, 3]])
    assert keep_top(x, scores, 0)[1].tolist() == [[0]]
    with pytest.raises(ValueError, match=r"keep 5 of 4.*0\.\.4"):
        keep_top(x, scores, 5)


def test_fusion_sums_the_dropped_by_score_and_passes_gradients():
    x = torch.randn(1, 5, 2, generator=torch.Generator().manual_seed(0))
    scores = torch.tensor([[9.0, 0.1, 0.4, 0.3, 0.2]])
    kept, _ = keep_top(x, scores, 2, fuse=True)
    torch.testing.assert_close(kept[0, 3], 0.1 * x[0, 1] + 0.2 * x[0, 4])
    scores.requires_grad_()
    keep_top(x, scores, 2, fuse=True)[0].sum().backward()
    assert (scores.grad[0, [1, 4]] != 0).all() and (scores.grad[0, [0, 2, 3]] == 0).all()
    assert keep_top(x, scores, 4, fuse=True)[0].shape[1] == 5, "nothing dropped, nothing fused"


def test_merging_the_closest_pair_by_size():
    x = torch.tensor([[[7.0], [1.0], [2.0], [3.0], [4.0]]])
    size = torch.tensor([[1.0, 3.0, 1.0, 1.0, 1.0]])
    keys = torch.tensor([[[1.0, 0], [1, 0], [1, 0.1], [0, 1], [-1, 0]]])  # patch 0 (even) is closest to patch 1 (odd)
    out, sizes = merge(x, size, keys, 1)
    assert (
        sizes is not None
        and sizes.tolist() == [[1.0, 1.0, 4.0, 1.0]]
        and out[0, :, 0].tolist() == pytest.approx([7.0, 3.0, 1.25, 4.0])
    )


def test_merging_keeps_the_weighted_sum_and_the_prefix():
    g = torch.Generator().manual_seed(0)
    x, keys = torch.randn(3, 38, 4, generator=g), torch.randn(3, 38, 2, generator=g)
    size = torch.ones(3, 38)
    out, sizes = merge(x, size, keys, 11, prefix=2)
    assert out.shape[1] == 27 and torch.equal(out[:, :2], x[:, :2])
    torch.testing.assert_close((out * sizes[..., None]).sum(1), x.sum(1), rtol=1e-4, atol=1e-4)
    assert sizes.sum(1).tolist() == [38.0] * 3
    assert merge(x, size, keys, 99, prefix=2)[0].shape[1] == 20, "at most half"
    assert merge(x[:, :2], size[:, :2], keys[:, :2], 3, prefix=2)[0].shape[1] == 2, "nothing to merge"


class WideIndices(TorchDispatchMode):
    """Notes operations whose index has an entry per number instead of one per token."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.startswith(("gather", "scatter")) and args[2].ndim == 3:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", ["topk", "evit", "tome"])
def test_tokens_move_as_whole_rows(rule):
    """The baselines are not slowed down by index tensors as wide as the tokens."""
    vit = VisionTransformer(img_size=16, patch_size=4, num_classes=3, embed_dim=16, depth=4, num_heads=2)
    model = PrunedViT(vit, rule=rule, locations=(1, 2), budget=0.7).eval()
    with WideIndices() as found:
        model(torch.randn(2, 3, 16, 16))
    assert found.seen == []


def test_without_sizes_every_token_counts_once():
    g = torch.Generator().manual_seed(0)
    x, keys = torch.randn(2, 13, 4, generator=g), torch.randn(2, 13, 2, generator=g)
    for a, b in zip(merge(x, None, keys, 4), merge(x, torch.ones(2, 13), keys, 4), strict=True):
        torch.testing.assert_close(a, b)


def test_merged_tokens_weigh_in_attention_as_often_as_they_stand_for_patches():
    """Equal patches merge without a trace: only proportional attention makes two of them count twice. Against plain attention
    on all patches."""
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=16, patch_size=4, in_chans=1, num_classes=3, embed_dim=16, depth=4, num_heads=2, mlp_ratio=2
    ).eval()
    for p in vit.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    with torch.no_grad():
        vit.pos_embed[:, 1:] = vit.pos_embed[:, 1:2]
        image = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
        patch = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(2))
        image[..., :8] = patch.repeat(1, 1, 4, 2)  # half of the patches are equal
        model = PrunedViT(vit, rule="tome", keep=[3, 0, 0, 0], locations=(1, 2)).eval()
        logits, info = model(image, details=True)
        torch.testing.assert_close(logits, vit(image), rtol=1e-4, atol=1e-4)
    assert info.kept.tolist() == [[13.0, 13.0]]


def test_nothing_merged_needs_no_bias(monkeypatch):
    """A bias of zeros is right and slow: fused attention without one must see none before the first merge."""
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(*args, attn_mask=None, **more):
        seen.append(attn_mask is not None)
        return attend(*args, attn_mask=attn_mask, **more)

    monkeypatch.setattr("adaptive_prune.baselines.F.scaled_dot_product_attention", watched)
    vit = VisionTransformer(img_size=16, patch_size=4, num_classes=3, embed_dim=16, depth=4, num_heads=2)
    PrunedViT(vit, rule="tome", keep=[0, 2, 0, 1], locations=(1,)).eval()(torch.randn(1, 3, 16, 16))
    assert seen == [False, False, True, True]


@pytest.mark.parametrize("target", [0.45, 0.6, 0.9, 1.0])
def test_merge_counts_meet_the_budget(target):
    merged = merge_counts(COST, target)
    assert tome_cost(COST, merged) / COST.dense <= target
    assert tome_cost(COST, merged) / COST.dense == pytest.approx(target, abs=0.02)
    assert tome_cost(COST, [0] * 6) == COST.dense


def test_a_budget_out_of_reach():
    with pytest.raises(ValueError, match="ToMe cannot go below"):
        merge_counts(COST, 0.2)
