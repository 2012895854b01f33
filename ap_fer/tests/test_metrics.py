import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from ap_fer.metrics import classification, confusion, confusion_figure, dropped_on, noise_patches, pooling_metrics

NAMES = ("a", "b", "c")


def test_metrics_in_closed_form_and_against_torchmetrics():
    labels, predictions = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 0, 1, 1, 0, 2, 1])
    matrix = confusion(predictions, labels, 3)
    assert matrix.tolist() == [[3, 1, 0], [1, 1, 0], [0, 1, 1]], "rows are the truth"
    found = classification(matrix, NAMES)
    assert found["top1"] == pytest.approx(62.5) and found["mean_class"] == pytest.approx(100 * (0.75 + 0.5 + 0.5) / 3)
    assert found["acc_a"] == pytest.approx(75) and found["acc_c"] == pytest.approx(50)
    f1 = 100 * multiclass_f1_score(predictions, labels, num_classes=3, average="macro").item()
    assert found["macro_f1"] == pytest.approx(f1) and found["challenge"] == pytest.approx(0.67 * f1 + 0.33 * 62.5)
    assert found["mean_class"] == pytest.approx(100 * multiclass_accuracy(predictions, labels, num_classes=3).item())


def test_classes_without_a_test_image_are_left_out_not_zero():
    found = classification(confusion(torch.tensor([0, 1]), torch.tensor([0, 1]), 3), NAMES)
    assert found["mean_class"] == found["macro_f1"] == 100 and "acc_c" not in found
    with pytest.raises(ValueError, match=r"labels span 0..3, allowed 0..2"):
        confusion(torch.tensor([0, 1]), torch.tensor([0, 3]), 3)


def test_a_patch_is_noise_from_half_of_its_pixels_on():
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, :2, 0] = True  # half of the first patch
    masks[0, 2, 2] = True  # a quarter of the last
    assert noise_patches(masks, 2).tolist() == [[True, False, False, False]]
    masks[0, 0, 2:] = masks[0, 1, 2] = True
    assert noise_patches(masks, 2).tolist() == [[True, True, False, False]], "raster order: the right neighbour is next"


def test_dropped_patches_against_chance():
    noise = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    kept = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 1]]).bool()
    found = dropped_on(kept, noise)
    assert found["precision"] == pytest.approx((1 / 2 + 1 / 2) / 2) and found["chance"] == pytest.approx(
        (2 / 4 + 1 / 4) / 2
    )
    assert found["lift"] == pytest.approx(found["precision"] - found["chance"])
    assert found["recall"] == pytest.approx((1 / 2 + 1) / 2)
    among = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()  # the last patch of image 0 was gone before
    assert dropped_on(kept, noise, among)["precision"] == pytest.approx((1 + 1 / 2) / 2)
    assert dropped_on(kept, noise, among)["chance"] == pytest.approx((2 / 3 + 1 / 4) / 2)
    assert dropped_on(torch.ones_like(kept), noise) == {}


def test_random_dropping_is_chance():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2000, 64, generator=generator) < 0.4
    kept = torch.rand(2000, 64, generator=generator).argsort(1) < 24
    assert abs(dropped_on(kept, noise)["lift"]) < 0.01


def test_pooling_metrics_name_both_stages():
    truth = {k: torch.zeros(2, 4, 4, dtype=torch.bool) for k in ("face", "background", "occluder")}
    truth["face"][:, :, 2:] = True
    truth["background"][:, :, :2] = True
    truth["background"][1, :2, :2], truth["occluder"][1, :2, :2] = False, True
    truth["busy"] = torch.tensor([False, True])
    truth["contrast"] = torch.zeros(2, 4, 4)
    truth["contrast"][:, :, :2] = 1.0  # the larger contrast lies outside the faces
    truth["contrast"][:, :2, :2] = 2.0
    truth["contrast"][:, :2, 2:] = 0.5
    app = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1]]).bool()
    final = torch.tensor([[0, 1, 0, 1], [0, 1, 1, 0]]).bool()
    found = pooling_metrics(app, final, truth)
    assert (
        found["drop_precision"] == 1
        and found["drop_chance"] == 0.5
        and found["kept_app"] == 3
        and found["kept_last"] == 2
    )
    assert found["drop_precision_occluder"] == 1 and found["drop_chance_occluder"] == 0.25, (
        "only the image that has one"
    )
    assert found["drop_precision_background"] == pytest.approx(0.5)
    assert found["drop_precision_background_busy"] == 0 and found["drop_lift_background_busy"] == -0.25, (
        "the second image alone"
    )
    assert found["contrast_precision"] == 0, "a face's lower right patch has the least contrast"
    assert found["over_contrast"] == pytest.approx(found["drop_lift"] - found["contrast_lift"]) == 1
    assert found["over_contrast_background_busy"] == found["drop_lift_background_busy"] - (0 - 0.25)
    assert found["atp_precision"] == pytest.approx(0.5) and found["atp_chance"] == pytest.approx(1 / 3)
    assert set(pooling_metrics(app, app, {})) == {"kept_app", "kept_last"}
    assert not any(k.startswith(("drop_", "atp_")) for k in pooling_metrics(app | True, app | True, truth))


def test_the_figure_is_written(tmp_path):
    confusion_figure(torch.tensor([[3, 1], [0, 0]]), ["x", "y"], tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 5000
