"""What `python -m common.data.check fm_vit.<set> <root> [protocol=4.1]` looks at, read by the loader of train.py."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.data.check import Found, data_choices, data_options
from fm_vit.data import build_data
from fm_vit.triplets import Triplets, read_frame

SETS = {name: text for name, text in data_choices(__file__).items() if not name.startswith("faces")}


def read(name: str, root: Path, **options: Any) -> Iterator[Found]:
    """The frames of every split, by species where they are known; a file of each modality is looked for and opened."""
    data = build_data(seed=0, **data_options(__file__, name, root, options))
    for split, found in data.splits.items():
        assert isinstance(found.samples, Triplets)
        modality = {path: m for paths in found.samples.frames.paths for m, path in paths.items()}
        kinds = found.species or ["live" if live else "attack" for live in found.live]
        per_class = {kind: kinds.count(kind) * len(data.modalities) for kind in sorted(set(kinds))}
        look = lambda p, of=modality: read_frame(p, modality=of[p], depth_max=data.depth_max)  # noqa: E731
        yield Found(split, list(modality), per_class, look)
