"""What train.py and attack.py read: embedded photographs, a folder of pristine photographs, or image quality data
sets."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.data.batches import Plan, stream
from common.data.files import find_images, output_names
from iqa_attack.photographs.images import from_bytes
from iqa_attack.photographs.iqa_sets import read_set, unrated
from iqa_attack.photographs.photos import ANNOTATORS, QualitySet, graded_photos, subset

KINDS = ("photos", "photo_folder", "sets", "folder")


def build_data(
    *, kind: str, seed: int, parts: Sequence[str] = ("train", "test", "attack"), **options
) -> dict[str, QualitySet]:
    """{"train", "test", "attack"} or, of photographs, the parts asked for.

    photos: graded distortions of the embedded photographs, see `graded_photos`; photo_folder: of those in a folder; sets:
    published data sets, see `quality_sets`; folder: images without opinions, to be attacked only. ValueError for another
    kind."""
    check_data_options(kind, options)
    options.pop("workers", None)
    if kind in ("photos", "photo_folder"):
        return graded_photos(seed=seed, parts=parts, **options)
    return quality_sets(seed=seed, **options) if kind == "sets" else {"attack": folder(**options)}


def check_data_options(kind: str, options: Mapping[str, Any]) -> None:
    """ValueError for what can be told without reading: an unknown kind, a root with embedded data, a kind without its root,
    numbers that leave no image."""
    if kind not in KINDS:
        raise ValueError(f"data.kind={kind!r}, allowed: {', '.join(KINDS)}")
    root = options.get("root")
    if kind == "photos" and root is not None:
        raise ValueError(
            f"data.root={root}: the photographs of data=photos are embedded; name what lies at the root: data=photo_folder "
            "(pristine photographs), data=sets, data=live or, to attack images, data=folder"
        )
    if kind != "photos" and not root:
        raise ValueError(f"data.root is not set: data.kind={kind} is read from a folder")
    for key, low in {"size": 11, "reduce": 1, "test_photos": 1, "crops_per_photo": 1, "test_images": 1}.items():
        if key in options and options[key] < low:
            raise ValueError(f"data.{key}={options[key]}, allowed: >= {low}")
    if not 0 < options.get("test_share", 0.5) < 1:
        raise ValueError(f"data.test_share={options['test_share']}, allowed: between 0 and 1")


def folder(*, root: str | Path) -> QualitySet:
    """Every image below a folder (or the one image), without opinions."""
    return unrated(find_images(root), root)


def quality_sets(
    *,
    root: str | None,
    seed: int,
    names: list[str],
    test_share: float = 0.2,
    test_images: int = 12,
    listed: list[str] | None = None,
    higher_is_better: bool = True,
    attack_only: bool = False,
) -> dict[str, QualitySet]:
    """Published sets split by content: one under `root` itself, several in folders of their names.

    attack: with attack_only every image (there is no other part); the images whose paths end in the names `listed` (they and
    their contents' other images are not trained on); else `test_images` of the test part, spread evenly over its MOS."""
    sets = [
        read_set(n, Path(str(root)) / n if len(names) > 1 else root, higher_is_better=higher_is_better) for n in names
    ]
    base, train, test = 0, [], []
    images, out = [], {"mos": [], "std": [], "group": [], "source": []}
    for i, data in enumerate(sets):
        images += data.images
        out["mos"].append(data.mos)
        out["std"].append(data.std)
        out["group"].append(data.group + base)
        out["source"].append(torch.full_like(data.group, i))
        base += int(data.group.max()) + 1
    columns = {k: torch.cat(v) for k, v in out.items()}
    labels, shown = [Path(p).as_posix() for p in images], output_names(images)
    whole = {"kind": "sets", "parts": [d.identity for d in sets]} if len(sets) > 1 else sets[0].identity
    every = QualitySet(
        images, columns["mos"], [shown[p] for p in images], columns["std"], columns["group"], None, columns["source"],
        whole, all(d.upright for d in sets),
    )  # fmt: skip
    if attack_only:
        return {"attack": every}
    order = torch.randperm(base, generator=torch.Generator().manual_seed(stream(seed, 11)))
    held = set(order[: max(1, round(test_share * base))].tolist())
    chosen: list[int] = []
    if listed:
        for name in listed:
            found = [i for i, label in enumerate(labels) if label.endswith(f"/{name}")]
            if len(found) != 1:
                raise ValueError(f"{len(found)} images end in {name!r}: data.listed names one image of the sets each")
            chosen += found
        held |= {int(every.group[i]) for i in chosen}
    for i in range(len(every)):
        (test if int(every.group[i]) in held else train).append(i)
    if not train or not test:
        raise ValueError(
            f"{len(train)} training and {len(test)} test images: data.test_share={test_share} leaves one part empty"
        )
    if not chosen:
        ranked = sorted(test, key=lambda i: float(every.mos[i]))
        step = max(1, (len(ranked) - 1) // max(1, test_images - 1))
        chosen = ranked[::step][:test_images]
    return {"train": subset(every, train), "test": subset(every, test), "attack": subset(every, chosen)}


class TrainingCrops(Dataset):
    """Items ((3, size, size) in 0..1, index): a random crop and flip, drawn from (seed, epoch, index) alone.

    resize: short side to reduce an image to before (null: as it is); size null: the whole image, without a flip."""

    def __init__(self, data: QualitySet, *, seed: int, epoch: int, size: int | None, resize: int | None = None):
        self.data, self.seed, self.epoch, self.size, self.resize = data, seed, epoch, size, resize

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = from_bytes(self.data.image(index))
        if self.resize:
            x = resized(x, self.resize)
        if self.size:
            h, w = x.shape[1:]
            if min(h, w) < self.size:
                raise ValueError(
                    f"{self.data.names[index]} is {h} x {w}, the training crop is {self.size}: lower its size"
                )
            g = torch.Generator().manual_seed(stream(self.seed, self.epoch, index))
            y, z = (int(torch.randint(0, side - self.size + 1, (), generator=g)) for side in (h, w))
            x = x[:, y : y + self.size, z : z + self.size]
            if torch.rand((), generator=g) < 0.5:
                x = x.flip(2)
        return x.contiguous(), index


def pair_batches(
    data: QualitySet,
    plan: Plan,
    *,
    seed: int,
    epoch: int,
    device: torch.device,
    crop: int | None,
    resize: int | None,
    workers: int,
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """This rank's images (b, 3, H, W) and the targets (B,) of the whole batch (mos, std, fr, source), step by step."""
    fr = data.fr if data.fr is not None else torch.zeros(len(data), len(ANNOTATORS))
    targets = [t.to(device) for t in (data.mos, data.std, fr, data.sources())]
    steps = [(batch, part) for _, batch, part in plan.epoch(epoch)]
    crops = TrainingCrops(data, seed=seed, epoch=epoch, size=crop, resize=resize)
    loader = DataLoader(crops, batch_sampler=[batch[part].tolist() for batch, part in steps], num_workers=workers)
    for (x, _), (batch, _) in zip(loader, steps, strict=True):
        yield x.to(device), [t[batch.to(device)] for t in targets]


def resized(x: Tensor, short: int) -> Tensor:
    """(3, H, W) with the short side brought to `short` pixels, bilinear and antialiased."""
    scale = short / min(x.shape[1:])
    size = [max(short, round(side * scale)) for side in x.shape[1:]]
    return F.interpolate(x[None], size=size, mode="bilinear", antialias=True)[0].clamp(0, 1)


@torch.no_grad()
def score_all(model, data: QualitySet, *, device: torch.device, resize: int | None = None, batch: int = 50) -> Tensor:
    """Scores (N,) of every image on the CPU, images of one size together."""
    out, waiting = torch.zeros(len(data), dtype=torch.float64), []

    def flush() -> None:
        if waiting:
            x = torch.stack([x for _, x in waiting]).to(device)
            out[[i for i, _ in waiting]] = model(x).double().cpu()
            waiting.clear()

    for i in range(len(data)):
        x = from_bytes(data.image(i))
        x = resized(x, resize) if resize else x
        if waiting and (x.shape != waiting[0][1].shape or len(waiting) == batch):
            flush()
        waiting.append((i, x))
    flush()
    return out
