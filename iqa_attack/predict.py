"""Scores of photographs by the models of a checkpoint, or by a published one; writes a CSV (or JSON).

python predict.py weights=runs/default/all/seed0/last.ckpt images=photos/
python predict.py weights=brisque_model_live.yml kind=brisque images=photo.png
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor

from common.data.files import Table, find_images
from common.scripts import script
from iqa_attack.evaluate import load_weights
from iqa_attack.photographs.data import resized
from iqa_attack.photographs.images import read_image
from iqa_attack.quality_models.models import KINDS, Models


def batches(paths: Sequence[Path], size: int, left_out: list[str]) -> Iterator[tuple[list[Path], Tensor]]:
    """(files, images (b, 3, H, W) in 0..1) of at most `size` neighbours of one size; files that cannot be scored as they are
    (broken, constant, not 8 bit: every conversion would change the score) are added to left_out."""
    files: list[Path] = []
    images: list[Tensor] = []
    for path in paths:
        try:
            x = read_image(path)
            if float(x.amin()) == float(x.amax()):
                raise ValueError(f"{path} is constant: natural scene statistics are not defined for it")
        except ValueError as error:
            left_out.append(str(error))
            continue
        if images and (len(images) == size or x.shape != images[0].shape):
            yield files, torch.stack(images)
            files, images = [], []
        files.append(path)
        images.append(x)
    if images:
        yield files, torch.stack(images)


def rows_of(models: Models, sides: dict[str, int | None], files: list[Path], x: Tensor) -> list[dict]:
    """{path, model, score, raw} per image and model: score on 0..10, raw on the model's own scale. ValueError for images that are
    too small for a model."""
    found = {}
    for name, scored in models.items():
        side = sides[name]
        seen = x if side is None else torch.stack([resized(image, side) for image in x])
        if min(seen.shape[2:]) < scored.minimum:  # type: ignore[operator]
            raise ValueError(f"{x.shape[3]} x {x.shape[2]} pixels, {name} needs {scored.minimum} on each side")
        raw = scored.model(seen)  # type: ignore[operator]
        found[name] = list(zip(scored.scale(raw).tolist(), raw.tolist(), strict=True))  # type: ignore[operator]
    return [
        {"path": path, "model": name, "score": f"{values[i][0]:.4f}", "raw": f"{values[i][1]:.6g}"}
        for i, path in enumerate(files)
        for name, values in found.items()
    ]


@torch.no_grad()
def predict(cfg: DictConfig, fabric: Fabric) -> Path:
    """Writes cfg.out and returns its path; see configs/predict.yaml. SystemExit(1) at the end for images that were left out."""
    if cfg.batch_size < 1 or (cfg.resize is not None and cfg.resize < 24):
        raise ValueError(f"batch_size={cfg.batch_size}, allowed: >= 1; resize={cfg.resize}, allowed: >= 24 or null")
    if cfg.kind is not None and cfg.kind not in KINDS:
        raise ValueError(f"kind={cfg.kind}, allowed: {', '.join(KINDS)}, or null for a checkpoint of train.py")
    paths = find_images(cfg.images)
    models, sides, _ = load_weights(cfg)
    sides = {name: cfg.resize or side for name, side in sides.items()}
    models, left_out, done = models.to(fabric.device), [], 0
    with Table(cfg.out) as table:
        for files, x in batches(paths, cfg.batch_size, left_out):
            try:
                rows = rows_of(models, sides, files, x.to(fabric.device))
            except ValueError as error:
                left_out += [f"{path}: {error}" for path in files]
                continue
            done += len(files)
            for row in rows:
                table.write(row)
    for name, scored in models.items():
        print(f"{name}: {scored.calibration}")
    print(f"{done} images, {table.rows} rows: {table.out}")
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    if left_out:
        print(f"error: {len(left_out)} of {len(paths)} images were left out", file=sys.stderr)
        raise SystemExit(1)
    return table.out


main = script("predict", predict)


if __name__ == "__main__":
    main()
