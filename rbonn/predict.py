"""Classes, or boxes, of image files; writes a CSV (or JSON).

python predict.py weights=runs/default/drelu_official/seed0/last.ckpt images=photos/ top=3
python predict.py weights=detector.ckpt images=street.jpg          one row per box; score=0.5 is the least that is written
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torchvision.transforms import v2

from common.data.files import ImageStream, Table, find_images, ranked
from common.scripts import script
from rbonn.checkpoint import load
from rbonn.data import inference_transform


def predict(cfg: DictConfig, fabric: Fabric) -> Path:
    """Writes cfg.out and returns its path; see configs/predict.yaml."""
    model, _, about = load(cfg.weights)
    detector, model = about["task"] == "detect", fabric.setup_module(model)
    if not 1 <= cfg.top <= len(about["classes"]) or not 0 <= cfg.score <= 1:
        raise ValueError(f"top={cfg.top}, allowed: 1..{len(about['classes'])}; score={cfg.score}, allowed: 0..1")
    whole = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    seen = (
        whole if detector else inference_transform(**{k: about[k] for k in ("size", "crop", "normalise", "channels")})
    )
    stream = ImageStream(find_images(cfg.images), seen, batch_size=cfg.batch_size, workers=cfg.workers)
    found = (
        boxes(model, about, stream, fabric, cfg.score) if detector else classes(model, about, stream, fabric, cfg.top)
    )
    with Table(cfg.out) as table, torch.no_grad():
        for row in found:
            table.write(row)
    print(f"{stream.done} images, {table.rows} rows: {table.out}")
    stream.finish()
    return table.out


def classes(model, about: dict, stream: ImageStream, fabric: Fabric, top: int) -> Iterator[dict]:
    """{path, label, probability} per image and rank, the most probable first."""
    for files, images in stream:
        for path, p in zip(files, model(images.to(fabric.device)).float().softmax(-1).cpu(), strict=True):
            yield from ranked(path, p, about["classes"], top)


def boxes(model, about: dict, stream: ImageStream, fabric: Fabric, least: float) -> Iterator[dict]:
    """{path, label, score, x0, y0, x1, y1} per box with at least that score, in pixels of the upright image."""
    for files, images in stream:
        for path, out in zip(files, model([x.to(fabric.device) for x in images]), strict=True):
            rows = zip(out["boxes"].tolist(), out["labels"].tolist(), out["scores"].tolist(), strict=True)
            for box, label, score in rows:
                if score >= least:
                    corners = {k: f"{v:.1f}" for k, v in zip(("x0", "y0", "x1", "y1"), box, strict=True)}
                    yield {"path": path, "label": about["classes"][label - 1], "score": f"{score:.4f}", **corners}


main = script("predict", predict)


if __name__ == "__main__":
    main()
