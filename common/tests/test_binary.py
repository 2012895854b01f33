from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from common.quant import binary
from common.quant.binary import RPReLU, RSign, binarize, binary_sign, clip_ste_weight, ede, libra, xnor_scale

POINTS = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
INTERIOR = torch.tensor([-1.5, -0.7, -0.2, 0.3, 0.9, 1.2], dtype=torch.float64)


def name_of(estimator):
    """A test id without a memory address, which would differ between the workers of pytest-xdist."""
    return estimator if isinstance(estimator, str) else getattr(estimator, "__name__", "ede")


EDE = partial(ede, t=0.8)  # k = 1 / 0.8
FIRST = {
    "ste": lambda x: (x.abs() <= 1).double(),
    "approx": lambda x: (2 - 2 * x.abs()).clamp(min=0),
    "identity": torch.ones_like,
    EDE: lambda x: 1 - torch.tanh(0.8 * x) ** 2,
}
SECOND = {
    "ste": torch.zeros_like,
    "approx": lambda x: torch.where(x.abs() < 1, -2 * x.sign(), 0.0),
    "identity": torch.zeros_like,
    EDE: lambda x: -1.6 * torch.tanh(0.8 * x) * (1 - torch.tanh(0.8 * x) ** 2),
}
floats = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@settings(deadline=None, max_examples=40)
@given(floats, st.sampled_from(["ste", "approx", "identity", EDE]), st.booleans())
def test_value_is_exactly_the_sign_with_and_without_gradient(xs, estimator, gradient):
    x = torch.tensor(xs, requires_grad=gradient)  # x + (sign - x).detach() would miss +-1 by rounding
    y = binarize(x, estimator=estimator)
    assert y.tolist() == [-1.0 if v < 0 else 1.0 for v in xs]
    with torch.no_grad():
        assert torch.equal(binarize(x, estimator=estimator), y)


@pytest.mark.parametrize("zero", [1, 0, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_value_at_zero_is_chosen(zero, dtype):
    y = binary_sign(torch.tensor([-1e-30, -0.0, 0.0, 1e-30], dtype=dtype), zero=zero)
    assert y.dtype == dtype and y.tolist() == [-1, zero, zero, 1]
    assert binarize(torch.zeros(2), zero=zero).tolist() == [zero, zero]


@pytest.mark.parametrize("estimator", FIRST, ids=name_of)
def test_first_derivatives_at_and_around_the_kinks(estimator):
    x = POINTS.clone().requires_grad_()
    upstream = torch.arange(1.0, 8.0, dtype=x.dtype)
    (g,) = torch.autograd.grad(binarize(x, estimator=estimator), x, upstream)
    assert_close(g, upstream * FIRST[estimator](POINTS), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("estimator", SECOND, ids=name_of)
def test_second_derivatives_are_those_of_the_surrogate(estimator):
    x = INTERIOR.clone().requires_grad_()
    y = binarize(x, estimator=estimator)
    # squared, so that both the second derivative of F and the product of first derivatives are present
    (g,) = torch.autograd.grad((y * y).sum() / 2, x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x)
    d1 = FIRST[estimator](x.detach())
    assert_close(g, y * d1, rtol=1e-12, atol=1e-12)
    assert_close(h, d1**2 + y * SECOND[estimator](x.detach()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("surrogate", [binary.hardtanh, binary.quadratic, EDE, binary.identity], ids=name_of)
def test_surrogates_pass_gradcheck_of_both_orders(surrogate):
    x = INTERIOR.clone().requires_grad_()
    assert torch.autograd.gradcheck(surrogate, x) and torch.autograd.gradgradcheck(surrogate, x)


def test_values_of_approx_sign_at_the_points_of_the_specification():
    x = torch.tensor([0.0, 0.5, -0.5, 1.0, -1.0, 2.0, -2.0], requires_grad=True)
    binarize(x, estimator="approx").sum().backward()
    assert x.grad.tolist() == [2, 1, 1, 0, 0, 0, 0]


def test_surrogates_run_from_minus_one_to_one():
    x = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    slope = (2 - 2 * x.abs()).clamp(min=0)
    assert torch.trapezoid(slope, x).item() == pytest.approx(2, abs=1e-7)
    ends = torch.tensor([-5.0, -1.0, 1.0, 5.0])
    for surrogate in (binary.hardtanh, binary.quadratic):
        assert surrogate(ends).tolist() == [-1, -1, 1, 1]
    pieces = torch.where(x < 0, x**2 + 2 * x, -(x**2) + 2 * x)
    assert_close(binary.quadratic(x), pieces, rtol=0, atol=1e-15)


@pytest.mark.parametrize("estimator", ["ste", "approx", EDE], ids=name_of)
def test_forward_mode_and_double_vjp_give_the_jacobian_of_the_surrogate(estimator):
    w, theta, v = torch.randn(5, 4).double(), torch.randn(4).double() / 2, torch.randn(4).double()

    def logits(theta):
        return w @ binarize(theta, estimator=estimator) * theta.sum()

    with torch.no_grad():  # no_grad does not switch off forward mode
        jvp = torch.func.jvp(logits, (theta,), (v,))[1]
    theta.requires_grad_()
    u = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    (jtu,) = torch.autograd.grad(logits(theta), theta, u, create_graph=True)
    (double_vjp,) = torch.autograd.grad(jtu, u, v)
    rows = torch.autograd.functional.jacobian(logits, theta.detach())
    assert_close(double_vjp, rows @ v, rtol=1e-10, atol=1e-12)
    assert_close(jvp, rows @ v, rtol=1e-10, atol=1e-12)
    assert (rows @ v).abs().sum() > 0.1


def test_hessian_vector_product_through_signs():
    """Double backward through two binary layers equals that of the network in which sign' is F' and sign'' is F''."""
    x, a, v = torch.randn(6, 3).double(), torch.randn(3).double(), torch.randn(3).double()
    w = torch.randn(3, 2).double()

    def loss(a):
        return torch.logsumexp(binarize(0.3 * x * a, estimator="approx") @ w, 1).sum()

    hessian = torch.autograd.functional.hessian(loss, a)
    # by hand: y = s(z), z = 0.3 x a; d2L/da2 = (0.3x)^T [ H_y F' F'^T + diag(g_y F'') ] (0.3x), per sample
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for xi in x:
        z = 0.3 * xi * a
        y = torch.where(z < 0, -1.0, 1.0).double()
        p = torch.softmax(y @ w, 0)
        g, h = w @ p, w @ (p.diag() - p.outer(p)) @ w.T
        f1 = (2 - 2 * z.abs()).clamp(min=0)
        f2 = torch.where(z.abs() < 1, -2 * z.sign(), 0.0)
        expected += (0.3 * xi).outer(0.3 * xi) * (h * f1.outer(f1) + (g * f2).diag())
    assert_close(hessian, expected, rtol=1e-10, atol=1e-12)
    assert_close(hessian @ v, torch.autograd.functional.vhp(loss, a, v)[1], rtol=1e-10, atol=1e-12)


def test_training_passes_nan_on():
    assert binarize(torch.tensor([float("nan")], requires_grad=True)).isnan().all()


def test_ede_temperature_runs_geometrically_and_the_default_k_keeps_the_slope():
    assert [binary.ede_temperature(p) for p in (0, 0.5, 1)] == pytest.approx([0.1, 1.0, 10.0])
    x = torch.zeros(1, requires_grad=True)
    for t, slope in ((0.1, 1.0), (10.0, 10.0)):  # k = max(1/t, 1)
        assert torch.autograd.grad(ede(x, t=t), x)[0].item() == pytest.approx(slope)


def test_xnor_scale_minimises_the_reconstruction_error_per_filter():
    w = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    alpha = xnor_scale(w)
    assert alpha.shape == (3, 1, 1, 1)

    def error(a):
        return (w - a * binary_sign(w)).square().sum((1, 2, 3))

    assert (error(alpha + 1e-3) > error(alpha)).all() and (error(alpha - 1e-3) > error(alpha)).all()
    w.requires_grad_()
    assert not xnor_scale(w).requires_grad
    xnor_scale(w, detach=False).sum().backward()
    assert_close(w.grad, w.detach().sign() / 18)


def test_clip_ste_weight_has_the_scale_in_the_value_but_not_in_the_gradient():
    w = torch.tensor([[0.5, -1.5], [-3.0, 0.2]], requires_grad=True)
    wb = clip_ste_weight(w)
    assert_close(wb, torch.tensor([[1.0, -1.0], [-1.6, 1.6]]))
    wb.backward(torch.tensor([[2.0, 3.0], [5.0, 7.0]]))
    assert w.grad.tolist() == [[2, 0], [0, 7]]


def test_libra_standardises_each_filter_and_rounds_the_scale_to_a_power_of_two():
    w = (3 * torch.randn(4, 3, 3, 3, dtype=torch.float64) + 1).requires_grad_()
    standard, s = libra(w)
    flat = standard.flatten(1)
    assert_close(flat.mean(1), torch.zeros(4).double(), rtol=0, atol=1e-12)
    assert_close(flat.std(1, unbiased=True), torch.ones(4).double())
    assert s.shape == (4, 1, 1, 1) and not s.requires_grad
    assert_close(s.flatten().log2(), flat.abs().mean(1).log2().round())
    # gradient of standardisation: orthogonal to the filter and to constants
    (g,) = torch.autograd.grad(standard, w, torch.randn_like(standard))
    assert_close(g.sum((1, 2, 3)), torch.zeros(4).double(), rtol=0, atol=1e-10)
    assert g.abs().max() > 1e-3


def test_libra_of_a_constant_filter_is_a_dead_filter_with_finite_gradient():
    w = torch.full((2, 1, 3, 3), 0.1, requires_grad=True)
    standard, s = libra(w)
    (standard * s).sum().backward()
    assert standard.abs().max() == 0 and s.abs().max() == 0 and w.grad.isfinite().all()
    with pytest.raises(ValueError, match="at least two"):
        libra(torch.ones(4, 1, 1, 1))


def test_rsign_adds_its_shift_per_channel():
    m = RSign(2)
    with torch.no_grad():
        m.bias[0, :, 0, 0] = torch.tensor([0.5, -0.5])
    x = torch.tensor([-0.25, 0.25]).view(1, 1, 1, 2).expand(1, 2, 1, 2)
    y = m(x)
    assert y.flatten().tolist() == [1, 1, -1, -1]
    y.sum().backward()
    assert_close(m.bias.grad.flatten(), torch.tensor([1.5 + 0.5, 0.5 + 1.5]))


def test_rprelu_shifts_before_and_after_and_starts_as_relu_with_slope_zero():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(RPReLU(3, slope=0.0)(x), F.relu(x))
    m = RPReLU(3)
    with torch.no_grad():
        m.shift_in[0, 1] = 2.0
        m.shift_out[0, 2] = -3.0
    expected = F.leaky_relu(x + torch.tensor([0.0, 2, 0]).view(1, 3, 1, 1), 0.25) + torch.tensor([0, 0, -3.0]).view(
        1, 3, 1, 1
    )
    assert_close(m(x), expected)
    assert sum(p.numel() for p in m.parameters()) == 9 and len(m.state_dict()) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: binary_sign(torch.ones(1), zero=2), "zero=2"),
        (lambda: binarize(torch.ones(1), estimator="st"), "approx.*identity.*ste"),
        (lambda: ede(torch.ones(1), t=0.0), "t=0"),
        (lambda: binary.ede_temperature(1.5), "progress=1.5"),
        (lambda: xnor_scale(torch.ones(3)), "expected"),
        (lambda: RSign(3, estimator="aprox"), "aprox"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class TinyBinaryNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.sign, self.act = RSign(4), RPReLU(4)
        self.weight = torch.nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x):
        return self.act(F.conv2d(self.sign(x), clip_ste_weight(self.weight), padding=1))


def test_exported_graph_has_no_trace_of_the_surrogate():
    net = TinyBinaryNet().eval()
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        program = torch.export.export(net, (x,))
        ops = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
        assert_close(program.module()(x), net(x), rtol=0, atol=0)
    assert not any("sub" in op or "clamp" in op for op in ops), ops


def test_compiles_without_graph_break_in_both_modes():
    net = TinyBinaryNet()
    x = torch.randn(2, 4, 6, 6)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    out = compiled(x)
    out.sum().backward()
    grad, net.weight.grad = net.weight.grad, None
    net(x).sum().backward()
    assert_close(out, net(x), rtol=0, atol=1e-5)
    assert_close(grad, net.weight.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert_close(compiled(x), net(x), rtol=0, atol=1e-5)


def test_onnx_runtime_gives_the_same_signs():
    onnxruntime = pytest.importorskip("onnxruntime", reason="extra `deploy` is not installed")
    pytest.importorskip("onnxscript", reason="extra `deploy` is not installed")
    net = TinyBinaryNet().eval()
    x = torch.randn(2, 4, 6, 6)
    x[0, 0, 0] = 0.0  # exact zeros must become +1
    with torch.no_grad():
        proto = torch.onnx.export(net, (x,), dynamo=True, verbose=False).model_proto
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        y = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        assert_close(torch.from_numpy(y), net(x), rtol=0, atol=1e-5)
