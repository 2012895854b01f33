"""Reference photographs with graded distortions: the embedded stand-in for LIVE, or the same made of a person's own
photographs.

It exercises what the attack needs: models of quality that are competent on JPEG, JPEG 2000, white noise and blur of
real photographs, and test images of known order. It cannot show agreement with human opinion: the pseudo-MOS is the gradient
magnitude similarity deviation from the undistorted crop, so that models learn to imitate a full-reference measure."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from common.data.backgrounds import PHOTOGRAPHS, photographs
from common.data.files import find_images, identity, readable
from iqa_attack.fidelities.fidelity import grey, ssim
from iqa_attack.photographs.images import from_bytes, read_image, to_bytes

SCENES = ("astronaut", "chelsea", "coffee", "rocket", "camera", "china.jpg", "flower.jpg")
LEVELS = {  # mildest first (ours; the types are those of LIVE)
    "jpeg": (60, 30, 15, 8, 4), "jp2k": (8, 16, 32, 64, 110), "wn": (5, 10, 20, 35, 60), "gblur": (0.6, 1.0, 1.6, 2.5, 4.0),
}  # fmt: skip
TYPES = tuple(LEVELS)
MIN_CONTRAST = 25.0
ANNOTATORS = ("psnr", "ssim_1", "ssim_2", "ssim_4", "gmsd")


@dataclass(frozen=True)
class QualitySet:
    """N images with quality. images: uint8 (3, H, W) or the path of a file; mos (N,) in 0..10, larger = better (NaN:
    unknown).

    std (N,): of the opinions; group (N,): index of the content; source (N,): index of the data set, pairs are formed
    within one; fr (N, 5): full-reference values (ANNOTATORS) where the undistorted image is known. identity: what the files
    are, for `Run.open`; upright: whether files are turned by their EXIF orientation."""

    images: Sequence[Any]
    mos: Tensor
    names: list[str]
    std: Tensor
    group: Tensor
    fr: Tensor | None = None
    source: Tensor | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    upright: bool = True

    def __len__(self) -> int:
        return len(self.images)

    def image(self, i: int) -> Tensor:
        """Image i, uint8 (3, H, W)."""
        image = self.images[i]
        return to_bytes(read_image(image, upright=self.upright)) if isinstance(image, Path) else image

    def stack(self) -> Tensor:
        """All images (N, 3, H, W) in 0..1. ValueError if they differ in size."""
        images = [self.image(i) for i in range(len(self))]
        if len({tuple(i.shape) for i in images}) > 1:
            raise ValueError("the images differ in size, they cannot form one batch")
        return from_bytes(torch.stack(images))

    def sources(self) -> Tensor:
        """(N,), zeros for a single data set."""
        return torch.zeros(len(self), dtype=torch.long) if self.source is None else self.source


def subset(data: QualitySet, index: Sequence[int] | Tensor) -> QualitySet:
    """The images with these indices."""
    i = torch.as_tensor(index, dtype=torch.long)
    images, names = [data.images[k] for k in i.tolist()], [data.names[k] for k in i.tolist()]
    fr, source = (None if t is None else t[i] for t in (data.fr, data.source))
    mos, std, group = data.mos[i], data.std[i], data.group[i]
    return QualitySet(images, mos, names, std, group, fr, source, data.identity, data.upright)


class _Photo:
    """A photograph as a key of a cache."""

    def __init__(self, pixels: np.ndarray):
        self.pixels, self.key = pixels, hashlib.sha256(pixels.tobytes()).digest()

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Photo) and self.key == other.key


def distort(image: np.ndarray, kind: str, level: float, rng: np.random.Generator) -> np.ndarray:
    """image uint8 (H, W, 3) -> the same, distorted.

    level: JPEG quality, JPEG 2000 rate, noise or blur deviation in gray levels or pixels."""
    if kind == "wn":
        return np.clip(np.round(image + rng.normal(0, level, image.shape)), 0, 255).astype(np.uint8)
    return _without_chance(_Photo(image), kind, level)


@lru_cache(maxsize=128)
def _without_chance(photo: _Photo, kind: str, level: float) -> np.ndarray:
    image = photo.pixels
    if kind == "jpeg" or kind == "jp2k":
        buffer = io.BytesIO()
        if kind == "jpeg":
            Image.fromarray(image).save(buffer, "JPEG", quality=int(level))
        else:
            Image.fromarray(image).save(buffer, "JPEG2000", quality_mode="rates", quality_layers=[level])
        return np.asarray(Image.open(buffer).convert("RGB"))
    if kind == "gblur":
        return np.round(gaussian_filter(image.astype(np.float64), (level, level, 0), mode="reflect")).astype(np.uint8)
    raise ValueError(f"distortion {kind!r}, allowed: {', '.join(TYPES)}")


@torch.no_grad()
def full_reference(x: Tensor, x0: Tensor) -> Tensor:
    """(B, 5), larger = better: PSNR, grey SSIM at scales 1, 1/2, 1/4, and minus GMSD of x against x0 (B, 3, H, W) in 0..1."""
    psnr = -10 * ((x - x0) ** 2).mean((1, 2, 3)).clamp(min=1e-10).log10()
    a, b, values = grey(x), grey(x0), [psnr]
    for _ in range(3):
        values.append(ssim(a, b))
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return torch.stack([*values, -gradient_deviation(grey(x), grey(x0))], 1)


def gradient_deviation(x: Tensor, y: Tensor, c: float = 170.0) -> Tensor:
    """GMSD (B,) of grey x, y (B, 1, H, W) in 0..1 (Xue et al. 2014): standard deviation of the similarity of gradient magnitudes
    (Prewitt, on means of 2 x 2 pixels in 0..255); 0: no difference."""
    prewitt = x.new_tensor([[1.0, 0.0, -1.0]] * 3)[None, None] / 3
    kernels = torch.cat([prewitt, prewitt.transpose(2, 3)])
    a, b = (F.conv2d(F.avg_pool2d(255 * v, 2), kernels, padding=1).pow(2).sum(1).sqrt() for v in (x, y))
    return ((2 * a * b + c) / (a**2 + b**2 + c)).flatten(1).std(1)


def pseudo_mos(fr: Tensor) -> Tensor:
    """10 exp(-GMSD / 0.12) of `full_reference` rows: in 0..10 without a clamp, the levels here spread from about 1 to 9.

    GMSD and no SSIM: it ranks noise against blur and compression more as people do, whom the published models learned from."""
    return 10 * (fr[:, ANNOTATORS.index("gmsd")] / 0.12).exp()


def places(photo: np.ndarray, n: int, size: int, rng: np.random.Generator) -> list[tuple[slice, slice]]:
    """At most n crops of a photograph (H, W, 3) that do not overlap, from a grid at a random offset.

    Crops of a grey deviation below MIN_CONTRAST (sky, out of focus) are left out. ValueError if none remains."""
    h, w = photo.shape[:2]
    y0, x0 = (int(rng.integers(0, side % size + 1)) for side in (h, w))
    grid = [
        (slice(y, y + size), slice(x, x + size))
        for y in range(y0, h - size + 1, size)
        for x in range(x0, w - size + 1, size)
    ]
    grid = [g for g in grid if photo[g].mean(2).std() > MIN_CONTRAST]
    if not grid:
        raise ValueError(
            f"a photograph of {h} x {w} pixels holds no crop of {size} pixels with enough contrast: use others"
        )
    return [grid[i] for i in rng.permutation(len(grid))[:n]]


def embedded() -> list[np.ndarray]:
    """The photographs that ship inside scikit-image and scikit-learn, uint8 (H, W, 3)."""
    photos = photographs()
    return [photos[PHOTOGRAPHS.index(n)] for n in SCENES]


def _pixels(path: Path) -> np.ndarray:
    return to_bytes(read_image(path)).permute(1, 2, 0).numpy()


def usable(root: str | Path) -> list[Path]:
    """The photographs below a folder that can be used."""
    found = find_images(root)
    return [found[i] for i in readable(found)]


def scenes(
    root: str | Path | None, seed: int, *, test: int, reduce: int, size: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(training, test) photographs uint8 (H, W, 3); which are tested depends on the seed.

    Photographs are reduced by `reduce` where two crops of `size` remain on the short side: it removes the traces of
    their compression.

    root: a folder of pristine photographs; null: those that ship inside scikit-image and scikit-learn."""
    base = embedded() if root is None else [_pixels(p) for p in usable(root)]
    if not 0 < test < len(base):
        raise ValueError(f"data.test_photos={test}, allowed with {len(base)} photographs: 1..{len(base) - 1}")
    order = np.random.default_rng([seed, 1]).permutation(len(base))

    def smaller(photo: np.ndarray) -> np.ndarray:
        smaller_size = (photo.shape[1] // reduce, photo.shape[0] // reduce)
        return (
            photo
            if min(photo.shape[:2]) < 2 * size * reduce
            else np.asarray(Image.fromarray(photo).resize(smaller_size, Image.Resampling.LANCZOS))
        )

    tested = [smaller(base[i]) for i in order[:test]]
    return [smaller(base[i]) for i in order[test:]], tested


VERSIONS = [(kind, i) for kind in TYPES for i in range(len(LEVELS[kind]))]


def crops(photos: Sequence[np.ndarray], *, per_photo: int, size: int, seed: int) -> list[tuple[int, int, Any]]:
    """(photograph, crop, place) of `per_photo` crops of every photograph."""
    found = [places(p, per_photo, size, np.random.default_rng([seed, g, 0])) for g, p in enumerate(photos)]
    return [(g, c, cut) for g, cuts in enumerate(found) for c, cut in enumerate(cuts)]


def graded(
    photos: Sequence[np.ndarray],
    *,
    per_photo: int,
    size: int,
    seed: int,
    label: str,
    chosen: Sequence[int] | None = None,
) -> QualitySet:
    """All types and levels of `per_photo` crops of every photograph, in the order photograph, crop, type, level; or the images
    with the indices `chosen` alone, the same as among all.

    The whole photograph is distorted and then cut, as a codec needs more than a crop to work on."""
    images, clean, names, group = [], [], [], []
    cuts, made = crops(photos, per_photo=per_photo, size=size, seed=seed), {}
    for index in range(len(cuts) * len(VERSIONS)) if chosen is None else chosen:
        (g, c, cut), (kind, i) = cuts[index // len(VERSIONS)], VERSIONS[index % len(VERSIONS)]
        if (g, kind, i) not in made:
            rng = np.random.default_rng([seed, g, 1 + TYPES.index(kind), i])
            made[g, kind, i] = distort(photos[g], kind, LEVELS[kind][i], rng)
        images.append(torch.from_numpy(made[g, kind, i][cut].copy()).permute(2, 0, 1))
        clean.append(torch.from_numpy(photos[g][cut].copy()).permute(2, 0, 1))
        names.append(f"{label}{g}_{c}_{kind}{i + 1}")
        group.append(g)
        if c == 0 and (kind, i) == VERSIONS[0]:  # a photograph done: its versions are not needed again
            made = {k: v for k, v in made.items() if k[0] == g}
    parts = zip(torch.stack(images).split(64), torch.stack(clean).split(64), strict=True)
    fr = torch.cat([full_reference(from_bytes(a), from_bytes(b)) for a, b in parts])
    mos = pseudo_mos(fr)
    return QualitySet(images, mos, names, torch.full_like(mos, 0.5), torch.tensor(group), fr)


def graded_photos(
    *, seed: int, root: str | None = None, size: int = 96, reduce: int = 1, test_photos: int = 3, crops_per_photo: int = 12,
    test_images: int = 12, parts: Sequence[str] = ("train", "test", "attack"),
) -> dict[str, QualitySet]:  # fmt: skip
    """{"train", "test", "attack"}, or the parts asked for: all types and levels of the training and of the test crops, and the
    test images that are attacked.

    "attack" holds one distorted image of each of `test_images` test crops, types in turn, levels spread over the
    five. The photographs of test and attack are not in train."""
    rng = np.random.default_rng([seed, 2])
    train, test = scenes(root, seed, test=test_photos, reduce=reduce, size=size)
    available = len(crops(test, per_photo=crops_per_photo, size=size, seed=2 * seed + 1))
    of_train = partial(graded, train, per_photo=crops_per_photo, size=size, seed=2 * seed, label="train")
    of_test = partial(graded, test, per_photo=crops_per_photo, size=size, seed=2 * seed + 1, label="test")
    if available < test_images:
        raise ValueError(f"{available} test crops, data.test_images={test_images}: more photographs or smaller crops")
    level = np.concatenate([rng.permutation(5) for _ in range(-(-test_images // 5))])
    chosen = [
        int(crop) * len(VERSIONS) + 5 * (i % len(TYPES)) + int(level[i])
        for i, crop in enumerate(rng.permutation(available)[:test_images])
    ]
    make = {"train": of_train, "test": of_test, "attack": partial(of_test, chosen=chosen)}
    found = {part: make[part]() for part in parts}
    source = identity("photos") if root is None else identity("photo_folder", usable(root), root=root)
    return {name: replace(data, identity=source) for name, data in found.items()}
