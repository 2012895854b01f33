"""One batch of the meta update: closed forms on linear models, semantics, absent and single-sample tasks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lifelong.adaptive_fusion import fuse
from lifelong.meta_update import MetaOptions, group_bce, meta_step
from lifelong.model import build_model

GROUPS = [slice(0, 2), slice(2, 5)]


class Linear(nn.Module):
    """A linear classifier of flat images with a constant map."""

    def __init__(self, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(4) if norm else nn.Identity()
        self.head = nn.Linear(4, 5, bias=False)

    def forward(self, x, return_attention=False):
        z = self.head(self.norm(x.flatten(1)))
        return (z, torch.full((len(x), 1, 2, 2), 0.5)) if return_attention else z


def batch(labels):
    return torch.randn(len(labels), 1, 2, 2, generator=torch.Generator().manual_seed(3)), torch.tensor(labels)


def run(model, x, y, *, alpha=1.0, lr=0.1, groups=GROUPS, **options):
    options = MetaOptions(**{"attack": None, **options})
    count = len(groups) if options.optimizer_state == "per_task" else 1
    optimizers = [torch.optim.SGD(model.parameters(), lr=lr) for _ in range(count)]
    return meta_step(
        model, optimizers, x, y, groups, alpha=alpha, options=options, generator=torch.Generator().manual_seed(5)
    )


def gradient(w, x, y, group):
    w = w.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(group_bce(x.flatten(1) @ w.T, y, group), w)
    return g


def test_group_loss_by_hand_and_its_gradient_outside():
    z = torch.tensor([[5.0, 0.0, 1.0, -1.0, 2.0]], requires_grad=True)
    loss = group_bce(z, torch.tensor([3]), GROUPS[1])
    expected = (F.softplus(torch.tensor(1.0)) + F.softplus(torch.tensor(1.0)) + F.softplus(torch.tensor(2.0))) / 3
    assert loss.item() == pytest.approx(expected.item())
    loss.backward()
    assert z.grad[0, :2].tolist() == [0, 0] and (z.grad[0, 2:] != 0).all()


def test_inner_updates_and_mean_fusion_are_one_step_on_the_mean_loss():
    x, y = batch([0, 1, 0, 3, 4, 2])
    model = Linear()
    w = model.head.weight.detach().clone()
    run(model, x, y, alpha=0.7, weights="mean")
    g = [gradient(w, x[:3], y[:3], GROUPS[0]), gradient(w, x[3:], y[3:], GROUPS[1])]
    torch.testing.assert_close(model.head.weight.detach(), w - 0.7 * 0.1 * (g[0] + g[1]) / 2)


def test_adaptive_fusion_equals_fuse_on_the_task_states():
    x, y = batch([0, 1, 0, 3, 4, 2])
    model = Linear()
    w = model.head.weight.detach().clone()
    run(model, x, y, alpha=0.6, lr=2.0)
    tasks = [
        {"w": w - 2.0 * gradient(w, x[i], y[i], g)} for i, g in ((slice(0, 3), GROUPS[0]), (slice(3, 6), GROUPS[1]))
    ]
    torch.testing.assert_close(model.head.weight.detach(), fuse({"w": w}, tasks, 0.6)["w"])
    plain = fuse({"w": w}, tasks, 0.6, "mean")["w"]
    assert not torch.allclose(model.head.weight, plain, atol=1e-4), "this case must tell the two fusions apart"


def test_sequential_last_starts_each_task_where_the_last_ended_and_never_fuses():
    x, y = batch([0, 1, 0, 3, 4, 2])
    results = []
    for weights in ("adaptive", "mean"):
        model = Linear()
        w = model.head.weight.detach().clone()
        run(model, x, y, alpha=0.6, semantics="sequential_last", weights=weights)
        first = w - 0.1 * gradient(w, x[:3], y[:3], GROUPS[0])
        last = first - 0.1 * gradient(first, x[3:], y[3:], GROUPS[1])
        torch.testing.assert_close(model.head.weight.detach(), 0.6 * last + 0.4 * w)
        results.append(model.head.weight.detach())
    assert torch.equal(*results)


def test_the_first_task_is_plain_training_bit_for_bit():
    x, y = batch([0, 1, 0, 1])
    a, b = Linear(), Linear()
    for name in ("sgd", "radam"):
        make = {"sgd": torch.optim.SGD, "radam": torch.optim.RAdam}[name]
        oa, ob = make(a.parameters(), lr=0.1), make(b.parameters(), lr=0.1)
        for _ in range(3):
            meta_step(a, [oa], x, y, GROUPS[:1], alpha=1.0, options=MetaOptions(attack=None))
            ob.zero_grad()
            group_bce(b(x), y, GROUPS[0]).backward()
            ob.step()
        assert torch.equal(a.head.weight, b.head.weight)


def test_absent_tasks_take_no_part_and_single_samples_are_skipped_with_batch_norm():
    x, y = batch([0, 1, 0, 3])
    model, alone = Linear(norm=True), Linear(norm=True)
    assert run(model, x, y)["skipped"].item() == 1
    assert run(alone, x[:3], y[:3])["skipped"].item() == 0
    torch.testing.assert_close(model.state_dict(), alone.state_dict(), rtol=0, atol=0)
    assert run(Linear(), x, y)["skipped"].item() == 0, "without batch norm a single sample is used"
    assert run(Linear(), x, y, min_samples=2)["skipped"].item() == 1


def test_a_batch_without_usable_task_changes_nothing():
    x, y = batch([0, 3])
    model = Linear(norm=True)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    terms = run(model, x, y, alpha=0.5)
    assert terms["skipped"].item() == 2 and "clean" not in terms
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_attack_and_second_clean_step_both_take_two_optimiser_steps(monkeypatch):
    x, y = batch([0, 1, 0, 3, 4, 2])
    steps = []
    original = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *a: (steps.append(1), original(self, *a))[1])
    for options, count in (({}, 2), ({"attack": "background"}, 4), ({"steps": 2}, 4)):
        steps.clear()
        run(Linear(), x, y, **options)
        assert len(steps) == count


def test_attack_without_eps_equals_the_second_clean_step_inside_the_box():
    x, y = batch([0, 1, 0, 3, 4, 2])
    x = x.sigmoid()  # inside 0..1
    a, b, c = Linear(), Linear(), Linear()
    run(a, x, y, attack="background", eps=0.0)
    run(b, x, y, steps=2)
    run(c, x, y, attack="background", eps=64.0)
    torch.testing.assert_close(a.head.weight, b.head.weight)
    assert not torch.allclose(a.head.weight, c.head.weight)


def test_every_region_and_the_clean_step_are_different_updates():
    """An attack that does not pass its region on would make three arms one."""
    torch.manual_seed(0)
    start = build_model(name="mlp", num_classes=5, channels=1, size=8, hidden=10).state_dict()
    x, y = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 0, 3, 4, 2])
    found = {}
    for name, options in {
        "background": {"attack": "background"}, "foreground": {"attack": "foreground"},
        "everywhere": {"attack": "everywhere"}, "clean": {"steps": 2},
    }.items():  # fmt: skip
        model = build_model(name="mlp", num_classes=5, channels=1, size=8, hidden=10)
        model.load_state_dict(start)
        run(model, x, y, lr=1.0, **({"eps": 64.0} | options if "attack" in options else options))
        found[name] = model.head.weight.detach().clone()
    names = list(found)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert not torch.allclose(found[a], found[b], atol=1e-6), f"{a} and {b} are one"


def test_the_loss_over_all_classes_seen_teaches_the_other_tasks_logits():
    x, y = batch([3, 4, 2])
    for loss, learned in (("group", slice(2, 5)), ("seen", slice(0, 5))):
        model = Linear()
        w = model.head.weight.detach().clone()
        run(model, x, y, loss=loss)
        torch.testing.assert_close(model.head.weight.detach(), w - 0.1 * gradient(w, x, y, learned))
    other = Linear()  # of three groups with two seen, the third learns nothing
    w = other.head.weight.detach().clone()
    run(other, *batch([0, 1]), groups=GROUPS[:1], loss="seen")
    assert torch.equal(other.head.weight[2:].detach(), w[2:])


def test_moments_are_shared_or_kept_per_task():
    x, y = batch([0, 1, 0, 3, 4, 2])
    outcomes = []
    for state, count in (("shared", 1), ("per_task", 2)):
        model = Linear()
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for _ in range(count)]
        for _ in range(3):
            meta_step(
                model, optimizers, x, y, GROUPS,
                alpha=1.0, options=MetaOptions(attack=None, optimizer_state=state),
            )  # fmt: skip
        outcomes.append(model.head.weight.detach().clone())
    assert not torch.allclose(*outcomes)


def test_only_parameters_are_fused():
    x, y = batch([0, 1, 0, 3, 4, 2])
    model = Linear(norm=True)
    run(model, x, y, alpha=0.5)
    assert model.norm.num_batches_tracked.item() == 2  # statistics ran along both inner passes


def test_steps_on_a_real_network():
    model = build_model(name="rps_net", num_classes=5, widths=(2, 2, 2, 2), channels=1)
    x = torch.rand(8, 1, 8, 8)
    terms = run(model, x, torch.tensor([0, 1, 0, 1, 2, 3, 4, 2]), attack="background", eps=8.0)
    assert {"clean", "attacked", "skipped", "spread"} == set(terms) and all(v.isfinite() for v in terms.values())


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0}, {"loss": "all"},
        {"attack": "sky"}, {"semantics": "both"}, {"weights": "max"}, {"distance": "l2"}, {"constant": 0.0},
        {"beta": -1.0}, {"eps": -1.0}, {"optimizer_state": "none"}, {"min_samples": 0},
    ],
)  # fmt: skip
def test_bad_options(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}=.*allowed"):
        MetaOptions(**bad)
