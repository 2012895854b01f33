import copy
import io
import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from common.quant.lsq import (
    LSQQuantizer,
    calibrate,
    check_steps,
    int_bounds,
    quantize_codes,
    scale_gradient,
    uniform_quantize,
)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


ONE = torch.ones(1)


def calibrated(bits, kind="activation", *, on, **options):
    q = LSQQuantizer(bits, kind, **options)
    q(on)
    return q


def composed(x, step, zero_point, qn, qp):
    """(Q1) from differentiable pieces: an independent statement of the gradients."""
    zero = zero_point.round().detach() + (zero_point - zero_point.detach())
    v = x / step + zero
    clipped = torch.where(v < qn, float(qn), torch.where(v > qp, float(qp), v))
    q = clipped.round().detach() + (clipped - clipped.detach())
    return step * (q - zero)


# ---------------------------------------------------------------- the function


def test_hand_cases_of_the_specification():
    x = torch.tensor([-3, -1.2, -0.5, 0.4, 0.5, 1.4, 2.7], requires_grad=True)
    step = torch.ones(1, requires_grad=True)
    y = uniform_quantize(x, step, None, -2, 1)
    assert y.tolist() == [-2, -1, 0, 0, 0, 1, 1]
    rows = [torch.autograd.grad(y[i], (x, step), retain_graph=True) for i in range(7)]
    assert [dx[i].item() for i, (dx, _) in enumerate(rows)] == [0, 1, 1, 1, 1, 0, 0]
    assert_close(torch.cat([ds for _, ds in rows]), torch.tensor([-2, 0.2, 0.5, -0.4, -0.5, 1, 1]))


def test_mask_includes_the_bounds():
    x = torch.tensor([-2.0, 1.0, -2.001, 1.001], requires_grad=True)
    uniform_quantize(x, ONE, None, -2, 1).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("shape", [(1,), (4, 1, 1), (1, 1, 5), (4, 3, 5)])
@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_gradients_equal_the_composed_formula(shape, scale):
    x = (3 * torch.randn(2, 4, 3, 5)).double().requires_grad_()
    step = (0.3 + torch.rand(shape)).double().requires_grad_()
    zero = (3 * torch.randn(shape)).double().requires_grad_()
    g = torch.randn(2, 4, 3, 5).double()
    y, ref = uniform_quantize(x, step, zero, -4, 3, grad_scale=scale), composed(x, step, zero, -4, 3)
    assert torch.equal(y, ref)
    got = torch.autograd.grad(y, (x, step, zero), g)
    want = torch.autograd.grad(ref, (x, step, zero), g)
    for a, b, s in zip(got, want, (1, scale, scale), strict=True):
        assert_close(a, s * b, rtol=1e-6, atol=1e-9)
    v = x / step + zero.round()
    assert ((v < -4) | (v > 3)).any() and ((v >= -4) & (v <= 3)).any()


def test_gradients_equal_finite_differences_where_the_function_is_smooth():
    """Outside the range x_hat = step (q - z) is smooth in the step; the real-offset form is smooth in the offset."""
    x = torch.tensor([-9.0, 8.0, 7.5]).double()

    def loss(step):
        return (uniform_quantize(x, step, torch.tensor([1.0]).double(), -4, 3) ** 2).sum()

    step, h = torch.tensor([0.7]).double().requires_grad_(), 1e-6
    (g,) = torch.autograd.grad(loss(step), step)
    assert_close(g.item(), ((loss(step + h) - loss(step - h)) / (2 * h)).item(), rtol=1e-6, atol=0)

    q = LSQQuantizer(3, "activation", signed=True, zero_point="real", grad_scale="none").double()
    q(x)
    q.step.data.fill_(0.7)

    def shifted(offset):
        q.zero_point.data.fill_(offset)
        return (q(x) ** 2).sum()

    with torch.no_grad():
        numeric = (shifted(0.25 + h) - shifted(0.25 - h)) / (2 * h)
    (g,) = torch.autograd.grad(shifted(0.25), q.zero_point)
    clipped = (x - 0.25).abs() / q.step.detach() > 4
    assert clipped.all()
    assert_close(g.item(), numeric.item(), rtol=1e-6, atol=0)


steps = st.floats(0.01, 10)
values = st.lists(st.floats(-100, 100), min_size=2, max_size=60)


@settings(deadline=None, max_examples=50)
@given(values, steps, st.integers(-8, 8), st.sampled_from([2, 3, 4, 8]), st.booleans())
def test_properties_of_the_grid(xs, step, zero, bits, signed):
    x = torch.tensor(xs, dtype=torch.float64).sort().values
    s, z = torch.tensor([step], dtype=torch.float64), torch.tensor([float(zero)], dtype=torch.float64)
    qn, qp = int_bounds(bits, signed)
    y = uniform_quantize(x, s, z, qn, qp)
    codes = quantize_codes(x, s, z, qn, qp)
    assert codes.min() >= qn and codes.max() <= qp and torch.equal(codes, codes.round())
    assert len(y.unique()) <= 2**bits
    assert (y.diff() >= 0).all()
    assert_close(uniform_quantize(y, s, z, qn, qp), y, rtol=0, atol=0)  # idempotent
    inside = (x / s + z >= qn) & (x / s + z <= qp)
    assert ((x - y).abs()[inside] <= step / 2 * (1 + 1e-9)).all()
    assert_close(uniform_quantize(4 * x, 4 * s, z, qn, qp), 4 * y, rtol=0, atol=0)  # scale by a power of two: exact


def test_ties_round_to_even_after_the_zero_point():
    x = torch.tensor([0.5, 1.5, -0.5])
    assert quantize_codes(x, ONE, None, -8, 7).tolist() == [0, 2, 0]
    assert quantize_codes(x, ONE, ONE, -8, 7).tolist() == [
        2,
        2,
        0,
    ]  # round(x + 1), not round(x) + 1 = [1, 3, 1]


def test_error_falls_with_the_bits_and_vanishes_at_sixteen():
    x = torch.rand(4000).double() * 2 - 1
    errors = []
    for bits in range(2, 17):
        qn, qp = int_bounds(bits, True)
        errors.append((uniform_quantize(x, torch.tensor([1 / qp]).double(), None, qn, qp) - x).abs().max().item())
    assert all(a > b for a, b in itertools.pairwise(errors)) and errors[-1] < 2e-5


def test_scale_gradient_keeps_the_bits_and_scales_the_gradient():
    p = torch.randn(100, requires_grad=True)
    y = scale_gradient(p, 0.3)
    assert torch.equal(y, p)
    y.sum().backward()
    assert_close(p.grad, torch.full((100,), 0.3))


# ---------------------------------------------------------------- calibration


def test_official_start_is_one_step_for_all_groups_and_per_group_is_not():
    x = torch.tensor([[[1.0, -3.0], [10.0, 30.0]]])  # (B, H, N): mean|x| 11, per head 2 and 20
    for init, mean in (("official", [11.0, 11.0]), ("per_group", [2.0, 20.0]), ("max", None)):
        q = calibrated(3, on=x, axis=1, groups=2, init=init)
        want = 2 * torch.tensor(mean) / math.sqrt(3) if mean else torch.tensor([max(1 / 3, 3 / 4), 10.0])
        assert_close(q.step.detach(), want)
        assert bool(q.is_signed)
    # the zero point follows the same choice of minimum: global -3, or -3 and 10
    for init, low in (("official", [-3.0, -3.0]), ("per_group", [-3.0, 10.0])):
        q = calibrated(3, on=x, axis=1, groups=2, init=init, zero_point="real", zp_init="lsqplus")
        assert_close(q.zero_point.detach(), torch.tensor(low) + 4 * q.step.detach())


def test_max_start_of_an_unsigned_map_clips_nothing():
    p = torch.softmax(4 * torch.randn(2, 3, 5, 5), -1)
    q = calibrated(8, on=p, axis=1, groups=3, init="max")
    assert_close(q.step.detach(), p.amax((0, 2, 3)) / 255)
    assert (q(p) - p).abs().max() <= q.step.max() / 2 * 1.001
    assert not bool(q.is_signed)


@pytest.mark.parametrize("form", ["integer", "real"])
@pytest.mark.parametrize("signed", [True, False])
def test_zero_point_starts(form, signed):
    x = torch.rand(4, 50) + 2.0
    qn, qp = int_bounds(4, signed)
    step = 2 * x.abs().mean() / math.sqrt(qp)

    def start(zp_init, **options):
        return calibrated(4, on=x, signed=signed, zero_point=form, zp_init=zp_init, **options)

    assert start("zero").zero_point.item() == 0
    assert_close(start("official").zero_point.detach()[0], 0.1 * (x.min() - step * qn))
    zeta = x.min() - step * qn
    assert_close(start("lsqplus").zero_point.detach()[0], zeta if form == "real" else -zeta / step)
    # with the range known, lsqplus covers exactly [min, max]; an integer zero point is off by half a step at most
    fit = start("lsqplus", init="max")
    assert_close(fit.step.detach()[0], (x.max() - x.min()) / 15)
    assert (fit(x) - x).abs().max() <= fit.step.item() * (0.501 if form == "real" else 1.001)
    codes = fit.codes(x)
    assert codes.dtype == torch.int32 and codes.min() >= qn and codes.max() <= qp
    if form == "real":
        assert codes.min() == qn and codes.max() == qp


def test_sign_is_decided_once_and_travels_with_the_state():
    relu, gelu = torch.rand(3, 8), nn.functional.gelu(torch.linspace(-3, 3, 24)).view(3, 8)
    q = calibrated(4, on=relu)
    assert q.bounds == (0, 15)
    q(gelu)  # later negative values do not change it
    assert q.bounds == (0, 15)
    assert calibrated(4, on=gelu).bounds == (-8, 7)
    assert calibrated(4, on=relu - 0.9e-5).bounds == (0, 15)  # within the tolerance of -1e-5
    fresh = LSQQuantizer(4, "activation")
    fresh.load_state_dict(q.state_dict())
    assert fresh.bounds == (0, 15)
    assert LSQQuantizer(4, "weight").bounds == (-8, 7)
    with pytest.raises(RuntimeError, match="is_signed"):
        LSQQuantizer(4, "activation", signed=True).load_state_dict(q.state_dict())


def test_code_entropy_of_a_gaussian_at_the_start():
    n = 200_000
    x = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n).float().view(1, -1)
    for bits, step, entropy in ((2, 1.5958, 1.4594), (3, 0.9213, 2.2109), (4, 0.6031, 2.7980)):
        q = calibrated(bits, on=x)
        assert q.step.item() == pytest.approx(step, abs=2e-4)
        p = q.codes(x).unique(return_counts=True)[1] / n
        assert -(p * p.log2()).sum().item() == pytest.approx(entropy, abs=5e-4)
        if bits == 2:
            assert_close(p, torch.tensor([0.0083, 0.2041, 0.5751, 0.2125]), rtol=0, atol=1e-4)
    q.step.data.fill_(0.67449)
    q.bits = 2
    p = q.codes(x - 0.67449 / 2).unique(return_counts=True)[1] / n
    assert_close(p, torch.full((4,), 0.25), rtol=0, atol=1e-4)  # a shift by half a step reaches the full 2 bits


def test_evaluation_before_calibration_raises_also_after_loading():
    x = torch.randn(2, 3)
    fresh = LSQQuantizer(4, "activation").eval()
    for call in (fresh, fresh.codes):
        with pytest.raises(RuntimeError, match="no step yet"):
            call(x)
    with pytest.raises(RuntimeError, match="no step yet"):
        _ = fresh.bounds
    used = calibrated(4, on=x).eval()
    used.load_state_dict(fresh.state_dict())
    with pytest.raises(RuntimeError, match="no step yet"):
        used(x)


def test_state_dict_round_trip_is_bitwise_and_is_not_calibrated_again():
    model = nn.Sequential(nn.Linear(6, 6), LSQQuantizer(3, "activation", axis=-1, groups=6, zero_point="integer"))
    x = torch.randn(4, 6)
    model(x)
    assert set(model[1].state_dict()) == {"step", "zero_point", "calibrated", "is_signed"}
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = nn.Sequential(nn.Linear(6, 6), LSQQuantizer(3, "activation", axis=-1, groups=6, zero_point="integer"))
    other.load_state_dict(torch.load(file, weights_only=True))
    other.train()(100 * x)
    for k, v in model.state_dict().items():
        assert torch.equal(v, other.state_dict()[k]), k
    assert torch.equal(model(x), other(x))


def test_flags_written_from_outside_are_seen():
    """A moving average of a model writes its buffers in place."""
    q = LSQQuantizer(4, "activation")
    average = copy.deepcopy(q).eval()
    q(torch.rand(2, 3))
    for a, b in zip(average.state_dict().values(), q.state_dict().values(), strict=True):
        a.copy_(b)
    x = torch.rand(2, 3)
    assert torch.equal(average(x), q.eval()(x))


def test_calibrate_sees_all_batches_and_passes_them_unquantised():
    model = nn.Sequential(LSQQuantizer(4, "activation"), nn.ReLU(), LSQQuantizer(4, "activation")).eval()
    batches = [torch.randn(2, 7), 5 * torch.randn(4, 7)]
    with calibrate(model):
        for b in batches:
            assert torch.equal(model(b), b.relu())
    x = torch.cat(batches)
    assert_close(model[0].step.detach()[0], 2 * x.abs().mean() / math.sqrt(7))
    assert_close(model[2].step.detach()[0], 2 * x.relu().mean() / math.sqrt(15))
    assert not torch.equal(model(x), x.relu())


def test_percentile_calibration():
    x = torch.cat([torch.arange(-99.0, 101.0), torch.tensor([1e4] * 2)])[:, None]  # two outliers in 202 values
    q = nn.Sequential(LSQQuantizer(8, "activation")).eval()
    with calibrate(q, percentile=99.0):  # 200th of 202 values: 100; 3rd: -97
        q(x)
    assert_close(q[0].step.item(), 100 / 127)
    with calibrate(q, percentile=100):
        q(x)
    assert_close(q[0].step.item(), 1e4 / 127)
    q = nn.Sequential(LSQQuantizer(8, "activation", zero_point="real", zp_init="lsqplus"))
    with calibrate(q, percentile=99.0):
        q(x)
        q(x + 10)  # percentiles are averaged over the batches
    assert_close(q[0].step.item(), 197 / 255)
    assert_close(q[0].zero_point.item(), -97 + 5 + 197 / 255 * 128, rtol=1e-6, atol=0)


def test_calibrate_leaves_the_model_alone_when_the_block_fails():
    q = calibrated(4, on=torch.rand(2, 3))
    before = q.step.item()
    with pytest.raises(KeyError), calibrate(q):
        q(torch.rand(2, 3) * 9)
        raise KeyError
    assert q.step.item() == before and not torch.equal(q(torch.rand(2, 3)), torch.rand(2, 3))


def test_dead_and_non_finite_inputs():
    with pytest.warns(UserWarning, match="1 of 2 steps"):
        q = calibrated(4, "weight", on=torch.tensor([[0.0, 0], [1, 2]]), axis=0, groups=2, init="per_group")
    assert_close(q.step.detach()[0].item(), 1e-5)
    for value in (float("nan"), float("inf")):
        q = LSQQuantizer(4, "activation")
        with pytest.raises(ValueError, match="NaN or infinite"):
            q(torch.tensor([[1.0, value]]))
        assert not bool(q.calibrated)


# ---------------------------------------------------------------- the module in training


@pytest.mark.parametrize("rule", ["official", "per_group", "none"])
@pytest.mark.parametrize("kind", ["weight", "activation"])
@pytest.mark.parametrize("form", ["integer", "real"])
def test_gradient_scale(rule, kind, form):
    x = torch.randn(6, 4, 5)
    q = calibrated(3, kind, on=x, axis=1, groups=4, zero_point=form, grad_scale=rule, signed=True)
    q(x).square().sum().backward()
    got = q.step.grad.clone(), q.zero_point.grad.clone()
    q.grad_scale, q.step.grad, q.zero_point.grad = "none", None, None
    q(x).square().sum().backward()
    n = {"official": 120, "per_group": 30 if kind == "weight" else 5}
    s = 1 / math.sqrt(n[rule] * 3) if rule != "none" else 1.0
    assert_close(got[0], s * q.step.grad)
    assert_close(got[1], s * q.zero_point.grad)
    assert q.step.grad.abs().min() > 0


def test_real_offset_has_the_gradients_of_lsq_plus():
    x = (2 * torch.randn(5, 40)).double().requires_grad_()
    q = calibrated(2, on=x, zero_point="real", grad_scale="none").double()
    q.zero_point.data.fill_(0.3)
    g = torch.randn(5, 40).double()
    y = q(x)
    y.backward(g)
    v = ((x - 0.3) / q.step).detach()
    inside = (v >= -2) & (v <= 1)
    levels = ((y - 0.3) / q.step).detach()
    assert_close(levels, levels.round(), rtol=0, atol=1e-12)
    assert torch.equal(levels.round().int(), q.codes(x))
    assert_close(x.grad, g * inside)
    assert_close(q.zero_point.grad, (g * ~inside).sum()[None])
    assert_close(q.step.grad, (g * torch.where(inside, levels - v, levels)).sum()[None])
    assert_close(q.effective_step() * (q.codes(x) - q.code_of_zero()), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("axis", "shape"), [(0, (3, 2, 5)), (1, (2, 3, 5, 4)), (-1, (2, 5, 3))])
def test_each_group_equals_a_quantiser_of_its_own(axis, shape):
    kind = "weight" if axis == 0 else "activation"
    x = torch.randn(shape) * torch.tensor([1.0, 5, 25]).view(
        [3 if i == axis % len(shape) else 1 for i in range(len(shape))]
    )
    q = calibrated(3, kind, on=x, axis=axis, groups=3, init="per_group", signed=True)
    for i in range(3):
        part = x.select(axis, i)
        alone = calibrated(3, kind, on=part, signed=True)
        assert torch.equal(q(x).select(axis, i), alone(part))


def test_step_below_the_floor_still_receives_its_gradient():
    q = calibrated(4, on=torch.randn(3, 4), grad_scale="none")
    q.step.data.fill_(-0.5)
    x = torch.tensor([[1.0, -1.0]])
    y = q(x)
    assert_close(y, torch.tensor([[7e-5, -8e-5]]))
    y.backward(torch.tensor([[1.0, 2.0]]))
    assert q.step.grad.item() == 7 - 16
    with pytest.raises(ValueError, match=r"0\.act\[0\] has step -0\.5"):
        check_steps(nn.Sequential(nn.ModuleDict({"act": q})))


def test_check_steps_names_non_finite_values_and_passes_good_and_unused_ones():
    q = calibrated(4, on=torch.randn(3, 4), axis=1, groups=4, zero_point="integer")
    check_steps(nn.ModuleList([q, LSQQuantizer(4, "activation")]))
    q.step.data[2] = float("nan")
    with pytest.raises(ValueError, match=r"\[2\] has step nan"):
        check_steps(q)
    q.step.data[2] = 1.0
    q.zero_point.data[3] = float("inf")
    with pytest.raises(ValueError, match=r"\[3\].*zero point inf"):
        check_steps(q)


@pytest.mark.parametrize("form", ["none", "integer", "real"])
def test_autocast_computes_in_float32(form):
    x = torch.randn(64, 32)
    q = calibrated(8, on=x, zero_point=form, zp_init="lsqplus", init="max")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(q(x), q(x))
        half = x.bfloat16().requires_grad_()
        y = q(half)
    assert y.dtype == torch.bfloat16
    # the codes are those of float32 arithmetic on the half-precision values, only the result is rounded
    assert torch.equal(y, q(half.detach().float()).bfloat16())
    y.sum().backward()
    assert half.grad.dtype == torch.bfloat16 and q.step.grad.dtype == torch.float32
    got, q.step.grad = q.step.grad.clone(), None
    q(half.detach().float()).sum().backward()
    assert_close(got, q.step.grad, rtol=1e-5, atol=1e-6)


def test_half_precision_does_not_overflow_with_a_tiny_step():
    x = torch.tensor([60000.0], dtype=torch.float16)  # x / step = 6e9 overflows float16
    assert uniform_quantize(x, torch.tensor([1e-5]), None, -8, 7).item() == pytest.approx(7e-5, rel=1e-2)


def test_exported_program_equals_the_module():
    x = torch.randn(2, 3, 4)
    q = calibrated(4, on=x, axis=-1, groups=4, zero_point="integer", zp_init="lsqplus").eval()
    with torch.no_grad():
        program = torch.export.export(q, (x,))
    assert torch.equal(program.module()(x), q(x))
    compiled = torch.compile(q, backend="aot_eager", fullgraph=True)
    for a, b in zip(
        torch.autograd.grad(compiled(x).square().sum(), tuple(q.parameters())),
        torch.autograd.grad(q(x).square().sum(), tuple(q.parameters())),
        strict=True,
    ):
        assert_close(a, b)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LSQQuantizer(1, "weight"), "binary"),
        (lambda: LSQQuantizer(9, "weight"), "bits=9"),
        (lambda: int_bounds(1, True), "binary"),
        (lambda: LSQQuantizer(4, "weights"), "kind='weights'"),
        (lambda: LSQQuantizer(4, "activation", axis=0, groups=8), "batch"),
        (lambda: LSQQuantizer(4, "activation", axis=-2, groups=8)(torch.ones(8, 3)), "batch"),
        (lambda: LSQQuantizer(4, "activation", groups=8), "axis"),
        (lambda: LSQQuantizer(4, "activation", init="mean"), "per_group"),
        (lambda: LSQQuantizer(4, "activation", axis=1, groups=8)(torch.ones(8, 4)), "8 groups along axis 1"),
        (lambda: LSQQuantizer(4, "activation")(torch.ones(2, 2, dtype=torch.int64)), "floating"),
        (lambda: LSQQuantizer(4, "activation")(torch.ones(0, 2)), "empty"),
        (lambda: uniform_quantize(ONE, ONE, None, 3, 3), "qn=3"),
        (lambda: calibrate(nn.Linear(2, 2)).__enter__(), "no LSQQuantizer"),
        (lambda: calibrate(LSQQuantizer(4, "weight"), percentile=1).__enter__(), "percentile=1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


WORKER = """
import os, sys, torch, torch.distributed as dist
from common.quant.lsq import LSQQuantizer, calibrate
rank, store = int(os.environ["RANK"]), sys.argv[1]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
x = torch.load(store + ".pt", weights_only=True)[rank]
q = LSQQuantizer(4, "activation", axis=1, groups=3, init="per_group", zero_point="integer", zp_init="lsqplus")
p = LSQQuantizer(4, "activation")
q(x)
with calibrate(p, percentile=90):
    p(x)
torch.save({**q.state_dict(), "percentile": p.step.detach(), "codes": q.codes(x)}, f"{store}.{rank}")
dist.destroy_process_group()
"""


def test_two_ranks_with_different_first_batches_get_the_same_state(ranks, tmp_path):
    first, second = torch.rand(4, 3, 5), 7 * torch.randn(2, 3, 5)  # only the second rank sees negative values
    store = str(tmp_path / "store")
    torch.save([first, second], store + ".pt")
    (tmp_path / "worker.py").write_text(WORKER)
    done = ranks(tmp_path / "worker.py", [store])
    assert done.returncode == 0, done.stderr
    a, b = (torch.load(f"{store}.{r}", weights_only=True) for r in (0, 1))
    for k in ("step", "zero_point", "is_signed", "calibrated", "percentile"):
        assert torch.equal(a[k], b[k]), k
    # and it is the state of one process that sees both batches
    q = calibrated(
        4,
        on=torch.cat([first, second]),
        axis=1,
        groups=3,
        init="per_group",
        zero_point="integer",
        zp_init="lsqplus",
    )
    assert_close(a["step"], q.step.detach())
    assert bool(a["is_signed"])
    assert torch.equal(torch.cat([a["codes"], b["codes"]]), q.codes(torch.cat([first, second])))


def test_calibration_of_a_good_input_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calibrated(2, on=torch.randn(3, 4)).step.item() > 0
