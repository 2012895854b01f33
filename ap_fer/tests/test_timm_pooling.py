"""APP and ATP in timm's vit_tiny, as the README shows them."""

import pytest
import timm
import torch

from ap_fer.attentive_patch_pooling import APP
from ap_fer.attentive_token_pooling import ATP
from ap_fer.timm_pooling import PooledViT
from common.metrics.ops import count_macs


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=7).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(8)  # random weights attend almost uniformly
    return model


def test_nothing_pooled_is_timm_itself(vit):
    x = torch.randn(2, 3, 96, 96)
    assert torch.equal(PooledViT(vit).eval()(x), vit(x))
    assert torch.equal(PooledViT(vit, app=APP(36), rates=[1.0] * 12).eval()(x), vit(x))


def test_three_lines_drop_patches_and_tokens(vit):
    model = PooledViT(vit, app=APP(24), rates=[1.0] * 8 + [0.9] * 4).eval()
    x = torch.randn(2, 3, 96, 96)
    logits, kept = model(x, details=True)
    assert logits.shape == (2, 7) and not torch.allclose(logits, vit(x), atol=1e-4)
    assert [k.shape[1] for k in kept.blocks] == [24] * 8 + [21, 18, 16, 14]
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in vit.parameters())
    features = vit.patch_embed(x).abs().sum(-1)
    assert torch.equal(kept.app, features.topk(24).indices.sort().values)


def test_cost_really_falls(vit):
    x = torch.randn(1, 3, 96, 96)
    dense = sum(count_macs(vit, x).values())
    pooled = sum(count_macs(PooledViT(vit, app=APP(18), rates=[1.0] * 6 + [0.8] * 6), x).values())
    assert pooled < 0.55 * dense


def test_the_mlp_sees_only_the_tokens_that_stay(vit):
    """The MLP works token by token, so that pooling after it would give the same numbers at full cost."""
    seen = []
    handle = vit.blocks[3].mlp.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    PooledViT(vit, rates=[1.0] * 3 + [0.5] + [1.0] * 8).eval()(torch.randn(1, 3, 96, 96))
    handle.remove()
    assert seen == [1 + 18]


def test_rows_are_float32_under_autocast(vit, monkeypatch):
    rows = []
    monkeypatch.setattr(ATP, "forward", lambda self, u, row: (rows.append(row), (u, torch.arange(36).expand(1, -1)))[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        PooledViT(vit, rates=[0.5] + [1.0] * 11).eval()(torch.randn(1, 3, 96, 96))
    assert rows[0].dtype == torch.float32 and not torch.equal(rows[0], rows[0].bfloat16().float())


def test_atp_ranks_by_the_logits_of_the_block(vit):
    """Against hooks on timm's own attention: the inputs of its first pooled block, and the formula by hand."""
    model = PooledViT(vit, rates=[0.5] + [1.0] * 11).eval()
    x = torch.randn(2, 3, 96, 96)
    _, kept = model(x, details=True)
    attn, z = vit.blocks[0].attn, vit.blocks[0].norm1(vit._pos_embed(vit.patch_embed(x)))
    q, k, _ = attn.qkv(z).reshape(2, 37, 3, 3, 64).permute(2, 0, 3, 1, 4)
    score = torch.einsum("bhd,bhnd->bn", q[:, :, 0], k[:, :, 1:])
    assert torch.equal(kept.blocks[0], score.topk(18).indices.sort().values)
    everything = vit.blocks[0](vit._pos_embed(vit.patch_embed(x)))
    z, chosen = __import__("ap_fer.timm_pooling", fromlist=["_pooled_block"])._pooled_block(
        vit.blocks[0], vit._pos_embed(vit.patch_embed(x)), model.atp[0]
    )
    torch.testing.assert_close(z[0, 1:], everything[0, 1 + chosen[0]], rtol=1e-4, atol=1e-5)


def test_gradients_and_training_mode(vit):
    model = PooledViT(vit, app=APP(24), rates=[1.0] * 10 + [0.8] * 2).train()
    model(torch.randn(2, 3, 96, 96)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    vit.zero_grad()
    vit.eval()


def test_other_prefix_tokens_and_models_without_class_token():
    two = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=7, class_token=True, reg_tokens=3).eval()
    _, kept = PooledViT(two, rates=[0.5] * 12).eval()(torch.randn(1, 3, 64, 64), details=True)
    assert [k.shape[1] for k in kept.blocks[:3]] == [8, 4, 2]
    none = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, num_classes=7, class_token=False, global_pool="avg"
    ).eval()
    with pytest.raises(ValueError, match="no class token|this model has none"):
        PooledViT(none, rates=[0.5] * 12)
    assert PooledViT(none, app=APP(8)).eval()(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    with pytest.raises(ValueError, match="timm VisionTransformers, got ResNet"):
        PooledViT(timm.create_model("test_resnet"))
    with pytest.raises(ValueError, match="are 4 keep rates for 12 blocks"):
        PooledViT(two, rates=[1.0] * 4)
    with pytest.raises(ValueError, match="keep=20 of 16 patches"):
        PooledViT(two, app=APP(20)).eval()(torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match="without parameters"):
        PooledViT(two, app=APP(4, score="la", channels=192)).eval()(torch.randn(1, 3, 64, 64))
