"""Align faces as the paper's data are: five landmarks to the 112 x 112 template of ArcFace and face.evoLVe, by a similarity.

python align.py landmarks=points.csv root=photos/ out=aligned/ [size=224]

points.csv: path,x1,y1,...,x5,y5 in pixels of the upright image: left eye, right eye, tip of the nose, left and right corner of
the mouth, as seen in the image. No detector is included; any that gives five points will do (the paper: MTCNN)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from lightning_fabric import Fabric
from omegaconf import DictConfig
from PIL import Image
from skimage.transform import SimilarityTransform, warp

from common.data.files import number, open_image, read_table
from common.scripts import script

TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


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


def read_landmarks(table: str | Path) -> dict[str, np.ndarray]:
    """{path as listed, and file name: points (5, 2)} of a CSV of path,x1,y1,...,x5,y5. ValueError naming file and line; a file
    name that two rows share is only known by its path."""
    return {name: row.reshape(5, 2) for name, row in _read(table, 10, "ten numbers").items()}


def read_boxes(table: str | Path) -> dict[str, np.ndarray]:
    """The same of a CSV of path,left,top,right,bottom: boxes (4,) in pixels of the upright image. ValueError for an empty one."""
    found = _read(table, 4, "left, top, right, bottom")
    if empty := [name for name, (left, top, right, bottom) in found.items() if right <= left or bottom <= top]:
        raise ValueError(f"{table}: the face box of {empty[0]} is empty")
    return found


def _read(table: str | Path, numbers: int, what: str) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    names: Counter[str] = Counter()
    for line, row in read_table(Path(table).expanduser()):
        if row[0].lower() == "path":
            continue
        where = f"{table}, line {line}"
        if len(row) != numbers + 1:
            raise ValueError(f"{where}: expected a path and {what}, got {len(row)} columns")
        found[row[0]] = np.array([number(v, where) for v in row[1:]])
        names[Path(row[0]).name] += 1
    return found | {Path(p).name: row for p, row in found.items() if names[Path(p).name] == 1}


def rows_of(table: Mapping[str, np.ndarray], paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """{str(path): its row} of a table of `read_landmarks` or `read_boxes`: the row whose listed path is the end of the image's;
    by the file name alone only where no other of the images has it. Images without a row are left out."""
    names, found = Counter(p.name for p in paths), {}
    for path in paths:
        whole = path.absolute()
        ends = [whole.as_posix(), *("/".join(whole.parts[k:]) for k in range(1, len(whole.parts)))]
        for end in ends[:-1] if names[path.name] > 1 else ends:
            if end in table:
                found[str(path)] = table[end]
                break
    return found


def align_all(cfg: DictConfig) -> int:
    """Aligns every listed face below cfg.out; returns their number."""
    done, root, out = 0, Path(cfg.root).expanduser(), Path(cfg.out).expanduser()
    listed = [row[0] for _, row in read_table(Path(cfg.landmarks).expanduser()) if row[0].lower() != "path"]
    points = read_landmarks(cfg.landmarks)
    for name in listed:
        face = align(np.asarray(open_image(root / name)), points[name], size=cfg.size)
        target = out / Path(name).relative_to(Path(name).anchor)
        if ".." in Path(name).parts:
            raise ValueError(f"{cfg.landmarks}: {name} leaves the folder root={cfg.root}")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(face).save(target)
        done += 1
    return done


@script("align")
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    print(f"{align_all(cfg)} faces in {cfg.out}")


if __name__ == "__main__":
    main()
