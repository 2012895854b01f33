"""The JND map in closed form, the observers, the selection, the bisection."""

import numpy as np
import pytest
import torch

from iqa_attack.counterexamples import judge, refine
from iqa_attack.jnd import (
    CsvObserver,
    SimulatedObserver,
    ThresholdObserver,
    below_jnd,
    build_observer,
    jnd_map,
    probability_different,
    select,
    straddle,
    visibility,
)


def flat(level, size=12):
    return torch.full((1, 3, size, size), level / 255, dtype=torch.float64)


@pytest.mark.parametrize("level", [0, 20, 127, 200, 255])
def test_jnd_of_a_flat_image_is_that_of_its_luminance(level):
    bg = level * (0.2989 + 0.5870 + 0.1140)
    expected = 17 * (1 - np.sqrt(bg / 127)) + 3 if bg <= 127 else 3 / 128 * (bg - 127) + 3
    torch.testing.assert_close(
        jnd_map(flat(level)), torch.full((1, 1, 12, 12), max(expected, 0.5 - 0.01 * bg), dtype=torch.float64)
    )
    assert float(jnd_map(flat(level)).min()) >= 2.99


def test_edges_mask_in_every_direction():
    """A step of 200 gray levels: mg = 200 * 16 / 16 at an axis-parallel edge, and the map turns with the image."""
    x = flat(20)
    x[..., 6:] = 220 / 255
    jnd = jnd_map(x)[0, 0]
    assert float(jnd[5, 5]) > 1.5 * float(jnd[5, 1])
    grey = 255 * 0.9999
    columns = torch.tensor([20.0] * 6 + [220.0] * 6, dtype=torch.float64) * grey / 255
    around = (
        torch.tensor(
            [[1, 1, 1, 1, 1], [1, 2, 2, 2, 1], [1, 2, 0, 2, 1], [1, 2, 2, 2, 1], [1, 1, 1, 1, 1]], dtype=torch.float64
        )
        / 32
    )
    bg = (around * columns[3:8]).sum()
    mg = 16 * 200 * grey / 255 / 16
    assert float(jnd[5, 5]) == pytest.approx(float(mg * (0.0001 * bg + 0.115) + 0.5 - 0.01 * bg), rel=1e-6)
    torch.testing.assert_close(jnd_map(x.transpose(2, 3))[0, 0], jnd.T)
    torch.testing.assert_close(jnd_map(x.flip(3))[0, 0], jnd.flip(1))


def test_visibility_and_probability():
    x0 = flat(127)
    jnd = float(jnd_map(x0)[0, 0, 0, 0])
    x = x0.clone()
    x[:, 1] += jnd / 255
    assert float(visibility(x, x0)) == pytest.approx(1.0)
    assert float(probability_different(visibility(x, x0))) == pytest.approx(0.5)
    assert float(visibility(x0, x0)) == 0 and float(probability_different(torch.zeros(1))) == 0
    one = x0.clone()
    one[0, 0, 5, 5] += 2 * jnd / 255
    assert float(visibility(one, x0)) == pytest.approx(2 / 144**0.25), "4-norm mean: one pixel of 144"
    v = torch.linspace(0, 3, 50)
    assert bool((probability_different(v).diff() >= 0).all())


def changed(factor, n=1):
    x0 = flat(127).repeat(n, 1, 1, 1)
    return x0 + factor * float(jnd_map(x0)[0, 0, 0, 0]) / 255, x0


def test_expected_observer_has_the_stated_threshold():
    observer = SimulatedObserver()
    for factor, below in ((0.0, True), (0.77, True), (0.79, False), (3.0, False)):
        x, x0 = changed(factor)
        assert bool(below_jnd(observer, x, x0, ["a"])[0]) is below, factor


def test_fifteen_subjects_answer_by_chance_but_the_same_for_a_name():
    x, x0 = changed(1.0, n=200)
    observer = SimulatedObserver(subjects=15, seed=3)
    names = [f"image{i}" for i in range(200)]
    different, trials = observer.detect(x, x0, names)
    assert set(trials.tolist()) == {15.0} and 0.4 < float(different.mean()) / 15 < 0.6
    again, _ = SimulatedObserver(subjects=15, seed=3).detect(x[:2], x0[:2], names[:2])
    assert again.tolist() == different[:2].tolist() and len(set(different.tolist())) > 3
    assert float(observer.detect(x0, x0, names)[0].max()) == 0
    two, base = changed(2 / 3 / 1.0, n=300)  # the measured case: two levels where the JND is three
    passed = below_jnd(SimulatedObserver(subjects=15), two, base, [str(i) for i in range(300)]).float().mean()
    assert 0.7 < float(passed) < 0.9, "at most 3 of 15 in about four fifths of the cases"


def test_threshold_and_csv_observers(tmp_path):
    x0 = flat(100)
    x = x0.clone()
    x[0, 0, 0, 0] += 3 / 255
    assert [bool(below_jnd(ThresholdObserver(levels=n), x, x0, ["a"])[0]) for n in (2, 3)] == [False, True]
    path = tmp_path / "answers.csv"
    head = "nr,fr,image,candidate,subject,order,answer,seconds\n"
    rows = [f"brisque,ssim,a.png,0,s{i},{i},{'different' if i < 1 else 'same'},1.0\n" for i in range(4)]
    rows += [f"brisque,ssim,a.png,1,s{i},{i},{'different' if i < 2 else 'same'},1.0\n" for i in range(4)]
    path.write_text(head + "".join(rows))
    names = ["brisque/ssim/a.png/0", "brisque/ssim/a.png/1"]
    assert below_jnd(CsvObserver(file=path), x.repeat(2, 1, 1, 1), x0.repeat(2, 1, 1, 1), names).tolist() == [
        True,
        False,
    ]
    with pytest.raises(ValueError, match="no answer for 1 of 1 candidates, e.g. brisque/ssim/b/0"):
        CsvObserver(file=path).detect(x, x0, ["brisque/ssim/b/0"])
    path.write_text(head + "brisque,ssim,a,0,s,0,maybe,1\n")
    with pytest.raises(ValueError, match="line 2: answer .maybe.; expected .* answer same or different"):
        CsvObserver(file=path)
    with pytest.raises(FileNotFoundError, match="collect them first"):
        CsvObserver(file=tmp_path / "none.csv")
    with pytest.raises(ValueError, match="observer.kind='human', allowed: simulated, threshold, csv"):
        build_observer({"kind": "human"}, seed=0)
    with pytest.raises(ValueError, match="subjects=0"):
        build_observer({"kind": "simulated", "simulated": {"subjects": 0}}, seed=0)


def test_selection_is_the_largest_change_below_the_jnd():
    change = torch.tensor([[1.0, -5.0, 2.0], [-3.0, 4.0, 9.0]])
    below = torch.tensor([[True, True, False], [True, False, False]])
    assert select(change, below).tolist() == [1, 0, -1]


@pytest.mark.parametrize(
    ("end", "good", "expected"),
    [
        ("low", [False, True, True], 10**0.5),
        ("high", [True, True, False], 10**1.5),
        ("low", [True, True, True], 0.1),
        ("low", [False, False, False], 1000.0),
        ("high", [True, False, True], 1000.0),
    ],
)
def test_bisection_in_logs_around_the_jnd(end, good, expected):
    strengths = torch.tensor([[1.0], [10.0], [100.0]])
    found = straddle(strengths, torch.tensor(good)[:, None], visible_end=end)
    assert found.tolist() == pytest.approx([expected])


def test_judging_and_refining():
    """A toy whose candidates change by their strength: bisection ends at the largest change that the observer passes."""
    x0 = torch.full((2, 3, 8, 8), 0.5)

    def score(x):
        return 10 * x.mean((1, 2, 3))

    def attack(strengths):
        return (x0[None] + strengths[..., None, None, None] / 255).float()

    def judge_all(images, strengths):
        return judge(score, ThresholdObserver(levels=5), x0, images, strengths, ["a", "b"])

    strengths = torch.tensor([[1.0, 1.0], [20.0, 20.0]])
    judged = judge_all(attack(strengths), strengths)
    assert judged.chosen.tolist() == [0, 0]
    refined = refine(attack, judge_all, judged, rounds=6, visible_end="high")
    largest = refined.strengths[refined.chosen, torch.arange(2)]
    assert len(refined.strengths) == 8 and bool((largest > 4.5).all()) and bool((largest <= 5.01).all())
    torch.testing.assert_close(refined.counterexamples(x0), attack(largest[None])[0])
    failed = judge_all(attack(torch.tensor([[20.0, 1.0]])), torch.tensor([[20.0, 1.0]]))
    assert failed.chosen.tolist() == [-1, 0]
    assert torch.equal(failed.counterexamples(x0)[0], x0[0]), "without a candidate below the JND the image itself"
    unjudged = judge(score, None, x0, attack(strengths), strengths, ["a", "b"])
    assert unjudged.chosen.tolist() == [1, 1]
