import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from common.quant import pack
from common.quant.binary import binary_sign
from common.quant.lsq import LSQQuantizer, int_bounds
from common.quant.pack import (
    binary_conv2d,
    binary_matmul,
    integer_accumulate,
    integer_matmul,
    pack_codes,
    pack_signs,
    packed_bytes,
    unpack_codes,
    unpack_signs,
)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_bit_order_and_padding_of_signs():
    x = torch.tensor([1.0, -1, -1, -1, -1, -1, -1, 1, -1, 0.0, -0.0])
    assert pack_signs(x).tolist() == [0b10000001, 0b00000110]  # low bit first, 0 counts as +1, the rest is 0
    assert unpack_signs(pack_signs(x), 11).tolist() == [1, -1, -1, -1, -1, -1, -1, 1, -1, 1, 1]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 140), st.integers(0, 2**16))
def test_signs_round_trip(rows, n, seed):
    x = torch.randn(2, rows, n, generator=torch.Generator().manual_seed(seed)).round()  # many zeros
    packed = pack_signs(x)
    assert packed.dtype == torch.uint8 and packed.shape == (2, rows, packed_bytes(n, 1))
    assert torch.equal(unpack_signs(packed, n), binary_sign(x))


@settings(deadline=None, max_examples=50)
@given(st.sampled_from([1, 2, 3, 4, 5, 8]), st.booleans(), st.integers(1, 30), st.integers(0, 2**16))
def test_codes_round_trip(bits, signed, n, seed):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    codes = torch.randint(low, high + 1, (3, n), generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(codes, bits, signed=signed)
    assert packed.dtype == torch.uint8 and packed.shape == (3, -(-n * bits // 8))
    assert torch.equal(unpack_codes(packed, n, bits, signed=signed), codes.int())


def test_layout_of_codes_is_little_endian():
    assert pack_codes(torch.tensor([1, 2, 3, 0]), 2, signed=False).tolist() == [0b00111001]
    assert pack_codes(torch.tensor([-2, 1, -1]), 2, signed=True).tolist() == [0b00110110]
    assert pack_codes(torch.tensor([5, 6, 7]), 3, signed=False).tolist() == [
        0b11110101,
        0b1,
    ]  # a code crosses a byte
    assert pack_codes(torch.tensor([-4, 3]), 4, signed=True).tolist() == [0b00111100]
    assert pack_codes(torch.tensor([200]), 8, signed=False).tolist() == [200]


def test_sizes_of_packed_weights():
    codes = torch.zeros(384 * 384, dtype=torch.int64)
    for bits in (2, 3, 4, 8):
        assert pack_codes(codes, bits, signed=True).numel() == packed_bytes(384 * 384, bits) == 384 * 384 * bits // 8
    assert packed_bytes(10, 3) == 4


@pytest.mark.parametrize("n", [1, 8, 63, 64, 65, 200])
def test_binary_matmul_equals_float(n):
    g = torch.Generator().manual_seed(n)
    a, b = torch.randn(2, 3, n, generator=g), torch.randn(5, n, generator=g)
    out = binary_matmul(pack_signs(a), pack_signs(b), n)
    assert out.dtype == torch.int32
    assert torch.equal(out, (binary_sign(a) @ binary_sign(b).T).int())


def test_binary_matmul_of_extremes():
    ones = pack_signs(torch.ones(1, 128))
    assert binary_matmul(ones, ones, 128).item() == 128  # all words are -1 as int64: the arithmetic shifts
    assert binary_matmul(ones, pack_signs(-torch.ones(1, 128)), 128).item() == -128


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20))
@settings(deadline=None, max_examples=50)
def test_popcount(words):
    assert pack._popcount(torch.tensor(words)).tolist() == [(w & (2**64 - 1)).bit_count() for w in words]


@pytest.mark.parametrize(
    ("channels", "size", "kernel", "stride", "padding", "dilation"),
    [
        (64, 6, 3, 1, 1, 1),
        (5, 7, 3, 2, 1, 1),
        (70, 5, 1, 1, 0, 1),
        (3, 9, 5, 2, 4, 2),
        (9, 4, 3, 3, 2, 1),
        (8, 6, 2, 2, 0, 1),
    ],
)
def test_binary_convolution_with_zero_padding_equals_float(channels, size, kernel, stride, padding, dilation):
    x, w = torch.randn(2, channels, size, size + 1), torch.randn(6, channels, kernel, kernel)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    out = binary_conv2d(
        pack_signs(x.permute(0, 2, 3, 1)),
        pack_signs(w.permute(0, 2, 3, 1)),
        channels,
        **geometry,
    )
    ref = F.conv2d(binary_sign(x), binary_sign(w), **geometry)
    assert out.dtype == torch.int32 and torch.equal(out.permute(0, 3, 1, 2), ref.int())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("form", ["integer", "real"])
def test_integer_linear_equals_the_fake_quantised_layer(signed, form):
    x, w, bias = torch.randn(2, 5, 33) + 0.7, torch.randn(7, 33), torch.randn(7)
    qx = LSQQuantizer(4, "activation", signed=signed, zero_point=form, zp_init="lsqplus", init="max").double()
    qw = LSQQuantizer(3, "weight", axis=0, groups=7, init="per_group").double()
    x, w, bias = x.double(), w.double(), bias.double()
    fake = F.linear(qx(x), qw(w), bias)
    out = integer_matmul(
        qx.codes(x),
        qw.codes(w),
        a_step=qx.effective_step(),
        b_step=qw.effective_step(),
        a_zero=qx.code_of_zero(),
    )
    assert_close(out + bias, fake, rtol=1e-12, atol=1e-12)
    assert qx.code_of_zero().abs() > 0.5  # the correction matters
    without = integer_matmul(qx.codes(x), qw.codes(w), a_step=qx.effective_step(), b_step=qw.effective_step())
    assert (without + bias - fake).abs().max() > 0.1
    # the packed weight is enough
    row = unpack_codes(pack_codes(qw.codes(w), 3, signed=True), 33, 3, signed=True)
    assert torch.equal(row, qw.codes(w))


def test_integer_attention_scores_per_head():
    q, k = torch.randn(2, 3, 5, 8).double() + 1.5, torch.randn(2, 3, 6, 8).double() - 1.5
    options = {"axis": 1, "groups": 3, "zero_point": "integer", "zp_init": "lsqplus", "init": "max"}
    qq, qk = (LSQQuantizer(4, "activation", **options).double() for _ in range(2))
    fake = qq(q) @ qk(k).mT / 8**0.5
    head = (3, 1, 1)
    out = integer_matmul(
        qq.codes(q),
        qk.codes(k),
        a_step=qq.effective_step().view(head) / 8**0.5,
        b_step=qk.effective_step().view(head),
        a_zero=qq.code_of_zero().view(head),
        b_zero=qk.code_of_zero().view(head),
    )
    assert_close(out, fake, rtol=1e-12, atol=1e-12)
    assert (qq.code_of_zero() * qk.code_of_zero()).abs().min() > 0


def test_accumulator_is_exact_and_guarded():
    a, b = torch.randint(-128, 128, (4, 3072)), torch.randint(0, 256, (5, 3072))
    out = integer_accumulate(a, b)
    assert out.dtype == torch.int32 and np.array_equal(out.numpy(), a.numpy() @ b.numpy().T)
    worst = integer_accumulate(torch.full((1, 3072), -128), torch.full((1, 3072), 255))
    assert worst.item() == -3072 * 128 * 255 and worst.item() > -(2**31)
    with pytest.raises(ValueError, match="int32"):
        integer_accumulate(torch.full((1, 2**16), 255), torch.full((1, 2**16), 255))


def test_codes_of_every_width_fit_their_pack():
    for bits in (2, 3, 4, 8):
        w = torch.randn(6, 10)
        q = LSQQuantizer(bits, "weight", axis=0, groups=6)
        fake = q(w)
        codes = q.codes(w)
        assert int_bounds(bits, True)[0] <= codes.min()
        again = unpack_codes(pack_codes(codes.flatten(), bits, signed=True), 60, bits, signed=True).view(6, 10)
        assert torch.equal(q.effective_step()[:, None] * again, fake)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_codes(torch.tensor([2]), 2, signed=True), "do not fit -2..1"),
        (lambda: pack_codes(torch.tensor([-1]), 8, signed=False), "do not fit 0..255"),
        (lambda: pack_codes(torch.tensor([40000]), 8, signed=False), "do not fit"),
        (lambda: pack_codes(torch.ones(1), 2, signed=True), "expected integers"),
        (lambda: pack_codes(torch.tensor([1]), 9, signed=True), "bits=9"),
        (lambda: unpack_codes(torch.zeros(2, dtype=torch.uint8), 9, 3, signed=True), "4 bytes"),
        (lambda: unpack_signs(torch.zeros(2), 9), "uint8"),
        (lambda: binary_matmul(pack_signs(torch.ones(2, 8)), pack_signs(torch.ones(2, 9)), 8), "1 bytes"),
        (lambda: binary_conv2d(*[pack_signs(torch.ones(1, 2, 2, 8))] * 2, 8, stride=0), "stride=0"),
        (
            lambda: binary_conv2d(pack_signs(torch.ones(1, 2, 2, 8)), pack_signs(torch.ones(1, 3, 3, 8)), 8),
            "smaller",
        ),
        (lambda: integer_accumulate(torch.ones(2, 3), torch.ones(2, 3)), "integer codes"),
        (lambda: integer_accumulate(torch.ones(2, 3).int(), torch.ones(2, 4).int()), "last axes"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
