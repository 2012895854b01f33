"""Classify images with a checkpoint of train.py (or a packed file); writes a CSV (or JSON) with path, label, probability.

python predict.py weights=runs/default/dcp_ggn_do/seed0/last.ckpt images=photos/ top=3
"""

from pathlib import Path

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig

from common.data.files import ImageStream, Table, find_images
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
    with Table(cfg.out) as table:
        for files, images in stream:
            best = model(images.to(fabric.device)).float().softmax(-1).topk(cfg.top)
            for path, probabilities, labels in zip(files, best.values.tolist(), best.indices.tolist(), strict=True):
                for label, p in zip(labels, probabilities, strict=True):
                    table.write({"path": path, "label": about["classes"][label], "probability": f"{p:.6f}"})
    print(f"{stream.done} images, top {cfg.top}: {table.out}")
    stream.finish()
    return table.out


main = script("predict", classify)


if __name__ == "__main__":
    main()
