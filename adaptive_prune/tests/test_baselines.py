"""Top-k, EViT's fusion and ToMe against plain loops."""

import pytest
import torch

from adaptive_prune.budget import ViTCost
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


def test_fusion_averages_the_dropped_by_score():
    x = torch.randn(1, 5, 2, generator=torch.Generator().manual_seed(0))
    scores = torch.tensor([[9.0, 0.1, 0.4, 0.3, 0.2]])
    kept, _ = keep_top(x, scores, 2, fuse=True)
    expected = (0.1 * x[0, 1] + 0.2 * x[0, 4]) / 0.3
    torch.testing.assert_close(kept[0, 3], expected)
    assert keep_top(x, scores, 4, fuse=True)[0].shape[1] == 5, "nothing dropped, nothing fused"


def test_merging_the_closest_pair_by_size():
    x = torch.tensor([[[7.0], [1.0], [2.0], [3.0], [4.0]]])
    size = torch.tensor([[1.0, 3.0, 1.0, 1.0, 1.0]])
    keys = torch.tensor([[[1.0, 0], [1, 0], [1, 0.1], [0, 1], [-1, 0]]])  # patch 0 (even) is closest to patch 1 (odd)
    out, sizes = merge(x, size, keys, 1)
    assert sizes.tolist() == [[1.0, 1.0, 4.0, 1.0]] and out[0, :, 0].tolist() == pytest.approx([7.0, 3.0, 1.25, 4.0])


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


@pytest.mark.parametrize("target", [0.45, 0.6, 0.9, 1.0])
def test_merge_counts_meet_the_budget(target):
    merged = merge_counts(COST, target)
    assert tome_cost(COST, merged) / COST.dense <= target
    assert tome_cost(COST, merged) / COST.dense == pytest.approx(target, abs=0.02)
    assert tome_cost(COST, [0] * 6) == COST.dense


def test_a_budget_out_of_reach():
    with pytest.raises(ValueError, match="ToMe cannot go below"):
        merge_counts(COST, 0.2)
