import math

import pytest

from ncl_pp.schedule import lr_at

CIFAR = {"base_lr": 0.1, "epochs": 400}


@pytest.mark.parametrize(
    ("epoch", "lr"),
    [
        *[(1, 0.046667), (2, 0.06), (3, 0.073333), (4, 0.086667), (5, 0.1), (6, 0.1)],
        *[(319, 0.1), (320, 0.01), (359, 0.01), (360, 0.001), (400, 0.001)],
    ],
)
def test_cifar(epoch, lr):
    assert lr_at(epoch, **CIFAR) == pytest.approx(lr, abs=5e-7)


@pytest.mark.parametrize(("epoch", "lr"), [(5, 0.02), (9, 0.02), (10, 0.002), (19, 0.002), (20, 0.0002)])
def test_places(epoch, lr):
    assert lr_at(epoch, base_lr=0.02, epochs=30, milestones=(10, 20)) == pytest.approx(lr)


def test_cosine_is_stepped_before_the_epoch_and_ends_at_the_minimum():
    def lr(epoch):
        return lr_at(epoch, base_lr=0.2, epochs=200, kind="cosine", warmup=0)

    assert lr(200) == pytest.approx(1e-4, abs=1e-12)
    assert lr(100) == pytest.approx(1e-4 + (0.2 - 1e-4) / 2)
    assert lr(1) == pytest.approx(1e-4 + (0.2 - 1e-4) * (1 + math.cos(math.pi / 200)) / 2) and lr(1) < 0.2
    assert all(lr(e) > lr(e + 1) for e in range(1, 200))


def test_cosine_after_warm_up():
    lrs = [lr_at(e, base_lr=0.1, epochs=120, kind="cosine", warmup=3) for e in range(1, 121)]
    assert lrs[2] == max(lrs) == pytest.approx(0.1)
    assert lrs[0] == pytest.approx(0.1 * (1 / 3 + 2 / 9))
    assert lrs[-1] == pytest.approx(1e-4, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 0}, "epoch=0"),
        ({"epoch": 401}, "epoch=401"),
        ({"kind": "cos"}, "allowed: step, cosine"),
        ({"warmup": 400}, "warmup=400"),
        ({"milestones": (360, 320)}, "milestones"),
        ({"epochs": 120}, "none beyond epochs=120"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        lr_at(**({"epoch": 1} | CIFAR | change))
