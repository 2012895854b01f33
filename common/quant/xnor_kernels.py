"""The compiled kernels behind `common.quant.packed_conv`: signs to bits, and the convolution of bits with all that follows it.

Both are written in vectors of LLVM's intermediate representation, because the register block is the point: four pixels by 32
outputs stay in registers over all taps, each step being one exclusive or, one population count and one addition of eight
64-bit lanes (three instructions with AVX-512 VPOPCNTDQ; LLVM emits byte shuffles for AVX2 and NEON's count for ARM).
"""

# pyright: reportReturnType=false, reportArgumentType=false, reportAttributeAccessIssue=false
# (llvmlite's builder and types are not typed)

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic

LANES = 8  # outputs in a vector
PIXELS = 4  # pixels in a register block
_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_POINTER = types.intp


def _pointer(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, offset: ir.Value | int = 0) -> ir.Value:
    """A pointer to `kind` at address + offset bytes."""
    offset = ir.Constant(_I64, offset) if isinstance(offset, int) else offset
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def _load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, offset: ir.Value | int = 0) -> ir.Value:
    return builder.load(_pointer(builder, address, kind, offset), align=4 if kind != _I64 else 8)


def _splat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    vector = ir.VectorType(value.type, LANES)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(
        one, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    )


def _make_block(pixels: int, vectors: int) -> Any:
    """The register block of `pixels` by 8 `vectors` outputs, as a function of addresses (all strides in bytes):

    x, rows (pixels), offsets (steps), steps: word k of pixel p is x[rows[p] + offsets[k]];
    w, w_stride: word k of output 8 v + i is at w + v w_stride + 64 k + 8 i;
    corrections, classes (pixels), c_stride: int32 of output o at corrections + classes[p] c_stride + 4 o;
    a, b, slope, shift: float32 per output; skip, skip_stride, out, out_stride: float32, a row per pixel."""

    @intrinsic
    def block(
        typing_context, x, rows, offsets, steps, w, w_stride, corrections, classes, c_stride, a, b, slope, shift, skip,
        skip_stride, out, out_stride,
    ):  # fmt: skip
        def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any):
            (x, rows, offsets, steps, w, w_stride, corrections, classes, c_stride, a, b, slope, shift, skip, skip_stride,
             out, out_stride) = args  # fmt: skip
            words = ir.VectorType(_I64, LANES)
            count = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(words, [words]), f"llvm.ctpop.v{LANES}i64"
            )
            eight = ir.Constant(_I64, 8)
            starts = [builder.add(x, builder.mul(_load(builder, rows, _I64, 8 * p), eight)) for p in range(pixels)]
            before = builder.block
            loop, end = builder.append_basic_block("taps"), builder.append_basic_block("affine")
            builder.branch(loop)
            builder.position_at_end(loop)
            k = builder.phi(_I64)
            k.add_incoming(ir.Constant(_I64, 0), before)
            sums = [[builder.phi(words) for _ in range(vectors)] for _ in range(pixels)]
            for s in (s for row in sums for s in row):
                s.add_incoming(ir.Constant(words, [0] * LANES), before)
            offset = builder.mul(_load(builder, offsets, _I64, builder.mul(k, eight)), eight)
            step = builder.mul(k, ir.Constant(_I64, 8 * LANES))
            weights = []
            for v in range(vectors):
                at = builder.add(builder.mul(w_stride, ir.Constant(_I64, v)), step)
                weights.append(builder.load(_pointer(builder, w, words, at), align=8))
            for p in range(pixels):
                word = _splat(builder, _load(builder, starts[p], _I64, offset))
                for v in range(vectors):
                    differing = builder.call(count, [builder.xor(word, weights[v])])
                    sums[p][v].add_incoming(builder.add(sums[p][v], differing), loop)
                    sums[p][v] = sums[p][v].incomings[-1][0]
            following = builder.add(k, ir.Constant(_I64, 1))
            k.add_incoming(following, loop)
            builder.cbranch(builder.icmp_signed("<", following, steps), loop, end)
            builder.position_at_end(end)
            _affine(
                builder, sums, corrections, classes, c_stride, a, b, slope, shift, skip, skip_stride, out, out_stride
            )
            return context.get_dummy_value()

        return types.void(*(_POINTER,) * 17), build

    return block


def _affine(builder, sums, corrections, classes, c_stride, a, b, slope, shift, skip, skip_stride, out, out_stride):
    """out = prelu(a (correction - 2 differing) + b + skip) + shift, each product and each sum rounded."""
    floats, ints = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
    zero = ir.Constant(floats, [0.0] * LANES)
    one = ir.Constant(ints, [1] * LANES)
    for p, row in enumerate(sums):
        correct = builder.mul(builder.sext(_load(builder, classes, _I32, 4 * p), _I64), c_stride)
        skipped = builder.mul(skip_stride, ir.Constant(_I64, p))
        written = builder.mul(out_stride, ir.Constant(_I64, p))
        for v, differing in enumerate(row):
            at = ir.Constant(_I64, 4 * LANES * v)
            twice = builder.shl(builder.trunc(differing, ints), one)
            z = builder.sub(_load(builder, corrections, ints, builder.add(correct, at)), twice)
            y = builder.fmul(builder.sitofp(z, floats), _load(builder, a, floats, at))
            y = builder.fadd(y, _load(builder, b, floats, at))
            y = builder.fadd(y, _load(builder, skip, floats, builder.add(skipped, at)))
            negative = builder.fmul(y, _load(builder, slope, floats, at))
            y = builder.select(builder.fcmp_ordered(">", y, zero), y, negative)
            y = builder.fadd(y, _load(builder, shift, floats, at))
            builder.store(y, _pointer(builder, out, floats, builder.add(written, at)), align=4)


_block44, _block42, _block41 = (_make_block(PIXELS, v) for v in (4, 2, 1))
_block14, _block12, _block11 = (_make_block(1, v) for v in (4, 2, 1))


def _make_signs(lanes: int) -> Any:
    """Bits of `lanes` floats at x with the shifts at `shift`: 1 where not x + shift < 0; strict: 1 where x + shift > 0."""

    @intrinsic
    def signs(typing_context, x, shift, strict):
        def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any):
            x, shift, strict = args
            floats = ir.VectorType(_F32, lanes)
            y = builder.fadd(_load(builder, x, floats), _load(builder, shift, floats))
            zero = ir.Constant(floats, [0.0] * lanes)
            bits = builder.select(
                strict, builder.fcmp_ordered(">", y, zero), builder.fcmp_unordered(">=", y, zero)
            )  # NaN counts as 0 does
            return (
                builder.zext(builder.bitcast(bits, ir.IntType(lanes)), _I64)
                if lanes < 64
                else builder.bitcast(bits, _I64)
            )

        return types.uint64(_POINTER, _POINTER, types.boolean), build

    return signs


_signs64, _signs8, _signs1 = (_make_signs(n) for n in (64, 8, 1))


@njit(nogil=True, cache=True)
def pack(x, shift, strict, channels, top, left, height, width, out, first, last):
    """Rows first..last (of batch x height) of x, floats (B H W, groups channels), as the words `out` (B, H + padding, W +
    padding, groups, words), which begin `top` and `left` of the image. The border is left alone. channels: of a group."""
    groups, words = out.shape[3], out.shape[4]
    flat = out.reshape(-1)
    x_at, shift_at = np.intp(x.ctypes.data), np.intp(shift.ctypes.data)
    for row in range(first, last):
        b, i = row // height, row % height
        at = x_at + 4 * row * width * groups * channels
        k = ((b * out.shape[1] + i + top) * out.shape[2] + left) * groups * words
        for _ in range(width):
            shifts = shift_at
            for _ in range(groups):
                left_over = channels
                while left_over >= 64:
                    flat[k] = _signs64(at, shifts, strict)
                    at, shifts, k, left_over = at + 256, shifts + 256, k + 1, left_over - 64
                if left_over:
                    word, bit = np.uint64(0), np.uint64(0)
                    while left_over >= 8:
                        word |= _signs8(at, shifts, strict) << bit
                        at, shifts, bit, left_over = at + 32, shifts + 32, bit + np.uint64(8), left_over - 8
                    while left_over:
                        word |= _signs1(at, shifts, strict) << bit
                        at, shifts, bit, left_over = at + 4, shifts + 4, bit + np.uint64(1), left_over - 1
                    flat[k] = word
                    k += 1


@njit(nogil=True, cache=True)
def convolve(x, rows, classes, offsets, w, corrections, a, b, slope, shift, skip, skips, out, outputs, first, last):
    """Blocks first..last (of batch x ceil(pixels / 4)) of a convolution of packed signs and of what follows it.

    x: words as `pack` leaves them; rows, classes (pixels): first word of a pixel's window, and the row of `corrections` that
    knows which of its taps are padding; offsets (steps): words of a window; w (groups, vectors, steps, 8); corrections (classes,
    groups, 8 vectors): int32; a, b, slope, shift (groups, 8 vectors); skip, out: floats (B pixels, groups outputs), skips:
    whether `skip` is one; outputs: of a group."""
    groups, vectors, steps = w.shape[:3]
    pixels, blocks = len(rows), (len(rows) + PIXELS - 1) // PIXELS
    image = x.shape[1] * x.shape[2] * x.shape[3] * x.shape[4]
    spare, result = np.zeros((PIXELS, 8 * 4), np.float32), np.empty((PIXELS, 8), np.float32)
    row, w_stride, c_stride = 4 * groups * outputs, 64 * steps, 32 * groups * vectors
    spare_at, result_at = np.intp(spare.ctypes.data), np.intp(result.ctypes.data)
    x_at, rows_at, classes_at = np.intp(x.ctypes.data), np.intp(rows.ctypes.data), np.intp(classes.ctypes.data)
    k_at, w_at, c_at = np.intp(offsets.ctypes.data), np.intp(w.ctypes.data), np.intp(corrections.ctypes.data)
    a_at, b_at = np.intp(a.ctypes.data), np.intp(b.ctypes.data)
    slope_at, shift_at = np.intp(slope.ctypes.data), np.intp(shift.ctypes.data)
    skip_at, out_at = np.intp(skip.ctypes.data), np.intp(out.ctypes.data)
    for g in range(groups):
        v = 0
        while v < vectors:
            whole = outputs // 8 - v
            n = 4 if whole >= 4 else 2 if whole >= 2 else 1
            begin = min(8 * v, max(outputs - 8, 0))  # see `vector_starts`
            o = g * vectors + v
            wv, cv, av, bv = w_at + o * w_stride, c_at + 32 * o, a_at + 32 * o, b_at + 32 * o
            slopev, shiftv, column = slope_at + 32 * o, shift_at + 32 * o, 4 * (g * outputs + begin)
            for u in range(first, last):
                picture, p = u // blocks, PIXELS * (u % blocks)
                end = min(p + PIXELS, pixels)
                while p < end:
                    many = end - p == PIXELS
                    xp = x_at + 8 * (picture * image + g * x.shape[4])
                    r, c = rows_at + 8 * p, classes_at + 4 * p
                    at = (picture * pixels + p) * row + column
                    s, s_row = (skip_at + at, row) if skips else (spare_at, 0)
                    y, y_row = out_at + at, row
                    if outputs < 8:  # a row is shorter than the block
                        y, y_row = result_at, 32
                        if skips:
                            for q in range(min(PIXELS, end - p)):
                                for i in range(outputs):
                                    spare[q, i] = skip[picture * pixels + p + q, g * outputs + i]
                            s, s_row = spare_at, 128
                    # fmt: off
                    if many and n == 4:
                        _block44(xp, r, k_at, steps, wv, w_stride, cv, c, c_stride, av, bv, slopev, shiftv, s, s_row, y, y_row)
                    elif many and n == 2:
                        _block42(xp, r, k_at, steps, wv, w_stride, cv, c, c_stride, av, bv, slopev, shiftv, s, s_row, y, y_row)
                    elif many:
                        _block41(xp, r, k_at, steps, wv, w_stride, cv, c, c_stride, av, bv, slopev, shiftv, s, s_row, y, y_row)
                    elif n == 4:
                        _block14(xp, r, k_at, steps, wv, w_stride, cv, c, c_stride, av, bv, slopev, shiftv, s, s_row, y, y_row)
                    elif n == 2:
                        _block12(xp, r, k_at, steps, wv, w_stride, cv, c, c_stride, av, bv, slopev, shiftv, s, s_row, y, y_row)
                    else:
                        _block11(xp, r, k_at, steps, wv, w_stride, cv, c, c_stride, av, bv, slopev, shiftv, s, s_row, y, y_row)
                    # fmt: on
                    done = PIXELS if many else 1
                    if outputs < 8:
                        for q in range(done):
                            for i in range(outputs):
                                out[picture * pixels + p + q, g * outputs + i] = result[q, i]
                    p += done
            v += n
