"""evaluate, predict, export, counts, align and bench as people call them (in-process)."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.transform import SimilarityTransform

from ap_fer import align, bench, counts, evaluate, export, predict
from ap_fer.data import build_data
from ap_fer.tests.helpers import config, short_config, small_model, write_image
from ap_fer.train import fit
from common import runs


def run(module, name, *overrides):
    module.main.__wrapped__(config(name, *overrides))


def test_evaluate_gives_the_numbers_of_the_run_and_a_record(checkpoint, tmp_path, capsys):
    before = json.loads((checkpoint.parent / "result.json").read_text())["metrics"]
    run(
        evaluate,
        "evaluate",
        f"weights={checkpoint}",
        f"out={tmp_path / 'e'}",
        "record=true",
        f"record_to={tmp_path / 'r'}",
    )
    printed = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
    for name in ("top1", "macro_f1", "top1_occluded", "drop_lift"):
        assert float(printed[name]) == pytest.approx(before[name], abs=1e-3)
    (record,) = [json.loads(p.read_text()) for p in (tmp_path / "r").glob("*.json")]
    assert (
        record["value"] == pytest.approx(before["top1"]) and record["n"] == 70 and len(record["weights_sha256"]) == 64
    )
    rows = list(csv.reader((tmp_path / "e/confusion.csv").open()))
    assert rows[0] == ["truth", "anger", "disgust", "fear", "sadness", "happiness", "surprise", "neutral"]
    assert sum(int(v) for row in rows[1:] for v in row[1:]) == 70 and all(
        sum(map(int, row[1:])) == 10 for row in rows[1:]
    )
    with pytest.raises(ValueError, match="claim='x', allowed: apvit_raf_db_weights"):
        run(evaluate, "evaluate", f"weights={checkpoint}", "claim=x")
    with pytest.raises(ValueError, match=r"set='rafdb', allowed: .*raf_db"):
        evaluate.load(str(checkpoint), data_set="rafdb")
    with pytest.raises(ValueError, match="has 7 classes, data.num_classes=8"):
        evaluate.load(str(checkpoint), data_set="affectnet8")


def test_predict_scores_a_folder_and_draws_what_was_dropped(checkpoint, tmp_path, capsys):
    write_image(tmp_path / "in/sub/a.png", mode="L")
    write_image(tmp_path / "in/b.jpg", size=(60, 50))
    run(predict, "predict", f"weights={checkpoint}", f"images=[{tmp_path / 'in'}]", f"out={tmp_path / 'out'}")
    rows = list(csv.DictReader((tmp_path / "out/predictions.csv").open()))
    assert [r["image"].split("/")[-1] for r in rows] == ["b.jpg", "a.png"]
    for row in rows:
        p = {k: float(v) for k, v in row.items() if k not in ("image", "expression")}
        assert sum(p.values()) == pytest.approx(1, abs=1e-3) and row["expression"] == max(p, key=p.get)
    assert Image.open(tmp_path / "out/dropped_patches.png").size[0] > 300
    run(predict, "predict", f"weights={checkpoint}", "count=3", f"out={tmp_path / 'test'}")
    assert len(list(csv.DictReader((tmp_path / "test/predictions.csv").open()))) == 3
    with pytest.raises(FileNotFoundError, match="no image in .*empty"):
        (tmp_path / "empty").mkdir()
        run(predict, "predict", f"weights={checkpoint}", f"images={tmp_path / 'empty'}")
    with pytest.raises(ValueError, match=r"count=999, allowed: 1..70"):
        run(predict, "predict", f"weights={checkpoint}", "count=999")


def test_overlays_darken_dropped_patches_in_their_place():
    kept = torch.ones(9, dtype=torch.bool)
    kept[5] = False  # second row, third column
    picture = predict.overlay(torch.ones(3, 6, 6), kept)
    assert picture.shape == (6, 6, 3) and (picture[2:4, 4:6] < 0.2).all() and picture.sum() > 3 * 32
    model = small_model().eval()
    _, found = model(torch.randn(2, 3, 24, 24), details=True)
    assert [(title, int(mask[0].sum())) for title, mask in predict.stages(found, 36)] == [
        ("APP", 20),
        ("block 2", 14),
        ("block 3", 9),
    ]


def test_onnx_equals_torch_at_any_batch_size(tmp_path):
    torch.manual_seed(0)
    model = small_model(stem="conv", widths=[8, 8]).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    export.export(model, tmp_path / "m.onnx")
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 24, 24)
        np.testing.assert_allclose(
            export.onnx_logits(tmp_path / "m.onnx", x, threads=1), model(x).detach().numpy(), atol=1e-4
        )
    for options in ({"app": {"keep": 9, "score": "noise"}}, {"atp": {"rate": 0.5, "start": 0, "score": "random"}}):
        with pytest.raises(ValueError, match="random scores is a control"):
            export.export(small_model(**options), tmp_path / "r.onnx")


def test_export_of_a_checkpoint(checkpoint, tmp_path, capsys):
    run(export, "export", f"weights={checkpoint}", f"out={tmp_path / 'a.onnx'}")
    assert "largest difference to torch" in capsys.readouterr().out


def test_counts_measure_what_is_claimed(tmp_path, capsys, monkeypatch):
    class Hydra:
        @staticmethod
        def get():
            return type("C", (), {"runtime": type("R", (), {"output_dir": str(tmp_path / "counts/seed0")})})

    monkeypatch.setattr(counts, "HydraConfig", Hydra)
    run(counts, "counts", f"run_root={tmp_path}")
    found = json.loads((tmp_path / "counts/seed0/result.json").read_text())["metrics"]
    from common.metrics.claims import load_claims

    exact = [c for c in load_claims(evaluate.CONFIGS.parent) if c["kind"] == "exact"]
    assert len(exact) > 20
    for claim in exact:
        assert abs(found[claim["metric"]] - claim["published"]["value"]) <= claim["tol"], claim["id"]


def test_alignment_recovers_a_similarity_and_refuses_nonsense(tmp_path):
    """The template itself is the identity; turned and scaled landmarks bring their dot back to its place."""
    picture = np.zeros((112, 112, 3), np.uint8)
    eye = align.TEMPLATE[0].round().astype(int)
    picture[eye[1] - 2 : eye[1] + 3, eye[0] - 2 : eye[0] + 3] = 255
    np.testing.assert_array_equal(align.align(picture, align.TEMPLATE, size=112), picture)
    move = SimilarityTransform(scale=1.7, rotation=0.5, translation=(60, 10))
    big = np.zeros((320, 320, 3), np.uint8)
    x, y = move(align.TEMPLATE[:1])[0].round().astype(int)
    big[y - 4 : y + 5, x - 4 : x + 5] = 255
    out = align.align(big, move(align.TEMPLATE), size=224)
    rows, columns = np.nonzero(out[..., 0] > 128)
    np.testing.assert_allclose([columns.mean(), rows.mean()], 2 * align.TEMPLATE[0], atol=1.5)
    with pytest.raises(ValueError, match="five landmarks"):
        align.align(picture, align.TEMPLATE[:4])
    with pytest.raises(ValueError, match="coincide"):
        align.align(picture, np.ones((5, 2)))
    Image.fromarray(big).save(tmp_path / "a.png")
    row = ",".join(f"{v:.2f}" for v in move(align.TEMPLATE).ravel())
    (tmp_path / "points.csv").write_text(f"a.png,{row}\n")
    align.main([f"landmarks={tmp_path / 'points.csv'}", f"root={tmp_path}", f"out={tmp_path / 'o'}", "size=112"])
    assert Image.open(tmp_path / "o/a.png").size == (112, 112)
    with pytest.raises(SystemExit, match="known: landmarks, root, out, size"):
        align.main(["landmark=x"])


def test_bench_rounds_and_options(tmp_path):
    order = []
    times = bench.measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, end=0)
    assert sorted(order) == ["a"] * 3 + ["b"] * 3 and set(times) == {"a", "b"}
    with pytest.raises(SystemExit, match="unknown"):
        bench.main(["batch=1"])


def test_a_checkpoint_rebuilds_itself(checkpoint):
    model, cfg = evaluate.load(str(checkpoint))
    data = build_data(seed=cfg.seed, **cfg.data)
    state = runs.load_checkpoint(checkpoint)["model"]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and not model.training
    assert model(data.test[0][0][None]).shape == (1, 7)


def test_a_finished_run_is_skipped_and_another_configuration_refused(checkpoint, fabric, capsys):
    fit(short_config(), fabric, checkpoint.parent)
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(runs.RunError, match=r"method.app.keep: 24 -> 30"):
        fit(short_config("method.app.keep=30"), fabric, checkpoint.parent)
