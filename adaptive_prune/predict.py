"""Which tokens are kept: pictures and counts for photographs.

python predict.py weights=runs/default/as/seed0/last.ckpt                     test images of its data set
python predict.py weights=my_as_deit.ckpt photos=true                         photographs of scikit-image and scikit-learn
python predict.py weights=my_as_deit.ckpt images=[cat.jpg,holiday/] out=kept   files, and all images below a folder
"""

from pathlib import Path

import hydra
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from PIL import Image
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from adaptive_prune.data import build_data
from adaptive_prune.evaluate import load, write_csv
from common.data.backgrounds import PHOTOGRAPHS, photographs
from common.data.vision import open_image

SHOWN = ("astronaut", "chelsea", "coffee", "rocket", "china.jpg", "flower.jpg")


def overlay(image: Tensor, mask: Tensor) -> np.ndarray:
    """The image (C, H, W), scaled to 0..1, with the dropped patches of mask (n,) nearly white; (H, W, 3)."""
    side = round(len(mask) ** 0.5)
    shown = (image - image.amin()) / (image.amax() - image.amin()).clamp(min=1e-8)
    full = F.interpolate(mask.view(1, 1, side, side).float(), image.shape[-2:], mode="nearest")[0]
    out = shown.expand(3, -1, -1) * full + (0.85 + 0.15 * shown.expand(3, -1, -1)) * (1 - full)
    return out.permute(1, 2, 0).numpy()


def find_images(where: str | list[str]) -> list[Path]:
    """The images named, and those below the folders named, in sorted order. FileNotFoundError for a place without any."""
    found: list[Path] = []
    for place in [where] if isinstance(where, str) else where:
        path = Path(place).expanduser()
        below = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
        if not below:
            what = f"no image in {path}" if path.is_dir() else f"no file or folder {path}"
            raise FileNotFoundError(f"{what} (images={place}); expected {', '.join(IMG_EXTENSIONS)}")
        found += below
    return found


@hydra.main(version_base="1.3", config_path="configs", config_name="predict")
@torch.no_grad()
def main(cfg: DictConfig) -> None:
    changed = {k: v for k, v in cfg.data.items() if v is not None}
    model, trained = load(cfg.weights, model=cfg.vit, method=cfg.arm, dataset=cfg.set, data=changed)
    names, labels = [], None
    if cfg.photos or cfg.images:
        if model.vit.in_chans != 3:
            raise ValueError(
                f"the model takes images of {model.vit.in_chans} channel, photographs have 3; leave photos and images out"
            )
        prepare = create_transform(
            model.vit.patch_embed.img_size[0], is_training=False, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD,
            interpolation="bicubic", crop_pct=0.875,
        )  # fmt: skip
        found = [(p.stem, open_image(p)) for p in (find_images(cfg.images) if cfg.images else [])]
        if cfg.photos:
            found += [(n.split(".")[0], Image.fromarray(photographs()[PHOTOGRAPHS.index(n)])) for n in SHOWN]
        names, x = [n for n, _ in found], torch.stack([prepare(image) for _, image in found])
    else:
        data = build_data(seed=trained.seed, **trained.data)
        if not 1 <= cfg.count <= len(data.test):  # type: ignore[arg-type]
            raise ValueError(f"count={cfg.count}, allowed: 1..{len(data.test)}")  # type: ignore[arg-type]
        rows = [data.test[i] for i in range(cfg.count)]  # type: ignore[index]
        names, x, labels = (
            [f"test {i}" for i in range(cfg.count)],
            torch.stack([r[0] for r in rows]),
            [int(r[1]) for r in rows],
        )
    logits, info = model(x, details=True)
    if info.masks is None or not model.locations:
        raise ValueError(f"rule={model.rule!r} drops no tokens of which a picture could be made")
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    stages = info.masks.shape[1]
    figure, axes = plt.subplots(len(x), stages + 1, figsize=(1.8 * (stages + 1), 1.9 * len(x)), squeeze=False)
    for row, image, masks, kept, z, name in zip(axes, x, info.masks, info.kept, logits, names, strict=True):
        everything = torch.ones(model.cost.patches)
        label = "" if labels is None else f" ({labels[names.index(name)]})"  # names of test images are unique
        titles = [f"{name}{label}: {int(z.argmax())}", *(f"{int(k)} of {model.cost.patches}" for k in kept)]
        for axis, mask, title in zip(row, [everything, *masks], titles, strict=True):
            axis.imshow(overlay(image, mask))
            axis.set_title(title, fontsize=8)
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(out / "kept_tokens.png", dpi=120)
    header = ["image", "class", *(f"kept_{s + 1}" for s in range(stages)), "gmacs"]
    table = [
        [n, int(z.argmax()), *map(int, k), f"{float(m) / 1e9:.4g}"]
        for n, z, k, m in zip(names, logits, info.kept, info.macs, strict=True)
    ]
    write_csv(out / "kept_tokens.csv", header, table)
    for line in [header, *table]:
        print("  ".join(f"{v!s:>12s}" for v in line))
    print(f"pictures: {out / 'kept_tokens.png'}")


if __name__ == "__main__":
    main()
