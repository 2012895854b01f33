"""The scripts as people run them: searches and trainings, resume in the middle, budget, two ranks, errors."""

import json
import runpy
import subprocess
import sys

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException

from common import runs, scripts
from common.data.batches import Plan
from common.data.images import Images
from dcp_nas import checkpoint, genotypes, search, train
from dcp_nas.average import mean_of
from dcp_nas.child_parent import ChildParentSearch
from dcp_nas.data import build_data
from dcp_nas.genotypes import PAPER
from dcp_nas.search_space import GENOTYPES, Genotype
from dcp_nas.tests.layouts import CONFIGS, SHORT, composed, config, search_config, write_class_folders

pytestmark = pytest.mark.usefixtures("unpainted")  # one search is a process of its own, and paints
METHODS = sorted(p.stem for p in (CONFIGS / "method").glob("*.yaml"))


def result(folder):
    return json.loads((folder / "result.json").read_text())


# --------------------------------------------------------------------------------------------------------------- search
@pytest.mark.parametrize("method", METHODS)
def test_every_search_arm_finds_a_genotype(method, fabric, tmp_path):
    search.fit(search_config(f"method={method}"), fabric, tmp_path)
    metrics = result(tmp_path)["metrics"]
    assert result(tmp_path)["status"] == "finished" and Genotype.load(tmp_path / "genotype.json").nodes == 1
    assert (tmp_path / "genotype.png").exists() and (tmp_path / "search.png").exists()
    trajectory = json.loads((tmp_path / "trajectory.json").read_text())
    assert len(trajectory) == metrics["phases"] + 1 and trajectory[0]["normal"] != trajectory[-1]["normal"]
    with_tangent = search_config(f"method={method}").method.lam > 0 and method not in (
        "direct",
        "direct_do",
        "parent",
        "cp_nas",
    )
    written = json.loads((tmp_path / "genotype.json").read_text())
    assert (
        written["found"]["data"] == {"kind": "digits"}
        and written["found"]["method"]["lam"] == search_config(f"method={method}").method.lam
    )
    assert written["cost"]["ops"] > written["cost"]["macs_fp"] > 0 and written["cost"]["classes"] == 10
    assert ("tangent_ratio" in metrics) == with_tangent
    assert metrics.get("backtrack_ratio", 0) > 0 if "_do" in method else metrics.get("backtrack_ratio", 0) == 0


@pytest.mark.parametrize("method", ["dcp_ggn_do", "cp_nas"])
def test_a_search_resumes_in_the_middle_of_a_phase_bit_for_bit(method, fabric, tmp_path, monkeypatch):
    cfg = search_config(f"method={method}", "search.steps=4", "search.save_every=3")
    search.fit(cfg, fabric, tmp_path / "whole")
    save = runs.Run.save_checkpoint

    def killed(self, state, *args):
        save(self, state, *args)
        if state["course"]["phase"] == 1 and state["course"]["step"] > 0:  # in the middle of the second phase
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        search.fit(cfg, fabric, tmp_path / "parts")
    monkeypatch.setattr(runs.Run, "save_checkpoint", save)
    search.fit(cfg, fabric, tmp_path / "parts")
    whole, parts = (runs.load_checkpoint(tmp_path / n / "last.ckpt")["algorithm"] for n in ("whole", "parts"))
    for part in {"nets", "optimizers", "arch"} & whole.keys():  # arch: alpha, its optimizer, what decoupling remembers
        torch.testing.assert_close(parts[part], whole[part], rtol=0, atol=0)
    for name in ("genotype.json", "trajectory.json", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "parts" / name).read_text(), name
    assert result(tmp_path / "whole")["metrics"] == result(tmp_path / "parts")["metrics"]


def test_a_search_goes_on_bit_for_bit_when_its_budget_is_raised(fabric, tmp_path, capsys):
    rounds = ["search.rounds=3", "search.steps=3"]
    search.fit(search_config(*rounds), fabric, tmp_path / "whole")
    search.fit(search_config(*rounds, "budget_minutes=0.0001"), fabric, tmp_path / "parts")
    early = result(tmp_path / "parts")["metrics"]
    assert (
        early["stopped_early"] == 1
        and early["phases"] < 6
        and Genotype.load(tmp_path / "parts/genotype.json").nodes == 1
    )
    assert "stopped by budget_minutes" in capsys.readouterr().out
    search.fit(search_config(*rounds, "budget_minutes=0.0001"), fabric, tmp_path / "parts")
    assert "finished already" in capsys.readouterr().out, "the same budget has nothing left"
    search.fit(search_config(*rounds), fabric, tmp_path / "parts")
    for name in ("genotype.json", "trajectory.json", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "parts" / name).read_text(), name
    assert result(tmp_path / "whole")["metrics"] == result(tmp_path / "parts")["metrics"]
    search.fit(search_config(*rounds, "budget_minutes=0.0001"), fabric, tmp_path / "parts")
    assert "finished already" in capsys.readouterr().out


def test_the_last_cell_within_the_skip_limit_is_kept(fabric, tmp_path, monkeypatch, capsys):
    seen = []

    def skips(genotype):  # the third phase is one too many
        seen.append(genotype)
        return 5 if len(seen) > 3 else 1

    monkeypatch.setattr(Genotype, "skips", skips)
    search.fit(search_config("search.rounds=3", "search.max_skips=2", "alpha.lr=1.0"), fabric, tmp_path)
    metrics = result(tmp_path)["metrics"]
    assert metrics["phases"] == 3 and metrics["stopped_early"] == 1, (
        "the start, then two good phases, then one too many"
    )
    assert "the cell before that is kept" in capsys.readouterr().out
    assert Genotype.load(tmp_path / "genotype.json") == seen[2] != seen[3]


def test_a_search_draws_the_weights_batches_and_alphas_from_their_own_halves(fabric, tmp_path, monkeypatch):
    cfg = search_config("method=parent", "search.steps=1")
    seen, step = ([], []), ChildParentSearch.step

    def watched(self, phase, *halves):
        for images, (x, _) in zip(seen, halves, strict=True):
            images.extend(x)
        return step(self, phase, *halves)

    monkeypatch.setattr(ChildParentSearch, "step", watched)
    search.fit(cfg, fabric, tmp_path)
    parts = search.split_for_search(build_data(seed=cfg.seed, **cfg.data), cfg.search.shares, seed=cfg.seed)
    own = [list(next(iter(p.batches(Plan(len(p), len(p), seed=0), fabric.device).epoch(1)))[0][0]) for p in parts]
    for images, pool in zip(seen, own, strict=True):
        assert images and all(any(torch.equal(x, y) for y in pool) for x in images)


def test_without_a_child_a_round_has_the_steps_of_both_networks(fabric):
    built = {
        name: search.build(search_config(f"method={name}"), classes=3, channels=1, steps=5, device=fabric.device)
        for name in ("parent", "dcp_ggn")
    }
    total = {name: sum(map(a.steps, range(len(a.phases())))) for name, a in built.items()}
    assert total["parent"] == total["dcp_ggn"] == 10


def test_the_seed_decides_every_part_of_a_search(fabric, tmp_path, monkeypatch):
    """The split into halves, the batches of each, the weights of the networks, alpha: each by itself."""
    subset, found = Images.subset, []

    def begun(self, *_):
        tensors = [p.detach().clone() for p in self.nets["parent"].parameters()]
        found[-1] |= {
            "weights": torch.cat([t.flatten() for t in tensors]),
            "alpha": self.arch["parent"].alphas[0].detach(),
        }
        raise KeyboardInterrupt

    monkeypatch.setattr(Images, "subset", lambda self, rows: found[-1]["halves"].append(rows) or subset(self, rows))
    monkeypatch.setattr(
        search, "Plan", lambda *a, **k: found[-1]["plans"].append(Plan(*a, **k)) or found[-1]["plans"][-1]
    )
    monkeypatch.setattr(ChildParentSearch, "step", begun)
    for seed in (0, 1):
        found.append({"halves": [], "plans": []})
        with pytest.raises(KeyboardInterrupt):
            search.fit(search_config(f"seed={seed}"), fabric, tmp_path / str(seed))
    a, b = found
    assert not torch.equal(a["weights"], b["weights"]) and not torch.equal(a["alpha"], b["alpha"])
    assert not any(torch.equal(x, y) for x, y in zip(a["halves"], b["halves"], strict=True))
    batches = [[next(plan.epoch(0))[1] for plan in one["plans"]] for one in found]
    assert len(batches[0]) == 2 and not any(torch.equal(x, y) for x, y in zip(*batches, strict=True))


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["method.hessian=kfac"], "hessian='kfac'"),
        (["method.hessian=ggn_diag", "method.chunks=3"], "chunks=3 must divide search.batch_size=20"),
        (["method.algorithm=enas"], "algorithm='enas', .*allowed"),
        (["method.network=ternary"], "network='ternary'"),
        (["search.shares=[0.9,0.5]"], "add up to at most 1"),
        (["search.shares=[0.5,0.001]"], "0 for alpha: neither may be empty"),
        (["search.batch_size=60"], "fewer than train.batch_size=60"),
        (["budget_minutes=0"], "budget_minutes=0"),
        (["search.max_skips=-1"], "max_skips=-1"),
        (["search.alpha_start=1"], "alpha would never move"),
        (["search.steps=0"], "search.steps=0"),
        (["w.clip=-1"], "w.clip=-1"),
        (["alpha.lr=-0.1"], "alpha.lr=-0.1"),
        (["method.reduction=max"], "reduction='max', .*allowed: mean, sum"),
        (["method.product=finite"], "product='finite'"),
        (["data.root=/x"], "digits is embedded"),
        (["model.cells=4", "model.reductions=[0,1,2,3]"], "cannot be halved"),
        (["fabric.precision=16-mixed"], "precision=16-mixed"),
        (["model.channels=3"], "channels=3"),
        (["model.order=pc"], "order='pc'"),
        (["method.decoupled={eta:0.1,psi:0.2,psi_lr_mult:0.1,tau:3,granularity:operation}"], "tau=3"),
    ],
)
def test_a_wrong_search_value_names_what_is_allowed_and_writes_nothing(overrides, error, fabric, tmp_path):
    with pytest.raises(ValueError, match=error):
        search.fit(search_config(*overrides), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_misspelt_search_key_fails_with_its_name(fabric, tmp_path):
    for override, name in (
        ("+method.lamda=1", "lamda"),
        ("+model.width=3", "width"),
        ("+alpha.momentum=1", "momentum"),
    ):
        with pytest.raises(TypeError, match=name):
            search.fit(search_config(override), fabric, tmp_path / "run")
    with pytest.raises(MissingConfigException, match=r"(?s)dcp_gnn.*dcp_ggn"):
        search_config("method=dcp_gnn")


# ------------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("stage", ["onestage", "real", "step2"])
def test_every_stage_trains_and_reports(stage, fabric, tmp_path, step1):
    start = [f"init.weights={step1}", f"teacher.weights={step1}"] if stage == "step2" else []
    train.fit(config(f"stage={stage}", *start), fabric, tmp_path)
    metrics = result(tmp_path)["metrics"]
    assert result(tmp_path)["status"] == "finished" and 0 <= metrics["top1"] <= metrics["top5"] <= 100
    network, _, about = checkpoint.load(tmp_path / "last.ckpt")
    kinds = {type(m).__name__ for m in network.modules() if "Conv2d" in type(m).__name__}
    assert kinds == {"onestage": {"BetaConv2d", "Conv2d"}, "real": {"Conv2d"}, "step2": {"MConv2d", "Conv2d"}}[stage]
    assert Genotype.parse(about["genotype"]) == genotypes.find_genotype(config()) and not network.training
    assert about["classes"] == [str(d) for d in range(10)] and about["channels"] == 1 and about["size"] == 8


def test_step_two_begins_with_the_weights_of_step_one(fabric, step1):
    cfg = config("stage=step2", f"init.weights={step1}")
    model = train.build(cfg, build_data(seed=0, **cfg.data), genotypes.find_genotype(cfg))
    old, new = runs.load_checkpoint(step1)["model"], model.state_dict()
    assert all(torch.equal(v, new[k]) for k, v in old.items())
    assert {k.rpartition(".")[2] for k in new.keys() - old.keys()} == {"m"}


def test_the_teacher_is_the_network_that_was_trained(fabric, step1):
    cfg = config("stage=step2", f"init.weights={step1}", f"teacher.weights={step1}")
    teacher = checkpoint.build_teacher(cfg.teacher, checkpoint.stage_path(cfg, cfg.teacher), classes=10, channels=1)
    torch.testing.assert_close(dict(teacher.state_dict()), dict(runs.load_checkpoint(step1)["model"]), rtol=0, atol=0)


def test_the_terms_of_a_batch_have_their_formulas_and_weights(step1):
    """The teacher's distribution in place of the smoothed labels; the second classifier always learns the plain labels."""
    cfg = config("stage=step2", f"init.weights={step1}", "train.label_smoothing=0.2", "stage.reconstruction=3.0")
    network = train.build(cfg, build_data(seed=0, **cfg.data), genotypes.find_genotype(cfg))
    g = torch.Generator().manual_seed(0)
    logits, auxiliary, soft = (torch.randn(6, 10, generator=g) for _ in range(3))
    labels = torch.arange(6)
    ours, second = logits.log_softmax(1), auxiliary.log_softmax(1)[range(6), labels]
    smoothed = 0.8 * ours[range(6), labels] + 0.2 * ours.mean(1)
    plain, taught = (
        train.losses(lambda x: (logits, auxiliary), network, teacher, torch.zeros(6), labels, cfg)
        for teacher in (None, lambda x: soft)
    )
    weight = cfg.train.auxiliary_weight
    assert 0 < weight < 1
    torch.testing.assert_close(plain["loss"], -(smoothed + weight * second).mean())
    torch.testing.assert_close(taught["loss"], -((soft.softmax(1) * ours).sum(1) + weight * second).mean())
    layers = [m for m in network.modules() if type(m).__name__ == "MConv2d"]
    error = sum(((m.weight - 0.02 * m.m.abs() * m.weight.sign()) ** 2).sum() for m in layers)
    torch.testing.assert_close(plain["reconstruction"], 3 * error)


def test_teacher_reconstruction_and_parity_change_what_is_trained(fabric, tmp_path, step1):
    base = ["stage=step2", f"init.weights={step1}", "train.epochs=1"]
    variants = {
        "plain": [],
        "teacher": [f"teacher.weights={step1}"],
        "none": ["stage.reconstruction=0.0"],
        "official": ["parity.official_m_grad=true"],
    }
    states = {}
    for name, extra in variants.items():
        train.fit(config(*base, *extra), fabric, tmp_path / name)
        states[name] = runs.load_checkpoint(tmp_path / name / "last.ckpt")["model"]
    m = next(k for k in states["plain"] if k.endswith(".m"))
    for name in ("teacher", "none", "official"):
        assert not torch.equal(states[name][m], states["plain"][m]), name


def test_drop_path_grows_from_epoch_to_epoch(fabric, tmp_path, monkeypatch):
    seen = []
    epoch = lambda fabric, model, network, *_, **more: seen.append(network.drop_path) or {"loss": 1.0}  # noqa: E731
    monkeypatch.setattr(train, "train_one_epoch", epoch)
    train.fit(config("train.epochs=4", "model.drop_path=0.2"), fabric, tmp_path)
    assert seen == pytest.approx([0.0, 0.05, 0.1, 0.15])


def test_top5_counts_the_five_best_classes():
    logits = torch.arange(7.0).flip(0).repeat(4, 1)  # class 0 is the first choice, class 6 the last
    found = train.classification_metrics(logits, torch.tensor([0, 4, 5, 6]))
    assert (found["top1"], found["top5"]) == (25.0, 50.0)


def test_loss_falls_and_resumed_equals_uninterrupted_bit_for_bit(resumed):
    cfg = config("train.epochs=6", "data.sigma=0.0", "model.drop_path=0.1", "model.auxiliary=true")
    whole, _ = resumed(train.fit, cfg, epoch=3)
    rows = [json.loads(line)["loss"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1] < 0.8 * rows[0]


def test_genotypes_come_from_a_search_a_file_a_name_or_a_draw(tmp_path):
    GENOTYPES["CHL_I6"].save(tmp_path / "g.json")
    found = {k: genotypes.find_genotype(config(genotype=f"genotype={k}")) for k in ("dcp_nas_l", "tangent_1")}
    assert found == {"dcp_nas_l": GENOTYPES["DCP_NAS_L"], "tangent_1": GENOTYPES["TANGENT_1"]}
    file = genotypes.find_genotype(config(f"genotype.file={tmp_path / 'g.json'}", genotype="genotype=file"))
    assert file == GENOTYPES["CHL_I6"]
    drawn = [genotypes.find_genotype(config(*o)) for o in ([], ["genotype.draw=1"], ["seed=1"], [])]
    assert drawn[0] == drawn[3] and len(set(drawn)) == 3
    where = tmp_path / "default/search_cp/seed4"
    where.mkdir(parents=True)
    missing = config(
        f"run_root={tmp_path}",
        "seed=4",
        "genotype.arm=cp",
        "genotype.search_if_missing=false",
        genotype="genotype=searched",
    )
    with pytest.raises(FileNotFoundError, match=r"run python search\.py method=cp scale=default seed=4 first"):
        genotypes.find_genotype(missing)
    GENOTYPES["TANGENT_2"].save(where / "genotype.json")
    assert genotypes.find_genotype(missing) == GENOTYPES["TANGENT_2"]
    for overrides in (["genotype.name=DCP_NAS_L"], ["genotype.draw=null"]):
        with pytest.raises(ValueError, match="exactly one of arm, file, name, draw"):
            genotypes.find_genotype(config(*overrides))
    with pytest.raises(ValueError, match=r"genotype\.name='X', allowed: DCP_NAS_L"):
        genotypes.find_genotype(config("genotype.name=X", genotype="genotype=dcp_nas_l"))


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["stage.weights=ternary"], "weights='ternary'"),
        (["optim.name=lamb"], "optim.name='lamb', allowed"),
        (["data.name=mnist"], "data.name='mnist', allowed"),
        (["train.batch_size=4096"], r"fewer than train\.batch_size=4096"),
        (["train.accumulation=3"], "batch_size=32.*multiple of"),
        (["model.channels=5"], "channels=5"),
        (["init.arm=a", "init.weights=b"], "not both"),
        (["teacher.timm=resnet3000"], "no timm model"),
        (["teacher.file=x.pth"], r"teacher\.file holds the weights of teacher\.timm"),
        (["stage=step2"], "stage=step2 begins with the weights of step 1: give init.weights"),
        (["train.clip=-1"], "train.clip=-1 must be positive"),
        (["train.clip=0"], "train.clip=0 must be positive"),
        (["train.epochs=0"], "train.epochs=0 must be positive"),
        (["evaluate.batch_size=0"], "evaluate.batch_size=0 must be positive"),
        (["optim.weight_decay=-1"], "weight_decay=-1.* must not be negative"),
        (["stage.reconstruction=-1"], r"stage\.reconstruction=-1.* must not be negative"),
        (["data.root=/x"], "digits is embedded; name the set at the root with data=folder"),
        (["data.train=5000"], "data.train=5000, allowed"),
        (["model.stem=imagenet"], "images of 8x8.*multiples of 32"),
        (["genotype.draw=-1"], "draw=-1"),
    ],
)
def test_a_wrong_value_names_what_is_allowed_and_writes_nothing(overrides, error, fabric, tmp_path):
    with pytest.raises(ValueError, match=error):
        train.fit(config(*overrides), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_or_foreign_first_step(fabric, tmp_path, step1):
    with pytest.raises(FileNotFoundError, match=r"no step-1 checkpoint at .*stage=step1"):
        train.fit(config("stage=step2", "init.arm=none", f"run_root={tmp_path}"), fabric, tmp_path / "run")
    with pytest.raises(ValueError, match="is no first step of this network"):
        train.fit(config(f"init.weights={step1}", "seed=1"), fabric, tmp_path / "run")  # another genotype
    torch.save({"x": 1}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"no checkpoint of dcp_nas/train\.py"):
        train.fit(config(f"teacher.weights={tmp_path / 'other.ckpt'}"), fabric, tmp_path / "run")
    with pytest.raises(FloatingPointError, match=r"step \d+: .*(loss|gradient norm)=(nan|inf)"):
        train.fit(config("optim.lr=1e30", "optim.name=sgd", "train.epochs=4"), fabric, tmp_path / "nan")
    assert result(tmp_path / "nan")["status"] == "failed" and not (tmp_path / "run").exists()


def test_preflights_write_nothing(fabric, tmp_path, capsys):
    train.fit(config("preflight=true"), fabric, tmp_path / "a")
    search.fit(search_config("preflight=true"), fabric, tmp_path / "b")
    assert capsys.readouterr().out.count("preflight: data found") == 2 and not list(tmp_path.iterdir())


def test_means_of_random_cells(tmp_path):
    for k, (top1, status) in enumerate([(50.0, "finished"), (60.0, "finished"), (0.0, "failed")]):
        (tmp_path / str(k)).mkdir()
        (tmp_path / f"{k}/result.json").write_text(json.dumps({"status": status, "metrics": {"top1": top1}}))
    assert mean_of([tmp_path / "0", tmp_path / "1"]) == {"top1": 55.0}
    with pytest.raises(ValueError, match="2 holds a failed run"):
        mean_of([tmp_path / "0", tmp_path / "2"])
    with pytest.raises(FileNotFoundError, match="no run in"):
        mean_of([tmp_path / "9"])


# ------------------------------------------------------------------------------------------------------------ processes
def test_search_and_train_run_from_inside_their_folder(tmp_path, monkeypatch, capfd):
    """What the README says, shortened: the search that train.py makes by itself, on its own digits, then the training."""
    start = subprocess.run
    few = ["search.rounds=1", "search.steps=2", "model.channels=2"]
    monkeypatch.setattr(
        genotypes.subprocess, "run", lambda c, **more: start([*c, *few] if "search.py" in c else c, **more)
    )
    monkeypatch.chdir(PAPER)
    monkeypatch.setattr(scripts, "_terminate_cleanly", lambda: None)
    short = ["data.train=120", "train.batch_size=32", "train.epochs=1", "model.channels=2", f"run_root={tmp_path}"]
    said = []
    for more in ([], ["force=true"]):
        monkeypatch.setattr(sys, "argv", ["train.py", *short, *more])
        GlobalHydra.instance().clear()
        runpy.run_path("train.py", run_name="__main__")
        said.append(capfd.readouterr().out)
    assert "searching it first" in said[0] and "epochs 1..1" in said[0]
    assert "searching" not in said[1] and "epochs 1..1" in said[1], "force is for the stage itself"
    found = next(tmp_path.glob("default/search_dcp_ggn_do/for-*/seed0/genotype.json"))
    file = next(tmp_path.glob("default/dcp_ggn_do/*/seed0/last.ckpt"))
    about = runs.load_checkpoint(file)["about"]
    assert Genotype.parse(about["genotype"]) == Genotype.load(found)


def test_a_search_that_train_makes_takes_its_own_configuration(tmp_path, monkeypatch):
    calls = []

    class Done:
        returncode = 0

    monkeypatch.setattr(genotypes.subprocess, "run", lambda command, **options: calls.append(command) or Done)
    base = [
        f"run_root={tmp_path}",
        "optim.lr=0.1",
        "model.channels=8",
        "stage.strict_1bit=true",
        "force=true",
        "threads=1",
    ]
    digits = {"kind": "digits"}

    def search_of(*overrides, world=1):
        calls.clear()
        with pytest.raises((FileNotFoundError, runs.RunError)):  # the search was not carried out
            genotypes.genotype_for(
                config(*base, *overrides, genotype="genotype=searched"), world_size=world, source=digits
            )
        return calls[0] if calls else None

    command = search_of("genotype.arm=cp")
    assert "method=cp" in command and "data.train=96" in command and "seed=0" in command and "threads=1" in command
    assert not [c for c in command if c.startswith(("optim", "model", "stage", "force", "train"))]
    assert any("search_cp/for-" in c for c in command), "on digits of its own, in a directory of its own"
    command = search_of("data.train=1000")
    assert not [c for c in command if c.startswith(("data", "hydra"))], "the default search"
    assert search_of("genotype.search_if_missing=false") is None and search_of(world=2) is None
    assert genotypes.genotype_path(config(*base, genotype="genotype=searched")) != genotypes.genotype_path(
        config(*base, "data.sigma=0.5", genotype="genotype=searched")
    )


def test_a_cell_found_on_other_images_is_not_trained_without_being_told(tmp_path, fabric, capsys):
    root = write_class_folders(tmp_path / "data")
    images = [
        "data=folder",
        f"data.root={root}",
        "data.size=32",
        "data.workers=0",
        "model.stem=imagenet",
        "train.batch_size=4",
    ]
    images = [*[o for o in SHORT if not o.startswith("data.")], *images, f"run_root={tmp_path}"]
    where = tmp_path / "default/search_dcp_ggn_do/seed0"
    with pytest.raises(runs.RunError, match="search on folder first"):
        train.fit(composed("config", *images), fabric, tmp_path / "run")
    where.mkdir(parents=True)
    GENOTYPES["CHL_I6"].save(where / "genotype.json", found={"data": {"kind": "digits"}})
    with pytest.raises(ValueError, match=r"was searched on digits, this training is on folder \(16 images"):
        train.fit(composed("config", *images), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    chosen = ["genotype=file", f"genotype.file={where / 'genotype.json'}", "train.epochs=1"]
    train.fit(composed("config", *images, *chosen), fabric, tmp_path / "run")
    assert "notice: the cell of" in capsys.readouterr().out and result(tmp_path / "run")["status"] == "finished"


def test_a_preflight_never_searches(fabric, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(genotypes.subprocess, "run", lambda *a, **k: pytest.fail("it searched"))
    cfg = config("preflight=true", f"run_root={tmp_path / 'r'}", genotype="genotype=searched")
    train.fit(cfg, fabric, tmp_path / "run")
    said = capsys.readouterr().out
    assert "a random cell stands for the one that is still to be searched" in said and "preflight: data found" in said
    assert not list(tmp_path.iterdir())


def test_two_ranks_train_one_network_and_evaluate_reads_it(ranks, started, tmp_path):
    extra = ["genotype=random", "train.epochs=1", "fabric.accelerator=cpu", f"hydra.run.dir={tmp_path / 'two'}"]
    done = ranks(PAPER / "train.py", [*SHORT, *extra])
    assert done.returncode == 0 and "2 devices x 1 micro-steps x 16" in done.stdout, done.stderr
    assert "notice: batch norm uses the statistics of each of the 2 ranks" in done.stdout
    weights = tmp_path / "two/last.ckpt"
    record = ["record=true", f"record_to={tmp_path}", "fabric.accelerator=cpu"]
    assert started(PAPER / "evaluate.py", [f"weights={weights}", *record]) == 0
    record = json.loads(next(tmp_path.glob("*_digits.json")).read_text())
    assert record["value"] == pytest.approx(result(tmp_path / "two")["metrics"]["top1"]) and record["n"] == 1797 - 96
    assert record["counts"]["macs_w1a32"] > 0
