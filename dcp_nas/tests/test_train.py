"""The scripts as people run them: searches and trainings, resume in the middle, budget, two ranks, errors."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from PIL import Image

from common import runs
from dcp_nas import checkpoint, search, train
from dcp_nas.average import mean_of
from dcp_nas.checkpoint import PAPER
from dcp_nas.search_space import GENOTYPES, Genotype

CONFIGS = PAPER / "configs"
METHODS = sorted(p.stem for p in (CONFIGS / "method").glob("*.yaml"))
SEARCH = ["search.steps=2", "search.rounds=1", "search.batch_size=20", "data.train=80", "model.channels=2", "model.cells=2",
          "model.nodes=1", "cp_nas.samples=1", "arm=test"]  # fmt: skip
SHORT = ["train.epochs=2", "train.save_every=1", "train.batch_size=32", "data.train=96", "model.channels=4", "arm=test"]


def search_config(*overrides):
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        return compose("search", overrides=[*SEARCH, *overrides])


def config(*overrides, genotype="genotype=random"):
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        return compose("config", overrides=[*SHORT, genotype, *overrides])


@pytest.fixture(scope="module")
def fabric():
    return runs.launch({"accelerator": "cpu", "devices": 1})


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
    assert ("tangent_ratio" in metrics) == with_tangent
    assert metrics.get("backtrack_ratio", 0) > 0 if "_do" in method else metrics.get("backtrack_ratio", 0) == 0


@pytest.mark.parametrize("method", ["dcp_ggn_do", "cp_nas"])
def test_a_search_resumes_in_the_middle_of_a_phase_bit_for_bit(method, fabric, tmp_path, monkeypatch):
    cfg = search_config(f"method={method}", "search.steps=4", "search.save_every=3")
    search.fit(cfg, fabric, tmp_path / "whole")
    save = runs.Run.save_checkpoint

    def killed(self, state, *args):
        save(self, state, *args)
        if state["phase"] == 1 and state["step"] > 0:  # in the middle of the second phase
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        search.fit(cfg, fabric, tmp_path / "parts")
    monkeypatch.setattr(runs.Run, "save_checkpoint", save)
    search.fit(cfg, fabric, tmp_path / "parts")
    whole, parts = (runs.load_checkpoint(tmp_path / n / "last.ckpt")["algorithm"] for n in ("whole", "parts"))
    for part in ("nets", "optimizers"):
        torch.testing.assert_close(parts[part], whole[part], rtol=0, atol=0)
    for name in ("genotype.json", "trajectory.json", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "parts" / name).read_text(), name
    assert result(tmp_path / "whole")["metrics"] == result(tmp_path / "parts")["metrics"]


def test_budget_and_skip_limit_end_a_search_early_with_a_genotype(fabric, tmp_path, capsys):
    search.fit(search_config("search.rounds=50", "budget_minutes=0.005"), fabric, tmp_path / "a")
    metrics = result(tmp_path / "a")["metrics"]
    assert (
        metrics["stopped_early"] == 1
        and metrics["phases"] < 100
        and "stopped by budget_minutes" in capsys.readouterr().out
    )
    assert Genotype.load(tmp_path / "a/genotype.json").nodes == 1
    search.fit(search_config("search.rounds=2", "search.max_skips=-1"), fabric, tmp_path / "b")
    assert result(tmp_path / "b")["metrics"]["phases"] == 1 and "skip connections" in capsys.readouterr().out
    search.fit(search_config(), fabric, tmp_path / "c")
    assert result(tmp_path / "c")["metrics"]["stopped_early"] == 0


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
@pytest.fixture(scope="module")
def step1(fabric, tmp_path_factory):
    folder = tmp_path_factory.mktemp("step1")
    train.fit(config("stage=step1"), fabric, folder)
    return folder / "last.ckpt"


@pytest.mark.parametrize("stage", ["onestage", "real", "step2"])
def test_every_stage_trains_and_reports(stage, fabric, tmp_path, step1):
    start = [f"init.weights={step1}", f"teacher.weights={step1}"] if stage == "step2" else []
    train.fit(config(f"stage={stage}", *start), fabric, tmp_path)
    metrics = result(tmp_path)["metrics"]
    assert result(tmp_path)["status"] == "finished" and 0 <= metrics["top1"] <= metrics["top5"] <= 100
    network, state = checkpoint.load_network(tmp_path / "last.ckpt")
    kinds = {type(m).__name__ for m in network.modules() if "Conv2d" in type(m).__name__}
    assert kinds == {"onestage": {"BetaConv2d", "Conv2d"}, "real": {"Conv2d"}, "step2": {"MConv2d", "Conv2d"}}[stage]
    assert Genotype.parse(state["genotype"]) == checkpoint.find_genotype(config())


def test_step_two_begins_with_the_weights_of_step_one(fabric, step1):
    from dcp_nas.data import build_data

    cfg = config("stage=step2", f"init.weights={step1}")
    model = train.build(cfg, build_data(seed=0, **cfg.data), checkpoint.find_genotype(cfg))
    old, new = runs.load_checkpoint(step1)["model"], model.state_dict()
    assert all(torch.equal(v, new[k]) for k, v in old.items())
    assert {k.rpartition(".")[2] for k in new.keys() - old.keys()} == {"m"}


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


def test_loss_falls_and_resumed_equals_uninterrupted_bit_for_bit(fabric, tmp_path, monkeypatch):
    cfg = config("train.epochs=6", "data.sigma=0.0", "model.drop_path=0.1", "model.auxiliary=true")
    train.fit(cfg, fabric, tmp_path / "whole")
    rows = [json.loads(line)["loss"] for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert rows[-1] < 0.8 * rows[0]
    log = runs.Run.log

    def killed(self, **row):
        log(self, **row)
        if row["epoch"] == 3:
            raise KeyboardInterrupt  # after the epoch, before its checkpoint

    monkeypatch.setattr(runs.Run, "log", killed)
    with pytest.raises(KeyboardInterrupt):
        train.fit(cfg, fabric, tmp_path / "parts")
    monkeypatch.setattr(runs.Run, "log", log)
    train.fit(cfg, fabric, tmp_path / "parts")
    whole, parts = (runs.load_checkpoint(tmp_path / n / "last.ckpt")["model"] for n in ("whole", "parts"))
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "parts/metrics.jsonl").read_text()


def test_genotypes_come_from_a_search_a_file_a_name_or_a_draw(tmp_path):
    GENOTYPES["CHL_I6"].save(tmp_path / "g.json")
    found = {k: checkpoint.find_genotype(config(genotype=f"genotype={k}")) for k in ("dcp_nas_l", "tangent_1")}
    assert found == {"dcp_nas_l": GENOTYPES["DCP_NAS_L"], "tangent_1": GENOTYPES["TANGENT_1"]}
    file = checkpoint.find_genotype(config(f"genotype.file={tmp_path / 'g.json'}", genotype="genotype=file"))
    assert file == GENOTYPES["CHL_I6"]
    drawn = [checkpoint.find_genotype(config(*o)) for o in ([], ["genotype.draw=1"], ["seed=1"], [])]
    assert drawn[0] == drawn[3] and len(set(drawn)) == 3
    where = tmp_path / "default/search_cp/seed4"
    where.mkdir(parents=True)
    missing = config(f"run_root={tmp_path}", "seed=4", genotype="genotype=cp")
    with pytest.raises(FileNotFoundError, match=r"run python search\.py method=cp scale=default seed=4 first"):
        checkpoint.find_genotype(missing)
    GENOTYPES["TANGENT_2"].save(where / "genotype.json")
    assert checkpoint.find_genotype(missing) == GENOTYPES["TANGENT_2"]
    for overrides in (["genotype.name=DCP_NAS_L"], ["genotype.draw=null"]):
        with pytest.raises(ValueError, match="exactly one of arm, file, name, draw"):
            checkpoint.find_genotype(config(*overrides))
    with pytest.raises(ValueError, match=r"genotype\.name='X', allowed: DCP_NAS_L"):
        checkpoint.find_genotype(config("genotype.name=X", genotype="genotype=dcp_nas_l"))


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
    ],
)
def test_a_wrong_value_names_what_is_allowed_and_writes_nothing(overrides, error, fabric, tmp_path):
    with pytest.raises(ValueError, match=error):
        train.fit(config(*overrides), fabric, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_or_foreign_first_step(fabric, tmp_path, step1):
    with pytest.raises(FileNotFoundError, match=r"no step-1 checkpoint at .*stage=step1"):
        train.fit(config("init.arm=none", f"run_root={tmp_path}"), fabric, tmp_path / "run")
    with pytest.raises(ValueError, match="is no first step of this network"):
        train.fit(config(f"init.weights={step1}", "seed=1"), fabric, tmp_path / "run")  # another genotype
    torch.save({"x": 1}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"no checkpoint of dcp_nas/train\.py"):
        train.fit(config(f"teacher.weights={tmp_path / 'other.ckpt'}"), fabric, tmp_path / "run")
    with pytest.raises(FloatingPointError, match=r"step \d+: (loss|gradient norm)=(nan|inf)"):
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


def test_own_images_in_class_folders_are_searched_and_trained(fabric, tmp_path):
    for split, n in (("train", 8), ("val", 2)):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (40, 36), (30 * i, 40, 200 if name == "a" else 0)).save(
                    tmp_path / "data" / split / name / f"{i}.png"
                )
    images = ["data.name=folder", f"data.root={tmp_path / 'data'}", "+data.size=32", "model.stem=imagenet"]
    search.fit(search_config(*images, "search.batch_size=4"), fabric, tmp_path / "search")
    found = ["genotype.draw=null", f"genotype.file={tmp_path / 'search/genotype.json'}", "train.batch_size=4"]
    train.fit(config(*images, *found), fabric, tmp_path / "train")
    assert result(tmp_path / "train")["status"] == "finished"
    state = runs.load_checkpoint(tmp_path / "train/last.ckpt")
    assert state["classes"] == 2 and Genotype.parse(state["genotype"]) == Genotype.load(
        tmp_path / "search/genotype.json"
    )


# ------------------------------------------------------------------------------------------------------------ processes
def run_script(*command, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=PAPER, env=environment, capture_output=True, text=True, **more
    )


def test_search_and_train_run_from_inside_their_folder(tmp_path):
    short = [o for o in SEARCH if o != "arm=test"]
    done = run_script(
        "search.py", *short, f"run_root={tmp_path}", "hydra.run.dir=${run_root}/${scale}/${arm}/seed${seed}"
    )
    assert done.returncode == 0 and "written to" in done.stdout, done.stderr
    done = run_script("train.py", *[o for o in SHORT if o != "arm=test"], "train.epochs=1", f"run_root={tmp_path}")
    assert done.returncode == 0 and "epochs 1..1" in done.stdout and "searching it first" not in done.stdout, (
        done.stderr
    )
    file = next(tmp_path.glob("default/dcp_ggn/*/seed0/last.ckpt"))
    found = Genotype.parse(runs.load_checkpoint(file)["genotype"])
    assert found == Genotype.load(tmp_path / "default/search_dcp_ggn/seed0/genotype.json")


def test_a_missing_search_is_made_first_only_where_it_is_asked_for(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(checkpoint.subprocess, "run", lambda command, **options: calls.append(command))
    checkpoint.search_if_missing(config(f"run_root={tmp_path}", genotype="genotype=dcp_ggn"), world_size=1)
    assert "search.py" in calls[0] and "method=dcp_ggn" in calls[0] and "scale=default" in calls[0]
    for overrides, genotype, world in (
        (["genotype.search_if_missing=false"], "dcp_ggn", 1),
        ([], "cp", 1),
        ([], "random", 1),
        ([], "dcp_ggn", 2),
    ):
        checkpoint.search_if_missing(
            config(f"run_root={tmp_path}", *overrides, genotype=f"genotype={genotype}"), world_size=world
        )
    assert len(calls) == 1


def test_two_ranks_train_one_network_and_evaluate_reads_it(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    extra = ["genotype=random", "train.epochs=1", "fabric.accelerator=cpu", f"hydra.run.dir={tmp_path / 'two'}"]
    done = run_script(*torchrun, *SHORT, *extra)
    assert done.returncode == 0 and "2 devices x 1 micro-steps x 16" in done.stdout, done.stderr
    weights = tmp_path / "two/last.ckpt"
    done = run_script(
        "evaluate.py", f"weights={weights}", "record=true", f"record_to={tmp_path}", "fabric.accelerator=cpu"
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(next(tmp_path.glob("*_digits.json")).read_text())
    assert record["value"] == pytest.approx(result(tmp_path / "two")["metrics"]["top1"]) and record["n"] == 1797 - 96
    assert record["counts"]["macs_w1a32"] > 0


def test_a_checkpoint_predicts_and_exports(step1, tmp_path, fabric):
    from dcp_nas.export import export
    from dcp_nas.predict import image_tensor, predict

    train.fit(config("stage=step2", f"init.weights={step1}", "train.epochs=1"), fabric, tmp_path / "run")
    found = export(str(tmp_path / "run/last.ckpt"), tmp_path / "model")
    assert max(found["onnx"], found["packed"], found["deployed"]) < 1e-4 and (tmp_path / "model.onnx").exists()
    network, state = checkpoint.load_network(tmp_path / "run/last.ckpt")
    Image.new("L", (8, 8), 100).save(tmp_path / "a.png")
    best = predict(network, image_tensor(tmp_path / "a.png", channels=1, size=8, data="digits"), top=3)
    assert len(best) == 3 and best[0][1] >= best[1][1] >= best[2][1] and state["size"] == 8
