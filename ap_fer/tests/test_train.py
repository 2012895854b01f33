"""The script as people run it: every arm, resume, two ranks, errors, and what it leaves behind."""

import json

import pytest
import torch
from hydra.errors import MissingConfigException

from ap_fer import stages, train
from ap_fer.build import build, build_optimizer
from ap_fer.stages import stem_place, stems_first
from ap_fer.tests.helpers import CONFIGS, SHORT, config, short_config, write_image
from ap_fer.train import evaluate, fit, start_and_fit
from common import runs

PAPER = CONFIGS.parent
ARMS = sorted(p.stem for p in (CONFIGS / "method").glob("*.yaml"))
STEM_MMACS = (24**2 * 16 * 3 * 9 + 8**2 * 32 * 16 * 25 + 8**2 * 64 * 32 * 9) / 1e6  # places x out x in x kernel
PATCHES = [
    "model.stem=patches",
    "model.dim=16",
    "model.depth=2",
    "model.start=1",
    "model.heads=2",
]  # no batch statistics


def read(path):
    return json.loads((path / "result.json").read_text())


@pytest.mark.parametrize("method", ARMS)
def test_every_arm_trains_and_reports(method, fabric, tmp_path):
    fit(short_config(f"method={method}", "data.train_images=64", "train.epochs=1", "model.dim=16"), fabric, tmp_path)
    result = read(tmp_path)
    m = result["metrics"]
    assert result["status"] == "finished" and 0 <= m["top1"] <= 100
    assert m["top1"] == pytest.approx((m["top1_clean"] + m["top1_occluded"]) / 2)
    if method in ("face_net", "stem", "cnn_only"):
        assert "kept_app" not in m and "vit_mmacs" not in m and m["mmacs"] == pytest.approx(STEM_MMACS)
        return
    assert m["mmacs"] == pytest.approx(m["vit_mmacs"] + (0 if method == "plain_vit" else STEM_MMACS))
    everything = method.startswith("atp") or method in ("none", "plain_vit", "app_train_only")
    assert m["kept_app"] == (64 if everything else 32) and ("drop_lift" in m) == (not everything)
    assert (m["kept_last"] < m["kept_app"]) == ("atp" in method or method == "random_both") == ("atp_lift" in m)
    assert (m["vit_mmacs"] < m["vit_mmacs_unpooled"]) == (m["kept_last"] < 64)


def test_loss_falls_and_equal_seeds_give_equal_numbers(fabric, tmp_path):
    overrides = ["method=app_atp", "train.epochs=25", "data.train_images=60", "optim.lr=0.005", "data.augment=none"]
    for name in ("a", "b"):
        fit(short_config(*overrides), fabric, tmp_path / name)
    rows = [json.loads(line)["loss"] for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert rows[-1] < 0.75 * rows[0]
    assert (tmp_path / "a/metrics.jsonl").read_text() == (tmp_path / "b/metrics.jsonl").read_text()
    assert read(tmp_path / "a")["metrics"] == read(tmp_path / "b")["metrics"]


@pytest.mark.parametrize("method", ["app_atp", "random_both"])  # random scores draw in training and in testing
def test_resumed_equals_uninterrupted_bit_for_bit(method, resumed):
    cfg = short_config(f"method={method}", "train.epochs=3", "train.eval_every=1", "data.train_images=64")
    whole, parts = resumed(fit, cfg)
    found = read(parts)["metrics"]
    rows = [json.loads(line)["top1"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    best = int(found["best_epoch"])
    assert found["top1_best_epoch"] == max(rows) == rows[best - 1] and found["top1"] == rows[-1]


def test_the_best_epoch_is_shown_beside_the_last_and_never_in_its_place(fabric, tmp_path, monkeypatch):
    scripted = iter([10.0, 30.0, 20.0, 20.0])  # after every epoch, and of the whole training
    monkeypatch.setattr(train, "evaluate", lambda *args, **options: ({"top1": next(scripted)}, None))
    cfg = short_config("train.epochs=3", "train.eval_every=1", "data.train_images=64", "model.dim=16")
    fit(cfg, fabric, tmp_path)
    found = read(tmp_path)["metrics"]
    assert (found["top1"], found["top1_best_epoch"], found["best_epoch"]) == (20, 30, 2)


def folders(root):
    """Seven classes of two training and one test image."""
    for split, n in (("train", 2), ("val", 1)):
        for c, name in enumerate(("anger", "disgust", "fear", "sadness", "happiness", "surprise", "neutral")):
            for i in range(n):
                write_image(root / split / name / f"{i}.png", 7 * i + c, size=(32, 32))
    return root


def folder_arm(root):
    return [
        "data=folder",
        f"data.root={root}",
        "data.workers=0",
        "data.size=48",
        "data.augment=flip",
        "train.batch_size=4",
        *PATCHES,
    ]


FOLDER = ["train.epochs=2", "train.save_every=1", "start.arm=null"]


def folder_config(root, *overrides):
    return config("config", "arm=test", *FOLDER, *folder_arm(root), *overrides)


def test_accumulation_equals_the_whole_batch_without_batch_statistics(fabric, tmp_path):
    root = folders(tmp_path / "data")
    fit(folder_config(root), fabric, tmp_path / "one")
    fit(folder_config(root, "train.accumulation=2"), fabric, tmp_path / "two")
    a, b = (runs.load_checkpoint(tmp_path / n / "last.ckpt")["model"] for n in ("one", "two"))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_two_ranks_equal_one_process_at_equal_global_batch(fabric, ranks, tmp_path):
    root = folders(tmp_path / "data")
    args = [*FOLDER, *folder_arm(root), "optim.name=sgd", "optim.lr=0.05", "fabric.accelerator=cpu"]
    fit(folder_config(root, *args), fabric, tmp_path / "one")
    two = ranks(PAPER / "train.py", [*args, f"hydra.run.dir={tmp_path / 'two'}"])
    assert two.returncode == 0, two.stderr
    assert "2 devices x 1 micro-steps x 2" in two.stdout
    a, b = (runs.load_checkpoint(tmp_path / n / "last.ckpt")["model"] for n in ("one", "two"))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    metrics = [read(tmp_path / n)["metrics"] for n in ("one", "two")]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-3)


@pytest.fixture
def tiny_stems(monkeypatch):
    """Stems of their own configuration, which here is a training of a second."""
    tiny = [*SHORT, "train.epochs=1", "data.train_images=70"]
    monkeypatch.setattr(
        stages, "_default", lambda cfg: config("config", f"method={cfg.start.arm}", f"arm={cfg.start.arm}", *tiny)
    )


def student(tmp_path, *overrides):
    return config("config", *SHORT, "train.epochs=1", "arm=test", f"run_root={tmp_path}", *overrides)


def test_an_arm_starts_from_the_stem_of_its_seed(fabric, tmp_path, tiny_stems):
    """The chain of two, each with its own configuration, whatever the student overrides; found again by every student."""
    cfg = student(tmp_path, "seed=3", "optim.lr=0.013", "data.occluded=0.1", "method=random")
    order = stems_first(cfg)
    assert [place for _, place in order] == [tmp_path / f"default/{arm}/seed3" for arm in ("face_net", "stem")]
    assert all(c.seed == 3 and c.model.depth == 0 and c.data.occluded == 0.5 and c.optim.lr != 0.013 for c, _ in order)
    assert [c.model.pool for c, _ in order] == ["flatten", "mean"] and order[1][0].start.arm == "face_net"
    for start, place in order:
        fit(start, fabric, place)
    assert stems_first(cfg) == [] == stems_first(student(tmp_path, "seed=3", "method=app", "train.batch_size=16"))
    trained = {
        k: v for k, v in runs.load_checkpoint(order[1][1] / "last.ckpt")["model"].items() if k.startswith("extractor.")
    }
    start = build(cfg, 7).state_dict()
    assert len(trained) > 10 and all(torch.equal(start[k], v) for k, v in trained.items())
    first = runs.load_checkpoint(order[0][1] / "last.ckpt")["model"]
    stem = build(order[1][0], 7).state_dict()
    assert all(torch.equal(stem[k], first[k]) for k in trained)
    torch.save({"model": {"extractor.x": torch.ones(1)}}, order[1][1] / "last.ckpt")
    with pytest.raises(ValueError, match="not this model's: give another run_root"):
        build(cfg, 7)


def test_another_network_or_size_has_stems_of_its_own(tmp_path, tiny_stems):
    usual, wide = stem_place(student(tmp_path)), stem_place(student(tmp_path, "model.widths=[8,8,8]"))
    assert (
        usual == tmp_path / "default/stem/seed0"
        and wide.parent.parent == usual.parent
        and wide.parent.name.startswith("for-")
    )
    assert stem_place(student(tmp_path, "model.widths=[8,8,8]", "seed=4")).parent == wide.parent, "found by every seed"
    assert stem_place(student(tmp_path, "optim.lr=1")) == usual


def test_a_preflight_trains_no_stem(tmp_path, fabric, tiny_stems, capsys):
    cfg = student(tmp_path, "preflight=true")
    assert stems_first(cfg) == []
    fit(cfg, fabric, tmp_path / "run")
    assert "preflight" in capsys.readouterr().out and not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------------- errors
def test_a_misspelt_arm_lists_the_choices():
    with pytest.raises(MissingConfigException, match=r"(?s)apps.*app_atp"):
        short_config("method=apps")


@pytest.mark.parametrize("override", ["+method.app.kep=3", "+method.atp.rat=1", "+data.imags=10", "+model.dims=3"])
def test_a_misspelt_key_fails_with_its_name(override, fabric, tmp_path):
    with pytest.raises(TypeError, match=override.split(".")[-1].split("=")[0]):
        fit(short_config(override), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("method.app.keep=65", "keep=65 of 64 patches; allowed are 1..64"),
        ("method.app.keep=0", "keep=0"),
        ("method.app.score=mean", "score='mean'; use one of sum"),
        ("method.atp.rate=0", r"not in \(0, 1\]"),
        ("method.atp.start=5", "start=5; allowed are 0..4"),
        ("method.atp.source=both", "source='both'; use one of logits, softmax"),
        ("schedule.kind=step", "allowed: one_cycle, cosine_epoch"),
        ("optim.name=adam", r"optim.name='adam', allowed: sgd, adamw"),
        ("data.size=40", "image_size=40 is not a positive multiple of the stem's stride 6"),
        ("data.counts=long", "data.counts='long', allowed: raf_db, equal"),
        ("train.accumulation=5", "multiple of"),
        ("train.clip=-1", "train.clip=-1, allowed: a norm above 0"),
        ("optim.stem=-0.1", "optim.stem=-0.1, allowed: a multiple"),
        ("data.root=/nowhere", "faces is embedded"),
        ("train.batch_size=512", r"fewer than train\.batch_size=512"),
    ],
)
def test_a_wrong_value_names_what_is_allowed_and_writes_nothing(override, error, fabric, tmp_path):
    with pytest.raises(ValueError, match=error):
        fit(short_config(override), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("method.app.keep=65", "keep=65 of 64 patches"),
        ("optim.name=adam", "optim.name=.adam."),
        ("train.batch_size=512", "fewer than"),
        ("train.accumulation=5", "multiple of"),
        ("schedule.kind=step", "allowed: one_cycle"),
        ("data.counts=long", "data.counts=.long."),
    ],
)
def test_what_is_wrong_is_said_before_a_stem_is_trained(override, error, fabric, tmp_path, tiny_stems):
    with pytest.raises(ValueError, match=error):
        start_and_fit(student(tmp_path, override), fabric, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        start_and_fit(
            config("config", "arm=test", f"run_root={tmp_path}", "data=own", "data.root=nowhere"), fabric, tmp_path
        )
    assert not list(tmp_path.iterdir())


def test_nan_loss_stops_the_run_and_names_the_term(fabric, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d+: .*(loss|gradient norm)=(nan|inf)"):
        fit(short_config("optim.lr=1e20", "train.epochs=10"), fabric, tmp_path)
    assert read(tmp_path)["status"] == "failed"


def test_preflight_and_missing_data_leave_nothing_behind(fabric, started, tmp_path, capsys):
    fit(short_config("preflight=true"), fabric, tmp_path / "run")
    assert "preflight: data found, 32 images" in capsys.readouterr().out and not (tmp_path / "run").exists()
    missing = ["experiment=raf_db", f"data.root={tmp_path / 'nowhere'}", f"run_root={tmp_path / 'runs'}"]
    assert started(PAPER / "train.py", missing) != 0
    assert "nowhere" in capsys.readouterr().err and not (tmp_path / "runs").exists()


# ----------------------------------------------------------------------------------------------------------- the pieces
@pytest.mark.parametrize(
    ("key", "value"),
    [("heads", 2), ("mlp_ratio", 2.0), ("init_std", 0.3), ("keep", 9), ("rate", 0.3), ("start", 0), ("depth", 3), ("dim", 16),
     ("widths", "[8,8,8]"), ("kernels", "[3,3,3]"), ("strides", "[2,2,1]"), ("stem", "patches"),
     ("patch", "4, model.stem=patches")],
)  # fmt: skip
def test_every_key_of_the_model_changes_the_network(key, value):
    def read_out(*overrides):
        model = build(short_config(*overrides), 7).eval()
        with torch.no_grad():
            return model.vit(model.extractor(images))[0]

    images = torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    first, *more = f"model.{key}={value}".split(", ")
    usual, other = read_out(*more), read_out(first, *more)
    assert usual.shape != other.shape or not torch.equal(usual, other)


def test_weight_decay_leaves_out_tokens_only_on_request():
    cfg = short_config("optim.name=sgd")
    model = build(cfg, 7)
    stem, tokens, others = build_optimizer(model, cfg).param_groups
    assert [g["weight_decay"] for g in (stem, tokens, others)] == [0.05, 0.0, 0.05] and len(tokens["params"]) == 3
    assert {id(p) for p in stem["params"]} == {id(p) for p in model.extractor.parameters()}
    assert [g["scale"] for g in (stem, tokens, others)] == [cfg.model.stem_rate, 1, 1] and cfg.model.stem_rate < 1
    cfg.optim.no_decay_tokens, cfg.optim.stem = False, 1.0
    (only,) = build_optimizer(model, cfg).param_groups
    assert (
        len(only["params"]) == len(list(model.parameters()))
        and only["weight_decay"] == 0.05
        and only["momentum"] == 0.9
    )


def test_evaluation_is_repeatable_for_random_scores_and_does_not_touch_the_global_stream(fabric):
    from ap_fer.data import build_data

    cfg = short_config("method=random")
    data, model = build_data(seed=0, **cfg.data), fabric.setup_module(build(cfg, 7))
    torch.nn.init.normal_(model.module.head["fc"].weight)
    before = torch.get_rng_state()
    a, b = (evaluate(fabric, model, data, batch_size=20, workers=0)[0] for _ in range(2))
    assert a == b and torch.equal(before, torch.get_rng_state())
