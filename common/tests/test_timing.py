"""How calls are timed in turn."""

import pytest
import torch

from common.metrics import timing


class Clock:
    """A clock that runs while calls work: an a takes 10 ms, a b 60, and 7 more where it was not the one before."""

    def __init__(self):
        self.now, self.order, self.pauses = 0.0, [], []

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.pauses.append((len(self.order), seconds))

    def call(self, name):
        self.now += {"a": 0.010, "b": 0.060}[name] + (0.007 if self.order[-1:] != [name] else 0)
        self.order.append(name)


@pytest.mark.parametrize(("threads", "expected"), [(1, "aaaaaab"), (2, "aaaaaabb")])
def test_a_time_is_the_mean_of_a_block_of_calls_behind_as_many_that_warm_the_caches(threads, expected, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    torch.set_num_threads(threads)  # set back by the plugin
    calls = {name: lambda name=name: clock.call(name) for name in "ab"}
    found = timing.interleaved(calls, rounds=4, warmup=1)
    assert "".join(clock.order) == "aabb" + 4 * expected
    assert found["a"].median == pytest.approx(10) and found["a"].rounds == found["b"].rounds == 4
    # with one thread nothing settles, and a call that is longer than a block has no other before it
    assert found["b"].median == pytest.approx(67 if threads == 1 else 60)
    assert clock.pauses == (
        [] if threads == 1 else [(n + 4, timing.PAUSE) for k in range(4) for n in (8 * k, 8 * k + 6)]
    )


def test_rounds_end_with_the_time_but_not_before_the_third(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    torch.set_num_threads(1)
    for seconds, rounds in ((0.0, 3), (0.3, 5), (9.0, 20)):
        assert timing.interleaved({"b": lambda: clock.call("b")}, seconds=seconds)["b"].rounds == rounds


def test_a_call_below_the_resolution_of_the_clock_fills_a_block_all_the_same(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    torch.set_num_threads(1)
    done: list[int] = []
    assert timing.interleaved({"nothing": lambda: done.append(1)}, rounds=2, warmup=1)["nothing"].median == 0
    assert len(done) == 2 + 2 * 2 * timing.MOST
