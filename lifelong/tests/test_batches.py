"""Last batches: small ones at the full rate decide results."""

import pytest
import torch

from lifelong.batches import cut


def sizes(n, last):
    return [len(part) for part in cut(torch.arange(n), 8, last)]


@pytest.mark.parametrize(
    ("n", "merge", "drop", "keep"),
    [
        (16, [8, 8], [8, 8], [8, 8]),
        (19, [8, 11], [8, 8], [8, 8, 3]),  # under half the size: joined to the one before
        (20, [8, 8, 4], [8, 8], [8, 8, 4]),
        (17, [8, 9], [8, 8], [8, 8]),  # one image is nothing to batch norm
        (5, [5], [5], [5]),  # all there is
    ],
)
def test_what_becomes_of_the_last_batch(n, merge, drop, keep):
    assert (sizes(n, "merge"), sizes(n, "drop"), sizes(n, "keep")) == (merge, drop, keep)


@pytest.mark.parametrize("n", range(2, 40))
def test_merging_uses_every_image_once_and_no_batch_is_small(n):
    parts = cut(torch.randperm(n), 8)
    assert sorted(torch.cat(parts).tolist()) == list(range(n))
    assert len(parts) == 1 or min(map(len, parts)) >= 4


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="last_batch='pad', allowed: merge, drop, keep"):
        cut(torch.arange(9), 4, "pad")
