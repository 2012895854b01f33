"""Classify images with a checkpoint of train.py (or a packed file); writes a CSV (or JSON) with path, label, probability.

python predict.py weights=runs/default/dcp_ggn_do/seed0/last.ckpt images=photos/ top=3
"""

from pathlib import Path

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig

from common.data.files import ImageStream, find_images, write_ranked
from common.scripts import script
from dcp_nas.checkpoint import load
from dcp_nas.data import inference_transform


@torch.no_grad()
def classify(cfg: DictConfig, fabric: Fabric) -> Path:
    """Writes cfg.out and returns its path; see configs/predict.yaml."""
    network, _, about = load(cfg.weights)
    if not 1 <= cfg.top <= len(about["classes"]):
        raise ValueError(f"top={cfg.top}, allowed: 1..{len(about['classes'])}")
    look = {key: about[key] for key in ("size", "crop", "normalise", "channels")}
    model, paths = fabric.setup_module(network), find_images(cfg.images)
    stream = ImageStream(paths, inference_transform(**look), batch_size=cfg.batch_size, workers=cfg.workers)
    table = write_ranked(stream, lambda x: model(x.to(fabric.device)), cfg.out, about["classes"], cfg.top)
    print(f"{stream.done} images, top {cfg.top}: {table.out}")
    stream.finish()
    return table.out


main = script("predict", classify)


if __name__ == "__main__":
    main()
