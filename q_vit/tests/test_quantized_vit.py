"""The quantised network: which tensors, against plain formulas, on integer codes, and its errors."""

import copy
import math
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from common.quant.lsq import LSQQuantizer, calibrate, check_steps
from common.quant.pack import integer_accumulate, integer_matmul, pack_codes, unpack_codes
from q_vit.information_rectification import InformationRectification
from q_vit.model import build_student, first_forward
from q_vit.quantized_vit import Tapped, centred_codes, head_product, keep_steps_positive, quantize_vit

SMALL = {"img_size": 16, "patch_size": 4, "in_chans": 1, "num_classes": 5, "embed_dim": 24, "depth": 2, "num_heads": 2}


def vit(distilled=False, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = (VisionTransformerDistilled if distilled else VisionTransformer)(**{**SMALL, **kwargs})
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.2)
    return model


def swin(seed=0):
    torch.manual_seed(seed)
    return SwinTransformer(
        img_size=16, patch_size=2, in_chans=1, num_classes=5, embed_dim=16, depths=(2, 1), num_heads=(2, 4), window_size=4
    )  # fmt: skip


def images(n=6, seed=0):
    return torch.randn(n, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


def ready(model, **kwargs):
    student = quantize_vit(model, **kwargs)
    first_forward(student, images())
    return student


# ------------------------------------------------------------------------------------------------------ which tensors
def quantizers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LSQQuantizer)}


@pytest.mark.parametrize(("distilled", "heads"), [(False, 1), (True, 2)])
def test_every_product_is_quantised_and_exactly_the_edges_have_eight_bits(distilled, heads):
    found = quantizers(quantize_vit(vit(distilled), bits=3))
    kinds = [q.kind for q in found.values()]
    assert kinds.count("activation") == 2 * 8 + 1 + heads and kinds.count("weight") == 2 * 4 + 1 + heads
    eight = {n.rsplit(".", 1)[0] for n, q in found.items() if q.bits == 8}
    assert eight == {"patch_embed.proj", "head", "head_dist"} - (set() if distilled else {"head_dist"})
    inside = {n.removeprefix("blocks.0.") for n in found if n.startswith("blocks.0.")}
    layers = [
        f"{layer}.{q}_quantizer"
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for q in ("weight", "input")
    ]
    assert inside == {*layers, *(f"attn.{t}_quantizer" for t in "qkvp")}


def test_deit_s_has_the_quantisers_of_the_paper():
    with torch.device("meta"):
        model = quantize_vit(timm.create_model("deit_small_distilled_patch16_224"), bits=4, preset="official")
    kinds = [q.kind for q in quantizers(model).values()]
    assert kinds.count("activation") == 12 * 8 + 1 + 2 and kinds.count("weight") == 48 + 1 + 2


def test_swin_quantises_patch_merging_and_every_window_attention():
    found = quantizers(quantize_vit(swin(), bits=3))
    assert sum(n.endswith("reduction.weight_quantizer") for n in found) == 1
    assert sum("attn.p_quantizer" in n for n in found) == 3
    assert {n.rsplit(".", 1)[0] for n, q in found.items() if q.bits == 8} == {"patch_embed.proj", "head.fc"}


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ("mlp", {f"mlp.fc{i}.{q}_quantizer" for i in (1, 2) for q in ("weight", "input")}),
        ("mhsa_weights", {f"attn.{m}.weight_quantizer" for m in ("qkv", "proj")}),
        ("mhsa_acts", {f"attn.{t}_quantizer" for t in "qkvp"}),
    ],
)
def test_a_part_alone_leaves_the_rest_and_the_edges_real(parts, names):
    model = ready(vit(), bits=2, irm=False, parts=parts)
    found = quantizers(model)
    assert {n.removeprefix("blocks.0.") for n in found if n.startswith("blocks.0.")} == names
    assert all(n.startswith("blocks.") for n in found)
    assert model.eval()(images()).isfinite().all()


def test_presets_differ_in_the_granularity_of_layer_inputs():
    official, deployable = (quantizers(quantize_vit(vit(), preset=p)) for p in ("official", "deployable"))
    name = "blocks.0.mlp.fc2.input_quantizer"
    assert official[name].groups == 96 and deployable[name].groups == 1
    assert official["patch_embed.proj.input_quantizer"].groups == 1  # one input channel here
    for found in (official, deployable):
        assert (
            found["blocks.0.attn.p_quantizer"].groups == 2 and found["blocks.0.mlp.fc2.weight_quantizer"].groups == 24
        )


@pytest.mark.parametrize("make", [vit, swin])
def test_thirty_two_bits_is_the_float_network_bit_for_bit_and_the_original_is_untouched(make):
    model = make().eval()
    before = copy.deepcopy(model.state_dict())
    same = quantize_vit(model, bits=32, irm=False)
    torch.testing.assert_close(same.eval()(images()), model(images()), rtol=0, atol=0)
    quantize_vit(model, bits=2)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_eight_bits_come_close_to_the_float_network():
    for model in (vit().eval(), swin().eval()):
        expected = model(images())
        for preset in ("official", "deployable"):
            student = quantize_vit(model, bits=8, irm=False, preset=preset, init="max")
            first_forward(student, images())
            error = (student.eval()(images()) - expected).abs().max() / expected.abs().max()
            assert error < 0.1, (type(model).__name__, preset, error)


# ------------------------------------------------------------------------------------- plain formulas of the released layers
def fake(x, step, zero, qn, qp):
    """Q1 composed of primitives with straight-through rounding."""

    def ste(t):
        return t + (t.round() - t).detach()

    return (ste((x / step + ste(zero)).clamp(qn, qp)) - ste(zero)) * step


def official_steps(x, bits, signed):
    qn, qp = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    step = 2 * x.abs().mean() / math.sqrt(qp)
    return step, 0.1 * (x.min() - step * qn), qn, qp


def official(x, bits, signed=True, zero=True):
    step, z, qn, qp = official_steps(x.detach(), bits, signed)
    return fake(x, step, z if zero else torch.zeros(()), qn, qp)


@pytest.mark.parametrize("bits", [2, 4])
def test_official_layers_equal_the_composed_formulas(bits):
    model = quantize_vit(vit(), bits=bits, preset="official").train()
    x = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(5)) + 0.3
    fc1 = model.blocks[0].mlp.fc1
    expected = F.linear(official(x, bits), official(fc1.weight, bits, zero=False), fc1.bias)
    torch.testing.assert_close(fc1(x), expected, rtol=1e-5, atol=1e-5)
    conv = model.patch_embed.proj
    pixels = images(3, seed=7)
    expected = F.conv2d(official(pixels, 8), official(conv.weight, 8, zero=False), conv.bias, stride=4)
    torch.testing.assert_close(conv(pixels), expected, rtol=1e-5, atol=1e-5)
    mlp = model.blocks[1].mlp
    hidden = F.linear(official(x, bits), official(mlp.fc1.weight, bits, zero=False), mlp.fc1.bias)
    hidden = F.gelu(hidden).clamp(-10, 10)
    assert hidden.min() < -1e-5  # GELU is signed
    expected = F.linear(official(hidden, bits), official(mlp.fc2.weight, bits, zero=False), mlp.fc2.bias)
    torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-5)


def test_official_attention_equals_the_composed_formula_with_gradients():
    model = quantize_vit(vit(), bits=3, preset="official").train()
    attention = model.blocks[0].attn
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(5), requires_grad=True)
    q, k, v = attention.qkv(x).reshape(2, 5, 3, 2, 12).permute(2, 0, 3, 1, 4)
    q, k = (F.layer_norm(t, (12,), n.weight, n.bias) for t, n in ((q, attention.q_norm), (k, attention.k_norm)))
    scores = official(q, 3) @ official(k, 3).transpose(-2, -1) / math.sqrt(12)
    p = official(scores.softmax(-1), 3, signed=False)
    out = (p @ official(v, 3)).transpose(1, 2).reshape(2, 5, 24)
    expected = F.linear(official(out, 3), official(attention.proj.weight, 3, zero=False), attention.proj.bias)
    got = attention(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    g = torch.randn_like(got)
    ours = torch.autograd.grad(got, x, g, retain_graph=True)[0]
    theirs = torch.autograd.grad(expected, x, g)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_step_gradients_of_a_layer_equal_the_composed_formula_times_the_scale():
    model = quantize_vit(vit(), bits=2, irm=False, preset="official").train()
    fc1 = model.blocks[0].mlp.fc1
    x = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(5))
    out = fc1(x)
    steps = {n: getattr(fc1, f"{n}_quantizer").step.detach().clone().requires_grad_() for n in ("input", "weight")}
    zero = fc1.input_quantizer.zero_point.detach().clone().requires_grad_()
    xq = fake(x, steps["input"], zero, -2, 1)
    wq = fake(fc1.weight, steps["weight"][:, None], torch.zeros(()), -2, 1)
    g = torch.randn_like(out)
    ours = torch.autograd.grad(
        out, [fc1.input_quantizer.step, fc1.input_quantizer.zero_point, fc1.weight_quantizer.step, fc1.weight], g
    )
    theirs = torch.autograd.grad(F.linear(xq, wq, fc1.bias), [steps["input"], zero, steps["weight"], fc1.weight], g)
    scales = [x.numel() ** -0.5, x.numel() ** -0.5, fc1.weight.numel() ** -0.5, 1.0]  # Qp = 1
    for a, b, s in zip(ours, theirs, scales, strict=True):
        torch.testing.assert_close(a, b * s, rtol=1e-4, atol=1e-6)


def test_primitive_hand_case():
    q = LSQQuantizer(2, "activation", signed=True, grad_scale="none")
    q.calibrated.fill_(True)
    x = torch.tensor([-3.0, -1.2, -0.5, 0.4, 0.5, 1.4, 2.7], requires_grad=True)
    y = q(x)
    torch.testing.assert_close(y, torch.tensor([-2.0, -1, 0, 0, 0, 1, 1]))
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 1, 1, 1, 1, 0, 0]))
    assert q.step.grad.item() == pytest.approx(-2 + 0.2 + 0.5 - 0.4 - 0.5 + 1 + 1)
    torch.testing.assert_close(q(y.detach()), y.detach())  # idempotent


# ------------------------------------------------------------------------------------------------------ integer form
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("make", [vit, swin])
def test_evaluation_on_codes_equals_fake_quantisation(bits, make):
    model = ready(make(), bits=bits).eval()
    on_codes = model(images())
    for m in model.modules():
        if hasattr(m, "integer"):
            m.integer = False
    torch.testing.assert_close(on_codes, model(images()), rtol=1e-5, atol=1e-5)


def test_a_layer_equals_an_int32_product_of_packed_codes():
    torch.manual_seed(0)
    model = ready(vit(), bits=4)
    layer = model.blocks[0].mlp.fc2.eval()
    with torch.no_grad():
        layer.input_quantizer.zero_point.fill_(1.3)  # rounds to 1
    x = torch.randn(3, 7, 96)
    weights = layer.weight_quantizer.codes(layer.weight)
    packed = pack_codes(weights.flatten(), 4, signed=True)
    assert len(packed) == weights.numel() // 2
    weights = unpack_codes(packed, weights.numel(), 4, signed=True).view_as(weights)
    codes = centred_codes(layer.input_quantizer, x).int() + 1  # q = c + z
    steps = {"a_step": layer.input_quantizer.step.item(), "b_step": layer.weight_quantizer.step.double()}
    expected = integer_matmul(codes, weights, a_zero=1.0, **steps) + layer.bias
    torch.testing.assert_close(layer(x).double(), expected.detach(), rtol=1e-6, atol=1e-6)


def test_scores_equal_the_integer_product_with_zero_points():
    model = ready(vit(), bits=4, irm=False).eval()
    m = model.blocks[0].attn
    with torch.no_grad():
        m.q_quantizer.zero_point.fill_(1.0)
        m.k_quantizer.zero_point.fill_(-2.0)
    q, k = torch.randn(2, 2, 5, 12), torch.randn(2, 2, 5, 12)

    per_head = {"a_step": m.q_quantizer.step.view(2, 1, 1), "b_step": m.k_quantizer.step.view(2, 1, 1)}
    expected = integer_matmul(m.q_quantizer.codes(q), m.k_quantizer.codes(k), a_zero=1.0, b_zero=-2.0, **per_head)
    torch.testing.assert_close(
        head_product(m, q, k, m.q_quantizer, m.k_quantizer).double(), expected.detach(), rtol=1e-6, atol=1e-6
    )
    worst = integer_accumulate(torch.full((1, 3072), 255), torch.full((1, 3072), -128))
    assert worst.item() == -3072 * 255 * 128 and 3072 * 255 * 128 < 2**31


def test_codes_round_before_the_zero_point_as_onnx_does():
    q = LSQQuantizer(4, "activation", signed=True, zero_point="integer")
    q.calibrated.fill_(True)
    with torch.no_grad():
        q.zero_point.fill_(1.0)
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, 100.0, -100.0])
    assert centred_codes(q, x).tolist() == [0, 2, 2, 0, 6, -9]  # half to even before z; the range is shifted by z
    assert (q.codes(x) - 1).tolist() == [1, 1, 3, -1, 6, -9]  # training rounds after z: other ties, same elsewhere


# ------------------------------------------------------------------------------------- state, rectification, taps
@pytest.mark.parametrize("preset", ["official", "deployable"])
def test_state_dict_round_trip_is_bitwise_and_eval_does_not_calibrate_again(preset):
    model = ready(vit(True), bits=2, preset=preset).eval()
    other = quantize_vit(vit(True, seed=1), bits=2, preset=preset).eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(images()), model(images()), rtol=0, atol=0)
    model(100 * images())
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("preset", ["official", "deployable"])
def test_evaluation_before_calibration_raises(preset):
    with pytest.raises(RuntimeError, match="no step yet"):
        quantize_vit(vit(), preset=preset).eval()(images())


def test_signs_are_found_once_and_kept():
    model = ready(vit(), bits=4)
    attention, mlp = model.blocks[0].attn, model.blocks[0].mlp
    assert not attention.p_quantizer.is_signed and mlp.fc2.input_quantizer.is_signed and attention.q_quantizer.is_signed
    relu = vit()
    for block in relu.blocks:
        block.mlp.act = nn.ReLU()
    relu = ready(relu, bits=4)
    assert not relu.blocks[0].mlp.fc2.input_quantizer.is_signed
    relu(-100 * images())
    assert not relu.state_dict()["blocks.0.mlp.fc2.input_quantizer.is_signed"]


def test_gelu_clip_and_symmetric():
    model = quantize_vit(vit(), gelu_clip=0.5, symmetric=True)
    assert model.blocks[0].mlp.act(torch.tensor([3.0])).item() == 0.5
    assert all(q.zero_point is None for q in quantizers(model).values())
    assert quantize_vit(vit(), gelu_clip=None).blocks[0].mlp.act(torch.tensor([30.0])).item() == pytest.approx(30)


def test_rectification_keeps_norms_that_a_model_has_already():
    model = quantize_vit(vit(qk_norm=True), irm=True)
    assert not any(isinstance(m, InformationRectification) for m in model.modules())
    ours = quantize_vit(vit(), irm=True)
    assert sum(isinstance(m, InformationRectification) for m in ours.modules()) == 4
    qk = vit(qk_norm=True, norm_layer=lambda d, **kw: nn.LayerNorm(d, eps=1e-5, **kw))
    same = quantize_vit(vit(norm_layer=lambda d, **kw: nn.LayerNorm(d, eps=1e-5, **kw)), bits=32, irm=True)
    same.load_state_dict(qk.state_dict())
    torch.testing.assert_close(same.eval()(images()), qk.eval()(images()), rtol=1e-4, atol=1e-5)  # IRM is QK-norm


def test_calibrated_rectification_changes_the_network_less_than_unit():
    teacher = vit().eval()
    for block in teacher.blocks:
        block.attn.qkv.weight.data[:48] *= torch.linspace(0.2, 0.6, 12).repeat(4).view(-1, 1)
    expected = teacher(images())
    errors = {}
    for init in ("calibrated", "unit"):
        student = build_student(teacher, images(), irm=True, irm_init=init, bits=32)
        errors[init] = (student.eval()(images()) - expected).abs().mean().item()
    assert errors["calibrated"] < 0.7 * errors["unit"]


def test_taps_return_q_and_k_of_every_layer():
    teacher = vit().eval()
    x = teacher.patch_embed(images())
    x = teacher.norm_pre(teacher._pos_embed(x))
    raw = teacher.blocks[0].attn.qkv(teacher.blocks[0].norm1(x)).reshape(6, 17, 3, 2, 12)
    taps = Tapped(teacher, "raw")
    logits, qk = taps(images())
    torch.testing.assert_close(qk[0][0], raw[:, :, 0].transpose(1, 2))
    torch.testing.assert_close(qk[0][1], raw[:, :, 1].transpose(1, 2))
    assert len(qk) == 2 and logits.shape == (6, 5)
    student = ready(teacher, bits=2).train()
    _, pre = Tapped(student, "pre_quant")(images())
    _, post = Tapped(student, "post_quant")(images())
    quantizer = student.blocks[1].attn.k_quantizer
    torch.testing.assert_close(quantizer(pre[1][1]), post[1][1])
    assert len(post[1][1][0, 0].unique()) <= 4 < len(pre[1][1][0, 0].unique()) and pre[0][0].requires_grad
    _, windows = Tapped(swin(), "raw")(images())
    assert [tuple(q.shape) for q, _ in windows] == [(24, 2, 16, 8), (24, 2, 16, 8), (6, 4, 16, 8)]
    taps.remove()
    assert not teacher.blocks[0].attn.qkv._forward_hooks


def test_steps_are_kept_positive():
    model = ready(vit(), bits=2)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight_quantizer.step[3] = -0.5
    with pytest.raises(ValueError, match=r"qkv\.weight_quantizer\[3\]"):
        check_steps(model)
    keep_steps_positive(model)
    check_steps(model)


# ------------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"bits": 1}, r"bits=1.*2\.\.8, or 32"),
        ({"bits": 9}, "bits=9"),
        ({"edge_bits": 16}, "edge_bits=16"),
        ({"preset": "fast"}, "preset='fast', allowed: official, deployable"),
        ({"parts": "q"}, "parts='q'"),
        ({"gelu_clip": -1.0}, "gelu_clip"),
        ({"irm_form": "rms"}, "irm form='rms'"),
        ({"init": "mean"}, "init='mean'"),
    ],
)
def test_wrong_values_name_what_is_allowed(kwargs, error):
    with pytest.raises(ValueError, match=error):
        quantize_vit(vit(), **kwargs)


def test_a_model_without_attention_is_refused():
    with pytest.raises(ValueError, match="ResNet has no timm Attention"):
        quantize_vit(timm.create_model("resnet10t"))


def test_dead_inputs_warn_and_nan_raises():
    model = quantize_vit(vit(), bits=4, irm=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first_forward(model, torch.zeros(2, 1, 16, 16))
    assert any("is its input zero" in str(w.message) for w in caught)
    model.eval()(images())
    broken = quantize_vit(vit(), bits=4)
    with pytest.raises(ValueError, match="NaN"):
        first_forward(broken, images() * torch.nan)
    with pytest.raises(ValueError, match="NaN"), calibrate(broken), torch.no_grad():
        broken(images() * torch.nan)
