"""Codes and products of the integer operators against plain formulas, and in onnxruntime."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.onnx_export import export_onnx
from common.quant.integer_onnx import (
    QDQ,
    IntegerConv2d,
    IntegerLinear,
    Operand,
    StoredWeight,
    integer_product,
    matmul,
    translations,
)
from common.quant.lsq import LSQQuantizer, int_bounds


def quantizer(bits, *, signed=True, step=0.25, zero=0, axis=None, kind="activation"):
    """A calibrated quantiser with these steps and zero points (numbers, or one per group)."""
    steps = torch.as_tensor(step, dtype=torch.float32).flatten()
    form = "none" if kind == "weight" else "integer"
    q = LSQQuantizer(bits, kind, axis=axis, groups=len(steps), signed=signed, zero_point=form)
    state = {"step": steps, "calibrated": torch.tensor(True), "is_signed": torch.tensor(signed)}
    if form != "none":
        state["zero_point"] = torch.as_tensor(zero, dtype=torch.float32).flatten().expand_as(steps)
    q.load_state_dict(state)
    return q.eval()


def weights(bits, shape, seed=0):
    """(weight, its quantiser with a step per output, the codes as float64)."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    q = quantizer(bits, step=w.flatten(1).abs().amax(1) / 2 ** (bits - 1) * 1.3, axis=0, kind="weight")
    return w, q, q.codes(w).double()


def centred(q, x):
    """clip(round(x / step), qn - z, qp - z) in float64, z one number or a head's."""
    (qn, qp), shape = int_bounds(q.bits, q.bounds[0] < 0), [1] * x.ndim
    if q.axis is not None:
        shape[q.axis] = q.groups
    step, z = q.step.detach().view(shape), q.code_of_zero().view(shape)
    return (x / step).round().clamp(qn - z, qp - z).double()


def signal(*shape, seed=0):
    """Values that clip on both sides, exact ties between two codes of step 0.25 among them."""
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(x.abs() < 1, (x * 8).round() / 8, x)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize(("bits", "signed"), [(2, True), (3, False), (4, True), (7, True), (8, True), (8, False)])
def test_codes_fill_the_type_from_its_least_value_and_are_centred_by_their_zero(bits, signed, left):
    for zero in (0, 1, -1 if signed else 3, 2**bits + 1, -(2**bits) - 2):  # the last two: no code is zero
        q = quantizer(bits, signed=signed, zero=zero)
        operand, x = Operand(q, left=left), 40 * signal(500)
        codes = operand(x)
        assert codes.dtype == (torch.uint8 if left else torch.int8)
        low = 0 if left else -128
        assert int(codes.min()) == low and int(codes.max()) == low + 2**bits - 1
        torch.testing.assert_close(codes.double() - operand.shift.double(), centred(q, x), rtol=0, atol=0)
        expected = operand.step * centred(q, x).float()
        torch.testing.assert_close(QDQ(q)(x), expected, rtol=0, atol=0)


def test_eight_unsigned_bits_are_the_codes_themselves():
    operand = Operand(quantizer(8, signed=False, step=1 / 255), left=True)
    assert operand.shift == 0 and not operand.clips  # a softmax map: nothing is shifted, the type clips
    assert operand(torch.tensor([0.0, 0.5 / 255, 0.6 / 255, 1.0, 2.0])).tolist() == [0, 0, 1, 255, 255]


@pytest.mark.parametrize("zeros", [(0, 0), ((0, 2), 1), (1, (2, -1)), ((-1, 2), (0, 3)), ((-200, 5), 300)])
@pytest.mark.parametrize("bits", [8, 3])
def test_a_product_per_head_takes_off_the_zeros_of_its_heads(zeros, bits):
    steps = (0.25, 0.5)
    qa, qb = (quantizer(bits, step=steps, zero=z, axis=1) for z in zeros)
    a, b = signal(2, 2, 5, 7), signal(2, 2, 7, 3, seed=1)
    left, right = Operand(qa, left=True), Operand(qb, left=False)
    assert left.one_zero is isinstance(zeros[0], int) and right.one_zero is (zeros[1] in (0, 1))
    found = integer_product(left(a), right(b), left, right, torch.tensor([2.0, 0.5]).view(-1, 1, 1))
    expected = torch.tensor([2.0, 0.5]).view(-1, 1, 1) * (centred(qa, a) @ centred(qb, b))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0)


GEOMETRIES = {
    "plain": {"kernel_size": 3, "padding": 1}, "strided": {"kernel_size": 3, "stride": 2, "padding": (1, 2), "dilation": 2},
    "groups": {"kernel_size": 1, "groups": 2}, "patches": {"kernel_size": (2, 3), "stride": (2, 3)},
    "overlapping": {"kernel_size": 3, "stride": 2}, "pointwise": {"kernel_size": 1},
    "pointwise strided": {"kernel_size": 1, "stride": (2, 1), "dilation": 3},
    "pointwise padded": {"kernel_size": 1, "stride": 2, "padding": (1, 0)},
}  # fmt: skip


def convolution(geometry, zero):
    w_shape = nn.Conv2d(4, 6, **GEOMETRIES[geometry]).weight.shape
    w, qw, codes = weights(4, w_shape)
    layer = nn.Conv2d(4, 6, **GEOMETRIES[geometry])
    layer.weight.data.copy_(w)
    return layer, qw, codes, quantizer(4, zero=zero)


@pytest.mark.parametrize("geometry", list(GEOMETRIES))
def test_a_convolution_on_codes_pads_with_zero_and_not_with_a_code(geometry):
    layer, qw, codes, q = convolution(geometry, zero=3)
    x = signal(2, 4, 9, 11)
    integer = IntegerConv2d(Operand(q, left=True), qw, layer)
    assert integer.patches is (geometry == "patches")
    sums = F.conv2d(centred(q, x), codes, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    scale = (q.step * qw.step).view(-1, 1, 1).detach()
    expected = sums.float() * scale + layer.bias.view(-1, 1, 1)
    torch.testing.assert_close(integer(x), expected, rtol=0, atol=0)
    if layer.groups > 1:
        with pytest.raises(ValueError, match="groups=2"):
            integer.channels_last(x.permute(0, 2, 3, 1))
    else:
        last = integer.channels_last(x.permute(0, 2, 3, 1))
        torch.testing.assert_close(last.permute(0, 3, 1, 2), expected, rtol=0, atol=0)


@pytest.mark.parametrize("geometry", ["plain", "groups"])
@pytest.mark.parametrize("biased", [True, False])
def test_a_convolution_takes_a_line_behind_it_into_scale_and_bias(geometry, biased):
    layer, qw, _, q = convolution(geometry, zero=3)
    layer.bias = layer.bias if biased else None
    x, integer = signal(2, 4, 9, 11), IntegerConv2d(Operand(q, left=True), qw, layer)
    scale, shift = torch.linspace(-1.5, 3, 6).double(), torch.linspace(-2, 5, 6).double()
    line = scale.view(-1, 1, 1) * integer(x).double() + shift.view(-1, 1, 1)
    assert integer.absorb_(scale, shift) is integer and integer.scale.dtype == torch.float32
    torch.testing.assert_close(integer(x).double(), line, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zero", [-2, 200, -129])
def test_a_linear_layer_on_codes(zero):
    w, qw, codes = weights(8, (5, 40))
    q, x = quantizer(8, zero=zero), 10 * signal(3, 6, 40)
    bias = torch.arange(5.0)
    layer = IntegerLinear(Operand(q, left=True), qw, w, bias)
    assert layer.weight.dtype == torch.int8 and layer.weight.shape == (40, 5)
    expected = (centred(q, x) @ codes.T).float() * (q.step * qw.step) + bias
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    without = IntegerLinear(Operand(q, left=True), qw, w, None)
    torch.testing.assert_close(without(x) + bias, expected, rtol=0, atol=0)


class Everything(nn.Module):
    """One network of every layer, so that one export tests them all."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList()
        for geometry in GEOMETRIES:
            layer, qw, _, q = convolution(geometry, zero=2)
            self.convs.append(IntegerConv2d(Operand(q, left=True), qw, layer))
        w, qw, _ = weights(8, (5, 12))
        self.linear, self.outside = (
            IntegerLinear(Operand(quantizer(8, zero=z), left=True), qw, w, torch.arange(5.0)) for z in (-2, -130)
        )
        self.weight = nn.Parameter(w)
        self.stored, self.plain = (StoredWeight(w, qw, as_node=node) for node in (True, False))
        self.qdq = QDQ(quantizer(3, zero=1))
        self.per_channel = QDQ(quantizer(8, step=[0.1 + 0.01 * i for i in range(12)], zero=list(range(-6, 6)), axis=-1))
        self.operands = nn.ModuleList()
        for zeros in ((0, 0), ((-1, 2), (0, 3))):
            pair = (quantizer(b, step=(0.25, 0.5), zero=z, axis=1) for b, z in zip((8, 3), zeros, strict=True))
            self.operands.extend(Operand(q, left=i == 0) for i, q in enumerate(pair))

    def forward(self, x):
        found = [conv(x) for conv in self.convs]
        rows = x[..., :9, :].flatten(2).reshape(x.shape[0], 33, 12)
        found += [
            self.linear(rows),
            self.outside(rows),
            F.linear(self.qdq(rows), self.stored(self.weight)),
            F.linear(self.per_channel(rows), self.plain(self.weight)),
        ]
        heads = rows.reshape(x.shape[0], 33, 2, 6).transpose(1, 2)
        for a, b in zip(self.operands[::2], self.operands[1::2], strict=True):
            found.append(integer_product(a(heads), b(heads).mT, a, b, torch.tensor([2.0, 0.5]).view(-1, 1, 1)))
        return tuple(found)


def test_onnxruntime_computes_the_same_numbers(tmp_path):
    onnx = pytest.importorskip("onnx")
    network, out = Everything().eval(), tmp_path / "all.onnx"
    names = [f"y{i}" for i in range(14)]
    example = signal(1, 4, 9, 11)
    worst = export_onnx(network, example, out, about={}, outputs=names, tolerance=1e-5, translations=translations())
    assert worst < 1e-5
    graph = onnx.load(out).graph
    operators = [node.op_type for node in graph.node]
    assert operators.count("ConvInteger") == 1  # the one with groups
    assert operators.count("MatMulInteger") == 13  # 7 of windows, 2 linear, 2 + 2 of ones
    assert {node.domain for node in graph.node} == {""}  # operators of ONNX alone
    types = {onnx.TensorProto.DataType.Name(t.data_type) for t in graph.initializer if len(t.dims) > 1}
    assert "INT8" in types
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    ort.InferenceSession(str(out), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
    fused = [node for node in nodes if node.op_type == "MatMulIntegerToFloat" and len(node.input) == 7]
    assert len(fused) == 8  # scale and bias in the product's own pass, but where the code of zero lies outside


def test_what_has_no_integer_form_is_refused_with_the_reason():
    real = LSQQuantizer(4, "activation", signed=True, zero_point="real")
    real.load_state_dict(quantizer(4).state_dict())
    with pytest.raises(ValueError, match="offset in units of x"):
        Operand(real.eval(), left=True)
    with pytest.raises(ValueError, match="outside of 8 bits"):
        layer = nn.Conv2d(4, 6, 3, padding=1)
        IntegerConv2d(Operand(quantizer(8, zero=-129), left=True), weights(4, (6, 4, 3, 3))[1], layer)
    w, qw, _ = weights(4, (5, 3))
    per_channel = Operand(quantizer(4, step=(0.1, 0.2, 0.3), axis=-1), left=True)
    with pytest.raises(ValueError, match="3 steps along the axis"):
        IntegerLinear(per_channel, qw, w, None)
    with pytest.raises(ValueError, match="reflect"):
        layer = nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")
        IntegerConv2d(Operand(quantizer(4), left=True), weights(4, (6, 4, 3, 3))[1], layer)


def test_products_are_exact_where_float32_is_not():
    a, b = torch.full((1, 4096), 255, dtype=torch.uint8), torch.full((4096, 1), -128, dtype=torch.int8)
    b[0] = 127
    expected = 255 * (127 - 128 * 4095)
    assert matmul(a, b, torch.tensor(0, dtype=torch.uint8), torch.tensor(0, dtype=torch.int8)).item() == expected
