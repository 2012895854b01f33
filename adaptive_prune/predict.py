"""Classify images and show which tokens are kept; a CSV (or JSON) with path, label, probability, kept tokens and cost.

python predict.py weights=runs/default/as/seed0/last.ckpt images=digits/ pictures=kept/
python predict.py weights=my_as_deit.ckpt images=[cat.jpg,holiday/] top=3
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from adaptive_prune.checkpoint import load
from adaptive_prune.data import prepare
from common.data.files import ImageStream, Table, find_images, output_names, ranked
from common.scripts import script

SIDE = 192  # pixels of one panel of a picture, at least
DRAWN = ("threshold", "topk", "evit")  # rules that keep tokens in their places


def overlay(image: Tensor, mask: Tensor) -> np.ndarray:
    """The image (C, H, W), scaled to 0..1, with the dropped patches of mask (n,) nearly white; (H, W, 3)."""
    side = round(len(mask) ** 0.5)
    shown = (image - image.amin()) / (image.amax() - image.amin()).clamp(min=1e-8)
    full = F.interpolate(mask.view(1, 1, side, side).float(), image.shape[-2:], mode="nearest")[0]
    out = shown.expand(3, -1, -1) * full + (0.85 + 0.15 * shown.expand(3, -1, -1)) * (1 - full)
    return out.permute(1, 2, 0).numpy()


def picture(image: Tensor, masks: Tensor, normalise: Mapping[str, Sequence[float]]) -> Image.Image:
    """What the network saw, and what is kept in every stage, side by side. image: (C, H, W) as prepared; masks: (S, n)."""
    mean, std = (torch.tensor(normalise[k]).view(-1, 1, 1) for k in ("mean", "std"))
    image = (image * std + mean).clamp(0, 1)
    scale = -(-SIDE // image.shape[-1])
    panels = [overlay(image, m) for m in (torch.ones_like(masks[0]), *masks)]
    whole = np.concatenate([np.pad(p, ((0, 0), (0, 1), (0, 0)), constant_values=1.0) for p in panels], 1)[:, :-1]
    found = Image.fromarray((255 * whole).round().astype(np.uint8))
    return found.resize((found.width * scale, found.height * scale), Image.Resampling.NEAREST)


@torch.no_grad()
def run(cfg: DictConfig, fabric: Fabric) -> Path:
    """Writes cfg.out (and cfg.pictures) and returns its path; see configs/predict.yaml."""
    pruned, _, about = load(cfg.weights, vit=cfg.vit, way=cfg.way)
    if not 1 <= cfg.top <= len(about["classes"]):
        raise ValueError(f"top={cfg.top}, allowed: 1..{len(about['classes'])}")
    if cfg.pictures is not None and pruned.rule not in DRAWN:
        raise ValueError(
            f"pictures={cfg.pictures}: rule={pruned.rule!r} drops no tokens of which a picture could be made"
        )
    paths = find_images(cfg.images)
    names = output_names(paths)
    folder = None if cfg.pictures is None else Path(cfg.pictures).expanduser()
    model = fabric.setup_module(pruned)
    stream = ImageStream(paths, prepare(**about), batch_size=cfg.batch_size, workers=cfg.workers)
    with Table(cfg.out) as table:
        for files, images in stream:
            logits, info = model(images.to(fabric.device), details=True)
            probabilities = logits.float().softmax(-1).cpu()
            for i, path in enumerate(files):
                for row in ranked(path, probabilities[i], about["classes"], cfg.top):
                    row |= {f"kept_{s + 1}": int(k) for s, k in enumerate(info.kept[i].tolist())}
                    table.write(row | {"gmacs": f"{float(info.macs[i]) / 1e9:.4g}"})
                if folder is not None:
                    folder.mkdir(parents=True, exist_ok=True)
                    picture(images[i], info.masks[i].cpu(), about["normalise"]).save(folder / f"{names[path]}.png")
    print(f"{stream.done} images: {table.out}{'' if folder is None else f', pictures in {folder}'}")
    stream.finish()
    return table.out


main = script("predict", run)


if __name__ == "__main__":
    main()
