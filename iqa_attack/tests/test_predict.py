"""predict.py scores files as evaluate.py does, goes on after a bad one, and train.py takes published parameters from files."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from iqa_attack import evaluate, predict, train
from iqa_attack.checkpoint import load
from iqa_attack.quality_models.brisque import load_brisque
from iqa_attack.quality_models.calibration import fit_calibration
from iqa_attack.tests.conftest import config, train_config

RNG = np.random.default_rng(0)


def save(path, height, width):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for name, size in (("a/1.png", (96, 128)), ("a/2.png", (96, 128)), ("b/1.png", (128, 100)), ("b/3.png", (96, 128))):
        save(tmp_path / "in" / name, *size)
    return tmp_path / "in"


def predicted(fabric, out, *overrides):
    path = predict.predict(config("predict", f"out={out}", *overrides), fabric)
    rows = list(csv.DictReader(path.open())) if path.suffix == ".csv" else json.loads(path.read_text())
    return {(r["path"], r["model"]): (float(r["score"]), float(r["raw"])) for r in rows}


def test_predictions_are_the_scores_of_evaluate(trained_root, folder, fabric, tmp_path):
    weights = f"weights={trained_root / 'default/all/seed0/last.ckpt'}"
    many = predicted(fabric, tmp_path / "p.csv", weights, f"images={folder}", "batch_size=2")
    one = predicted(fabric, tmp_path / "p.json", weights, f"images={folder}", "batch_size=1")
    assert many.keys() == one.keys() and len(many) == 4 * 4
    scores = config("evaluate", weights, f"data.root={folder}", f"out={tmp_path / 's.csv'}")
    assert evaluate.evaluate(scores, fabric) == {}, "no opinions there"
    for row in csv.DictReader((tmp_path / "s.csv").open()):
        for name in ("brisque", "cornia", "ma19", "unique"):
            want = float(row[name]), float(row[f"raw_{name}"])
            assert many[row["image"], name] == pytest.approx(want, rel=1e-4, abs=2e-4)
            assert one[row["image"], name] == pytest.approx(want, rel=1e-4, abs=2e-4)


def test_what_cannot_be_scored_is_named_at_the_end(trained_root, folder, fabric, tmp_path, capsys):
    (folder / "a/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    (folder / "notes.txt").write_text("no image")
    Image.new("RGB", (128, 96), (9, 9, 9)).save(folder / "a/flat.png")
    save(folder / "b/small.png", 12, 12)
    with pytest.raises(SystemExit) as stopped:
        predicted(
            fabric, tmp_path / "p.csv", f"weights={trained_root / 'default/all/seed0/last.ckpt'}", f"images={folder}"
        )
    said = capsys.readouterr()
    assert stopped.value.code == 1 and "error: 3 of 7 images were left out" in said.err
    for name, why in (("broken.png", "cannot decode"), ("flat.png", "is constant"), ("small.png", "12 x 12 pixels")):
        assert any(name in line and why in line for line in said.err.splitlines()), name
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert len(rows) == 4 * 4 and "4 images, 16 rows" in said.out


def test_published_parameters_are_read_and_calibrated_on_the_training_images(brisque, fabric, tmp_path):
    """statistics.brisque.file: the model of that file, whatever the split; its logistic is that of the training images."""
    np.savez(
        tmp_path / "svr.npz", support_vectors=brisque.vectors, alpha=-brisque.coefficients, rho=-brisque.rho,
        gamma=brisque.gamma, feature_range=np.stack([brisque.low, brisque.high]),
    )  # fmt: skip
    cfg = train_config("method=brisque", f"statistics.brisque.file={tmp_path / 'svr.npz'}")
    train.fit(cfg, fabric, tmp_path / "run")
    scored = load(tmp_path / "run/last.ckpt").model["brisque"]
    data = train.build_data(seed=0, **cfg.data)["train"]
    wanted = load_brisque(tmp_path / "svr.npz").eval()
    x = data.stack()[:6]
    with torch.no_grad():
        torch.testing.assert_close(scored.model(x), wanted(x), rtol=1e-6, atol=1e-6)
        raw = torch.cat([wanted(part) for part in data.stack().split(40)]).double()
    own = fit_calibration(raw, data.mos, source="")
    assert (scored.calibration.b3, scored.calibration.b4) == pytest.approx((own.b3, own.b4), rel=1e-3)
    assert scored.calibration.srcc > 0.5, "DMOS of the file is turned"
    with pytest.raises(FileNotFoundError, match="statistics.brisque.file: no published parameters /none.npz"):
        train.fit(train_config("method=brisque", "statistics.brisque.file=/none.npz"), fabric, tmp_path / "none")
