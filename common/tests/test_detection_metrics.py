import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common.data.shapes import shape_scenes
from common.metrics.detection import STATS, CocoEvaluator, voc_map


def _none():
    return {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}


def _perfect(coco):
    out = {i["id"]: ([], []) for i in coco["images"]}
    for a in coco["annotations"]:
        x, y, w, h = a["bbox"]
        out[a["image_id"]][0].append([x, y, x + w, y + h])
        out[a["image_id"]][1].append(a["category_id"])
    return {
        k: {"boxes": torch.tensor(b).reshape(-1, 4), "scores": torch.ones(len(b)), "labels": torch.tensor(c).long()}
        for k, (b, c) in out.items()
    }


def _noisy(coco, seed=0):
    rng = np.random.default_rng(seed)
    out = _perfect(coco)
    for p in out.values():
        n = len(p["scores"])
        p["boxes"] = p["boxes"] + torch.from_numpy(rng.normal(0, 2, (n, 4))).float()
        p["scores"] = torch.from_numpy(rng.random(n)).float()
        wrong = torch.from_numpy(rng.random(n) < 0.2)
        p["labels"] = torch.where(wrong, p["labels"] % 3 + 1, p["labels"])
    return out


@pytest.fixture(scope="module")
def coco():
    return shape_scenes(30, seed=0).coco


def _run(coco, predictions, **options):
    evaluator = CocoEvaluator(coco, **options)
    evaluator.update(predictions)
    return evaluator.compute()


def test_ground_truth_fed_back_is_perfect(coco, capsys):
    stats = _run(coco, _perfect(coco))
    assert tuple(stats) == STATS
    assert stats["AP"] == pytest.approx(1.0, abs=1e-9) and stats["AR100"] == 1.0
    assert capsys.readouterr().out == ""


def test_annotation_ids_from_zero_do_not_lose_a_match(coco):
    shifted = copy.deepcopy(coco)
    for a in shifted["annotations"]:
        a["id"] -= 1
    assert _run(shifted, _perfect(coco))["AP"] == pytest.approx(1.0, abs=1e-9)


def test_nothing_found_is_zero(coco):
    assert _run(coco, {i["id"]: _none() for i in coco["images"]})["AP"] == 0
    assert CocoEvaluator(coco).compute()["AP"] == 0
    assert _run(coco, {1: {"boxes": [], "scores": [], "labels": []}})["AP50"] == 0


def test_batched_updates_equal_plain_pycocotools(coco, capsys):
    predictions = _noisy(coco)
    evaluator = CocoEvaluator(coco)
    for k in sorted(predictions, reverse=True):
        evaluator.update({k: predictions[k]})
    ours = evaluator.compute()
    assert 0.05 < ours["AP"] < 0.9

    rows = []
    for k, p in predictions.items():
        for (x0, y0, x1, y1), s, c in zip(p["boxes"].double(), p["scores"].double(), p["labels"], strict=True):
            bbox = [x0.item(), y0.item(), (x1 - x0).item(), (y1 - y0).item()]
            rows.append({"image_id": k, "category_id": c.item(), "bbox": bbox, "score": s.item()})
    truth = COCO()
    truth.dataset = copy.deepcopy(coco)
    truth.createIndex()
    run = COCOeval(truth, truth.loadRes(rows), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    capsys.readouterr()
    assert list(ours.values()) == pytest.approx(run.stats.tolist(), abs=1e-12)
    assert evaluator.compute() == ours  # computing changes nothing
    evaluator.reset()
    assert evaluator.compute()["AP"] == 0


def test_contiguous_labels_are_mapped_back(coco):
    perfect = _perfect(coco)
    for p in perfect.values():
        p["labels"] = p["labels"] - 1
    assert _run(coco, perfect, category_ids=[1, 2, 3])["AP"] == pytest.approx(1.0, abs=1e-9)
    assert _run(coco, perfect, category_ids=[2, 3, 1])["AP"] < 0.5
    with pytest.raises(ValueError, match=r"\[9\]"):
        CocoEvaluator(coco, category_ids=[1, 9])


def test_the_caller_s_annotations_are_left_alone(coco):
    before = copy.deepcopy(coco)
    _run(coco, _perfect(coco))
    assert coco == before


def _one_image(*objects):
    """objects: (box xyxy, difficult)."""
    return {
        "images": [{"id": 1, "width": 100, "height": 100}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"id": k, "image_id": 1, "category_id": 1, "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]], "difficult": d}
            for k, (b, d) in enumerate(objects)
        ],
    }


A, B, FAR = [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 70.0, 70.0], [80.0, 0.0, 90.0, 10.0]


def _found(*boxes):
    n = len(boxes)
    scores = [1.0 - 0.1 * i for i in range(n)]
    return {1: {"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "labels": torch.ones(n).long()}}


def test_difficult_objects_in_coco_figures():
    gt = _one_image((A, 0), (B, 1))
    assert _run(gt, _found(A))["AP"] == pytest.approx(1)  # B is no miss
    assert _run(gt, _found(B, A))["AP"] == pytest.approx(1)  # and finding it no false alarm
    assert _run(gt, _found(A), difficult="count")["AP"] == pytest.approx(51 / 101)  # recall levels 0...0.50
    # A crowd region would excuse the second detection of B, a difficult object does not.
    assert _run(gt, _found(B, B, A))["AP"] < 1
    with pytest.raises(ValueError, match="'skip'"):
        CocoEvaluator(gt, difficult="skip")


@pytest.mark.parametrize(
    ("predictions", "match"),
    [
        ({2: _none()}, "image 2 is not"),
        ({1: {"boxes": [A], "scores": [0.5], "labels": [4]}}, r"labels \[4\]"),
        ({1: {"boxes": [A], "scores": [0.5, 0.1], "labels": [1]}}, "expected boxes"),
        ({1: {"boxes": [A[:3]], "scores": [0.5], "labels": [1]}}, "expected boxes"),
        ({1: {"boxes": [[0, 0, float("nan"), 1]], "scores": [0.5], "labels": [1]}}, "not finite"),
    ],
)
def test_bad_predictions(predictions, match):
    with pytest.raises(ValueError, match=match):
        CocoEvaluator(_one_image((A, 0))).update(predictions)


def test_an_image_twice_is_an_error():
    evaluator = CocoEvaluator(_one_image((A, 0)))
    evaluator.update(_found(A))
    with pytest.raises(ValueError, match="given before"):
        evaluator.update(_found(A))


def _rank(rank, address, coco, predictions, queue):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    evaluator = CocoEvaluator(coco)
    # Image 1 is on both ranks, as a padding sampler makes it.
    evaluator.update({k: p for k, p in predictions.items() if k % 2 == rank or k == 1})
    queue.put((rank, evaluator.compute()))
    dist.destroy_process_group()


def test_two_ranks_equal_one_process(coco, tmp_path):
    predictions = {k: {n: v.tolist() for n, v in p.items()} for k, p in _noisy(coco).items()}
    context = mp.get_context("fork")  # spawning imports torch twice more
    queue = context.SimpleQueue()
    address = f"file://{tmp_path}/rendezvous"
    arguments = (address, coco, predictions, queue)
    mp.start_processes(_rank, args=arguments, nprocs=2, start_method="fork")
    stats = dict(queue.get() for _ in range(2))
    assert stats[0] == stats[1] == _run(coco, predictions)


# --- VOC ------------------------------------------------------------------------------------------


def _voc(objects, boxes, scores, **options):
    targets = {
        1: {
            "boxes": torch.tensor([b for b, _ in objects]).reshape(-1, 4),
            "labels": torch.zeros(len(objects)).long(),
            "difficult": torch.tensor([d for _, d in objects]),
        }
    }
    found = {1: {"boxes": torch.tensor(boxes).reshape(-1, 4), "scores": scores, "labels": [0] * len(scores)}}
    return voc_map(found, targets, num_classes=1, **options)["mAP"]


def test_voc_by_hand():
    # hit, false alarm, hit: recall .5 .5 1, precision 1 1/2 2/3
    case = [(A, 0), (B, 0)], [A, FAR, B], [0.9, 0.8, 0.7]
    assert _voc(*case) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert _voc(*case, method="11point") == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)

    # false alarm, hit, hit: precision 0 1/2 2/3; the envelope lifts the first half to 2/3
    assert _voc([(A, 0), (B, 0)], [FAR, A, B], [0.9, 0.8, 0.7]) == pytest.approx(2 / 3)


def test_voc_second_detection_is_a_false_alarm():
    # hit, duplicate, hit
    assert _voc([(A, 0), (B, 0)], [A, A, B], [0.9, 0.8, 0.7]) == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_voc_difficult():
    case = [(A, 0), (B, 1)], [B, A], [0.9, 0.8]
    assert _voc(*case) == pytest.approx(1)
    assert _voc([(A, 0), (B, 1)], [A], [0.9]) == pytest.approx(1)
    assert _voc([(A, 0), (B, 1)], [A], [0.9], difficult="count") == pytest.approx(0.5)


def test_voc_overlap_threshold_and_score_order():
    near = [0.0, 0.0, 10.0, 6.0]  # overlap 0.6 with A
    assert _voc([(A, 0)], [near], [0.9], iou=0.6) == pytest.approx(1)
    assert _voc([(A, 0)], [near], [0.9], iou=0.61) == 0
    assert _voc([(A, 0)], [FAR, A], [0.2, 0.9]) == pytest.approx(1)
    assert _voc([(A, 0)], [FAR, A], [0.9, 0.2]) == pytest.approx(0.5)


def test_voc_eleven_points_at_recall_three_tenths():
    boxes = [[20.0 * i, 0.0, 20.0 * i + 10, 10.0] for i in range(10)]
    ap = _voc([(b, 0) for b in boxes], boxes[:3], [0.9, 0.8, 0.7], method="11point")
    assert ap == pytest.approx(4 / 11)  # recalls 0, .1, .2 and .3


def test_voc_classes_and_empty_cases():
    targets = {1: {"boxes": [A], "labels": [0]}, 2: {"boxes": [B], "labels": [2]}, 3: {"boxes": [], "labels": []}}
    found = {1: {"boxes": [A, B], "scores": [0.9, 0.8], "labels": [0, 2]}, 3: _none()}
    out = voc_map(found, targets, num_classes=3)
    assert out["per_class"][0] == 1 and np.isnan(out["per_class"][1]) and out["per_class"][2] == 0
    assert out["mAP"] == 0.5
    assert voc_map({}, targets, num_classes=3)["mAP"] == 0
    assert np.isnan(voc_map({}, {}, num_classes=2)["mAP"])


@pytest.mark.parametrize(
    "bad", [{"method": "12point"}, {"difficult": "no"}, {"iou": 0.0}, {"num_classes": 0}, {"predictions": {5: _none()}}]
)
def test_voc_rejects(bad):
    arguments = {"predictions": {}, "targets": {1: {"boxes": [A], "labels": [0]}}, "num_classes": 1} | bad
    with pytest.raises(ValueError):
        voc_map(arguments.pop("predictions"), arguments.pop("targets"), **arguments)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_voc_area_stays_in_range_and_ignores_order(seed):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 20, (6, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 15, (6, 2))], axis=1)
    targets = {k: {"boxes": boxes[k : k + 3], "labels": rng.integers(0, 2, 3)} for k in range(3)}
    p = {
        "boxes": boxes + rng.normal(0, 1, boxes.shape),
        "scores": rng.permutation(6) / 6.0,
        "labels": rng.integers(0, 2, 6),
    }
    order = rng.permutation(6)
    shuffled = {key: value[order] for key, value in p.items()}
    first = voc_map({1: p}, targets, num_classes=2)
    second = voc_map({1: shuffled}, targets, num_classes=2)
    assert np.isnan(first["mAP"]) or 0 <= first["mAP"] <= 1
    np.testing.assert_allclose(first["per_class"], second["per_class"])
