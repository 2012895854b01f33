import math

import pytest

from ap_fer.schedule import lr_at


def test_cosine_moves_once_per_epoch_from_the_full_rate_and_never_reaches_zero_in_training():
    rates = [lr_at("cosine_epoch", s, steps_per_epoch=10, epochs=40, lr=1e-3) for s in range(400)]
    assert len(set(rates)) == 40 and rates[0] == rates[9] == 1e-3 and rates[10] < 1e-3
    assert rates[200] == pytest.approx(5e-4) and rates[-1] == pytest.approx(
        1e-3 * (1 + math.cos(math.pi * 39 / 40)) / 2
    )


def test_one_cycle_starts_low_peaks_at_30_percent_and_ends_near_zero():
    rates = [lr_at("one_cycle", s, steps_per_epoch=10, epochs=10, lr=2.0) for s in range(100)]
    assert rates[0] == pytest.approx(2 / 25) and rates[-1] == pytest.approx(2e-4)
    peak = rates.index(max(rates))
    assert 29 <= peak <= 30 and max(rates) == pytest.approx(2.0, rel=1e-3)
    assert rates[:30] == sorted(rates[:30]) and rates[31:] == sorted(rates[31:], reverse=True)
    with pytest.raises(ValueError, match=r"schedule.kind='step', allowed: one_cycle, cosine_epoch"):
        lr_at("step", 0, steps_per_epoch=1, epochs=1, lr=1)
