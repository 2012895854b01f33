"""People's own folders through the train script of every paper: a broken image among good ones stops with its name, or is left
out and counted by broken_images=skip; the data of a run say so."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data.files import readable
from common.metrics.readme import PAPERS

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["train.batch_size=4", "data.workers=0", "preflight=true"]
LINES = {
    "ncl_pp": ["data=folder", "data.size=32", "data.augment=plain", "method.loss.hard=1.0"],
    "dcp_nas": ["data=folder", "data.size=16", "genotype=random"],
    "fm_vit": ["data=folder", "data.modalities=[rgb]", "method.modalities=[rgb]", "data.size=24"],
    "q_detr": ["data=coco", "data.train=train", "data.test=val", "data.augment=plain", "data.test_side=64", "method=teacher"],
    "ap_fer": ["data=own", "data.size=36", "start.arm=null"],
    "q_vit": ["data=folder", "data.size=16", "method=fp"],
    "adaptive_prune": ["data=folder", "method=pretrain"],
    "rbonn": ["data=folder", "data.size=32"],
    "lifelong": ["data=folder", "method=er", "data.tasks=2", "data.stored_size=32", "prepare.size=32"],
    "iqa_attack": ["data=photo_folder", "data.test_photos=2", "data.crops_per_photo=1", "data.size=64", "data.test_images=2",
        "method=brisque"],
}  # fmt: skip
CHOSEN = [p for p in PAPERS if os.environ.get("PAPER", p) == p]


def photo(path: Path, seed: int, side: int = 48) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((side, side)).save(path)


def own_folder(root: Path, paper: str) -> Path:
    """Six good training images and one that is cut off; returns the broken one."""
    classes = ("live", "print") if paper == "fm_vit" else ("ant", "bee")
    side = 160 if paper == "iqa_attack" else 48
    for split in ("train", "val", "test"):
        for c, name in enumerate(classes):
            for i in range(4):
                where = root / split / name / (f"rgb/{i}.png" if paper == "fm_vit" else f"{i}.png")
                photo(where, seed=100 * c + 10 * i + len(split), side=side)
    broken = sorted((root / "train").rglob("*.png"))[2]
    if paper == "q_detr":
        for split in ("train", "val"):
            files = sorted((root / split).rglob("*.png"))
            images = [
                {"id": i, "file_name": f.relative_to(root / split).as_posix(), "width": 48, "height": 48}
                for i, f in enumerate(files)
            ]
            boxes = [
                {"id": i, "image_id": i, "category_id": 1, "bbox": [4, 4, 20, 20], "area": 400, "iscrowd": 0}
                for i in range(len(files))
            ]
            (root / "annotations").mkdir(exist_ok=True)
            content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "ant"}]}
            (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    return broken


@pytest.mark.parametrize("paper", CHOSEN)
def test_a_broken_image_among_good_ones_is_left_out_by_the_switch(paper, tmp_path, started, monkeypatch, capsys):
    broken = own_folder(tmp_path / "own", paper)
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    small = SMALL if paper != "iqa_attack" else ["preflight=true"]
    line = [*dict.fromkeys([*LINES[paper], *small]), f"data.root={tmp_path / 'own'}"]
    status = started(ROOT / paper / "train.py", [*line, "broken_images=skip"])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert f"cannot decode image {broken}" in said.err and "broken_images=skip: 1 of " in said.err
    assert not list(place.iterdir())
    assert readable([broken]) == [0], "the switch of one script must not reach what the process does next"
