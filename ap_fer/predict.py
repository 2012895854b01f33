"""Score faces: predictions as CSV or JSON, and pictures of which patches were dropped by APP and in every block.

python predict.py weights=runs/default/app_atp/seed0/last.ckpt images=[faces/,me.jpg] out=predictions.csv pictures=dropped/
python predict.py weights=APViT_RAF.pth images=photos/ landmarks=points.csv            # aligned as in align.py first
python predict.py weights=... images=photos/ boxes=boxes.csv                           # or cut out by face boxes
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from matplotlib.figure import Figure
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from ap_fer.align import align, read_boxes, read_landmarks, rows_of
from ap_fer.checkpoint import load
from ap_fer.pooling_vit import Kept
from ap_fer.token_selection import to_mask
from ap_fer.transforms import check_image, inference_transform
from common.data.files import ImageStream, Table, find_images, output_names, ranked
from common.scripts import script

DROPPED = np.array([0.84, 0.15, 0.55])  # a colour that no face has: dark pixels stay dark pixels


def overlay(image: Tensor, kept: Tensor) -> np.ndarray:
    """The image (3, S, S) in 0..1 with the dropped patches of kept (P,) in colour; (S, S, 3)."""
    side = round(len(kept) ** 0.5)
    full = (
        F.interpolate(kept.view(1, 1, side, side).float(), image.shape[-2:], mode="nearest")[0].permute(1, 2, 0).numpy()
    )
    pixels = image.permute(1, 2, 0).numpy()
    return full * pixels + (1 - full) * (0.25 * pixels + 0.75 * DROPPED)


def stages(kept: Kept, patches: int) -> list[tuple[str, Tensor]]:
    """(title, mask (B, P)) after APP and after every block that dropped something."""
    found = [("APP", to_mask(kept.app, patches))]
    for number, index in enumerate(kept.blocks, 1):
        if index.shape[1] < int(found[-1][1][0].sum()):
            found.append((f"block {number}", to_mask(index, patches)))
    return found


def draw(image: Tensor, title: str, columns: list[tuple[str, Tensor]], path: Path) -> None:
    """One picture: the image (3, S, S) in 0..1 under its prediction, then what stayed after every stage."""
    figure = Figure(figsize=(1.7 * (len(columns) + 1), 2.0), layout="constrained")
    axes = figure.subplots(1, len(columns) + 1, squeeze=False)[0]
    everything = torch.ones_like(columns[0][1])
    for axis, (name, mask) in zip(axes, [(title, everything), *columns], strict=True):
        axis.imshow(overlay(image, mask).clip(0, 1))
        axis.set_title(name if mask is everything else f"{name}: {int(mask.sum())} stay", fontsize=8)
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


Places = dict[str, np.ndarray] | None


def prepare(about: dict, points: Places = None, boxes: Places = None) -> Callable[[Image.Image], Tensor]:
    """PIL image -> (3, S, S) normalised as in training; the face is first aligned by its landmarks in `points`, or cut out by its
    box; both by str(path), see `rows_of`. ValueError for a face without."""
    transform = inference_transform(size=about["size"], normalise=about["normalise"])

    def of(image: Image.Image, table: dict[str, np.ndarray], what: str) -> np.ndarray:
        name = getattr(image, "filename", "")
        if name not in table:
            raise ValueError(f"no {what} for {name}")
        return table[name]

    def ready(image: Image.Image) -> Tensor:
        if points is not None:
            landmarks = of(image, points, "landmarks")
            image = Image.fromarray(align(np.asarray(image), landmarks, size=2 * about["size"]))
        elif boxes is not None:
            image = image.crop(tuple(of(image, boxes, "box").round().astype(int).tolist()))
        return transform(check_image(image))

    return ready


@torch.no_grad()
def predict(cfg: DictConfig, fabric: Fabric) -> Path:
    """Writes cfg.out (and pictures) and returns its path; see configs/predict.yaml."""
    trained = load(cfg.weights)
    classes, about = trained.about["classes"], trained.about
    if not 1 <= cfg.top <= len(classes):
        raise ValueError(f"top={cfg.top}, allowed: 1..{len(classes)}")
    if about["drawn"]:
        print("notice: this network was trained on drawn faces; photographs are new to it")
    model, paths = fabric.setup_module(trained.model), find_images(cfg.images)
    if cfg.landmarks and cfg.boxes:
        raise ValueError("give landmarks= or boxes=: landmarks align the face, they need no box")
    points = rows_of(read_landmarks(cfg.landmarks), paths) if cfg.landmarks else None
    boxes = rows_of(read_boxes(cfg.boxes), paths) if cfg.boxes else None
    stream = ImageStream(paths, prepare(about, points, boxes), batch_size=cfg.batch_size, workers=cfg.workers)
    names, drawn = output_names(paths), 0
    mean, std = (torch.tensor(about["normalise"][k]).view(3, 1, 1) for k in ("mean", "std"))
    with Table(cfg.out) as table:
        for files, images in stream:
            logits, kept = model(images.to(fabric.device), details=True)
            p = logits.float().softmax(1).cpu()
            for i, path in enumerate(files):
                rows = ranked(path, p[i], classes, cfg.top)
                for row in rows:
                    table.write(row)
                if cfg.pictures and kept is not None and drawn < cfg.most_pictures:
                    columns = [(title, mask[i].cpu()) for title, mask in stages(kept, trained.model.patches)]  # type: ignore[arg-type]
                    title = f"{path.name}\n{rows[0]['label']} {p[i].max():.2f}"
                    draw(
                        (images[i] * std + mean).clamp(0, 1), title, columns, Path(cfg.pictures) / f"{names[path]}.png"
                    )
                    drawn += 1
    print(f"{stream.done} faces: {table.out}" + (f", {drawn} pictures in {cfg.pictures}" if drawn else ""))
    stream.finish()
    return table.out


main = script("predict", predict)


if __name__ == "__main__":
    main()
