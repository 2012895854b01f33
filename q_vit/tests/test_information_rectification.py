"""Closed forms and invariances of IRM, and the entropy argument behind it."""

import math

import pytest
import torch
import torch.nn.functional as F

from q_vit.information_rectification import (
    InformationRectification,
    calibrate_rectification,
    code_entropy,
    gaussian_code_entropy,
)


def q_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_layernorm_form_standardises_each_token_of_each_head():
    q = 3 * q_of(2, 3, 5, 8) + 1
    out = InformationRectification(8, 3)(q)
    var = q.var(-1, correction=0)
    torch.testing.assert_close(out.mean(-1), torch.zeros(2, 3, 5), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.var(-1, correction=0), var / (var + 1e-5))
    torch.testing.assert_close(out, F.layer_norm(q, (8,)), rtol=0, atol=0)


def test_layernorm_form_ignores_scale_and_shift_of_a_token():
    irm = InformationRectification(8, 2)
    torch.nn.init.normal_(irm.weight)
    q, a, b = q_of(2, 2, 5, 8), torch.rand(2, 2, 5, 1) + 0.5, q_of(2, 2, 5, 1, seed=1)
    torch.testing.assert_close(irm(a * q + b), irm(q), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["layernorm", "paper"])
def test_a_constant_token_gives_the_offset_not_nan(form):
    irm = InformationRectification(4, 1, form=form)
    with torch.no_grad():
        (irm.bias if form == "layernorm" else irm.beta).fill_(0.5)
    q = torch.full((1, 1, 2, 4), 7.0, requires_grad=True)
    out = irm(q)
    expected = 0.5 if form == "layernorm" else 0.5 / math.sqrt(1e-5)
    torch.testing.assert_close(out, torch.full_like(out, expected))
    out.square().sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


def test_paper_form_with_unit_parameters_is_the_layernorm_form_and_gamma_divides():
    q = q_of(2, 3, 5, 8)
    paper, norm = InformationRectification(8, 3, form="paper"), InformationRectification(8, 3)
    torch.testing.assert_close(paper(q), norm(q))
    with torch.no_grad():
        paper.gamma.copy_(torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1))
        paper.beta.fill_(0.25)
    sigma = (q.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = (q - q.mean(-1, keepdim=True) + 0.25) / (torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1) * sigma)
    torch.testing.assert_close(paper(q), expected)


@pytest.mark.parametrize(("stats", "axes"), [("token", (-1,)), ("head", (-2, -1)), ("tensor", (0, 2, 3))])
def test_statistics_run_over_the_named_axes(stats, axes):
    q = 2 * q_of(4, 3, 5, 8) + 1
    out = InformationRectification(8, 3, form="paper", stats=stats).train()(q)
    torch.testing.assert_close(out.mean(axes), torch.zeros_like(out.mean(axes)), atol=1e-5, rtol=0)
    assert out.std(axes, correction=0).sub(1).abs().max() < 1e-4


def test_tensor_statistics_are_running_ones_in_evaluation():
    irm = InformationRectification(8, 2, form="paper", stats="tensor")
    q = 2 * q_of(4, 2, 5, 8) + 1
    for _ in range(100):
        irm.train()(q)
    torch.testing.assert_close(irm.eval()(q), irm.train()(q), atol=1e-3, rtol=1e-3)
    one = irm.eval()(q)[:1]
    torch.testing.assert_close(irm.eval()(q[:1]), one)


def test_gradients_against_finite_differences():
    for form, stats in (("layernorm", "token"), ("paper", "token"), ("paper", "head")):
        irm = InformationRectification(3, 2, form=form, stats=stats).double()
        assert torch.autograd.gradcheck(irm, q_of(2, 2, 3, 3).double().requires_grad_())


def test_calibration_restores_an_affine_map_per_channel_but_not_the_keys_offset():
    true = InformationRectification(6, 2)
    with torch.no_grad():
        true.weight.uniform_(0.5, 2)
        true.bias.uniform_(-1, 1)
    raw = F.layer_norm(q_of(8, 2, 20, 6), (6,)).detach()
    # what is raw here is already normalised, so the best map is exactly the identity of it
    irm = InformationRectification(6, 2)
    calibrate_rectification(irm, raw, offset=True)
    torch.testing.assert_close(irm(raw), raw, atol=1e-3, rtol=1e-3)
    shifted = raw + torch.tensor([5.0, -3.0]).view(1, 2, 1, 1)
    calibrate_rectification(irm, shifted, offset=False)
    assert irm.bias.abs().max() == 0
    torch.testing.assert_close(
        irm.weight, torch.ones(6), atol=0.02, rtol=0.02
    )  # an offset between heads does not enter


def test_paper_form_calibration_restores_scale_and_mean_per_head():
    raw = q_of(8, 2, 20, 64) * torch.tensor([0.5, 4.0]).view(1, 2, 1, 1) + torch.tensor([1.0, -2.0]).view(1, 2, 1, 1)
    for stats in ("token", "head", "tensor"):
        irm = InformationRectification(64, 2, form="paper", stats=stats)
        calibrate_rectification(irm, raw, offset=True)
        torch.testing.assert_close(1 / irm.gamma.flatten(), torch.tensor([0.5, 4.0]), rtol=0.03, atol=0)
        torch.testing.assert_close(irm.beta.flatten(), torch.tensor([1.0, -2.0]), rtol=0.1, atol=0.05)
        assert (irm.eval()(raw) - raw).abs().mean() < 0.3 * raw.std()


def test_code_entropy_of_a_gaussian_matches_the_closed_form():
    for bits, step, expected in ((2, 1.5958, 1.4594), (3, 0.9213, 2.2109), (4, 0.6031, 2.7980)):
        entropy, p = gaussian_code_entropy(step, bits)
        assert entropy == pytest.approx(expected, abs=2e-4)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        codes = (q_of(200_000).double() / step).clamp(low, high).round().int()
        assert code_entropy(codes, low, high) == pytest.approx(entropy, abs=0.01)
    assert p and gaussian_code_entropy(1.5958, 2)[1] == pytest.approx([0.0083, 0.2041, 0.5751, 0.2125], abs=1e-4)


def test_a_centred_grid_cannot_reach_the_bit_width_and_a_shift_by_half_a_step_can():
    for bits, most in ((2, 1.9343), (3, 2.9616), (4, 3.9412)):
        best = max(gaussian_code_entropy(0.005 * i, bits)[0] for i in range(10, 300))
        assert best == pytest.approx(most, abs=5e-4)
    entropy, p = gaussian_code_entropy(0.67449, 2, mean=-0.67449 / 2)
    assert entropy == pytest.approx(2, abs=1e-8) and p == pytest.approx([0.25] * 4, abs=1e-5)


def test_bad_input():
    for bad in ({"form": "rms"}, {"stats": "batch"}, {"stats": "head"}, {"eps": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            InformationRectification(8, 2, **bad)
    with pytest.raises(ValueError, match=r"expected \(B, 2, N, 8\)"):
        InformationRectification(8, 2)(torch.zeros(1, 3, 5, 8))
    with pytest.raises(ValueError, match="no codes"):
        code_entropy(torch.zeros(0, dtype=torch.int32), -2, 1)
    with pytest.raises(ValueError, match=r"2\.\.2, expected"):
        code_entropy(torch.tensor([2]), -2, 1)
