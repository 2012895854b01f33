"""Classify images with a checkpoint of train.py, a packed file or one of the released code; writes a CSV (or JSON).

python predict.py weights=runs/default/both/seed0/last.ckpt images=photos/ top=3
python predict.py weights=fourbits_deit_tiny.pth bits=4 images=cat.jpg
"""

from pathlib import Path

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig

from common.data.files import ImageStream, find_images, folders, read_lines, write_ranked
from common.scripts import script
from q_vit.checkpoint import load
from q_vit.data import test_transform


def class_names(given: str | None, own: list[str]) -> list[str]:
    """The names of a checkpoint, or others: a text file with one a line, or a folder that holds a folder per class.

    ValueError where there are not as many as classes."""
    if given is None:
        return own
    place = Path(given).expanduser()
    names = [p.name for p in folders(place)] if place.is_dir() else [line for _, line in read_lines(place)]
    if len(names) != len(own):
        kind = "class folders" if place.is_dir() else "lines"
        raise ValueError(f"names={given} holds {len(names)} {kind}, the model has {len(own)} classes")
    return names


@torch.no_grad()
def classify(cfg: DictConfig, fabric: Fabric) -> Path:
    """Writes cfg.out and returns its path; see configs/predict.yaml."""
    model, _, about = load(cfg.weights, bits=cfg.bits, check_bits=cfg.check_bits)
    names = class_names(cfg.names, about["classes"])
    if not 1 <= cfg.top <= len(names):
        raise ValueError(f"top={cfg.top}, allowed: 1..{len(names)}")
    model = fabric.setup_module(model)
    transform = test_transform(**{k: about[k] for k in ("channels", "size", "crop_pct", "normalise")})
    stream = ImageStream(find_images(cfg.images), transform, batch_size=cfg.batch_size, workers=cfg.workers)
    table = write_ranked(stream, lambda x: model(x.to(fabric.device)), cfg.out, names, cfg.top)
    print(f"{stream.done} images, {about['network']['bits']} bit, top {cfg.top}: {table.out}")
    stream.finish()
    return table.out


main = script("predict", classify)


if __name__ == "__main__":
    main()
