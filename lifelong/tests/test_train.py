"""The script as people run it: every arm, resume in the middle of the stream, errors, the other entries."""

import json
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from PIL import Image

from common import runs
from common.metrics.claims import load_claims
from common.scripts import arm_name
from common.testing import process
from lifelong import evaluate as evaluation
from lifelong import export, picture, predict
from lifelong.build import build
from lifelong.checkpoint import load, load_learner, test_stream
from lifelong.learner import Learner
from lifelong.model import build_model
from lifelong.train import fit

pytestmark = pytest.mark.usefixtures("unpainted")  # the run that is killed is a process of its own, and paints
PAPER = Path(__file__).resolve().parents[1]
CONFIGS = PAPER / "configs"
ARMS = sorted(p.stem for p in (CONFIGS / "method").glob("*.yaml"))
SHORT = ["train.epochs=2", "train.save_every=1", "model.hidden=16", "data.train_images=300", "data.test_images=160"]
FAST = [*SHORT, "optim.lr=0.1"]


def config(*overrides):
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        return compose("config", overrides=[*FAST, "arm=test", *overrides])


@pytest.fixture(scope="module")
def fabric():
    return runs.launch({"accelerator": "cpu", "devices": 1})


@pytest.mark.parametrize("method", ARMS)
def test_every_arm_trains_and_reports(method, fabric, tmp_path):
    fit(config(f"method={method}", "data.tasks=2"), fabric, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "finished"
    for name in ("class_il", "continuum", "task_il"):
        assert 0 <= result["metrics"][f"{name}_acc"] <= 100
        assert {f"{name}_{k}" for k in ("aia", "bwt", "forgetting", "learning", "overall")} <= result["metrics"].keys()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["task"], r.get("epoch")) for r in rows] == [(0, 1), (0, 2), (0, None), (1, 3), (1, 4), (1, None)]
    assert (tmp_path / "matrix.png").exists() and len((tmp_path / "matrix.csv").read_text().splitlines()) == 7


def test_arms_of_claims_exist():
    for claim in load_claims(PAPER):
        assert {arm.partition("/")[0] for arm in claim["arms"]} <= {*ARMS, "counts"}, claim["id"]


def arms_of(sweep):
    """The arms of a sweep as their directories are called: <method>, or <method>/<the other keys of the sweep>."""
    params = {k: str(v).split(",") for k, v in OmegaConf.load(sweep).hydra.sweeper.params.items() if k != "seed"}
    methods = params.pop("method")
    others = [
        ",".join(sorted(f"{k}={v}" for k, v in zip(sorted(params), vs, strict=True)))
        for vs in product(*map(params.get, sorted(params)))
    ]
    return {arm_name(f"{m}/{o}" if o else m) for m in methods for o in others}


@pytest.mark.parametrize("scale", sorted(p.name for p in (CONFIGS / "reproduce").iterdir()))
def test_the_sweeps_of_a_scale_hold_the_arms_of_its_claims(scale):
    claimed = {a for c in load_claims(PAPER) if scale in c["scale"] for a in c["arms"]} - {"counts"}
    assert claimed, "a scale that no claim is tested at"
    trained = set().union(*(arms_of(sweep) for sweep in (CONFIGS / "reproduce" / scale).glob("*_train_*.yaml")))
    assert claimed <= trained
    assert {arm.partition("/")[0] for arm in trained} <= set(ARMS)


@pytest.mark.parametrize("epoch", [(1, 3), (2, None)], ids=["inside task 1", "after task 2"])
def test_resumed_equals_uninterrupted_bit_for_bit(epoch, fabric, tmp_path, monkeypatch):
    cfg = config("method=ari", "optim.momentum=0.5")
    fit(cfg, fabric, tmp_path / "whole")
    log = runs.Run.log

    def killed(self, **row):
        log(self, **row)
        if (row["task"], row.get("epoch")) == epoch:
            raise KeyboardInterrupt  # before its checkpoint

    monkeypatch.setattr(runs.Run, "log", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(cfg, fabric, tmp_path / "parts")
    monkeypatch.setattr(runs.Run, "log", log)
    fit(cfg, fabric, tmp_path / "parts")
    whole, parts = (runs.load_checkpoint(tmp_path / n / "last.ckpt") for n in ("whole", "parts"))
    for key in ("model", "optimizer", "learner"):
        torch.testing.assert_close(parts[key], whole[key], rtol=0, atol=0)
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "parts/metrics.jsonl").read_text()
    results = [json.loads((tmp_path / n / "result.json").read_text())["metrics"] for n in ("whole", "parts")]
    assert results[0] == results[1]


def test_joint_resumes_with_its_past(fabric, tmp_path, monkeypatch):
    cfg = config("method=joint", "data.tasks=2")
    fit(cfg, fabric, tmp_path / "whole")
    log = runs.Run.log

    def killed(self, **row):
        log(self, **row)
        if (row["task"], row.get("epoch")) == (1, 4):
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, "log", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(cfg, fabric, tmp_path / "parts")
    monkeypatch.setattr(runs.Run, "log", log)
    fit(cfg, fabric, tmp_path / "parts")
    whole, parts = (runs.load_checkpoint(tmp_path / n / "last.ckpt")["model"] for n in ("whole", "parts"))
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


def test_unequal_tasks_and_a_growing_head(fabric, tmp_path):
    fit(config("data.tasks=[12,3,5]", "model.growing=true"), fabric, tmp_path)
    state = runs.load_checkpoint(tmp_path / "last.ckpt")
    assert state["learner"]["sizes"] == [12, 3, 5] and state["model"]["head.weight"].shape[0] == 20
    learner, saved = load_learner(tmp_path / "last.ckpt")
    assert learner.groups == test_stream(saved, {}).groups


def test_a_killed_run_goes_on_from_inside_its_folder(started, tmp_path, monkeypatch, capsys):
    args = [*FAST, "method=er", "train.epochs=60", f"run_root={tmp_path}"]
    begun = process(PAPER / "train.py", args, tmp_path)
    checkpoint = None
    for _ in range(4000):
        time.sleep(0.05)
        if checkpoint := next(tmp_path.rglob("last.ckpt"), None):
            break
    begun.kill()
    begun.join()
    assert checkpoint is not None, "no checkpoint within a minute"
    state = runs.load_checkpoint(checkpoint)
    monkeypatch.chdir(PAPER)
    assert started(PAPER / "train.py", args) == 0
    assert f"from task {state['task']} epoch {state['epoch'] + 1} of" in capsys.readouterr().out


def composed(verb, *overrides):
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        return compose(verb, overrides=list(overrides))


@pytest.fixture(scope="module")
def trained(fabric, tmp_path_factory):
    """The run directory of a short ARI on four tasks, of another seed than the default."""
    out = tmp_path_factory.mktemp("trained")
    fit(config("seed=1"), fabric, out)
    return out


def test_a_checkpoint_says_what_its_network_needs(trained):
    model, cfg, about = load(trained / "last.ckpt")
    assert not model.training and cfg["arm"] == "test" and len(about["classes"]) == 20
    assert {k: about[k] for k in ("tasks", "channels", "size", "stored")} == {
        "tasks": [5] * 4, "channels": 1, "size": 8, "stored": 8
    }  # fmt: skip
    assert about["normalise"] == {"mean": [0.0], "std": [1.0]}


def test_evaluate_agrees_with_training(trained, fabric, tmp_path, capsys):
    metrics = json.loads((trained / "result.json").read_text())["metrics"]
    cfg = composed("evaluate", f"weights={trained / 'last.ckpt'}", f"figure={tmp_path / 'again.png'}")
    means = evaluation.run(cfg, fabric)
    for name in ("class_il", "continuum", "task_il"):
        assert means[name] == pytest.approx(metrics[f"{name}_acc"])
    text = capsys.readouterr().out
    assert f"forgetting {metrics['class_il_forgetting']:.2f}" in text and (tmp_path / "again.png").exists()
    assert f"forgetting {metrics['continuum_forgetting']:.2f}" in text and "p = 20, memory 100" in text


@pytest.mark.parametrize("override", ["p=1", "adapt=false"])
def test_a_matrix_has_one_p(override, trained, fabric, capsys):
    """Rows before the last are known as trained only: another p would mix two protocols in one matrix."""
    evaluation.run(composed("evaluate", f"weights={trained / 'last.ckpt'}", override), fabric)
    text = capsys.readouterr().out
    assert "class_il (p = " in text and "task_il (p = " in text and "continuum (p = " not in text
    assert "a matrix has one p" in text


def test_evaluate_needs_no_training_images(trained, fabric, monkeypatch):
    asked = []
    original = evaluation.test_stream

    def watched(saved, data):
        stream = original(saved, data)
        asked.append(set(stream.targets))
        return stream

    monkeypatch.setattr(evaluation, "test_stream", watched)
    evaluation.run(composed("evaluate", f"weights={trained / 'last.ckpt'}"), fabric)
    assert asked == [{"test"}]


def test_other_lengths_of_the_continuum_are_measured_beside_it(fabric, tmp_path):
    fit(config("data.tasks=2", "evaluate.more_p=[1]"), fabric, tmp_path)
    metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
    cfg = composed("evaluate", f"weights={tmp_path / 'last.ckpt'}", "p=1")
    assert metrics["continuum_p1_acc"] == pytest.approx(evaluation.run(cfg, fabric)["continuum"])
    assert metrics["continuum_p1_acc"] != metrics["continuum_acc"]


def test_exported_networks_compute_the_same(trained, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    from common.onnx_export import read_about

    weights = f"weights={trained / 'last.ckpt'}"
    learner, saved = load_learner(trained / "last.ckpt")
    x = learner.prepare(test_stream(saved, {}).task("test", 0)[0][:5])
    for task, model, group in (("null", learner.model, slice(0, 20)), ("2", learner.adapted(2), learner.groups[2])):
        file = export.export(composed("export", weights, f"out={tmp_path / f'{task}.onnx'}", f"task={task}"))
        (out,) = ort.InferenceSession(str(file)).run(None, {"images": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(out), model.eval()(x)[:, group], rtol=1e-4, atol=1e-4)
        assert read_about(file)["classes"] == saved["about"]["classes"][group]
    with pytest.raises(ValueError, match="task=4, allowed: 0..3"):
        export.export(composed("export", weights, "task=4"))


def named(out):
    return [line.rsplit(",", 2)[1:] for line in out.read_text().splitlines()[1:]]


def test_predict_names_files_as_the_learner_does(trained, fabric, tmp_path):
    learner, saved = load_learner(trained / "last.ckpt")
    images = (test_stream(saved, {}).task("test", 1)[0][:7] * 255).byte()
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    classes, base = (
        saved["about"]["classes"],
        [f"weights={trained / 'last.ckpt'}", f"images={tmp_path}", "batch_size=3"],
    )
    for mode, more in (("class_il", []), ("task_il", ["task=1"]), ("continuum", [])):
        out = predict.predict(composed("predict", *base, f"mode={mode}", f"out={tmp_path / mode}.csv", *more), fabric)
        expected = learner.predict(images, mode, p=7, task=1)
        assert [label for label, _ in named(out)] == [classes[c] for c in expected.tolist()], mode
    out = predict.predict(composed("predict", *base, "top=20", f"out={tmp_path / 'top.csv'}"), fabric)
    rows = named(out)
    scores = learner.run(learner.scores, images)
    assert len(rows) == 140 and {label for label, _ in rows[:20]} == set(classes)
    assert float(rows[0][1]) == pytest.approx(float(scores[0].max()), rel=1e-4)


def test_a_broken_file_is_listed_and_the_others_are_named(trained, fabric, tmp_path, capsys):
    Image.new("L", (30, 20), 200).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    cfg = composed("predict", f"weights={trained / 'last.ckpt'}", f"images={tmp_path}", f"out={tmp_path / 'p.csv'}")
    with pytest.raises(SystemExit):
        predict.predict(cfg, fabric)
    assert "bad.png" in capsys.readouterr().err and len(named(tmp_path / "p.csv")) == 1


def test_predict_normalises_as_training_did(fabric, tmp_path):
    fit(config("prepare.mean=[0.3]", "prepare.std=[0.2]", "data.tasks=1"), fabric, tmp_path)
    learner, saved = load_learner(tmp_path / "last.ckpt")
    assert saved["about"]["normalise"] == {"mean": [0.3], "std": [0.2]}, "what an exported file will say"
    image = (test_stream(saved, {}).task("test", 0)[0][:1] * 255).byte()
    Image.fromarray(image[0, 0].numpy()).save(tmp_path / "digit.png")
    cfg = composed(
        "predict", f"weights={tmp_path / 'last.ckpt'}", f"images={tmp_path / 'digit.png'}", f"out={tmp_path / 'p.csv'}"
    )
    with torch.no_grad():
        logits = learner.model.eval()((image.float() / 255 - 0.3) / 0.2)
    assert float(named(predict.predict(cfg, fabric))[0][1]) == pytest.approx(float(logits.max()), rel=1e-4)


def test_a_foreign_checkpoint_is_refused(tmp_path):
    torch.save({"model": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of lifelong"):
        load(tmp_path / "other.ckpt")


@pytest.mark.parametrize("arm", ["lwf", "icarl", "ewc", "derpp", "ari"])
def test_every_kind_of_learner_is_loaded_as_it_was(arm, fabric, tmp_path):
    fit(config(f"method={arm}", "data.tasks=2", "model.growing=true"), fabric, tmp_path)
    learner, saved = load_learner(tmp_path / "last.ckpt")
    assert type(learner).__name__.lower() in {"lwf", "icarl", "ewc", "reservoirreplay", "metalearner"}
    metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
    cfg = composed("evaluate", f"weights={tmp_path / 'last.ckpt'}")
    assert evaluation.run(cfg, fabric)["class_il"] == pytest.approx(metrics["class_il_acc"])


# -------------------------------------------------------------------------------------------------------------- errors
def test_a_misspelt_arm_lists_the_choices():
    with pytest.raises(MissingConfigException, match=r"(?s)arii.*ari_fusion"):
        config("method=arii")


@pytest.mark.parametrize(
    "key", ["method.meta.beata", "data.taskss", "model.hiden", "schedule.knd", "optim.lrr", "memory.size"]
)
def test_a_misspelt_key_fails_with_its_name(key, fabric, tmp_path):
    with pytest.raises(TypeError, match=key.rpartition(".")[2]):
        fit(config(f"+{key}=1"), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["method.meta.attack=sky"], r"attack='sky', allowed: background"),
        (["method.meta.eps=-1"], r"eps=-1"),
        (["memory.budget=19"], r"budget=19 is smaller than the 20 classes"),
        (["memory.policy=best"], r"'best', allowed: first"),
        (["train.last_batch=pad"], r"last_batch='pad', allowed: merge"),
        (["method.meta.loss=all"], r"loss='all', allowed: group, seen"),
        (["evaluate.more_p=[0]"], r"more_p=\[0\]"),
        (["data.root=/tmp"], r"digits20 is embedded"),
        (["data.tasks=3"], r"data\.tasks=3 does not divide 20"),
        (["data.tasks=[10,9]"], r"add up to 20"),
        (["evaluate.p=0"], r"evaluate\.p=0"),
        (["schedule.kind=poly"], r"'poly', allowed"),
        (["model.name=vgg"], r"'vgg', allowed"),
        (["train.batch_size=1"], r"batch_size=1"),
        (["data.rho=2", "data.name=digits10", "data.tasks=2"], "rho"),
    ],
)
def test_a_wrong_value_names_what_is_allowed_and_writes_nothing(overrides, error, fabric, tmp_path):
    overrides = [("+" if o.startswith("data.rho") else "") + o for o in overrides]
    with pytest.raises(ValueError, match=error):
        fit(config(*overrides), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_half_precision_with_a_scaler_is_refused(fabric, tmp_path):
    other = runs.launch({"accelerator": "cpu", "devices": 1, "precision": "bf16-mixed"})
    fit(config("data.tasks=2", "method=er"), other, tmp_path / "bf16")
    other._precision.precision = "16-mixed"
    with pytest.raises(ValueError, match="allowed: 32-true, bf16-mixed"):
        fit(config(), other, tmp_path / "fp16")


def test_nan_loss_stops_the_run_and_names_the_term(fabric, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d+: .*(ce|clean)=(nan|inf)"):
        fit(config("method=er", "optim.lr=1e20", "train.epochs=20"), fabric, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "failed"


def test_preflight_writes_nothing(fabric, tmp_path, capsys):
    fit(config("preflight=true"), fabric, tmp_path / "runs")
    assert "preflight: data found" in capsys.readouterr().out and not (tmp_path / "runs").exists()


def test_missing_data_says_where(refused, tmp_path):
    root = tmp_path / "nowhere"
    assert str(root) in refused(PAPER, "train", ["data=cifar100", "model=rps_net", f"data.root={root}"])


def test_every_config_composes_and_builds():
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        for experiment in sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml")):
            cfg = compose("config", overrides=[f"experiment={experiment}", "arm=test", "data.root=/x"])
            OmegaConf.to_container(cfg, resolve=True)
            with torch.device("meta"):
                options = {k: v for k, v in cfg.model.items() if k not in ("growing", "channels_last")}
                build_model(num_classes=100, size=cfg.prepare.size, **options)
        for data in sorted(p.stem for p in (CONFIGS / "data").glob("*.yaml")):
            compose("config", overrides=[f"data={data}", "arm=test", "data.root=/x"])
        for sweep in (CONFIGS / "reproduce").rglob("*.yaml"):
            name = sweep.stem.split("_")[1]
            cfg = compose(
                "counts" if name == "counts" else "config",
                overrides=[f"+reproduce/{sweep.parent.name}={sweep.stem}", "arm=test"], return_hydra_config=True,
            )  # fmt: skip
            assert cfg.scale == sweep.parent.name and cfg.hydra.sweeper.params


def test_every_arm_has_its_own_rate_and_a_command_line_wins():
    for method, rate in {"er": 0.3, "ari": 2.0, "itaml": 4.0}.items():
        assert composed("config", f"method={method}", f"arm={method}").optim.lr == rate
    assert composed("config", "method=er", "arm=er", "optim.lr=0.7").optim.lr == 0.7
    short = composed("config", "experiment=mnist_short", "method=itaml", "arm=itaml", "data.root=/x")
    assert short.optim.lr in (0.003, 0.01, 0.03), (
        "a recipe with another optimizer must not take the rates of the miniature"
    )


def test_the_curves_are_drawn_from_what_is_recorded():
    with Image.open(PAPER / "pictures/after_each_task.png") as drawn:
        assert drawn.info["Source"] == picture.sources(), "python picture.py draws them again"


def test_build_draws_the_same_weights_for_a_seed():
    from lifelong.streams import build_stream

    cfg = config()
    stream = build_stream(seed=0, **cfg.data)
    a, b, c = (
        build(OmegaConf.merge(cfg, {"seed": s}), stream.sizes, stream.channels).model.state_dict() for s in (0, 0, 1)
    )
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(a["head.weight"], c["head.weight"])


def test_channels_last_is_a_layout_and_no_other_network():
    x, labels = torch.rand(24, 1, 8, 8), torch.arange(24) % 2
    found = []
    for wanted in ("false", "true"):
        cfg = composed("config", "method=ari", "arm=ari", "train.epochs=1", f"model.channels_last={wanted}")
        learner = build(cfg, [2, 2], 1)
        learner.observe_task((x, labels))
        learner.load_state_dict(learner.state_dict())
        kernels = learner.model.attention.conv.weight, learner.adapted(0).attention.conv.weight
        assert [k.is_contiguous(memory_format=torch.channels_last) for k in kernels] == [wanted == "true"] * 2
        found.append(learner.run(learner.scores, x))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="model.channels_last=1, allowed: true, false"):
        build(composed("config", "method=ari", "arm=ari", "model.channels_last=1"), [2, 2], 1)
    assert composed("config", "experiment=mnist", "arm=ari", "data.root=/x").model.channels_last


def test_the_seed_decides_the_images_of_the_stream_and_the_batches(fabric, tmp_path, monkeypatch):
    found = []

    def begun(fabric, learner, data, **_):
        rows = torch.arange(200.0).view(-1, 1, 1, 1)
        found.append((data[0], next(learner.epoch(rows, torch.zeros(200).long(), 1))[0].flatten()))
        raise KeyboardInterrupt

    monkeypatch.setattr("lifelong.train.train_one_epoch", begun)
    for seed in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            fit(config(f"seed={seed}"), fabric, tmp_path / str(seed))
    (images, order), (others, another) = found
    assert images.shape != others.shape or not torch.equal(images, others)
    assert not torch.equal(order, another)


@pytest.mark.parametrize("adapt", [True, False])
def test_copies_are_adapted_where_asked_and_nowhere_else(adapt, fabric, tmp_path, monkeypatch):
    made, adapted = [], Learner.adapted
    monkeypatch.setattr(Learner, "adapted", lambda self, task: made.append(task) or adapted(self, task))
    fit(config("method=er", "data.tasks=2", "train.epochs=1", f"evaluate.adapt={adapt}"), fabric, tmp_path)
    assert bool(made) == adapt


def test_the_length_of_the_continuum_is_the_one_that_is_asked(fabric, tmp_path):
    found = {}
    for name, options in {"3": ["evaluate.p=3"], "20 and 3": ["evaluate.more_p=[3]"]}.items():
        fit(config("method=er", "data.tasks=2", "optim.lr=0.5", "train.epochs=6", *options), fabric, tmp_path / name)
        found[name] = json.loads((tmp_path / name / "result.json").read_text())["metrics"]
    assert found["3"]["continuum_acc"] == found["20 and 3"]["continuum_p3_acc"] != found["20 and 3"]["continuum_acc"]


def test_the_spurious_cue_reaches_the_training_and_the_swap_the_evaluation(fabric, tmp_path, monkeypatch):
    found = {}

    def begun(fabric, learner, data, **_):
        found[name] = [data[0]]
        return {}

    def asked(learner, sets, **_):
        found[name].append(sets[0][0])
        raise KeyboardInterrupt

    monkeypatch.setattr("lifelong.train.train_one_epoch", begun)
    monkeypatch.setattr("lifelong.train.evaluate", asked)
    for name, changed in {"spurious": [], "no cue": ["data.rho=0.0"], "no swap": ["data.swapped=false"]}.items():
        with pytest.raises(KeyboardInterrupt):
            fit(config("data=spurious", "method=er", *changed), fabric, tmp_path / name)
    (train, test), (uncued, same_test), (same_train, unswapped) = found.values()
    assert torch.equal(train, same_train) and torch.equal(test, same_test)
    assert not torch.equal(train, uncued) and not torch.equal(test, unswapped)
