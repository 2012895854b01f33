"""Images in and out: RGB in 0..1 on the 8-bit lattice, PNG files, and one clear error for everything else."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

MAX_PIXELS = 40_000_000  # an attack of a larger image would not fit any card


def read_image(path: str | Path, *, upright: bool = True, max_pixels: int = MAX_PIXELS) -> Tensor:
    """An image file as float (3, H, W) in 0..1 on the 8-bit lattice; grey ones repeated over the channels.

    upright: turned by its EXIF orientation, as a viewer shows it; False for a published set, whose files are taken as they
    are stored. Raises FileNotFoundError, or ValueError naming the file: corrupt, too large, more than 8 bits a channel, CMYK,
    or with transparent pixels (an opaque alpha channel is dropped). These are refused, as every conversion would change the
    scores silently."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no image {path}")
    try:
        with Image.open(path) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(
                    f"{path} has {image.width} x {image.height} pixels, allowed are {max_pixels:,}: reduce it first"
                )
            image.load()
            _refuse(path, image)
            turned = ImageOps.exif_transpose(image) if upright else image
            if turned.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                turned = turned.convert("RGBA")
                if np.asarray(turned)[..., 3].min() < 255:
                    raise ValueError(f"{path} has transparent pixels: put it on a background and save it as RGB first")
            pixels = np.asarray(turned.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot decode image {path}: {error}") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def _refuse(path: Path, image: Image.Image) -> None:
    if image.mode == "CMYK":
        raise ValueError(f"{path} is CMYK: convert it to 8-bit RGB first, the result depends on the colour profile")
    with path.open("rb") as file:
        head = file.read(26)
    deep = head[:8] == b"\x89PNG\r\n\x1a\n" and head[24] == 16  # Pillow would cut colour off to its upper 8 bits
    if deep or image.mode.startswith(("I", "F")):
        raise ValueError(
            f"{path} is no 8-bit image ({'16 bits' if deep else image.mode}): convert it to 8-bit RGB first"
        )


def write_png(path: str | Path, image: Tensor) -> None:
    """image (3, H, W) in 0..1. Raises ValueError for a name that does not end in .png: a lossy file loses the
    attack."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: an attacked image is written as .png; a lossy format destroys the perturbation")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(to_bytes(image).permute(1, 2, 0).numpy()).save(path)


def to_bytes(images: Tensor) -> Tensor:
    """(..., 3, H, W) in 0..1 -> uint8."""
    return (images.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """uint8 -> float in 0..1."""
    return images.float() / 255


def check_images(x: Tensor, minimum: int, who: str, *, flat: bool = False) -> None:
    """Raises ValueError unless x is (B, 3, H, W), floating, at least `minimum` on each side and not constant; flat: for a
    network, which is defined for constant images as well (a crop of a compressed sky is one)."""
    if x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
        raise ValueError(f"{who} takes RGB images (B, 3, H, W) in 0..1, got {tuple(x.shape)} of {x.dtype}")
    if min(x.shape[2:]) < minimum:
        raise ValueError(
            f"{who} needs images of at least {minimum} x {minimum} pixels, got {x.shape[2]} x {x.shape[3]}"
        )
    if flat or torch.compiler.is_exporting():  # a graph cannot branch on pixels
        return
    constant = (x.detach().flatten(1).amax(1) == x.detach().flatten(1).amin(1)).nonzero()
    if len(constant):
        raise ValueError(
            f"image {int(constant[0])} of the batch is constant: {who} is not defined for it (0/0 in its statistics)"
        )


def luma(x: Tensor, weights: Sequence[float] = (0.2989, 0.5870, 0.1140)) -> Tensor:
    """(B, 3, H, W) in 0..1 -> (B, 1, H, W) in 0..255, not rounded: rounding has no gradient."""
    return 255 * (x * x.new_tensor(weights).view(1, 3, 1, 1)).sum(1, keepdim=True)
