"""Class orders of the data sets, and the balancing of RAF-DB's recipe.

Everything inside uses the order of the released APViT: anger, disgust, fear, sadness, happiness, surprise, neutral (,
contempt). A label of a data set is translated once, when it is read."""

import math
from collections.abc import Sequence

from common.data.faces import EXPRESSIONS as SEVEN

EXPRESSIONS = (*SEVEN, "contempt")

RAF_DB = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")  # labels 1..7
AFFECTNET = ("neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger", "contempt")  # labels 0..7
EXPW = ("anger", "disgust", "fear", "happiness", "sadness", "surprise", "neutral")  # labels 0..6
FERPLUS = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt")  # columns of votes
RAF_DB_COUNTS = (705, 717, 281, 1982, 4772, 1290, 2524)  # training images in our order

_SYNONYMS = {
    "angry": "anger", "disgusted": "disgust", "fearful": "fear", "afraid": "fear", "sad": "sadness", "happy": "happiness",
    "surprised": "surprise", "neutrality": "neutral", "contemptuous": "contempt",
}  # fmt: skip


def expression(name: str) -> int | None:
    """Class id of a class name as data sets write it ("Happy", "happiness", "4_fear"); None for none of them."""
    word = "".join(c for c in name.lower() if c.isalpha())
    word = _SYNONYMS.get(word, word)
    return EXPRESSIONS.index(word) if word in EXPRESSIONS else None


def our_label(order: Sequence[str], label: int) -> int:
    """Class id of `label` (from 0) in a data set's order. ValueError outside it."""
    if not 0 <= label < len(order):
        raise ValueError(f"label {label} outside 0..{len(order) - 1} ({', '.join(order)})")
    return EXPRESSIONS.index(order[label])


def repeat_factors(counts: Sequence[int], *, threshold: float = 0.15) -> list[int]:
    """How often every image of a class appears in an epoch: ceil(max(1, sqrt(threshold / f_c))), f_c its share.

    RAF-DB's training counts give 15,545 images per epoch from 12,271. Raises ValueError for an empty class."""
    if empty := [c for c, n in enumerate(counts) if n < 1]:
        raise ValueError(f"classes {empty} have no training image: their repeat factor is infinite")
    total = sum(counts)
    return [math.ceil(max(1.0, math.sqrt(threshold * total / n))) for n in counts]


def repeated_indices(targets: Sequence[int], factors: Sequence[int]) -> list[int]:
    """Indices of an epoch: image i as often as the factor of its class."""
    return [i for i, y in enumerate(targets) for _ in range(factors[y])]


def imbalanced_counts(n: int, shares: Sequence[int] = RAF_DB_COUNTS) -> list[int]:
    """n images in the proportions of `shares`, at least one each: largest remainders."""
    exact = [n * s / sum(shares) for s in shares]
    counts = [max(1, int(e)) for e in exact]
    for c in sorted(range(len(shares)), key=lambda c: exact[c] - int(exact[c]), reverse=True):
        if sum(counts) < n:
            counts[c] += 1
    if sum(counts) != n:
        raise ValueError(f"{n} images are too few for {len(shares)} classes in these proportions")
    return counts
