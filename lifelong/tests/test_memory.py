"""Memory: budget, shares, prefixes, policies, reservoir."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lifelong.memory import ExemplarMemory, Reservoir, herd


def task(classes, n=30):
    """Images whose single pixel is 1000 * class + index within the class."""
    labels = torch.tensor(sorted(classes) * n)
    index = torch.arange(n).repeat_interleave(len(classes))
    return (1000.0 * labels + index).view(-1, 1, 1, 1), labels


@given(st.integers(10, 80), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.sampled_from(["first", "random"]))
@settings(deadline=None, max_examples=30)
def test_every_class_keeps_its_share_and_shrinks_to_a_prefix(budget, sizes, policy):
    memory, seen = ExemplarMemory(budget, policy=policy), 0
    if sum(sizes) > budget:
        return
    before = {}
    for size in sizes:
        memory.add(*task(range(seen, seen + size)))
        seen += size
        share = min(30, budget // seen)
        assert len(memory) == share * seen <= budget
        for c, kept in memory.classes.items():
            assert len(kept) == share and (kept // 1000 == c).all() and len(kept.unique()) == share
            if c in before:
                assert torch.equal(kept, before[c][:share])
        before = dict(memory.classes)


def test_first_keeps_the_first_in_data_order():
    memory = ExemplarMemory(6)
    memory.add(*task([0, 1]))
    images, labels = memory.data()
    assert images.flatten().tolist() == [0, 1, 2, 1000, 1001, 1002] and labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert memory.data(slice(1, 2))[0].flatten().tolist() == [1000, 1001, 1002]


def test_random_is_deterministic_in_the_seed():
    kept = []
    for seed in (0, 0, 1):
        memory = ExemplarMemory(10, policy="random", seed=seed)
        memory.add(*task([0, 1]))
        kept.append(memory.data()[0])
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])


def test_exemplars_are_copies():
    images, labels = task([0])
    memory = ExemplarMemory(5)
    memory.add(images, labels)
    images.zero_()
    assert memory.data()[0].flatten().tolist() == [0, 1, 2, 3, 4]
    assert memory.classes[0].untyped_storage().nbytes() == 5 * 4, "a view would keep the whole task alive"


def test_herding_equals_brute_force():
    f = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(f.double(), dim=1)
    chosen = []
    for _ in range(5):
        left = [i for i in range(12) if i not in chosen]
        chosen.append(min(left, key=lambda i: float((unit[[*chosen, i]].mean(0) - unit.mean(0)).norm())))
    assert herd(f, 5).tolist() == chosen
    assert sorted(herd(f, 50).tolist()) == list(range(12))


def test_herding_keeps_an_ordered_prefix():
    memory = ExemplarMemory(8, policy="herding")
    features = lambda x: torch.cat([x.flatten(1).sin(), x.flatten(1).cos()], 1)  # noqa: E731
    memory.add(*task([0]), features)
    whole = memory.classes[0]
    memory.add(*task([1]), features)
    assert torch.equal(memory.classes[0], whole[:4])
    with pytest.raises(ValueError, match="feature function"):
        memory.add(*task([2]))


def test_state_round_trip():
    memory, other = ExemplarMemory(6), ExemplarMemory(6)
    memory.add(*task([0, 1]))
    other.load_state_dict(memory.state_dict())
    torch.testing.assert_close(other.data(), memory.data(), rtol=0, atol=0)


def test_bad_input():
    with pytest.raises(ValueError, match="'last'.*first, random, herding"):
        ExemplarMemory(5, policy="last")
    with pytest.raises(ValueError, match="budget=-1"):
        ExemplarMemory(-1)
    memory = ExemplarMemory(3)
    with pytest.raises(ValueError, match="budget=3 is smaller than the 4 classes"):
        memory.add(*task([0, 1, 2, 3]))
    memory.add(*task([0, 1]))
    with pytest.raises(ValueError, match=r"\[1\] are in memory already"):
        memory.add(*task([1]))
    with pytest.raises(ValueError, match="no image"):
        memory.data(slice(5, 7))
    with pytest.raises(ValueError, match="budget=0"):
        Reservoir(0)


def test_reservoir_is_uniform_and_keeps_rows_together():
    hits = torch.zeros(40)
    for seed in range(600):
        g = torch.Generator().manual_seed(seed)
        reservoir = Reservoir(8)
        for part in torch.arange(40).split(7):
            reservoir.add(part, -part, generator=g)
        assert len(reservoir) == 8 and torch.equal(reservoir.items[0], -reservoir.items[1])
        hits[reservoir.items[0]] += 1
    expected = 600 * 8 / 40
    assert (hits - expected).abs().max() < 5 * (expected * (1 - 8 / 40)) ** 0.5


def test_the_second_image_takes_the_only_place_half_the_time():
    taken = 0
    for seed in range(200):
        reservoir = Reservoir(1)
        reservoir.add(torch.arange(2), generator=torch.Generator().manual_seed(seed))
        taken += int(reservoir.items[0][0])
    assert 65 < taken < 135  # five deviations


def test_reservoir_samples_without_replacement():
    g = torch.Generator().manual_seed(0)
    reservoir = Reservoir(10)
    reservoir.add(torch.arange(4), generator=g)
    assert sorted(reservoir.sample(20, generator=g)[0].tolist()) == [0, 1, 2, 3]
