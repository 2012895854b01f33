"""Cued digits (embedded), torchvision's small sets and class folders, in batches that depend on (seed, epoch) alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.transforms import InterpolationMode, v2

from common.data.batches import Plan, SeededBatches, seeded, stream
from common.data.files import folders, identity, tensor_identity
from common.data.scenes import cued_digits
from common.data.vision import KNOWN, data_root, image_folder, set_identity, torchvision_set

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
SETS = ("cued_digits", *KNOWN, "folder")
AUGMENT = ("deit", "crop", "none")


class Canvases:
    """New cued-digit canvases in every epoch, drawn from (seed, epoch); `epoch` yields (images, labels) of every micro-step."""

    def __init__(self, plan: Plan, device: torch.device):
        self.plan, self.device = plan, device

    def __len__(self) -> int:
        return len(self.plan)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        data = cued_digits(self.plan.size, split="train", seed=stream(self.plan.seed, epoch))
        for step, _, part in self.plan.epoch(epoch):
            mine = slice(step * self.plan.batch_size + part.start, step * self.plan.batch_size + part.stop)
            yield data.images[mine].to(self.device), data.targets[mine].to(self.device)


class Augmented(Dataset):
    """(transform(image), label) of a set of PIL images; indices: the subset that is used."""

    def __init__(self, dataset: Any, transform: Callable, indices: Sequence[int]):
        self.dataset, self.transform, self.indices = dataset, transform, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, target = self.dataset[self.indices[index]]
        return self.transform(image), target


@dataclass(frozen=True)
class Data:
    """A data set to train on. test, validation: (image (C, H, W), label) pairs; validation is None where there is none.

    train: images to augment, None for canvases, of which there are `images` in an epoch. look: what the network sees of an
    image, see `look`. source: what the set is, whatever folder it lies in."""

    images: int
    train: Augmented | None
    test: Dataset
    validation: Dataset | None
    names: list[str]
    look: dict[str, Any]
    source: dict[str, Any]
    workers: int = 0
    repeats: int = 1

    def batches(self, plan: Plan, device: torch.device) -> Canvases | SeededBatches:
        """Training batches on `device`: `epoch(e)` yields (images (b, C, H, W), labels (b,))."""
        if self.train is None:
            return Canvases(plan, device)
        return SeededBatches(self.train, plan, device=device, workers=self.workers)

    def first(self, n: int, seed: int) -> Tensor:
        """The first n training images of epoch 1 (n, C, H, W), the same on every rank: what the steps are set from."""
        n = min(n, self.images)
        if self.train is None:
            return cued_digits(self.images, split="train", seed=stream(seed, 1)).images[:n]
        order = torch.randperm(self.images, generator=torch.Generator().manual_seed(stream(seed, 1)))
        found = []
        for position, index in enumerate(order.repeat_interleave(self.repeats)[:n].tolist()):
            with seeded(seed, 1, position):
                found.append(self.train[index][0])
        return torch.stack(found)

    def about(self) -> dict[str, Any]:
        """What a checkpoint says of its data: {"classes": names, channels, size, crop_pct, normalise}."""
        return {"classes": self.names, **self.look}


def look(name: str, *, size: int = 224, crop_pct: float = 0.875) -> dict[str, Any]:
    """What a network sees of a test image, as plain data: {channels, size, crop_pct, normalise: {mean, std} of images in 0..1}.

    crop_pct: the shorter side is resized to size / crop_pct (bicubic) before the centre crop. Canvases are taken as they are."""
    if name == "cued_digits":
        return {"channels": 1, "size": 16, "crop_pct": 1.0, "normalise": {"mean": [0.0], "std": [1.0]}}
    channels = 1 if "mnist" in name else 3
    mean, std = IMAGENET if channels == 3 else ([0.3], [0.3])
    return {"channels": channels, "size": size, "crop_pct": crop_pct, "normalise": {"mean": mean, "std": std}}


def _to_tensor(channels: int, normalise: Mapping[str, Sequence[float]]) -> list[Callable]:
    """PIL image -> float (channels, H, W), normalised."""
    grey = [v2.Grayscale(1)] if channels == 1 else [v2.RGB()]
    scale = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    return [*grey, *scale, v2.Normalize(list(normalise["mean"]), list(normalise["std"]))]


def test_transform(
    *, channels: int, size: int, crop_pct: float, normalise: Mapping[str, Sequence[float]]
) -> Callable[..., Tensor]:
    """PIL image -> normalised float tensor (channels, size, size), from what `look` says."""
    first = [v2.Resize(int(size / crop_pct), InterpolationMode.BICUBIC), v2.CenterCrop(size)]
    return v2.Compose([*first, *_to_tensor(channels, normalise)])  # pyright: ignore[reportReturnType]


test_transform.__test__ = False  # type: ignore[attr-defined]


def train_transform(
    augment: str, *, channels: int, size: int, crop_pct: float, normalise: Mapping[str, Sequence[float]]
) -> Callable[..., Tensor]:
    """The same at random. augment: deit (crop, flip, RandAugment, jitter, erasing) | crop (padded crop and flip, the CIFAR
    recipe) | none. ValueError for another."""
    if augment not in AUGMENT:
        raise ValueError(f"data.augment={augment!r}, allowed: {', '.join(AUGMENT)}")
    if augment == "none":
        return test_transform(channels=channels, size=size, crop_pct=crop_pct, normalise=normalise)
    if augment == "deit":
        if channels != 3:
            raise ValueError("data.augment=deit is for colour images; use crop or none")
        return create_transform(  # pyright: ignore[reportReturnType]
            size, is_training=True, color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic",
            re_prob=0.25, re_mode="pixel", re_count=1, mean=tuple(normalise["mean"]), std=tuple(normalise["std"]),
        )  # fmt: skip
    flip = [v2.RandomHorizontalFlip()] if channels == 3 else []
    first = [v2.Resize([size, size], InterpolationMode.BICUBIC), v2.RandomCrop(size, padding=size // 8), *flip]
    return v2.Compose([*first, *_to_tensor(channels, normalise)])  # pyright: ignore[reportReturnType]


def check_data(
    *, name: str, root: str | None = None, workers: int = 0, download: bool = False, train_images: int = 1280,
    test_images: int = 1500, validation: int = 0, subset: int | None = None, size: int = 224, crop_pct: float = 0.875,
    augment: str = "deit", repeats: int = 1,
) -> None:  # fmt: skip
    """ValueError for a wrong value of the node `data`, before any file is read. Keywords as `build_data`."""
    if name not in SETS:
        raise ValueError(f"data.name={name!r}, allowed: {', '.join(SETS)}")
    if not 0 < crop_pct <= 1 or repeats < 1 or size < 1:
        raise ValueError(
            f"data.crop_pct={crop_pct}, data.repeats={repeats}, data.size={size}, allowed: in (0, 1], >= 1, >= 1"
        )
    if validation < 0 or train_images < 1 or test_images < 1:
        raise ValueError(
            f"data.validation={validation}, train_images={train_images}, test_images={test_images}: >= 0, >= 1, >= 1"
        )
    if subset is not None and (subset < 1 or name == "cued_digits"):
        raise ValueError(f"data.subset={subset}: >= 1 or null, of a set that is read; canvases have data.train_images")
    if name == "cued_digits":
        if root or download:
            raise ValueError(
                f"data.root={root}: cued_digits is embedded; name the set that lies there, e.g. data=folder or data=cifar10"
            )
    else:
        train_transform(augment, **look(name, size=size, crop_pct=crop_pct))


def build_data(
    *, name: str, root: str | None = None, workers: int = 0, download: bool = False, train_images: int = 1280,
    test_images: int = 1500, validation: int = 0, subset: int | None = None, size: int = 224, crop_pct: float = 0.875,
    augment: str = "deit", repeats: int = 1,
) -> Data:  # fmt: skip
    """A data set by name.

    cued_digits: embedded; train_images new canvases per epoch, test_images fixed ones made of other digits.
    mnist, fashion_mnist, cifar10, cifar100: `root` in torchvision's layout. folder: root/train/<class>/, and root/val/<class>/
    to test on, or root/test/<class>/ to test and root/val/<class>/ to validate on.
    validation: training images set aside to choose best.ckpt by. subset: train on so many of the others, drawn once and for
    all; None: on all. size: pixels; augment, crop_pct: see `train_transform`, `look`.
    repeats: 3 = repeated augmentation, an epoch then holds a third of the images three times each, augmented differently, in
    the same batches. Raises ValueError for an unknown name or value, FileNotFoundError for missing files."""
    check_data(**locals())
    seen = look(name, size=size, crop_pct=crop_pct)
    if name == "cued_digits":
        test, held_out = cued_digits(test_images, split="test", seed=0), None
        if validation:  # new canvases of the training digits
            own = cued_digits(validation, split="train", seed=stream(0))
            held_out = TensorDataset(own.images, own.targets)
        names = [str(c) for c in range(10)]
        return Data(
            train_images, None, TensorDataset(test.images, test.targets), held_out, names, seen, identity("cued_digits")
        )
    if name == "folder":
        train = image_folder(root, "train")
        test, names, source = test_set("folder", root, seen)
        if names != train.classes:
            different = sorted(set(names) ^ set(train.classes))
            raise ValueError(
                f"train/ and {_test_split(root)}/ under {root} hold different classes: {', '.join(different[:10])}"
            )
        held_out = None
        if _test_split(root) == "test" and (data_root(root) / "val").is_dir():
            held_out = image_folder(root, "val", transform=test_transform(**seen))
            if held_out.classes != names:
                different = sorted(set(names) ^ set(held_out.classes))
                raise ValueError(f"train/ and val/ under {root} hold different classes: {', '.join(different[:10])}")
        source = {**set_identity(train, "folder", data_root(root)), "test": source["sha"]}
    else:
        train = torchvision_set(name, root, train=True, download=download)
        test, names, source = test_set(name, root, seen)
        held_out, source = None, set_identity(train, name)
    indices, held_out = _split(train, validation, subset, seen, held_out)
    augmented = Augmented(train, train_transform(augment, **seen), indices)
    return Data(len(indices), augmented, test, held_out, names, seen, source, workers, repeats)


def _split(train: Any, n: int, subset: int | None, seen: Mapping[str, Any], own: Any) -> tuple[list[int], Any]:
    """(indices to train on, validation set): n images set aside and `subset` of the others, drawn once and for all."""
    if n and own is not None:
        raise ValueError(f"data.validation={n}: this folder has a validation split of its own (val/); leave it at 0")
    if n + (subset or 1) > len(train):
        raise ValueError(f"data.validation={n}, data.subset={subset}, but there are only {len(train)} training images")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(stream(0))).tolist()
    kept = sorted(order[n:] if subset is None else order[n : n + subset])
    if not n:
        return kept, own
    plain = Augmented(train, test_transform(**seen), range(len(train)))
    return kept, Subset(plain, sorted(order[:n]))


def _test_split(root: str | Path | None) -> str:
    """test where that folder holds class folders (ImageNet's own test/ holds images without labels), else val."""
    own = data_root(root) / "test"
    return "test" if own.is_dir() and folders(own) else "val"


def test_set(name: str, root: str | Path | None, seen: Mapping[str, Any]) -> tuple[Dataset, list[str], dict[str, Any]]:
    """(the test images of a set as pairs of a tensor and a label, class names, identity), without its training images.

    seen: of the network, from its checkpoint (`look`). Raises what `build_data` raises."""
    if name not in SETS[1:]:
        raise ValueError(f"data.name={name!r}, allowed: {', '.join(SETS[1:])}")
    transform = test_transform(**{k: seen[k] for k in ("channels", "size", "crop_pct", "normalise")})
    if name == "folder":
        found = image_folder(root, _test_split(root), transform=transform)
        return found, list(found.classes), set_identity(found, name)
    found = torchvision_set(name, root, train=False, transform=transform)
    names = [str(c) for c in getattr(found, "classes", range(KNOWN[name].classes))]
    images, targets = torch.as_tensor(found.data), torch.as_tensor(found.targets)
    return found, names, tensor_identity(name, images, targets)


test_set.__test__ = False  # type: ignore[attr-defined]
