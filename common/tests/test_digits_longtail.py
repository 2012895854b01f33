import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.dataset import Dataset
from common.data.digits import all_digits, split_per_class, split_total
from common.data.longtail import load_indices, long_tail_counts, save_indices, subsample


def _same_images(a: Dataset, b: Dataset) -> int:
    """How many images of a also occur in b."""
    rows = {x.numpy().tobytes() for x in b.images}
    return sum(x.numpy().tobytes() in rows for x in a.images)


def test_all_digits_scale_and_size():
    data = all_digits()
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.min() == 0 and data.images.max() == 1
    assert (data.images * 16 == (data.images * 16).round()).all()
    assert data.targets.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_split_per_class_is_balanced_disjoint_and_complete():
    train, test = split_per_class(test_per_class=60, seed=4)
    assert test.targets.bincount().tolist() == [60] * 10
    assert len(train) + len(test) == 1797
    assert _same_images(test, train) == _same_images(test, Dataset(train.images, train.targets)) < 3
    again, _ = split_per_class(test_per_class=60, seed=4)
    other, _ = split_per_class(test_per_class=60, seed=5)
    assert torch.equal(train.images, again.images)
    assert not torch.equal(train.images, other.images)


def test_permuted_classes_are_renamed_alike_in_train_and_test():
    plain = split_per_class(seed=3)
    renamed = split_per_class(seed=3, permute_classes=True)
    names = {}
    for a, b in zip(plain, renamed, strict=True):
        assert torch.equal(a.images, b.images)
        for old, new in zip(a.targets.tolist(), b.targets.tolist(), strict=True):
            assert names.setdefault(old, new) == new
    assert sorted(names.values()) == list(range(10))
    assert any(old != new for old, new in names.items())


@pytest.mark.parametrize("value", [0, 174, 500])
def test_test_per_class_out_of_range(value):
    with pytest.raises(ValueError, match=f"1..173, got {value}"):
        split_per_class(test_per_class=value)


def test_split_total():
    train, test = split_total()
    assert (len(train), len(test)) == (1000, 797)
    joint = torch.cat([train.images, test.images]).flatten(1)
    everything = all_digits().images.flatten(1)
    assert torch.equal(joint.sum(0), everything.sum(0))
    with pytest.raises(ValueError, match="got 1797"):
        split_total(train=1797)
    with pytest.raises(ValueError, match="1..1796, got abc"):
        split_total(train="abc")  # type: ignore[arg-type]


def test_subset_carries_masks_and_extra():
    n = 5
    data = Dataset(
        torch.arange(n, dtype=torch.float32).reshape(n, 1, 1, 1),
        torch.arange(n),
        (torch.arange(n) % 2 == 0).reshape(n, 1, 1),
        {"k": torch.arange(n) * 10},
    )
    part = data.subset([3, 0])
    assert part.images.flatten().tolist() == [3, 0]
    assert part.masks is not None and part.masks.flatten().tolist() == [False, True]
    assert part.extra["k"].tolist() == [30, 0]


@pytest.mark.parametrize(
    ("images", "targets", "match"),
    [
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), "float32"),
        (torch.zeros(2, 2, 2), torch.zeros(2, dtype=torch.int64), "float32"),
        (torch.zeros(2, 1, 2, 2), torch.zeros(2), "int64"),
        (torch.zeros(2, 1, 2, 2), torch.zeros(3, dtype=torch.int64), "3 entries for 2"),
    ],
)
def test_dataset_rejects(images, targets, match):
    with pytest.raises(ValueError, match=match):
        Dataset(images, targets)


# Totals of the CIFAR-LT protocol and many/medium/few classes (>100, 20..100, <20).
@pytest.mark.parametrize(
    ("imbalance", "ten", "hundred", "groups"),
    [
        (10, 20431, 19573, (69, 31, 0)),
        (50, 13996, 12608, (41, 41, 18)),
        (100, 12406, 10847, (35, 35, 30)),
        (200, 11203, 9502, (30, 31, 39)),
    ],
)
def test_published_profiles(imbalance, ten, hundred, groups):
    assert sum(long_tail_counts(5000, imbalance, 10)) == ten
    counts = long_tail_counts(500, imbalance, 100)
    assert sum(counts) == hundred
    many, few = sum(c > 100 for c in counts), sum(c < 20 for c in counts)
    assert (many, 100 - many - few, few) == groups


def test_profile_ends():
    assert (long_tail_counts(5000, 100, 10)[0], long_tail_counts(5000, 100, 10)[-1]) == (5000, 50)
    assert (long_tail_counts(500, 100, 100)[0], long_tail_counts(500, 100, 100)[-1]) == (500, 5)
    digits = long_tail_counts(100, 50, 10)
    assert (digits[0], digits[1], digits[-1]) == (100, 64, 2)


@pytest.mark.parametrize("bad", [(0, 10, 10), (100, 0.5, 10), (100, 10, 1), (10, 100, 10)])
def test_profile_rejects(bad):
    with pytest.raises(ValueError):
        long_tail_counts(*bad)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.lists(st.integers(0, 5), min_size=4, max_size=4),
    st.integers(0, 9),
)
def test_subsample_counts_sorted_and_deterministic(targets, wanted, seed):
    have = np.bincount(targets, minlength=4)
    counts = [min(w, int(h)) for w, h in zip(wanted, have, strict=True)]
    drawn = subsample(targets, counts, seed=seed)
    assert drawn == sorted(set(drawn)) == subsample(torch.tensor(targets), counts, seed=seed)
    assert np.bincount(np.array(targets)[drawn] if drawn else [], minlength=4).tolist() == counts


def test_subsample_draws_at_random_and_class_by_class():
    targets = [0] * 100 + [1] * 100
    a, b = subsample(targets, [20, 20], seed=0), subsample(targets, [20, 20], seed=1)
    assert a != b and a[:20] != list(range(20))
    assert a[:20] != [i - 100 for i in a[20:]]  # classes do not share one draw
    fewer = subsample(targets, [5, 20], seed=0)
    assert [i for i in fewer if i >= 100] == [i for i in a if i >= 100]  # the other class is untouched
    assert set(fewer) <= set(a)


def test_subsample_rejects():
    with pytest.raises(ValueError, match="class 1 has 1 images, 2 asked"):
        subsample([0, 1], [1, 2], seed=0)
    with pytest.raises(ValueError, match=r"0\.\.2"):
        subsample([0, 1, 2], [1, 1], seed=0)


def test_index_list_round_trip(tmp_path):
    save_indices(tmp_path / "i.json", [1, 5, 9], dataset="cifar10", size=10)
    assert load_indices(tmp_path / "i.json", dataset="cifar10", size=10) == [1, 5, 9]
    assert [p.name for p in tmp_path.iterdir()] == ["i.json"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dataset": "cifar100"}, "belongs to cifar100"),
        ({"size": 11}, "11 images"),
        ({"count": 4}, "announces 4"),
        ({"indices": [1, 5, 10]}, "index 10"),
        ({"indices": [-1, 5, 9]}, "index -1"),
        ({"indices": [1, 5, 5]}, "5 appears more than once"),
        ({"indices": [1, 5, True]}, "True is not an integer"),
        ({"indices": "abc"}, "announces"),
    ],
)
def test_index_list_rejects(tmp_path, change, match):
    record = {"dataset": "cifar10", "size": 10, "count": 3, "indices": [1, 5, 9]} | change
    (tmp_path / "i.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=match):
        load_indices(tmp_path / "i.json", dataset="cifar10", size=10)


def test_index_list_missing_or_broken(tmp_path):
    with pytest.raises(FileNotFoundError, match="save_indices"):
        load_indices(tmp_path / "no.json", dataset="x", size=1)
    for text in ("{", "[1, 2]", "{}"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="not an index list"):
            load_indices(tmp_path / "bad.json", dataset="x", size=1)
    with pytest.raises(ValueError, match="more than once"):
        save_indices(tmp_path / "dup.json", [1, 1], dataset="x", size=3)
    assert not (tmp_path / "dup.json").exists()
