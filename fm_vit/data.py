"""What train.py and evaluate.py read: generated triplets, the frames that list files name, or one's own folders.

build_data(name="faces", ...)    presentation attacks of `common.data.presentation_attacks`, in memory
build_data(name="lists", ...)    CASIA-SURF, CeFA, WMCA, or one's own lists
build_data(name="folder", ...)   <split>/<live or a species>/<modality>/<image>
"""

import hashlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from common.data.batches import CropFlip, Plan, SeededBatches, TensorBatches
from common.data.files import identity, readable
from common.data.presentation_attacks import ATTACKS, CHANNELS, spoof_faces
from common.data.vision import data_root
from fm_vit.protocols import Frames, check_format, check_pattern, check_splits, read_folders, read_list
from fm_vit.triplets import MEAN, STD, Triplets, read_frame

SPLITS = ("train", "validation", "test")
NAMES = ("faces", "lists", "folder")
CLASSES = ["attack", "live"]  # by class index


@dataclass(frozen=True)
class Split:
    """A data set of (packed image, 1 live | 0 attack), with what the metrics need of every sample; None where it is not known."""

    samples: Any
    live: np.ndarray  # (n,) bool
    species: list[str] | None  # "live" for live ones
    subject: list[Any]  # of an unknown subject the video, of an unknown video the frame
    video: list[str] | None
    name: list[str]

    def __len__(self) -> int:
        return len(self.live)


@dataclass(frozen=True)
class Data:
    """modalities in canonical order, image size and the three splits; source: the identity of the files, {} if there are none."""

    name: str
    modalities: list[str]
    size: int
    splits: dict[str, Split]
    workers: int = 0
    padding: int = 2
    depth_max: float | None = None
    outline_only: bool = False
    dropped: dict[str, int] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)

    def batches(self, plan: Plan, device: torch.device) -> Any:
        """Training batches; every one is (packed images (b, 3 M, H, W) in 0..1, labels (b,))."""
        samples = self.splits["train"].samples
        if isinstance(samples, TensorDataset):
            images, labels = samples.tensors
            return _First(TensorBatches(images, labels, plan, device=device, augment=CropFlip(padding=self.padding)))
        return SeededBatches(samples, plan, device=device, workers=self.workers)

    def crc(self) -> dict[str, int]:
        """{"crc_data": checksum of the images and labels of all splits}, {} where they are files: two machines whose numbers
        differ begin by comparing it."""
        parts = [t for s in self.splits.values() if isinstance(s.samples, TensorDataset) for t in s.samples.tensors]
        return {"crc_data": checksum(parts)} if parts else {}

    def about(self) -> dict[str, Any]:
        """What a checkpoint must say so that a network can be used without this data set."""
        return {
            "classes": CLASSES, "channels": 3, "modalities": self.modalities, "size": self.size,
            "normalise": {"mean": [MEAN] * 3, "std": [STD] * 3}, "depth_max": self.depth_max, "outline_only": self.outline_only,
        }  # fmt: skip

    def __str__(self) -> str:
        """Samples per split and class, and what was left out."""
        parts = [f"{name} {int(s.live.sum())} live, {int((~s.live).sum())} attacks" for name, s in self.splits.items()]
        return "; ".join(parts + [f"left out in {why}: {n}" for why, n in self.dropped.items()])


def checksum(tensors: Iterable[Tensor]) -> int:
    """CRC-32 of the bytes of tensors."""
    found = 0
    for t in tensors:
        found = zlib.crc32(t.detach().cpu().contiguous().numpy().tobytes(), found)
    return found


class _First:
    """TensorBatches with its one view unwrapped."""

    def __init__(self, batches: TensorBatches):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int) -> Any:
        for (images,), labels in self.batches.epoch(epoch):
            yield images, labels


def build_data(*, name: str, seed: int, read: Sequence[str] = SPLITS, **options: Any) -> Data:
    """The data of a configuration. read: the splits that are needed. ValueError for another name; what the readers raise."""
    check_data(name=name, **options)
    if name == "faces":
        return _faces(seed=seed, read=read, **options)
    return _lists(read=read, **options) if name == "lists" else _folders(read=read, **options)


def check_data(*, name: str, **options: Any) -> None:
    """ValueError for what can be seen without reading anything: names, a root of what is embedded, formats, patterns."""
    if name not in NAMES:
        raise ValueError(f"data.name={name!r}, allowed: {', '.join(NAMES)}")
    names = list(options.get("modalities") or ())
    if not names or len(set(names)) < len(names):
        raise ValueError(f"data.modalities={names}: give one or more different names")
    if options["size"] < 1 or (options.get("every") or 1) < 1:
        raise ValueError(f"data.size={options['size']}, data.every={options.get('every')}: must be at least 1")
    if (depth := options.get("depth_max")) is not None and not depth > 0:
        raise ValueError(f"data.depth_max={depth}, allowed: > 0, the value that becomes 1")
    for what in ("video", "subject", "species"):
        check_pattern(options.get(what), what)
    if name == "faces":
        if options.get("root"):
            raise ValueError(
                f"data.root={options['root']}: these faces are generated; name the set at the root: data=casia_surf, cefa, wmca, "
                "folder, ... (evaluate: the checkpoint was trained on generated faces; +data.name=folder and its keys)"
            )
        if unknown := [m for m in names if m not in CHANNELS]:
            raise ValueError(f"data.modalities: {', '.join(unknown)} is not generated; there are {', '.join(CHANNELS)}")
        if few := [f"data.{s}={options[s]}" for s in SPLITS if options[s] < 2]:
            raise ValueError(f"{', '.join(few)}: needs at least 2 faces, one live and one attack")
    if name == "lists":
        have = options["columns"] if options.get("format", "triplets") == "triplets" else options.get("folders") or {}
        check_format(options.get("format", "triplets"), options["live_label"], names, have)
        if absent := [s for s in SPLITS if not options["lists"].get(s)]:
            raise ValueError(
                f"data.lists: no list for {', '.join(absent)}; thresholds are fixed on validation, never on test"
            )


def _faces(
    *, seed: int, read: Sequence[str], modalities: Sequence[str], size: int, train: int, validation: int, test: int,
    domain: str = "studio", test_domain: str | None = None, attacks: Sequence[str] = ATTACKS,
    test_attacks: Sequence[str] | None = None, cue: float = 1.0, padding: int = 2, outline_only: bool = False,
    shuffle_labels: bool = False, workers: int = 0, root: str | None = None,
) -> Data:  # fmt: skip
    splits = {}
    for split, n in zip(SPLITS, (train, validation, test), strict=True):
        if split not in read:
            continue
        final = split == "test"
        made = spoof_faces(
            n, split=split, seed=seed, size=size, cue=cue, domain=(test_domain if final else None) or domain,
            attacks=(test_attacks if final else None) or attacks,
        )  # fmt: skip
        images, labels = made.images, made.targets
        if outline_only:
            images = made.extra["face"][:, None].float().expand_as(images)
        if shuffle_labels and split == "train":
            labels = labels[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
        packed = torch.cat([_three(images[:, CHANNELS[m]]) for m in modalities], dim=1)
        species = np.array(["live", *ATTACKS])[made.extra["attack"].numpy()].tolist()
        samples = TensorDataset((255 * packed).round().to(torch.uint8), labels)
        names = [f"{split}/{i}" for i in range(n)]
        subject = made.extra["subject"].tolist()
        splits[split] = Split(samples, labels.numpy() == 1, species, subject, None, names)
    return Data("faces", list(modalities), size, splits, padding=padding, outline_only=outline_only)


def _three(x: Tensor) -> Tensor:
    return x.expand(-1, 3, -1, -1)


def _lists(
    *, root: str | None, read: Sequence[str], lists: Mapping[str, Any], live_label: int, format: str = "triplets",
    columns: Sequence[str] = ("rgb", "depth", "ir"), folders: Mapping[str, str] | None = None, video: str | None = None,
    subject: str | None = None, species: str | None = None, species_names: Mapping[str, str] | None = None,
    exclude: Sequence[str] = (), expected: Mapping[str, Any] | None = None, protocol: str | None = None, every: int = 1,
    modalities: Sequence[str], **shape: Any,
) -> Data:  # fmt: skip
    base, wanted, frames = data_root(root), expected_counts(expected, protocol), {}
    for split in read:
        frames[split] = read_list(
            base / lists[split], base, modalities=modalities, live_label=live_label, kind=format, columns=columns,
            folders=folders, video=video, subject=subject, species=species, species_names=species_names, exclude=exclude,
            expected=wanted.get(split), every=every,
        )  # fmt: skip
    return _data("lists", base, frames, modalities=modalities, **shape)


def _readable(frames: Frames, depth_max: float | None) -> Frames:
    """The frames whose every modality can be read (broken_images=skip)."""

    def read(paths: Mapping[str, Path]) -> None:
        for modality, path in paths.items():
            read_frame(path, modality=modality, depth_max=depth_max)

    kept = readable(frames.paths, read)
    if len(kept) < len(frames):
        frames.dropped["broken"] += len(frames) - len(kept)
        for name in ("paths", "live", "video", "subject", "species"):
            column = getattr(frames, name)
            setattr(frames, name, [column[i] for i in kept])
    return frames


def expected_counts(expected: Mapping[str, Any] | None, protocol: str | None) -> Mapping[str, Any]:
    """{split: counts} of `data.expected`, which is that, or {protocol: that} by the whole name ("2.1") or its first digit ("4").
    Nothing is asserted of a protocol that it does not have."""
    if expected is None or protocol is None or set(expected) <= set(SPLITS):
        return expected or {}
    return expected.get(protocol) or expected.get(protocol[:1]) or {}


def _folders(
    *, root: str | None, read: Sequence[str], modalities: Sequence[str], splits: Mapping[str, str], live_class: str = "live",
    subject: str | None = None, video: str | None = None, expected: Mapping[str, Any] | None = None, **shape: Any,
) -> Data:  # fmt: skip
    base = data_root(root)
    frames = {
        split: read_folders(
            base, splits[split], modalities=modalities, live_class=live_class, subject=subject, video=video,
            expected=(expected or {}).get(split),
        )
        for split in read
    }  # fmt: skip
    return _data("folder", base, frames, modalities=modalities, **shape)


def _data(
    name: str, base: Path, frames: Mapping[str, Frames], *, modalities: Sequence[str], size: int, disjoint: bool = True,
    depth_max: float | None = None, outline_only: bool = False, workers: int = 0,
) -> Data:  # fmt: skip
    frames = {split: _readable(f, depth_max) for split, f in frames.items()}
    if disjoint:
        check_splits(frames)
    for split, f in frames.items():
        if not any(f.live) or all(f.live):
            counts = f.counts()
            raise ValueError(f"data: {split} has {counts['live']} live and {counts['attack']} attacks, both are needed")
    look = {"depth_max": depth_max, "outline_only": outline_only}
    splits = {}
    for split, f in frames.items():
        samples = Triplets(f, modalities, size=size, train=split == "train", **look)
        names = [next(iter(p.values())).relative_to(base).as_posix() for p in f.paths]
        video = None if None in f.video else [str(v) for v in f.video]
        species = None if None in f.species else [str(s) for s in f.species]
        subject = [s or v or n for s, v, n in zip(f.subject, f.video, names, strict=True)]
        splits[split] = Split(samples, np.array(f.live), species, subject, video, names)
    dropped = {f"{split}: {why}": n for split, f in frames.items() for why, n in f.dropped.items() if n}
    labels = hashlib.sha256(b"".join(s.live.tobytes() for s in splits.values())).hexdigest()[:16]
    paths = [path for f in frames.values() for p in f.paths for path in p.values()]
    broken = sum(f.dropped["broken"] for f in frames.values())
    source = identity(name, paths, root=base, labels=labels, left_out=broken)
    return Data(name, list(modalities), size, splits, workers=workers, dropped=dropped, source=source, **look)
