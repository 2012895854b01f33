"""Classify images with a checkpoint of train.py; writes a CSV (or JSON) with path, label, probability.

python predict.py weights=runs/default/nclpp/seed0/last.ckpt images=photos/ top=3
python predict.py weights=... images=cat.jpg expert=0

Probabilities are those for a uniform class prior: the experts are trained with the prior of the training set and used without it.
"""

from pathlib import Path

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig

from common.data.files import ImageStream, find_images, write_ranked
from common.scripts import script
from ncl_pp.checkpoint import load
from ncl_pp.model import Ensemble
from ncl_pp.transforms import inference_transform


@torch.no_grad()
def classify(cfg: DictConfig, fabric: Fabric) -> Path:
    """Writes cfg.out and returns its path; see configs/predict.yaml."""
    experts, _, about = load(cfg.weights)
    if not 1 <= cfg.top <= len(about["classes"]):
        raise ValueError(f"top={cfg.top}, allowed: 1..{len(about['classes'])}")
    model = fabric.setup_module(Ensemble(experts) if cfg.expert is None else experts.single(cfg.expert))  # type: ignore[arg-type, operator]
    look = {key: about[key] for key in ("size", "crop", "normalise", "channels")}
    paths = find_images(cfg.images)
    stream = ImageStream(paths, inference_transform(**look), batch_size=cfg.batch_size, workers=cfg.workers)
    table = write_ranked(stream, lambda x: model(x.to(fabric.device)), cfg.out, about["classes"], cfg.top)
    who = f"expert {cfg.expert}" if cfg.expert is not None else f"ensemble of {len(experts.heads)}"  # type: ignore[arg-type]
    print(f"{stream.done} images, {who}, top {cfg.top}: {table.out}")
    stream.finish()
    return table.out


main = script("predict", classify)


if __name__ == "__main__":
    main()
