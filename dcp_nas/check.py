"""What `python -m common.data.check dcp_nas.market1501 <root>` looks at, read by the loader of reid.py."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from common.data.check import Found
from dcp_nas.transfer.reidentification import market1501

SETS = {"market1501": "bounding_box_train/, query/ and bounding_box_test/ with images such as 0002_c1s1_000451_03.jpg"}


def read(name: str, root: Path) -> Iterator[Found]:
    """The three parts, by identity."""
    del name
    for part, people in zip(("train", "query", "gallery"), market1501(root), strict=True):
        yield Found(part, people.images, Counter(people.ids.tolist()))
