"""Contact sheets of every stand-in, to be looked at: python -m common.data.sheets --out FOLDER [name ...]"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from common.data import digits, faces, longtail, objects, presentation_attacks, scenes, shapes
from common.data.dataset import Dataset

COUNT = 40


def _grid(images: Tensor, zoom: int) -> Tensor:
    """(n, C, H, W) in 0..1 (clipped) -> one uint8 (3, H', W') image, 10 per row."""
    rgb = images.clamp(0, 1).expand(-1, 3, -1, -1)
    rgb = rgb.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    return (make_grid(rgb, nrow=10, padding=2, pad_value=0.3) * 255).round().to(torch.uint8)


def _sheet(data: Dataset, zoom: int = 4, scale: float = 1.0) -> Tensor:
    """The first images sorted by class; below them, where there are masks, the same with the mask in red."""
    picked = data.subset(data.targets[:COUNT].argsort(stable=True))
    plain = _grid(picked.images * scale, zoom)
    if picked.masks is None:
        return plain
    shown = (picked.images * scale).clamp(0, 1).expand(-1, 3, -1, -1)
    bytes_ = (shown * 255).to(torch.uint8)
    tinted = [draw_segmentation_masks(i, m, alpha=0.5, colors="red") for i, m in zip(bytes_, picked.masks, strict=True)]
    return torch.cat([plain, _grid(torch.stack(tinted).float() / 255, zoom)], dim=1)


def _boxes(background: str) -> Tensor:
    made = shapes.shape_scenes(20, seed=0, background=background)
    side = max(max(i.shape[:2]) for i in made.images)
    tiles = torch.full((len(made), 3, side, side), 80, dtype=torch.uint8)
    for k, image in enumerate(made.images):
        found = [a for a in made.coco["annotations"] if a["image_id"] == k + 1]
        boxes = torch.tensor([a["bbox"] for a in found]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = [shapes.SHAPES[a["category_id"] - 1][0] for a in found]
        drawn = torch.from_numpy(image).permute(2, 0, 1)
        if found:
            drawn = draw_bounding_boxes(drawn, boxes, labels, colors="white", label_colors="white")
        tiles[k, :, : image.shape[0], : image.shape[1]] = drawn
    return _grid(tiles.float() / 255, 2)


def _digits_lt() -> Tensor:
    train, _ = digits.split_per_class(seed=0, permute_classes=True)
    counts = longtail.long_tail_counts(100, 50, 10)
    return _sheet(train.subset(longtail.subsample(train.targets, counts, seed=0)[::10]))


def _attacks() -> Tensor:
    """A row of five live faces or attacks of one kind: colour, then depth, then infrared."""
    made = presentation_attacks.spoof_faces(80, split="train", size=64)
    rows = []
    for kind in range(1 + len(presentation_attacks.ATTACKS)):
        five = made.images[made.extra["attack"] == kind][:5]
        rows += [five[:, part].expand(-1, 3, -1, -1) for part in presentation_attacks.CHANNELS.values()]
    return (make_grid(torch.cat(rows), nrow=15, padding=2, pad_value=0.3) * 255).round().to(torch.uint8)


def _faces() -> Tensor:
    """A row per expression, with its name: eight faces, then the same with the visible skin in red and what hides it in blue."""
    made = faces.expression_faces(7 * 8, split="train", size=64, occluded=0.5, busy=0.5)
    rows = []
    for target, name in enumerate(faces.EXPRESSIONS):
        part = made.subset((made.targets == target).nonzero()[:, 0])
        label = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(label).text((2, 26), name, fill="black")
        rows.append(torch.from_numpy(np.array(label)).permute(2, 0, 1)[None].float() / 255)
        truth = torch.stack([part.masks, part.extra["occluder"]], 1)  # type: ignore[list-item]
        bytes_ = (part.images * 255).to(torch.uint8)
        tinted = [
            draw_segmentation_masks(i, m, alpha=0.5, colors=["red", "blue"]) for i, m in zip(bytes_, truth, strict=True)
        ]
        rows += [part.images, torch.stack(tinted).float() / 255]
    tiles = torch.cat(rows).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return (make_grid(tiles, nrow=17, padding=2, pad_value=0.3) * 255).round().to(torch.uint8)


_digits = partial(objects.digits_on_backgrounds, COUNT, split="train")
_objects = partial(objects.objects_on_backgrounds, COUNT, split="train")
SHEETS: dict[str, Callable[[], Tensor]] = {
    "digits_lt": _digits_lt,
    "noisy_digits": lambda: _sheet(scenes.noisy_digits(standardise=False)[0]),
    "cued_digits": lambda: _sheet(scenes.cued_digits(COUNT, split="train"), scale=0.5),
    "digit_grids": lambda: _sheet(scenes.digit_grids(COUNT, split="train")),
    "digits_rho0": lambda: _sheet(_digits()),
    "digits_rho1": lambda: _sheet(_digits(rho=1.0)),
    "digits_inverted": lambda: _sheet(_digits(inverted=True)),
    "digits_photos": lambda: _sheet(_digits(background="photos", size=32, channels=3, rho=1.0), zoom=3),
    "objects_rho1": lambda: _sheet(_objects(rho=1.0)),
    "objects_colour": lambda: _sheet(_objects(size=32, channels=3), zoom=3),
    "objects_photos": lambda: _sheet(_objects(background="photos", size=32, channels=3), zoom=3),
    "faces": _faces,
    "presentation_attacks": _attacks,
    "shapes": lambda: _boxes("noise"),
    "shapes_photos": lambda: _boxes("photos"),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m common.data.sheets", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(SHEETS)} (default all)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the PNG files")
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - set(SHEETS):
        parser.error(f"unknown {', '.join(sorted(unknown))}; choose from {', '.join(SHEETS)}")
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.names or SHEETS:
        picture = SHEETS[name]().permute(1, 2, 0).numpy()
        Image.fromarray(picture).save(given.out / f"{name}.png")
        print(given.out / f"{name}.png")


if __name__ == "__main__":
    main()
