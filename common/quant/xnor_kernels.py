"""The compiled kernels behind `common.quant.packed_conv`: signs to bits, and the convolution of bits with all that follows it.

Both are written in vectors of LLVM's intermediate representation, because the register block is the point: four pixels by 32
outputs stay in registers over all taps, each step being one exclusive or, one population count and one addition of eight
64-bit lanes (three instructions with AVX-512 VPOPCNTDQ; LLVM emits byte shuffles for AVX2 and NEON's count for ARM).

`pack` and `convolve` are C functions of one argument, the address of a job: int64 fields, of which the first three are the same
for both (`JOB`). Any number of threads may call one with the same job: each takes parts until there are none.
"""

# pyright: reportReturnType=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (llvmlite's builder and types are not typed)

from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, njit
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.numpy_support import carray
from numba.np.unsafe.ndarray import to_fixed_tuple

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


@intrinsic
def _take(typing_context, at):
    """The int64 at an address, which is one more afterwards; no two threads get the same."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any):
        return builder.atomic_rmw("add", _pointer(builder, args[0], _I64), ir.Constant(_I64, 1), "seq_cst")

    return types.int64(_POINTER), build


@intrinsic
def _put(typing_context, at, word):
    """Writes the 64-bit word to an address."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any):
        builder.store(args[1], _pointer(builder, args[0], _I64))
        return context.get_dummy_value()

    return types.void(_POINTER, types.uint64), build


@intrinsic
def _copy(typing_context, source, target):
    """Copies a float from one address to another."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any):
        builder.store(_load(builder, args[0], _F32), _pointer(builder, args[1], _F32))
        return context.get_dummy_value()

    return types.void(_POINTER, _POINTER), build


JOB = (
    "taken",
    "parts",
    "total",
)  # parts that threads have begun, parts, and what is divided: rows (pack), blocks (convolve)
PACK = (
    *JOB,
    "x",
    "shift",
    "strict",
    "channels",
    "top",
    "left",
    "height",
    "width",
    "out",
    "rows",
    "columns",
    "groups",
    "words",
)
CONVOLVE = (
    *JOB, "x", "image", "words", "rows", "classes", "pixels", "offsets", "steps", "w", "groups", "vectors", "corrections", "a",
    "b", "slope", "shift", "skip", "out", "outputs",
)  # fmt: skip
_PACK, _CONVOLVE = len(PACK) - len(JOB), len(CONVOLVE) - len(JOB)
_ENTRY = types.void(types.voidptr)


@njit(nogil=True)
def _shares(job):
    """(first, last) of one part after the other that no other thread has taken."""
    at, parts, total = np.intp(job.ctypes.data), job[1], job[2]
    part = _take(at)
    while part < parts:
        yield total * part // parts, total * (part + 1) // parts
        part = _take(at)


@njit(nogil=True)
def _pack(job, first, last):
    x, shift, strict, channels, top, left, height, width, out, rows, columns, groups, words = to_fixed_tuple(
        job[3:], _PACK
    )
    for row in range(first, last):
        b, i = row // height, row % height
        at = x + 4 * row * width * groups * channels
        k = out + 8 * ((b * rows + i + top) * columns + left) * groups * words
        for _ in range(width):
            shifts = shift
            for _ in range(groups):
                left_over = channels
                while left_over >= 64:
                    _put(k, _signs64(at, shifts, strict != 0))
                    at, shifts, k, left_over = at + 256, shifts + 256, k + 8, left_over - 64
                if left_over:
                    word, bit = np.uint64(0), np.uint64(0)
                    while left_over >= 8:
                        word |= _signs8(at, shifts, strict != 0) << bit
                        at, shifts, bit, left_over = at + 32, shifts + 32, bit + np.uint64(8), left_over - 8
                    while left_over:
                        word |= _signs1(at, shifts, strict != 0) << bit
                        at, shifts, bit, left_over = at + 4, shifts + 4, bit + np.uint64(1), left_over - 1
                    _put(k, word)
                    k += 8


@cfunc(_ENTRY, cache=True)
def pack(job):
    """Rows (batch x height) of x, floats (B H W, groups channels), as the words `out` (B, rows, columns, groups, words), which
    begin `top` and `left` of the image; the border is left alone. Fields: PACK; channels: of a group."""
    fields = carray(job, len(PACK), np.int64)
    for first, last in _shares(fields):
        _pack(fields, first, last)


@njit(nogil=True)
def _block(many, n, x, r, k, steps, w, w_row, c, cls, c_row, a, b, slope, shift, s, s_row, y, y_row):
    """The register block of four pixels (many) or one by n vectors of outputs."""
    if many and n == 4:
        _block44(x, r, k, steps, w, w_row, c, cls, c_row, a, b, slope, shift, s, s_row, y, y_row)
    elif many and n == 2:
        _block42(x, r, k, steps, w, w_row, c, cls, c_row, a, b, slope, shift, s, s_row, y, y_row)
    elif many:
        _block41(x, r, k, steps, w, w_row, c, cls, c_row, a, b, slope, shift, s, s_row, y, y_row)
    elif n == 4:
        _block14(x, r, k, steps, w, w_row, c, cls, c_row, a, b, slope, shift, s, s_row, y, y_row)
    elif n == 2:
        _block12(x, r, k, steps, w, w_row, c, cls, c_row, a, b, slope, shift, s, s_row, y, y_row)
    else:
        _block11(x, r, k, steps, w, w_row, c, cls, c_row, a, b, slope, shift, s, s_row, y, y_row)


@njit(nogil=True)
def _convolve(job, first, last):
    (x, image, words, rows, classes, pixels, offsets, steps, w, groups, vectors, corrections, a, b, slope, shift, skip, out,
     outputs) = to_fixed_tuple(job[3:], _CONVOLVE)  # fmt: skip
    blocks = (pixels + PIXELS - 1) // PIXELS
    spare, result = np.zeros((PIXELS, 8 * 4), np.float32), np.empty((PIXELS, 8), np.float32)
    spare_at, result_at = np.intp(spare.ctypes.data), np.intp(result.ctypes.data)
    row, w_stride, c_stride = 4 * groups * outputs, 64 * steps, 32 * groups * vectors
    narrow = outputs < 8  # a row is shorter than the block
    for g in range(groups):
        v = 0
        while v < vectors:
            whole = outputs // 8 - v
            n = 4 if whole >= 4 else 2 if whole >= 2 else 1
            begin = min(8 * v, max(outputs - 8, 0))  # see `vector_starts`
            o = g * vectors + v
            column = 4 * (g * outputs + begin)
            for u in range(first, last):
                picture, p = u // blocks, PIXELS * (u % blocks)
                end = min(p + PIXELS, pixels)
                while p < end:
                    many = end - p == PIXELS
                    done = PIXELS if many else 1
                    at = (picture * pixels + p) * row + column
                    s, s_row = (skip + at, row) if skip else (spare_at, 0)
                    y, y_row = out + at, row
                    if narrow:
                        y, y_row = result_at, 32
                        if skip:
                            s, s_row = spare_at, 128
                            for q in range(done):
                                for i in range(outputs):
                                    _copy(skip + at + q * row + 4 * i, spare_at + 128 * q + 4 * i)
                    _block(
                        many, n, x + 8 * (picture * image + g * words), rows + 8 * p, offsets, steps, w + o * w_stride, w_stride,
                        corrections + 32 * o, classes + 4 * p, c_stride, a + 32 * o, b + 32 * o, slope + 32 * o, shift + 32 * o,
                        s, s_row, y, y_row,
                    )  # fmt: skip
                    if narrow:
                        for q in range(done):
                            for i in range(outputs):
                                _copy(result_at + 32 * q + 4 * i, out + at + q * row + 4 * i)
                    p += done
            v += n
    return spare[0, 0] + result[0, 0]  # used here, or numba would free both after their addresses are taken


@cfunc(_ENTRY, cache=True)
def convolve(job):
    """Blocks (batch x ceil(pixels / 4)) of a convolution of packed signs and of what follows it. Fields: CONVOLVE.

    x: words as `pack` leaves them, `image` of them a picture and `words` a group of a pixel; rows, classes (pixels): first word
    of a pixel's window, and the row of `corrections` that knows which of its taps are padding; offsets (steps): words of a
    window; w (groups, vectors, steps, 8); corrections (classes, groups, 8 vectors): int32; a, b, slope, shift (groups,
    8 vectors); skip (0: none), out: floats (B pixels, groups outputs); outputs: of a group."""
    fields = carray(job, len(CONVOLVE), np.int64)
    for first, last in _shares(fields):
        _convolve(fields, first, last)
