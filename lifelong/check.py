"""What `python -m common.data.check lifelong.<set> <root>` looks at, read by the loader of train.py."""

from collections.abc import Iterator
from pathlib import Path

from common.data.check import Found, data_choices
from lifelong.streams import files_of

SETS = {name: text for name, text in data_choices(__file__).items() if name in ("cub200", "omniglot", "folder")}


def read(name: str, root: Path) -> Iterator[Found]:
    """Both splits by class."""
    names, paths, targets = files_of(name, str(root), ("train", "test"))
    for split in paths:
        counts = targets[split].bincount(minlength=len(names)).tolist()
        yield Found(split, paths[split], dict(zip(names, counts, strict=True)))
