"""Backgrounds for the procedural scenes: oriented sine textures, cloudy noise, crops of library photographs.

All take a numpy Generator and return float32 arrays in 0..1, (N, C, size, size).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_image

# Ship inside scikit-image; nothing is downloaded. The order is part of the generators' determinism.
_SKIMAGE = (
    "astronaut", "chelsea", "coffee", "rocket", "camera", "coins", "brick", "grass", "gravel", "moon",
    "hubble_deep_field", "immunohistochemistry",
)  # fmt: skip
PHOTOGRAPHS = (*_SKIMAGE, "china.jpg", "flower.jpg")


@lru_cache(maxsize=1)
def photographs() -> tuple[np.ndarray, ...]:
    """The photographs named in PHOTOGRAPHS, uint8 (H, W, 3), grey ones repeated over the channels."""
    raw = [np.asarray(getattr(skimage.data, name)()) for name in _SKIMAGE]
    raw += [load_sample_image(name) for name in PHOTOGRAPHS[len(_SKIMAGE) :]]
    return tuple(np.repeat(p[:, :, None], 3, axis=2) if p.ndim == 2 else p[:, :, :3] for p in raw)


@lru_cache(maxsize=4)
def _reduced(side: int) -> tuple[np.ndarray, ...]:
    """The photographs with the short side reduced to `side` pixels, float32 (3, H, W) in 0..1."""
    out = []
    for photo in photographs():
        scale = side / min(photo.shape[:2])
        size = (max(side, round(photo.shape[1] * scale)), max(side, round(photo.shape[0] * scale)))
        small = np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
        out.append(np.ascontiguousarray(small.transpose(2, 0, 1)) / 255)
    return tuple(out)


def photo_crops(
    which: np.ndarray, size: int | tuple[int, int], rng: np.random.Generator, *, channels: int = 3
) -> np.ndarray:
    """Crops at random places, one per entry of `which` (index into PHOTOGRAPHS); size: side or (H, W).

    A photograph is first reduced to a short side of three crops, so that a crop shows a recognisable part.
    Raises ValueError for channels other than 1 or 3 (1: the mean of the colours).
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    h, w = (size, size) if isinstance(size, int) else size
    out = np.empty((len(which), channels, h, w), dtype=np.float32)
    where = rng.random((len(which), 2))
    for p, photo in enumerate(_reduced(3 * max(h, w))):
        rows = np.flatnonzero(which == p)
        if channels == 1:
            photo = photo.mean(axis=0, keepdims=True)
        room = np.array([photo.shape[1] - h + 1, photo.shape[2] - w + 1])
        y, x = (where[rows] * room).astype(np.int64).T
        views = np.lib.stride_tricks.sliding_window_view(photo, (h, w), axis=(1, 2))
        out[rows] = views[:, y, x].transpose(1, 0, 2, 3)
    return out


def sine_textures(
    which: np.ndarray, kinds: int, size: int, rng: np.random.Generator, *, channels: int = 1
) -> np.ndarray:
    """Sine gratings; `which` (N,) in 0..kinds-1 fixes orientation and frequency, the phase is random.

    Kind c has the angle pi c / kinds and 2 or 3 cycles per image in turn (so that neighbours in angle
    differ in frequency too). With 3 channels every image gets a random tint, which says nothing about the
    kind.
    """
    angle = np.pi * which / kinds
    cycles = 2.0 + which % 2
    phase = rng.uniform(0, 2 * np.pi, len(which))
    grid = (np.arange(size) + 0.5) * (2 * np.pi / size)
    wave = (
        (cycles * np.sin(angle))[:, None, None] * grid[:, None]
        + (cycles * np.cos(angle))[:, None, None] * grid
        + phase[:, None, None]
    )
    grey = (0.5 + 0.5 * np.sin(wave.astype(np.float32)))[:, None]
    if channels == 1:
        return grey
    return grey * rng.uniform(0.4, 1.0, (len(which), channels, 1, 1)).astype(np.float32)


def cloud_noise(
    n: int, size: tuple[int, int], rng: np.random.Generator, *, cell: int = 8, grain: float = 0.06
) -> np.ndarray:
    """Tinted clouds with grain, (n, 3, H, W): random values on a grid of `cell` pixels, joined linearly, plus
    uniform grain of half-width `grain` per pixel. Values in 0.15..0.85 before the grain, clipped to 0..1."""
    h, w = size
    coarse = rng.random((n, 1, h // cell + 2, w // cell + 2), dtype=np.float32)
    clouds = np.ascontiguousarray(_join(_join(coarse.swapaxes(2, 3), h, cell).swapaxes(2, 3), w, cell))
    tint = rng.uniform(0.15, 0.6, (n, 3, 1, 1)).astype(np.float32)
    # Bytes are several times cheaper than floats, and images are stored as bytes anyway.
    noise = np.frombuffer(rng.bytes(n * 3 * h * w), dtype=np.uint8).reshape(n, 3, h, w)
    out = clouds * np.float32(0.25) + tint
    out += noise * np.float32(2 * grain / 255)
    out -= np.float32(grain)
    return np.clip(out, 0, 1, out=out)


def _join(values: np.ndarray, length: int, cell: int) -> np.ndarray:
    """float32 values (..., length // cell + 2) on a grid of `cell` pixels, joined linearly along the last axis -> (..., length).

    Rounded like fused multiply-adds, but no matrix product: the kernels that a BLAS picks for a processor add in different
    orders. A last bit is enough to move a pixel by a grey level, and a training from the first step on."""
    left, near, far = _between(length, cell)
    first = near * values[..., left]
    return (first + far.astype(np.float64) * values[..., left + 1]).astype(np.float32)


@lru_cache(maxsize=32)
def _between(length: int, cell: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(index of the grid value before each pixel, its weight, the weight of the value behind it), each (length,)."""
    at = (np.arange(length) + 0.5) / cell
    left = at.astype(np.int64)
    return left, (1 - (at - left)).astype(np.float32), (1 - (left + 1 - at)).astype(np.float32)
