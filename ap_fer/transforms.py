"""Training and test transforms of the RAF-DB recipe."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

MEAN, STD = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # ImageNet's, although the IR-50 was trained with (x - 127.5) / 127.5
SMALLEST = 24
AUGMENT = ("raf", "flip", "none")


class UniformErasing(torch.nn.Module):
    """With probability p fill a rectangle of a normalised image (C, H, W) with Gaussian noise. Its area is uniform in
    `scale` of the image and its aspect uniform in `ratio`; torchvision draws the logarithm of the aspect uniformly."""

    def __init__(
        self, p: float = 0.5, scale: tuple[float, float] = (0.02, 0.33), ratio: tuple[float, float] = (0.3, 3.3)
    ):
        super().__init__()
        self.p, self.scale, self.ratio = p, scale, ratio

    def forward(self, image: Tensor) -> Tensor:
        if torch.rand(()) >= self.p:
            return image
        channels, height, width = image.shape
        for _ in range(10):
            area = height * width * float(torch.empty(()).uniform_(*self.scale))
            aspect = float(torch.empty(()).uniform_(*self.ratio))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < h < height and 0 < w < width:
                top, left = int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ()))
                image = image.clone()
                image[:, top : top + h, left : left + w] = torch.randn(channels, h, w)
                break
        return image


def check_image(image: Image.Image) -> Image.Image:
    """ValueError for a face too small to have an expression; grey and RGBA images were converted when they were read."""
    if min(image.size) < SMALLEST:
        raise ValueError(
            f"an image of {image.size[0]} x {image.size[1]} pixels is too small, at least {SMALLEST} are needed"
        )
    return image


def inference_transform(*, size: int, normalise: Mapping[str, Sequence[float]]) -> Callable:
    """PIL image -> (3, size, size) normalised by {mean, std} of images in 0..1, as test images are."""
    tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    norm = v2.Normalize(list(normalise["mean"]), list(normalise["std"]))
    return v2.Compose([v2.Resize([size, size], antialias=True), *tensor, norm])


def build_transforms(augment: str, *, size: int) -> tuple[Callable, Callable]:
    """(training, test) transforms of PIL images to normalised (3, size, size).

    augment: raf (the published one) | flip | none. ValueError for another name."""
    if augment not in AUGMENT:
        raise ValueError(f"data.augment={augment!r}, allowed: {', '.join(AUGMENT)}")
    tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(MEAN), list(STD))]
    test = inference_transform(size=size, normalise={"mean": MEAN, "std": STD})
    if augment == "none":
        return test, test
    if augment == "flip":
        return v2.Compose([v2.Resize([size, size], antialias=True), v2.RandomHorizontalFlip(), *tensor]), test
    train = v2.Compose([
        v2.RandomApply([v2.RandomRotation([-6, 6])], p=0.5),
        v2.RandomResizedCrop(size, scale=(0.8, 1), ratio=(1, 1), antialias=True),
        v2.RandomHorizontalFlip(), v2.RandomGrayscale(0.2), v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        *tensor, UniformErasing(),
    ])  # fmt: skip
    return train, test
