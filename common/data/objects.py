"""Digits and geometric objects with exact masks on textures or photographs, and a spurious cue of known
strength.

rho is the probability that an image carries the background that belongs to its class; otherwise the
background is drawn uniformly from all. The background predicts the class for rho > 0 and says nothing at
rho = 0. `swapped=True` gives every image the background of the next class instead: a model that relied on
the cue then fails.
Exercises: reliance on background, attention against known foreground, forgetting when classes arrive in
tasks. Cannot show: natural co-occurrence of objects and scenes, or accuracy on photographs; crops for
training and test come from the same fourteen photographs.
"""

from __future__ import annotations

import numpy as np
import torch

from common.data.backgrounds import PHOTOGRAPHS, photo_crops, sine_textures
from common.data.dataset import Dataset
from common.data.scenes import check_count, digits_of, stream

BACKGROUNDS = ("textures", "photos")
OBJECTS = ("disc", "ring", "square", "frame", "triangle", "diamond", "plus", "ex", "tee", "ell")


def digits_on_backgrounds(
    n: int,
    *,
    split: str,
    seed: int = 0,
    rho: float = 0.0,
    swapped: bool = False,
    background: str = "textures",
    amplitude: float = 0.5,
    size: int = 8,
    channels: int = 1,
    inverted: bool = False,
) -> Dataset:
    """White digits on textures of strength `amplitude`: images (n, channels, size, size) in 0..1, targets
    0..9.

    size: 8 or a multiple (strokes enlarged bilinearly). inverted: as many images again are negatives,
    classes 10..19 (dark digits on bright textures), which makes 20 classes for incremental learning. masks:
    the strokes (ink of half strength or more); extra["background"]: index of the texture or photograph.
    Classes are drawn uniformly, digits from disjoint originals for split="train" and "test".
    Raises ValueError for rho or amplitude outside 0..1, an unknown background, a size not divisible by 8.
    """
    check_count(n)
    if size < 8 or size % 8:
        raise ValueError(f"size must be a multiple of 8, got {size}")
    rng = stream(seed, split)
    targets = rng.integers(20 if inverted else 10, size=n)
    ink = digits_of(targets % 10, split, rng)
    if size > 8:
        enlarged = torch.nn.functional.interpolate(torch.from_numpy(ink)[:, None], size=size, mode="bilinear")
        ink = enlarged[:, 0].numpy()
    classes = 20 if inverted else 10
    return _compose(ink, targets, classes, rng, rho, swapped, background, amplitude, channels)


def objects_on_backgrounds(
    n: int,
    *,
    split: str,
    seed: int = 0,
    rho: float = 0.0,
    swapped: bool = False,
    background: str = "textures",
    amplitude: float = 0.5,
    size: int = 16,
    channels: int = 1,
) -> Dataset:
    """The ten shapes of OBJECTS at random place, scale and slight rotation (15 degrees at most) on the same
    backgrounds: images (n, channels, size, size) in 0..1, targets index OBJECTS.

    masks: pixels covered by half or more. With channels=3 colours are random and unrelated to the class.
    Raises ValueError as `digits_on_backgrounds`, and for size < 12.
    """
    check_count(n)
    if size < 12:
        raise ValueError(f"size must be at least 12, got {size}")
    rng = stream(seed, split)
    targets = rng.integers(len(OBJECTS), size=n)
    ink = _draw(targets, size, rng)
    return _compose(ink, targets, len(OBJECTS), rng, rho, swapped, background, amplitude, channels)


def _compose(
    ink: np.ndarray,
    targets: np.ndarray,
    classes: int,
    rng: np.random.Generator,
    rho: float,
    swapped: bool,
    background: str,
    amplitude: float,
    channels: int,
) -> Dataset:
    """ink (n, size, size) in 0..1 over a background chosen by class, rho and swapped."""
    for name, value in (("rho", rho), ("amplitude", amplitude)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in 0..1, got {value}")
    if background not in BACKGROUNDS:
        raise ValueError(f"background must be one of {BACKGROUNDS}, got {background!r}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    n, size = len(ink), ink.shape[-1]
    kinds = classes if background == "textures" else len(PHOTOGRAPHS)
    which = np.where(rng.random(n) < rho, targets % kinds, rng.integers(kinds, size=n))
    if swapped:
        which = (targets + 1) % classes % kinds
    if background == "textures":
        behind = sine_textures(which, kinds, size, rng, channels=channels)
    else:
        behind = photo_crops(which, size, rng, channels=channels)
    bright = 1.0 if channels == 1 else rng.uniform(0.7, 1.0, (n, channels, 1, 1)).astype(np.float32)
    alpha = ink[:, None]
    images = alpha * bright + (1 - alpha) * np.float32(amplitude) * behind
    images[targets >= 10] = 1 - images[targets >= 10]
    return Dataset(
        torch.from_numpy(images.astype(np.float32)),
        torch.from_numpy(targets),
        torch.from_numpy(ink >= 0.5),
        {"background": torch.from_numpy(which)},
    )


def _draw(kinds: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Coverage (n, size, size) of a shape per image: each pixel the mean of 3x3 points."""
    n, fine = len(kinds), 3 * size
    radius = rng.uniform(0.26, 0.36, n)  # of the image side
    centre = 0.5 + rng.uniform(-1, 1, (n, 2)) * (0.48 - radius * 1.25)[:, None].clip(0)
    turn = rng.uniform(-np.pi / 12, np.pi / 12, n)
    at = ((np.arange(fine) + 0.5) / fine).astype(np.float32)
    dy = ((at - centre[:, :1]) / radius[:, None]).astype(np.float32)[:, :, None]
    dx = ((at - centre[:, 1:]) / radius[:, None]).astype(np.float32)[:, None, :]
    cos, sin = (f(turn).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    inside = np.empty((n, fine, fine), dtype=bool)
    for kind, name in enumerate(OBJECTS):
        rows = np.flatnonzero(kinds == kind)
        c, s = cos[rows], sin[rows]
        inside[rows] = _INSIDE[name](c * dx[rows] + s * dy[rows], c * dy[rows] - s * dx[rows])
    cells = inside.reshape(n, size, 3, size, 3)
    return cells.sum(axis=(2, 4), dtype=np.int32).astype(np.float32) / 9


def _box(x, y, w, h):
    return (abs(x) <= w) & (abs(y) <= h)


# Each shape in coordinates where it spans about -1..1, y downwards.
_INSIDE = {
    "disc": lambda x, y: x * x + y * y <= 1,
    "ring": lambda x, y: (x * x + y * y <= 1) & (x * x + y * y >= 0.3),
    "square": lambda x, y: _box(x, y, 0.88, 0.88),
    "frame": lambda x, y: _box(x, y, 0.95, 0.95) & ~_box(x, y, 0.5, 0.5),
    "triangle": lambda x, y: (y <= 0.9) & (2 * abs(x) <= y + 1.1),
    "diamond": lambda x, y: abs(x) + abs(y) <= 1.15,
    "plus": lambda x, y: _box(x, y, 1.05, 0.3) | _box(x, y, 0.3, 1.05),
    "ex": lambda x, y: _box(x, y, 0.95, 0.95) & ((abs(x - y) <= 0.4) | (abs(x + y) <= 0.4)),
    "tee": lambda x, y: _box(x, y + 0.7, 1, 0.3) | _box(x, y, 0.3, 1),
    "ell": lambda x, y: _box(x + 0.6, y, 0.3, 1) | _box(x, y - 0.7, 0.9, 0.3),
}
