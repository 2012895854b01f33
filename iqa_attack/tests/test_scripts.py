"""The scripts as people run them: training, attack, resume, control, tables, evaluation, the study, errors."""

import csv
import json
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
import yaml
from hydra.errors import MissingConfigException
from PIL import Image

from common import runs
from common.data.batches import stream
from common.testing import process
from iqa_attack import attack, evaluate, train
from iqa_attack.jnd import CsvObserver
from iqa_attack.photographs.images import read_image
from iqa_attack.photographs.photos import ANNOTATORS
from iqa_attack.procedures import attack_of
from iqa_attack.quality_models.models import build_network
from iqa_attack.settings import options_of
from iqa_attack.study import session
from iqa_attack.tables import read_cells, summarise, write_tables
from iqa_attack.tests.conftest import CONFIGS, PAPER, SMALL, attack_config, config, train_config

NETS = ["networks.ma19.epochs=3", "networks.unique.epochs=3"]


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_all_models_are_trained_and_reported(trained_root):
    out = trained_root / "default/all/seed0"
    found = result(out)
    assert found["status"] == "finished"
    for name in ("brisque", "cornia", "ma19", "unique"):
        assert {f"{k}_test_{name}" for k in ("srcc", "krcc", "plcc", "rmse")} <= found["metrics"].keys()
    assert found["metrics"]["srcc_test_brisque"] > 0.4
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(r["model"], r["epoch"]) for r in rows] == [("ma19", 1), ("ma19", 2), ("unique", 1), ("unique", 2)]
    assert rows[3]["fidelity"] < rows[2]["fidelity"]


def test_niqe_is_fitted(fabric, tmp_path):
    train.fit(train_config("method=niqe"), fabric, tmp_path)
    assert "srcc_test_niqe" in result(tmp_path)["metrics"]


@pytest.fixture(scope="module")
def whole(fabric, tmp_path_factory):
    """A training that nobody interrupts: (its configuration, its folder)."""
    cfg, out = train_config("method.models=[cornia,ma19,unique]", *NETS), tmp_path_factory.mktemp("whole")
    train.fit(cfg, fabric, out)
    return cfg, out


@pytest.mark.parametrize("stop", [("ma19", 2), ("unique", 1)])
def test_resumed_training_equals_uninterrupted_bit_for_bit(stop, fabric, tmp_path, monkeypatch, whole):
    cfg, uninterrupted = whole
    log = runs.Run.log

    def killed(self, **row):
        log(self, **row)
        if (row["model"], row["epoch"]) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, "log", killed)
    with pytest.raises(KeyboardInterrupt):
        train.fit(cfg, fabric, tmp_path / "parts")
    monkeypatch.setattr(runs.Run, "log", log)
    train.fit(cfg, fabric, tmp_path / "parts")
    expected, parts = (runs.load_checkpoint(d / "last.ckpt")["model"] for d in (uninterrupted, tmp_path / "parts"))
    for name, model in expected.items():
        torch.testing.assert_close(parts[name]["state"], model["state"], rtol=0, atol=0)
        assert parts[name]["calibration"] == model["calibration"]
    assert (uninterrupted / "metrics.jsonl").read_text() == (tmp_path / "parts/metrics.jsonl").read_text()
    assert result(uninterrupted)["metrics"] == result(tmp_path / "parts")["metrics"]


def test_a_resting_trunk_does_not_move(fabric, tmp_path):
    """UNIQUE's trunk rests for one epoch of two; what is new learns from the first."""
    found = []
    for epochs in (1, 2):
        cfg = train_config("method=unique", "networks.unique.frozen_epochs=1", f"networks.unique.epochs={epochs}")
        torch.manual_seed(stream(cfg.seed, *b"unique"))
        start = build_network("unique", backbone="small").state_dict()
        train.fit(cfg, fabric, tmp_path / str(epochs))
        state = runs.load_checkpoint(tmp_path / str(epochs) / "last.ckpt")["model"]["unique"]["state"]
        found.append({k: torch.equal(v, start[k]) for k, v in state.items() if k.endswith("weight")})
    trunk = [k for k in found[0] if k.startswith("backbone.")]
    assert trunk and all(found[0][k] for k in trunk) and not any(found[1][k] for k in trunk)
    assert not found[0]["fc.weight"]


def test_two_ranks_equal_one_process(fabric, ranks, tmp_path):
    """Ma19 has no batch norm: every pair of the batch counts, those between images of two ranks as well."""
    args = ["method=ma19", "train.epochs=1", "train.batch_size=16", "fabric.accelerator=cpu"]
    done = ranks(PAPER / "train.py", [*SMALL, "arm=test", *args, f"hydra.run.dir={tmp_path / 'two'}"])
    assert done.returncode == 0, done.stderr
    assert "2 devices x 1 micro-steps x 8" in done.stdout and result(tmp_path / "two")["status"] == "finished"
    train.fit(train_config(*args), fabric, tmp_path / "one")
    # Adam divides by the size of a gradient, also where that is rounding noise: weights drift apart, the loss does not.
    logged = [json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[0]) for n in ("one", "two")]
    assert logged[0]["likelihood"] == pytest.approx(logged[1]["likelihood"], rel=1e-2)


def test_ma19_learns_to_rank_as_its_annotators_do(fabric):
    learner = train.Learner(build_network("ma19", width=4), fabric)
    learner.network.distribution = lambda x: (x, torch.ones(4))  # type: ignore[method-assign]
    values, one = torch.arange(4.0), torch.ones(4)
    targets = (values, one, values[:, None].expand(4, len(ANNOTATORS)), torch.zeros(4, dtype=torch.long))
    agrees, differs = (float(learner(x, *targets)["likelihood"].detach()) for x in (values, -values))
    assert agrees < differs, "larger is better, in the annotators' values as in the network's"


@pytest.mark.parametrize("name", ["ma19"])
def test_gradients_of_two_ranks_average_to_those_of_one_process(name, fabric, monkeypatch):
    """Pairs between images of two ranks count: each rank sees the other's values without a gradient, and its own doubled."""
    torch.manual_seed(0)
    network = build_network(name, **options_of(train_config(f"method={name}"), name)["model"])
    learner = train.Learner(network, fabric)
    x, mos, fr = torch.rand(8, 3, 48, 48), torch.rand(8), torch.rand(8, len(ANNOTATORS))
    targets = (mos, torch.ones(8), fr, torch.zeros(8, dtype=torch.long))

    def gradient(images):
        learner.zero_grad()
        sum(learner(images, *targets).values()).backward()
        return torch.cat([p.grad.flatten() for p in learner.parameters()]).clone()

    whole, learner.world = gradient(x), 2
    parts = []
    for rank in range(2):
        learner.rank, own = rank, slice(4 * rank, 4 * rank + 4)
        with torch.no_grad():
            values = iter(network.distribution(x))

        def gathered(parts, _own, values=values):
            for part, value in zip(parts, next(values).chunk(2), strict=True):
                part.copy_(value)

        monkeypatch.setattr(torch.distributed, "all_gather", gathered)
        parts.append(gradient(x[own]))
    torch.testing.assert_close((parts[0] + parts[1]) / 2, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


def test_a_killed_training_goes_on_from_inside_its_folder(started, tmp_path, monkeypatch, capsys):
    args = [*SMALL, "method=unique", "networks.unique.epochs=10", f"hydra.run.dir={tmp_path / 'run'}"]
    begun = process(PAPER / "train.py", args, tmp_path)
    checkpoint, deadline = None, time.monotonic() + 120
    while checkpoint is None and time.monotonic() < deadline:
        time.sleep(0.02)
        checkpoint = next(tmp_path.rglob("last.ckpt"), None)
    begun.kill()
    begun.join()
    assert checkpoint is not None, "no checkpoint within two minutes"
    reached = runs.load_checkpoint(checkpoint)["epoch"]
    monkeypatch.chdir(PAPER)
    assert started(PAPER / "train.py", args) == 0 and f"epochs {reached + 1}..10" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "error", "kind"),
    [
        (["+networks.ma19.model.widht=3"], "widht", TypeError),
        (["+statistics.brisque.cc=3", "method=brisque"], "cc", TypeError),
        (["networks.unique.batch_size=0", "method=unique"], "batch_size=0", ValueError),
        (["method.models=[brisk]"], r"names \['brisk'\], allowed: brisque", ValueError),
        (["+data.crop=3"], "crop", TypeError),
        (["networks.unique.batch_size=4096", "method=unique"], "fewer than train.batch_size=4096", ValueError),
    ],
)
def test_training_errors_name_the_key(overrides, error, kind, fabric, tmp_path):
    with pytest.raises(kind, match=error):
        train.fit(train_config(*overrides), fabric, tmp_path / "run")


def test_a_misspelt_arm_lists_the_choices():
    with pytest.raises(MissingConfigException, match=r"(?s)brisk.*brisque"):
        train_config("method=brisk")
    with pytest.raises(MissingConfigException, match=r"(?s)psnr.*chebyshev"):
        config("attack", "fr=psnr")


def test_ma19_needs_originals_and_nan_stops_the_run(fabric, tmp_path):
    from iqa_attack.tests.test_data import write_layout

    write_layout("kadid", tmp_path / "kadid")
    with pytest.raises(ValueError, match="ma19 learns from full-reference annotators"):
        train.fit(
            config(
                "config", "arm=t", "data=sets", f"data.root={tmp_path / 'kadid'}", "data.test_share=0.5", "method=ma19"
            ),
            fabric,
            tmp_path / "a",
        )
    with pytest.raises(FloatingPointError, match=r"not finite at step \d+"):
        train.fit(train_config("method=ma19", "networks.ma19.lr=1e18"), fabric, tmp_path / "b")
    assert result(tmp_path / "b")["status"] == "failed"


def test_preflight_writes_nothing(fabric, tmp_path, capsys):
    train.fit(train_config("preflight=true", "method=all"), fabric, tmp_path / "run")
    out = capsys.readouterr().out
    assert (
        "unique:" in out
        and out.count("preflight: data found") == 2
        and "training images for cornia" in out
        and not (tmp_path / "run").exists()
    )


# -------------------------------------------------------------------------------------------------------------- attack.py
@pytest.fixture(scope="module")
def attacked(fabric, trained_root):
    """BRISQUE under Chebyshev and SSIM, with candidates saved; its folder."""
    for fr, more in (("chebyshev", ["save_candidates=true", "strengths=[1,3]"]), ("ssim", ["strengths=[100,10000]"])):
        out = trained_root / f"default/brisque_{fr}_perceptual/seed0"
        attack.fit(attack_config(f"run_root={trained_root}", f"fr={fr}", *more), fabric, out)
    return trained_root / "default/brisque_chebyshev_perceptual/seed0"


def test_an_attack_leaves_images_pictures_scores(attacked):
    rows = list(csv.DictReader((attacked / "counterexamples.csv").open()))
    assert len(rows) == 4 and {"image", "mos", "distance", "visibility", "before_unique", "after_cornia"} <= set(
        rows[0]
    )
    for row in rows:
        x = read_image(attacked / f"counterexamples/{row['image']}.png")
        x0 = read_image(attacked / f"candidates/{row['image']}/original.png")
        assert float((x - x0).abs().max()) == pytest.approx(float(row["distance"]), abs=1e-6) and float(
            row["max_change"]
        ) in (1.0, 3.0)
        chosen = read_image(attacked / f"candidates/{row['image']}/{row['candidate']}.png")
        assert torch.equal(x, chosen)
    assert len(list((attacked / "pictures").glob("*.png"))) == 1
    metrics = result(attacked)["metrics"]
    assert metrics["r_intra"] == metrics["r_brisque"] and metrics["success"] == 1 and metrics["visibility"] <= 0.778
    assert {"srcc_clean_cornia", "srcc24_ma19", "r_transfer", "plcc12_unique"} <= metrics.keys()


def test_scores_after_are_those_of_the_saved_file(attacked, trained_root):
    from iqa_attack.checkpoint import load

    model = load(trained_root / "default/all/seed0/last.ckpt").model["brisque"]
    for row in csv.DictReader((attacked / "counterexamples.csv").open()):
        with torch.no_grad():
            s = float(model(read_image(attacked / f"counterexamples/{row['image']}.png")[None]))
        assert s == pytest.approx(float(row["after_brisque"]), abs=1e-3)


def test_a_control_has_the_distances_of_its_attack(attacked, trained_root, fabric, tmp_path):
    for fr in ("chebyshev", "ssim"):
        attack.fit(
            attack_config(f"run_root={trained_root}", f"fr={fr}", "attack=random"),
            fabric,
            trained_root / f"default/brisque_{fr}_random/seed0",
        )
        rows = runs.load_checkpoint(trained_root / f"default/brisque_{fr}_random/seed0/last.ckpt")["rows"]
        wanted = {
            r["image"]: r["distance"]
            for r in runs.load_checkpoint(trained_root / f"default/brisque_{fr}_perceptual/seed0/last.ckpt")["rows"]
        }
        assert len(rows) == 16 and {r["draw"] for r in rows} == {0, 1, 2, 3}
        for r in rows:
            assert r["distance"] == pytest.approx(wanted[r["image"]], rel=1e-3 if fr == "chebyshev" else 0.3)
        assert len({r["after_brisque"] for r in rows}) > 8
    cells = {}
    for kind in ("perceptual", "random"):
        cfg = config("tables", f"run_root={trained_root}", "attacked=[brisque]", f"made_by={kind}")
        cells[kind] = read_cells(cfg)
        write_tables(cells[kind], tmp_path, kind)
    assert (tmp_path / "transfer_ssim.png").stat().st_size > 1000 and len(
        (tmp_path / "table.csv").read_text().splitlines()
    ) == 9
    a, b = (summarise(cells[k]) for k in ("perceptual", "random"))
    assert a["change_diagonal"] > b["change_diagonal"] and "r_gap" in a
    with pytest.raises(
        FileNotFoundError, match="run `python attack.py nr=cornia fr=chebyshev attack=perceptual` first"
    ):
        read_cells(config("tables", f"run_root={trained_root}"))
    with pytest.raises(FileNotFoundError, match="the control takes its distances, run"):
        attack.fit(attack_config(f"run_root={trained_root}", "nr=cornia", "attack=random"), fabric, tmp_path / "x")


def test_a_control_finds_the_attack_with_the_same_overrides(tmp_path):
    attacks, own = tmp_path / "default/brisque_chebyshev_perceptual", tmp_path / "default/brisque_chebyshev_random"
    for name in ("seed0", "recipe.steps-5/seed0"):
        (attacks / name).mkdir(parents=True)
        (attacks / name / "last.ckpt").touch()
    cfg = config("attack", "arm=brisque_chebyshev_random", "fr_name=chebyshev", f"run_root={tmp_path}", "attack=random")
    assert attack_of(cfg, own / "recipe.steps-5+random.draws-2/seed0") == attacks / "recipe.steps-5/seed0"
    assert attack_of(cfg, own / "seed0") == attacks / "seed0"
    with pytest.raises(FileNotFoundError, match="with the same overrides first"):
        attack_of(cfg, own / "recipe.steps-6/seed0")


@pytest.mark.usefixtures("unpainted")
def test_an_interrupted_attack_equals_an_uninterrupted_one(trained_root, fabric, tmp_path, monkeypatch):
    cfg = attack_config(f"run_root={trained_root}", "images_per_batch=1", "strengths=[2]")
    attack.fit(cfg, fabric, tmp_path / "whole")
    save, count = runs.Run.save_checkpoint, []

    def killed(self, state, name="last.ckpt"):
        save(self, state, name)
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        attack.fit(cfg, fabric, tmp_path / "parts")
    monkeypatch.setattr(runs.Run, "save_checkpoint", save)
    attack.fit(cfg, fabric, tmp_path / "parts")
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "parts/metrics.jsonl").read_text()
    assert result(tmp_path / "whole")["metrics"] == result(tmp_path / "parts")["metrics"]


@pytest.mark.usefixtures("unpainted")
@pytest.mark.parametrize("arm", ["random_jnd", "enhance", "both", "fgsm", "threshold", "spsa", "square"])
def test_every_arm_of_the_attack_runs(arm, trained_root, fabric, tmp_path):
    few = ["strengths=[0]"] if arm == "enhance" else ["strengths=[2]"]
    more = ["spsa.samples=2"] if arm == "spsa" else []
    fr = "ssim" if arm == "enhance" else "chebyshev"
    attack.fit(attack_config(f"run_root={trained_root}", f"fr={fr}", f"attack={arm}", *few, *more), fabric, tmp_path)
    metrics = result(tmp_path)["metrics"]
    assert np.isfinite(list(metrics.values())).all() and metrics["max_change"] > 0
    if arm == "enhance":
        rows = runs.load_checkpoint(tmp_path / "last.ckpt")["rows"]
        assert metrics["share_up"] == 1 and all(r["after_brisque"] > r["before_brisque"] for r in rows)


def test_bisection_and_presets_run(trained_root, fabric, tmp_path):
    options = ["fr=ssim", "strengths=[1000]", "nr=unique", "calibration_floor=-1"]
    attack.fit(
        attack_config(f"run_root={trained_root}", *options, "bisect=2", "preset=paper", "pictures=0"),
        fabric,
        tmp_path / "a",
    )
    rows = runs.load_checkpoint(tmp_path / "a/last.ckpt")["rows"]
    assert {r["candidates"] for r in rows} == {3}
    with pytest.raises(ValueError, match="bisect: projected candidates"):
        attack.fit(attack_config(f"run_root={trained_root}", "bisect=2", "strengths=[2]"), fabric, tmp_path / "b")


@pytest.mark.usefixtures("unpainted")
def test_a_persons_own_folder(trained_root, fabric, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for i, shape in enumerate(((51, 64, 3), (48, 48, 3))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(photos / f"{i}.png")
    cfg = config(
        "attack",
        "arm=t",
        "fr_name=chebyshev",
        f"run_root={trained_root}",
        "data=folder",
        f"data.root={photos}",
        "recipe.steps=2",
        "strengths=[2]",
    )
    attack.fit(cfg, fabric, tmp_path / "run")
    assert len(list((tmp_path / "run/pictures").glob("*.png"))) == 2
    metrics = result(tmp_path / "run")["metrics"]
    assert "r_brisque" in metrics and "srcc24_brisque" not in metrics
    for name, image, error in (
        ("flat", np.full((64, 64, 3), 9, dtype=np.uint8), "flat.png is constant"),
        ("tiny", rng.integers(0, 256, (20, 40, 3), dtype=np.uint8), "tiny.png has 40 x 20 pixels, brisque needs 32"),
    ):
        bad = tmp_path / name
        bad.mkdir()
        Image.fromarray(image).save(bad / f"{name}.png")
        with pytest.raises(ValueError, match=error):
            attack.fit(
                config(
                    "attack",
                    "arm=t",
                    "fr_name=chebyshev",
                    f"run_root={trained_root}",
                    "data=folder",
                    f"data.root={bad}",
                ),
                fabric,
                tmp_path / "no",
            )
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("overrides", "error", "kind"),
    [
        (["nr=musiq"], "nr='musiq', allowed here: brisque, cornia, ma19, unique", ValueError),
        (["fr=lpips", "strengths=[1]"], "need the ImageNet weights of VGG-16", ValueError),
        (["procedure=pgd"], "procedure='pgd'", ValueError),
        (["preset=best"], "preset='best'", ValueError),
        (["strengths=[-1]"], "numbers >= 0", ValueError),
        (["seed=7"], "run `python train.py method=all seed=7` first", FileNotFoundError),
        (["+recipe.step=3"], "recipe has no key step", ValueError),
        (["pyiqa=[musiq]"], "needs the package pyiqa", ValueError),
    ],
)
def test_attack_errors_name_the_key(overrides, error, kind, trained_root, fabric, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(kind, match=error):
        attack.fit(attack_config(f"run_root={trained_root}", *overrides), fabric, tmp_path / "run")


def test_a_model_without_gradient_stops_the_attack(trained_root, fabric, tmp_path, monkeypatch):
    from iqa_attack.quality_models.calibration import Calibration, Scored
    from iqa_attack.quality_models.models import CallableMetric, Models

    blind = {
        "blind": Scored(
            CallableMetric(lambda x: (x * 255).round().mean((1, 2, 3)), higher_is_better=True),
            Calibration(100.0, 50.0, 1.0, 0, "given"),
        )
    }
    monkeypatch.setattr(attack, "load_models", lambda cfg: Models(blind))
    with pytest.raises(ValueError, match="gradient of blind is zero.*not robustness"):
        attack.fit(attack_config("nr=blind", "strengths=[2]"), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    attack.fit(attack_config("nr=blind", "attack=square", "strengths=[4]"), fabric, tmp_path / "run")
    assert result(tmp_path / "run")["metrics"]["change_intra"] > 0


def test_evaluate_a_checkpoint_a_set_and_a_folder(trained_root, brisque, fabric, tmp_path):
    from iqa_attack.tests.test_data import save

    def evaluated(*overrides):
        return evaluate.evaluate(config("evaluate", f"out={tmp_path / 'scores.csv'}", *overrides), fabric)

    weights = trained_root / "default/all/seed0/last.ckpt"
    metrics = evaluated(f"weights={weights}", "record=true", f"record_to={tmp_path / 'rec'}")
    trained = result(weights.parent)["metrics"]
    for name in ("brisque", "unique"):
        assert metrics[f"srcc_{name}"] == pytest.approx(trained[f"srcc_test_{name}"], abs=1e-9)
        assert metrics[f"rmse_{name}"] == pytest.approx(trained[f"rmse_test_{name}"], abs=1e-6), (
            "the logistic of training"
        )
    record = json.loads(next((tmp_path / "rec").glob("*.json")).read_text())
    assert len(record["weights_sha256"]) == 64 and record["n"] > 0
    rng = np.random.default_rng(1)
    for i in range(4):
        save(tmp_path / f"set/{i}.png", (64, 48))
    with (tmp_path / "set/labels.csv").open("w") as f:
        f.write("path,mos\n" + "".join(f"{i}.png,{rng.random()}\n" for i in range(4)))
    b, folder = tmp_path / "svr.npz", f"data.root={tmp_path / 'set'}"
    np.savez(
        b, support_vectors=brisque.vectors, alpha=brisque.coefficients, rho=brisque.rho, gamma=brisque.gamma,
        feature_range=np.stack([brisque.low, brisque.high]),
    )  # fmt: skip
    one = [f"weights={b}", "kind=brisque", "higher_is_better=true"]
    assert -1 <= evaluated(*one, folder, "refit=true")["srcc_brisque"] <= 1
    with pytest.raises(ValueError, match=r"SRCC -0\.\d+ on 140 images.*its sign is wrong: higher_is_better"):
        evaluated(*one[:2], folder)
    (tmp_path / "set/labels.csv").unlink()
    assert evaluated(*one, folder) == {}
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert len(rows) == 4 and rows[0]["mos"] == "nan" and rows[0]["raw_brisque"] != rows[0]["brisque"]
    with pytest.raises(ValueError, match="data.root is not set"):
        evaluated(*one)


# ---------------------------------------------------------------------------------------------------------------- the study
def test_the_study_serves_collects_and_selects(attacked, trained_root, fabric, tmp_path):
    answers = tmp_path / "answers.csv"
    study = session.Study(attacked, subject="anna", file=answers, training=2)
    assert len(study.trials) == 8
    other = session.Study(attacked, subject="ben", file=answers)
    assert other.trials != study.trials and sorted(map(str, other.trials)) == sorted(map(str, study.trials))
    server = session.serve(study, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    try:
        page = urllib.request.urlopen(base + "/").read().decode()
        assert "same or different" in page and "/answer" in page
        plan = json.loads(urllib.request.urlopen(base + "/study").read())
        first = plan["trials"][0]
        png = urllib.request.urlopen(f"{base}/candidates/{first['image']}/{first['candidate']}.png").read()
        assert png == (attacked / f"candidates/{first['image']}/{first['candidate']}.png").read_bytes()
        for path in ("/candidates/..%2F..%2Fresult/0.png", "/config.yaml", "/candidates/../0.png"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(base + path)
        for i, t in enumerate(plan["trials"]):
            body = json.dumps(
                {**t, "answer": "different" if t["candidate"] == "1" else "same", "order": i, "seconds": 0.5}
            )
            assert urllib.request.urlopen(base + "/answer", data=body.encode()).status == 204
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(base + "/answer", data=b'{"image": "none", "candidate": "0", "answer": "same"}')
    finally:
        server.shutdown()
        server.server_close()
    assert session.Study(attacked, subject="anna", file=answers).trials == [], "an answered study has nothing left"
    assert len(session.Study(attacked, subject="ben", file=answers).trials) == 8
    assert CsvObserver(file=answers).trials.total() == 8
    cfg = attack_config(
        f"run_root={trained_root}",
        f"reuse={attacked}",
        "observer.kind=csv",
        f"observer.csv.file={answers}",
        "strengths=[1,3]",
    )
    attack.fit(cfg, fabric, tmp_path / "judged")
    assert {r["candidate"] for r in runs.load_checkpoint(tmp_path / "judged/last.ckpt")["rows"]} == {0}
    with pytest.raises(FileNotFoundError, match="save_candidates=true first"):
        session.Study(trained_root / "default/brisque_ssim_perceptual/seed0", subject="anna", file=answers)
    with pytest.raises(ValueError, match="subject='a b'"):
        session.Study(attacked, subject="a b", file=answers)


def test_configs_of_all_entries_parse():
    for file in CONFIGS.glob("*.yaml"):
        assert file.read_text().startswith("#") and yaml.safe_load(file.read_text()), file
