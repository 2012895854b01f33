"""Align faces as the paper's data are: five landmarks to the 112 x 112 template of ArcFace and face.evoLVe, by a similarity.

python align.py landmarks=points.csv root=photos/ out=aligned/ [size=224]

points.csv: path,x1,y1,...,x5,y5 in pixels: left eye, right eye, tip of the nose, left and right corner of the mouth, as seen
in the image. No detector is included; any that gives five points will do (the paper: MTCNN)."""

import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.transform import SimilarityTransform, warp

from common.data.vision import open_image

TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
DEFAULTS = {"landmarks": "", "root": ".", "out": "aligned", "size": "224"}


def align(image: np.ndarray, points: np.ndarray, *, size: int = 224) -> np.ndarray:
    """image (H, W, 3) uint8, points (5, 2) as (x, y) -> (size, size, 3) uint8; what lies outside the image is black.

    Raises ValueError for points of another shape or that coincide."""
    points = np.asarray(points, dtype=float)
    if points.shape != (5, 2) or not np.isfinite(points).all():
        raise ValueError(f"five landmarks (x, y) are needed, got an array of {points.shape}")
    if np.ptp(points, axis=0).max() < 1:
        raise ValueError("the landmarks coincide")
    transform = SimilarityTransform.from_estimate(TEMPLATE * (size / 112), points)
    if not transform:
        raise ValueError(f"no similarity fits these landmarks: {points.tolist()}")
    return np.round(255 * warp(image, transform, output_shape=(size, size), order=1)).astype(np.uint8)


def main(args: list[str]) -> None:
    if odd := [a for a in args if "=" not in a]:
        raise SystemExit(f"{odd} is not of the form option=value")
    options = DEFAULTS | dict(a.split("=", 1) for a in args)
    if unknown := set(options) - set(DEFAULTS):
        raise SystemExit(f"unknown {sorted(unknown)}; known: {', '.join(DEFAULTS)}")
    table, root, out = Path(options["landmarks"]), Path(options["root"]), Path(options["out"])
    if not table.is_file():
        raise SystemExit(f"no landmarks at {table}; expected rows path,x1,y1,...,x5,y5")
    done = 0
    with table.open(newline="") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if not row or row[0] == "path":
                continue
            if len(row) != 11:
                raise SystemExit(f"{table}, line {number}: expected a path and ten numbers, got {len(row)} columns")
            points = np.array(row[1:], dtype=float).reshape(5, 2)
            face = align(np.asarray(open_image(root / row[0])), points, size=int(options["size"]))
            target = out / row[0]
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(face).save(target)
            done += 1
    print(f"{done} faces in {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
