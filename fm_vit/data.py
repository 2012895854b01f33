"""What train.py and evaluate.py read: generated triplets, or the frames that list files name.

build_data(name="faces", ...)    presentation attacks of `common.data.presentation_attacks`, in memory
build_data(name="lists", ...)    CASIA-SURF, CeFA, WMCA, or one's own lists
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from common.data.batches import CropFlip, Plan, SeededBatches, TensorBatches
from common.data.presentation_attacks import ATTACKS, CHANNELS, spoof_faces
from common.data.vision import data_root
from fm_vit.protocols import Frames, check_subjects, read_list
from fm_vit.triplets import Triplets

SPLITS = ("train", "validation", "test")
NAMES = ("faces", "lists")


@dataclass(frozen=True)
class Split:
    """A data set of (packed image, 1 live | 0 attack), with what the metrics need of every sample."""

    samples: Any
    live: np.ndarray  # (n,) bool
    species: np.ndarray  # (n,) str, "live" for live ones
    subject: np.ndarray
    video: np.ndarray

    def __len__(self) -> int:
        return len(self.live)


@dataclass(frozen=True)
class Data:
    """modalities in canonical order, image size, the three splits; faces: whether the images are generated ones."""

    name: str
    modalities: list[str]
    size: int
    splits: dict[str, Split]
    workers: int = 0
    padding: int = 2
    dropped: Mapping[str, int] | None = None

    def batches(self, plan: Plan, device: torch.device) -> Any:
        """Training batches; every one is (packed images (b, 3 M, H, W) in 0..1, labels (b,))."""
        samples = self.splits["train"].samples
        if isinstance(samples, TensorDataset):
            images, labels = samples.tensors
            return _First(TensorBatches(images, labels, plan, device=device, augment=CropFlip(padding=self.padding)))
        return SeededBatches(samples, plan, device=device, workers=self.workers)


class _First:
    """TensorBatches with its one view unwrapped."""

    def __init__(self, batches: TensorBatches):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int) -> Any:
        for (images,), labels in self.batches.epoch(epoch):
            yield images, labels


def build_data(*, name: str, seed: int, **options: Any) -> Data:
    """The data of a configuration. ValueError for another name; what the readers raise."""
    if name == "faces":
        return _faces(seed=seed, **options)
    if name == "lists":
        return _lists(**options)
    raise ValueError(f"data.name={name!r}, allowed: {', '.join(NAMES)}")


def _faces(
    *, seed: int, modalities: Sequence[str], size: int, train: int, validation: int, test: int, domain: str = "studio",
    test_domain: str | None = None, attacks: Sequence[str] = ATTACKS, test_attacks: Sequence[str] | None = None,
    cue: float = 1.0, padding: int = 2, workers: int = 0, root: str | None = None,
) -> Data:  # fmt: skip
    if unknown := [m for m in modalities if m not in CHANNELS]:
        raise ValueError(f"data.modalities: {', '.join(unknown)} is not generated; there are {', '.join(CHANNELS)}")
    splits = {}
    for split, n in zip(SPLITS, (train, validation, test), strict=True):
        final = split == "test"
        made = spoof_faces(
            n, split=split, seed=seed, size=size, cue=cue, domain=(test_domain if final else None) or domain,
            attacks=(test_attacks if final else None) or attacks,
        )  # fmt: skip
        packed = torch.cat([_three(made.images[:, CHANNELS[m]]) for m in modalities], dim=1)
        species = np.array(["live", *ATTACKS])[made.extra["attack"].numpy()]
        subject = made.extra["subject"].numpy()
        samples = TensorDataset((255 * packed).round().to(torch.uint8), made.targets)
        splits[split] = Split(samples, made.targets.numpy() == 1, species, subject, np.arange(n))
    return Data("faces", list(modalities), size, splits, padding=padding)


def _three(x: Tensor) -> Tensor:
    return x.expand(-1, 3, -1, -1)


def _lists(
    *, root: str | None, modalities: Sequence[str], size: int, lists: Mapping[str, Any], live_label: int,
    format: str = "triplets",
    columns: Sequence[str] = ("rgb", "depth", "ir"), folders: Mapping[str, str] | None = None, subject: str | None = None,
    species: str | None = None, exclude: Sequence[str] = (), expected: Mapping[str, Any] | None = None, every: int = 1,
    depth_max: float | None = None, outline_only: bool = False, workers: int = 0, disjoint: bool = True,
) -> Data:  # fmt: skip
    base = data_root(root)
    if absent := [s for s in SPLITS if not lists.get(s)]:
        raise ValueError(
            f"data.lists: no list for {', '.join(absent)}; thresholds are fixed on validation, never on test"
        )
    frames: dict[str, Frames] = {}
    for split in SPLITS:
        frames[split] = read_list(
            base / lists[split], base, modalities=modalities, live_label=live_label, kind=format, columns=columns,
            folders=folders, subject=subject, species=species, exclude=exclude, expected=(expected or {}).get(split), every=every,
        )  # fmt: skip
    if disjoint and subject is not None:
        check_subjects(frames)
    splits = {
        split: Split(
            Triplets(f, modalities, size=size, train=split == "train", depth_max=depth_max, outline_only=outline_only),
            np.array(f.live), np.array(f.species), np.array(f.subject), np.array(f.video),
        )
        for split, f in frames.items()
    }  # fmt: skip
    dropped = {f"{split}: {why}": n for split, f in frames.items() for why, n in f.dropped.items() if n}
    return Data("lists", list(modalities), size, splits, workers=workers, dropped=dropped)
