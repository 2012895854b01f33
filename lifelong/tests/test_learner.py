"""Learners: a stream observed, predictions in three modes, every baseline's own rule, state."""

import pytest
import torch
import torch.nn.functional as F

from lifelong.augmentation import Prepare
from lifelong.build import LEARNERS, build_learner
from lifelong.learner import Learner, lr_factor, make_optimizer
from lifelong.model import build_model
from lifelong.task_prediction import group_scores, vote, within_group

REPLAY = {"lwf": "none", "ewc": "none", "reservoir": "none"}
OPTIONS = {"meta": {"eps": 8.0}, "reservoir": {"buffer": 12, "logits": 0.5, "labels": 0.5}}


def blobs(classes, n=20, seed=0):
    """Images of one bright pixel per class with noise, labels as given."""
    g = torch.Generator().manual_seed(seed + min(classes))
    labels = torch.tensor(sorted(classes) * n)
    images = 0.3 * torch.rand(len(labels), 1, 4, 4, generator=g)
    images.view(len(labels), 16)[torch.arange(len(labels)), labels] += 0.7
    return images, labels


TASKS = [[0, 1, 2], [3, 4], [5, 6, 7]]


def make(kind="meta", *, classes=8, lr=1.0, seed=0, options=None, **common):
    torch.manual_seed(seed)
    model = build_model(name="mlp", num_classes=classes, channels=1, size=4, hidden=16)
    common = {
        "total_tasks": 3, "replay": REPLAY.get(kind, "memory"), "budget": 24, "batch_size": 16, "epochs": 3,
        "policy": "herding" if kind == "icarl" else "first", "optim": {"lr": lr}, "seed": seed, **common,
    }  # fmt: skip
    return build_learner(kind, model, Prepare(mean=[0.0], std=[1.0], size=4), {**OPTIONS, **(options or {})}, **common)


@pytest.mark.parametrize("growing", [False, True], ids=["fixed", "growing"])
@pytest.mark.parametrize("kind", sorted(LEARNERS))
def test_every_learner_observes_unequal_tasks_and_predicts(kind, growing):
    learner = make(kind, classes=3 if growing else 8, lr=0.2)
    for task in TASKS:
        rows = learner.observe_task(blobs(task))
        assert len(rows) == 3 and all(v == v for row in rows for v in row.values())
    assert learner.seen == 8 and learner.model.head.out_features == 8
    images, labels = blobs(TASKS[1], seed=9)
    for mode in ("class_il", "continuum"):
        found = learner.predict(images, mode)
        assert found.shape == labels.shape and int(found.max()) < 8
    found = learner.predict(images, "task_il", task=1)
    assert set(found.tolist()) <= {3, 4}


def test_a_data_set_is_learned_as_its_tensors_are():
    a, b = make("meta"), make("meta")
    for task in TASKS[:2]:
        a.observe_task(blobs(task))
        b.observe_task(torch.utils.data.TensorDataset(*blobs(task)))
    torch.testing.assert_close(a.model.state_dict(), b.model.state_dict(), rtol=0, atol=0)


def test_ari_learns_the_classes_of_every_task():
    learner = make("meta", lr=1.0, epochs=20)
    for task in TASKS:
        rows = learner.observe_task(blobs(task))
    assert rows[-1]["clean"] < 0.7 * rows[0]["clean"]
    right = [(learner.predict(x, "task_il", task=k) == y).float().mean() for k, (x, y) in enumerate(map(blobs, TASKS))]
    assert min(right) > 0.9


@pytest.mark.parametrize("kind", sorted(LEARNERS))
def test_state_resumed_in_the_middle_of_a_task_goes_on_bit_for_bit(kind):
    learners = [make(kind, classes=3, lr=0.2) for _ in range(2)]

    def epoch(learner, data, number):
        for batch in learner.epoch(*learner.training_set(*data), number):
            learner.step(*batch)

    first, second, third = map(blobs, TASKS)
    a = learners[0]
    a.observe_task(first)
    a.begin_task(2)
    epoch(a, second, 1)
    b = learners[1]
    b.load_state_dict(a.state_dict())
    for learner in (a, b):
        epoch(learner, second, 2)
        learner.end_task(*second)
        learner.observe_task(third)
    torch.testing.assert_close(b.model.state_dict(), a.model.state_dict(), rtol=0, atol=0)
    assert torch.equal(a.predict(third[0], "continuum"), b.predict(third[0], "continuum"))


def test_batches_mix_new_and_old_and_depend_on_seed_task_and_epoch_alone():
    learner = make("ce")
    learner.observe_task(blobs(TASKS[0]))
    learner.begin_task(2)
    data = learner.training_set(*blobs(TASKS[1]))
    assert len(data[0]) == 40 + 24
    draws = [torch.cat([y for _, y, _ in learner.epoch(*data, e)]) for e in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert sorted(draws[0].tolist()) == sorted(data[1].tolist())


def test_joint_replays_everything_and_finetune_nothing():
    for replay, expected in (("all", 60 + 40), ("none", 40)):
        learner = make("ce", replay=replay)
        learner.observe_task(blobs(TASKS[0]))
        learner.begin_task(2)
        assert len(learner.training_set(*blobs(TASKS[1]))[0]) == expected


def test_cross_entropy_ignores_classes_not_seen_yet():
    learner = make("ce")
    learner.observe_task(blobs(TASKS[0]))
    start = make("ce").model.head.weight
    assert torch.equal(learner.model.head.weight[3:], start[3:])
    assert int(learner.predict(blobs(TASKS[2])[0]).max()) < 3


def test_the_continuum_votes_then_asks_the_adapted_copy():
    learner = make("meta", epochs=2)
    for task in TASKS:
        learner.observe_task(blobs(task))
    images, _ = blobs(TASKS[1], seed=5)
    before = {n: v.clone() for n, v in learner.model.state_dict().items()}
    found = learner.predict(images, "continuum", p=7)
    torch.testing.assert_close(learner.model.state_dict(), before, rtol=0, atol=0)
    voted = vote(group_scores(learner.run(learner.scores, images), learner.groups), 7)
    for k, group in enumerate(learner.groups):
        if (voted == k).any():
            expected = within_group(learner.run(learner.adapted(k), images), group)
            assert torch.equal(found[voted == k], expected[voted == k])


def test_without_adaptation_the_base_model_decides_and_the_first_task_is_never_adapted(monkeypatch):
    learner = make("meta")
    monkeypatch.setattr(type(learner), "adapted", lambda *_: pytest.fail("must not adapt"))
    learner.observe_task(blobs(TASKS[0]))
    learner.predict(blobs(TASKS[0])[0], "continuum")
    learner.observe_task(blobs(TASKS[1]))
    learner.predict_sets([blobs(TASKS[0])[0]], p=5, adapt=False)


# ----------------------------------------------------------------------------------------------------------- baselines
def losses(learner, images, labels):
    g = torch.Generator().manual_seed(0)
    return learner.losses(learner.prepare(images), images, labels, g)


def test_lwf_distils_the_old_logits():
    learner = make("lwf", options={"lwf": {"weight": 2.0, "temperature": 3.0}})
    learner.observe_task(blobs(TASKS[0]))
    learner.begin_task(2)
    images, labels = blobs(TASKS[1])
    at_start = losses(learner, images, labels)
    assert at_start["distillation"].item() == pytest.approx(0, abs=1e-6), "student and teacher are equal"
    with torch.no_grad():
        learner.model.head.weight.add_(3 * torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))
    terms = losses(learner, images, labels)
    new, old = (F.softmax(m(images)[:, :3] / 3, 1) for m in (learner.model, learner.teacher))
    torch.testing.assert_close(
        terms["distillation"], 2 * 9 * (old * (old / new).log()).sum(1).mean(), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(terms["ce"], F.cross_entropy(learner.model(images)[:, 3:5], labels - 3))


def test_ewc_fisher_and_penalty_by_hand():
    learner = make("ewc", options={"ewc": {"weight": 10.0, "samples": 60}})
    images, labels = blobs(TASKS[0])
    learner.observe_task((images, labels))
    fisher = torch.zeros_like(learner.model.head.weight)
    for x, y in zip(images.split(1), labels.split(1), strict=True):
        loss = F.cross_entropy(learner.model(x)[:, :3], y)
        fisher += torch.autograd.grad(loss, learner.model.head.weight)[0] ** 2 / 60
    torch.testing.assert_close(learner.fisher["head.weight"], fisher)
    learner.begin_task(2)
    assert losses(learner, *blobs(TASKS[1]))["ewc"].item() == 0
    with torch.no_grad():
        learner.model.head.weight.add_(0.1)
    assert losses(learner, *blobs(TASKS[1]))["ewc"].item() == pytest.approx(5 * 0.01 * fisher.sum().item(), rel=1e-4)


def test_icarl_targets_and_nearest_mean():
    learner = make("icarl")
    for task in TASKS[:2]:
        learner.observe_task(blobs(task))
    images, labels = blobs(TASKS[1])
    logits, old = learner.model(images)[:, :5], learner.teacher(images)[:, :3].sigmoid()
    target = torch.cat([old, F.one_hot(labels - 3, 2).float()], 1)
    expected = -(target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)).sum(1).mean()
    torch.testing.assert_close(losses(learner, images, labels)["bce"], expected)
    unit = F.normalize(learner.model.features(images), dim=1)
    kept, of = learner.memory.data()
    centre = F.normalize(learner.model.features(kept), dim=1)
    centre = F.normalize(torch.stack([centre[of == c].mean(0) for c in range(5)]), dim=1)
    assert torch.equal(learner.predict(images), torch.cdist(unit, centre).argmin(1))


def test_derpp_terms_by_hand():
    learner = make("reservoir", options={"reservoir": {"buffer": 4, "logits": 0.5, "labels": 0.25}})
    learner.begin_task(3)
    images, labels = blobs(TASKS[0])
    g = torch.Generator().manual_seed(0)
    learner.reservoir.add(images[:4], labels[:4], torch.ones(4, 8), generator=g)  # a draw of 4 is the whole buffer
    terms = losses(learner, images, labels)
    z = learner.model(images)
    torch.testing.assert_close(terms["ce"], F.cross_entropy(z, labels))
    torch.testing.assert_close(terms["logits"], 0.5 * ((z[:4] - 1) ** 2).mean())
    torch.testing.assert_close(terms["labels"], 0.25 * F.cross_entropy(z[:4], labels[:4]))


def test_er_with_a_reservoir_joins_new_and_old():
    learner = make("reservoir", options={"reservoir": {"buffer": 4}})
    learner.begin_task(3)
    images, labels = blobs(TASKS[0])
    learner.reservoir.add(images[:4], labels[:4], torch.ones(4, 8), generator=torch.Generator().manual_seed(0))
    both, of = torch.cat([images, images[:4]]), torch.cat([labels, labels[:4]])
    torch.testing.assert_close(losses(learner, images, labels)["ce"], F.cross_entropy(learner.model(both), of))


# -------------------------------------------------------------------------------------------------------------- errors
def test_schedules_and_optimisers():
    assert [round(lr_factor(e, 70, kind="step", milestones=[20, 40, 60]), 4) for e in (20, 21, 41, 61)] == [
        1,
        0.2,
        0.04,
        0.008,
    ]
    assert lr_factor(1, 10, kind="cosine") == 1 and lr_factor(6, 10, kind="cosine") == pytest.approx(0.5)
    weights = [torch.nn.Parameter(torch.zeros(2))]
    assert isinstance(make_optimizer(weights, name="radam", lr=0.01), torch.optim.RAdam)
    for bad, error in (({"name": "adam"}, "'adam', allowed: sgd, radam"), ({"lr": 0.0}, r"lr=0\.0")):
        with pytest.raises(ValueError, match=error):
            make_optimizer(weights, **bad)
    with pytest.raises(ValueError, match="'poly', allowed"):
        lr_factor(1, 10, kind="poly")


def test_refused_tasks_and_predictions():
    learner = make("ce")
    with pytest.raises(ValueError, match="no task was observed"):
        learner.predict(torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"every one of 0\.\.1"):
        learner.observe_task(blobs([0, 2]))
    learner = make("ce")
    learner.observe_task(blobs(TASKS[0]))
    with pytest.raises(ValueError, match="mode='plain'"):
        learner.predict(torch.zeros(1, 1, 4, 4), "plain")
    with pytest.raises(ValueError, match="needs the task, task=None"):
        learner.predict(torch.zeros(1, 1, 4, 4), "task_il")
    with pytest.raises(ValueError, match="p=0"):
        learner.predict(torch.zeros(1, 1, 4, 4), "continuum", p=0)
    with pytest.raises(ValueError, match="at least one class"):
        learner.begin_task(0)
    small = make("ce", budget=4)
    small.observe_task(blobs(TASKS[0]))
    with pytest.raises(ValueError, match="budget=4 is smaller than the 5 classes"):
        small.begin_task(2)
    one = make("ce", total_tasks=1)
    one.observe_task(blobs(TASKS[0]))
    with pytest.raises(ValueError, match="announced with 1"):
        one.begin_task(2)


@pytest.mark.parametrize(
    ("kind", "options", "error"),
    [
        ("gem", {}, "'gem', allowed: meta, ce"),
        ("lwf", {"lwf": {"temperature": 0}}, "temperature=0"),
        ("ewc", {"ewc": {"decay": 2}}, "decay=2"),
        ("reservoir", {"reservoir": {"logits": -1}}, "logits=-1"),
        ("meta", {"meta": {"semantics": "x"}}, "semantics='x'"),
    ],
)
def test_refused_options(kind, options, error):
    with pytest.raises(ValueError, match=error):
        make(kind, options=options)


def test_the_attack_is_measured_by_the_statistics_that_are_asked_for():
    weights = {}
    for stats in ("data", "imagenet"):
        torch.manual_seed(0)
        model = build_model(name="mlp", num_classes=8, channels=3, size=4, hidden=16)
        prepare = Prepare(mean=[0.2] * 3, std=[2.0] * 3, size=4)
        common = {"total_tasks": 3, "replay": "memory", "budget": 24, "batch_size": 16, "epochs": 1, "seed": 0}
        learner = build_learner("meta", model, prepare, OPTIONS, optim={"lr": 0.5}, attack_stats=stats, **common)
        for task in TASKS[:2]:
            images, labels = blobs(task)
            learner.observe_task((images.expand(-1, 3, -1, -1), labels))
        weights[stats] = learner.model.head.weight
    assert not torch.equal(weights["data"], weights["imagenet"])


def test_refused_common_options():
    for bad in ({"replay": "some"}, {"batch_size": 1}, {"epochs": 0}, {"attack_stats": "cifar"}):
        with pytest.raises(ValueError, match="allowed"):
            make("ce", **bad)
    with pytest.raises(ValueError, match=r"replay must be none"):
        make("reservoir", replay="memory")
    with pytest.raises(TypeError, match="temprature"):
        make("lwf", options={"lwf": {"temprature": 1}})
    assert isinstance(make("ce"), Learner)
