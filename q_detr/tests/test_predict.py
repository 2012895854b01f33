"""predict.py: boxes in pixels, tables, pictures, COCO results, and photos as people have them."""

import csv
import itertools
import json

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from common import runs
from common.data.files import ORIENTATION
from common.metrics.detection import CocoEvaluator
from q_detr import predict
from q_detr.building import build_real
from q_detr.checkpoint import about, label_names, load
from q_detr.evaluate import coco_rows, known_labels
from q_detr.held_out import held_out_set
from q_detr.held_out import predict as detections
from q_detr.tests.contract import CONFIGS

COCO = {"name": "coco", "seed": 0, "train": "val", "test": "val", "test_side": None}


def run(*overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("predict", ["fabric.accelerator=cpu", *(str(o) for o in overrides)])
    return predict.predict(cfg, runs.launch(cfg.fabric))


def save(path, held_out, side=None, **more):
    """An untrained tiny DETR as train.py saves it."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", ["model.kind=detr"])
    torch.manual_seed(0)
    known = about(held_out, loss="softmax", side=side) | more
    model = build_real(**cfg.model, num_classes=known["num_classes"])
    with torch.no_grad():
        model.class_embed.bias[list(label_names(known))] += 5  # the gaps between category ids are no class
    config = {"model": dict(cfg.model), "method": {"quantised": False}, "data": dict(cfg.data), "seed": 0}
    torch.save(
        {
            "model": model.state_dict(),
            "about": known,
            "config": {**config, "model": {**config["model"], "widths": [16, 48, 64, 64]}},
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    scenes = {"name": "scenes", "seed": 0, "train": 1, "test": 2, "side": 48, "max_shapes": 3}
    return save(tmp_path_factory.mktemp("weights") / "last.ckpt", held_out_set(scenes))


def table(path):
    return list(csv.DictReader(path.open()))


def test_rows_and_pictures_are_in_pixels_of_the_image(weights, tmp_path):
    Image.new("RGB", (450, 300), "grey").save(tmp_path / "own.png")
    options = [f"weights={weights}", f"images={tmp_path / 'own.png'}", "threshold=0", f"pictures={tmp_path / 'out'}"]
    rows = table(run(*options, f"out={tmp_path / 'rows.csv'}"))
    assert len(rows) == 8 and {r["label"] for r in rows} <= {"rectangle", "ellipse", "triangle"}
    network = load(weights).model
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((torch.full((1, 3, 300, 450), 128 / 255).movedim(1, 3) - mean) / std).movedim(3, 1)
    with torch.no_grad():
        out = network(x, torch.zeros(1, 300, 450, dtype=torch.bool))
    surest = int(out["pred_logits"][0].softmax(-1)[:, :-1].amax(-1).argmax())
    cx, cy, w, h = out["pred_boxes"][0, surest].tolist()
    expected = [(cx - w / 2) * 450, (cy - h / 2) * 300, (cx + w / 2) * 450, (cy + h / 2) * 300]
    assert [float(rows[0][k]) for k in ("x0", "y0", "x1", "y1")] == pytest.approx(expected, abs=0.06)
    assert [float(r["score"]) for r in rows] == sorted((float(r["score"]) for r in rows), reverse=True)
    with Image.open(tmp_path / "out/own.png") as drawn:
        left, bottom = round(float(rows[0]["x0"])), round(float(rows[0]["y1"]))
        colour = predict.COLOURS[["rectangle", "ellipse", "triangle"].index(rows[0]["label"])]
        assert drawn.size == (450, 300) and "#{:02x}{:02x}{:02x}".format(*drawn.getpixel((left, bottom))) == colour
    assert len(table(run(*options, "top=3", f"out={tmp_path / 'three.csv'}"))) == 3
    assert len(json.loads(run(*options, f"out={tmp_path / 'rows.json'}").read_text())) == 8


def test_the_look_of_a_picture_is_that_of_the_checkpoint(weights, tmp_path):
    """Another normalisation or size in `about` gives other scores."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    found = {}
    scenes = held_out_set({"name": "scenes", "seed": 0, "train": 1, "test": 2, "side": 48, "max_shapes": 3})
    looks = {"own": {}, "plain": {"normalise": {"mean": [0.0] * 3, "std": [1.0] * 3}}, "large": {"size": 96}}
    for name, look in looks.items():
        file = save(tmp_path / f"{name}.ckpt", scenes, **look)
        out = run(f"weights={file}", f"images={tmp_path / 'a.png'}", "threshold=0", f"out={tmp_path / f'{name}.csv'}")
        found[name] = [r["score"] for r in table(out)]
    assert found["own"] != found["plain"] and found["own"] != found["large"]


def test_a_folder_streams_goes_on_after_a_broken_file_and_never_writes_two_results_to_one_name(
    weights, tmp_path, capsys
):
    root = tmp_path / "photos"
    for i, name in enumerate(("a/1.png", "b/1.png", "b/c/1.jpg", "b/1.PNG", ".hidden/2.png", "b/._1.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64 + 8 * i, 64), "red").save(root / name, format="PNG")
    (root / "aa.jpg").write_bytes(b"no image")
    (root / "notes.txt").write_text("not looked at")
    options = [f"weights={weights}", f"pictures={tmp_path / 'out'}", f"out={tmp_path / 'rows.csv'}", "threshold=0"]
    with pytest.raises(SystemExit):
        run(*options, f"images={root}", "batch_size=2")
    assert "aa.jpg" in capsys.readouterr().err
    assert len({r["path"] for r in table(tmp_path / "rows.csv")}) == 4
    assert len(list((tmp_path / "out").iterdir())) == 4
    with pytest.raises(FileNotFoundError, match="gone"):
        run(*options, f"images={root / 'gone.png'}")
    with pytest.raises(ValueError, match="threshold=2"):
        run(*options, f"images={root}", "threshold=2")


def test_batches_give_the_rows_of_single_images(weights, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    found = []
    for size in (1, 3):
        out = run(
            f"weights={weights}",
            f"images={tmp_path}",
            "threshold=0",
            f"batch_size={size}",
            f"out={tmp_path / f'b{size}.csv'}",
        )
        found.append(table(out))
    for a, b in zip(*found, strict=True):
        assert (a["path"], a["label"]) == (b["path"], b["label"])
        assert float(a["x0"]) == pytest.approx(float(b["x0"]), abs=0.2)


@pytest.mark.parametrize("turn", range(1, 9))
def test_stored_coordinates_undo_the_orientation_of_a_photo(turn, tmp_path):
    """A rectangle found in the upright picture lies on the same pixels of the stored one."""
    stored = np.zeros((40, 60, 3), dtype=np.uint8)
    stored[5:15, 20:50] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    upright = np.asarray(predict.open_image(tmp_path / "a.png"))
    y, x = np.nonzero(upright[..., 0])
    box = [x.min(), y.min(), x.max() + 1, y.max() + 1]
    assert predict.stored_box(box, tmp_path / "a.png", upright.shape[:2]) == [20, 5, 30, 10]


@pytest.mark.parametrize("labels", ["ids", "contiguous"])
def test_coco_results_are_the_detections_that_the_evaluation_counts(labels, folder, tmp_path):
    held_out = held_out_set({**COCO, "root": str(folder), "labels": labels})
    file = save(tmp_path / "last.ckpt", held_out, side=48)
    fabric = runs.launch({"accelerator": "cpu", "devices": 1})
    found = detections(fabric, load(file).model, held_out, loss="softmax", batch_size=1, side=48)
    instances = folder / "annotations/instances_val.json"
    out = [f"out={tmp_path / 'rows.csv'}", f"coco={tmp_path / 'results.json'}", f"ids={instances}"]
    run(f"weights={file}", f"images={folder / 'val'}", "threshold=1", *out)
    rows = json.loads((tmp_path / "results.json").read_text())
    expected = list(coco_rows(found, known_labels(held_out)))
    key = lambda r: (r["image_id"], -r["score"], r["bbox"])  # noqa: E731
    assert len(rows) == len(expected) > 0 and {r["category_id"] for r in rows} <= {3, 7, 90}
    for a, b in zip(sorted(rows, key=key), sorted(expected, key=key), strict=True):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        assert a["bbox"] == pytest.approx(b["bbox"], abs=0.01) and a["score"] == pytest.approx(b["score"], abs=1e-5)
    evaluator = CocoEvaluator(held_out.coco)
    by_image = {i: list(g) for i, g in itertools.groupby(sorted(rows, key=key), key=lambda r: r["image_id"])}
    corners = lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]  # noqa: E731
    evaluator.update({
        i: {"boxes": torch.tensor([corners(r["bbox"]) for r in g]), "scores": torch.tensor([r["score"] for r in g]),
            "labels": torch.tensor([r["category_id"] for r in g])} for i, g in by_image.items()
    })  # fmt: skip
    assert 0 <= evaluator.compute()["AP"] <= 1


def test_images_without_an_id_or_with_one_id_twice_are_named(weights, tmp_path):
    for name in ("a/000000000139.jpg", "b/139.jpg"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    options = [f"weights={weights}", f"out={tmp_path / 'rows.csv'}", f"coco={tmp_path / 'r.json'}"]
    run(*options, f"images={tmp_path / 'a'}")
    assert {r["image_id"] for r in json.loads((tmp_path / "r.json").read_text())} == {139}
    with pytest.raises(ValueError, match="same id"):
        run(*options, f"images={tmp_path}")
    Image.new("RGB", (64, 64)).save(tmp_path / "b/mine.png")
    with pytest.raises(ValueError, match="mine.png and 0 more: its name is no whole number; give ids="):
        run(*options, f"images={tmp_path / 'b'}")
