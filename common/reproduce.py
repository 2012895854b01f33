"""Run, record, verify and compare the evidence of one paper:  python -m common.reproduce {run,...} <paper> [--scale mini]

A scale is a folder of Hydra sweeps `<paper>/configs/reproduce/<scale>/<nn>_<script>[_<what>].yaml`. `run` carries them out in
name order, skips finished cells and ends with the report; a sweep whose runs read those of earlier ones names them under
`after: [10_train_teacher]`. At `--scale paper` every cell is a process of its own (torchrun
for several devices), and `--dry` prints the commands instead, one line per cell, with hours: estimated, or with `--dry measure`
from a preflight of every arm on this machine (with its data). `record` copies the report to
`<paper>/results/<scale>/`; `verify` runs one recorded cell again and compares its numbers.
"""

import argparse
import contextlib
import itertools
import json
import os
import queue
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.loop import two_digits
from common.metrics import report, tables
from common.metrics.claims import load_claims, load_document
from common.runs import RunError, fingerprint, git_commit, hash_files, read_json
from common.scripts import one_line, override

ROOT = Path(__file__).resolve().parents[1]
# What keeps each library from what lies above AVX2.
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "NUMBA_CPU_NAME": "haswell",  # alone it leaves AVX-512 on where the machine has it
    "NUMBA_CPU_FEATURES": "+avx2,+avx,+bmi,+bmi2,+popcnt,+fma,+sse4.2,+sse4.1,+ssse3,+sse3,+lzcnt,+cx16",
}


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: where it writes (`dir`), its arm as the report names it, and the fingerprint it will have.

    after: the stages whose runs it reads, from the key `after` of its sweep file."""

    stage: str
    script: str
    overrides: tuple[str, ...]
    dir: Path
    arm: str
    seed: int
    sha: str
    gpu_hours: float | None
    has_preflight: bool
    after: tuple[str, ...]

    def status(self) -> str:
        """finished | running | failed | missing | other (finished or begun with another configuration)."""
        result = read_json(self.dir / "result.json")
        if result is None:
            return "missing"
        return result["status"] if result["config_sha256"] == self.sha else "other"

    def name(self) -> str:
        return f"{self.arm}/seed{self.seed}"


def stages(paper: Path, scale: str) -> list[Path]:
    """The sweep files of a scale in the order in which they run. Raises `RunError` if there are none."""
    folder = paper / "configs/reproduce" / scale
    found = sorted(folder.glob("*.yaml"))
    if not found:
        scales = sorted(p.name for p in folder.parent.glob("*") if p.is_dir())
        raise RunError(f"{paper.name} has no scale '{scale}'; its scales: {', '.join(scales) or 'none'}")
    for file in found:
        if not (paper / f"{_script(file)}.py").exists():
            raise RunError(
                f"{file}: the name must be <nn>_<script>[_<what>].yaml and {_script(file)}.py does not exist"
            )
    return found


def cells(paper: Path, scale: str, extra: tuple[str, ...] = ()) -> list[Cell]:
    """Every cell of a scale, composed as Hydra will compose it. extra: overrides that all cells get (data.root=...)."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(paper / "configs"), version_base="1.3"):
        return [cell for file in stages(paper, scale) for cell in _cells_of(paper, scale, file, extra)]


def _cells_of(paper: Path, scale: str, file: Path, extra: tuple[str, ...]) -> list[Cell]:
    script = _script(file)
    config = script if (paper / f"configs/{script}.yaml").exists() else "config"
    sweep = (f"+reproduce/{scale}={file.stem}",)
    params = _compose(config, (*sweep, *extra)).hydra.sweeper.params or {}
    found, composed = [], {}
    for overrides in itertools.product(*(_choices(f"{key}={value}") for key, value in params.items())):
        seeds = [o for o in overrides if o.startswith("seed=")]
        arm = tuple(o for o in overrides if o not in seeds)
        if arm not in composed:  # Hydra takes a tenth of a second for each: the seeds of an arm differ in nothing else
            cfg = _compose(config, (*sweep, *extra, *overrides))
            task = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])  # type: ignore[arg-type]
            composed[arm] = cfg, task, HydraConfig.instance().cfg
        cfg, task, HydraConfig.instance().cfg = composed[arm]
        for seed in seeds:
            value: Any = OverridesParser.create().parse_override(seed).value()
            cfg.seed = task.seed = value
        subdir = Path(cfg.hydra.sweep.subdir)
        found.append(
            Cell(
                stage=file.stem,
                script=script,
                overrides=overrides,
                dir=paper / cfg.hydra.sweep.dir / subdir,
                arm=subdir.parent.as_posix(),  # see common.scripts.run_name
                seed=task.seed,
                sha=fingerprint(task),
                gpu_hours=OmegaConf.select(task, "estimate.gpu_hours"),
                has_preflight="preflight" in task,
                after=tuple(OmegaConf.select(task, "after", default=())),
            )
        )
    return found


def _script(file: Path) -> str:
    return file.stem.split("_")[1] if "_" in file.stem else ""


def _choices(override: str) -> list[str]:
    parsed = OverridesParser.create().parse_override(override)
    key = override.split("=", 1)[0]
    if not parsed.is_sweep_override():  # as Hydra writes it in directory names: false becomes False
        return [f"{key}={parsed.get_value_element_as_str()}"]
    return [f"{key}={value}" for value in parsed.sweep_string_iterator()]


def _compose(config: str, overrides: tuple[str, ...]) -> DictConfig:
    cfg = compose(config, overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    return cfg


# --------------------------------------------------------------------------------------------------------------- run
def run(paper: Path, scale: str, *, extra: tuple[str, ...] = (), only: str | None = None) -> int:
    """Carry out the sweeps of a small scale with Hydra's multirun, then report. Returns the number of unfinished cells."""
    todo = cells(paper, scale, extra)
    if only:
        todo = _of_claim(paper, scale, todo, only)
    for stage, group in itertools.groupby(todo, key=lambda c: c.stage):
        group = list(group)
        open_cells = [c for c in group if c.status() != "finished"]
        print(
            f"{paper.name} {scale} {stage}: {len(group) - len(open_cells)} of {len(group)} cells finished", flush=True
        )
        if not open_cells:
            continue
        read = [[c for c in todo if c.stage == stage] for stage in group[0].after]
        if empty := [cells[0].stage for cells in read if cells and all(c.status() != "finished" for c in cells)]:
            print(f"{paper.name} {scale} {stage}: left out, it reads {', '.join(empty)}, of which no cell has finished")
            continue
        env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        if only:
            for cell in open_cells:
                _call([sys.executable, *_command(cell, scale, extra, per_run=1)[1:]], cwd=paper, env=env)
        else:
            sweep = [sys.executable, f"{group[0].script}.py", f"+reproduce/{scale}={stage}", *extra]
            _call(sweep, cwd=paper, env=env)
    unfinished = [c for c in todo if c.status() != "finished"]
    _tell(unfinished)
    report.main([paper.name, scale, "--root", str(paper.parent)])
    return len(unfinished)


def run_paper_scale(
    paper: Path,
    scale: str,
    *,
    extra: tuple[str, ...],
    gpus: int,
    per_run: int,
    only: str | None,
    all_cells: bool,
    dry: str = "",
) -> int:
    """Every open cell as a process: `gpus // per_run` at a time, each on its own cards. dry: estimate | measure prints the
    commands with their hours instead.

    Nothing starts without `only` (a claim's id) or `all_cells`. Returns the number of cells that did not finish."""
    todo = [c for c in cells(paper, scale, extra) if c.status() != "finished"]
    if only:
        todo = _of_claim(paper, scale, todo, only)
    headline = {a for c in load_claims(paper) if c["primary"] and scale in c["scale"] for a in c["arms"]}
    todo.sort(key=lambda c: (c.stage, c.arm not in headline))
    if not dry and not (only or all_cells):
        raise RunError(f"{len(todo)} cells at paper scale: choose ONLY=<claim> or ALL=1, or look at them with DRY=1")
    if gpus % per_run or per_run < 1:
        raise RunError(f"GPUS={gpus} must be a multiple of PER_RUN={per_run}")
    if dry:
        measured: dict[str, str | None] = {}  # seeds of an arm take as long
        for cell in todo:
            command = _command(cell, scale, extra, per_run)
            if dry == "measure" and cell.arm not in measured:
                measured[cell.arm] = _measured_hours(cell, command, paper)
            estimate = f"about {cell.gpu_hours / per_run:.1f} h, an estimate" if cell.gpu_hours else "hours not known"
            hours = measured.get(cell.arm) or estimate
            print(f"cd {shlex.quote(str(paper))} && {shlex.join(command)}  # {hours}", flush=True)
        return 0
    failed: list[Cell] = []
    for _, group in itertools.groupby(todo, key=lambda c: c.stage):  # a stage may read what the one before it wrote
        waiting: queue.SimpleQueue[Cell] = queue.SimpleQueue()
        for cell in group:
            waiting.put(cell)
        slots = [range(i, i + per_run) for i in range(0, gpus, per_run)]
        workers = [threading.Thread(target=_work, args=(waiting, slot, paper, scale, extra, failed)) for slot in slots]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    _tell(failed)
    report.main([paper.name, scale, "--root", str(paper.parent)])
    return len(failed)


def _measured_hours(cell: Cell, command: list[str], paper: Path) -> str | None:
    """The hours that the preflight of a cell measures on this machine; None for a script that has none, or if it says none."""
    if not cell.has_preflight:
        return None
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.run([*command, "preflight=true"], cwd=paper, env=env, capture_output=True, text=True)
    if process.returncode:
        raise RunError(f"{cell.name()}: {(process.stderr.strip().splitlines() or ['the preflight failed'])[-1]}")
    hours = [float(h) for h in re.findall(r"about (\S+) h for [\d,]+ steps", process.stdout)]
    return f"about {two_digits(sum(hours))} h, an estimate from steps measured on this machine" if hours else None


_RUNNING: set[subprocess.Popen] = set()


def _call(command: list[str], **options: Any) -> int:
    """Runs a command in a process group of its own and returns its exit status; whatever ends this process ends the group."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    _RUNNING.add(process)
    try:
        return process.wait()
    finally:
        _RUNNING.discard(process)
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """SIGTERM to the group of a process, SIGKILL after ten seconds. A process that has ended leaves no workers behind."""
    for kind, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
            os.killpg(process.pid, kind)
            process.wait(seconds)
            if kind == signal.SIGTERM and process.returncode is not None:
                return


def _stop(*_: Any) -> None:
    for process in list(_RUNNING):
        _end(process)
    raise KeyboardInterrupt


def _tell(unfinished: list[Cell]) -> None:
    for cell in unfinished:
        where = f"see {cell.dir}" if cell.dir.exists() else "it did not begin, its error stands above"
        print(f"not finished: {cell.name()} ({cell.status()}), {where}", file=sys.stderr)


def _command(cell: Cell, scale: str, extra: tuple[str, ...], per_run: int) -> list[str]:
    launcher = [Path(sys.executable).name]
    if per_run > 1:
        launcher = ["torchrun", "--standalone", f"--nproc_per_node={per_run}"]
    single = ["hydra.mode=RUN", "hydra.run.dir=${hydra.sweep.dir}/${hydra.sweep.subdir}"]
    return [*launcher, f"{cell.script}.py", f"+reproduce/{scale}={cell.stage}", *cell.overrides, *extra, *single]


def _work(
    waiting: "queue.SimpleQueue[Cell]", slot: range, paper: Path, scale: str, extra: tuple[str, ...], failed: list
) -> None:
    cards = ",".join(map(str, slot))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    while True:
        try:
            cell = waiting.get_nowait()
        except queue.Empty:
            return
        cell.dir.mkdir(parents=True, exist_ok=True)
        print(f"start {cell.name()} on {cards}, log in {cell.dir / 'console.log'}", flush=True)
        with (cell.dir / "console.log").open("a") as log:
            env = os.environ | {"CUDA_VISIBLE_DEVICES": cards, "PATH": path}
            _call(_command(cell, scale, extra, len(slot)), cwd=paper, env=env, stdout=log, stderr=log)
        if cell.status() != "finished":  # the file, not the exit status, says whether a run is complete
            failed.append(cell)


def _of_claim(paper: Path, scale: str, todo: list[Cell], claim_id: str) -> list[Cell]:
    claims = {c["id"]: c for c in load_claims(paper) if scale in c["scale"]}
    if claim_id not in claims:
        raise RunError(
            f"{paper.name} has no claim '{claim_id}' at scale {scale}; there are: {', '.join(claims) or 'none'}"
        )
    wanted = [c for c in todo if c.arm in claims[claim_id]["arms"]]
    return [c for c in todo if c in wanted or any(c in _read_by(cell, todo) for cell in wanted)]


def _read_by(cell: Cell, everything: list[Cell]) -> list[Cell]:
    """The cells of earlier stages that a cell may read, directly or not: those with its seed, else all of a stage."""
    needed: list[Cell] = []
    for stage in cell.after:
        members = [c for c in everything if c.stage == stage]
        for c in [c for c in members if c.seed == cell.seed] or members:
            needed += [*_read_by(c, everything), c]
    return list(dict.fromkeys(needed))


# ---------------------------------------------------------------------------------------------------- record, verify
def code_hash(paper: Path) -> str:
    """Hash of what produces the numbers: the folder's code, configs and claims, and common/ (tests and results left out)."""
    files = [paper / "claims.yaml"]
    for base in (paper, paper.parent / "common"):
        inside = [p for pattern in ("*.py", "*.yaml") for p in base.rglob(pattern)]
        files += [p for p in inside if not {"tests", "runs", "results"} & set(p.relative_to(base).parts)]
    return hash_files(set(files), paper.parent)


def record(paper: Path, scale: str, extra: tuple[str, ...] = (), name: str = "") -> Path:
    """Copy the report of a complete scale to results/<scale>/ with its provenance, or to results/external/<name>/<scale>/ as
    somebody's own run beside the record. Returns that folder.

    Raises `RunError` if cells are open, or claims or sweeps are not committed (both come before the evidence)."""
    todo = cells(paper, scale, extra)
    open_cells = [c.name() for c in todo if c.status() != "finished"]
    if open_cells:
        raise RunError(
            f"{len(open_cells)} cells are not finished, e.g. {open_cells[0]}: run make reproduce-{paper.name} first"
        )
    declared = ["claims.yaml", "configs"]
    changed = subprocess.run(
        ["git", "status", "--porcelain", *declared], cwd=paper, capture_output=True, text=True
    ).stdout
    if changed.strip() and git_commit(paper):
        raise RunError(f"commit the claims and sweeps before recording evidence for them:\n{changed}")
    if name and not re.fullmatch(r"[\w-]+", name):
        raise RunError(f"NAME={name}: letters, digits, - and _ only")
    source, target = paper / "runs" / scale / "report", paper / "results" / (f"external/{name}" if name else "") / scale
    report.main([paper.name, scale, "--root", str(paper.parent)])
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    recorded = []
    for cell in todo:
        result = read_json(cell.dir / "result.json")
        keep = ("metrics", "seconds", "config_sha256", "commit", "machine", "versions")
        recorded.append({"stage": cell.stage, "cell": cell.name(), **{k: result[k] for k in keep}})
    evidence = {"paper": paper.name, "scale": scale, "code_sha256": code_hash(paper), "cells": recorded}
    (target / "provenance.json").write_text(json.dumps(evidence, indent=1) + "\n")
    report.update_readmes(paper.parent, check=False)
    print(f"recorded {len(recorded)} cells in {target}")
    return target


def again(
    paper: Path, scale: str, name: str = "", extra: tuple[str, ...] = (), env: Mapping[str, str | None] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(recorded, new) result of one recorded cell, by default the first that is more than counts, run with the earlier
    stages it may read; `env`: further variables of its environment, None for one that is to be unset."""
    evidence = read_json(paper / "results" / scale / "provenance.json")
    if evidence is None:
        raise RunError(f"nothing recorded for {paper.name} at scale {scale}: make record-{paper.name} SCALE={scale}")
    print(
        f"code, configs and claims: {'as recorded' if evidence['code_sha256'] == code_hash(paper) else 'changed since'}"
    )
    recorded = {c["cell"]: c for c in evidence["cells"]}
    name = name or next((c for c, found in recorded.items() if "counts" not in found["stage"]), next(iter(recorded)))
    if name not in recorded:
        raise RunError(f"no recorded cell '{name}'; there are: {', '.join(recorded)}")
    with tempfile.TemporaryDirectory() as scratch:
        found = cells(paper, scale, (*extra, override("run_root", scratch)))
        cell = next((c for c in found if c.name() == name), None)
        if cell is None:
            raise RunError(f"the sweeps of {paper.name} at scale {scale} no longer have the cell {name}")
        for c in [*_read_by(cell, found), cell]:
            wanted = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **(env or {})}
            environment = {k: v for k, v in wanted.items() if v is not None}
            command = _command(c, scale, (*extra, override("run_root", scratch)), per_run=1)
            if _call([sys.executable, *command[1:]], cwd=paper, env=environment, stdout=subprocess.DEVNULL):
                raise RunError(f"{c.name()} did not finish, its error stands above")
        return recorded[name], read_json(cell.dir / "result.json")


def same(recorded: float, now: float | None) -> bool:
    """Equal up to a rounding of float32: a logged loss may be divided before or after it becomes a Python number."""
    return now is not None and abs(recorded - now) <= 2e-7 * max(1.0, abs(recorded))


def verify(paper: Path, scale: str, name: str = "", extra: tuple[str, ...] = ()) -> bool:
    """Run one recorded cell again (see `again`) and print every number. True: every one is the recorded one."""
    old, new = again(paper, scale, name, extra)
    if old["config_sha256"] != new["config_sha256"]:
        print("the configuration of this cell has changed since the record")
    equal = bool(old["metrics"])
    for metric in sorted(old["metrics"] | new["metrics"]):
        a, b = old["metrics"].get(metric), new["metrics"].get(metric)
        if a is None:  # measured since the record: nothing to compare it with
            print(f"  {metric:32s} not in the record  now {b}")
            continue
        equal &= same(a, b)
        print(f"  {metric:32s} recorded {a}  now {b}  {'same' if same(a, b) else 'DIFFERENT'}")
    there, here = (
        f"{m['cpu']}, {m.get('isa', 'instruction set not noted')}, {m['accelerator']}, torch {v['torch']}"
        for m, v in ((r["machine"], r["versions"]) for r in (old, new))
    )
    print(f"{old['cell']}: {'verified' if equal else 'not the recorded numbers'} (recorded on {there})")
    if not equal:
        print(
            f"here: {here}. With the code as recorded, another processor or library sums in another order, and a training that "
            "amplifies it ends elsewhere: judge by the verdicts of a whole run, not by one cell"
        )
        if caps := [f"{name}={os.environ[name]}" for name in AVX2 if name in os.environ]:
            print(f"set here: {', '.join(caps)}, which chooses among the instructions; unset it and verify again")
    return equal


def call_script(paper: Path, script: str, *, weights: str = "", data: str = "", args: Sequence[str] = ()) -> int:
    """`python <script>.py` in the folder of a paper, with paths as they are given from here. Returns its exit status."""
    extra = [override(k, Path(v).expanduser().absolute()) for k, v in (("weights", weights), ("data.root", data)) if v]
    return _call([sys.executable, f"{script}.py", *extra, *args], cwd=paper)


def compare(paper: Path, result: Path) -> None:
    """Prints an own result.json beside the record of its arm and the published numbers of the same metrics."""
    own = read_json(result / "result.json" if result.is_dir() else result)
    if not isinstance(own, dict) or "metrics" not in own:
        raise RunError(f"{result}: no result.json of a finished run")
    arm = (result if result.is_dir() else result.parent).absolute().parent
    recorded: dict[str, list[float]] = {}
    for file in sorted((paper / "results").glob("*/provenance.json")):
        for cell in read_json(file)["cells"]:
            name = cell["cell"].rsplit("/seed", 1)[0]
            if file.parent.name == own["scale"] and arm.as_posix().endswith(f"/{name}"):
                for metric, value in cell["metrics"].items():
                    recorded.setdefault(metric, []).append(value)
    document = load_document(paper)
    print(f"{'metric':32s}{'here':>14s}{'recorded: mean +/- std (n)':>34s}   published")
    for metric, value in own["metrics"].items():
        values = recorded.get(metric, [])
        std = statistics.stdev(values) if len(values) > 1 else None
        shown = tables.summary({"mean": sum(values) / len(values) if values else None, "std": std, "n": len(values)})
        said = [f"{r['setting']}: {tables.published_text(r)}" for r in document["published"] if r["metric"] == metric]
        print(f"{metric:32s}{tables.number(value):>14s}{shown:>34s}   {'; '.join(said[:3])}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m common.reproduce", description="Run, record and verify the evidence of one paper."
    )
    parser.add_argument("action", choices=["run", "record", "verify", "compare", "evaluate", "bench"])
    parser.add_argument("paper")
    parser.add_argument(
        "result", nargs="?", type=Path, help="compare: a result.json, or the run directory that holds it"
    )
    parser.add_argument("--weights", default="", help="evaluate: the checkpoint")
    parser.add_argument("--args", default="", help="evaluate, bench: further key=value, as a shell would split them")
    parser.add_argument("--scale", default="mini")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository (tests use another)")
    parser.add_argument("--data", default="", help="data.root of every cell")
    parser.add_argument("--gpus", type=int, default=1, help="cards of this machine (paper scale)")
    parser.add_argument("--per-run", type=int, default=1, help="cards of one run (paper scale)")
    parser.add_argument("--only", default="", help="the cells of one claim")
    parser.add_argument("--all", action="store_true", help="paper scale: start every cell")
    parser.add_argument(
        "--dry", nargs="?", const="estimate", default="", choices=["estimate", "measure"],
        help="print one command per cell with its hours, estimated or from a preflight here",
    )  # fmt: skip
    parser.add_argument("--name", default="", help="record: whose run it is, beside the record of the project")
    parser.add_argument("--cell", default="", help="verify: the recorded cell, e.g. nclpp/seed100")
    args = parser.parse_args(argv)
    paper = args.root.resolve() / args.paper
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)
    extra = (override("data.root", Path(args.data).expanduser().absolute()),) if args.data else ()
    reads_none = args.action == "record" or args.dry == "estimate"
    if reads_none and not args.data and args.scale.startswith(("paper", "real_")):
        extra = ("data.root=DATA",)  # no part of what a run is; printed lines show where the folder goes
    try:
        if not (paper / "configs").is_dir():
            raise RunError(f"{args.paper}: no such paper here, or not started yet")
        if args.action in ("evaluate", "bench"):
            more = shlex.split(args.args)
            return call_script(paper, args.action, weights=args.weights, data=args.data, args=more)
        if args.action == "compare":
            if args.result is None:
                raise RunError("compare needs a result: python -m common.reproduce compare <paper> <run directory>")
            compare(paper, args.result)
            return 0
        if args.action == "record":
            record(paper, args.scale, extra, args.name)
            return 0
        if args.action == "verify":
            return 0 if verify(paper, args.scale, args.cell, extra) else 1
        if args.scale == "paper" or args.dry:
            return min(1, run_paper_scale(
                paper, args.scale, extra=extra, gpus=args.gpus, per_run=args.per_run, only=args.only or None,
                all_cells=args.all, dry=args.dry,
            ))  # fmt: skip
        return min(1, run(paper, args.scale, extra=extra, only=args.only or None))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    except (RunError, ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
