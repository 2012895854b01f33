"""A small COCO folder that several test files read."""

import json

import pytest

from common.data.shapes import shape_scenes


@pytest.fixture
def folder(tmp_path):
    """A COCO folder whose categories have gaps (3, 7, 90), with unsorted images, a crowd region and a box without extent."""
    for split, seed in (("train", 0), ("val", 1)):
        scenes = shape_scenes(6, seed=seed, sizes=(48, 64), empty=0.3, square=0.5)
        path = scenes.write_coco(tmp_path, split)
        coco = json.loads(path.read_text())
        gaps = {1: 3, 2: 7, 3: 90}
        for c in coco["categories"]:
            c["id"] = gaps[c["id"]]
        for a in coco["annotations"]:
            a["category_id"] = gaps[a["category_id"]]
        first = coco["images"][0]["id"]
        extra = {"image_id": first, "category_id": 3, "area": 100.0}
        coco["annotations"] += [
            {**extra, "id": 901, "iscrowd": 1, "bbox": [1, 1, 10, 10]},
            {**extra, "id": 902, "iscrowd": 0, "bbox": [5, 5, 0, 9]},
        ]
        coco["images"].reverse()
        path.write_text(json.dumps(coco))
    return tmp_path
