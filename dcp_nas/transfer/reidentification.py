"""Person re-identification: data sets, the strong-baseline head, identity and triplet losses, CMC and mAP."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch.utils.data import Dataset

from common.data.batches import Plan, stream
from common.data.files import is_image, open_image, readable
from common.data.vision import data_root
from dcp_nas.network import Network

SETS = ("procedural", "market1501")
NAME = re.compile(r"(-?\d+)_c(\d+)")


# -------------------------------------------------------------------------------------------------------------- metrics
def cmc_map(
    distances: Tensor, *, query_ids: Tensor, query_cameras: Tensor, gallery_ids: Tensor, gallery_cameras: Tensor,
    ranks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:  # fmt: skip
    """Single-query mAP and CMC (rank1, rank5, ...) in percent; distances (Q, G), ids and cameras (Q,) or (G,).

    Gallery images of the query's identity AND camera are left out, and so are those of identity -1 (junk); identity 0
    (distractors) counts as wrong. AP is the mean of the precision at every hit, not the trapezoidal area of some code. A query
    without a counted match is left out of the means. ValueError if none is left."""
    aps, firsts = [], []
    for q in range(len(query_ids)):
        keep = (gallery_ids != -1) & ~((gallery_ids == query_ids[q]) & (gallery_cameras == query_cameras[q]))
        order = distances[q][keep].argsort(stable=True)
        hits = (gallery_ids[keep][order] == query_ids[q]).double()
        if not hits.any():
            continue
        precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1, dtype=torch.float64)
        aps.append(float((precision * hits).sum() / hits.sum()))
        firsts.append(int(hits.argmax()))
    if not aps:
        raise ValueError("no query has a match in the gallery under another camera")
    found = {f"rank{k}": 100 * sum(f < k for f in firsts) / len(firsts) for k in ranks}
    return {"mAP": 100 * sum(aps) / len(aps), **found}


# ----------------------------------------------------------------------------------------------------------------- data
@dataclass(frozen=True)
class People:
    """images: paths or uint8 (H, W, 3) arrays; ids, cameras: (N,)."""

    images: list[Any]
    ids: Tensor
    cameras: Tensor

    def __len__(self) -> int:
        return len(self.images)


class PeopleSet(Dataset):
    """Items (normalised float image (3, H, W), label). augment: flip, and a random crop after padding by 1/16 of the height."""

    def __init__(self, people: People, labels: Tensor, *, size: tuple[int, int], augment: bool):
        self.people, self.labels, self.size, self.augment = people, labels, size, augment

    def __len__(self) -> int:
        return len(self.people)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.people.images[index]
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else open_image(image)
        x = torch.from_numpy(np.array(image.resize((self.size[1], self.size[0]), Image.Resampling.BILINEAR))).permute(
            2, 0, 1
        )
        x = (x.float() / 255 - 0.5) / 0.25
        if self.augment:
            if torch.rand(()) < 0.5:
                x = x.flip(-1)
            pad = self.size[0] // 16
            top, left = torch.randint(0, 2 * pad + 1, (2,)).tolist()
            x = F.pad(x, [pad] * 4)[:, top : top + self.size[0], left : left + self.size[1]]
        return x, self.labels[index]


def market1501(root: str | Path | None) -> tuple[People, People, People]:
    """(train, query, gallery) of root/bounding_box_train, query, bounding_box_test; files such as 0002_c1s1_000451_03.jpg, of any
    image format.

    FileNotFoundError with the layout, ValueError naming a file whose name holds no identity and camera."""
    path = data_root(root)
    parts = []
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        place = path / folder
        files = sorted(p for p in place.iterdir() if is_image(p)) if place.is_dir() else []
        if not files:
            raise FileNotFoundError(
                f"no image in {path / folder}; expected the Market-1501 layout bounding_box_train/, query/, "
                f"bounding_box_test/ under {path}"
            )
        found = [NAME.match(f.name) for f in files]
        bad = [f.name for f, m in zip(files, found, strict=True) if m is None]
        if bad:
            raise ValueError(
                f"{path / folder}: no identity and camera in the name {bad[0]!r}, expected e.g. 0002_c1s1_000451_03.jpg"
            )
        numbers = torch.tensor([[int(m[1]), int(m[2])] for m in found if m is not None])
        kept = readable(files)
        parts.append(People([files[i] for i in kept], numbers[kept, 0], numbers[kept, 1]))
    return parts[0], parts[1], parts[2]


PALETTE = np.array(
    [
        (200, 30, 30),
        (30, 60, 190),
        (30, 150, 60),
        (230, 200, 40),
        (120, 40, 140),
        (40, 40, 40),
        (225, 225, 225),
        (150, 90, 40),
    ]
)
PATTERNS = ("plain", "horizontal", "vertical", "diagonal", "blocks")


def procedural(
    *,
    seed: int,
    identities: int = 60,
    train: int = 40,
    per_camera: int = 4,
    cameras: int = 4,
    height: int = 64,
    width: int = 32,
) -> tuple[People, People, People]:
    """(train, query, gallery): people drawn as head, torso and legs, under cameras with colour cast, blur and shift.

    An identity is (colour of the torso, of its stripes, of the legs, pattern), all different; test identities are not in
    the training set; the first image per camera is a query. Exercises: matching across cameras by colour and pattern, and the
    rules of CMC and mAP. Cannot show: pose, occlusion, detection errors, accuracy on photographs. ValueError for numbers
    that leave no test identity or no match."""
    if not 1 < train < identities or min(per_camera, cameras) < 2:
        raise ValueError(f"identities={identities}, train={train}, cameras={cameras}, per_camera={per_camera}: need 1 < train < "
                         "identities, at least two cameras and two images per camera")  # fmt: skip
    rng = np.random.default_rng(seed)
    looks: list[tuple[int, int, int, int]] = []
    while len(looks) < identities:
        look = (
            *rng.choice(len(PALETTE), 2, replace=False).tolist(),
            int(rng.integers(len(PALETTE))),
            int(rng.integers(len(PATTERNS))),
        )
        if look not in looks:
            looks.append(look)
    casts = rng.uniform(0.65, 1.3, (cameras, 3))
    blurs, shifts = rng.uniform(0.2, 1.0, cameras), rng.integers(1, 4, cameras)
    parts: dict[str, list] = {"train": [], "query": [], "gallery": []}
    for person, look in enumerate(looks):
        for camera in range(cameras):
            for k in range(per_camera):
                image = _paint(look, casts[camera], blurs[camera], int(shifts[camera]), height, width, rng)
                part = "train" if person < train else "query" if k == 0 else "gallery"
                parts[part].append((image, person + 1, camera + 1))
    people = [
        People([r[0] for r in rows], torch.tensor([r[1] for r in rows]), torch.tensor([r[2] for r in rows]))
        for rows in parts.values()
    ]
    return people[0], people[1], people[2]


def _paint(look, cast, blur, shift, height, width, rng) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width].astype(float)
    canvas = np.repeat(gaussian_filter(rng.uniform(60, 200, (height, width)), 3)[..., None], 3, axis=2)
    dy, dx = rng.integers(-shift, shift + 1, 2)
    u, v = (x - dx) / width, (y - dy) / height
    coarse = int(rng.integers(0, 3))  # phase of the pattern: folds differ from image to image
    waves = {
        "plain": np.zeros_like(x), "horizontal": ((y + coarse) // 3) % 2, "vertical": ((x + coarse) // 3) % 2,
        "diagonal": ((x + y + coarse) // 4) % 2, "blocks": ((x + coarse) // 4 + (y + coarse) // 4) % 2,
    }[PATTERNS[look[3]]]  # fmt: skip
    torso = (np.abs(u - 0.5) < 0.28) & (v > 0.2) & (v < 0.55)
    legs = (np.abs(np.abs(u - 0.5) - 0.12) < 0.1) & (v >= 0.55) & (v < 0.95)
    head = ((u - 0.5) * width) ** 2 + ((v - 0.12) * height) ** 2 < (0.08 * height) ** 2
    canvas[torso] = np.where(waves[..., None] > 0, PALETTE[look[1]], PALETTE[look[0]])[torso]
    canvas[legs], canvas[head] = PALETTE[look[2]], (215, 170, 140)
    canvas = gaussian_filter(canvas, (blur, blur, 0)) * cast * rng.uniform(0.85, 1.15) + rng.normal(0, 6, canvas.shape)
    return canvas.clip(0, 255).astype(np.uint8)


class PKPlan(Plan):
    """Batches of `people` identities with `images` images each; an epoch uses every identity once at most, in full batches.

    Identities with fewer images repeat them. ValueError for fewer identities than `people`."""

    def __init__(self, labels: Tensor, *, people: int, images: int, seed: int, rank: int = 0, world: int = 1):
        self.members = [torch.nonzero(labels == c).flatten() for c in labels.unique()]
        if min(people, images) < 2 or len(self.members) < people:
            raise ValueError(
                f"{len(self.members)} identities, P={people}, K={images}: need at least two of each and P identities"
            )
        super().__init__(len(labels), people * images, seed=seed, rank=rank, world=world)
        self.people, self.per_person = people, images
        self.steps = len(self.members) // people

    def epoch(self, epoch: int) -> Iterator[tuple[int, Tensor, slice]]:
        generator = torch.Generator().manual_seed(stream(self.seed, epoch))
        order = torch.randperm(len(self.members), generator=generator).tolist()
        part = self.batch_size // self.world
        for step in range(self.steps):
            rows = []
            for c in order[step * self.people : (step + 1) * self.people]:
                m = self.members[c]
                repeats = -(-self.per_person // len(m))
                picks = torch.cat([m[torch.randperm(len(m), generator=generator)] for _ in range(repeats)])
                rows.append(picks[: self.per_person])
            yield step, torch.cat(rows), slice(self.rank * part, (self.rank + 1) * part)


# ------------------------------------------------------------------------------------------------------ head and losses
class ReIdentifier(nn.Module):
    """Backbone - global pooling - f (for the triplet loss) - BNNeck (no shift) - classifier without bias.

    In training: (logits (B, identities), f (B, C)); in evaluation: the normalised embedding behind the neck, (B, C)."""

    def __init__(self, backbone: Network, identities: int):
        super().__init__()
        self.backbone, width = backbone, backbone.out_channels
        backbone.fc = nn.Identity()  # type: ignore[assignment]
        self.neck = nn.BatchNorm1d(width)
        self.neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(width, identities, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        f = self.backbone(x)
        h = self.neck(f)
        return (self.classifier(h), f) if self.training else F.normalize(h, dim=1)


def triplet_loss(f: Tensor, labels: Tensor, *, margin: float = 0.3) -> Tensor:
    """Batch-hard triplets: mean_a max(0, max_p |f_a - f_p| - min_n |f_a - f_n| + margin). f (B, C), labels (B,)."""
    squared = (f[:, None] - f[None]).square().sum(-1)
    distance = squared.clamp_min(1e-12).sqrt()
    same = labels[:, None] == labels[None]
    hardest = distance.masked_fill(~same, 0.0).amax(1)
    nearest = distance.masked_fill(same, float("inf")).amin(1)
    return F.relu(hardest - nearest + margin).mean()


def identity_loss(logits: Tensor, labels: Tensor, *, smoothing: float = 0.1) -> Tensor:
    """Cross-entropy with label smoothing."""
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)
