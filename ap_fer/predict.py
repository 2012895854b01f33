"""Score a folder of faces: predictions as csv, and pictures of which patches were dropped by APP and in every block.

python predict.py weights=runs/default/app_atp/seed0/last.ckpt                        test images of its data set
python predict.py weights=runs/.../last.ckpt images=[faces/,me.jpg] out=mine          files, and all images below a folder
python predict.py weights=APViT_RAF.pth set=raf_db images=[aligned/]
"""

import csv
from pathlib import Path

import hydra
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from ap_fer.data import build_data
from ap_fer.evaluate import load
from ap_fer.expressions import EXPRESSIONS
from ap_fer.pooling_vit import Kept
from ap_fer.token_selection import to_mask
from ap_fer.transforms import build_transforms, check_image, denormalise
from common.data.vision import open_image


def find_images(places: list[str]) -> list[Path]:
    """The images named, and those below the folders named, in sorted order. FileNotFoundError for a place without any."""
    found: list[Path] = []
    for place in places:
        path = Path(place).expanduser()
        below = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
        if not below:
            what = f"no image in {path}" if path.is_dir() else f"no file or folder {path}"
            raise FileNotFoundError(f"{what} (images={place}); expected {', '.join(IMG_EXTENSIONS)}")
        found += below
    return found


def overlay(image: Tensor, kept: Tensor) -> np.ndarray:
    """The image (3, S, S) in 0..1 with the dropped patches of kept (P,) nearly black; (S, S, 3)."""
    side = round(len(kept) ** 0.5)
    full = F.interpolate(kept.view(1, 1, side, side).float(), image.shape[-2:], mode="nearest")[0]
    return (image * (0.15 + 0.85 * full)).permute(1, 2, 0).numpy()


def stages(kept: Kept, patches: int) -> list[tuple[str, Tensor]]:
    """(title, mask (B, P)) after APP and after every block that dropped something."""
    found = [("APP", to_mask(kept.app, patches))]
    for number, index in enumerate(kept.blocks, 1):
        if index.shape[1] < int(found[-1][1][0].sum()):
            found.append((f"block {number}", to_mask(index, patches)))
    return found


@hydra.main(version_base="1.3", config_path="configs", config_name="predict")
@torch.no_grad()
def main(cfg: DictConfig) -> None:
    model, trained = load(cfg.weights, data_set=cfg.set, data=OmegaConf.to_container(cfg.data))  # type: ignore[arg-type]
    if cfg.images:
        places = [cfg.images] if isinstance(cfg.images, str) else list(cfg.images)
        paths = find_images(places)
        _, prepare = build_transforms("none", size=model.image_size)
        names, truth = [str(p) for p in paths], None
        images = torch.stack([prepare(check_image(open_image(p))) for p in paths])
    else:
        data = build_data(seed=trained.seed, **trained.data)
        if not 1 <= cfg.count <= len(data.test):  # type: ignore[arg-type]
            raise ValueError(f"count={cfg.count}, allowed: 1..{len(data.test)}")  # type: ignore[arg-type]
        first = len(data.test) - cfg.count  # type: ignore[arg-type]  # the last ones: parametric faces with occluders
        rows = [data.test[i] for i in range(first, len(data.test))]  # type: ignore[arg-type]
        names, images = [f"test {first + i}" for i in range(cfg.count)], torch.stack([r[0] for r in rows])
        truth = [int(r[1]) for r in rows]
    parts = [model(x, details=True) for x in images.split(cfg.batch_size)]
    probability = torch.cat([z for z, _ in parts]).softmax(1)
    out, classes = Path(cfg.out), EXPRESSIONS[: model.num_classes]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "expression", *(["truth"] if truth else []), *classes])
        for i, (name, p) in enumerate(zip(names, probability, strict=True)):
            known = [classes[truth[i]]] if truth else []
            writer.writerow([name, classes[int(p.argmax())], *known, *(f"{v:.4f}" for v in p.tolist())])
            print(
                f"{name}  {classes[int(p.argmax())]} {float(p.max()):.3f}" + (f"  (truth {known[0]})" if known else "")
            )
    print(f"predictions: {out / 'predictions.csv'}")
    shown, kept = images[: cfg.pictures], parts[0][1]
    if kept is None:
        return print("no pictures: this model has no transformer")
    columns = [(title, mask[: len(shown)]) for title, mask in stages(kept, model.patches)]
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (1.7 * (len(columns) + 1), 1.9 * len(shown))
    figure, axes = plt.subplots(len(shown), len(columns) + 1, figsize=size, squeeze=False)
    for i, image in enumerate(denormalise(shown)):
        everything = torch.ones(model.patches, dtype=torch.bool)
        for axis, (title, mask) in zip(axes[i], [("", everything), *((t, m[i]) for t, m in columns)], strict=True):
            axis.imshow(overlay(image, mask))
            label = classes[int(probability[i].argmax())]
            axis.set_title(f"{title}: {int(mask.sum())}" if title else label, fontsize=8)
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(out / "dropped_patches.png", dpi=120)
    print(f"pictures: {out / 'dropped_patches.png'}")


if __name__ == "__main__":
    main()
