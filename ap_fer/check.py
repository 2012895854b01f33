"""What `python -m common.data.check ap_fer.<set> <root>` looks at, read by the loader of train.py."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ap_fer.data import FaceFiles, build_data
from common.data.check import Found, data_choices, data_options

SETS = {name: text for name, text in data_choices(__file__).items() if name != "faces"}


def read(name: str, root: Path, **options: Any) -> Iterator[Found]:
    """The training images and the test images of a configuration `data=<name>`, opened with their face boxes."""
    data = build_data(seed=0, **data_options(__file__, name, root, options))
    for split, files in {"train": data.files, "test": data.test}.items():
        assert isinstance(files, FaceFiles)
        images = FaceFiles(files.found)
        index = {path: i for i, path in enumerate(images.found.paths)}
        per_class = {name: images.found.targets.count(c) for c, name in enumerate(data.names)}
        yield Found(split, images.found.paths, per_class, lambda p, images=images, index=index: images[index[p]])
