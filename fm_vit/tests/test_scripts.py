"""evaluate, predict, export, bench and aggregate on a checkpoint trained here."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from common import runs
from common.onnx_export import read_about
from fm_vit import aggregate, bench, evaluate, export, predict
from fm_vit.checkpoint import data_of, load
from fm_vit.tests.helpers import config, picture, short, write_own
from fm_vit.train import fit
from fm_vit.triplets import unpack


def rows_of(file):
    with file.open(newline="") as handle:
        return list(csv.DictReader(handle))


def result(path):
    return json.loads((path / "result.json").read_text())


def measured(fabric, checkpoint, out, *overrides):
    return evaluate.evaluate(config(f"weights={checkpoint}", f"out={out}", *overrides, name="evaluate"), fabric)


@pytest.mark.filterwarnings("ignore:a false positive rate")
def test_evaluate_repeats_the_numbers_of_the_run_and_writes_its_report(checkpoint, fabric, tmp_path):
    rows = measured(fabric, checkpoint, tmp_path, "bootstrap=20", "record=true", f"record_to={tmp_path / 'external'}")
    metrics = result(checkpoint.parent)["metrics"]
    for key in ("acer", "apcer_worst", "auc"):
        assert {f"{key}_{tag}": row[key] for tag, row in rows.items()} == pytest.approx(
            {k: v for k, v in metrics.items() if k.startswith(f"{key}_") and k.removeprefix(f"{key}_") in rows}
        )
    assert {t: r["threshold"] for t, r in rows.items()} == load(checkpoint).about["thresholds"]
    assert all(row["acer_low"] <= row["acer_high"] and 0 <= row["tpr_0.01"] <= 100 for row in rows.values())
    assert [r["subset"] for r in rows_of(tmp_path / "subsets.csv")] == list(rows)
    assert all((tmp_path / f).stat().st_size > 5000 for f in ("subsets.png", "det.png", "selection.png"))
    species = rows_of(tmp_path / "species.csv")
    assert max(float(v) for k, v in species[0].items() if k != "subset") == pytest.approx(
        rows["rgb"]["apcer_worst"], abs=1e-3
    )
    (record,) = (tmp_path / "external").glob("*.json")
    assert json.loads(record.read_text())["n"] == 48 and json.loads(record.read_text())["claim"] is None


def test_the_picture_of_the_selection_shows_every_branch_s_own_patches(checkpoint, fabric, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(evaluate, "plot_selection", lambda *given: seen.update(given=given))
    trained = load(checkpoint)
    data = data_of(trained, {}, splits=("test",))
    evaluate.draw_selection(fabric.setup_module(trained.model), data, tmp_path / "x.png", device=fabric.device)
    shown, own, read, kinds, _ = seen["given"]
    assert kinds == ["live", "glasses", "mask", "print", "replay"]
    images = unpack(torch.cat([torch.from_numpy(shown[m]) for m in shown], 1), list(shown))
    for m in ("rgb", "depth", "ir"):
        _, masks = trained.model({m: images[m]}, with_masks=True)
        assert (own[m] == masks[0][m].numpy()).all() and (own[m].sum(1) == 18).all()
    assert (read == own["rgb"] | own["depth"] | own["ir"]).all()


@pytest.mark.filterwarnings("ignore:a false positive rate")
def test_score_files_hold_what_the_report_was_made_of(checkpoint, fabric, tmp_path):
    rows = measured(fabric, checkpoint, tmp_path, "bootstrap=0")
    test, dev = (rows_of(tmp_path / f"scores_{s}_frame.csv") for s in ("test", "validation"))
    assert len(test) == 48 and len(dev) == 32
    scores, live = np.array([float(r["rgb_ir"]) for r in test]), np.array([r["live"] == "1" for r in test])
    trained = load(checkpoint)
    packed = data_of(trained, {}).splits["test"].samples.tensors[0][:5].float() / 255 * 2 - 1
    with torch.no_grad():  # every branch sees its own sensor
        expected = trained.model.score(trained.model({"rgb": packed[:, :3], "ir": packed[:, 6:]}))
    assert scores[:5] == pytest.approx(expected.numpy(), abs=1e-5)
    at = rows["rgb_ir"]["threshold"]
    assert 100 * (scores[~live] >= at).mean() == pytest.approx(rows["rgb_ir"]["apcer"])
    assert at == pytest.approx(
        min((float(r["rgb_ir"]) for r in dev), key=lambda s: abs(s - at)), abs=1e-7
    )  # one of its points


def test_kept_is_the_share_of_patches_that_all_sensors_together_read(checkpoint, fabric):
    trained = load(checkpoint)
    data = data_of(trained, {})
    _, kept = evaluate.predict(fabric, fabric.setup_module(trained.model), data, "test", batch_size=16)
    packed, names = data.splits["test"].samples.tensors[0].float() / 255 * 2 - 1, ["rgb", "depth", "ir"]
    with torch.no_grad():
        _, masks = trained.model(dict(zip(names, packed.split(3, 1), strict=True)), [names], with_masks=True)
    assert kept == {f"kept_{m}": pytest.approx(masks[0][-1][m].float().mean().item()) for m in names}


@pytest.mark.filterwarnings("ignore:a false positive rate")
def test_thresholds_and_intervals_of_evaluate(checkpoint, fabric, tmp_path, monkeypatch, capsys):
    """Test scores below all of validation: no live face passes a threshold of validation. Intervals resample subjects."""
    score, groups = evaluate.predict, []

    def shifted(fabric, model, data, split, **options):
        scored, kept = score(fabric, model, data, split, **options)
        low = {tag: values - 10.0 * (split == "test") for tag, values in scored.scores.items()}
        return evaluate.Scored(low, scored.live, scored.species, scored.subject, scored.video, scored.name), kept

    def resampled(metric, over, **options):
        groups.append(len(set(over)))
        return 0.0, 1.0

    monkeypatch.setattr(evaluate, "predict", shifted)
    monkeypatch.setattr(evaluate, "bootstrap", resampled)
    rows = measured(fabric, checkpoint, tmp_path)
    assert all(row["bpcer"] == 100 and row["apcer"] == 0 for row in rows.values())
    subjects = len(set(data_of(load(checkpoint), {}).splits["test"].subject))
    assert groups == [subjects] * 7 and subjects < 48
    alone = evaluate.Scored({"rgb": np.array([0.1, 0.9])}, np.array([False, True]), None, ["a", "b"])
    assert "acer_low" not in evaluate.intervals({"rgb": {"threshold": 0.5}}, alone, draws=5)["rgb"]
    assert "no intervals" in capsys.readouterr().out


def test_evaluate_refuses_what_it_cannot_do(checkpoint, fabric, tmp_path):
    for bad in ("level=clip", "threshold=best", "claim=mine", "bootstrap=-1"):
        with pytest.raises(ValueError, match=bad.split("=")[1]):
            measured(fabric, "nowhere.ckpt", tmp_path, bad)  # before anything is loaded
    with pytest.raises(ValueError, match="no sample of the attack species silicone"):
        measured(fabric, checkpoint, tmp_path, "species=[print,silicone]")
    with pytest.raises(ValueError, match="level=video"):
        measured(fabric, checkpoint, tmp_path, "level=video")
    with pytest.raises(ValueError, match="these faces are generated"):
        measured(fabric, checkpoint, tmp_path, "data.root=/data")
    torch.save({"model": {}}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="it lacks about, config"):
        load(tmp_path / "x.ckpt")
    assert [p.name for p in tmp_path.iterdir()] == ["x.ckpt"]


@pytest.mark.filterwarnings("ignore:a false positive rate")
def test_a_network_is_evaluated_on_own_folders_by_video(checkpoint, fabric, tmp_path):
    write_own(tmp_path / "own")
    shutil.rmtree(tmp_path / "own/train")  # nothing of it is needed
    own = ["+data.name=folder", f"data.root={tmp_path / 'own'}", "+data.video='(.*)'", "level=video", "bootstrap=0"]
    rows = measured(fabric, checkpoint, tmp_path / "out", *own)
    assert len(rows) == 7 and len(rows_of(tmp_path / "out/scores_test_video.csv")) == 9
    own[2] = "+data.video='(.*person[0-9])'"  # one video of each kind
    rows = measured(fabric, checkpoint, tmp_path / "joined", *own)
    frames, videos = (rows_of(tmp_path / f"joined/scores_validation_{level}.csv") for level in ("frame", "video"))
    assert (len(frames), len(videos)) == (9, 3)
    for tag, row in rows.items():  # the threshold is one of the scores of whole videos
        assert min(abs(row["threshold"] - float(v[tag])) for v in videos) < 1e-6


@pytest.mark.parametrize("names", ["[rgb]", "null"])
def test_export_of_one_branch_and_of_all(names, checkpoint, fabric, tmp_path, capsys):
    out = tmp_path / "model.onnx"
    export.export(config(f"weights={checkpoint}", f"modalities={names}", f"out={out}", name="export"), fabric)
    whole = sum(v.numel() for v in runs.load_checkpoint(checkpoint)["model"].values())
    parameters = int(capsys.readouterr().out.split(" parameters")[0].split()[-1].replace(",", ""))
    about, trained = read_about(out), load(checkpoint)
    assert parameters * 3 == whole * len(about["modalities"])
    assert about["threshold"] == trained.about["thresholds"]["_".join(about["modalities"])] and about["size"] == 24
    with pytest.raises(ValueError, match="sonar"):
        export.export(config(f"weights={checkpoint}", "modalities=[sonar]", name="export"), fabric)


def scored(fabric, checkpoint, out, *overrides):
    predict.score(config(f"weights={checkpoint}", f"out={out}", *overrides, name="predict"), fabric)
    return rows_of(out)


def test_predict_scores_as_the_training_does_with_the_threshold_of_the_subset(checkpoint, fabric, tmp_path):
    trained = load(checkpoint)
    packed = data_of(trained, {}).splits["test"].samples.tensors[0][:5]
    for k, m in enumerate(("rgb", "depth", "ir")):
        for i, image in enumerate(packed[:, 3 * k : 3 * k + 3]):
            (tmp_path / m).mkdir(exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / m / f"{i}.png")
    for also, names in (
        ({}, ["rgb"]),
        ({"ir": "ir"}, ["rgb", "ir"]),
        ({"ir": "ir", "depth": "depth"}, ["rgb", "depth", "ir"]),
    ):
        given = [f"also.{m}={tmp_path / f}" for m, f in also.items()]
        rows = scored(fabric, checkpoint, tmp_path / "s.csv", f"images={tmp_path / 'rgb'}", *given)
        x = {
            m: packed[:, 3 * k : 3 * k + 3].float() / 255 * 2 - 1
            for k, m in enumerate(("rgb", "depth", "ir"))
            if m in names
        }
        with torch.no_grad():
            expected = trained.model.score(trained.model(x)).tolist()
        assert [float(r["liveness"]) for r in rows] == pytest.approx(expected, abs=2e-5)
        threshold = trained.about["thresholds"]["_".join(names)]
        assert {r["threshold"] for r in rows} == {f"{threshold:.6f}"} and {r["sensors"] for r in rows} == {
            "+".join(names)
        }
        assert [r["decision"] for r in rows] == ["live" if v >= threshold else "attack" for v in expected]


def test_predict_with_sensors_that_are_missing_for_some_faces(checkpoint, fabric, tmp_path, capsys):
    for m, people in (("rgb", "ab"), ("ir", "bc")):
        for p in people:
            picture(tmp_path / m / f"{p}/1.png", ord(p))
    base = [f"images={tmp_path / 'rgb'}", f"also.ir={tmp_path / 'ir'}"]
    rows = scored(fabric, checkpoint, tmp_path / "s.csv", *base)
    assert [r["sensors"] for r in rows] == [
        "rgb+ir"
    ] and "left out, not in every folder: a/1" in capsys.readouterr().err
    rows = scored(fabric, checkpoint, tmp_path / "s.csv", *base, "missing=use")
    assert sorted((r["sensors"], r["path"][-7:]) for r in rows) == [
        ("ir", "c/1.png"),
        ("rgb", "a/1.png"),
        ("rgb+ir", "b/1.png"),
    ]


def test_predict_goes_on_after_a_broken_file_and_refuses_nonsense(checkpoint, fabric, tmp_path, capsys):
    for i in range(3):
        picture(tmp_path / f"in/{i}.png", i)
    (tmp_path / "in/1.png").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        scored(fabric, checkpoint, tmp_path / "s.csv", f"images={tmp_path / 'in'}", "batch_size=1")
    assert len(rows_of(tmp_path / "s.csv")) == 2 and "1 of 3 files could not be read" in capsys.readouterr().err
    for more, message in (
        (["sensor=sonar"], "not sonar"), (["missing=maybe"], "missing='maybe'"), ([f"also.rgb={tmp_path}"], "also.rgb"),
        ([f"also.ir={tmp_path / 'none'}"], "no folder"), (["out=x.txt"], ".csv or .json"),
    ):  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            predict.score(config(f"weights={checkpoint}", f"images={tmp_path / 'in'}", *more, name="predict"), fabric)


def test_predict_takes_depth_range_and_outline_rule_from_the_checkpoint(checkpoint, fabric, tmp_path):
    """Depth of 12 bits: with depth_max 4000 as trained, and an outline alone gives one score whatever is inside."""
    state = runs.load_checkpoint(checkpoint)
    for i in range(2):
        picture(tmp_path / f"depth/{i}.png", i, mode="I;16")
    with pytest.raises(SystemExit):  # nothing can be read without it
        scored(fabric, checkpoint, tmp_path / "s.csv", f"images={tmp_path / 'depth'}", "sensor=depth")
    state["about"] |= {"depth_max": 4000.0}
    torch.save(state, tmp_path / "deep.ckpt")
    rows = scored(fabric, tmp_path / "deep.ckpt", tmp_path / "s.csv", f"images={tmp_path / 'depth'}", "sensor=depth")
    assert rows[0]["liveness"] != rows[1]["liveness"]
    state["about"] |= {"outline_only": True}
    torch.save(state, tmp_path / "outline.ckpt")
    rows = scored(fabric, tmp_path / "outline.ckpt", tmp_path / "s.csv", f"images={tmp_path / 'depth'}", "sensor=depth")
    assert rows[0]["liveness"] == rows[1]["liveness"]


def test_a_reloaded_network_keeps_every_option(fabric, tmp_path):

    options = ["method.options.cmtb.share=0.1", "method.options.after=[1]", "method.options.cmtb.mma=own"]
    fit(short("train.epochs=0", *options), fabric, tmp_path)
    model = load(tmp_path / "last.ckpt").model
    block = model.branches["rgb"].cmtb[0]
    assert (block.share, block.mode, model.after) == (0.1, "own", [1]) and not model.training
    options = ["method.options.fill=black", "method.options.dropout=0.5"]
    fit(short("train.epochs=0", "method=concat", *options), fabric, tmp_path / "concat")
    model = load(tmp_path / "concat/last.ckpt").model
    assert (model.fill, model.dropout) == ("black", 0.5)


def test_aggregate_gives_mean_and_deviation_over_sub_protocols(fabric, tmp_path):
    for k, (protocol, value) in enumerate((("4.1", 10.0), ("4.3", 20.0), ("4.5", 30.0))):
        folder = tmp_path / f"run{k}"
        folder.mkdir()
        (folder / "result.json").write_text(
            json.dumps({"status": "finished", "seed": 0, "metrics": {"acer_rgb": value}})
        )
        (folder / "config.yaml").write_text(f"data: {{protocol: '{protocol}'}}\n")
    runs_ = f"runs=[{','.join(str(tmp_path / f'run{k}') for k in range(3))}]"
    found = aggregate.aggregate(config(runs_, f"out={tmp_path / 'a.csv'}", name="aggregate"))
    assert found["acer_rgb"] == (20.0, pytest.approx(10.0)) and rows_of(tmp_path / "a.csv")[0]["mean"] == "20"
    with pytest.raises(ValueError, match=r"two or more finished runs, got 1"):
        aggregate.aggregate(config(f"runs=[{tmp_path / 'run0'}]", name="aggregate"))
    (tmp_path / "run1/config.yaml").write_text("data: {protocol: '4.1'}\n")
    with pytest.raises(ValueError, match="4.1 twice"):
        aggregate.aggregate(config(runs_, name="aggregate"))


def test_bench_gives_ratios(fabric, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "MODALITIES", ["rgb", "ir"])  # with three, exporting takes twice as long
    cfg = config("rounds=3", f"out={tmp_path / 'bench.json'}", name="bench")
    OmegaConf.set_struct(cfg, False)
    cfg.vit = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    rows = bench.bench(cfg)
    assert all(r["ratio"] > 0 for r in rows) and len(rows) == 3
    assert json.loads((tmp_path / "bench.json").read_text()) == rows
