"""What `python -m common.data.check iqa_attack.<set> <root>` looks at, read by the loader of train.py and attack.py."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from common.data.check import Found
from iqa_attack.photographs.images import read_image
from iqa_attack.photographs.iqa_sets import SETS as LAYOUTS
from iqa_attack.photographs.iqa_sets import read_set

SETS = {name: " ".join((layout.read.__doc__ or "").split()) for name, layout in LAYOUTS.items()}


def read(name: str, root: Path, *, higher_is_better: bool = True) -> Iterator[Found]:
    """The rated images by fifth of the scale of opinions (0 the worst)."""
    data = read_set(name, root, higher_is_better=higher_is_better)
    fifths = Counter(f"opinions in {2 * k}..{2 * k + 2} of 10" for k in (data.mos / 2).long().clamp(0, 4).tolist())
    yield Found("all", list(data.images), fifths, lambda p: read_image(p, upright=data.upright))
