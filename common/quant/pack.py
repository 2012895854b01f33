"""Bit-packed signs and codes, and the integer arithmetic that equals the fake-quantised float arithmetic.

Packing is little-endian: element i of the packed axis starts at bit i * bits of the byte string, low bit first; the
last byte is filled up with zero bits. Packed tensors are uint8 and stay on the device of their input, though packing
itself runs in NumPy on the CPU.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def packed_bytes(elements: int, bits: int) -> int:
    """Bytes of one packed row of `elements` codes of `bits` bits."""
    return math.ceil(elements * bits / 8)


def pack_signs(x: Tensor) -> Tensor:
    """Sign bits along the last axis: 1 where x >= 0 (so 0 is +1, as in `binary_sign`), 0 where x < 0.
    x: (..., N) -> uint8 (..., ceil(N / 8))."""
    return _pack_bits(~(x.detach() < 0), x.device)


def unpack_signs(packed: Tensor, n: int) -> Tensor:
    """Inverse of `pack_signs`: uint8 (..., ceil(n / 8)) -> float32 (..., n) of +-1."""
    _check_bytes(packed, packed_bytes(n, 1))
    bits = np.unpackbits(packed.cpu().numpy(), axis=-1, count=n, bitorder="little")
    return torch.from_numpy(bits).to(packed.device).float() * 2 - 1


def pack_codes(codes: Tensor, bits: int, *, signed: bool) -> Tensor:
    """Integer codes of 1..8 bits (two's complement if signed) along the last axis.

    codes: integer (..., N) -> uint8 (..., ceil(N bits / 8)). Flatten a weight first to pad once and not per row.
    ValueError if a code does not fit."""
    _check_bits(bits)
    if codes.is_floating_point() or codes.dtype == torch.bool:
        raise ValueError(f"codes of type {codes.dtype}: expected integers, as LSQQuantizer.codes returns them")
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if codes.numel() and (int(codes.min()) < low or int(codes.max()) > high):
        raise ValueError(f"codes in {int(codes.min())}..{int(codes.max())} do not fit {low}..{high} ({bits} bit)")
    shifts = torch.arange(bits, device=codes.device)
    planes = (codes.to(torch.int16).unsqueeze(-1) >> shifts) & 1
    return _pack_bits(planes.flatten(-2).bool(), codes.device)


def unpack_codes(packed: Tensor, n: int, bits: int, *, signed: bool) -> Tensor:
    """Inverse of `pack_codes`: uint8 (..., ceil(n bits / 8)) -> int32 (..., n)."""
    _check_bits(bits)
    _check_bytes(packed, packed_bytes(n, bits))
    planes = np.unpackbits(packed.cpu().numpy(), axis=-1, count=n * bits, bitorder="little")
    weights = 2 ** np.arange(bits, dtype=np.int32)
    if signed:
        weights[-1] = -weights[-1]
    codes = planes.reshape(*planes.shape[:-1], n, bits) @ weights
    return torch.from_numpy(codes.astype(np.int32)).to(packed.device)


def binary_matmul(a: Tensor, b: Tensor, n: int) -> Tensor:
    """All dot products of +-1 vectors of length n from their packed signs: n - 2 popcount(a xor b).

    a: (..., M, ceil(n / 8)) and b: (O, ceil(n / 8)) from `pack_signs` -> int32 (..., M, O), exact; equals
    `unpack_signs(a, n) @ unpack_signs(b, n).T`. Padding bits are equal in both and count nothing.
    This is the plain form; what is fast is `packed_conv.PackedConv2d`."""
    _check_bytes(a, packed_bytes(n, 1))
    _check_bytes(b, packed_bytes(n, 1))
    if b.ndim != 2:
        raise ValueError(f"b of shape {tuple(b.shape)}: expected (outputs, bytes)")
    rows = a.reshape(1, 1, -1, a.shape[-1])
    out = _binary_conv(rows, b.view(len(b), 1, 1, -1), n, 1, 0, 1)
    return out.reshape(*a.shape[:-1], len(b))


def binary_conv2d(
    x: Tensor,
    weight: Tensor,
    channels: int,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> Tensor:
    """Convolution of signs, padded with zeros AFTER the sign as binary networks do: borders sum fewer products.

    x: packed along channels, (B, H, W, ceil(C / 8)) = pack_signs(x.permute(0, 2, 3, 1)); weight: (O, kh, kw,
    ceil(C / 8)), packed the same way; channels: C -> int32 (B, Ho, Wo, O), exactly F.conv2d of the signs, channels
    last."""
    _check_bytes(x, packed_bytes(channels, 1))
    _check_bytes(weight, packed_bytes(channels, 1))
    if x.ndim != 4 or weight.ndim != 4:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)}: expected (B, H, W, bytes), (O, kh, kw, bytes)"
        )
    if stride < 1 or dilation < 1 or padding < 0:
        raise ValueError(f"stride={stride}, dilation={dilation} must be at least 1 and padding={padding} at least 0")
    return _binary_conv(x, weight, channels, stride, padding, dilation)


def integer_matmul(
    a: Tensor,
    b: Tensor,
    *,
    a_step: Tensor | float = 1.0,
    b_step: Tensor | float = 1.0,
    a_zero: Tensor | float = 0.0,
    b_zero: Tensor | float = 0.0,
) -> Tensor:
    """a_step b_step (a - a_zero) (b - b_zero)^T from one product of integers and two row sums:

        a b^T - a_zero 1 rowsum(b)^T - b_zero rowsum(a) 1^T + K a_zero b_zero

    A quantised linear layer (b = weight codes, b_zero = 0, b_step per output) and, per head, attention scores.
    a: integer (..., M, K); b: integer (..., N, K); steps and zeros broadcast against the result (..., M, N): none may
    vary along K. Zeros need not be integers (LSQ+ offsets: -zeta / step). -> float64 (..., M, N).
    ValueError if the worst case of the accumulator leaves int32."""
    accumulator = integer_accumulate(a, b)
    k = a.shape[-1]
    row_a = a.sum(-1, dtype=torch.int64).unsqueeze(-1)
    row_b = b.sum(-1, dtype=torch.int64).unsqueeze(-2)
    za, zb, sa, sb = (
        torch.as_tensor(t, dtype=torch.float64, device=a.device) for t in (a_zero, b_zero, a_step, b_step)
    )
    return sa * sb * (accumulator - za * row_b - zb * row_a + k * za * zb)


def integer_accumulate(a: Tensor, b: Tensor) -> Tensor:
    """a b^T in int32. a: integer (..., M, K), b: integer (..., N, K) -> int32 (..., M, N).

    The product runs in float64, which is exact here and, unlike an integer product, has a fast kernel everywhere.
    ValueError if K max|a| max|b| does not fit int32."""
    for name, t in (("a", a), ("b", b)):
        if t.is_floating_point() or t.dtype == torch.bool:
            raise ValueError(f"{name} of type {t.dtype}: expected integer codes")
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)}: the last axes must be equal")
    bound = a.shape[-1] * _largest(a) * _largest(b)
    if bound >= 2**31:
        raise ValueError(f"the accumulator may reach {bound}, which does not fit int32")
    return (a.double() @ b.double().mT).to(torch.int32)


def _largest(codes: Tensor) -> int:
    return max(-int(codes.min()), int(codes.max())) if codes.numel() else 0


def _pack_bits(bits: Tensor, device: torch.device) -> Tensor:
    return torch.from_numpy(np.packbits(bits.cpu().numpy(), axis=-1, bitorder="little")).to(device)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}: codes of 1 to 8 bits can be packed")


def _check_bytes(packed: Tensor, expected: int) -> None:
    if packed.dtype != torch.uint8 or packed.shape[-1] != expected:
        raise ValueError(
            f"packed tensor {packed.dtype} {tuple(packed.shape)}: expected uint8 with {expected} bytes in the last axis"
        )


def _words(packed: Tensor) -> Tensor:
    """uint8 (..., bytes) -> int64 (..., ceil(bytes / 8)), filled up with zero bits."""
    return F.pad(packed, (0, -packed.shape[-1] % 8)).contiguous().view(torch.int64)


def _popcount(x: Tensor) -> Tensor:
    """Set bits of each int64. The masks clear what an arithmetic shift of a negative number drags in."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x = x + (x >> 8)
    x = x + (x >> 16)
    return (x + (x >> 32)) & 0x7F


def _binary_conv(x: Tensor, w: Tensor, n: int, stride: int, padding: int, dilation: int) -> Tensor:
    kh, kw = w.shape[1:3]
    height = (x.shape[1] + 2 * padding - dilation * (kh - 1) - 1) // stride + 1
    width = (x.shape[2] + 2 * padding - dilation * (kw - 1) - 1) // stride + 1
    if height < 1 or width < 1:
        raise ValueError(f"input {x.shape[1]}x{x.shape[2]} is smaller than the kernel {kh}x{kw}")
    x, w = _words(x), _words(w)
    out = torch.zeros(len(x), height, width, len(w), dtype=torch.int32, device=x.device)
    for i in range(kh):
        rows, xs = _valid(i * dilation - padding, stride, x.shape[1], height)
        for j in range(kw):
            columns, ys = _valid(j * dilation - padding, stride, x.shape[2], width)
            tap = x[:, xs, ys]
            differing = torch.zeros(*tap.shape[:3], len(w), dtype=torch.int64, device=x.device)
            for s in range(tap.shape[-1]):
                differing += _popcount(tap[..., s, None] ^ w[:, i, j, s])
            out[:, rows, columns] += (n - 2 * differing).to(torch.int32)
    return out


def _valid(offset: int, stride: int, size: int, outputs: int) -> tuple[slice, slice]:
    """Outputs o in [first, last) whose input o * stride + offset lies in the image, and those inputs."""
    first = max(0, math.ceil(-offset / stride))
    last = max(first, min(outputs, (size - 1 - offset) // stride + 1))
    start = first * stride + offset
    return slice(first, last), slice(start, start + (last - first) * stride, stride)
