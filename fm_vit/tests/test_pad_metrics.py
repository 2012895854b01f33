"""Metrics against a worked example, limits and invariances."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fm_vit.losses import subsets
from fm_vit.pad_metrics import (
    Scored,
    apcer_by_species,
    bootstrap,
    bpcer_threshold,
    check_species,
    choose_threshold,
    det_points,
    eer_threshold,
    error_rates,
    measure,
    over_subsets,
    summary,
    tpr_at_fpr,
    video_scores,
)


def example():
    """200 live (10 rejected), 100 attacks A (20 accepted), 200 attacks B (0 accepted) at threshold .5."""
    scores = np.array([0.9] * 190 + [0.1] * 10 + [0.8] * 20 + [0.2] * 80 + [0.1] * 200)
    species = ["live"] * 200 + ["A"] * 100 + ["B"] * 200
    return scores, np.array([s == "live" for s in species]), species


def test_the_worked_example():
    scores, live, species = example()
    found = summary(scores, live, species, 0.5)
    assert found["apcer"] == pytest.approx(20 / 3) and found["bpcer"] == pytest.approx(5)
    assert found["acer"] == pytest.approx(5.8333, abs=1e-4)
    assert found["apcer_worst"] == pytest.approx(20) and found["acer_worst"] == pytest.approx(12.5)
    assert apcer_by_species(scores, species, 0.5) == {"A": 20.0, "B": 0.0}
    check_species(species, ["A"])
    for known in (species, None):
        with pytest.raises(ValueError, match="species (A, )?mask"):
            check_species(known, ["A", "mask"])
    assert (
        not {"apcer_worst", "acer_worst"} & summary(scores, live, None, 0.5).keys()
    )  # nothing is known of a worst species


def test_a_score_equal_to_the_threshold_is_accepted():
    assert error_rates(np.array([0.5, 0.5]), np.array([True, False]), 0.5) == {"apcer": 100, "bpcer": 0, "acer": 50}


def test_perfect_and_constant_scores():
    live = np.array([True] * 5 + [False] * 7)
    perfect = np.where(live, 0.8, 0.3)
    threshold, eer = eer_threshold(perfect, live)
    assert eer == 0 and threshold == 0.8 and error_rates(perfect, live, threshold)["acer"] == 0
    assert eer_threshold(perfect, live, between=True)[0] == pytest.approx(0.55)
    assert tpr_at_fpr(perfect, live, 0.2) == 100
    constant = np.full(12, 0.4)
    assert error_rates(constant, live, eer_threshold(constant, live)[0])["acer"] == 50


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=4, max_size=60))
def test_flipping_and_monotone_transforms(pairs):
    scores, live = np.array([p[0] / 50 for p in pairs]), np.array([p[1] for p in pairs])
    if live.all() or not live.any():
        return
    a, b = error_rates(scores, live, 0.505), error_rates(1 - scores, ~live, 0.495)
    assert a["apcer"] == pytest.approx(b["bpcer"]) and a["bpcer"] == pytest.approx(b["apcer"])
    warped = np.exp(3 * scores)
    assert eer_threshold(warped, live)[1] == pytest.approx(eer_threshold(scores, live)[1])
    acer = [error_rates(s, live, eer_threshold(s, live)[0])["acer"] for s in (scores, warped)]
    assert acer[0] == pytest.approx(acer[1])


def test_tpr_at_fpr_interpolates_names_its_positives_and_warns():
    live = np.array([True] * 4 + [False] * 4)
    scores = np.array([0.9, 0.8, 0.6, 0.4, 0.7, 0.5, 0.2, 0.1])
    assert tpr_at_fpr(scores, live, 0.25) == pytest.approx(75)
    with pytest.warns(UserWarning, match="cannot be measured with 4 negatives"):
        assert tpr_at_fpr(scores, live, 0.125) == pytest.approx(50)
    assert tpr_at_fpr(scores, live, 0.25, positive="attack") == pytest.approx(75)
    with pytest.raises(ValueError, match="allowed: live, attack"):
        tpr_at_fpr(scores, live, 0.25, positive="fake")


def test_bpcer_threshold_rejects_at_most_its_share():
    live, scores = np.array([True] * 200 + [False]), np.append(np.arange(200) / 200, 0.0)
    threshold = bpcer_threshold(scores, live)
    assert threshold == pytest.approx(0.01) and error_rates(scores, live, threshold)["bpcer"] == 1.0


def test_video_scores_are_means_before_the_threshold():
    means, first = video_scores(np.array([0.2, 1.0, 0.4, 0.0]), ["b", "a", "b", "a"])
    assert means.tolist() == pytest.approx([0.3, 0.5]) and first.tolist() == [0, 1]


def test_bootstrap_resamples_groups():
    rng = np.random.default_rng(0)
    subjects = np.repeat(np.arange(20), 50)
    offsets = rng.normal(size=20)[subjects]  # all frames of a subject agree: 20 independent values, not 1000
    low, high = bootstrap(lambda at: float(offsets[at].mean()), subjects.tolist(), draws=400)
    frames = bootstrap(lambda at: float(offsets[at].mean()), np.arange(1000).tolist(), draws=400)
    assert low < offsets.mean() < high and high - low > 3 * (frames[1] - frames[0])
    with pytest.raises(ValueError, match="two or more"):
        bootstrap(lambda at: 0.0, [1, 1])

    def never(at):
        raise ValueError("one class only")

    with pytest.raises(ValueError, match="0 of 50 resamples"):
        bootstrap(never, [1, 2], draws=5)


@pytest.mark.parametrize(
    ("scores", "live", "message"),
    [
        ([0.1, np.nan], [True, False], "1 scores are not finite"),
        ([0.1, 0.2], [True, True], "2 live and 0 attacks"),
        ([0.1], [True, False], "one length"),
    ],
)
def test_bad_input(scores, live, message):
    with pytest.raises(ValueError, match=message):
        error_rates(np.array(scores), np.array(live), 0.5)


def test_det_goes_from_all_accepted_to_all_rejected():
    scores, live, _ = example()
    apcer, bpcer = det_points(scores, live)
    assert (np.diff(apcer) <= 0).all() and (np.diff(bpcer) >= 0).all()


def test_thresholds_come_from_the_development_scores_at_a_point_of_their_roc():
    """Test scores are shifted by .3: a threshold of theirs would have no errors at all."""
    live = np.array([False, False, True, True, True])
    dev = Scored({"rgb": np.array([0.1, 0.2, 0.4, 0.5, 0.6])}, live)
    test = Scored({"rgb": dev.scores["rgb"] - 0.3}, live)
    row = measure(dev, test, threshold="eer")["rgb"]
    assert row["threshold"] == 0.4 and row["bpcer"] == 100 and row["apcer"] == 0
    assert measure(dev, test, threshold="eer_mid")["rgb"]["threshold"] == pytest.approx(0.3)
    assert measure(dev, test, threshold="bpcer1")["rgb"]["threshold"] == 0.4
    assert measure(dev, test, threshold="half")["rgb"]["threshold"] == 0.5
    assert row["eer_own"] == 0 and "eer" not in row  # what test alone would give has another name
    with pytest.raises(ValueError, match="best"):
        choose_threshold("best", test.scores["rgb"], live)


def test_video_level_thresholds_the_means_with_a_threshold_of_means():
    """One live video of two frames (.9, .3) and one attack video (.5, .5): by frames no threshold separates them."""
    scores = {"rgb": np.array([0.9, 0.5, 0.3, 0.5])}
    live = np.array([True, False, True, False])
    frames = Scored(scores, live, ["live", "A", "live", "A"], ["s", "t", "s", "t"], ["v", "w", "v", "w"], list("abcd"))
    video = frames.videos()
    assert video.live.tolist() == [True, False] and video.scores["rgb"].tolist() == pytest.approx([0.6, 0.5])
    assert video.subject == ["s", "t"] and video.species == ["live", "A"]
    assert measure(video, video, threshold="eer")["rgb"]["acer"] == 0
    assert measure(video, video, threshold="eer")["rgb"]["threshold"] == pytest.approx(0.6)
    assert measure(frames, frames, threshold="eer")["rgb"]["acer"] > 0
    with pytest.raises(ValueError, match="videos of these samples are not known"):
        Scored(scores, live).videos()


def test_a_subset_gains_over_the_best_of_its_own_members():
    acer = {"a": 20.0, "b": 10.0, "c": 1.0, "a_b": 12.0, "a_c": 1.5, "b_c": 0.5, "a_b_c": 0.25}
    found = over_subsets({tag: {"acer": value} for tag, value in acer.items()}, subsets(["a", "b", "c"]))
    assert found.pop("mean_acer") == pytest.approx(sum(acer.values()) / 7)
    assert found == {"gain_a_b": -2.0, "gain_a_c": -0.5, "gain_b_c": 0.5, "gain_a_b_c": 0.75}
