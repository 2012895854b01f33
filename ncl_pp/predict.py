"""Classify images with a checkpoint of train.py; writes a CSV with path, label, probability.

python predict.py weights=runs/default/nclpp/seed0/last.ckpt images=photos/ topk=3
python predict.py weights=... images=cat.jpg expert=0

Probabilities are those for a uniform class prior: the experts are trained with the prior of the training set and used without it.
"""

import csv
from collections.abc import Callable
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from common import runs
from common.data.vision import open_image
from ncl_pp.data import inference_transform
from ncl_pp.evaluate import load
from ncl_pp.model import Ensemble


def find_images(where: str | Path) -> list[Path]:
    """The image itself, or every image below a folder in sorted order. FileNotFoundError if there is none."""
    path = Path(where).expanduser()
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
    if not found:
        what = f"no image in {path}" if path.is_dir() else f"no file or folder {path}"
        raise FileNotFoundError(f"{what} (images={where}); expected {', '.join(IMG_EXTENSIONS)}")
    return found


class _Files(Dataset):
    def __init__(self, paths: list[Path], transform: Callable):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        return self.transform(open_image(self.paths[i]))


@torch.no_grad()
def classify(cfg: DictConfig) -> Path:
    """Writes cfg.out and returns its path; see configs/predict.yaml."""
    trained = load(cfg.weights)
    if not 1 <= cfg.topk <= len(trained.classes):
        raise ValueError(f"topk={cfg.topk}, allowed: 1..{len(trained.classes)}")
    paths = find_images(cfg.images)
    fabric = runs.launch(cfg.fabric)
    model = fabric.setup_module(Ensemble(trained.model) if cfg.expert is None else trained.model.single(cfg.expert))
    files = _Files(paths, inference_transform(trained.config.data, trained.channels))
    rows = []
    for images in DataLoader(files, batch_size=cfg.batch_size, num_workers=cfg.workers):
        top = model(images.to(fabric.device)).float().softmax(-1).topk(cfg.topk)
        rows += zip(top.values.tolist(), top.indices.tolist(), strict=True)
    out = Path(cfg.out)
    with out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "label", "probability"])
        for path, (probabilities, labels) in zip(paths, rows, strict=True):
            for label, p in zip(labels, probabilities, strict=True):
                writer.writerow([path, trained.classes[label], f"{p:.6f}"])
    who = f"expert {cfg.expert}" if cfg.expert is not None else f"ensemble of {len(trained.model.heads)}"
    print(f"{len(paths)} images, {who}, top {cfg.topk}: {out}")
    return out


@hydra.main(version_base="1.3", config_path="configs", config_name="predict")
def main(cfg: DictConfig) -> None:
    classify(cfg)


if __name__ == "__main__":
    main()
