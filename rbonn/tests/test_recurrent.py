"""The recurrent layer and the hook that feeds it: the rule, when it is on, and that it cannot be off silently."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rbonn.bilinear import bilinear_binarize
from rbonn.density_relu import density_relu, small_scale_channels
from rbonn.recurrent import RECURRENT, RBConv2d, Recurrence

LOOKAHEAD = ("all", "drelu_official", "drelu_fixed")


def layer(recurrent="all", seed=0, **options):
    torch.manual_seed(seed)
    return RBConv2d(4, 10, 3, padding=1, recurrent=recurrent, **options)


def net(recurrent="all", **options):
    return nn.Sequential(layer(recurrent, **options), nn.BatchNorm2d(10), nn.Flatten(), nn.Linear(10 * 25, 3))


def batch(seed=0, n=8):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, 5, 5, generator=g).sign(), torch.randint(0, 3, (n,), generator=g)


def train(model, optimizer, steps, *, set_to_none=True, accumulation=1, zero_first=False):
    """Plain steps; returns the gradient that each of them applied to the first layer."""
    applied = []
    for k in range(steps):
        if zero_first:
            optimizer.zero_grad(set_to_none=set_to_none)
        x, y = batch(k)
        for xs, ys in zip(x.chunk(accumulation), y.chunk(accumulation), strict=True):
            (F.cross_entropy(model(xs.to(model[0].weight.dtype)), ys) / accumulation).backward()
        optimizer.step()
        applied.append(model[0].weight.grad.clone())
        if not zero_first:
            optimizer.zero_grad(set_to_none=set_to_none)
    return applied


@pytest.mark.parametrize("recurrent", LOOKAHEAD)
def test_training_forward_uses_the_backtracked_weight(recurrent):
    conv = layer(recurrent)
    Recurrence(conv, torch.optim.SGD(conv.parameters(), lr=0.1))
    g = torch.randn_like(conv.weight)
    conv.previous.copy_(g)
    alpha = conv.scale_factor.detach().abs()
    mask = torch.ones(10) if recurrent == "all" else small_scale_channels(alpha.flatten(), rule=recurrent[6:]).float()
    assert mask.sum() > 0 and (recurrent == "all" or mask.sum() == 4)
    w = conv.weight.detach() - 0.2 * g * mask.view(-1, 1, 1, 1)
    x = batch()[0]
    expected = F.conv2d(x, 0.02 * torch.where(w < 0, -1.0, 1.0) * alpha, padding=1)
    torch.testing.assert_close(conv(x), expected)
    conv.eval()
    plain = F.conv2d(x, 0.02 * torch.where(conv.weight < 0, -1.0, 1.0) * alpha, padding=1)
    torch.testing.assert_close(conv(x), plain)
    assert not torch.equal(expected, plain), "the look-ahead must flip some sign here"


@pytest.mark.parametrize("recurrent", LOOKAHEAD)
def test_gradient_of_u(recurrent):
    conv = layer(recurrent)
    Recurrence(conv, torch.optim.SGD(conv.parameters(), lr=0.1))
    conv.previous.copy_(torch.randn_like(conv.weight))
    conv(batch()[0]).square().sum().backward()
    mask = conv.chosen().view(-1, 1, 1, 1)
    expected = -(conv.weight.grad * conv.previous * mask).sum((1, 2, 3), keepdim=True)
    torch.testing.assert_close(conv.u.grad, expected)


def test_first_step_has_no_recurrence_and_the_second_forward_differs():
    plain, recurrent = net("none"), net("all")
    recurrent.load_state_dict(plain.state_dict(), strict=False)
    optimizer = torch.optim.SGD(recurrent.parameters(), lr=0.0)  # nothing moves but the snapshot
    recurrence = Recurrence(recurrent, optimizer)
    x, y = batch()
    Recurrence(plain, torch.optim.SGD(plain.parameters(), lr=0.0))
    first = recurrent(x)
    assert torch.equal(first, plain(x))
    (1000 * F.cross_entropy(first, y)).backward()
    optimizer.step()
    second = recurrent(x)
    assert not torch.equal(second, first)
    assert recurrence.counters()["lookahead_flips"] > 0
    recurrent[0].previous.mul_(1e-12)  # a step too small for any sign
    assert torch.equal(recurrent(x), first)


@pytest.mark.parametrize(
    "off",
    [
        {"recurrent": "all", "u_init": 0.0},
        {"recurrent": "drelu_fixed", "tau": 1.0},
        {"recurrent": "drelu_official", "tau": 1.0},
        {"recurrent": "paper", "tau": 0.0},
        {"recurrent": "paper", "tau": 1.0},
    ],
)
def test_switched_off_variants_are_the_bilinear_arm_bit_for_bit(off):
    plain, other = net("none"), net(**off)
    other.load_state_dict(plain.state_dict(), strict=False)
    for model in (plain, other):
        groups = [p for n, p in model.named_parameters() if not n.endswith(".u")]
        optimizer = torch.optim.Adam([{"params": groups}], lr=1e-2)
        Recurrence(model, optimizer)
        train(model, optimizer, 6)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("recurrent", [r for r in RECURRENT if r != "none"])
def test_scale_of_the_weights_and_sign_of_the_scale_do_not_matter(recurrent):
    conv = layer(recurrent).eval()
    x = batch()[0]
    before = conv(x)
    before.sum().backward()
    ds = conv.scale_factor.grad.clone()
    with torch.no_grad():
        conv.scale_factor.neg_()
    conv.scale_factor.grad = None
    after = conv(x)
    after.sum().backward()
    assert torch.equal(before, after) and torch.equal(conv.scale_factor.grad, -ds)
    with torch.no_grad():
        conv.weight.mul_(3)
    assert torch.equal(conv(x), before)


# ---------------------------------------------------------------------------------------------- the rule of the paper
def test_paper_writes_back_and_keeps_u_positive():
    model = net("paper", u_init=0.3)
    conv = model[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Recurrence(model, optimizer)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    w, u = conv.weight.detach().clone(), conv.u.detach().clone()
    chosen = density_relu(w, 1 / (0.02 * conv.scale_factor.detach().abs().flatten()))
    stepped = w - 0.1 * conv.weight.grad
    optimizer.step()
    assert 0 < chosen.flatten(1).any(1).sum() < 10
    torch.testing.assert_close(conv.weight.detach(), stepped + u * chosen)
    torch.testing.assert_close(conv.written_back, chosen)
    assert conv.previous is None
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(conv.u.grad, (conv.weight.grad * chosen).sum((1, 2, 3), keepdim=True))
    with torch.no_grad():
        conv.u.grad.fill_(100.0)  # would make u = 0.3 - 10
    w, u = conv.weight.detach().clone(), conv.u.detach().clone()
    again = density_relu(w, 1 / (0.02 * conv.scale_factor.detach().abs().flatten()))
    stepped = w - 0.1 * conv.weight.grad
    optimizer.step()
    torch.testing.assert_close(conv.weight.detach(), stepped + u * again)  # with U^t, not with U^{t+1}
    torch.testing.assert_close(conv.u.detach(), (u - 10).abs())


def test_the_papers_rule_keeps_signs_where_nothing_else_moves_them():
    model = net("paper")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    recurrence = Recurrence(model, optimizer)
    signs, size = model[0].weight.detach().sign(), model[0].weight.detach().abs().sum()
    train(model, optimizer, 5)
    assert torch.equal(model[0].weight.detach().sign(), signs) and model[0].weight.abs().sum() > size
    counters = recurrence.counters()
    assert counters["flip_rate"] == 0 and 0 < counters["active_share"] < 1


# ----------------------------------------------------------------------------------------- the snapshot is never silent
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("zero_first", [True, False])
def test_zero_grad_anywhere_does_not_switch_it_off(set_to_none, zero_first):
    model = net("all")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recurrence = Recurrence(model, optimizer)
    applied = train(model, optimizer, 3, set_to_none=set_to_none, zero_first=zero_first)
    assert torch.equal(model[0].previous, applied[-1]) and applied[-1].abs().sum() > 0
    assert recurrence.counters()["active_share"] == 1.0
    optimizer.zero_grad(set_to_none=set_to_none)  # what the released forward pass would read now is gone
    assert (model[0].weight.grad is None) is set_to_none and torch.equal(model[0].previous, applied[-1])


@pytest.mark.parametrize("recurrent", ["none", *LOOKAHEAD])
def test_one_step_applies_the_published_gradients(recurrent):
    """The split between backward pass and hook is invisible: a step from the whole published rule is the same."""
    conv = layer(recurrent, lam=0.3).double()
    optimizer = torch.optim.SGD(conv.parameters(), lr=1.0)
    Recurrence(conv, optimizer)
    previous = torch.randn_like(conv.weight)
    if conv.previous is not None:
        conv.previous.copy_(previous)
    x = batch()[0].double()
    w, s = (p.detach().clone().requires_grad_() for p in (conv.weight, conv.scale_factor))
    u = torch.full_like(s, 0.2).requires_grad_()
    mask = conv.chosen().view(-1, 1, 1, 1)
    back = w - u * previous * mask
    F.conv2d(x, bilinear_binarize(back, s.abs(), lam=0.3), padding=1).square().sum().backward()
    conv(x).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(conv.weight.detach(), (w - w.grad).detach())
    torch.testing.assert_close(conv.scale_factor.detach(), (s - s.grad).detach())
    if recurrent != "none":
        torch.testing.assert_close(conv.u.detach(), (u - u.grad).detach())
        torch.testing.assert_close(conv.previous, w.grad)


def test_accumulation_snapshots_the_whole_gradient_and_never_between():
    whole = nn.Sequential(layer(lam=0.3), nn.Flatten(), nn.Linear(250, 3)).double()  # a rounded sign would flip
    parts = copy.deepcopy(whole)
    for model, accumulation in ((whole, 1), (parts, 4)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        Recurrence(model, optimizer)
        train(model, optimizer, 4, accumulation=accumulation)
    torch.testing.assert_close(parts[0].previous, whole[0].previous)


def test_a_loss_scaler_is_seen_through_and_a_skipped_step_keeps_the_last_gradient():
    model = net("all", lam=1e-2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Recurrence(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = batch()
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    conv = model[0]
    residual = conv.weight - 0.02 * conv.weight.sign() * conv.scale_factor.abs()
    true = (conv.weight.grad / 1024 + 1e-2 * residual).detach()  # the pull of lam does not shrink with the loss scale
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(model[0].previous, true)
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(model(x), y) * float("inf")).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(model[0].previous, true)


def test_an_optimizer_that_unscales_or_differentiates_inside_its_step_is_refused():
    model = net("all")
    with pytest.raises(ValueError, match="fused=False"):
        Recurrence(model, torch.optim.Adam(model.parameters(), fused=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Recurrence(model, optimizer)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: F.cross_entropy(model(x), y))


def test_training_without_a_recurrence_or_on_a_copy_is_refused():
    model = net("drelu_fixed")
    x, y = batch()
    with pytest.raises(RuntimeError, match=r"without a Recurrence.*Recurrence\(model, optimizer\)"):
        model(x)
    model.eval()(x)  # evaluation needs none
    recurrence = Recurrence(model.train(), torch.optim.SGD(model.parameters(), lr=0.1))
    model(x)
    with pytest.raises(RuntimeError, match="not on a copy"):
        copy.deepcopy(model)(x)
    recurrence.remove()
    with pytest.raises(RuntimeError, match="without a Recurrence"):
        model(x)


def test_weights_outside_the_optimizer_and_missing_gradients_are_refused():
    model = net("all")
    with pytest.raises(ValueError, match="does not hold the recurrent weights of 0"):
        Recurrence(model, torch.optim.SGD(model[1].parameters(), lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Recurrence(model, optimizer)
    with pytest.raises(RuntimeError, match="no gradient at optimizer.step"):
        optimizer.step()


def test_state_of_the_recurrence_is_outside_the_models_state_and_resumes_exactly():
    model = net("drelu_fixed", tau=0.3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    recurrence = Recurrence(model, optimizer)
    train(model, optimizer, 3)
    assert {k for k in model.state_dict() if k.startswith("0.")} == {"0.weight", "0.scale_factor", "0.u"}
    other = net("drelu_fixed", tau=0.3, seed=1)
    other_optimizer = torch.optim.Adam(other.parameters(), lr=1e-2)
    other_recurrence = Recurrence(other, other_optimizer)
    other.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other_recurrence.load_state_dict(recurrence.state_dict())
    train(model, optimizer, 4)
    train(other, other_optimizer, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="other layers"):
        other_recurrence.load_state_dict({})


def test_flip_rate_counts_signs_changed_by_the_step():
    model = net("none")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recurrence = Recurrence(model, optimizer)
    before = model[0].weight.detach().clone()
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    model[0].weight.grad.copy_(
        torch.where(torch.arange(360).view(10, 4, 3, 3) < 90, 20 * before, 0)
    )  # w - 0.1 * 20 w = -w
    optimizer.step()
    assert recurrence.counters() == {"flip_rate": 0.25}
    assert recurrence.counters() == {}
    for _ in range(2):  # there and back again: as many of each step
        model[0].weight.grad.copy_(torch.where(torch.arange(360).view(10, 4, 3, 3) < 90, 20 * model[0].weight, 0))
        optimizer.step()
    assert recurrence.counters() == {"flip_rate": 0.25}


# --------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"recurrent": "drelu"}, "recurrent='drelu', allowed: none, all, drelu_official"),
        ({"tau": 1.5}, "tau=1.5"),
        ({"lam": -1.0}, "lam=-1.0"),
        ({"lam": float("nan")}, "lam=nan"),
        ({"u_init": -0.1}, "u_init=-0.1"),
        ({"const": 0.0}, "const=0.0"),
        ({"groups": 3}, "groups=3 must divide in_channels=4"),
    ],
)
def test_bad_options_name_the_value(options, error):
    with pytest.raises(ValueError, match=error):
        RBConv2d(4, 6, 3, **options)


def test_groups_stride_and_bias_follow_the_convolution():
    torch.manual_seed(0)
    conv = RBConv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=True, recurrent="none", lam=0.0)
    x = torch.randn(2, 4, 7, 7)
    w = bilinear_binarize(conv.weight, conv.scale_factor.abs())
    torch.testing.assert_close(conv(x), F.conv2d(x, w, conv.bias, 2, 1, 1, 2))


def test_the_exact_derivative_by_alpha_reaches_the_scale_factor():
    x, found = batch()[0], {}
    for name in ("released", "exact"):
        conv = layer("none", lam=0.0, scale_grad=name)
        conv(x).square().sum().backward()
        found[name] = conv.scale_factor.grad
    alpha = conv.scale_factor.detach()
    energy = conv(x).square().sum((0, 2, 3)).detach().view(-1, 1, 1, 1)  # the output is linear in alpha
    torch.testing.assert_close(found["exact"], 2 * energy / alpha)
    assert not torch.allclose(found["released"], found["exact"])
