"""What is reported: the adapted copies are asked, the gap has its sign, extra lengths of the continuum are lengths."""

from types import SimpleNamespace

import pytest
import torch

from lifelong.evaluation import empty_matrices, evaluate, final_metrics, fusion_spread, protocols
from lifelong.learner import MetaLearner
from lifelong.task_prediction import within_group
from lifelong.tests.test_learner import TASKS, blobs, make


class Perfect(torch.nn.Module):
    """An adapted copy that is always right within its task: the brightest pixel is the class."""

    def forward(self, x):
        return x.flatten(1)[:, :8]


@pytest.fixture(scope="module")
def learner():
    found = make("meta", epochs=1, lr=0.05)
    for task in TASKS:
        found.observe_task(blobs(task))
    return found


def test_adapt_decides_the_continuum_and_nothing_else(learner, monkeypatch):
    monkeypatch.setattr(MetaLearner, "adapted", lambda *_: Perfect())
    sets = [blobs(task, seed=7) for task in TASKS]
    with_copies, without = (evaluate(learner, sets, p=5, adapt=adapt, more_p=[1]) for adapt in (True, False))
    assert with_copies["continuum"] != without["continuum"]
    assert with_copies["continuum"] == with_copies["vote"], "a perfect copy is right where the vote is"
    for name in ("class_il", "task_il", "vote"):
        assert with_copies[name] == without[name]


def test_a_length_of_one_is_the_argmax_over_groups(learner):
    sets = [blobs(task, seed=7) for task in TASKS]
    found = evaluate(learner, sets, p=len(sets[0][0]), adapt=False, more_p=[1])
    # Per sample, the best group's best class is the best class of all.
    assert found["continuum_p1"] == found["class_il"]
    assert within_group(torch.tensor([[0.0, 2.0, 1.0]]), slice(1, 3)).tolist() == [1]


def test_the_classes_of_a_continuum_are_those_of_the_voted_task(learner, monkeypatch):
    monkeypatch.setattr(learner, "scores", lambda x: x.flatten(1)[:, :8])
    raw = torch.cat([blobs(task, seed=7)[0] for task in TASKS])  # which no chunk of the protocol holds
    found = learner.predict_sets([raw], p=len(raw), adapt=False)[0]
    pixels = raw.flatten(1)
    means = [pixels[:, task].amax(1).mean().item() for task in TASKS]
    task = TASKS[means.index(max(means))]
    assert found["continuum"].tolist() == (pixels[:, task].argmax(1) + task[0]).tolist()
    assert set(found["class_il"].tolist()) == set(range(8)), "single images say otherwise"


def test_task_il_is_the_best_class_of_the_images_own_task(learner):
    sets = [blobs(task, seed=7) for task in TASKS]
    expected = []
    for task, (images, labels) in zip(TASKS, sets, strict=True):
        with torch.no_grad():
            logits = learner.model.eval()(images)
        expected.append(100 * (logits[:, task].argmax(1) + task[0] == labels).double().mean().item())
    assert evaluate(learner, sets, p=5, adapt=False)["task_il"] == pytest.approx(expected)


def test_the_gap_is_positive_where_the_attention_finds_the_foreground():
    masks = torch.zeros(4, 8, 8, dtype=torch.bool)
    masks[:, 2:5, 2:6] = True
    attention = (0.2 + 0.6 * masks.float())[:, None]
    fake = SimpleNamespace(run=lambda *_: attention, model=None)
    stream = SimpleNamespace(
        masks=masks, task=lambda *_: (None, None), indices=lambda *_: torch.arange(4), __len__=lambda: 2
    )
    stream = type("S", (), {**stream.__dict__, "__len__": lambda _: 2})()
    stream.task, stream.indices = (lambda *_: (None, None)), (lambda *_: torch.arange(4))
    matrices = {name: torch.tensor([[50.0, torch.nan], [40.0, 60.0]]) for name in empty_matrices(2)}
    found = final_metrics(matrices, [2, 2], fake, stream)
    assert found["background_gap"] == pytest.approx((1 - 0.2**2) - (1 - 0.8**2))
    assert found["class_il_acc_after_0"] == 50 and found["class_il_acc_after_1"] == 50 == found["class_il_acc"]
    assert "class_il_forgetting_after_0" not in found and found["class_il_forgetting_after_1"] == 10


def test_the_spread_of_a_run_leaves_the_first_task_and_other_learners_out(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"task": 0, "spread": 9}\n{"task": 1, "spread": 0.2}\n{"task": 1}\n{"task": 2, "spread": 0.4}\n')
    assert fusion_spread(tmp_path) == {"fusion_spread": pytest.approx(0.3)}
    log.write_text('{"task": 0, "ce": 1}\n{"task": 1, "ce": 1}\n')
    assert fusion_spread(tmp_path) == {}


def test_lengths_below_one_are_refused():
    assert protocols([1, 5]) == ["class_il", "continuum", "task_il", "continuum_p1", "continuum_p5"]
    with pytest.raises(ValueError, match=r"more_p=\[0\]"):
        protocols([0])
