"""The script as people run it: every arm, its dense start, two ranks, errors, and what it leaves behind."""

import json
import os
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.optim.optimizer import register_optimizer_step_post_hook

from adaptive_prune import checkpoint, stages, train
from adaptive_prune.data import build_data, mixed
from adaptive_prune.settings import CONFIGS, composed
from adaptive_prune.stages import dense_config, find
from adaptive_prune.tests import contract
from adaptive_prune.tests.contract import config
from adaptive_prune.train import build, fit, loss_terms
from common import runs
from common.data.batches import Plan

PAPER = Path(__file__).resolve().parents[1]
ARMS = sorted(p.stem for p in (CONFIGS / "method").glob("*.yaml") if p.stem != "pretrain")
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = ["data.train_images=64", "data.test_images=16", "train.batch_size=32", "train.epochs=1"]
CUT = "method.thresholds=[0.01,0.015,0.02]"


def own(root, *overrides, arm="as"):
    """A short run whose dense start is an arm of this folder."""
    return composed(*SMALL, f"run_root={root}", f"arm={arm}", "start.epochs=1", "start.batch_size=32", *overrides)


def metrics_of(out):
    return json.loads((out / "result.json").read_text())["metrics"]


@pytest.fixture(scope="module")
def root(fabric, tmp_path_factory):
    """A run root that holds a dense start, trained by the way, and an AS-ViT run."""
    where = tmp_path_factory.mktemp("runs")
    fit(own(where), fabric, where / "default/as/seed0")
    return where


# -------------------------------------------------------------------------------------------------------- the dense start
def test_a_start_is_trained_once_and_found_by_its_configuration(root, fabric, tmp_path, monkeypatch, capsys):
    (place,) = (root / "default/pretrain").glob("for-*/seed0")
    assert json.loads((place / "result.json").read_text())["status"] == "finished"
    place.parent.rename(
        root / "default/pretrain/data.train_images-64"
    )  # as `python train.py method=pretrain ...` names it
    inner = train.fit

    def no_training(cfg, *args):
        assert cfg.arm != "pretrain", "the start is there"
        inner(cfg, *args)

    monkeypatch.setattr(train, "fit", no_training)
    inner(
        own(root, "optim.lr=1e-3", "train.accumulation=2", "method.score=mean", "force=true"), fabric, tmp_path / "run"
    )
    assert "data.train_images-64" in capsys.readouterr().out
    other = dense_config(own(root, "data.noise=0.2"))
    assert find(runs.plain(other), runs.plain(other), {}, arm="pretrain") is None, "other data need another start"


def test_the_default_start_has_the_directory_of_its_arm(tmp_path):
    cfg = composed(
        "arm=as", f"run_root={tmp_path}", "scale=mini", "seed=100", "optim.lr=1", "train.batch_size=8", "method=topk"
    )
    wanted = dense_config(cfg)
    assert stages.dense_place(cfg, wanted, {}) == tmp_path / "mini/pretrain/seed100"
    sweep = composed("method=pretrain", "arm=pretrain", "scale=mini", "seed=100", f"run_root={tmp_path}", "threads=1")
    assert runs.fingerprint(wanted) == runs.fingerprint(sweep), "what the sweep of that scale trains"
    assert "for-" in str(stages.dense_place(cfg, wanted, {"kind": "folder", "sha": "1"}))


def test_own_folders_train_with_a_start_of_their_own(fabric, folder_arm, tmp_path):
    """The reported defect: an own folder has other keys than the digit grids."""
    cfg = composed(*folder_arm, "train.epochs=1", "arm=as", f"run_root={tmp_path / 'runs'}")
    fit(cfg, fabric, tmp_path / "run")
    state = runs.load_checkpoint(tmp_path / "run/last.ckpt")
    assert state["about"]["classes"] == ["green", "red"] and state["about"]["channels"] == 3
    (start,) = (tmp_path / "runs").rglob("pretrain/for-*/seed0/last.ckpt")
    assert runs.load_checkpoint(start)["about"]["classes"] == ["green", "red"]


def test_student_and_teacher_begin_with_the_weights_of_the_start(fabric):
    cfg = config()
    data = build_data(seed=0, **cfg.data)
    model, teacher = build(cfg, data, contract.start(), None)
    start = torch.load(contract.start(), weights_only=True)
    for network in (model.vit, teacher):
        found = network.state_dict()
        assert all(torch.equal(found[k], v) for k, v in start.items()), "not the start"
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["start.checkpoint=null", "start.arm=null"], "no start: set start.arm=pretrain"),
        (["start.checkpoint=null", "start.arm=null", "method=no_distillation"], "no start: set"),
        (["start.checkpoint=null", "start.arm=null", "start.random=true"], "needs a teacher"),
        (["start.pretrained=true"], "two starts"),
    ],
)
def test_no_arm_begins_or_learns_from_random_weights_in_silence(overrides, error, fabric, tmp_path):
    with pytest.raises(ValueError, match=error):
        fit(config(*overrides), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pretrained_weights_that_are_out_of_reach_are_named_at_once(fabric, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr("adaptive_prune.backbones.socket.create_connection", refuse)
    monkeypatch.setattr("adaptive_prune.backbones.try_to_load_from_cache", lambda *_: None)
    for name in ("HTTPS_PROXY", "https_proxy", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    more = ["start.checkpoint=null", "start.arm=null", "start.pretrained=true", "method=no_distillation"]
    vit = "model.vit={name:deit_tiny_patch16_224,img_size:32}"
    with pytest.raises(ValueError, match=r"out of reach.*start\.checkpoint"):
        fit(config(*more, vit, "data.size=32", "data.grid=4", "budget.target=0.9"), fabric, tmp_path / "run")


def test_weights_of_another_shape_or_other_data_are_refused(root, fabric, tmp_path):
    start = next((root / "default/pretrain").rglob("last.ckpt"))
    for overrides, error in (
        ([f"start.checkpoint={start}", "data.noise=0.2"], r"other data.*noise: 0\.1 -> 0\.2"),
        (["data.size=32", "data.grid=4"], r"pos_embed is \(1, 37, 32\), not \(1, 65, 32\)"),
        (["model.vit.depth=7"], r"does not fit.*missing \['vit\.blocks\.6"),
    ):
        with pytest.raises(ValueError, match=error):
            fit(config(*overrides), fabric, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"no dense start .*start\.make=true"):
        fit(own(tmp_path / "none", "start.make=false"), fabric, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="no finished run of method=as"):
        fit(own(root, "method=topk_matched", "data.noise=0.2", arm="topk_matched"), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------- the arms
@pytest.mark.parametrize("method", ARMS)
def test_every_arm_trains_and_reports(method, root, fabric, tmp_path):
    matched = method in ("topk_matched", "topk_geometric")
    more = [] if matched else [f"start.checkpoint={contract.start()}", CUT]
    fit(own(root, f"method={method}", *more, arm=method), fabric, tmp_path)
    metrics = metrics_of(tmp_path)
    (row,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert 0 <= metrics["top1"] <= 100 and ("distill" in row) == (method != "no_distillation")
    learned = method in ("as", "mean_score", "activation_mask", "early_positions", "no_distillation")
    assert ("budget" in row) == learned and ("theta_1" in row) == (learned or method == "frozen_quantiles")
    if method in ("topk", "evit", "evit_no_fusion", "tome", "frozen_quantiles"):
        assert metrics["macs"] == pytest.approx(0.45, abs=0.03)
    if method == "dense":
        assert metrics["macs"] == 1
    if matched:
        target = metrics_of(root / "default/as/seed0")["macs"]
        assert 0 <= metrics["macs"] - target < 0.02 and 0 <= metrics["mcnemar_p"] <= 1


def test_the_two_matched_schedules(fabric, tmp_path):
    """The run's own counts per stage, or counts that fall by one factor; both cost no less than the run."""
    model = build(config(), build_data(seed=0, **config().data), contract.start(), None)[0]
    macs = model.cost.staged([8.0, 8.0, 7.0], model.locations) / model.cost.dense
    torch.save({"kept": torch.tensor([[9.0, 8, 7], [7, 8, 7]]), "macs": macs}, tmp_path / "evaluation.ckpt")
    assert stages.matched_counts(model, tmp_path, "stages") == [8, 8, 7]
    geometric = stages.matched_counts(model, tmp_path, "geometric")
    assert geometric[0] > 8 > geometric[2] and model.cost.staged(geometric, model.locations) / model.cost.dense >= macs


def test_frozen_thresholds_follow_the_scores_and_do_not_learn(fabric, tmp_path):
    fit(config("method=frozen_quantiles", "method.calibrate=32"), fabric, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["theta_1"] != rows[1]["theta_1"], "renewed after every epoch"
    state = runs.load_checkpoint(tmp_path / "last.ckpt")
    assert len(state["optimizer"]["state"]) == len(state["model"]) - 1, (
        "the thresholds are no parameters of the optimizer"
    )


# ------------------------------------------------------------------------------------------------------------ the losses
def terms_of(cfg, fabric, labels=None):
    data = build_data(seed=0, **cfg.data)
    model, teacher = build(cfg, data, contract.start(), None)
    model = fabric.setup_module(model.train())
    images, y = next(data.batches(Plan(64, 32, seed=0), 1, fabric.device))
    return (
        loss_terms(fabric, cfg, model, teacher, images, y if labels is None else labels(y)),
        model,
        teacher,
        images,
        y,
    )


def test_loss_terms_are_their_formulas_times_their_weights(fabric):
    cfg = config(CUT, "method.losses.budget=3", "method.losses.distill=0.25", "train.label_smoothing=0.1")
    terms, model, teacher, images, y = terms_of(cfg, fabric)
    logits, info = model(images, details=True)
    pruned = model.module
    torch.testing.assert_close(terms["budget"], 3 * (info.macs.mean() / pruned.cost.dense - 0.45).abs())
    p, q = teacher(images).softmax(1), logits.softmax(1)
    torch.testing.assert_close(terms["distill"], 0.25 * (p * (p / q).log()).sum(1).mean(), rtol=1e-4, atol=1e-6)
    log = logits.log_softmax(1)
    hard = -log.gather(1, y[:, None]).mean()
    torch.testing.assert_close(terms["ce"], 0.9 * hard - 0.1 * log.mean())


def test_mixed_labels_are_smoothed_once(fabric):
    """Mixup smooths; smoothing its soft labels again would."""
    soft = torch.full((32, 10), 0.1)
    cfg = config(CUT, "train.label_smoothing=0.2")
    terms, model, _, images, _ = terms_of(cfg, fabric, lambda y: torch.nn.functional.one_hot(y, 10).float())
    target = torch.nn.functional.one_hot(terms_of(cfg, fabric)[4], 10).float()
    torch.testing.assert_close(terms["ce"], -(target * model(images).log_softmax(1)).sum(1).mean())
    same, labels = mixed(None, images, soft, 0)
    assert same is images and labels is soft


def test_every_step_mixes_anew_and_smooths(fabric, tmp_path, monkeypatch):
    inner, soft = train.mixed, []

    def mixing(*args):
        images, labels = inner(*args)
        soft.append(labels)
        return images, labels

    monkeypatch.setattr(train, "mixed", mixing)
    fit(config("train.mixup={mixup_alpha: 0.8}", "train.label_smoothing=0.2"), fabric, tmp_path)
    assert len(soft) == 4 and all(labels.min() == pytest.approx(0.02) for labels in soft)
    assert len({round(labels.amax(1).min().item(), 5) for labels in soft}) == 4, "one share for all steps"


def test_the_score_teaches_the_network(fabric):
    """A score detached from the graph would leave queries and keys without the gradient of the budget."""
    cfg = config(CUT, "method.temperature=200")
    terms, model, *_ = terms_of(cfg, fabric)
    terms["budget"].backward()
    block = model.module.vit.blocks[1]
    assert block.attn.qkv.weight.grad is not None and block.attn.qkv.weight.grad.abs().sum() > 0


class Ranks:
    """Stands for several ranks whose images cost `mean` together."""

    world_size = 2

    def __init__(self, mean):
        self.mean = mean

    def all_reduce(self, value, reduce_op):
        return torch.tensor(self.mean, dtype=value.dtype)


def test_the_budget_is_that_of_all_ranks_with_ranks_on_both_sides_of_it(fabric):
    """This rank is above the budget, all together below: its thresholds must fall."""
    for per_rank, sign in ((False, -1), (True, 1)):
        cfg = config(CUT, "budget.target=0.4", f"parity.budget_per_rank={per_rank}".lower())
        _, model, teacher, images, y = terms_of(cfg, fabric)
        own_cost = model(images, details=True)[1].macs.mean()
        assert own_cost / model.module.cost.dense > 0.4
        terms = loss_terms(Ranks(0.36 * model.module.cost.dense), cfg, model, teacher, images, y)  # type: ignore[arg-type]
        (grad,) = torch.autograd.grad(terms["budget"], model.module.theta, retain_graph=True)
        (cost,) = torch.autograd.grad(model(images, details=True)[1].macs.mean(), model.module.theta)
        assert torch.equal(grad.sign(), sign * cost.sign()), f"per rank: {per_rank}"


def test_thresholds_are_not_decayed(fabric, tmp_path):
    more = ["method.losses.budget=0", "method.losses.distill=0", "optim.lr=1e-3", "optim.weight_decay=100"]
    fit(config("method.thresholds=[0.9,0.91,0.92]", *more), fabric, tmp_path)
    state = runs.load_checkpoint(tmp_path / "last.ckpt")["model"]
    torch.testing.assert_close(state["theta"], torch.tensor([0.9, 0.91, 0.92]), rtol=0, atol=2e-3)
    start = torch.load(contract.start(), weights_only=True)["pos_embed"]
    assert (state["vit.pos_embed"] * start).sum() > 0.95 * start.square().sum(), "nor are positions"
    name = "blocks.0.mlp.fc1.weight"
    assert state[f"vit.{name}"].norm() < 0.9 * torch.load(contract.start(), weights_only=True)[name].norm()


def test_averaged_weights_are_the_moving_average_of_every_step(fabric, tmp_path):
    steps = []  # of the head, the one weight of this shape

    def after_step(optimizer, *_):
        steps.extend(p.detach().clone() for g in optimizer.param_groups for p in g["params"] if p.shape == (10, 32))

    handle = register_optimizer_step_post_hook(after_step)
    try:
        fit(config("train.ema=0.25", "train.epochs=1"), fabric, tmp_path)
    finally:
        handle.remove()
    expected = torch.load(contract.start(), weights_only=True)["head.weight"]
    for weight in steps:
        expected = 0.25 * expected + 0.75 * weight
    averaged, last = (checkpoint.load(tmp_path / "last.ckpt", ema=e).model.vit.head.weight for e in (True, False))
    assert len(steps) == 2 and torch.equal(last, steps[-1])
    torch.testing.assert_close(averaged, expected)


# ------------------------------------------------------------------------------------------------------ the best checkpoint
SEEN = [
    {"macs": 0.9, "top1": 99.0},
    {"macs": 0.45, "top1": 60.0},
    {"macs": 0.458, "top1": 70.0},
    {"macs": 0.45, "top1": 65.0},
]


@pytest.fixture
def scripted(monkeypatch):
    """Evaluation on validation says what stands in SEEN, epoch by epoch; returns the splits that were asked for."""
    inner, asked = train.evaluate, []

    def evaluate(fabric, model, data, *, split="test", **sizes):
        asked.append(split)
        if split == "test":
            return inner(fabric, model, data, **sizes)
        assert len(data.validation) == 24
        return SEEN[(asked.count("validation") - 1) % len(SEEN)], {}

    monkeypatch.setattr(train, "evaluate", evaluate)
    return asked


EVERY = ["train.epochs=4", "train.eval_every=1"]


def test_the_best_checkpoint_meets_the_budget_first_and_is_chosen_on_validation(scripted, fabric, tmp_path):
    """The first epoch, with thresholds that have not risen yet, has the best accuracy and drops nothing."""
    fit(config("+data.validation=24", *EVERY), fabric, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert scripted == ["validation"] * 4 + ["test"], "the test set is looked at once, at the end"
    assert [r["validation_top1"] for r in rows] == [s["top1"] for s in SEEN] and "test_top1" not in rows[0]
    best, last = (runs.load_checkpoint(tmp_path / f"{n}.ckpt") for n in ("best", "last"))
    assert (best["epoch"], last["epoch"]) == (3, 4)
    assert checkpoint.load(tmp_path / "best.ckpt").model.theta.tolist() == best["model"]["theta"].tolist()


def test_a_resumed_run_remembers_what_was_best(scripted, fabric, tmp_path, monkeypatch):
    inner = train.train_one_epoch

    def killed(*args, epoch, **more):
        if epoch == 4:
            raise KeyboardInterrupt
        return inner(*args, epoch=epoch, **more)

    monkeypatch.setattr(train, "train_one_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(config("+data.validation=24", *EVERY), fabric, tmp_path)
    monkeypatch.setattr(train, "train_one_epoch", inner)
    fit(config("+data.validation=24", *EVERY), fabric, tmp_path)
    assert [runs.load_checkpoint(tmp_path / f"{n}.ckpt")["epoch"] for n in ("best", "last")] == [3, 4]


def test_without_validation_nothing_is_chosen(scripted, fabric, tmp_path):
    fit(config(*EVERY), fabric, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["test_top1" in r for r in rows] == [True, True, True, False] and set(scripted) == {"test"}
    assert not (tmp_path / "best.ckpt").exists()


# --------------------------------------------------------------------------------------------------------- every model
LV = [
    "model=lvvit_s",
    "+model.vit.patch_size=4",
    "+model.vit.embed_dim=96",
    "+model.vit.depth=4",
    "+model.vit.num_heads=3",
    "data.size=32",
    "data.grid=4",
]
LV += ["model.locations=[1,2,3]", "model.early_locations=[1,2,3]", "budget.target=0.9"]
METHODS = [*ARMS, "pretrain"]


@pytest.mark.parametrize("family", ["timm", "lvvit"])
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("topk_matched", "topk_geometric")])
def test_every_parameter_that_could_learn_has_a_gradient(method, family, fabric):
    """DDP waits for all of them; LV-ViT's auxiliary head is only read by some arms."""
    more = LV if family == "lvvit" else []
    cfg = config(f"method={method}", *more, "start.checkpoint=null", "start.arm=null", "start.random=true")
    data = build_data(seed=0, **cfg.data)
    model, teacher = build(cfg, data, None, None)
    model = fabric.setup_module(model.train())
    images, labels = next(data.batches(Plan(64, 8, seed=0), 1, fabric.device))
    terms = loss_terms(fabric, cfg, model, teacher, images, labels)
    sum(terms.values()).backward()
    idle = [n for n, p in model.module.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle
    assert ("aux" in terms) == (family == "lvvit" and method == "pretrain")
    token = family == "lvvit" and cfg.method.losses.token > 0 and cfg.method.rule == "threshold"
    assert ("token" in terms) == token


def test_the_losses_of_the_tokens_are_their_formulas_times_their_weights(fabric):
    fresh = ["start.checkpoint=null", "start.arm=null", "start.random=true", "method.thresholds=[0.015,0.016,0.017]"]
    cfg = config(*LV, *fresh, "method.losses.token=0.3", "method.losses.aux=0.2", "train.label_smoothing=0.1")
    data = build_data(seed=0, **cfg.data)
    model, teacher = build(cfg, data, None, None)
    with torch.no_grad():
        model.vit.aux_head.weight.normal_()  # another student than the teacher
    model = fabric.setup_module(model.train())
    images, y = next(data.batches(Plan(64, 8, seed=0), 1, fabric.device))
    terms = loss_terms(fabric, cfg, model, teacher, images, y)
    _, info = model(images, details=True)
    with torch.no_grad():
        theirs = teacher.aux_head(teacher.forward_features(images)[:, 1:]).softmax(-1)
    ours, alive = info.tokens.softmax(-1), info.alive.bool()
    assert 0 < alive.sum() < alive.numel()
    kl = (theirs * (theirs / ours).log()).sum(-1)
    torch.testing.assert_close(terms["token"], 0.3 * kl[alive].mean(), rtol=1e-4, atol=1e-6)
    log = info.tokens.mean(1).log_softmax(-1)
    torch.testing.assert_close(terms["aux"], 0.2 * (-0.9 * log.gather(1, y[:, None]).mean() - 0.1 * log.mean()))


def test_two_ranks_equal_one_process_at_equal_global_batch(fabric, ranks, tmp_path):
    args = [f"start.checkpoint={contract.start()}", "budget.target=0.9", CUT, "data.test_images=15"]
    fit(composed(*SMALL[:1], *SMALL[2:], *args, "arm=as"), fabric, tmp_path / "one")
    args += ["fabric.accelerator=cpu", f"run_root={tmp_path / 'two'}"]
    two = ranks(PAPER / "train.py", [*SMALL[:1], *SMALL[2:], *args])
    assert two.returncode == 0, two.stderr
    assert "2 devices x 1 micro-steps x 16" in two.stdout
    found = [tmp_path / "one/last.ckpt", next((tmp_path / "two").rglob("last.ckpt"))]
    a, b = (runs.load_checkpoint(f) for f in found)
    for weights in (
        a["model"],
        b["model"],
    ):  # softmax ignores the keys' biases: their gradient is rounding, scaled up by Adam
        for name in (n for n in weights if n.endswith("qkv.bias")):
            weights[name].view(3, -1)[1] = 0
    torch.testing.assert_close(a["model"], b["model"], rtol=1e-3, atol=2e-5)
    assert metrics_of(found[0].parent) == pytest.approx(metrics_of(found[1].parent), abs=1e-3)
    rows = [json.loads((f.parent / "metrics.jsonl").read_text().splitlines()[0]) for f in found]
    assert rows[0] == pytest.approx(rows[1], rel=1e-3), "logged losses are means over ranks"


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["budget.target=1.5"], r"budget 1\.5 must be in"),
        (["budget.target=0.2"], r"below the floor 0\.3525"),
        (["method.locations=[0,2,3]"], r"locations=\[0, 2, 3\]"),
        (["method.rule=randomly"], r"rule='randomly', allowed"),
        (["method.inference=sparse"], r"inference='sparse', allowed"),
        (["method.score=max"], r"score='max', allowed"),
        (["method.losses.budget=-1"], r"method\.losses\.budget=-1 must be >= 0"),
        (["method.schedule=own"], r"method\.schedule='own', allowed: stages, geometric"),
        (["method.match=as"], "needs rule=topk"),
        (["method.calibrate=64"], r"losses\.budget=0"),
        (["method.rule=topk"], "learns no thresholds"),
        (["method=topk", "method.keep=[5,9,1]"], "not increasing"),
        (["data.name=digits"], r"data\.name='digits', allowed"),
        (["data.root=/somewhere"], r"data\.root=/somewhere: digit_grids is embedded"),
        (["data.size=32"], r"data\.size=32.*has 24"),
        (["+data.validation=-1"], r"data\.validation=-1"),
        (["+data.subset=100"], r"data\.subset=100, allowed.*data\.train_images"),
        (["train.accumulation=3"], r"batch_size=32.*multiple of"),
        (["train.batch_size=4096"], r"fewer than train\.batch_size=4096"),
        (["train.clip=0"], "clip above 0"),
        (["train.epochs=0"], "epochs must be >= 1"),
        (["train.ema=1.5"], r"train\.ema=1\.5"),
        (["optim.betas=[0.9,1.0]"], r"optim\.betas"),
        (["train.mixup={mixup_alpha:0.8}", "train.batch_size=32", "train.accumulation=32"], "must be even"),
        (["budget.form=flops"], r"budget\.form='flops', allowed"),
        (["model.vit.patch_size=5"], "cannot be cut into patches of 5"),
    ],
)  # fmt: skip
def test_a_wrong_value_names_what_is_allowed_and_leaves_nothing(overrides, error, fabric, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "dense_start", lambda *_: pytest.fail("a start was looked for first"))
    with pytest.raises(ValueError, match=error):
        fit(config(f"run_root={tmp_path / 'runs'}", *overrides), fabric, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_own_pictures_without_their_folder_are_asked_for(fabric, tmp_path):
    cfg = composed("data=folder", "data.root=null", "arm=test", f"start.checkpoint={contract.start()}")
    with pytest.raises(ValueError, match=r"data\.root is not set"):
        fit(cfg, fabric, tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "error"),
    [("+data.kmin=1", "kmin"), ("+model.vit.widht=3", "widht"), ("train.mixup={alfa:1.0}", "alfa")],
)
def test_a_misspelt_key_fails_with_its_name(override, error, fabric, tmp_path):
    with pytest.raises(TypeError, match=error):
        fit(config(override), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nan_loss_stops_the_run_and_names_the_term(fabric, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d+: .*(ce|norm)=(nan|inf)"):
        fit(config("optim.lr=1e18", "train.epochs=20"), fabric, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "failed"


def test_preflight_writes_and_trains_nothing(fabric, tmp_path, capsys):
    fit(own(tmp_path, "preflight=true"), fabric, tmp_path / "run")
    said = capsys.readouterr().out
    assert "a random network of its shape stands for it" in said and "preflight: data found" in said
    assert not list(tmp_path.iterdir())


def test_every_config_composes_and_is_valid():
    hours = {}
    for file in (CONFIGS / "experiment").glob("*.yaml"):
        for method in ("as", "topk"):
            more = ["start.checkpoint=x"] if file.stem.startswith("lvvit") else []
            cfg = composed(f"experiment={file.stem}", f"method={method}", "arm=test", "data.root=/x", *more)
            hours[file.stem, method] = cfg.estimate.gpu_hours
            if cfg.model.vit.name in ("vit", "deit_tiny_patch16_224"):
                train.check(cfg)
    assert all(h and h > 0 for h in hours.values()), hours
    assert all(hours[e, "topk"] < hours[e, "as"] for e, _ in hours), "an arm that drops tokens in training costs less"
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        for sweep in (CONFIGS / "reproduce").rglob("*.yaml"):
            scale, name = sweep.parent.name, "counts" if "counts" in sweep.stem else "config"
            cfg = compose(name, overrides=[f"+reproduce/{scale}={sweep.stem}", "arm=test"], return_hydra_config=True)
            assert cfg.scale == scale and cfg.hydra.sweeper.params
            OmegaConf.to_container(cfg.hydra.sweeper.params)
