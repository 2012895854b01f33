"""Live faces and presentation attacks as colour, depth and infrared, with the exact place of the cue.

An attack replaces a region of the face. In that region depth and infrared give it away clearly, and colour only by a texture
and a cast of about the strength of the sensor noise; the same textures, casts, frames and reflections lie on live images
too, elsewhere.
| attack  | region                     | depth         | infrared             | colour                        |
|---------|----------------------------|---------------|----------------------|-------------------------------|
| print   | the face or a part of it   | a bent sheet  | paper: bright, flat  | fine dots, cold cast, flatter |
| replay  | the whole frame            | a plane       | screen: nearly dark  | moire, cold cast, reflection  |
| mask    | the face less eyes, mouth  | a shell       | another material     | warm cast, flatter            |
| glasses | the eyes                   | a flat band   | dark or bright       | printed eyes: fine dots       |
Exercises: fusion of a weak and two strong modalities, guidance of one by the place that another shows, unseen attacks and
domains, rates per attack. Cannot show: real sensors, materials or makers of attacks, or how hard any of them is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.data.dataset import Dataset
from common.data.faces import (
    CHUNK,
    SPLITS,
    Rendered,
    check_size,
    expressions,
    face_stream,
    identities,
    lights,
    poses,
    render,
    scenery,
    sense,
)

ATTACKS = ("print", "replay", "mask", "glasses")
# The cast of a medium in red, green, blue, in units of the cue; on live faces that of print, beside the face.
_CASTS = {
    "live": (-0.7, 0.1, 0.7), "print": (-0.7, 0.1, 0.7), "replay": (-0.5, -0.1, 0.6), "mask": (0.7, -0.3, -0.4),
    "glasses": (-0.5, -0.5, 0.0),
}  # fmt: skip
CHANNELS = {"rgb": slice(0, 3), "depth": slice(3, 4), "ir": slice(4, 5)}


@dataclass(frozen=True)
class Domain:
    """Where and of whom images are taken. albedo: range of the skin's tone, 0 light .. 1 dark; brightness: range of the light;
    noise, depth_noise, ir_noise: standard deviations; holes: share of depth pixels that are missing (0); ir_gain: range."""

    albedo: tuple[float, float] = (0.0, 1.0)
    brightness: tuple[float, float] = (0.8, 1.15)
    noise: float = 0.04
    depth_noise: float = 0.03
    ir_noise: float = 0.04
    holes: float = 0.01
    ir_gain: tuple[float, float] = (0.9, 1.1)


DOMAINS = {
    "studio": Domain(),
    "office": Domain(brightness=(0.55, 0.95), noise=0.06, depth_noise=0.05, ir_gain=(0.7, 0.95)),
    "street": Domain(brightness=(0.5, 1.35), noise=0.05, depth_noise=0.06, holes=0.05, ir_noise=0.07, ir_gain=(0.6, 1.3)),
    "light": Domain(albedo=(0.0, 0.3)),
    "medium": Domain(albedo=(0.35, 0.65)),
    "dark": Domain(albedo=(0.7, 1.0)),
}  # fmt: skip


def spoof_faces(
    n: int,
    *,
    split: str,
    seed: int = 0,
    size: int = 48,
    domain: str | Domain = "studio",
    attacks: Sequence[str] = ATTACKS,
    live: float = 0.5,
    subjects: int = 100,
    cue: float = 1.0,
) -> Dataset:
    """Triplets of live faces and attacks: images (n, 5, size, size) in 0..1, channels by `CHANNELS`; targets 1 live, 0 attack.

    split: "train", "validation" or "test": independent streams and other subjects. domain: a name of `DOMAINS` or a `Domain`
    (cross-domain protocols train on one and test on another). attacks: species to draw from in equal shares (leave one out for
    a protocol of unseen attacks). live: share of live faces. subjects: identities of the split. cue: strength of the
    texture in colour, relative to 0.05.
    Depth is 0 far .. 1 near, with holes of 0. masks: where the attack is (empty for live faces). extra["attack"]: 0 live, else
    1 + index into `ATTACKS`; extra["subject"]: identity, unique over splits; extra["face"]: the oval of the face.
    Raises ValueError for an unknown domain or attack, or a parameter out of range.
    """
    check_size(n, size)
    if isinstance(domain, str):
        if domain not in DOMAINS:
            raise ValueError(f"domain must be one of {tuple(DOMAINS)} or a Domain, got {domain!r}")
        domain = DOMAINS[domain]
    if unknown := [a for a in attacks if a not in ATTACKS] or ([] if attacks else ["none"]):
        raise ValueError(f"attacks must be some of {ATTACKS}, got {unknown[0]!r}")
    if not 0 <= live <= 1 or subjects < 1 or cue < 0:
        raise ValueError(f"needs live in 0..1, subjects >= 1, cue >= 0; got {live=}, {subjects=}, {cue=}")
    rng = face_stream(seed, split)
    people = identities(subjects, rng, domain.albedo)
    subject = rng.integers(subjects, size=n)
    species = np.array([1 + ATTACKS.index(a) for a in attacks])
    attack = np.where(rng.permutation(n) < round(live * n), 0, species[rng.integers(len(species), size=n)])
    targets = expressions(rng.choice([3, 4, 6, 6, 6], n), rng)
    p = {k: v[subject] for k, v in people.items()} | poses(n, rng) | lights(n, rng, domain.brightness) | targets
    images = np.empty((n, 5, size, size), np.float32)
    where, face = np.empty((n, size, size), bool), np.empty((n, size, size), bool)
    for start in range(0, n, CHUNK):
        at = slice(start, min(start + CHUNK, n))
        part = {name: value[at] for name, value in p.items()}
        background = scenery(len(attack[at]), size, rng)
        drawn = render(part, background, rng)
        face[at] = drawn.face > 0.5
        where[at] = _present(drawn, attack[at], face[at], 0.05 * cue, rng)
        images[at] = _capture(drawn, domain, rng)
    extra = {"attack": attack, "subject": subject + SPLITS.index(split) * subjects, "face": face}
    return Dataset(
        torch.from_numpy(images),
        torch.from_numpy((attack == 0).astype(np.int64)),
        torch.from_numpy(where),
        {name: torch.from_numpy(value) for name, value in extra.items()},
    )


def _present(
    drawn: Rendered, attack: np.ndarray, face: np.ndarray, strength: float, rng: np.random.Generator
) -> np.ndarray:
    """Turn faces into attacks, in place; returns where (k, H, W) bool."""
    k, height, width = face.shape
    x, y = drawn.x, drawn.y
    draw = lambda low, high: rng.uniform(low, high, (k, 1, 1)).astype(np.float32)  # noqa: E731
    kind = np.array(["live", *ATTACKS])[attack][:, None, None]

    turn = draw(-np.pi, np.pi)
    part = np.cos(turn) * x + np.sin(turn) * y < draw(0.0, 1.0)  # a half to all of the face
    eyes = (np.abs(y + 0.12) < 0.2) & (np.abs(x) < 0.68)
    openings = ((np.abs(np.abs(x) - 0.32) < 0.17) & (np.abs(y + 0.12) < 0.11)) | (
        x * x / 0.06 + (y - 0.5) ** 2 / 0.012 < 1
    )
    regions = {"print": face & part, "replay": np.ones_like(face), "mask": face & ~openings, "glasses": face & eyes}
    where = np.zeros_like(face)
    for name, region in regions.items():
        where |= region & (kind == name)

    # Colour. The textures lie on every image: on the attack, or on a part of a live face's surroundings or body.
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    step, tilt = draw(2.2, 3.2), draw(-0.5, 0.5)
    dots = np.sin(2 * np.pi / step * (columns + tilt * rows)) * np.sin(2 * np.pi / step * (rows - tilt * columns))
    moire = np.sin(2 * np.pi * (columns * draw(0.05, 0.16) + rows * draw(-0.16, 0.16) + draw(0, 1)))
    texture = np.where(kind == "replay", 0.7 * moire, dots) * (kind != "mask")
    elsewhere = (np.cos(turn) * x + np.sin(turn) * y > draw(0.2, 0.9)) & ~face
    on = where | ((kind == "live") & elsewhere)
    drawn.canvas[:, :3] += strength * (texture * on)[:, None]
    cast = np.array([_CASTS[name] for name in kind[:, 0, 0]], np.float32)[..., None, None]
    drawn.canvas[:, :3] += strength * cast * on[:, None]
    flat = where & (kind != "replay")
    mean = drawn.canvas[:, :3].mean(axis=(2, 3), keepdims=True)
    drawn.canvas[:, :3] += (0.12 * flat)[:, None] * (mean - drawn.canvas[:, :3])
    frame = eyes & ~((np.abs(np.abs(x) - 0.33) < 0.25) & (np.abs(y + 0.12) < 0.15))
    framed = (kind == "glasses") | ((kind == "live") & (draw(0, 1) < 0.25))  # honest glasses look the same in colour
    drawn.canvas[:, :3] *= 1 - 0.5 * (frame & framed & face)[:, None]
    spot = np.exp(-((x - draw(-0.8, 0.8)) ** 2 + (y - draw(-0.8, 0.8)) ** 2) / 0.05)
    glare = (kind == "replay") | (draw(0, 1) < 0.4)
    drawn.canvas[:, :3] += 3 * strength * (spot * glare)[:, None]

    # Depth and infrared, at the same place.
    sheet = draw(0.5, 0.7) + draw(-0.1, 0.1) * x + draw(-0.1, 0.1) * y
    bent = sheet + draw(0.0, 0.15) * (1 - (np.cos(turn) * x + np.sin(turn) * y) ** 2)
    shell = 0.52 + 0.40 * drawn.ball
    depth = np.select(
        [kind == "print", kind == "replay", kind == "mask", kind == "glasses"], [bent, sheet, shell, sheet + 0.15]
    )
    drawn.depth[where] = depth[where]
    skin = drawn.canvas[:, 3]
    either = np.where(draw(0, 1) < 0.5, draw(0.12, 0.3), draw(0.85, 0.98))
    paper, screen = draw(0.7, 0.9) + 0.15 * (skin - 0.5), draw(0.03, 0.1) + 0.2 * spot
    infrared = np.select([kind == "print", kind == "replay"], [paper, screen], either * (0.7 + 0.3 * drawn.ball))
    drawn.canvas[:, 3] = np.where(where, infrared, skin)
    return where


def _capture(drawn: Rendered, domain: Domain, rng: np.random.Generator) -> np.ndarray:
    """(k, 5, H, W): what the three sensors of a domain make of it."""
    k = len(drawn.depth)
    colour = sense(drawn.canvas[:, :3], rng, domain.noise)
    depth = sense(drawn.depth[:, None], rng, domain.depth_noise)
    depth *= rng.random(depth.shape) >= domain.holes
    gain = rng.uniform(*domain.ir_gain, (k, 1, 1, 1)).astype(np.float32)
    return np.concatenate([colour, depth, sense(drawn.canvas[:, 3:] * gain, rng, domain.ir_noise)], axis=1)
