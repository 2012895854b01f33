"""Class probabilities for image files.

python predict.py weights=last.ckpt images='[a.jpg, b.jpg]' [top=5]
"""

from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torchvision.transforms import v2

from common.data.vision import open_image
from dcp_nas.checkpoint import load_network
from dcp_nas.data import CIFAR, IMAGENET


def image_tensor(path: str | Path, *, channels: int, size: int, data: str) -> Tensor:
    """A file as the network sees it, (1, channels, size, size). data: digits | cifar10 | folder, which names the statistics.

    FileNotFoundError or ValueError, naming the path, when it cannot be read."""
    image = open_image(path)
    if channels == 1:
        image = image.convert("L")
    crop = [v2.Resize((size, size))] if size < 64 else [v2.Resize(round(size * 8 / 7)), v2.CenterCrop(size)]
    x = v2.Compose([*crop, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])(image)
    if data == "digits":
        x = (x - x.mean()) / x.std().clamp_min(1e-6)  # the training set was standardised as a whole
    else:
        x = v2.functional.normalize(x, *(CIFAR if data == "cifar10" else IMAGENET))
    return x[None]


@torch.no_grad()
def predict(network: nn.Module, x: Tensor, *, top: int) -> list[tuple[int, float]]:
    """The `top` classes of one image with their probabilities, best first."""
    p, classes = network.eval()(x).softmax(1)[0].sort(descending=True)
    return list(zip(classes[:top].tolist(), p[:top].tolist(), strict=True))


@hydra.main(version_base="1.3", config_path="configs", config_name="predict")
def main(cfg: DictConfig) -> None:
    network, state = load_network(cfg.weights)
    options = {"channels": state["channels"], "size": state["size"], "data": state["config"]["data"]["name"]}
    for path in [cfg.images] if isinstance(cfg.images, str) else cfg.images:
        best = predict(network, image_tensor(path, **options), top=cfg.top)
        print(f"{path}: " + "  ".join(f"class {c} {p:.3f}" for c, p in best))


if __name__ == "__main__":
    main()
