"""The xor/popcount convolution behind `backend="numba"`. Imported by `common.quant.pack` when it is asked for."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import get_num_threads, njit, prange, set_num_threads
from numba.core import types
from numba.core.config import NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]
from numba.extending import intrinsic


@intrinsic
def _popcount(typing_context: Any, word: Any):  # pyright: ignore[reportUnusedParameter]
    """The processor's population count of a uint64."""

    def build(context: Any, builder: ir.IRBuilder, signature: Any, args: Any):
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), build


@njit(parallel=True, nogil=True)
def _conv(x, w, n, stride, padding, dilation, out):
    batch, in_height, in_width, words = x.shape
    kh, kw, _, outputs = w.shape
    height, width = out.shape[1:3]
    for row in prange(batch * height):
        b, i = row // height, row % height
        differing = np.empty(outputs, np.uint64)
        for j in range(width):
            differing[:] = 0
            taps = 0
            for p in range(kh):
                y = i * stride - padding + p * dilation
                if y < 0 or y >= in_height:
                    continue
                for q in range(kw):
                    z = j * stride - padding + q * dilation
                    if z < 0 or z >= in_width:
                        continue
                    taps += 1
                    for s in range(words):
                        word = x[b, y, z, s]
                        for o in range(outputs):
                            differing[o] += _popcount(word ^ w[p, q, s, o])  # pyright: ignore[reportCallIssue]
            for o in range(outputs):
                out[b, i, j, o] = n * taps - 2 * np.int64(differing[o])


def conv(
    x: np.ndarray,
    w: np.ndarray,
    n: int,
    stride: int,
    padding: int,
    dilation: int,
    height: int,
    width: int,
    *,
    threads: int,
) -> np.ndarray:
    """x: uint64 (B, H, W, words); w: uint64 (kh, kw, words, O); n: channels -> int32 (B, height, width, O)."""
    out = np.empty((x.shape[0], height, width, w.shape[-1]), np.int32)
    previous = get_num_threads()
    set_num_threads(min(threads, NUMBA_NUM_THREADS))
    try:
        _conv(x, w, n, stride, padding, dilation, out)
    finally:
        set_num_threads(previous)
    return out
