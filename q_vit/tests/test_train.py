"""The train script as people run it: every arm, teachers, resume, two ranks, errors, and what they leave behind."""

import copy
import json
import math
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from common import runs
from common.reproduce import cells
from q_vit import arms, checkpoint, teacher, train
from q_vit.data import build_data
from q_vit.metrics import imitation
from q_vit.model import build_float
from q_vit.ops import mac_table
from q_vit.quantized_vit import Tapped
from q_vit.tests.conftest import CONFIGS, SHORT, class_folders, config, folder_arm, result
from q_vit.train import fit

PAPER = Path(__file__).resolve().parents[1]
ARMS = sorted(p.stem for p in (CONFIGS / "method").glob("*.yaml"))


@pytest.mark.parametrize("method", ARMS)
def test_every_arm_trains_and_reports(method, fabric, arm, tmp_path):
    epochs = [] if method == "ptq" else ["train.epochs=1"]
    cfg = arm(f"method={method}", *epochs)
    if method == "ptq":
        cfg.train.epochs = 0
    fit(cfg, fabric, tmp_path)
    found = result(tmp_path)
    assert found["status"] == "finished" and 0 <= found["metrics"]["top1"] <= 100
    assert all((name in found["metrics"]) == (method != "fp") for name in ("qk_entropy", "attention_kl"))
    rows = (
        [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] if method != "ptq" else []
    )
    uses_dgd = "dgd" in method or "both" in method
    assert all(("dgd" in row) == uses_dgd and {"ce", "kd", "lr"} <= row.keys() for row in rows)
    model, _, about = checkpoint.load(tmp_path / "last.ckpt")
    assert about["network"]["bits"] == cfg.method.bits
    assert model(torch.zeros(1, 1, 16, 16)).shape == (1, 10)


@pytest.mark.parametrize(
    "overrides",
    [
        ["method.bits=8"], ["method.quant.preset=deployable"], ["method.quant.irm_form=paper", "method.quant.irm_stats=tensor"],
        ["method.start=random", "method.irm_init=unit"], ["method.dgd.student_tap=post_quant", "method.dgd.reduction=mean"],
        ["method.dgd.norm=row", "method.dgd.tokens=patches"], ["method.quant.parts=mhsa_acts"], ["optim.name=lamb"],
        ["method.bits=32"],
    ],
)  # fmt: skip
def test_every_switch_runs(overrides, fabric, arm, tmp_path):
    fit(arm("train.epochs=1", *overrides), fabric, tmp_path)
    assert result(tmp_path)["status"] == "finished"


def test_loss_falls_and_equal_seeds_give_equal_numbers(fabric, arm, tmp_path):
    for name in ("a", "b"):
        fit(arm("train.epochs=6", "data.train_images=64"), fabric, tmp_path / name)
    rows = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["ce"] + rows[-1]["kd"] < rows[0]["ce"] + rows[0]["kd"] and rows[-1]["dgd"] < rows[0]["dgd"]
    groups = runs.load_checkpoint(tmp_path / "a/last.ckpt")["optimizer"]["param_groups"]
    last = (1 - math.cos(math.pi / (0.9 * 24))) / 2  # one step of 24 before the end of the falling cosine
    assert rows[-1]["lr"] == pytest.approx(2e-3 * last) and {g["lr"] for g in groups} == {rows[-1]["lr"]}
    assert (tmp_path / "a/metrics.jsonl").read_text() == (tmp_path / "b/metrics.jsonl").read_text()


def test_resumed_equals_uninterrupted_bit_for_bit(arm, resumed):
    resumed(fit, arm("train.epochs=3"))


def test_two_ranks_equal_one_process(fabric, ranks, root, arm, tmp_path):
    own = ["train.epochs=1", "method.quant.grad_scale=none", "data.test_images=41"]
    fit(arm(*own, "arm=both"), fabric, tmp_path / "one")
    given = [*SHORT, *own, "scale=mini", f"run_root={root}", "fabric.accelerator=cpu"]
    two = ranks(PAPER / "train.py", [*given, f"hydra.run.dir={tmp_path / 'two'}"])
    assert two.returncode == 0, two.stderr
    assert "2 devices x 1 micro-steps x 8" in two.stdout and "notice" not in two.stdout
    a, b = (runs.load_checkpoint(tmp_path / n / "last.ckpt")["model"] for n in ("one", "two"))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    one, two = (result(tmp_path / n)["metrics"] for n in ("one", "two"))
    assert two["loss_ce"] == pytest.approx(one["loss_ce"], rel=1e-4) and two["loss_dgd"] == pytest.approx(
        one["loss_dgd"], rel=1e-3
    )
    assert two["top1"] == pytest.approx(one["top1"], abs=2.5)


def test_numbers_that_depend_on_the_split_are_announced():
    assert arms.notices(config(), 1) == []
    assert "method.quant.grad_scale=per_group" in arms.notices(config("train.accumulation=2"), 1)[0]
    assert arms.notices(config("method.quant.preset=deployable"), 2) == []
    assert "irm_stats" in arms.notices(config("method.quant.irm_form=paper", "method.quant.irm_stats=tensor"), 2)[1]


# ------------------------------------------------------------------------------------------------------------- teachers
def trained(cfg, fabric, monkeypatch):
    """The configuration and directory of what `find` would train for `cfg`."""
    called = []
    teacher.find(cfg, fabric, lambda own, _, out: called.append((own, out)))
    return called[0] if called else None


def test_a_teacher_takes_its_own_configuration_never_the_students(fabric, tmp_path, monkeypatch):
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        fp = compose("config", overrides=["method=fp", "arm=fp", f"run_root={tmp_path}", "seed=3"])
        student = [
            "arm=x", f"run_root={tmp_path}", "teacher.seed=3", "method=ptq", "method.quant.parts=mlp", "optim.lr=1e-3",
            "train.accumulation=2", "evaluate.batch_size=7", "train.epochs=1", "schedule.kind=cosine", "force=true",
            "data.train_images=64", "dgd_weight=3",
        ]  # fmt: skip
        cfg = compose("config", overrides=student)
    own, out = trained(cfg, fabric, monkeypatch)
    assert runs.differing_keys(runs.plain(own), runs.plain(fp)) == [] and out == tmp_path / "default/fp/seed3"
    assert own.force is False
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        forced, _ = trained(compose("config", overrides=[*student, "teacher.force=true"]), fabric, monkeypatch)
    assert forced.force is True


def test_other_teachers_have_directories_of_their_own_and_are_found_again(fabric, tmp_path, monkeypatch):
    plain, deep, half = (
        trained(config(f"run_root={tmp_path}", *o), fabric, monkeypatch)
        for o in ([], ["model.depth=2"], ["fabric.precision=bf16-mixed"])
    )  # fmt: skip
    places = [out for _, out in (plain, deep, half)]  # the short configuration is itself not the default
    assert len(set(places)) == 3 and all(p.parent.name.startswith("for-") and p.name == "seed0" for p in places)
    mine = tmp_path / "default/fp/model.depth-2/seed0"  # as `train.py method=fp model.depth=2` would call it
    mine.mkdir(parents=True)
    (mine / "result.json").write_text(json.dumps({"config_sha256": runs.fingerprint(deep[0])}))
    assert trained(config(f"run_root={tmp_path}", "model.depth=2"), fabric, monkeypatch)[1] == mine
    own, _ = trained(config(f"run_root={tmp_path}", "+teacher.settings.train.batch_size=8"), fabric, monkeypatch)
    assert own.train.batch_size == 8 and own.train.epochs == 12


def test_every_student_of_the_evidence_has_the_teacher_of_its_seed():
    sweeps = [p for s in ("mini", "full", "real_fashion_mnist") for p in (CONFIGS / "reproduce" / s).glob("[23]*.yaml")]
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        for file in sweeps:
            cfg = compose("config", overrides=[f"+reproduce/{file.parent.name}={file.stem}", "method=irm", "seed=103"])
            assert cfg.teacher.seed == 103 and cfg.after == ["10_train_teacher"], file
    assert len(sweeps) > 15


def test_what_is_wrong_with_the_teacher_is_said_of_the_teacher(fabric, tmp_path):
    cfg = config(f"run_root={tmp_path}", "+teacher.settings.train.batch_size=10000")
    with pytest.raises(ValueError, match=r"^the teacher: .*9600 images.*teacher\.settings\.<key>"):
        fit(cfg, fabric, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_preflight_trains_no_teacher_and_says_so(fabric, tmp_path, capsys):
    fit(config(f"run_root={tmp_path}", "preflight=true"), fabric, tmp_path / "run")
    assert "the teacher is a network of its shape, not trained" in capsys.readouterr().out and not list(
        tmp_path.iterdir()
    )


def test_the_student_starts_from_the_teacher_and_is_taught_by_it(fabric, root, arm, monkeypatch):
    """Its weights, stress included; the teacher that teaches is the one that was loaded, in evaluation mode."""
    cfg = arm("method=stressed_irm", "train.epochs=1")
    data = build_data(**cfg.data)
    student, taught, _ = arms.build(cfg, data, root / "mini/fp/seed0/last.ckpt")
    float_weights = runs.load_checkpoint(root / "mini/fp/seed0/last.ckpt")["model"]
    own = student.state_dict()
    for name, value in taught.state_dict().items():
        torch.testing.assert_close(own[name], value, rtol=0, atol=0)
        if "qkv" not in name:
            torch.testing.assert_close(value, float_weights[name], rtol=0, atol=0)
    qkv = "blocks.0.attn.qkv.weight"
    assert not torch.equal(own[qkv], float_weights[qkv]) and torch.equal(own[qkv][48:], float_weights[qkv][48:])
    torch.testing.assert_close(own[qkv][:12], float_weights[qkv][:12] / 3)
    assert not taught.training and not any(p.requires_grad for p in taught.parameters())
    other = arms.build(arm("method.start=random"), data, root / "mini/fp/seed0/last.ckpt").student.state_dict()
    assert not torch.equal(other[qkv], float_weights[qkv])


def test_the_weight_and_the_tap_of_dgd_reach_the_loss(fabric, root, arm, tmp_path, monkeypatch):
    cfg = arm("method=both", "method.dgd.weight=0.5")
    data = build_data(**cfg.data)
    student, taught, _ = arms.build(cfg, data, root / "mini/fp/seed0/last.ckpt")
    images, labels = data.first(8, 0), torch.arange(8)

    def term(weight, tap):
        method = OmegaConf.merge(cfg.method, {"dgd": {"weight": weight, "student_tap": tap}})
        tapped = train.Tapped(copy.deepcopy(student).train(), tap)
        return train.losses(fabric, tapped, train.Tapped(taught, "raw"), images, labels, method=method, prefix=(2, 2))

    once, twice = term(0.5, "pre_quant"), term(1.0, "pre_quant")
    assert twice["dgd"].item() == pytest.approx(2 * once["dgd"].item()) and once["dgd"] > 0
    assert term(0.5, "post_quant")["dgd"].item() != once["dgd"].item() and "dgd" not in term(0.0, "pre_quant")
    hard = taught(images).argmax(-1)
    own = copy.deepcopy(student).train()(images)[1]
    assert once["kd"].item() == pytest.approx(0.5 * torch.nn.functional.cross_entropy(own, hard).item(), rel=1e-5)
    taps = []
    monkeypatch.setattr(train, "Tapped", lambda model, at: (taps.append(at), Tapped(model, at))[1])
    for tap in ("post_quant", "pre_quant"):
        fit(arm("preflight=true", f"method.dgd.student_tap={tap}"), fabric, tmp_path)
    assert taps == ["raw", "post_quant", "raw", "pre_quant"]  # the teacher's, the student's


def test_a_run_tells_how_near_its_attention_is_to_the_stressed_teacher(fabric, root, arm, tmp_path):
    """Of the network as trained, on test images, against the teacher that taught it, stress included."""
    cfg = arm("method=stressed_irm", "train.epochs=1")
    fit(cfg, fabric, tmp_path)
    data = build_data(**cfg.data)
    _, taught, _ = arms.build(cfg, data, root / "mini/fp/seed0/last.ckpt")
    images = torch.stack([image for image, _ in data.test])
    own = imitation(checkpoint.load(tmp_path / "last.ckpt").model, taught, images, prefix=(2, 2))
    assert {k: result(tmp_path)["metrics"][k] for k in own} == pytest.approx(own, rel=1e-5) and len(own) == 2


def test_percentile_calibration_sets_the_steps(root, arm):
    data = build_data(**arm().data)
    a, b = (
        arms.build(arm("method=ptq", f"method.percentile={p}"), data, root / "mini/fp/seed0/last.ckpt").student
        for p in (99.9, 80)
    )
    name = "blocks.0.mlp.fc1.input_quantizer.step"
    assert (b.state_dict()[name] < a.state_dict()[name]).float().mean() > 0.9


def test_steps_are_projected_after_every_optimizer_step(fabric, arm, tmp_path, monkeypatch):
    called = []
    project = train.keep_steps_positive
    monkeypatch.setattr(train, "keep_steps_positive", lambda model: (called.append(1), project(model)))
    fit(arm("train.epochs=1", "optim.lr=5.0"), fabric, tmp_path)
    steps = [v for k, v in runs.load_checkpoint(tmp_path / "last.ckpt")["model"].items() if k.endswith(".step")]
    assert len(called) == 2 and min(float(s.min()) for s in steps) >= 1e-5 * (1 - 1e-6)


def test_a_teacher_of_other_classes_or_another_normalisation_is_refused(fabric, root, tmp_path):
    data = class_folders(tmp_path / "data")
    own = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0}
    model = build_float("vit_distilled", num_classes=3, **own)
    seen = build_data(name="folder", root=str(data), size=16, augment="none").look
    for key, value in (("classes", ["a", "b", "c"]), ("normalise", {"mean": [0.5] * 3, "std": [0.5] * 3})):
        about = {"classes": ["blue", "green", "red"], **seen, key: value}
        torch.save({"model": model.state_dict(), "about": about}, tmp_path / "t.ckpt")
        with pytest.raises(ValueError, match=f"was trained with other {key}"):
            fit(folder_arm(data, f"teacher.weights={tmp_path / 't.ckpt'}"), fabric, tmp_path / "run")
    given = ["data=folder", f"data.root={data}", "data.workers=0", "data.augment=none", "train.batch_size=12"]
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        cfg = compose("config", overrides=["arm=t", "model=deit", "teacher.weights=null", *given])
    with pytest.raises(ValueError, match="has 1000 classes, the data has 3"):
        fit(cfg, fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_best_is_chosen_on_images_set_aside_every_few_epochs_never_on_the_test_set(fabric, arm, tmp_path, monkeypatch):
    """Validated after epochs 2, 4 and the last; interrupted after epoch 4, the run remembers what was best."""
    seen, accuracies = [], iter([50.0, 70.0, 60.0, 1.0])

    def fake(fabric, model, dataset, **_):
        seen.append(len(dataset))
        return torch.zeros(len(dataset), 10), torch.zeros(len(dataset), dtype=torch.long)

    monkeypatch.setattr(train, "predict", fake)
    monkeypatch.setattr(train, "accuracy", lambda *_: {"top1": next(accuracies)})
    save, cfg = runs.Run.save_checkpoint, arm("train.epochs=5", "train.eval_every=2", "data.validation=24")

    def killed(self, state, name="last.ckpt"):
        save(self, state, name)
        if state["epoch"] == 4 and name == "last.ckpt":
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(cfg, fabric, tmp_path)
    monkeypatch.setattr(runs.Run, "save_checkpoint", save)
    fit(cfg, fabric, tmp_path)
    assert seen == [24, 24, 24, 40]
    best = runs.load_checkpoint(tmp_path / "best.ckpt")
    assert best["epoch"] == 4 and best["best"] == 70 and runs.load_checkpoint(tmp_path / "last.ckpt")["best"] == 70
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {row["epoch"]: row["val_top1"] for row in rows if "val_top1" in row} == {2: 50, 4: 70, 5: 60}
    assert "loss_val_top1" not in result(tmp_path)["metrics"]
    with pytest.raises(ValueError, match=r"no validation split.*data\.validation"):
        fit(arm("train.eval_every=1"), fabric, tmp_path / "none")


def test_validation_images_are_no_training_images(tmp_path):
    root = class_folders(tmp_path / "a", n=6)
    data = build_data(name="folder", root=str(root), size=16, augment="none", validation=5)
    assert data.images == 13 and len(data.validation) == 5
    assert not set(data.validation.indices) & set(data.train.indices)
    own = class_folders(tmp_path / "b", splits=("train", "val", "test"), n=2)
    data = build_data(name="folder", root=str(own), size=16, augment="none")
    assert (
        len(data.validation) == 6 and "/test/" in data.test.samples[0][0] and "/val/" in data.validation.samples[0][0]
    )
    (root / "test").mkdir()  # ImageNet's own: images without labels
    (root / "test/0001.JPEG").write_bytes(b"")
    assert "/val/" in build_data(name="folder", root=str(root), size=16, augment="none").test.samples[0][0]


def test_a_subset_is_drawn_once_and_leaves_the_images_set_aside(tmp_path):
    own = {"name": "folder", "root": str(class_folders(tmp_path, n=6)), "size": 16, "augment": "none"}
    whole = build_data(**own, validation=5)
    part, again, bare = (build_data(**own, validation=v, subset=4) for v in (5, 5, 0))
    assert part.images == len(part.first(99, 0)) == bare.images == 4 and part.train.indices == again.train.indices
    assert set(part.train.indices) < set(whole.train.indices) and part.validation.indices == whole.validation.indices
    assert bare.validation is None and len(build_data(**own).train) == 18
    for n, error in ((0, "subset=0"), (14, "subset=14, but there are only 18")):
        with pytest.raises(ValueError, match=error):
            build_data(**own, validation=5, subset=n)
    with pytest.raises(ValueError, match=r"subset=4: .*data\.train_images"):
        build_data(name="cued_digits", subset=4)


def test_a_run_on_other_images_is_neither_skipped_nor_resumed(fabric, tmp_path):
    for name, n in (("a", 8), ("b", 9)):
        class_folders(tmp_path / name, n=n)
    cfg = [folder_arm(tmp_path / n, "method=fp", "train.batch_size=8") for n in "ab"]
    fit(cfg[0], fabric, tmp_path / "run")
    os.rename(tmp_path / "a", tmp_path / "moved")  # where it lies does not matter
    fit(folder_arm(tmp_path / "moved", "method=fp", "train.batch_size=8"), fabric, tmp_path / "run")
    with pytest.raises(runs.RunError, match="on other data"):
        fit(cfg[1], fabric, tmp_path / "run")


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_class_folders_a_plain_teacher_and_swin(name, fabric, tmp_path):
    """A class folder; for "vit" a distilled student of a plain teacher (tokens differ by one), for "swin" one head."""
    cfg = folder_arm(class_folders(tmp_path / "data"), "method=both")
    OmegaConf.set_struct(cfg, False)
    if name == "vit":
        own = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0}
        other, cfg.teacher.model = build_float("vit", num_classes=3, **own), {"name": "vit"}
        cfg.model, cfg.method.start = {"name": "vit_distilled", "pretrained": False, **own}, "random"
    else:
        own = {
            "img_size": 16,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        }
        other = build_float("swin_tiny_patch4_window7_224", num_classes=3, **own)
        cfg.model = {"name": "swin_tiny_patch4_window7_224", "pretrained": False, **own}
    torch.save({"model": other.state_dict()}, tmp_path / "teacher.ckpt")
    cfg.teacher.weights = str(tmp_path / "teacher.ckpt")
    fit(cfg, fabric, tmp_path / "run")
    found = result(tmp_path / "run")
    assert found["status"] == "finished" and found["metrics"]["loss_dgd"] > 0


# -------------------------------------------------------------------------------------------------------------- errors
def test_a_misspelt_arm_lists_the_choices():
    with pytest.raises(MissingConfigException, match=r"(?s)bot.*both"):
        config("method=bot")


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("+method.quant.bit=4", "bit"), ("+method.dgd.wieght=1", "wieght"), ("+data.rot=1", "rot"), ("+model.dept=1", "dept"),
        ("+schedule.warm=3", "warm"), ("+optim.lrr=3", "lrr"),
    ],
)  # fmt: skip
def test_a_misspelt_key_fails_with_its_name(override, error, fabric, arm, tmp_path):
    with pytest.raises(TypeError, match=error):
        fit(arm(override), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["method.bits=1"], r"bits=1, .*2\.\.8, or 32"),
        (["method.bits=33"], "bits=33"),
        (["method=baseline", "method.bits=32"], "method.bits=32 without rectification is the float network"),
        (["method.distill=soft"], "distill=soft, allowed: hard, none"),
        (["method.start=foo"], "start=foo, allowed: teacher, random"),
        (["method.irm_init=zero"], "irm_init=zero, allowed: calibrated, unit"),
        (["method.percentile=10"], "percentile=10"),
        (["method.dgd.student_tap=logits"], "student_tap='logits', allowed"),
        (["method.dgd.norm=l1"], "norm='l1'"),
        (["method.dgd.weight=-1"], r"dgd\.weight=-1"),
        (["method.quant.init=mean"], "init='mean'"),
        (["method.quant.zp_init=mean"], "zp_init='mean'"),
        (["method.quant.parts=q"], "parts='q'"),
        (["schedule.kind=linear"], "kind='linear', allowed: cosine, onecycle"),
        (["optim.name=adamww"], "optim.name=adamww"),
        (["train.accumulation=3"], r"batch_size=16.*multiple of"),
        (["train.batch_size=4096"], r"fewer than train\.batch_size=4096"),
        (["teacher.weights=null"], "the teacher would be random"),
        (["+teacher.model.depth=2"], "method.start=teacher, but teacher.model"),
        (["+teacher.model.depth=2", "method.start=random"], "1 attention layers, the teacher 2"),
        (["method=stressed_irm", "teacher.stress.scale=0"], "scale=0"),
        (["model.depth=2"], "does not fit the model"),
        (["model.num_heads=5"], "model: .*divisible"),
        (["model.img_size=32"], r"images of 32 x 32, the data set gives 16: set model\.img_size=16"),
        (["data.root=/nowhere"], "cued_digits is embedded"),
        (["data.validation=-1"], "validation=-1"),
    ],
)
def test_a_wrong_value_names_what_is_allowed_and_writes_nothing(overrides, error, fabric, arm, tmp_path, monkeypatch):
    if "depth=2" not in overrides[0] or len(overrides) > 1:  # before a teacher would be trained
        monkeypatch.setattr(train.teachers, "find", lambda *_: pytest.fail("a teacher was looked for"))
    if overrides == ["model.depth=2"]:
        monkeypatch.undo()
    with pytest.raises(ValueError, match=error):
        fit(arm(*overrides), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["optim.lr=abc"], "optim.lr=abc"), (["method.irm=yes2"], "method.irm"),
        (["optim.weight_decay=-1"], "optim.weight_decay=-1"),
        (["evaluate.batch_size=0"], "evaluate.batch_size=0"), (["evaluate.statistics_images=0"], "statistics_images=0"),
        (["data.workers=-1"], "data.workers=-1"), (["method=bot"], "allowed: .*both"), (["methd=both"], "methd"),
        (["train.save_every=0"], "train.save_every=0"), (["teacher.weights=/no/such.ckpt"], "no teacher at /no/such.ckpt"),
        (["data=folder", "data.size=16", "data.root=/no/such"], "/no/such"),
        (["model=deit", "data=folder", "data.root=/no"], "/no"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_clear_line_and_leaves_nothing(overrides, error, tmp_path, monkeypatch, capfd):
    """Those of every train script are in ci/test_command_lines.py."""
    monkeypatch.setattr(sys, "argv", ["train.py", f"run_root={tmp_path / 'runs'}", *overrides])
    monkeypatch.setattr(teacher, "find", lambda *_: pytest.fail("a teacher was looked for"))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(PAPER / "train.py"), run_name="__main__")
    said = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 1 and len(said) == 1 and said[0].startswith("error: ") and error.split(".*")[0] in said[0]
    assert not (tmp_path / "runs").exists()


def test_a_teacher_with_other_tokens_is_refused(fabric, arm, tmp_path):
    torch.save({}, tmp_path / "t.ckpt")
    own = [f"teacher.weights={tmp_path / 't.ckpt'}", "+teacher.model.patch_size=8", "method.start=random"]
    with pytest.raises(ValueError, match=r"student \(2, 2, 18, 12\), teacher \(2, 2, 6, 12\)"):
        fit(arm(*own), fabric, tmp_path / "run")


def test_a_missing_teacher_says_how_to_train_it(fabric, tmp_path):
    with pytest.raises(FileNotFoundError, match="python train.py method=fp scale=mini seed=0"):
        fit(config(f"run_root={tmp_path / 'empty'}", "scale=mini"), fabric, tmp_path / "run")


def test_nan_loss_stops_the_run_and_names_the_term(fabric, arm, tmp_path):
    with pytest.raises((FloatingPointError, ValueError), match=r"step \d+: .*(ce|norm|dgd)=(nan|inf)|unusable steps"):
        fit(arm("optim.lr=1e18", "train.epochs=5"), fabric, tmp_path)
    assert result(tmp_path)["status"] == "failed"


def test_preflight_writes_nothing(fabric, arm, tmp_path, capsys):
    fit(arm("preflight=true"), fabric, tmp_path / "run")
    assert "preflight: data found" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_every_config_composes_and_builds():
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        for file in (CONFIGS / "experiment").glob("*.yaml"):
            cfg = compose("config", overrides=[f"experiment={file.stem}", "arm=test", "data.root=/x"])
            cfg = OmegaConf.to_container(cfg, resolve=True)
            with torch.device("meta"):
                build_float(**{**cfg["model"], "pretrained": False, "file": None}, num_classes=10)
            with pytest.raises(FileNotFoundError, match="/x"):
                build_data(**cfg["data"])
        for sweep in (CONFIGS / "reproduce").rglob("*.yaml"):
            scale, script_name = sweep.parent.name, sweep.stem.split("_")[1]
            base = script_name if script_name != "train" else "config"
            cfg = compose(base, overrides=[f"+reproduce/{scale}={sweep.stem}", "arm=test"], return_hydra_config=True)
            assert cfg.scale == scale and cfg.hydra.sweeper.params


PASSES = {
    "fp": 3,
    "no_kd": 6,
    "baseline": 7,
    "irm": 7.1,
    "dgd": 7.3,
    "both": 7.4,
}  # through a network, of a step on an image


def test_the_hours_of_the_papers_recipes_follow_from_counts_and_every_line_of_the_sweeps_says_them():
    """8.03 GPU hours per G MACs and pass over 300 epochs of ImageNet; DeiT-S at three widths in four arms, the others in two."""
    tables = {}
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        for name in ("deit_tiny", "deit_small", "deit_base", "swin_tiny", "swin_small"):
            cfg = compose("config", overrides=[f"experiment={name}", "arm=x"])
            gigamacs, tables[name] = mac_table(cfg.model.name)["total"] / 1e9, cfg.estimate.by_arm
            for arm, hours in tables[name].items():
                assert hours == pytest.approx(8.03 * gigamacs * PASSES[arm], rel=0.01, abs=0.5), (name, arm)
    lines = [(c.arm.partition("/")[0], c.gpu_hours) for c in cells(PAPER, "paper", ("data.root=/x",))]
    for arm, hours in lines:
        model, _, method = arm.rpartition("_")
        assert hours == tables[model or "deit_small"][method], arm
    assert len(lines) == 4 * 3 + 2 * 3 + 3 * 2


def test_the_hours_of_other_recipes_follow_the_cost_of_an_arm():
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        for name in ("cifar10", "cifar100"):
            table = compose("config", overrides=[f"experiment={name}", "arm=x"]).estimate.by_arm
            assert table.no_kd < table.baseline <= table.irm < table.both and table.baseline < table.dgd <= table.both
        assert compose("config", overrides=["arm=both"]).estimate.gpu_hours is None
