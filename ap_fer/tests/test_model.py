"""The published counts to the unit, the parities between formulations, and what a configuration may be."""

import pytest
import torch

from ap_fer.cost import norm_elements, published_flops, vit_macs
from ap_fer.counts import measure, parts
from ap_fer.ir50 import IR50, ConvStem, Unit
from ap_fer.model import APViT, token_poolings
from ap_fer.tests.helpers import small_model
from common.metrics.ops import count_macs, count_parameters

NONE = {"keep": None}, {"rate": 1.0, "start": 0}
SETTINGS = {
    "none": (*NONE, 9_811_046_400, 15_279_026_176),
    "app": ({"keep": 160}, NONE[1], 7_953_985_536, 13_421_965_312),
    "atp": (NONE[0], {"rate": 0.9, "start": 4}, 8_845_787_136, 14_313_766_912),
    "app_atp": ({"keep": 160}, {"rate": 0.9, "start": 4}, 7_178_899_968, 12_646_879_744),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_parameters_and_macs_to_the_unit(name):
    app, atp, vit, total = SETTINGS[name]
    found = measure(app, atp)
    assert found["params"] == 65_209_543, "the poolings have no parameters"
    assert found["macs_vit"] == found["macs_formula"] == vit and found["macs"] == total
    assert found["macs_ir50"] == 5_467_979_776 and found["bn"] == 5_117_952


def test_the_convention_behind_12_67_g_flops():
    assert round(measure({"keep": 160}, {"rate": 0.9, "start": 4})["gflops"], 2) == 12.67
    none = measure(*NONE)
    assert round(none["gflops"], 2) == 15.3 and none["ln"] == 2_572_032
    assert published_flops(10, {"bn": 3, "ln": 2}) == 26


def test_table_of_parameters():
    found = parts()
    expected = {
        "params_stem": 1_920, "params_stage1": 222_144, "params_stage2": 1_116_800, "params_stage3": 16_271_104,
        "params_ir50": 17_611_968, "params_projection": 197_376, "params_block": 5_905_152, "params_head": 5_383,
        "raf_db_epoch": 15_545,
    }  # fmt: skip
    assert found == expected
    with torch.device("meta"):
        assert count_parameters(APViT(app={"keep": 160, "score": "la"}))["total"] == 65_209_543 + 37_059


def test_the_formula_counts_what_a_small_model_does():
    model = small_model().eval()
    counted = count_macs(model.vit, torch.randn(1, 3, 24, 24))
    rates = [b.atp.rate for b in model.vit.blocks]
    assert sum(counted.values()) == vit_macs(36, 20, rates, channels=3, dim=16, mlp_ratio=3, kernel=4)
    x = torch.randn(1, 3, 16, 16)
    assert norm_elements(ConvStem([4, 8]), x) == {"bn": 4 * 64 + 8 * 16, "ln": 0}


def test_stride_two_with_equal_channels_is_subsampling():
    unit, x = Unit(4, 4, 2).eval(), torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(unit.shortcut_layer(x), x[:, :, ::2, ::2])
    assert unit(x).shape == (2, 4, 4, 4) and Unit(4, 6, 2)(x).shape == (2, 6, 4, 4)
    assert torch.equal(Unit(4, 4, 1).shortcut_layer(x), x)
    torch.testing.assert_close(unit(x), unit.res_layer(x) + x[:, :, ::2, ::2])
    assert IR50(units=[1, 1, 1], widths=[8, 8, 16])(torch.randn(1, 3, 32, 32)).shape == (1, 16, 4, 4)


def test_at_step_zero_logits_are_zero_and_the_position_of_cls_too():
    model = small_model()
    logits = model(torch.randn(4, 3, 24, 24))
    assert (logits == 0).all()
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 3]))
    assert loss.item() == pytest.approx(1.945910, abs=1e-6)
    vit = model.vit
    assert (vit.cls_pos_embed == 0).all() and 0.01 < vit.patch_pos_embed.std() < 0.03 and vit.cls_token.abs().sum() > 0
    assert all((b.mlp.fc1.bias == 0).all() and 0.01 < b.attn.qkv.weight.std() < 0.03 for b in vit.blocks)
    assert (model.head["fc"].bias == 0).all()
    wide = small_model(init_std=0.2).vit
    assert all(
        0.13 < t.std() < 0.25
        for t in (wide.patch_pos_embed, wide.blocks[0].attn.qkv.weight, wide.blocks[2].mlp.fc2.weight)
    )


def randomised(**options):
    torch.manual_seed(0)
    model = small_model(**options)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def test_keeping_everything_is_bit_identical_to_no_pooling_with_the_same_keys():
    plain, every = randomised(app=NONE[0], atp=NONE[1]), randomised(app={"keep": 36}, atp={"rates": [1.0] * 3})
    pooled = randomised()
    assert plain.state_dict().keys() == every.state_dict().keys() == pooled.state_dict().keys()
    x = torch.randn(3, 3, 24, 24)
    assert torch.equal(plain(x), every(x))
    assert not torch.allclose(plain(x), pooled(x))


def test_results_do_not_depend_on_batch_mates_even_where_batch_and_token_counts_agree():
    model = randomised()
    x = torch.randn(21, 3, 24, 24)
    tokens = [1 + k.shape[1] for k in model(x, details=True)[1].blocks]
    assert tokens == [21, 15, 10]
    whole, kept = model(x, details=True)
    for size in (1, 9, 10, 14, 15, 20, 21):  # also those without the class token
        logits, part = model(x[:size], details=True)
        torch.testing.assert_close(logits, whole[:size], rtol=1e-4, atol=1e-5)
        assert [k.shape[1] for k in part.blocks] == [20, 14, 9] and torch.equal(part.blocks[-1], kept.blocks[-1][:size])


def test_indices_are_original_places_nested_and_ascending():
    model = randomised()
    _, kept = model(torch.randn(4, 3, 24, 24), details=True)
    outer = kept.app
    for index in kept.blocks:
        assert (index.diff(dim=1) > 0).all()
        for a, b in zip(outer, index, strict=True):
            assert set(b.tolist()) <= set(a.tolist())
        outer = index
    assert any(i.max() >= 20 for i in kept.blocks), "places in the image, not among the kept patches"


def test_kept_places_are_the_right_ones_by_an_independent_path():
    """Zeroing the pixels of patches dropped by APP changes nothing; zeroing kept ones does."""
    model = randomised(atp=NONE[1])
    x = torch.randn(1, 3, 24, 24)
    logits, kept = model(x, details=True)
    torch.testing.assert_close(
        model(_without(x, set(range(36)) - set(kept.app[0].tolist()))), logits, rtol=1e-5, atol=1e-5
    )
    assert not torch.allclose(model(_without(x, set(kept.app[0][:3].tolist()))), logits, rtol=1e-3, atol=1e-3)


def _without(x, patches):
    x = x.clone()
    for p in patches:
        row, column = 4 * (p // 6), 4 * (p % 6)
        x[..., row : row + 4, column : column + 4] = 0
    return x


def test_the_transformer_is_its_parts_and_reads_out_the_class_token():
    model = randomised()
    vit, x = model.vit, torch.randn(2, 3, 24, 24)
    features = vit.projs[0](x).flatten(2).transpose(1, 2)
    kept = features.abs().sum(-1).topk(20).indices.sort().values
    patches = torch.stack([(features + vit.patch_pos_embed)[b, kept[b]] for b in range(2)])
    z = torch.cat([(vit.cls_token + vit.cls_pos_embed).repeat(2, 1, 1), patches], 1)
    for block in vit.blocks:
        z, _ = block(z)
    torch.testing.assert_close(model(x), model.head["fc"](vit.norm(z[:, 0])), rtol=1e-4, atol=1e-5)


def test_scores_come_from_the_projected_features_of_a_cnn_stem():
    """Not from the stem's own features, nor from those with their positions; by the equation s_p = sum_c |X_cp|."""
    model = randomised(stem="conv", widths=[8, 12], strides=[2, 2], kernels=[3, 3], atp=NONE[1])
    x = torch.randn(2, 3, 24, 24)
    features = model.extractor(x)
    projected = torch.einsum("bchw,dc->bhwd", features, model.vit.projs[0].weight[:, :, 0, 0]) + model.vit.projs[0].bias
    s = projected.flatten(1, 2)
    best = {
        "projected": s.abs().sum(-1),
        "stem's": features.flatten(2).abs().sum(1),
        "placed": (s + model.vit.patch_pos_embed).abs().sum(-1),
    }
    kept = {name: score.topk(20).indices.sort().values for name, score in best.items()}
    found = model(x, details=True)[1].app
    assert torch.equal(found, kept["projected"])
    assert not torch.equal(found, kept["stem's"]) and not torch.equal(found, kept["placed"])


def test_patches_are_a_set_when_they_move_together_with_their_positions():
    model = randomised()
    features = torch.randn(2, 16, 36)
    order = torch.randperm(36, generator=torch.Generator().manual_seed(1))
    vit = model.vit
    vit.projs[0] = torch.nn.Identity()
    first, _ = vit(features.view(2, 16, 6, 6))
    with torch.no_grad():
        vit.patch_pos_embed.copy_(vit.patch_pos_embed[:, order])
    second, _ = vit(features[..., order].view(2, 16, 6, 6))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_stems_and_baselines():
    x = torch.randn(2, 3, 32, 32)
    conv = APViT(
        image_size=32, stem="conv", widths=[8, 16], dim=16, depth=2, heads=2, app={"keep": 30}, atp={"rates": [1, 0.5]}
    )
    logits, kept = conv(x, details=True)
    assert logits.shape == (2, 7) and conv.patches == 64 and [k.shape[1] for k in kept.blocks] == [30, 15]
    alone = APViT(
        image_size=32, stem="conv", widths=[8, 16], depth=0, num_classes=8, app={"keep": None}, atp={"rates": []}
    )
    assert alone(x).shape == (2, 8) and alone.vit is None and alone(x, details=True)[1] is None
    flat = APViT(
        image_size=32, stem="conv", widths=[8, 16], depth=0, pool="flatten", app={"keep": None}, atp={"rates": []}
    )
    assert flat(x).shape == (2, 7) and flat.head["fc"].in_features == 16 * 64
    with pytest.raises(ValueError, match="pool='max'; use one of mean, flatten"):
        small_model(pool="max")
    with pytest.raises(ValueError, match="one of each per convolution"):
        APViT(image_size=32, stem="conv", widths=[8, 16], strides=[2])
    assert set(alone.state_dict()) & set(conv.state_dict()) >= {"extractor.layers.0.weight", "head.fc.weight"}


def test_token_poolings_of_a_configuration():
    assert [p.rate for p in token_poolings(4, {"rate": 0.8, "start": 2})] == [1.0, 1.0, 0.8, 0.8]
    assert [p.rate for p in token_poolings(8, None)] == [1.0] * 4 + [0.9] * 4
    with pytest.raises(ValueError, match="start=5; allowed are 0..4"):
        token_poolings(4, {"rate": 0.8, "start": 5})
    with pytest.raises(ValueError, match="are 3 keep rates for 4 blocks"):
        token_poolings(4, {"rates": [1.0, 1.0, 0.9]})
    with pytest.raises(ValueError, match="rates .one per block., or rate and start"):
        token_poolings(4, {"rate": 0.8})


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"app": {"keep": 37}}, "keep=37 of 36 patches; allowed are 1..36"),
        ({"app": {"keep": 0}}, "keep=0; allowed are whole numbers from 1 on"),
        ({"app": {"keep": 20.5}}, "keep=20.5; allowed are whole numbers"),
        ({"image_size": 26}, "image_size=26 is not a positive multiple of the stem's stride 4"),
        (
            {"image_size": 100, "stem": "ir50", "units": [1, 1, 1]},
            "image_size=100 is not a positive multiple of the stem's stride 8",
        ),
        ({"stem": "vgg"}, "stem='vgg'; use one of ir50, conv, patches"),
        ({"heads": 3}, "dim=16 is not divisible by heads=3"),
        ({"depth": 0}, "stem='patches' has none"),
    ],
)
def test_what_does_not_fit_together(options, error):
    with pytest.raises(ValueError, match=error):
        small_model(**options)


def test_images_of_another_shape_are_refused():
    model = small_model()
    for shape in [(2, 1, 24, 24), (2, 3, 24, 28), (2, 3, 32, 32), (3, 24, 24)]:
        with pytest.raises(ValueError, match=r"the model takes \(B, 3, 24, 24\)"):
            model(torch.zeros(*shape))
    with pytest.raises(ValueError, match="grid of 5 x 6, the position table is for 6 x 6"):
        model.vit(torch.zeros(1, 3, 20, 24))
