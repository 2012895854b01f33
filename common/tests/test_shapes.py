import numpy as np
import pytest

from common.data.shapes import SHAPES, coco_to_voc, shape_scenes


def test_deterministic_and_sized():
    a, b, c = shape_scenes(30, seed=5), shape_scenes(30, seed=5), shape_scenes(30, seed=6)
    assert a.coco == b.coco and all(np.array_equal(x, y) for x, y in zip(a.images, b.images, strict=True))
    assert a.coco != c.coco
    for image, info in zip(a.images, a.coco["images"], strict=True):
        assert image.shape == (info["height"], info["width"], 3) and image.dtype == np.uint8
    shapes = {i.shape for i in a.images}
    assert any(h != w for h, w, _ in shapes) and len(shapes) > 3


def test_boxes_are_the_extent_of_the_pixels():
    """One shape per image: what differs from the same scene without shapes is the shape."""
    scenes = shape_scenes(60, seed=1, sizes=(48,), max_shapes=1, empty=0.0)
    assert len(scenes.coco["annotations"]) == 60
    for image, a in zip(scenes.images, scenes.coco["annotations"], strict=True):
        x, y, w, h = (int(v) for v in a["bbox"])
        colour = image[y + h // 2, x + w // 2] if a["category_id"] != 3 else image[y + h - 1, x + w // 2]
        inside = (image == colour).all(axis=2)
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == (x, y, x + w, y + h)
        assert inside.sum() == a["area"]
        share = a["area"] / (w * h)
        low, high = {"rectangle": (1, 1), "ellipse": (0.66, 0.9), "triangle": (0.42, 0.65)}[
            SHAPES[a["category_id"] - 1]
        ]
        assert low <= share <= high


def test_counts_overlap_and_ids():
    scenes = shape_scenes(400, seed=2, sizes=(64,), empty=0.1, max_shapes=4)
    annotations = scenes.coco["annotations"]
    assert [a["id"] for a in annotations] == list(range(1, len(annotations) + 1))
    per_image = np.bincount([a["image_id"] for a in annotations], minlength=401)[1:]
    assert per_image.max() == 4 and 0.05 < (per_image == 0).mean() < 0.16
    assert np.bincount([a["category_id"] for a in annotations])[1:].min() > 0.28 * len(annotations)
    for image_id in range(1, 401):
        boxes = [a["bbox"] for a in annotations if a["image_id"] == image_id]
        for i, (x, y, w, h) in enumerate(boxes):
            assert x >= 0 and y >= 0 and x + w <= 64 and y + h <= 64
            for u, v, s, t in boxes[:i]:
                shared = max(0, min(x + w, u + s) - max(x, u)) * max(0, min(y + h, v + t) - max(y, v))
                assert shared <= 0.3 * min(w * h, s * t)  # 0.2 before rounding to pixels


def test_photo_background_and_bad_parameters():
    scenes = shape_scenes(5, background="photos", sizes=(48, 64))
    assert np.std([i.mean() for i in scenes.images]) > 1
    for bad in (
        {"n": 0},
        {"sizes": ()},
        {"sizes": (8,)},
        {"max_shapes": 0},
        {"empty": 1.5},
        {"overlap": -0.1},
        {"background": "sea"},
    ):
        with pytest.raises(ValueError):
            shape_scenes(**({"n": 3} | bad))


def test_voc_needs_its_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="instances_train"):
        coco_to_voc(tmp_path, tmp_path / "voc")
