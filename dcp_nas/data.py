"""Noisy digits (embedded), CIFAR-10, Fashion-MNIST and class folders (ImageNet), whole for training, split for the search."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2

from common.data.batches import CropFlip, stream, to_float
from common.data.files import identity
from common.data.images import Images, Lighting
from common.data.scenes import noisy_digits
from common.data.vision import image_folder, in_memory, set_identity, torchvision_set

SETS = ("digits", "cifar10", "fashion_mnist", "folder")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = ((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768))
FASHION = ((0.2860,), (0.3530,))
KNOWN = {"cifar10": (CIFAR, 32, 4), "fashion_mnist": (FASHION, 28, 2)}  # mean and std, side, padding of the random crop
SIDES = {"digits": 8, **{name: side for name, (_, side, _) in KNOWN.items()}}  # a folder says its own


@dataclass(frozen=True)
class Data(Images):
    """`Images` with the names of the classes, how a test image is looked at, and what the training images are."""

    names: tuple[str, ...] = ()
    look: Mapping[str, Any] = field(default_factory=dict)  # {size, crop, normalise}, see `inference_transform`
    source: Mapping[str, Any] = field(default_factory=dict)  # `common.data.files.identity`

    def about(self) -> dict[str, Any]:
        """What a checkpoint must say so that its network can be used without this data set."""
        return {"classes": list(self.names), "channels": self.channels, **self.look}


def split_for_search(data: Data, shares: Sequence[float], *, seed: int) -> tuple[Images, Images]:
    """Disjoint random parts of the training set for the weights and for alpha, `shares` of it each.

    ValueError for shares that do not fit, or a part without an image."""
    check_shares(shares)
    counts = [int(len(data) * share + 1e-9) for share in shares]
    if min(counts) < 1:
        raise ValueError(
            f"search.shares={list(shares)} of {len(data)} training images leave {counts[0]} for the weights and {counts[1]} for "
            "alpha: neither may be empty"
        )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(stream(seed, 77)))
    return data.subset(order[: counts[0]]), data.subset(order[counts[0] : sum(counts)])


def check_shares(shares: Sequence[float]) -> None:
    """ValueError unless there are two positive shares that add up to at most 1."""
    if len(shares) != 2 or min(shares) <= 0 or sum(shares) > 1 + 1e-9:
        raise ValueError(f"search.shares={list(shares)}: two positive shares (weights, alpha) that add up to at most 1")


def check_data(
    *, name: str, root: str | None = None, workers: int = 0, download: bool = False, sigma: float = 0.25,
    train: int | None = 1000, size: int = 224, cutout: int = 0, lighting: bool = True, val: str = "val",
) -> None:  # fmt: skip
    """ValueError for options of `build_data` that cannot be used, without looking at files; TypeError for an unknown one."""
    del download, lighting
    if name not in SETS:
        raise ValueError(f"data.name={name!r}, allowed: {', '.join(SETS)}")
    if cutout < 0 or sigma < 0 or size < 1 or workers < 0:
        raise ValueError(f"data.cutout={cutout}, sigma={sigma}, size={size}, workers={workers}: none may be negative")
    if name == "digits":
        if root:
            raise ValueError(
                f"data.root={root}: digits is embedded; name the set at the root with data=folder, cifar10 or fashion_mnist"
            )
        if not isinstance(train, int) or not 1 <= train < 1797:
            raise ValueError(f"data.train={train}, allowed: 1..1796 of the 1,797 digits")
    if name == "fashion_mnist" and train is not None and not 1 <= train <= 60_000:
        raise ValueError(f"data.train={train}, allowed: 1..60000 of the training images, or null for all")
    if not val or val.startswith(("/", "..")):
        raise ValueError(f"data.val={val!r} must be a folder below data.root")


def build_data(*, seed: int, **options: Any) -> Data:
    """A data set by name.

    digits: scikit-learn's digits with N(0, sigma^2) noise drawn from `seed`, standardised, `train` of 1,797 for training.
    cifar10, fashion_mnist: `root` in torchvision's layout, random crop (padding 4 or 2), flip and `cutout` pixels in memory.
        `train`: so many of Fashion-MNIST's training images, drawn from `seed`; null: all.
    folder: root/train/<class>/, root/<val>/<class>/; RandomResizedCrop(size), colour noise, flip; test: shorter side
        size * 8 / 7 (bicubic), centre crop.
    ValueError for an unknown name or option, FileNotFoundError for missing files."""
    check_data(**options)
    name, root = options["name"], options.get("root")
    test, names, look, channels = build_test(seed=seed, **options)
    shared = {
        "names": tuple(names),
        "look": look,
        "size": look["size"],
        "classes": len(names),
        "channels": channels,
        "test": test,
    }
    if name == "digits":
        training, _ = noisy_digits(sigma=options.get("sigma", 0.25), train=options.get("train", 1000), seed=seed)
        return Data(**shared, tensors=(training.images, training.targets), source=identity(name))
    if name in KNOWN:
        found = torchvision_set(name, root, train=True, download=options.get("download", False))
        augment, (images, targets) = SmallAugmentation(name, options.get("cutout", 0)), in_memory(found)
        if name == "fashion_mnist" and options.get("train") is not None:
            kept = torch.randperm(len(images), generator=torch.Generator().manual_seed(stream(seed, 78)))[
                : options["train"]
            ]
            images, targets = images[kept], targets[kept]
        return Data(**shared, tensors=(images, targets), augment=augment, source=set_identity(found, name))
    training, val = image_folder(root, "train"), options.get("val", "val")
    if training.classes != list(names):
        different = sorted(set(training.classes) ^ set(names))
        raise ValueError(f"train/ and {val}/ under {root} hold different classes: {', '.join(different[:10])}")
    light = [Lighting()] if options.get("lighting", True) else []
    head = [v2.RandomResizedCrop(look["size"], scale=(0.08, 1)), *light, v2.RandomHorizontalFlip()]
    transform = v2.Compose([*head, *tail(IMAGENET)])
    return Data(
        **shared, train=training, transform=transform, workers=options.get("workers", 0),
        source=set_identity(training, name, root),
    )  # fmt: skip


def build_test(
    *, name: str, seed: int, root: str | None = None, download: bool = False, sigma: float = 0.25, train: int | None = 1000,
    size: int = 224, val: str = "val", **others: Any,
) -> tuple[Dataset, Sequence[str], dict[str, Any], int]:  # fmt: skip
    """(test set, names of its classes, how it is looked at, channels); training images are not needed. See `build_data`."""
    check_data(name=name, root=root, download=download, sigma=sigma, train=train, size=size, val=val, **others)
    if name == "digits":
        assert train is not None  # check_data
        test = noisy_digits(sigma=sigma, train=train, seed=seed)[1]
        look = {"size": 8, "crop": False, "normalise": digit_statistics(sigma=sigma, train=train, seed=seed)}
        return test, [str(d) for d in range(10)], look, 1
    if name in KNOWN:
        stats, side, _ = KNOWN[name]
        found = torchvision_set(name, root, train=False, download=download)
        images, targets = in_memory(found)
        look = {"size": side, "crop": False, "normalise": statistics(stats)}
        return TensorDataset(normalised(images, stats), targets), found.classes, look, images.shape[1]
    look = {"size": size, "crop": True, "normalise": statistics(IMAGENET)}
    folder = image_folder(root, val, transform=inference_transform(**look, channels=3))
    return folder, folder.classes, look, 3


def statistics(stats: tuple[Sequence[float], Sequence[float]]) -> dict[str, list[float]]:
    return {"mean": list(stats[0]), "std": list(stats[1])}


def digit_statistics(*, sigma: float, train: int, seed: int) -> dict[str, list[float]]:
    """The two numbers by which `noisy_digits` standardises images in 0..1: of its noisy training images."""
    noisy = noisy_digits(sigma=sigma, train=train, seed=seed, standardise=False)[0].images
    std, mean = torch.std_mean(noisy)
    return {"mean": [mean.item()], "std": [std.item()]}


def inference_transform(*, size: int, crop: bool, normalise: Mapping[str, Sequence[float]], channels: int) -> Callable:
    """PIL image -> float (channels, size, size), as a test image is seen. crop: the shorter side to size * 8 / 7 (bicubic), then
    the centre; else resized. normalise: {mean, std} of images in 0..1."""
    bicubic = v2.InterpolationMode.BICUBIC
    first = [v2.Resize(round(size * 8 / 7), bicubic), v2.CenterCrop(size)] if crop else [v2.Resize([size, size])]
    gray = [v2.Grayscale(1)] if channels == 1 else []
    return v2.Compose([*gray, *first, *tail((normalise["mean"], normalise["std"]))])


def tail(stats: tuple[Sequence[float], Sequence[float]]) -> list[Callable]:
    """PIL image -> normalised float tensor."""
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(stats[0]), list(stats[1]))]


def normalised(images: Tensor, stats: tuple[Sequence[float], Sequence[float]]) -> Tensor:
    """(B, C, H, W), uint8 or 0..1 -> float; stats: mean and standard deviation of every channel."""
    mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in stats)
    return (to_float(images) - mean) / std


class SmallAugmentation(CropFlip):
    """For a set of KNOWN: random crop, flip, normalisation, and a square of `cutout` pixels set to the mean, cut off at
    the border."""

    def __init__(self, name: str, cutout: int = 0):
        self.stats, _, padding = KNOWN[name]
        super().__init__(padding=padding)
        self.cutout = cutout

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> tuple[Tensor, ...]:
        centre = torch.stack([torch.randint(0, n, (shape[0],), generator=generator) for n in shape[-2:]], dim=1)
        return (*super().draw(shape, generator), centre)

    def __call__(self, images: Tensor, *drawn: Tensor) -> Tensor:
        out = normalised(super().__call__(images, *drawn[:2]), self.stats)
        if not self.cutout:
            return out
        centre, half = drawn[2].to(images.device), self.cutout // 2
        inside = []
        for axis, n in ((0, images.shape[-2]), (1, images.shape[-1])):
            offset = torch.arange(n, device=images.device) - centre[:, axis, None]
            inside.append((offset >= -half) & (offset < half))
        return out.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.0)
