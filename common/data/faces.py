"""Parametric faces: one renderer for colour, depth and infrared, with exact masks of what is face and what is not.

A face is an ellipsoid with a nose, shaded by one light; brows, eyes and mouth are drawn on its surface and follow the pose.
`expression_faces` gives seven expressions with occluders, and surroundings that can have as much contrast as the face;
presentation attacks are in `common.data.presentation_attacks`.
Exercises: fine local cues in a few patches, distractors with known masks, pose, light and skin tone, class imbalance.
Cannot show: natural skin, hair, wrinkles and identity, the ambiguity of real expressions and labels, alignment errors of
a detector, or anything about fairness; photographs behind the heads are the same fourteen for every split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.data.backgrounds import PHOTOGRAPHS, cloud_noise, photo_crops
from common.data.dataset import Dataset
from common.data.scenes import check_count

EXPRESSIONS = ("anger", "disgust", "fear", "sadness", "happiness", "surprise", "neutral")
SPLITS = ("train", "validation", "test")
CHUNK = 32  # faces drawn together: their planes stay in cache

# The full expressions, relative to neutral. Lengths in units of half a head's height, slopes in v per u (v points down).
_TRAITS = ("raise", "slope", "open", "curve", "gape", "lips", "teeth", "wrinkle")
_FULL = {  # brow raise, outward slope of the brow, eye opening, corners up, mouth opening, half width of the mouth, teeth, folds
    "anger": (-0.09, -0.45, 0.72, -0.05, 0.050, 0.25, 1.0, 0.5),
    "disgust": (-0.06, -0.20, 0.50, -0.08, 0.020, 0.23, 0.0, 1.0),
    "fear": (0.09, 0.35, 1.35, -0.04, 0.085, 0.28, 0.5, 0.0),
    "sadness": (0.01, 0.50, 0.65, -0.12, 0.000, 0.23, 0.0, 0.2),
    "happiness": (0.02, 0.05, 0.75, 0.13, 0.085, 0.36, 1.0, 0.5),
    "surprise": (0.17, 0.05, 1.50, 0.01, 0.190, 0.17, 0.0, 0.0),
    "neutral": (0.0, 0.05, 1.0, 0.0, 0.0, 0.26, 0.0, 0.0),
}
_TWO_BYTES = ((256**2 - 1) / 6) ** 0.5  # standard deviation of the sum of two uniform bytes
_EYE_V, _BROW_V, _MOUTH_V = -0.12, -0.36, 0.48
_LIGHT_SKIN, _DARK_SKIN = np.array([0.94, 0.76, 0.66]), np.array([0.36, 0.23, 0.17])
_HAIR = np.array([[0.10, 0.08, 0.07], [0.25, 0.15, 0.09], [0.42, 0.27, 0.14], [0.78, 0.62, 0.36], [0.62, 0.60, 0.58]])

Parameters = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Rendered:
    """k faces: canvas (k, 4, H, W) = red, green, blue, infrared; depth (k, H, W), 0 far .. 1 near; face (k, H, W) 0..1, the
    skin oval; fringe (k, H, W) 0..1, the hair before it; x, y (k, H, W): coordinates of the head (half its height is 1, y points
    down); ball (k, H, W): the height of the bare ellipsoid, 0..1; pixels (k, 1, 1): pixels per unit."""

    canvas: np.ndarray
    depth: np.ndarray
    face: np.ndarray
    fringe: np.ndarray
    x: np.ndarray
    y: np.ndarray
    ball: np.ndarray
    pixels: np.ndarray


def expression_faces(
    n: int,
    *,
    split: str,
    seed: int = 0,
    size: int = 48,
    occluded: float = 0.5,
    busy: float = 0.0,
    counts: Sequence[int] | None = None,
    noise: float = 0.04,
) -> Dataset:
    """Seven expressions on random heads before photographs and clouds: images (n, 3, size, size) in 0..1.

    targets: index into `EXPRESSIONS`. split: "train", "validation" or "test", independent streams. counts: images per class,
    None for equal shares (the first classes get the remainder). occluded: share of images with one to three occluders (dark
    glasses, surgical mask, hand, patterned cards), which together hide at most 30 % of the face. busy: share of images around
    whose faces a texture lies, on scenery, hair and clothes, that brings them to the contrast of the face (mean square of
    the gradient), so that contrast alone does not tell the face. noise: standard deviation of the sensor noise.
    Expressions come at 45 to 100 % of their full strength, so that weak ones resemble neutral.
    masks: visible skin of the face. extra["background"]: everything else that does not hide (hair, also over the forehead,
    and clothes too); extra["occluder"]: what hides; the three partition the image. extra["busy"] (n,): those images.
    Raises ValueError for a parameter out of range or counts that do not sum to n.
    """
    check_size(n, size)
    for name, share in (("occluded", occluded), ("busy", busy), ("noise", noise)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be in 0..1, got {share}")
    classes = len(EXPRESSIONS)
    per_class = [n // classes + (c < n % classes) for c in range(classes)] if counts is None else [*counts]
    if len(per_class) != classes or sum(per_class) != n or min(per_class) < 0:
        raise ValueError(f"counts must be {classes} numbers that sum to n = {n}, got {per_class}")
    rng = face_stream(seed, split)
    targets = rng.permutation(np.repeat(np.arange(classes), per_class))
    p = _legible(identities(n, rng) | poses(n, rng)) | lights(n, rng) | expressions(targets, rng)
    hidden, textured = rng.random(n) < occluded, rng.random(n) < busy
    images = np.empty((n, 3, size, size), np.float32)
    face, occluder = np.empty((n, size, size), bool), np.empty((n, size, size), bool)
    for start in range(0, n, CHUNK):
        at = slice(start, min(start + CHUNK, n))
        part = {name: value[at] for name, value in p.items()}
        drawn = render(part, scenery(len(part["roll"]), size, rng), rng)
        face[at] = (drawn.face > 0.5) & (drawn.fringe <= 0.5)
        _equal_contrast(drawn.canvas[:, :3], face[at], textured[at], rng)
        occluder[at] = _occlude(drawn, face[at], hidden[at], part, rng)
        images[at] = sense(drawn.canvas[:, :3], rng, noise)
    arrays = (images, targets, face & ~occluder, ~face & ~occluder, occluder, textured)
    tensors = [torch.from_numpy(a) for a in arrays]
    return Dataset(*tensors[:3], extra=dict(zip(("background", "occluder", "busy"), tensors[3:], strict=True)))


# ------------------------------------------------------------------------------------------------------- parameters
def check_size(n: int, size: int) -> None:
    check_count(n)
    if size < 24:
        raise ValueError(f"a face needs at least 24 pixels, got size={size}")


def face_stream(seed: int, split: str) -> np.random.Generator:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    return np.random.default_rng([seed, SPLITS.index(split), 7])


def identities(n: int, rng: np.random.Generator, albedo: tuple[float, float] = (0.0, 1.0)) -> Parameters:
    """What belongs to a person. albedo: range of the skin's tone, 0 light .. 1 dark."""
    tone = rng.uniform(*albedo, (n, 1))
    skin = ((1 - tone) * _LIGHT_SKIN + tone * _DARK_SKIN) * rng.uniform(0.93, 1.06, (n, 3))
    hair = _HAIR[rng.choice(len(_HAIR), n, p=[0.34, 0.26, 0.18, 0.12, 0.10])] * rng.uniform(0.85, 1.15, (n, 1))
    return {
        "skin": skin, "hair": hair, "cloth": rng.uniform(0.1, 0.9, (n, 3)),
        "width": rng.uniform(0.70, 0.79, n), "taper": rng.uniform(0.12, 0.34, n),
        "ink": hair, "slit": np.full(n, 0.008),
        "gap": rng.uniform(0.29, 0.35, n), "eye": rng.uniform(0.95, 1.15, n), "iris": rng.uniform(0.05, 0.45, n),
        "nose": rng.uniform(0.8, 1.2, n), "brow": rng.uniform(0.032, 0.058, n), "lip": rng.uniform(0.030, 0.050, n),
        "hairline": np.where(rng.random(n) < 0.1, -1.5, rng.uniform(-0.82, -0.52, n)),
        "fringe": rng.uniform(0.3, 1.1, n), "long": np.where(rng.random(n) < 0.4, rng.uniform(0.3, 1.0, n), -0.2),
    }  # fmt: skip


def _legible(people: Parameters) -> Parameters:
    """The same people as in an aligned crop, the head filling the frame, and with brows and mouths that 48 pixels resolve:
    thicker, darker than the skin whatever the hair, a line between closed lips, hair that leaves the brows free."""
    wide = {"brow": 1.5 * people["brow"], "lip": 1.3 * people["lip"], "slit": 2.5 * people["slit"]}
    bald = people["hairline"] < -1
    line = np.where(bald, people["hairline"], 0.8 * people["hairline"] - 0.25)
    return people | wide | {
        "scale": 1.2 * people["scale"], "ink": np.minimum(people["hair"], 0.65 * people["skin"]), "hairline": line,
        "fringe": 0.4 * people["fringe"],
    }  # fmt: skip


def poses(n: int, rng: np.random.Generator) -> Parameters:
    """Where the head is (in half frames) and where it looks; one frame of a video has one."""
    return {
        "scale": rng.uniform(0.74, 0.88, n), "left": rng.uniform(-0.09, 0.09, n), "down": rng.uniform(-0.05, 0.09, n),
        "roll": rng.normal(0, 0.08, n).clip(-0.2, 0.2), "yaw": rng.uniform(-0.28, 0.28, n), "pitch": rng.uniform(-0.12, 0.12, n),
        "gaze": rng.uniform(-0.03, 0.03, n),
    }  # fmt: skip


def lights(n: int, rng: np.random.Generator, brightness: tuple[float, float] = (0.8, 1.15)) -> Parameters:
    angle, tilt = rng.uniform(-1.1, 1.1, n), rng.uniform(-0.7, 0.2, n)
    ambient = rng.uniform(0.3, 0.6, n)
    return {
        "light_x": np.sin(angle) * np.cos(tilt), "light_y": np.sin(tilt), "light_z": np.cos(angle) * np.cos(tilt),
        "ambient": ambient, "diffuse": (1.12 - ambient) * rng.uniform(0.85, 1.1, n),
        "tint": rng.uniform(0.92, 1.08, (n, 3)) * rng.uniform(*brightness, (n, 1)),
    }  # fmt: skip


def expressions(targets: np.ndarray, rng: np.random.Generator) -> Parameters:
    """Traits of the expressions `targets` (n,), at 45 to 100 % of their strength and with a jitter of every trait."""
    full = np.array([_FULL[name] for name in EXPRESSIONS])
    strength = rng.uniform(0.45, 1.0, (len(targets), 1))
    traits = full[-1] + strength * (full[targets] - full[-1])
    jitter = rng.normal(0, [0.015, 0.06, 0.06, 0.012, 0.008, 0.015, 0.1, 0.1], (len(targets), len(_TRAITS)))
    traits = traits + jitter
    traits[:, [4, 6, 7]] = traits[:, [4, 6, 7]].clip(0)
    return dict(zip(_TRAITS, traits.T, strict=True))


def scenery(n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """(n, 3, size, size) in 0..1: photographs and clouds in equal shares."""
    out = cloud_noise(n, (size, size), rng, cell=max(4, size // 6))
    photos = np.flatnonzero(rng.random(n) < 0.5)
    if len(photos):
        out[photos] = photo_crops(rng.integers(len(PHOTOGRAPHS), size=len(photos)), size, rng)
    return out


# --------------------------------------------------------------------------------------------------------- rendering
def render(p: Parameters, background: np.ndarray, rng: np.random.Generator) -> Rendered:
    """Faces of the parameters p before `background` (k, 3, H, W)."""
    k, _, height, width = background.shape
    q = {name: value.astype(np.float32)[..., None, None] for name, value in p.items()}
    pixels = q["scale"] * (height / 2)
    x, y = _head_coordinates(q, height, width)
    half = q["width"] * (1 - q["taper"] * np.clip(y, 0, 1) ** 2)
    nx = x / half
    r2 = nx * nx + y * y
    ball = np.sqrt(np.clip(1 - r2, 0, 1))
    face = np.clip((1 - r2) * (0.5 * pixels) + 0.5, 0, 1)
    u, v = x - q["yaw"] * ball, y - q["pitch"] * ball  # on the surface: what stands out moves more when the head turns
    side = np.abs(u)

    grey = background.mean(axis=1)
    canvas = np.concatenate([background, 0.25 * grey[:, None]], axis=1)
    person = _body(canvas, q, x, y, pixels)
    depth = np.where(person > 0.5, np.float32(0.35), 0.08 + 0.06 * grey)

    # Hair behind the head, then skin, hair before it.
    hair = _ink(q["hair"], 0.3)
    behind = _soft(1.12 - np.sqrt((x / (q["width"] * 1.05)) ** 2 + (y + 0.05) ** 2), pixels)
    behind *= _soft(np.where(q["hairline"] < -1, np.float32(-2), q["long"]) - y, pixels)
    _paint(canvas, behind, hair)
    _paint(canvas, face, _ink(q["skin"], 0.72))
    cheeks = np.exp(-(((side - 0.42) / 0.2) ** 2) - ((v - 0.2) / 0.2) ** 2)
    _paint(
        canvas,
        0.25 * face * cheeks,
        _ink(q["skin"] * np.array([1.05, 0.72, 0.70], np.float32)[None, :, None, None], 0.72),
    )
    nose = 0.22 * q["nose"] * np.exp(-((u / 0.13) ** 2) - ((v - 0.12) / 0.2) ** 2)
    shade, infrared = _shading(q, nx, y, ball, nose, u, v)
    _brows_and_eyes(canvas, q, u, v, side, face, pixels)
    _mouth(canvas, q, u, v, face, pixels)
    _nose_and_folds(canvas, q, side, v, face, pixels)
    outward = (x / q["width"]) ** 2
    fringe = face * _soft(q["hairline"] + q["fringe"] * outward * outward - y, pixels)
    _paint(canvas, fringe, hair)

    head = np.maximum(face, behind)
    canvas[:, :3] *= q["tint"] * (1 + head[:, None] * (shade[:, None] - 1))
    canvas[:, 3] *= 1 + head * (infrared - 1)
    depth = depth + head * (np.where(face > 0.5, 0.40 + 0.40 * ball + 0.7 * nose, np.float32(0.38)) - depth)
    return Rendered(canvas, depth.astype(np.float32), face, fringe, x, y, ball, pixels)


def sense(images: np.ndarray, rng: np.random.Generator, noise: float) -> np.ndarray:
    """Add sensor noise of standard deviation `noise` and clip to 0..1. images: (k, C, H, W).

    The sum of two uniform bytes: a triangular density, several times cheaper than a Gaussian one."""
    dice = np.frombuffer(rng.bytes(2 * images.size), np.uint8).reshape(2, *images.shape)
    out = dice[0] * np.float32(noise / _TWO_BYTES)
    out += dice[1] * np.float32(noise / _TWO_BYTES)
    out += images - np.float32(255 * noise / _TWO_BYTES)
    return np.clip(out, 0, 1, out=out)


def _head_coordinates(q: Parameters, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    rows = ((np.arange(height, dtype=np.float32) + 0.5) * (2 / height) - 1)[None, :, None] - q["down"]
    columns = ((np.arange(width, dtype=np.float32) + 0.5) * (2 / width) - 1)[None, None, :] - q["left"]
    c, s = np.cos(q["roll"]) / q["scale"], np.sin(q["roll"]) / q["scale"]
    return c * columns + s * rows, c * rows - s * columns


def _soft(distance: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Antialiased coverage, 0..1: distance (in heads) inside an edge is positive."""
    return np.clip(distance * pixels + 0.5, 0, 1)


def _ink(colour: np.ndarray, infrared: float) -> np.ndarray:
    """(k, 3, 1, 1) -> (k, 4, 1, 1)"""
    return np.concatenate([colour, np.full_like(colour[:, :1], infrared)], axis=1)


def _paint(canvas: np.ndarray, alpha: np.ndarray, ink: np.ndarray | tuple[float, ...]) -> None:
    ink = np.asarray(ink, np.float32).reshape(1, 4, 1, 1) if isinstance(ink, tuple) else ink
    canvas += alpha[:, None] * (ink - canvas)


def _body(canvas: np.ndarray, q: Parameters, x: np.ndarray, y: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    neck = _soft(0.36 - np.abs(x), pixels) * _soft(y - 0.6, pixels)
    cloth = _soft(y - 1.12 - 0.35 * (x * x), pixels)
    _paint(canvas, neck, _ink(q["skin"] * np.float32(0.72), 0.45))
    _paint(canvas, cloth, _ink(q["cloth"], 0.4))
    return np.maximum(neck, cloth)


def _shading(q: Parameters, nx, ny, ball, nose, u, v) -> tuple[np.ndarray, np.ndarray]:
    """Lambert shading by the scene's light (colour) and by a lamp at the camera (infrared)."""
    across, along = nx + 1.3 * nose * (u / 0.13), ny + 1.3 * nose * ((v - 0.12) / 0.2)  # the nose tilts the normal
    length = np.sqrt(across**2 + along**2 + ball**2 + 1e-4)
    lambert = np.clip((q["light_x"] * across + q["light_y"] * along + q["light_z"] * ball) / length, 0, None)
    return q["ambient"] + q["diffuse"] * lambert, 0.35 + 0.65 * ball / length


def _brows_and_eyes(canvas: np.ndarray, q: Parameters, u, v, side, face, pixels) -> None:
    du, dv = side - q["gap"], v - _EYE_V
    across = np.clip(1 - (du / (0.17 * q["eye"])) ** 2, 0, None)
    lid = 0.085 * q["eye"] * np.clip(q["open"], 0.12, None) * across
    opening = _soft(lid - np.abs(dv), pixels) * (across > 0) * face
    _paint(canvas, 0.55 * face * _soft(0.045 - np.abs(dv + lid), pixels) * (across > 0.05), (0.12, 0.08, 0.07, 0.35))
    _paint(canvas, opening, (0.93, 0.92, 0.90, 0.55))
    looking = np.sqrt((du - np.sign(u) * q["gaze"]) ** 2 + dv**2)
    iris = _ink(q["iris"][:, None] * np.array([0.9, 0.8, 1.0], np.float32).reshape(1, 3, 1, 1), 0.3)
    _paint(canvas, opening * _soft(0.078 * q["eye"] - looking, pixels), iris)
    _paint(canvas, opening * _soft(0.035 * q["eye"] - looking, pixels), (0.02, 0.02, 0.02, 0.15))
    brow = _BROW_V - q["raise"] + q["slope"] * du + 0.9 * du * du
    alpha = _soft(q["brow"] - np.abs(v - brow), pixels) * _soft(0.2 - np.abs(du + 0.01), pixels) * face
    _paint(canvas, 0.9 * alpha, _ink(q["ink"] * np.float32(0.7), 0.3))


def _mouth(canvas: np.ndarray, q: Parameters, u, v, face, pixels) -> None:
    at = u / q["lips"]
    bow = np.clip(1 - at * at, 0, None)
    dv = v - (_MOUTH_V + q["curve"] * (1 - 1.6 * at * at) + 0.35 * q["gape"])
    inside = (np.abs(at) < 1) * face
    red = q["skin"] * np.array([0.92, 0.55, 0.55], np.float32)[None, :, None, None]
    _paint(canvas, _soft((q["gape"] + q["lip"]) * bow + 0.012 - np.abs(dv), pixels) * inside, _ink(red, 0.6))
    slit = np.maximum(q["gape"] * bow, q["slit"])
    hole = _soft(slit - np.abs(dv), pixels) * inside * face
    _paint(canvas, hole, (0.18, 0.05, 0.05, 0.2))
    teeth = np.clip(q["teeth"], 0, 1) * _soft(0.6 * slit - np.abs(dv + 0.25 * slit), pixels) * (q["gape"] > 0.015)
    _paint(canvas, hole * teeth, (0.95, 0.94, 0.90, 0.6))


def _nose_and_folds(canvas: np.ndarray, q: Parameters, side, v, face, pixels) -> None:
    nostril = _soft(0.035 - np.sqrt((side - 0.075 * q["nose"]) ** 2 + (1.6 * (v - 0.24)) ** 2), pixels)
    _paint(canvas, 0.6 * face * nostril, (0.15, 0.07, 0.06, 0.4))
    fold = _soft(0.018 - np.abs(side - 0.17 - 0.45 * (v - 0.2)), pixels) * _soft(0.14 - np.abs(v - 0.32), pixels)
    bridge = _soft(0.016 - np.abs(np.abs(v + 0.1) - 0.05), pixels) * _soft(0.1 - side, pixels)
    dark = np.clip(q["wrinkle"], 0, 1) * np.maximum(fold, bridge) * face
    _paint(canvas, 0.6 * dark, _ink(q["skin"] * np.float32(0.45), 0.5))


# --------------------------------------------------------------------------------------------------------- occluders
def _occlude(
    drawn: Rendered, face: np.ndarray, hidden: np.ndarray, p: Parameters, rng: np.random.Generator
) -> np.ndarray:
    """Paint one to three occluders on the canvases of `hidden` (k,); returns their exact masks (k, H, W)."""
    covered = np.zeros_like(face)
    limit = 0.3 * face.sum(axis=(1, 2))
    number = np.where(hidden, rng.integers(1, 4, len(face)), 0)
    for turn in range(3):
        at = np.flatnonzero(turn < number)
        shape, pattern = _occluder(drawn.x[at], drawn.y[at], face[at], p["skin"][at], rng)
        hides = ((covered[at] | shape) & face[at]).sum(axis=(1, 2))
        shape &= (hides <= limit[at])[:, None, None]  # one that would hide too much is left out
        drawn.canvas[at, :3] = np.where(shape[:, None], pattern, drawn.canvas[at, :3])
        covered[at] |= shape
    return covered


def _occluder(
    x: np.ndarray, y: np.ndarray, face: np.ndarray, skin: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One occluder a face: its mask (k, H, W) and its pattern (k, 3, H, W) of two colours, in waves or, of a hand, at its rim."""
    k = len(face)
    kind = rng.choice(["glasses", "mask", "hand", "card"], k, p=[0.2, 0.2, 0.2, 0.4])[:, None, None]
    draw = lambda low, high: rng.uniform(low, high, (k, 1, 1)).astype(np.float32)  # noqa: E731
    where, reach, turn = draw(0, 2 * np.pi), draw(0.1, 0.75), draw(-np.pi, np.pi)
    turn = np.where(kind == "hand", where + np.float32(np.pi) + 0.12 * turn, turn)  # fingers point inwards
    dx, dy = x - 0.7 * reach * np.cos(where), y - reach * np.sin(where)
    along, across = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
    card = (np.abs(along) < draw(0.25, 0.46)) & (np.abs(across) < draw(0.16, 0.3))
    lens = (np.abs(np.abs(x) - 0.32) < 0.25) & (np.abs(y - _EYE_V) < 0.16)
    glasses = lens | ((np.abs(x) < 0.74) & (np.abs(y - _EYE_V + 0.07) < 0.035))
    mask = face & (y > 0.34 + 0.1 * np.abs(x))
    inside = _hand(along, across)
    shape = np.where(kind == "glasses", glasses, np.where(kind == "mask", mask, card))
    shape = np.where(kind == "hand", inside > 0, shape)

    colours = rng.uniform(0, 1, (2, k, 3))
    flat = kind[:, :, 0]
    colours[:] = np.where(flat == "glasses", 0.15 * colours, colours)
    colours[:] = np.where(flat == "mask", [0.62, 0.78, 0.84] + 0.15 * colours, colours)
    colours[0] = np.where(flat == "hand", skin, colours[0])
    colours[1] = np.where(flat == "hand", 0.45 * skin, colours[1])
    phase = draw(10, 28) * np.where(kind == "mask", y, along) + draw(0, 6) * across
    blend = np.where(kind == "hand", np.clip(1 - inside / 0.04, 0, 1), 0.5 + 0.5 * np.sin(phase))[:, None]
    one, two = colours.astype(np.float32)[..., None, None]
    return shape, one + blend * (two - one)


def _hand(along: np.ndarray, across: np.ndarray) -> np.ndarray:
    """How far inside a spread hand a point is, negative outside; its palm is at 0, its fingers point to positive `along`."""

    def stroke(start: tuple[float, float], end: tuple[float, float], radius: float) -> np.ndarray:
        a, b = end[0] - start[0], end[1] - start[1]
        t = np.clip(((along - start[0]) * a + (across - start[1]) * b) / (a * a + b * b), 0, 1)
        return radius - np.hypot(along - start[0] - t * a, across - start[1] - t * b)

    inside = np.maximum(stroke((0, -0.06), (0, 0.06), 0.15), stroke((-0.1, 0), (-1.5, 0), 0.1))  # palm, wrist
    for angle, length in ((-0.42, 0.42), (-0.15, 0.5), (0.12, 0.48), (0.4, 0.38)):
        tip = (length * np.cos(angle), length * np.sin(angle))
        inside = np.maximum(inside, stroke((0.3 * tip[0], 0.1 * angle + 0.3 * tip[1]), tip, 0.042))
    return np.maximum(inside, stroke((-0.05, 0.12), (0.16, 0.36), 0.055))  # thumb


# ------------------------------------------------------------------------------------------------------ surroundings
def contrast(images: np.ndarray | torch.Tensor) -> np.ndarray:
    """Squared gradient of the grey values: images (k, C, H, W) -> (k, H, W), by differences to the right and below."""
    grey = np.asarray(images).mean(axis=1)
    right, below = np.zeros_like(grey), np.zeros_like(grey)
    right[..., :-1], below[:, :-1] = np.diff(grey, axis=2), np.diff(grey, axis=1)
    return right**2 + below**2


def _equal_contrast(canvas: np.ndarray, face: np.ndarray, which: np.ndarray, rng: np.random.Generator) -> None:
    """Add to everything outside `face` (k, H, W), of the images `which`, as much of a texture that its mean `contrast` is that of
    the inside; nothing where it has more already. canvas (k, 3, H, W), in place.

    The contrast of b + a t is a parabola in a: two points and its value at 0 give it."""
    which = np.flatnonzero(which)
    if not len(which):
        return
    base, face = canvas[which], face[which]
    texture = cloud_noise(len(which), face.shape[1:], rng, cell=2, grain=0.0).mean(axis=1, keepdims=True)
    texture = (texture - texture.mean(axis=(2, 3), keepdims=True)) * ~face[:, None]
    inner = face & np.roll(face, -1, 1) & np.roll(face, -1, 2)  # gradients that do not cross the outline
    outer = ~(face | np.roll(face, -1, 1) | np.roll(face, -1, 2))

    def mean(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return (contrast(image) * mask).sum(axis=(1, 2)) / mask.sum(axis=(1, 2)).clip(1)

    wanted, c = mean(base, inner), mean(base, outer)
    plus, minus = mean(base + texture, outer) - c, mean(base - texture, outer) - c
    a, b = (plus + minus) / 2, (plus - minus) / 2
    amount = (-b + np.sqrt(np.clip(b * b + 4 * a * (wanted - c), 0, None))) / (2 * a)
    amount = np.where(wanted > c, amount, 0)[:, None, None, None]
    canvas[which] = np.clip(base + amount * texture, 0, 1)
