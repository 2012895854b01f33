"""From raw scores to 0..10: constants that belong to a file, signs that are found out, scores beside."""

import numpy as np
import pytest
import torch

from iqa_attack import attack, train
from iqa_attack.audit import audit, summary
from iqa_attack.perceptual_attack import VanishingGradient, grid
from iqa_attack.photographs.photos import subset
from iqa_attack.procedures import strengths_of
from iqa_attack.quality_metrics import logistic, stability, stability_interval
from iqa_attack.quality_models.calibration import Calibration, calibrate, check_calibration, reference_images
from iqa_attack.quality_models.models import OFFICIAL_LOGISTIC, CallableMetric, load_any, load_official
from iqa_attack.tests.conftest import attack_config, train_config


@pytest.fixture(scope="module")
def few():
    """Every fourth of the reference images of two photographs: enough to tell a sign."""
    return subset(reference_images(), range(0, 40, 2))


class Oracle(torch.nn.Module):
    """Knows the quality of the images that it is shown in order; sign: of its scale."""

    def __init__(self, data, sign):
        super().__init__()
        self.mos, self.sign, self.at = data.mos, sign, 0

    def forward(self, x):
        found = self.sign * (3 * self.mos[self.at : self.at + len(x)] + 40)
        self.at += len(x)
        return found


def test_a_wrong_sign_and_a_blind_model_are_refused(few):
    right = calibrate(Oracle(few, 1), "right", data=few)
    assert right.srcc > 0.99 and right.images == len(few) and right.source == "fitted to graded photographs"
    with pytest.raises(ValueError, match=r"turned: SRCC -1\.000 on 20 images.*its sign is wrong"):
        calibrate(Oracle(few, -1), "turned", data=few)
    with pytest.raises(ValueError, match="its sign is wrong"):
        calibrate(Oracle(few, -1), "turned", data=few, b3=0.0, b4=1.0)
    with pytest.raises(ValueError, match="flat gives constant scores"):
        calibrate(CallableMetric(lambda x: x.sum((1, 2, 3)) * 0, higher_is_better=True), "flat", data=few)
    for srcc in (0.1, -0.1, float("nan")):  # a weak model is not called turned: the other sign would be refused as well
        with pytest.raises(ValueError, match="does not rank these distortions"):
            check_calibration("weak", Calibration(0, 1, srcc, 20, "given"), 0.3)
    with pytest.raises(ValueError, match="its sign is wrong"):
        check_calibration("turned", Calibration(0, 1, -0.9, 20, "given"), 0.95)


def test_a_turned_model_would_have_read_as_stable():
    """What the refusal is for: on the wrong side of a logistic every score is 0, and nothing can move it."""
    raw = torch.tensor([60.0, 70.0, 80.0])
    before, after = (logistic(-v, 57.5, 5.0).tolist() for v in (raw, raw - 40))
    assert stability(before, after)[0] > 8


def test_given_constants_are_kept_and_fitted_ones_fit(few):
    given = calibrate(Oracle(few, 1), "x", data=few, b3=55.0, b4=3.0, source="released code")
    assert given[:2] == (55.0, 3.0) and given.source == "released code" and given.srcc > 0.99
    fitted = calibrate(Oracle(few, 1), "x", data=few)
    error = (logistic(3 * few.mos + 40, *fitted[:2]) - few.mos).abs().mean()
    assert float(error) < 0.6
    with pytest.raises(ValueError, match="give both"):
        calibrate(Oracle(few, 1), "x", data=few, b3=1.0)


def test_the_papers_constants_belong_to_its_own_regressors(brisque, tmp_path):
    import scipy.io

    arrays = {
        "SVs": brisque.vectors.numpy(),
        "sv_coef": brisque.coefficients.numpy()[:, None],
        "rho": float(brisque.rho),
    }
    ranges = np.stack([brisque.low, brisque.high])
    scipy.io.savemat(tmp_path / "svm.mat", arrays)
    scipy.io.savemat(tmp_path / "scale.mat", {"scale": ranges})
    own = load_official("brisque", tmp_path / "svm.mat", higher_is_better=True).calibration
    assert own[:2] == OFFICIAL_LOGISTIC["brisque"] and own.source == "released code"
    np.savez(
        tmp_path / "svr.npz", support_vectors=arrays["SVs"], alpha=arrays["sv_coef"][:, 0], rho=arrays["rho"], gamma=0.05,
        feature_range=ranges,
    )  # fmt: skip
    other = load_official("brisque", tmp_path / "svr.npz", higher_is_better=True).calibration
    assert other[:2] != OFFICIAL_LOGISTIC["brisque"] and other.source == "fitted to graded photographs"
    assert other.srcc == pytest.approx(own.srcc)


def test_the_logistic_is_fitted_on_the_training_images(fabric, tmp_path, monkeypatch):
    seen, fit = [], train.fit_calibration
    monkeypatch.setattr(train, "fit_calibration", lambda raw, mos, **k: seen.append(mos) or fit(raw, mos, **k))
    cfg = train_config("method=brisque")
    train.fit(cfg, fabric, tmp_path)
    data = train.build_data(seed=cfg.seed, **cfg.data)
    assert len(seen) == 1 and torch.equal(seen[0], data["train"].mos)


def test_an_attacked_model_needs_a_calibration(trained_root, fabric, tmp_path):
    with pytest.raises(ValueError, match=r"brisque: SRCC 0\.\d+ on .* images of known quality, needed: 1"):
        attack.fit(attack_config(f"run_root={trained_root}", "calibration_floor=1.0"), fabric, tmp_path / "x")
    assert not (tmp_path / "x").exists()


# ----------------------------------------------------------------------------------------------------------- one grid
def test_lambda_on_the_discrepancy_is_the_reciprocal():
    code = grid("official", kind="ssim", projected=False, lambda_on="fidelity")
    text = grid("paper", kind="ssim", projected=False, lambda_on="discrepancy")
    assert len(code) == len(text) == 32 and all(a * b == pytest.approx(1) for a, b in zip(code, text, strict=True))
    cfg = attack_config("fr=ssim", "preset=paper")
    assert strengths_of(cfg).tolist() == pytest.approx(list(text))
    turned = attack_config("fr=ssim", "preset=paper", "recipe.lambda_on=fidelity")
    assert strengths_of(turned).tolist() == pytest.approx(list(code))


def test_gray_levels_are_no_lambdas():
    assert (strengths_of(attack_config()) * 255).tolist() == pytest.approx([1, 2, 3, 4, 5, 6, 8, 10])
    assert (strengths_of(attack_config("preset=official")) * 255).tolist() == pytest.approx(list(range(1, 33)))
    with pytest.raises(ValueError, match="9e\\+06 gray levels.*0..255"):
        strengths_of(attack_config("strengths=[1,9000000]"))


# -------------------------------------------------------------------------------------------------------------- audit
def test_an_audit_falls_back_where_there_is_no_gradient(brisque, images):
    def rounded(x):
        return brisque((x * 255).round() / 255)

    row = audit(rounded, images[:1], higher_is_better=True, steps=6)[0]
    assert row["gradient"] == "none: random squares" and row["max_change"] >= 1
    with pytest.raises(VanishingGradient):
        audit(rounded, images[:1], higher_is_better=True, black_box=False, steps=6)
    with pytest.raises(ValueError, match="its sign is wrong"):
        audit(brisque, images[:1], higher_is_better=False, steps=6)


def test_a_summary_has_the_interval_of_a_mean():
    r, low, high = stability_interval([5.0, 5.0, 5.0], [4.0, 3.0, 4.5])
    each = np.log(5 / np.array([1.0, 2.0, 0.5]))
    half = 4.302653 * each.std(ddof=1) / 3**0.5  # t of two degrees of freedom
    assert (r, low, high) == pytest.approx((each.mean(), each.mean() - half, each.mean() + half), rel=1e-6)
    rows = [{"before": 5.0, "after": a, "random": 5.1} for a in (4.0, 3.0, 4.5)]
    assert summary(rows)["r"] == pytest.approx(r) and summary(rows)["change_random"] == pytest.approx(0.1)


@pytest.mark.parametrize("spec", ["nothing", "os:nothing", "no_module_here:x", "math:pi", "m.onnx"])
def test_models_that_are_none(spec):
    with pytest.raises((ValueError, FileNotFoundError), match=spec.split(":")[0].replace(".", r"\.")):
        load_any(spec, higher_is_better=True)
