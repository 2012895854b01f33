"""Matching, losses and post-processing of set prediction, as in the official code."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torchvision.ops import box_convert, generalized_box_iou

from q_detr.set_prediction import SetCriterion, check_targets, giou, match, postprocess


def boxes(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.cat([torch.rand(n, 2, generator=g) * 0.5 + 0.25, torch.rand(n, 2, generator=g) * 0.4 + 0.05], dim=1)


def target(n, seed=0, classes=3):
    g = torch.Generator().manual_seed(100 + seed)
    return {"labels": torch.randint(classes, (n,), generator=g), "boxes": boxes(n, seed)}


def outputs(batch=2, queries=5, classes=3, seed=0, aux=0):
    g = torch.Generator().manual_seed(seed)
    layers = [
        {
            "pred_logits": torch.randn(batch, queries, classes + 1, generator=g).requires_grad_(),
            "pred_boxes": torch.stack([boxes(queries, 50 * k + seed + i) for i in range(batch)]).requires_grad_(),
        }
        for k in range(aux + 1)
    ]
    return {**layers[-1], "aux_outputs": layers[:-1]}


def cost(z, b, t, loss):
    """The matching cost of one image, written as loops."""
    total = torch.zeros(len(b), len(t["labels"]))
    for i, j in itertools.product(range(len(b)), range(len(t["labels"]))):
        c = int(t["labels"][j])
        if loss == "softmax":
            value = -z[i].softmax(0)[c]
        else:
            p = z[i].sigmoid()[c]
            value = 2 * (0.25 * (1 - p) ** 2 * -torch.log(p + 1e-8) - 0.75 * p**2 * -torch.log(1 - p + 1e-8))
        corners = box_convert(torch.stack([b[i], t["boxes"][j]]), "cxcywh", "xyxy")
        overlap = generalized_box_iou(corners[:1], corners[1:])[0, 0]
        total[i, j] = value + 5 * (b[i] - t["boxes"][j]).abs().sum() - 2 * overlap
    return total


def xyxy(*corners):
    return box_convert(torch.tensor([corners], dtype=torch.float32), "xyxy", "cxcywh")


def test_giou_closed_forms():
    unit = xyxy(0, 0, 1, 1)
    assert giou(unit, unit).item() == pytest.approx(1)
    assert giou(unit, xyxy(1, 0, 2, 1)).item() == pytest.approx(0)  # touching: hull = union
    assert giou(unit, xyxy(2, 0, 3, 1)).item() == pytest.approx(-1 / 3)  # hull 3, union 2
    assert giou(unit, xyxy(1e4, 1e4, 1e4 + 1, 1e4 + 1)).item() == pytest.approx(-1, abs=1e-4)
    a, b = boxes(4), boxes(3, 1)
    assert_close(giou(a, b), giou(b, a).T)
    point = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    assert torch.isfinite(giou(point, point)).all() and torch.isfinite(giou(point, a)).all()


@pytest.mark.parametrize("loss", ["softmax", "focal"])
def test_the_assignment_is_the_cheapest_of_all_permutations(loss):
    out, targets = outputs(), [target(3, 1), target(2, 2)]
    for k, (rows, columns) in enumerate(match(out, targets, loss=loss)):
        c = cost(out["pred_logits"][k], out["pred_boxes"][k], targets[k], loss)
        n = c.shape[1]
        best = min(c[list(p), range(n)].sum().item() for p in itertools.permutations(range(5), n))
        assert len(rows) == n and c[rows, columns].sum().item() == pytest.approx(best, abs=1e-5)


def test_matching_follows_a_permutation_and_works_without_objects():
    out, targets = outputs(), [target(3, 1), target(0)]
    order = torch.tensor([3, 1, 4, 0, 2])
    moved = {k: out[k][:, order] for k in ("pred_logits", "pred_boxes")}
    for (rows, columns), (new, new_columns) in zip(match(out, targets), match(moved, targets), strict=True):
        before = dict(zip(columns.tolist(), rows.tolist(), strict=True))
        assert before == dict(zip(new_columns.tolist(), order[new].tolist(), strict=True))
    assert [len(rows) for rows, _ in match(out, [target(0), target(0)])] == [0, 0]


@pytest.mark.parametrize("loss", ["softmax", "focal"])
def test_the_loss_terms_are_their_definitions(loss):
    out, targets = outputs(aux=1), [target(3, 1), target(2, 2)]
    found, _ = SetCriterion(3, loss=loss)(out, targets)
    expected = dict.fromkeys(("ce", "bbox", "giou"), torch.zeros(()))
    for layer in (out["aux_outputs"][0], out):
        wanted = torch.full((2, 5), 3)
        pairs = match(layer, targets, loss=loss)
        for k, (rows, columns) in enumerate(pairs):
            for i, j in zip(rows.tolist(), columns.tolist(), strict=True):
                wanted[k, i] = targets[k]["labels"][j]
                b, truth = layer["pred_boxes"][k, i], targets[k]["boxes"][j]
                expected["bbox"] = expected["bbox"] + 5 * (b - truth).abs().sum() / 5
                expected["giou"] = expected["giou"] + 2 * (1 - giou(b[None], truth[None])[0, 0]) / 5
        logp = layer["pred_logits"].log_softmax(-1)
        if loss == "softmax":
            weight = torch.where(wanted == 3, 0.1, 1.0)
            ce = -(weight * logp.gather(2, wanted[..., None])[..., 0]).sum() / weight.sum()
        else:
            p, y = layer["pred_logits"].sigmoid(), F.one_hot(wanted, 5)[..., :4].float() * (wanted < 3)[..., None]
            ce = -(0.25 * (1 - p) ** 2 * p.log() * y + 0.75 * p**2 * (1 - p).log() * (1 - y)).sum() / 5 * 2
        expected["ce"] = expected["ce"] + ce
    for name, value in expected.items():
        assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_no_object_at_all_gives_finite_losses_and_gradients():
    out, targets = outputs(aux=1), [target(0), target(0)]
    found, log = SetCriterion(3)(out, targets)
    sum(found.values()).backward()
    assert found["bbox"] == 0 and found["giou"] == 0 and found["ce"] > 0
    assert torch.isfinite(out["pred_boxes"].grad).all() and out["pred_logits"].grad.abs().sum() > 0
    assert log["class_error"] == 0


def test_perfect_predictions_have_no_box_loss_and_the_log_counts():
    t = target(2, 3)
    logits = torch.full((1, 3, 4), -9.0)
    logits[0, [0, 1], t["labels"]] = 9
    logits[0, 2, 0] = 9  # one detection too many
    out = {"pred_logits": logits, "pred_boxes": torch.cat([t["boxes"], boxes(1, 9)])[None], "aux_outputs": []}
    found, log = SetCriterion(3)(out, [t])
    assert found["bbox"] < 1e-6 and found["giou"] < 1e-5
    assert log == {"class_error": 0, "cardinality_error": 1}


def test_postprocess_softmax_and_focal():
    logits = torch.tensor([[[5.0, 0, 0, 1], [0, 1, 4, 9]]])  # the second is "no object" first, class 2 next
    b = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0]]])
    out = {"pred_logits": logits, "pred_boxes": b}
    (found,) = postprocess(out, torch.tensor([[100, 200]]))
    assert found["labels"].tolist() == [0, 2]
    assert_close(found["boxes"], torch.tensor([[80.0, 30, 120, 70], [0, 0, 100, 100]]))
    assert_close(found["scores"], logits.softmax(-1)[0, [0, 1], [0, 2]])
    (found,) = postprocess(out, torch.tensor([[100, 200]]), loss="focal")
    assert found["labels"].tolist() == [3, 0]
    assert_close(found["boxes"], torch.tensor([[0.0, 0, 100, 100], [80, 30, 120, 70]]))
    assert_close(found["scores"], torch.tensor([9.0, 5.0]).sigmoid())


@pytest.mark.parametrize(
    ("labels", "box", "message"),
    [
        ([3], [[0.5, 0.5, 0.1, 0.1]], "labels 3..3, but num_classes=3"),
        ([-1], [[0.5, 0.5, 0.1, 0.1]], "labels -1"),
        ([0], [[50.0, 50, 10, 10]], "not pixels"),
        ([0], [[0.5, 0.5, 0.0, 0.1]], "no extent"),
        ([0], [[0.5, float("nan"), 0.1, 0.1]], "not finite"),
        ([0, 1], [[0.5, 0.5, 0.1, 0.1]], "2 labels"),
    ],
)
def test_bad_targets_are_named(labels, box, message):
    with pytest.raises(ValueError, match=f"target 1: .*{message}"):
        check_targets([target(1), {"labels": torch.tensor(labels), "boxes": torch.tensor(box)}], 3)


def test_predictions_that_are_not_finite_name_the_image():
    out = outputs()
    out["pred_boxes"] = out["pred_boxes"].detach().clone()
    out["pred_boxes"][1, 2, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"images \[1\]"):
        match(out, [target(1), target(1)])
    with pytest.raises(ValueError, match="loss='bce'"):
        SetCriterion(3, loss="bce")
