"""Selection of patches, combination of masks, and both attentions against plain formulations."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fm_vit.cross_modal_block import CrossModalBlock, cross_modal
from fm_vit.fusion_attention import FusionAttention
from fm_vit.mutual_attention import MODES, MutualAttention, combine, select

NAMES = ("rgb", "depth", "ir")


def tokens(batch=2, patches=9, dim=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {m: torch.randn(batch, 1 + patches, dim, generator=g) for m in NAMES}


def block_of(z, made):
    """(class tokens, masks) with every modality present."""
    return cross_modal(z, made, [list(z)])[0]


def blocks(**options):
    torch.manual_seed(1)
    made = {m: CrossModalBlock(12, 3, **options).eval() for m in NAMES}
    for block in made.values():
        for p in block.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return made


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=30), st.floats(0.01, 1))
def test_top_keeps_exactly_the_share_and_the_largest(values, share):
    x = torch.tensor([values])
    mask = select(x, share=share)
    count = math.ceil(share * len(values) - 1e-9)
    assert mask.sum() == count >= 1
    assert x[mask].min() >= (x[~mask].max() if (~mask).any() else -math.inf)


def test_ties_go_to_the_first_and_other_rules_keep_at_least_one():
    flat = torch.ones(2, 4)
    assert select(flat, share=0.5).tolist() == [[True, True, False, False]] * 2
    assert select(flat, rule="mean").tolist() == [[True, False, False, False]] * 2
    assert select(flat, rule="max").all()
    x = torch.tensor([[0.0, 1.0, 2.0, 9.0]])
    assert select(x, rule="mean").tolist() == [[False, False, False, True]]
    assert select(x, rule="max", share=0.2).tolist() == [[False, False, True, True]]
    assert torch.equal(select(x, rule="max", share=0.2), select(x - 100, rule="max", share=0.2))


@pytest.mark.parametrize(
    ("options", "message"), [({"rule": "best"}, "best"), ({"share": 0.0}, "share=0.0"), ({"share": 1.1}, "1.1")]
)
def test_bad_selection(options, message):
    with pytest.raises(ValueError, match=message):
        select(torch.zeros(1, 4), **options)


def test_modes_of_combination():
    m = {"rgb": [1, 1, 0, 0], "depth": [0, 1, 1, 0], "ir": [0, 1, 0, 0]}
    masks = {k: torch.tensor([v], dtype=torch.bool) for k, v in m.items()}
    wanted = {"own": m["rgb"], "others": [0, 1, 1, 0], "union": [1, 1, 1, 0], "intersection": [0, 1, 0, 0]}
    for mode in MODES:
        assert combine(masks, "rgb", mode=mode).int().tolist() == [wanted[mode]], mode
    alone = {"rgb": masks["rgb"]}
    assert all(torch.equal(combine(alone, "rgb", mode=mode), masks["rgb"]) for mode in MODES)
    masks["ir"] = torch.tensor([[False, False, False, True]])
    assert combine(masks, "rgb", mode="intersection").int().tolist() == [m["rgb"]]  # empty: the own mask
    with pytest.raises(ValueError, match="both"):
        combine(masks, "rgb", mode="both")


def test_own_with_every_patch_is_plain_class_attention():
    """Against torch's multi-head attention with the same projections."""
    torch.manual_seed(0)
    attention = MutualAttention(12, 3)
    plain = torch.nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([attention.q.weight, attention.k.weight, attention.v.weight]))
        plain.in_proj_bias.copy_(torch.cat([attention.q.bias, attention.k.bias, attention.v.bias]))
        plain.out_proj.weight.copy_(attention.proj.weight)
        plain.out_proj.bias.copy_(attention.proj.bias)
    z = tokens()["rgb"]
    logits, values = attention.look(z)
    y = attention.norm(z)
    everything = torch.ones(2, 9, dtype=torch.bool)
    expected = plain(y[:, :1], y[:, 1:], y[:, 1:])[0][:, 0]
    torch.testing.assert_close(attention.read(logits, values, everything), expected)
    some = select(logits.mean(1), share=0.4)
    expected = plain(y[:, :1], y[:, 1:], y[:, 1:], key_padding_mask=~some)[0][:, 0]
    torch.testing.assert_close(attention.read(logits, values, some), expected)


def test_masked_patches_get_no_weight_and_no_gradient_in_half_precision_either():
    attention = MutualAttention(12, 3)
    z = tokens()["rgb"].requires_grad_()
    logits, values = attention.look(z)
    values.retain_grad()
    mask = select(logits.mean(1), share=0.3)
    attention.read(logits, values, mask).square().sum().backward()
    assert (values.grad.transpose(1, 2)[~mask] == 0).all() and (values.grad.transpose(1, 2)[mask] != 0).any()
    half = attention.half().read(logits.detach().half(), values.detach().half(), mask)
    assert half.isfinite().all()


def test_fusion_attention_is_attention_of_the_class_token_over_all_patches():
    torch.manual_seed(0)
    fusion = FusionAttention(12, 3)
    for p in [*fusion.norm_class.parameters(), *fusion.norm_patches.parameters()]:  # as new they are alike
        torch.nn.init.normal_(p)
    z = tokens()
    c, patches = z["rgb"][:, 0], [x[:, 1:] for x in z.values()]
    source = torch.cat([fusion.norm_class(c)[:, None], *(fusion.norm_patches(p) for p in patches)], 1)
    q, k, v = fusion.q(source[:, :1]), fusion.k(source), fusion.v(source)
    heads = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        weights = (q[..., part] @ k[..., part].mT / 2).softmax(-1)
        heads.append(weights @ v[..., part])
    read = lambda parts: fusion.read(c, [fusion.look(p) for p in parts])  # noqa: E731
    torch.testing.assert_close(read(patches), fusion.proj(torch.cat(heads, -1))[:, 0])
    shuffled = [p[:, torch.randperm(9)] for p in patches]
    torch.testing.assert_close(read(shuffled), read(patches))  # no order of patches
    assert not torch.allclose(read([*patches, patches[0]]), read(patches))  # a duplicate counts


@pytest.mark.parametrize("mma", [*MODES, None])
@pytest.mark.parametrize("mfa", [True, False])
def test_only_class_tokens_change_and_the_order_of_the_dictionary_is_the_callers(mma, mfa):
    z = tokens()
    out, masks = block_of(z, blocks(mma=mma, mfa=mfa))
    assert [*masks] == ([*NAMES] if mma else [])
    for m in NAMES:
        assert out[m].shape == (2, 12) and not torch.equal(out[m], z[m][:, 0])


def test_the_block_is_its_equations():
    z, made = tokens(), blocks(share=0.5)
    masks = {}
    for m, block in made.items():
        logits, _ = block.mma.look(z[m])
        masks[m] = select(logits.mean(1), share=0.5)
    union = masks["rgb"] | masks["depth"] | masks["ir"]
    block = made["depth"]
    c = z["depth"][:, 0] + block.mma.read(*block.mma.look(z["depth"]), union)
    c = c + block.mfa.read(c, [block.mfa.look(z[m][:, 1:]) for m in NAMES])
    c = c + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm(c))))
    out, used = block_of(z, made)
    torch.testing.assert_close(out["depth"], c)
    assert all(torch.equal(used[m], union) for m in NAMES)


def test_own_mask_without_fusion_is_blind_to_other_modalities():
    z, made = tokens(), blocks(mma="own", mfa=False)
    before = block_of(z, made)[0]["rgb"]
    changed = {**z, "ir": z["ir"] + 1, "depth": z["depth"].flip(1)}
    assert torch.equal(block_of(changed, made)[0]["rgb"], before)
    assert not torch.equal(
        block_of(changed, blocks(mma="union", mfa=False, share=0.2))[0]["rgb"],
        block_of(z, blocks(mma="union", mfa=False, share=0.2))[0]["rgb"],
    )


def test_zero_init_is_the_identity():
    made = {m: CrossModalBlock(12, 3, zero_init=True) for m in NAMES}
    z = tokens()
    out, _ = block_of(z, made)
    assert all(torch.equal(out[m], z[m][:, 0]) for m in NAMES)


@pytest.mark.parametrize("options", [{"mma": "all"}, {"rule": "x"}, {"share": 2.0}])
def test_bad_options_of_the_block(options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        CrossModalBlock(12, 3, **options)
    with pytest.raises(ValueError, match="5 heads"):
        CrossModalBlock(12, 5)
