import pytest
import torch
import torch.nn.functional as F

from ap_fer.attentive_token_pooling import ATP, token_score
from ap_fer.pooling_vit import Block
from ap_fer.token_selection import gather_tokens

ROW = torch.tensor([[[9.0, 1.0, -2.0, 0.5], [9.0, -4.0, 1.0, 0.0]]])  # one image, two heads, CLS and three patches


def test_every_score_in_closed_form():
    torch.testing.assert_close(token_score(ROW), torch.tensor([[-3.0, -1.0, 0.5]]))
    torch.testing.assert_close(token_score(ROW, "sum_abs_1"), torch.tensor([[5.0, 3.0, 0.5]]))
    torch.testing.assert_close(token_score(ROW, "max"), torch.tensor([[1.0, 1.0, 0.5]]))
    torch.testing.assert_close(token_score(ROW, source="softmax"), ROW.softmax(-1)[..., 1:].sum(1))
    assert token_score(ROW, "random").shape == (1, 3)


def test_logits_and_softmax_order_tokens_differently():
    """Within a head the softmax is monotone; the sum over heads is not."""
    row = torch.tensor([[[0.0, 3.0, 1.0], [0.0, -4.0, -1.0]]])
    assert token_score(row).argmax() == 1 and token_score(row, source="softmax").argmax() == 0


def test_cls_and_other_prefix_tokens_stay_whatever_their_logits():
    u, row = torch.randn(2, 12, 4), torch.randn(2, 3, 12)
    row[..., :2] = -1e6
    kept, index = ATP(0.5, prefix=2)(u, row)
    assert torch.equal(kept[:, :2], u[:, :2]) and kept.shape == (2, 7, 4)
    torch.testing.assert_close(kept[:, 2:], gather_tokens(u[:, 2:], index))
    best = row[..., 2:].sum(1).topk(5).indices.sort().values
    assert torch.equal(index, best)


def test_the_released_comparison_skips_pooling_at_one_batch_size_and_ours_at_none():
    """It compares the number of images, not that of the chosen tokens, with the number of tokens."""
    for images in (10, 11, 12):
        u, row = torch.randn(images, 11, 4), torch.randn(images, 3, 11)
        kept, index = ATP(0.5)(u, row)
        released = u if len(index) == u.shape[1] else torch.cat([u[:, :1], gather_tokens(u[:, 1:], index)], 1)
        assert kept.shape[1] == 6 and torch.equal(released, kept) is (images != 11)


def test_rate_one_and_the_wrong_mode_drop_nothing():
    u, row = torch.randn(2, 11, 4), torch.randn(2, 3, 11)
    for atp in (ATP(1.0), ATP(0.99, when="train").eval(), ATP(0.5, when="test").train()):
        kept, index = atp(u, row)
        assert torch.equal(kept, u) and index.shape == (2, 10) and not atp.drops(10)
    assert ATP(0.5).drops(10) and not ATP(0.5).drops(1), "one token is never dropped"


def block(rate=0.6, **options):
    torch.manual_seed(0)
    b = Block(8, 2, 3.0, ATP(rate, **options))
    for p in b.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return b.eval()


def plain_block(b, z, n_keep):
    """The pooling with loops over images and heads, nothing shared with the module."""
    outs, indices = [], []
    for image in z:
        y = F.layer_norm(image, (8,), b.norm1.weight, b.norm1.bias, 1e-6)
        q, k, v = (y @ b.attn.qkv.weight.T).split(8, dim=-1)
        heads, score = [], torch.zeros(len(image) - 1)
        for h in range(2):
            at = slice(4 * h, 4 * h + 4)
            a = q[:, at] @ k[:, at].T / 4**0.5
            score += a[0, 1:]
            heads.append(torch.softmax(a, -1) @ v[:, at])
        u = image + torch.cat(heads, -1) @ b.attn.proj.weight.T + b.attn.proj.bias
        keep = sorted(score.topk(n_keep).indices.tolist())
        u = u[[0, *(i + 1 for i in keep)]]
        y = F.layer_norm(u, (8,), b.norm2.weight, b.norm2.bias, 1e-6)
        mlp = F.gelu(y @ b.mlp.fc1.weight.T + b.mlp.fc1.bias) @ b.mlp.fc2.weight.T + b.mlp.fc2.bias
        outs.append(u + mlp)
        indices.append(keep)
    return torch.stack(outs), indices


def test_block_equals_the_plain_formulas():
    b, z = block(), torch.randn(3, 11, 8)
    out, index = b(z)
    expected, kept = plain_block(b, z, 6)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert index.tolist() == kept


def test_pooled_tokens_are_those_of_the_unpooled_block():
    """Attention uses all tokens and the MLP works token by token: pooling only selects."""
    pooled, whole, z = block(0.6), block(1.0), torch.randn(3, 11, 8)
    out, index = pooled(z)
    every, none = whole(z)
    assert none is None
    torch.testing.assert_close(out[:, 1:], gather_tokens(every[:, 1:], index), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[:, 0], every[:, 0], rtol=1e-5, atol=1e-5)


def test_equal_queries_and_keys_keep_k_tokens_and_average_the_values():
    b, z = block(), torch.randn(2, 11, 8)
    with torch.no_grad():
        b.attn.qkv.weight[:16] = 0
    row_out, row = b.attn(b.norm1(z), row=True)
    mean = F.linear(b.norm1(z), b.attn.qkv.weight[16:]).mean(1, keepdim=True)
    torch.testing.assert_close(row_out, b.attn.proj(mean).expand(-1, 11, -1), rtol=1e-5, atol=1e-5)
    assert (row == 0).all()
    out, index = b(z)
    assert out.shape == (2, 7, 8) and all(len(set(r)) == 6 for r in index.tolist())


def test_attention_and_its_row_equal_the_explicit_logits():
    b, z = block(), torch.randn(2, 11, 8)
    out, row = b.attn(z, row=True)
    q, k, v = (t.view(2, 11, 2, 4).transpose(1, 2) for t in F.linear(z, b.attn.qkv.weight).split(8, dim=-1))
    logits = torch.einsum("bhid,bhjd->bhij", q, k) / 2
    torch.testing.assert_close(row, logits[:, :, 0], rtol=1e-5, atol=1e-5)
    heads = torch.einsum("bhij,bhjd->bihd", logits.softmax(-1), v).flatten(2)
    torch.testing.assert_close(out, b.attn.proj(heads), rtol=1e-5, atol=1e-5)
    assert torch.equal(out, b.attn(z, row=False)[0]) and b.attn(z, row=False)[1] is None


def test_logits_are_float32_under_autocast():
    """In bfloat16 logits near 100 are half a unit apart: hundreds of tokens would tie."""
    b, z = block(), torch.randn(2, 11, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = b.norm1(z)
        out, row = b.attn(y, row=True)
        q, k, _ = b.attn.qkv(y).view(2, 11, 3, 2, 4).permute(2, 0, 3, 1, 4)
    assert row.dtype == torch.float32 and out.dtype == torch.bfloat16 and q.dtype == torch.bfloat16
    torch.testing.assert_close(row, (q[:, :, :1].float() @ k.float().transpose(-2, -1))[:, :, 0] / 4**0.5)
    assert not torch.equal(row, row.bfloat16().float())


def test_gradients_pass_attention_to_dropped_tokens_but_not_the_choice():
    b = block().requires_grad_(False)
    z = torch.randn(1, 11, 8, requires_grad=True)
    out, index = b(z)
    out.sum().backward()
    dropped = sorted(set(range(10)) - set(index[0].tolist()))
    assert (z.grad[0, [1 + i for i in dropped]] != 0).any(), "dropped tokens were attended to"
    u, row = torch.randn(1, 11, 8, requires_grad=True), torch.randn(1, 2, 11, requires_grad=True)
    ATP(0.6)(u, row)[0].sum().backward()
    assert row.grad is None


def test_bad_options():
    with pytest.raises(ValueError, match="score='mean'; use one of sum, sum_abs_1, max, random"):
        ATP(0.5, score="mean")
    with pytest.raises(ValueError, match="source='attention'; use one of logits, softmax"):
        ATP(0.5, source="attention")
    with pytest.raises(ValueError, match=r"\[0.0\] are not in \(0, 1\]"):
        ATP(0.0)
