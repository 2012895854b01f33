"""The quantised student (Eq. 1-3): codes, gradients, calibration, RPReLU, counts, integer form."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from common.quant.lsq import LSQQuantizer
from common.quant.pack import integer_matmul
from q_detr.detr import DETR, ResNetBody
from q_detr.distribution_alignment import DistributionAlignment
from q_detr.official_weights import is_student_key, load_real_valued
from q_detr.quantized_detr import (
    PARTS,
    QuantConv2d,
    QuantLinear,
    calibrate_alignment,
    calibrate_student,
    quantize_detr,
)
from q_detr.smca import SMCADETR


def small(cls=DETR, seed=0, **options):
    torch.manual_seed(seed)
    settings = {"num_classes": 3, "backbone": "tiny", "queries": 5, "dim": 16, "heads": 2, "ffn": 24}
    model = cls(**{**settings, "encoder_layers": 1, "decoder_layers": 2, "dropout": 0.0, **options})
    return model.eval()


def batch(seed=0, side=48, n=2):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, side, side, generator=g), torch.zeros(n, side, side, dtype=torch.bool)


def student(bits=4, seed=0, **options):
    model = small(seed=seed)
    quantised = quantize_detr(model, bits=bits, **options)
    calibrate_student(quantised, *batch())
    return model, quantised


def test_a_student_has_the_official_keys_and_its_own_and_nothing_else():
    with torch.device("meta"):
        model = DETR(num_classes=91)
    quantised = quantize_detr(model, da="both")
    new = set(quantised.state_dict()) - set(model.state_dict())
    assert set(model.state_dict()) <= set(quantised.state_dict()) and all(is_student_key(k) for k in new)
    assert not any(is_student_key(k) for k in model.state_dict())
    sizes = {n: p.numel() for n, p in quantised.named_parameters() if n in new}
    assert sum(v for n, v in sizes.items() if ".act" in n and "act_quant" not in n) == 107_328
    assert sum(v for n, v in sizes.items() if n.endswith(".relu.weight")) == 64
    assert sum(v for n, v in sizes.items() if n.endswith(".bias")) == 22_656
    assert sum(v for n, v in sizes.items() if ".align." in n) == 12 * 64
    assert all(p.requires_grad for n, p in quantised.named_parameters() if n in new)
    assert {n for n, _ in quantised.named_parameters() if is_student_key(n)} == set(sizes)


def test_official_weights_load_into_a_student_and_wrong_ones_are_named():
    source, other = small(seed=0), quantize_detr(small(seed=1), da="co_attn")
    missing = load_real_valued(other, {"model": source.state_dict()})
    assert missing and all(is_student_key(k) for k in missing)
    for k, v in source.state_dict().items():
        assert_close(other.state_dict()[k], v)
    state = source.state_dict()
    state.pop("input_proj.weight"), state.update(surplus=torch.zeros(1))
    with pytest.raises(ValueError, match=r"1 missing, e.g. input_proj.weight; 1 not in the model, e.g. surplus"):
        load_real_valued(small(), state)
    bigger = small(num_classes=7)
    with pytest.raises(ValueError, match=r"class_embed.weight \(4, 16\) for \(8, 16\).*new_classes"):
        load_real_valued(bigger, source.state_dict())
    head = bigger.class_embed.weight.clone()
    assert load_real_valued(bigger, source.state_dict(), new_classes=True) == ["class_embed.bias", "class_embed.weight"]
    assert_close(bigger.class_embed.weight, head)
    assert_close(bigger.input_proj.weight, source.input_proj.weight)


@pytest.mark.parametrize("cls", [DETR, SMCADETR])
def test_at_32_bits_the_student_is_the_network_bit_for_bit(cls):
    model = small(cls)
    same = quantize_detr(model, bits=32, attention_bits=32, stem_bits=32, backbone_act="relu")
    calibrate_student(same, *batch())
    ours, theirs = same(*batch(3)), model(*batch(3))
    for key in ("pred_logits", "pred_boxes", "co_attended"):
        assert torch.equal(ours[key], theirs[key])


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_pre_activation_backbone_starts_as_torchvisions(name):
    torch.manual_seed(0)
    model = DETR(num_classes=2, backbone=name, encoder_layers=1, decoder_layers=1, dim=16, heads=2, ffn=8)
    other = quantize_detr(model, bits=32, attention_bits=32, stem_bits=32)
    x = torch.randn(1, 3, 64, 64)
    expected, found = model.backbone[0].body(x), other.backbone[0].body(x)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        other.backbone[0].body.layer2[0].act1.slope.fill_(0.5)
    assert not torch.allclose(other.backbone[0].body(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["backbone"], {"backbone"}),
        (["backbone", "encoder"], {"backbone", "encoder"}),
        (["decoder_attention"], {"decoder.self_attn", "decoder.multihead_attn"}),
        (["decoder_mlp"], {"decoder.linear1", "decoder.linear2"}),
        (PARTS, {"backbone", "encoder", "decoder.self_attn", "decoder.multihead_attn", "decoder.linear1", "decoder.linear2"}),
    ],
)  # fmt: skip
def test_each_part_quantises_what_it_names(parts, expected):
    quantised = quantize_detr(small(), parts=parts)
    found = set()
    for name, m in quantised.named_modules():
        if isinstance(m, LSQQuantizer):
            words = name.split(".")
            at = words[0] if words[0] == "backbone" else words[1]
            found.add(f"{at}.{words[4]}" if at == "decoder" else at)
    assert found == expected
    assert type(quantised.input_proj) is nn.Conv2d and type(quantised.class_embed) is nn.Linear


def test_down_sampling_stem_and_projection_inputs_follow_the_switches():
    with torch.device("meta"):
        model = DETR(num_classes=2, backbone="resnet18")
    paper, released = (
        quantize_detr(model, bits=3),
        quantize_detr(model, bits=3, quantize_downsample=False, quantize_proj_inputs=False, da="self_attn"),
    )
    conv = "backbone.0.body.layer2.0.downsample.0"
    assert isinstance(paper.get_submodule(conv), QuantConv2d) and type(released.get_submodule(conv)) is nn.Conv2d
    for m in (paper, released):
        stem = m.backbone[0].body.conv1
        assert stem.act_quant.bits == stem.weight_quant.bits == 8
        co = m.transformer["decoder"].layers[0].multihead_attn
        assert {co.quant_q.bits, co.quant_k.bits, co.quant_v.bits, co.quant_a.bits} == {8} and co.quant_q.groups == 8
        assert co.in_proj_quant.bits == 3 and isinstance(co.out_proj, QuantLinear)
        assert isinstance(co.input_q, LSQQuantizer) is (m is paper)
        assert isinstance(co.out_proj.act_quant, LSQQuantizer) is (m is paper)
        assert isinstance(co.align, DistributionAlignment) is False
        own = m.transformer["decoder"].layers[0].self_attn
        assert isinstance(own.align, DistributionAlignment) is (m is released)
        assert isinstance(own.input_v, nn.Identity)  # DETR's first content is 0
        assert isinstance(m.transformer["encoder"].layers[0].self_attn.align, nn.Identity)


@pytest.mark.parametrize("quantizer", ["lsqplus", "lsq", "released"])
def test_every_channel_takes_at_most_two_to_the_bits_values(quantizer):
    _, quantised = student(bits=2, quantizer=quantizer, attention_bits=3)
    quantised(*batch(1))
    conv = quantised.backbone[0].body.layers[1]
    x = quantised.backbone[0].body.acts[0](quantised.backbone[0].body.layers[0](batch(1)[0]))
    for values in conv.act_quant(x).movedim(1, 0).flatten(1):
        assert len(values.unique()) <= 4
    for values in conv.weight_quant(conv.weight).flatten(1):
        assert len(values.unique()) <= 4
    assert conv.act_quant.bounds == (0, 3)  # behind a ReLU: unsigned, or half of the four levels would be lost


def test_the_attention_is_its_equation_with_da_before_the_quantiser():
    _, quantised = student(bits=3, da="co_attn")
    m = quantised.transformer["decoder"].layers[0].multihead_attn
    torch.manual_seed(1)
    query, memory = torch.randn(1, 5, 16), torch.randn(1, 7, 16)
    out, d = m(query, memory, memory)
    w = m.in_proj_quant(m.in_proj_weight).view(3, 16, 16)
    b = m.in_proj_bias.view(3, 16)
    parts = [
        (f(x) @ w[i].T + b[i]).view(-1, 2, 8)
        for i, (f, x) in enumerate(((m.input_q, query[0]), (m.input_k, memory[0]), (m.input_v, memory[0])))
    ]
    q, k, v = (p.transpose(0, 1)[None] for p in parts)
    q = (q - q.mean(-1, keepdim=True)) / (q.var(-1, keepdim=True) + 1e-5).sqrt() * m.align.gamma + m.align.beta
    a = m.quant_a((m.quant_q(q) @ m.quant_k(k).transpose(2, 3) / math.sqrt(8)).softmax(-1))
    expected = (a @ m.quant_v(v))[0].transpose(0, 1).reshape(5, 16)
    assert_close(d[0], expected)
    assert_close(
        out[0], F.linear(m.out_proj.act_quant(expected), m.out_proj.weight_quant(m.out_proj.weight), m.out_proj.bias)
    )


def test_a_linear_layer_is_an_integer_product_and_a_folded_offset():
    _, quantised = student(bits=4, act_granularity="per_tensor", zp_init="lsqplus")
    layer = quantised.transformer["encoder"].layers[0].linear1
    x = torch.randn(1, 6, 16)
    with torch.no_grad():
        layer.act_quant.zero_point.fill_(0.3)
    codes, weight = layer.act_quant.codes(x), layer.weight_quant.codes(layer.weight)
    found = integer_matmul(
        codes, weight, a_step=layer.act_quant.effective_step(), b_step=layer.weight_quant.effective_step(),
        a_zero=layer.act_quant.code_of_zero(),
    )  # fmt: skip
    assert_close(found.float() + layer.bias, layer(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_every_linear_layer_of_a_student_is_an_integer_product():
    """Q-FC (Eq. 2) through a whole network on a new batch: the projections of all attentions, out_proj, linear1 and linear2."""
    _, quantised = student(bits=4, act_granularity="per_tensor", zp_init="lsqplus")
    torch.manual_seed(3)
    for m in quantised.modules():
        if isinstance(m, LSQQuantizer) and m.zero_point is not None:
            m.zero_point.add_(0.3 * torch.rand_like(m.zero_point))
    seen = []

    def integer(x, act, weight, quantizer, bias):
        codes, rows = act.codes(x), quantizer.codes(weight)
        steps = {"a_step": act.effective_step(), "b_step": quantizer.effective_step(), "a_zero": act.code_of_zero()}
        return integer_matmul(codes, rows, **steps).float() + bias

    for name, m in quantised.named_modules():
        if isinstance(m, QuantLinear):
            m.register_forward_hook(
                lambda m, args, out, n=name: seen.append(
                    (n, integer(args[0], m.act_quant, m.weight, m.weight_quant, m.bias), out)
                )
            )
        if name.endswith(("self_attn", "multihead_attn")):
            parts = []
            for letter in "qkv":
                m.get_submodule(f"input_{letter}").register_forward_hook(
                    lambda q, args, out, p=parts: p.append((q, args[0], out))
                )
            m.register_forward_hook(lambda m, args, out, n=name, p=parts: seen.append((n, m, p)))
    quantised.eval()(*batch(5))
    layers = 0
    for name, found, out in seen:
        if isinstance(found, nn.Module):
            dim, step = found.dim, found.in_proj_quant
            rows, integer_rows = step(found.in_proj_weight).chunk(3), step.codes(found.in_proj_weight).chunk(3)
            for i, (act, x, hat) in enumerate(out):
                if isinstance(act, nn.Identity):  # the first decoder layer's value, exactly 0
                    assert not x.any()
                    continue
                part = slice(i * dim, (i + 1) * dim)
                steps = {
                    "a_step": act.effective_step(),
                    "b_step": step.effective_step()[part],
                    "a_zero": act.code_of_zero(),
                }
                assert act.code_of_zero() != 0
                expected = integer_matmul(act.codes(x), integer_rows[i], **steps).float()
                assert_close(expected, hat @ rows[i].T, rtol=1e-5, atol=1e-5, msg=name)
                layers += 1
        else:
            assert_close(found, out, rtol=1e-5, atol=1e-5, msg=name)
            layers += 1
    assert layers == 5 * (3 + 1) + 3 * 2 - 1  # 5 attentions of 4 products, 3 feed-forward pairs, less the value of 0


def test_gradients_of_steps_and_offsets_are_the_closed_forms():
    """LSQ+ gradients on a layer of a student, per channel, with g = 1 / sqrt(numel qp)."""
    _, quantised = student(bits=2, zp_init="lsqplus")
    layer = quantised.transformer["decoder"].layers[1].linear2.double()
    act, own = layer.act_quant, layer.weight_quant
    own.step.data.mul_(0.4)  # some weights are clipped
    g = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(2, 5, 24, generator=g).double()  # wider than at calibration: some of it is clipped
    r = torch.randn(2, 5, 16, generator=g).double()
    (layer(x) * r).sum().backward()
    with torch.no_grad():
        for q, value, upstream, axis in (
            (act, x, r @ own(layer.weight), -1),
            (own, layer.weight, torch.einsum("bno,bni->oi", r, act(x)), 0),
        ):
            shape = [1] * value.ndim
            shape[axis] = -1
            zero = 0 if q.zero_point is None else q.zero_point.view(shape)
            v, (low, high) = (value - zero) / q.step.view(shape), q.bounds
            inside = (v >= low) & (v <= high)
            assert inside.any() and not inside.all()
            scale = 1 / math.sqrt(value.numel() * high)
            others = [d for d in range(value.ndim) if d != axis % value.ndim]
            dstep = upstream * torch.where(inside, v.round() - v, v.clamp(low, high))
            assert_close(q.step.grad, scale * dstep.sum(others))
            if q.zero_point is not None:
                assert_close(q.zero_point.grad, scale * (upstream * ~inside).sum(others))


def test_the_error_falls_as_bits_grow():
    model = small()
    expected = model(*batch(1))["co_attended"]
    errors = []
    for bits in (2, 4, 6, 8):
        quantised = quantize_detr(model, bits=bits)
        calibrate_student(quantised, *batch(1), percentile=100)
        errors.append((quantised.eval()(*batch(1))["co_attended"] - expected).square().mean().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 20


def test_the_softmax_map_is_not_clipped_by_its_first_step():
    m = quantize_detr(small()).transformer["decoder"].layers[0].multihead_attn.quant_a.train()
    attention = (10 * torch.randn(1, 2, 5, 850, generator=torch.Generator().manual_seed(0))).softmax(-1)
    assert attention.max() > 0.6
    assert (m(attention) - attention).abs().max() < m.step.max()
    released = 2 * attention.mean() / 127**0.5  # from the mean, for codes up to 127
    assert 127 * released == pytest.approx(0.0265, abs=1e-4)  # clips every peak
    assert m.bounds == (0, 255)


def test_evaluation_before_calibration_raises_and_a_checkpoint_keeps_the_steps():
    _, quantised = student(da="co_attn")
    fresh = quantize_detr(small(seed=5), da="co_attn").eval()
    with pytest.raises(RuntimeError, match="has no step yet"):
        fresh(*batch())
    fresh.load_state_dict(quantised.state_dict())
    assert torch.equal(fresh(*batch(2))["pred_boxes"], quantised.eval()(*batch(2))["pred_boxes"])


def test_every_parameter_of_a_student_gets_a_gradient():
    _, quantised = student(bits=2, da="both")
    out = quantised.train()(*batch())
    layers = [*out["aux_outputs"], out]
    loss = sum(x["pred_logits"].square().mean() + x["pred_boxes"].mean() for x in layers) + out["co_projected"].mean()
    loss.backward()
    without = [n for n, p in quantised.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not without


def test_calibrated_alignment_keeps_the_size_of_the_query():
    model, quantised = student(da="co_attn")
    calibrate_alignment(quantised, model, *batch())
    m = quantised.transformer["decoder"].layers[1].multihead_attn
    seen = []
    source = model.transformer["decoder"].layers[1].multihead_attn
    source.align.register_forward_hook(lambda m, args, out: seen.append(out))
    model(*batch())
    rms = seen[0].var(-1).mean().sqrt()
    assert_close(m.align.gamma, rms.expand(8))
    assert_close(m.align(seen[0]).var(-1).mean().sqrt(), rms, rtol=1e-3, atol=1e-4)


def test_percentile_calibration_clips_outliers():
    wide, clipped = quantize_detr(small()), quantize_detr(small())
    images, mask = batch()
    images[0, 0, 0, 0] = 1e3
    calibrate_student(wide, images, mask, percentile=100)
    calibrate_student(clipped, images, mask, percentile=99.9)
    steps = [m.backbone[0].body.layers[0].act_quant.step[0].item() for m in (wide, clipped)]
    assert steps[1] < steps[0] / 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits=1, allowed: 2 to 8"),
        ({"attention_bits": 9}, "attention_bits=9"),
        ({"stem_bits": 16}, "stem_bits=16"),
        ({"quantizer": "dorefa"}, "quantizer='dorefa', allowed: lsqplus"),
        ({"da": "cross"}, "da='cross', allowed: none, co_attn"),
        ({"parts": ["neck"]}, r"parts=\['neck'\]"),
        ({"backbone_act": "gelu"}, "backbone_act='gelu'"),
        ({"act_granularity": "per_row"}, "act_granularity='per_row'"),
        ({"weight_init": "max"}, "weight_init='max'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        quantize_detr(small(), **options)


def test_the_original_is_left_alone():
    model = small()
    before = model(*batch())["pred_logits"]
    calibrate_student(quantize_detr(model, bits=2, da="both"), *batch())
    assert torch.equal(model(*batch())["pred_logits"], before)
    assert not any(isinstance(m, LSQQuantizer | QuantLinear | QuantConv2d) for m in model.modules())
    assert isinstance(ResNetBody("resnet18").relu, nn.ReLU)


def test_calibration_leaves_the_steps_that_are_set():
    _, first = student(parts=["backbone"])
    with torch.no_grad():
        first.backbone[0].body.layers[1].weight_quant.step.mul_(1.5)
    kept = first.backbone[0].body.layers[1].weight_quant.step.clone()
    second = quantize_detr(small(seed=4))
    load_real_valued(second, first.state_dict())
    calibrate_student(second, *batch())
    assert torch.equal(second.backbone[0].body.layers[1].weight_quant.step, kept)
    assert all(bool(m.calibrated) for m in second.modules() if isinstance(m, LSQQuantizer))
