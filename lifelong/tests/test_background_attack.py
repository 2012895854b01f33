"""The attack: bounds, regions, what must not change, first-order ascent."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lifelong.background_attack import background_attack, frozen_statistics, region_weight
from lifelong.learner import IMAGENET

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
BOUND = torch.tensor([8 / 255 / s for s in STD]).view(1, 3, 1, 1)
LOW = torch.tensor([(0 - m) / s for m, s in zip(MEAN, STD, strict=True)]).view(1, 3, 1, 1)
HIGH = torch.tensor([(1 - m) / s for m, s in zip(MEAN, STD, strict=True)]).view(1, 3, 1, 1)


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
    )


def batch(n=6):
    g = torch.Generator().manual_seed(1)
    raw = torch.rand(n, 3, 6, 6, generator=g)
    mean, std = (torch.tensor(s).view(1, 3, 1, 1) for s in (MEAN, STD))
    return (raw - mean) / std, torch.randint(0, 5, (n,), generator=g), torch.rand(n, 1, 6, 6, generator=g)


def attack(model, x, y, a, eps=8, **kw):
    kw = {"mean": MEAN, "std": STD, "generator": torch.Generator().manual_seed(2), **kw}
    return background_attack(model, x, y, a, eps, **kw)


def test_regions_by_hand():
    a = torch.tensor([0.5, 0.9]).view(1, 1, 1, 2)
    torch.testing.assert_close(region_weight(a).flatten(), torch.tensor([0.75, 0.19]))
    torch.testing.assert_close(region_weight(a, "foreground").flatten(), torch.tensor([0.25, 0.81]))
    assert region_weight(a, "everywhere").flatten().tolist() == [1, 1]
    with pytest.raises(ValueError, match="'sky'.*background, everywhere, foreground"):
        region_weight(a, "sky")


def test_equals_the_formula_written_out():
    x, y, a = batch()
    model = net().eval()
    delta = (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) - 1) * BOUND
    moved = (x + delta).requires_grad_(True)
    (g,) = torch.autograd.grad(F.cross_entropy(model(moved), y), moved)
    d = ((1 - a**2) * (delta + BOUND * g.sign())).clamp(-BOUND, BOUND)
    expected = torch.minimum(torch.maximum(x + d, LOW), HIGH)
    torch.testing.assert_close(attack(model, x, y, a), expected)


def test_stays_within_eps_and_the_image_box():
    x, y, a = batch()
    for region in ("background", "everywhere"):
        out = attack(net(), x, y, a, region=region)
        assert ((out - x).abs() <= BOUND * (1 + 1e-5)).all() and (out >= LOW).all() and (out <= HIGH).all()
        assert ((out - x).abs() > 0.5 * BOUND).any(), "the step must reach beyond the random start"


def test_statistics_of_other_images_step_further_and_leave_the_range():
    """The released code crafts with the statistics of ImageNet, whatever the images were normalised with."""
    white, y, nowhere = HIGH.expand(6, 3, 6, 6), torch.zeros(6, dtype=torch.long), torch.zeros(6, 1, 6, 6)
    mean, std, theirs = (torch.tensor(s).view(1, 3, 1, 1) for s in (MEAN, STD, IMAGENET["std"]))
    assert (attack(net(), white, y, nowhere) * std + mean).max() <= 1 + 1e-6
    beyond = (attack(net(), white, y, nowhere, **IMAGENET) * std + mean).amax((0, 2, 3)) - 1
    ratio = (std / theirs).flatten()
    torch.testing.assert_close(beyond, 8 / 255 * ratio, rtol=1e-3, atol=1e-6)
    assert ratio.min() > 1.14 and ratio.max() < 1.23


def test_no_weight_or_no_eps_changes_nothing():
    x, y, _ = batch()
    torch.testing.assert_close(attack(net(), x, y, torch.ones(6, 1, 6, 6)), x)
    torch.testing.assert_close(attack(net(), x, y, torch.zeros(6, 1, 6, 6), eps=0), x)


def test_only_where_attention_is_low():
    x, y, a = batch()
    a = torch.zeros_like(a)
    a[..., :3] = 1
    out = attack(net(), x, y, a)
    assert torch.equal(out[..., :3], x[..., :3]) and not torch.equal(out[..., 3:], x[..., 3:])


def test_crafting_leaves_the_model_alone():
    x, y, a = batch()
    model = net()
    model(x).sum().backward()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    attack(model, x, y, a, freeze_bn=True)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close([p.grad for p in model.parameters()], grads, rtol=0, atol=0)
    attack(model, x, y, a)
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_frozen_statistics_still_uses_the_batch():
    model = net()
    x, _, _ = batch()
    normal = model(x)
    with frozen_statistics(model):
        torch.testing.assert_close(model(x), normal)
    assert model[1].track_running_stats


def test_loss_does_not_fall_on_a_linear_model():
    """Cross entropy of a linear model is convex: a step along the gradient's signs cannot lower it."""
    x, y, a = batch(20)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 5))
    inside = x.clamp(LOW + BOUND, HIGH - BOUND)
    out = attack(model, inside, y, a, eps=1, delta=torch.zeros_like(x))
    before, after = (F.cross_entropy(model(v), y, reduction="none") for v in (inside, out))
    assert (after >= before - 1e-6).all() and (after > before).any()


def test_the_map_may_be_a_function_and_coarser_than_the_image():
    x, y, _ = batch()
    coarse = torch.zeros(6, 1, 3, 3)
    coarse[:, :, 0, 0] = 1
    model = net().eval()
    out = attack(model, x, y, lambda _: coarse)
    fine = F.interpolate(1 - coarse**2, size=(6, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(out, attack(model, x, y, (1 - fine).sqrt()))


def test_no_gradient_reaches_the_map():
    x, y, a = batch()
    a = a.requires_grad_(True)
    assert not attack(net(), x, y, a).requires_grad


@pytest.mark.parametrize(
    ("kw", "error"),
    [
        ({"eps": -1}, "eps=-1"),
        ({"mean": (0.0, 1.0)}, "3 channels"),
        ({"std": (0.0,)}, "std > 0"),
        ({"region": "x"}, "'x'"),
    ],
)
def test_bad_input(kw, error):
    with pytest.raises(ValueError, match=error):
        attack(net(), *batch(), **kw)
