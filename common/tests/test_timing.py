"""How calls are timed in turn."""

import pytest
import torch

from common.metrics.timing import interleaved


@pytest.mark.parametrize(("threads", "calls"), [(1, 1 + 4), (2, 1 + 2 * 4)])
def test_with_several_threads_an_untimed_call_settles_the_workers_before_each_timed_one(threads, calls):
    order: list[str] = []
    torch.set_num_threads(threads)  # set back by the plugin
    found = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=4, warmup=1)
    assert order.count("a") == order.count("b") == calls and found["a"].rounds == 4
    assert order[2:6] == (list("abab") if threads == 1 else list("aabb"))
