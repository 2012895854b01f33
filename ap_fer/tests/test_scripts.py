"""evaluate, predict, export, counts, align and bench as people call them (in-process)."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.transform import SimilarityTransform

from ap_fer import align, evaluate, export, predict
from ap_fer.checkpoint import data_options, load
from ap_fer.counts import all_counts
from ap_fer.data import build_data
from ap_fer.tests.helpers import config, short_config, small_model, write_image
from ap_fer.train import fit
from common import runs
from common.metrics.claims import load_claims
from common.metrics.ops import record_counts


def run(module, name, *overrides):
    """A verb as its script calls it."""
    body = {"evaluate": "evaluate", "predict": "predict", "export": "export_checkpoint"}[name]
    cfg = config(name, *overrides)
    return getattr(module, body)(cfg, runs.launch(cfg.fabric)) if name != "export" else getattr(module, body)(cfg)


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
    with pytest.raises(ValueError, match="claim=x, allowed: apvit_raf_db_weights"):
        run(evaluate, "evaluate", f"weights={checkpoint}", "claim=x")
    with pytest.raises(ValueError, match=r"set='rafdb', allowed: .*raf_db"):
        data_options(load(checkpoint), "rafdb", {})
    with pytest.raises(ValueError, match="has 7 classes, data.num_classes=8"):
        data_options(load(checkpoint), "affectnet8", {})
    with pytest.raises(ValueError, match="faces is embedded"):
        run(evaluate, "evaluate", f"weights={checkpoint}", f"data.root={tmp_path}")


def test_a_claim_is_about_the_whole_set(checkpoint, raf, tmp_path, capsys):
    """A record of a part of RAF-DB is written when that is meant, but never answers for the published number."""
    args = [
        "evaluate",
        f"weights={checkpoint}",
        "set=raf_db",
        f"data.root={raf}",
        "batch_size=7",
        f"out={tmp_path / 'e'}",
    ]
    with pytest.raises(ValueError, match="the train list has 14 images, the published one 12,271"):
        run(evaluate, *args, "+data.partial=false")
    with pytest.raises(
        ValueError, match="claim=apvit_raf_db_weights is about the whole set; raf_db under .* has 14 images"
    ):
        run(
            evaluate,
            *args,
            "claim=apvit_raf_db_weights",
            "record=true",
            f"record_to={tmp_path / 'r'}",
        )
    assert not (tmp_path / "r").exists() and 0 <= run(evaluate, *args)["top1"] <= 100
    assert "notice: this network was trained on drawn faces" in capsys.readouterr().out


def test_predict_scores_a_folder_and_draws_what_was_dropped(checkpoint, tmp_path, capsys):
    write_image(tmp_path / "in/sub/b.png", mode="L")
    write_image(tmp_path / "in/b.png", size=(60, 50))
    (tmp_path / "in/c.jpg").write_bytes(b"no image")
    out, pictures = tmp_path / "p.csv", tmp_path / "dropped"
    args = [f"weights={checkpoint}", f"out={out}", f"pictures={pictures}", "top=7"]
    with pytest.raises(SystemExit):
        run(predict, "predict", *args, f"images={tmp_path / 'in'}")
    assert "c.jpg" in capsys.readouterr().err
    rows = list(csv.DictReader(out.open()))
    assert [r["path"].split("/in/")[1] for r in rows[::7]] == ["b.png", "sub/b.png"]
    assert sum(float(r["probability"]) for r in rows[:7]) == pytest.approx(1, abs=1e-4)
    assert {r["label"] for r in rows[:7]} == set(load(checkpoint).about["classes"])
    assert sorted(p.name for p in pictures.iterdir()) == ["b.png", "sub__b.png"], "no two pictures under one name"
    assert Image.open(pictures / "b.png").size[0] > 300
    with pytest.raises(ValueError, match="top=8, allowed: 1..7"):
        run(predict, "predict", f"weights={checkpoint}", "images=x", "top=8")


def test_predict_normalises_as_the_checkpoint_says(checkpoint, tmp_path):
    write_image(tmp_path / "a.png", size=(48, 48))
    state = runs.load_checkpoint(checkpoint)
    state["model"]["head.fc.weight"].normal_()
    found = []
    for mean in (0.485, 0.9):
        state["about"]["normalise"] = {"mean": [mean] * 3, "std": [0.25] * 3}
        torch.save(state, tmp_path / "w.ckpt")
        out = tmp_path / "p.json"
        run(predict, "predict", f"weights={tmp_path / 'w.ckpt'}", f"images={tmp_path / 'a.png'}", f"out={out}", "top=7")
        rows = {r["label"]: float(r["probability"]) for r in json.loads(out.read_text())}
        x = torch.from_numpy(np.asarray(Image.open(tmp_path / "a.png"))).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            expected = load(tmp_path / "w.ckpt").model((x - mean) / 0.25).softmax(1)[0]
        found.append([rows[c] for c in state["about"]["classes"]])
        np.testing.assert_allclose(found[-1], expected, atol=1e-4)
    assert found[0] != found[1]


def test_faces_are_cut_out_by_their_boxes(checkpoint, tmp_path):
    """The same numbers as for the face cut out beforehand; a face without a box is named, an empty box refused."""
    whole = Image.open(write_image(tmp_path / "in/a.png", size=(90, 80)))
    (tmp_path / "cut").mkdir()
    whole.crop((20, 10, 68, 70)).save(tmp_path / "cut/a.png")
    (tmp_path / "b.csv").write_text("path,left,top,right,bottom\nin/a.png,20,10,68,70\n")
    found = []
    for folder, more in (("in", [f"boxes={tmp_path / 'b.csv'}"]), ("cut", []), ("in", [])):
        out = tmp_path / "p.json"
        run(predict, "predict", f"weights={checkpoint}", f"images={tmp_path / folder}", f"out={out}", "top=7", *more)
        found.append({r["label"]: r["probability"] for r in json.loads(out.read_text())})
    assert found[0] == found[1] != found[2]
    (tmp_path / "b.csv").write_text("x.png,20,10,68,70\n")
    with pytest.raises(SystemExit):
        run(
            predict,
            "predict",
            f"weights={checkpoint}",
            f"images={tmp_path / 'in'}",
            f"boxes={tmp_path / 'b.csv'}",
            f"out={tmp_path / 'none.csv'}",
        )
    with pytest.raises(ValueError, match="box of x.png is empty"):
        (tmp_path / "b.csv").write_text("x.png,20,10,20,70\n")
        align.read_boxes(tmp_path / "b.csv")
    with pytest.raises(ValueError, match="landmarks= or boxes="):
        run(predict, "predict", f"weights={checkpoint}", "images=" + str(tmp_path / "in"), "boxes=a", "landmarks=b")


def test_faces_are_aligned_by_their_landmarks(checkpoint, tmp_path, capsys):
    """The same numbers as for the face aligned beforehand; and the network says that it knows drawings only."""
    whole = Image.open(write_image(tmp_path / "in/a.png", size=(120, 110)))
    points = SimilarityTransform(scale=0.7, rotation=0.3, translation=(25, 5))(align.TEMPLATE)
    (tmp_path / "l.csv").write_text("in/a.png," + ",".join(f"{v:.3f}" for v in points.ravel()) + "\n")
    (tmp_path / "out").mkdir()
    listed = align.read_landmarks(tmp_path / "l.csv")["in/a.png"]
    Image.fromarray(align.align(np.asarray(whole), listed, size=96)).save(tmp_path / "out/a.png")
    found = []
    for folder, more in (("in", [f"landmarks={tmp_path / 'l.csv'}"]), ("out", []), ("in", [])):
        out = tmp_path / "p.json"
        run(predict, "predict", f"weights={checkpoint}", f"images={tmp_path / folder}", f"out={out}", "top=7", *more)
        found.append({r["label"]: r["probability"] for r in json.loads(out.read_text())})
    assert found[0] == found[1] != found[2]
    assert capsys.readouterr().out.count("notice: this network was trained on drawn faces") == 3


def test_own_class_folders_train_evaluate_and_predict_with_names(fabric, tmp_path, capsys):
    for split, n in (("train", 3), ("val", 1)):
        for c, name in enumerate(("calm", "joy", "pain")):
            for i in range(n):
                write_image(tmp_path / f"d/{split}/{name}/{i}.png", 10 * c + i, size=(48, 48))
    cfg = config(
        "config", "arm=test", "start.arm=null", "data=folder", f"data.root={tmp_path / 'd'}", "data.num_classes=null",
        "data.size=48", "data.workers=0",
        "data.augment=flip", "train.batch_size=4", "train.epochs=1",
    )  # fmt: skip
    fit(cfg, fabric, tmp_path / "run")
    weights = tmp_path / "run/last.ckpt"
    assert load(weights).about["classes"] == ["calm", "joy", "pain"] and not load(weights).about["drawn"]
    out = f"out={tmp_path / 'e'}"
    metrics = run(evaluate, "evaluate", f"weights={weights}", out)
    recorded = json.loads((tmp_path / "run/result.json").read_text())["metrics"]
    assert metrics["top1"] == pytest.approx(recorded["top1"]) and {"acc_calm", "acc_joy", "acc_pain"} <= metrics.keys()
    named = run(evaluate, "evaluate", f"weights={weights}", "set=own", f"data.root={tmp_path / 'd'}", out)
    assert named == metrics, "the folder by name is the folder it was trained on"
    run(predict, "predict", f"weights={weights}", f"images={tmp_path / 'd/val'}", f"out={tmp_path / 'p.csv'}")
    assert {r["label"] for r in csv.DictReader((tmp_path / "p.csv").open())} <= {"calm", "joy", "pain"}
    assert "drawn" not in capsys.readouterr().out
    with pytest.raises(runs.RunError, match="on other data"):
        write_image(tmp_path / "d/train/joy/9.png", size=(48, 48))
        fit(cfg, fabric, tmp_path / "run")


def test_overlays_darken_dropped_patches_in_their_place():
    kept = torch.ones(9, dtype=torch.bool)
    kept[5] = False  # second row, third column
    picture = predict.overlay(torch.ones(3, 6, 6), kept)
    assert picture.shape == (6, 6, 3) and (picture[2:4, 4:6, 1] < 0.5).all() and picture.sum() > 3 * 32
    dark = predict.overlay(torch.zeros(3, 6, 6), kept)
    assert (dark[:2] == 0).all() and dark[2, 4].max() > 0.5, "a dropped patch differs from a dark one"
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


def test_counts_measure_what_is_claimed(fabric, tmp_path):
    record_counts(config("counts"), fabric, tmp_path, lambda: all_counts(config("counts").settings))
    found = json.loads((tmp_path / "result.json").read_text())["metrics"]
    exact = [c for c in load_claims(evaluate.PAPER) if c["kind"] == "exact"]
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
    args = [f"landmarks={tmp_path / 'points.csv'}", f"root={tmp_path}", f"out={tmp_path / 'o'}", "size=112"]
    assert align.align_all(config("align", *args)) == 1 and Image.open(tmp_path / "o/a.png").size == (112, 112)
    (tmp_path / "points.csv").write_text("a.png,1,2\n")
    with pytest.raises(ValueError, match=r"points\.csv, line 1: expected a path and ten numbers"):
        align.align_all(config("align", *args))


def test_a_checkpoint_rebuilds_itself(checkpoint):
    model, cfg, _ = load(checkpoint)
    data = build_data(seed=cfg["seed"], **cfg["data"])
    state = runs.load_checkpoint(checkpoint)["model"]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and not model.training
    assert model(data.test[0][0][None]).shape == (1, 7)


def test_a_finished_run_is_skipped_and_another_configuration_refused(checkpoint, fabric, capsys):
    fit(short_config(), fabric, checkpoint.parent)
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(runs.RunError, match=r"method.app.keep: 32 -> 30"):
        fit(short_config("method.app.keep=30"), fabric, checkpoint.parent)
