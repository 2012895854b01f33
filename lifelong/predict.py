"""Name the classes of images with a checkpoint of train.py.

python predict.py weights=runs/default/ari/seed0/last.ckpt images=digit.png
python predict.py weights=... images=folder/ mode=continuum      all images are known to come from one task
"""

from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize, rgb_to_grayscale

from common.data.vision import open_image
from lifelong.evaluate import load


def read(path: Path, channels: int, size: int) -> torch.Tensor:
    """An image as (channels, size, size) uint8: short side and centre."""
    image = center_crop(resize(pil_to_tensor(open_image(path)), [size], antialias=True), [size, size])
    return image if channels == 3 else rgb_to_grayscale(image)


@hydra.main(version_base="1.3", config_path="configs", config_name="predict")
def main(cfg: DictConfig) -> None:
    learner, stream, _, _ = load(cfg.weights, cfg.data.root)
    where = Path(cfg.images).expanduser()
    files = sorted(f for f in where.iterdir() if f.is_file()) if where.is_dir() else [where]
    if not files:
        raise FileNotFoundError(f"no image in {where}")
    images = torch.stack([read(f, stream.channels, stream.size) for f in files])
    found = learner.predict(images, cfg.mode, p=len(files), task=cfg.task)
    for file, c in zip(files, found.tolist(), strict=True):
        print(f"{file}\t{stream.class_names[c]}")


if __name__ == "__main__":
    main()
