"""Classes, or boxes, of image files; writes a CSV (or JSON).

python predict.py weights=runs/default/drelu_official/seed0/last.ckpt images=photos/ top=3
python predict.py weights=detector.ckpt images=street.jpg          one row per box; score=0.5 is the least that is written
"""

from pathlib import Path

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torchvision.transforms import v2

from common.data.files import ImageStream, Table, find_images
from common.scripts import script
from rbonn.checkpoint import load
from rbonn.data import inference_transform


def predict(cfg: DictConfig, fabric: Fabric) -> Path:
    """Writes cfg.out and returns its path; see configs/predict.yaml."""
    model, _, about = load(cfg.weights)
    paths = find_images(cfg.images)
    if about["task"] == "detect":
        return boxes(cfg, model.to(fabric.device), about["classes"], paths)
    if not 1 <= cfg.top <= len(about["classes"]):
        raise ValueError(f"top={cfg.top}, allowed: 1..{len(about['classes'])}")
    return classes(cfg, fabric.setup_module(model), about, paths)


@torch.no_grad()
def classes(cfg: DictConfig, model, about: dict, paths: list[Path]) -> Path:
    """One row per image and rank: path, label, probability."""
    look = {key: about[key] for key in ("size", "crop", "normalise", "channels")}
    device = next(model.parameters()).device
    stream = ImageStream(paths, inference_transform(**look), batch_size=cfg.batch_size, workers=cfg.workers)
    with Table(cfg.out) as table:
        for files, images in stream:
            best = model(images.to(device)).float().softmax(-1).topk(cfg.top)
            for path, probabilities, labels in zip(files, best.values.tolist(), best.indices.tolist(), strict=True):
                for label, p in zip(labels, probabilities, strict=True):
                    table.write({"path": path, "label": about["classes"][label], "probability": f"{p:.6f}"})
    print(f"{stream.done} images, top {cfg.top}: {table.out}")
    stream.finish()
    return table.out


@torch.no_grad()
def boxes(cfg: DictConfig, model, names: list[str], paths: list[Path]) -> Path:
    """One row per box with at least cfg.score: path, label, score, x0, y0, x1, y1 in pixels of the upright image."""
    if not 0 <= cfg.score <= 1:
        raise ValueError(f"score={cfg.score}, allowed: 0..1")
    device, found = next(model.parameters()).device, 0
    tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    stream = ImageStream(paths, tensor, batch_size=cfg.batch_size, workers=cfg.workers)
    with Table(cfg.out) as table:
        for files, images in stream:
            for path, out in zip(files, model([x.to(device) for x in images]), strict=True):
                for box, label, score in zip(
                    out["boxes"].tolist(), out["labels"].tolist(), out["scores"].tolist(), strict=True
                ):
                    if score >= cfg.score:
                        corners = {k: f"{v:.1f}" for k, v in zip(("x0", "y0", "x1", "y1"), box, strict=True)}
                        table.write({"path": path, "label": names[label - 1], "score": f"{score:.4f}", **corners})
                        found += 1
    print(f"{stream.done} images, {found} boxes: {table.out}")
    stream.finish()
    return table.out


@script("predict")
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    predict(cfg, fabric)


if __name__ == "__main__":
    main()
