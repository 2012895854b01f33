"""Noisy digits (embedded), torchvision's small sets and folders of class folders (ImageNet) with the published augmentation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2

from common.data.batches import CropFlip, stream, to_float
from common.data.images import Images, Lighting
from common.data.scenes import noisy_digits
from common.data.vision import KNOWN, image_folder, in_memory, set_identity, torchvision_set

SETS = ("digits", "mnist", "fashion_mnist", "cifar10", "folder")
STATS = {
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
}
LIGHTING = ("none", "correct", "official")
DIGITS = 1000  # training images of the embedded set, the rest of 1,797 are for testing


@dataclass(frozen=True)
class Classified(Images):
    """Images whose classes have names. look: what an image goes through before the network sees it, as plain data for a
    checkpoint (`inference_transform`); source: the identity of the files, {} for the embedded set."""

    names: tuple[str, ...] = ()
    look: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)

    def about(self) -> dict[str, Any]:
        """What a checkpoint must say so that a network can be used without this data set."""
        return {"classes": list(self.names), "channels": self.channels, **self.look}


def build_data(
    *, name: str, seed: int, root: str | None = None, workers: int = 0, download: bool = False, sigma: float = 0.25,
    train: int | None = None, size: int = 224, lighting: str = "none", val: str = "val",
) -> Classified:  # fmt: skip
    """A data set by name.

    digits: scikit-learn's digits with N(0, sigma^2) noise drawn from `seed`, standardised, `train` (null: 1,000) of 1,797
        for training.
    mnist, fashion_mnist, cifar10: `root` in torchvision's layout, random crop (padding 2 or 4) in memory, and a flip where it
        is none of digits; `train` of the training images, drawn from `seed` (null: all).
    folder: root/train/<class>/, root/<val>/<class>/; RandomResizedCrop(size), flip, lighting: none | correct | official
        (see `Lighting`); test: shorter side size * 8 / 7, centre crop.
    ValueError for an unknown name or option, FileNotFoundError for missing files."""
    check_data(name=name, root=root, lighting=lighting)
    if name == "digits":
        options: dict[str, Any] = {"sigma": sigma, "train": DIGITS if train is None else train, "seed": seed}
        (training, test), (noisy, _) = noisy_digits(**options), noisy_digits(**options, standardise=False)
        std, mean = (float(v) for v in torch.std_mean(noisy.images))
        names = tuple(str(d) for d in range(10))
        return Classified(
            10, 1, 8, test, tensors=(training.images, training.targets), names=names, look=look(8, ((mean,), (std,)))
        )
    if name in KNOWN:
        files = torchvision_set(name, root, train=True, download=download)
        training, test = _drawn(*in_memory(files), train, seed), test_set(name=name, root=root, download=download)[0]
        size, channels = training[0].shape[-1], training[0].shape[1]
        augment = CropFlipNormalise(padding=4 if channels == 3 else 2, flip=name != "mnist", stats=STATS[name])
        return Classified(
            len(files.classes), channels, size, test, tensors=training, augment=augment, names=tuple(map(str, files.classes)),
            normalise=partial(_normalise, stats=STATS[name]), look=look(size, STATS[name]), source=set_identity(files, name),
        )  # fmt: skip
    training, (test, names) = image_folder(root, "train"), test_set(name=name, root=root, size=size, val=val)
    if training.classes != names:
        different = sorted(set(training.classes) ^ set(names))
        raise ValueError(f"train/ and {val}/ under {root} hold different classes: {', '.join(different[:10])}")
    lights = [] if lighting == "none" else [Lighting(official=lighting == "official")]
    head = [v2.RandomResizedCrop(size, scale=(0.08, 1)), *lights, v2.RandomHorizontalFlip()]
    seen = look(size, STATS["folder"], crop=True)
    return Classified(
        len(names), 3, size, test, train=training, transform=v2.Compose([*head, *_tail(3, seen["normalise"])]), workers=workers,
        names=tuple(names), look=seen, source=set_identity(training, name, root),
    )  # fmt: skip


def _drawn(images: Tensor, labels: Tensor, count: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """`count` of the images and their labels, drawn from `seed`; None: all, in their order."""
    if count is None:
        return images, labels
    if not 1 <= count <= len(images):
        raise ValueError(f"data.train={count}, allowed: 1..{len(images)} of the training images, or null for all")
    kept = torch.randperm(len(images), generator=torch.Generator().manual_seed(stream(seed, 78)))[:count]
    return images[kept], labels[kept]


def check_data(*, name: str, root: str | None = None, lighting: str = "none", **_: Any) -> None:
    """ValueError for an unknown set or option, or for a root where the set is embedded; reads nothing."""
    if name not in SETS:
        raise ValueError(f"data.name={name!r}, allowed: {', '.join(SETS)}")
    if lighting not in LIGHTING:
        raise ValueError(f"data.lighting={lighting!r}, allowed: {', '.join(LIGHTING)}")
    if name == "digits" and root:
        raise ValueError(
            f"data.root={root}: digits are embedded; name the set at the root, e.g. data=imagenet, data=cifar10 or data=folder "
            "(evaluate.py: +data.name=folder)"
        )


def test_set(
    *, name: str, root: str | None = None, seed: int = 0, workers: int = 0, download: bool = False, sigma: float = 0.25,
    train: int | None = None, size: int = 224, lighting: str = "none", val: str = "val",
) -> tuple[Dataset, list[str]]:  # fmt: skip
    """(the test images alone, as the network sees them; the names of their classes). Arguments and errors: `build_data`."""
    check_data(name=name, root=root, lighting=lighting)
    if name == "digits":
        test = noisy_digits(sigma=sigma, train=DIGITS if train is None else train, seed=seed)[1]
        return test, [str(d) for d in range(10)]
    if name in KNOWN:
        files = torchvision_set(name, root, train=False, download=download)
        images, labels = in_memory(files)
        return TensorDataset(_normalise(images, stats=STATS[name]), labels), [str(c) for c in files.classes]
    seen = inference_transform(channels=3, **look(size, STATS["folder"], crop=True))
    found = image_folder(root, val, transform=seen)
    return found, found.classes


test_set.__test__ = False  # type: ignore[attr-defined]


def look(size: int, stats: Sequence[Sequence[float]], *, crop: bool = False) -> dict[str, Any]:
    """{size, crop: the shorter side to 8/7 of the size and then the centre, else stretched; normalise: {mean, std} of 0..1}."""
    return {"size": size, "crop": crop, "normalise": {"mean": list(stats[0]), "std": list(stats[1])}}


def inference_transform(*, size: int, crop: bool, normalise: Mapping[str, Sequence[float]], channels: int) -> Callable:
    """Test transform from a PIL image to a float tensor (channels, size, size), from what `look` says."""
    first = [v2.Resize(round(size * 8 / 7)), v2.CenterCrop(size)] if crop else [v2.Resize([size, size])]
    return v2.Compose([*first, *_tail(channels, normalise)])


def _tail(channels: int, normalise: Mapping[str, Sequence[float]]) -> list[Callable]:
    grey = [v2.Grayscale()] if channels == 1 else []
    scaled = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return [*grey, *scaled, v2.Normalize(list(normalise["mean"]), list(normalise["std"]))]


class CropFlipNormalise(CropFlip):
    """Random crop after zero padding and a flip of images in 0..1, then normalisation."""

    def __init__(self, *, padding: int = 4, flip: bool = True, stats: Sequence[Sequence[float]] = STATS["cifar10"]):
        super().__init__(padding=padding, flip=flip)
        self.stats = stats

    def __call__(self, images: Tensor, *drawn: Tensor) -> Tensor:
        return _normalise(super().__call__(images, *drawn), stats=self.stats)


def _normalise(images: Tensor, *, stats: Sequence[Sequence[float]]) -> Tensor:
    mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in stats)
    return (to_float(images) - mean) / std
