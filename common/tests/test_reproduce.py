"""Sweeps of a toy paper: cells, skipping, kill and rerun, commands at paper scale, record and verify."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from joblib.externals.loky import get_reusable_executor
from omegaconf import OmegaConf

from common import reproduce
from common.metrics.readme import BEGIN, END
from common.runs import RunError, fingerprint

TRAIN = """
import random, sys
from pathlib import Path
from common import runs
from common.scripts import script

@script()
def main(cfg, fabric, out):
    run = runs.Run.open(out, cfg, fabric)
    if run is None:
        return
    with run:
        if cfg.arm == "student":
            teacher = Path(cfg.run_root) / cfg.scale / "teacher/seed0/result.json"
            assert teacher.exists(), "the earlier stage has not run"
        if (Path(__file__).parent / "break").exists() and cfg.seed == 101:
            raise ValueError("broken on purpose")
        run.finish({"top1": random.Random(cfg.seed + len(cfg.arm)).random() + cfg.gain, "loss": 0.5})

if __name__ == "__main__":
    main()
"""
CONFIG = """
defaults: [_self_, {method: plain}, {override hydra/job_logging: stdout}]
run_root: runs
scale: default
arm: "${hydra:runtime.choices.method}"
seed: 0
force: false
gain: 0
data: {root: null}
estimate: {gpu_hours: 12}
fabric: {accelerator: cpu, devices: "${oc.decode:${oc.env:LOCAL_WORLD_SIZE,1}}"}
hydra:
  output_subdir: null
  job: {chdir: false}
  run: {dir: "${run_root}/${scale}/${run_name:method}"}
  sweep: {dir: "${run_root}/${scale}", subdir: "${run_name:method}"}
"""
SWEEP = """# @package _global_
defaults: [{override /hydra/launcher: %s}]
scale: %s
hydra: {mode: MULTIRUN, sweeper: {params: %s}}
"""
CLAIMS = """
basis: text
published: []
claims:
- {id: better, statement: the student is better, kind: ordering, scale: [mini, paper], primary: true, published: null,
   metric: top1, arms: [student, plain], better: higher}
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A repository with one paper of two stages, finished once at scale mini."""
    root = tmp_path_factory.mktemp("repo")
    paper = root / "ncl_pp"  # a name that the README tables know
    files = {
        "train.py": TRAIN,
        "configs/config.yaml": CONFIG,
        "configs/method/plain.yaml": "gain: 0\n",
        "claims.yaml": CLAIMS,
        "README.md": f"# a toy\n{BEGIN}\n{END}\n",
        "../README.md": f"{BEGIN}\n{END}\n",
        "../.gitignore": "runs/\nbreak\n",
    }
    for name in ("plain", "student", "teacher"):
        files[f"configs/method/{name}.yaml"] = f"# @package _global_\ngain: {int(name == 'student')}\n"
    for scale in ("mini", "paper"):
        files[f"configs/reproduce/{scale}/10_train_teacher.yaml"] = SWEEP % (
            "basic",
            scale,
            "{method: teacher, seed: 0}",
        )
        params = '{method: "plain,student", seed: "100,101,102"}'
        files[f"configs/reproduce/{scale}/20_train_arms.yaml"] = (
            SWEEP % ("joblib", scale, params) + "after: [10_train_teacher]\n"
        )
    for name, text in files.items():
        path = paper / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (paper / "break").touch()
    for args in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "claims first"],
    ):
        subprocess.run(["git", *args], cwd=root, check=True)
    return paper


def statuses(paper):
    return {c.name(): c.status() for c in reproduce.cells(paper, "mini")}


@pytest.fixture
def in_this_process(toy, started, monkeypatch):
    """in_this_process(): from then on sweeps and cells run here, one after the other, in place of processes of their own."""

    def call():
        sweep = toy / "configs/reproduce/mini/20_train_arms.yaml"
        if "joblib" in sweep.read_text():
            sweep.write_text(sweep.read_text().replace("joblib", "basic"))
            commit = ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qam", "one after the other"]
            subprocess.run(["git", *commit], cwd=toy, check=True)
        monkeypatch.chdir(toy)
        monkeypatch.setattr(reproduce, "_call", lambda command, **_: started(toy / command[1], command[2:]))

    return call


@pytest.mark.usefixtures("unpainted")
def test_from_nothing_to_recorded_and_verified_evidence(toy, started, in_this_process, monkeypatch, capfd):
    assert set(statuses(toy).values()) == {"missing"}
    with monkeypatch.context() as m:  # the arms beside each other, in processes of joblib
        m.chdir(toy)
        m.setattr(reproduce, "_call", lambda command, **_: started(toy / command[1], command[2:]))
        assert reproduce.run(toy, "mini") == 2, "the two broken cells are counted, the others go on"
    get_reusable_executor().shutdown(kill_workers=True)
    found = statuses(toy)
    assert found.pop("plain/seed101") == found.pop("student/seed101") == "missing" and set(found.values()) == {
        "finished"
    }
    assert "not finished: plain/seed101 (missing)" in capfd.readouterr().err
    with pytest.raises(RunError, match="2 cells are not finished"):
        reproduce.record(toy, "mini")

    (toy / "break").unlink()
    in_this_process()
    before = (toy / "runs/mini/plain/seed100/result.json").read_text()
    assert reproduce.run(toy, "mini") == 0 and set(statuses(toy).values()) == {"finished"}
    assert (toy / "runs/mini/plain/seed100/result.json").read_text() == before, "finished cells are not run again"
    report = json.loads((toy / "runs/mini/report/claims.json").read_text())
    assert report["claims"][0]["verdict"] in ("supported", "inconclusive") and report["claims"][0]["effect"]["n"] == 3

    with monkeypatch.context() as m:  # a second call starts no process at all
        m.setattr(reproduce.subprocess, "Popen", lambda *a, **k: pytest.fail(f"started {a}"))
        m.setattr(reproduce.report, "main", lambda argv: 0)
        assert reproduce.run(toy, "mini") == 0

    (toy / "claims.yaml").write_text(CLAIMS + "# tuned\n")
    with pytest.raises(RunError, match="commit the claims"):
        reproduce.record(toy, "mini")
    (toy / "claims.yaml").write_text(CLAIMS)
    target = reproduce.record(toy, "mini")
    assert {"claims.json", "report.md", "cells.csv", "provenance.json"} <= {p.name for p in target.iterdir()}
    assert "the student is better" in (toy / "README.md").read_text()

    assert reproduce.verify(toy, "mini", "student/seed102"), "runs the teacher first, then the student"
    evidence = json.loads((target / "provenance.json").read_text())
    evidence["cells"][0]["metrics"]["top1"] += 0.01
    evidence["cells"].insert(
        0, {**evidence["cells"][0], "cell": "counts/seed0", "stage": "00_counts"}
    )  # trains nothing
    (target / "provenance.json").write_text(json.dumps(evidence))
    assert not reproduce.verify(toy, "mini"), "a number that differs must be noticed"
    assert "DIFFERENT" in capfd.readouterr().out
    with pytest.raises(RunError, match="no recorded cell 'plain/seed7'"):
        reproduce.verify(toy, "mini", "plain/seed7")


def test_what_reads_runs_of_which_none_has_finished_is_not_begun(toy, monkeypatch, capfd):
    teacher, *students = reproduce.cells(toy, "mini")
    begun, finished = [], set()
    monkeypatch.setattr(reproduce, "cells", lambda *_: [teacher, replace(teacher, seed=1), *students])
    monkeypatch.setattr(reproduce, "_call", lambda command, **_: begun.append(command[2]))
    monkeypatch.setattr(reproduce.Cell, "status", lambda cell: "finished" if cell.name() in finished else "missing")
    monkeypatch.setattr(reproduce.report, "main", lambda argv: 0)
    assert reproduce.run(toy, "mini") == 8 and begun == ["+reproduce/mini=10_train_teacher"]
    assert "20_train_arms: left out, it reads 10_train_teacher" in capfd.readouterr().out
    finished.add("teacher/seed0")  # another seed has failed
    assert reproduce.run(toy, "mini") == 7 and begun[2:] == ["+reproduce/mini=20_train_arms"]


def test_what_is_measured_since_the_record_is_no_difference_and_what_is_no_longer_measured_is(monkeypatch, capsys):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    machine = {"cpu": "a", "accelerator": "cpu"}, {"torch": "1"}
    old, new = ({"cell": "a/seed1", "config_sha256": "", "machine": machine[0], "versions": machine[1]} for _ in "ab")
    monkeypatch.setattr(reproduce, "again", lambda *given: (old, new))
    for recorded, now, equal, said in (
        ({"loss": 0.5}, {"loss": 0.5, "top1": 1.0}, True, "top1                             not in the record"),
        ({"loss": 0.5, "gone": 1.0}, {"loss": 0.5}, False, "recorded 1.0  now None  DIFFERENT"),
        ({"loss": 0.5}, {"loss": 0.50000005}, True, "same"), ({"loss": 0.5}, {"loss": 0.500001}, False, "DIFFERENT"),
        ({}, {"loss": 0.5}, False, "not the recorded numbers"),
    ):  # fmt: skip
        old["metrics"], new["metrics"] = recorded, now
        assert reproduce.verify(Path("ncl_pp"), "mini") is equal
        out = capsys.readouterr().out
        assert said in out and ("OPENBLAS_CORETYPE=Haswell, which chooses" in out) is not equal


def test_a_cell_is_run_again_in_the_environment_that_is_asked_for(toy, monkeypatch):
    """In one thread, with what `env` sets and without what it unsets."""
    (toy / "results/mini").mkdir(parents=True, exist_ok=True)
    recorded = [{"cell": "plain/seed100", "stage": "20_train_arms", "metrics": {}}]
    evidence = json.dumps({"code_sha256": "", "cells": recorded})
    seen = []
    monkeypatch.setattr(
        reproduce, "read_json", lambda file: json.loads(evidence) if file.name == "provenance.json" else None
    )
    monkeypatch.setattr(reproduce, "_call", lambda command, **options: seen.append(options["env"]) or 0)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "of here")
    assert reproduce.again(toy, "mini", env={"ONEDNN_MAX_CPU_ISA": None, "MORE": "1"}) == (recorded[0], None)
    reproduce.again(toy, "mini")
    assert [e.get("ONEDNN_MAX_CPU_ISA") for e in seen] == [None, None, "of here", "of here"], (
        "the teacher, then the cell"
    )
    assert [e.get("MORE") for e in seen] == ["1", "1", None, None] and all(e["OMP_NUM_THREADS"] == "1" for e in seen)


def test_cells_follow_the_sweeps_in_name_order(toy):
    found = reproduce.cells(toy, "mini")
    assert [c.stage for c in found] == ["10_train_teacher"] + ["20_train_arms"] * 6
    assert found[1].name() == "plain/seed100" and found[1].dir == toy / "runs/mini/plain/seed100"
    assert len({c.sha for c in found}) == 7
    with_data = reproduce.cells(toy, "mini", ("data.root=/datasets",))
    assert [c.sha for c in with_data] == [c.sha for c in found] and with_data[1].dir == found[1].dir


@pytest.mark.parametrize(
    "params", ['{method: "plain,student", seed: "100,101"}', '{seed: "100,101", method: "plain,student"}']
)
def test_a_cell_is_what_hydra_composes_for_it(toy, params):
    """`cells` composes an arm once and changes the seed, in whichever order a sweep goes through them."""
    file = toy / "configs/reproduce/turned/20_train_arms.yaml"
    file.parent.mkdir()
    file.write_text(SWEEP % ("basic", "turned", params))
    try:
        found = reproduce.cells(toy, "turned", ("estimate.gpu_hours=9",))
        with initialize_config_dir(config_dir=str(toy / "configs"), version_base="1.3"):
            for cell in found:
                cfg = compose("config", ["+reproduce/turned=20_train_arms", *cell.overrides], return_hydra_config=True)
                HydraConfig.instance().set_config(cfg)
                task = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
                assert cell.sha == fingerprint(task) and cell.dir == toy / "runs/turned" / cfg.hydra.sweep.subdir
                assert cell.gpu_hours == 9
    finally:
        shutil.rmtree(file.parent)
    names = {f"{arm}/seed{k}" for arm in ("plain", "student") for k in (100, 101)}
    assert {c.name() for c in found} == names and len(found) == 4


def test_the_code_hash_sees_code_and_claims_but_not_tests_or_results(toy):
    before = reproduce.code_hash(toy)
    (toy / "tests").mkdir(exist_ok=True)
    (toy / "tests/test_x.py").write_text("")
    assert reproduce.code_hash(toy) == before
    (toy / "extra.py").write_text("x = 1\n")
    assert reproduce.code_hash(toy) != before
    (toy / "extra.py").unlink()


# --------------------------------------------------------------------------------------------------------- paper scale
def dry(toy, capsys, **kwargs):
    options = {
        "extra": ("data.root=/datasets",),
        "gpus": 8,
        "per_run": 8,
        "only": None,
        "all_cells": False,
        "dry": "estimate",
    }
    assert reproduce.run_paper_scale(toy, "paper", **{**options, **kwargs}) == 0
    return capsys.readouterr().out.splitlines()


def test_dry_prints_one_command_per_cell_with_its_hours(toy, capsys):
    lines = dry(toy, capsys)
    assert len(lines) == 7 and all(
        line.startswith(f"cd {toy} && torchrun --standalone --nproc_per_node=8") for line in lines
    )
    assert (
        lines[0].endswith("# about 1.5 h, an estimate")
        and "method=teacher" in lines[0]
        and "data.root=/datasets" in lines[0]
    )
    single = dry(toy, capsys, per_run=1)
    assert " train.py +reproduce/paper=20_train_arms method=plain seed=100" in single[1] and single[1].endswith(
        "# about 12.0 h, an estimate"
    )


def test_dry_can_measure_an_arm_once_by_its_preflight(toy, capsys, monkeypatch):
    started = []

    def fake(command, **options):
        started.append(command)
        said = "preflight: data found, 0.1 s per step without data loading, about 172.4 h for 1,200 steps\n"
        return subprocess.CompletedProcess(command, 0, said, "")

    monkeypatch.setattr(reproduce.subprocess, "run", fake)
    config = toy / "configs/config.yaml"
    config.write_text(config.read_text() + "preflight: false\n")
    lines = dry(toy, capsys, dry="measure")
    assert len(lines) == 7 and all(
        line.endswith("# about 170 h, an estimate from steps measured on this machine") for line in lines
    )
    assert len(started) == len({line.split("method=")[1].split()[0] for line in lines}) < 7
    assert all(command[-1] == "preflight=true" for command in started)
    monkeypatch.setattr(
        reproduce.subprocess, "run", lambda c, **o: subprocess.CompletedProcess(c, 1, "", "x\nno data\n")
    )
    with pytest.raises(RunError, match="no data"):
        dry(toy, capsys, dry="measure")


def test_only_takes_the_cells_of_one_claim_and_the_stages_before(toy, capsys):
    lines = dry(toy, capsys, only="better")
    assert len(lines) == 7
    with pytest.raises(RunError, match="no claim 'other'.*better"):
        dry(toy, capsys, only="other")


def test_only_at_a_small_scale_runs_single_cells(toy, monkeypatch, tmp_path):
    started = []
    status = {True: "finished", False: "missing"}
    monkeypatch.setattr(reproduce.Cell, "status", lambda self: status[self.arm == "teacher" and bool(started)])
    monkeypatch.setattr(reproduce, "_call", lambda command, **kwargs: started.append(command))
    monkeypatch.setattr(reproduce.report, "main", lambda argv: 0)
    assert reproduce.run(toy, "mini", only="better") == 6
    assert len(started) == 7 and all("hydra.mode=RUN" in command for command in started)
    assert "method=student" in started[-1] and "seed=102" in started[-1]


def test_nothing_starts_at_paper_scale_unasked(toy):
    options = {"extra": (), "gpus": 1, "per_run": 1, "only": None}
    with pytest.raises(RunError, match="ONLY=<claim> or ALL=1"):
        reproduce.run_paper_scale(toy, "paper", all_cells=False, **options)
    with pytest.raises(RunError, match="GPUS=3 must be a multiple of PER_RUN=2"):
        reproduce.run_paper_scale(toy, "paper", all_cells=True, **{**options, "gpus": 3, "per_run": 2})


def test_paper_scale_pins_free_cards_and_judges_by_result_json(toy, monkeypatch):
    started = []

    def fake(command, cwd, env, stdout, stderr):
        started.append((command, env["CUDA_VISIBLE_DEVICES"]))

    monkeypatch.setattr(reproduce, "_call", fake)
    monkeypatch.setattr(reproduce.report, "main", lambda argv: 0)
    failed = reproduce.run_paper_scale(toy, "paper", extra=(), gpus=2, per_run=1, only=None, all_cells=True)
    assert failed == 7 == len(started), "an exit status alone does not make a run complete"
    assert {cards for _, cards in started} <= {"0", "1"}
    assert "method=teacher" in started[0][0], "the first stage ends before the second begins"


def test_errors_name_paper_scale_and_sweep(toy, capsys):
    root = str(toy.parent)
    assert reproduce.main(["run", "q_vit", "--root", root]) == 1
    assert "q_vit: no such paper here, or not started yet" in capsys.readouterr().err
    assert reproduce.main(["run", "ncl_pp", "--scale", "maxi", "--root", root]) == 1
    assert "no scale 'maxi'; its scales: mini, paper" in capsys.readouterr().err
    assert reproduce.main(["verify", "ncl_pp", "--scale", "paper", "--root", root]) == 1
    assert "nothing recorded" in capsys.readouterr().err
    bad = toy / "configs/reproduce/mini/30_search.yaml"
    bad.write_text("")
    with pytest.raises(RunError, match=r"search\.py does not exist"):
        reproduce.stages(toy, "mini")
    bad.unlink()


def test_every_target_of_the_makefile_is_in_its_help():
    root = Path(__file__).resolve().parents[2]
    text = (root / "Makefile").read_text()
    phony = set(text.split(".PHONY: ")[1].splitlines()[0].split()) | {
        "record-<paper>",
        "verify-<paper>",
        "evaluate-<paper>",
    }
    shown = subprocess.run(["make", "help"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert not {t for t in phony - {"help"} if f"make {t}" not in shown}
    assert "not started yet:" in shown


@pytest.mark.parametrize(("scale", "extra"), [("real_set", ("data.root=DATA",)), ("mini", ())])
def test_a_record_needs_no_data_folder(toy, scale, extra, monkeypatch):
    """Where the data lay is no part of what a run is; sweeps of real sets cannot be composed without a folder."""
    called = []
    monkeypatch.setattr(reproduce, "record", lambda *given: called.append(given))
    assert reproduce.main(["record", toy.name, "--scale", scale, "--root", str(toy.parent)]) == 0
    assert called == [(toy, scale, extra, "")]
