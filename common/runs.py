"""What a run leaves behind, and when it may be skipped, resumed or refused.

A run directory holds ``config.yaml`` (resolved), ``metrics.jsonl`` (a line per epoch), ``last.ckpt`` (to resume) and
``result.json``, which ``common.metrics.report`` reads. A train loop stays in its paper's folder and calls these functions;
devices, precision, DDP and saving are Lightning Fabric's.

    run = Run.open(out, cfg, fabric, data=identity)   # None: this run is finished already
    if run is None: return
    state = run.load_checkpoint()               # None: from the start
    with run:                                   # an exception marks the run as failed, and is raised again
        for epoch in ...:
            run.log(epoch=epoch, loss=loss)
            run.save_checkpoint({...})
        run.finish({"top1": 91.2})
"""

import atexit
import contextlib
import copyreg
import errno
import fcntl
import hashlib
import importlib
import json
import math
import os
import platform
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from omegaconf import DictConfig, OmegaConf

from common import hub

# Where and on what a run computes is not what it computes: these keys do not enter the fingerprint.
NOT_IN_FINGERPRINT = (
    "run_root", "force", "preflight", "threads", "estimate", "after", "logger", "train.log_every", "train.save_every",
    "data.root", "data.download", "data.workers", "broken_images",  # what was left out is part of the identity of the data
    "fabric.accelerator", "fabric.devices", "fabric.strategy", "fabric.num_nodes",
)  # fmt: skip
# Keys that came later: with the value that changes nothing, a configuration is what it was without them.
ABSENT_AS = {"compile": False}
PACKAGES = ("torch", "torchvision", "timm", "numpy", "lightning-fabric", "hydra-core")


# Hydra's joblib launcher sends a script's functions by value, and its pickler takes every attribute named `classes` or
# `ops` in them for the submodule of torch, which has no pickle of its own: send those two by name.
for _module in ("torch.classes", "torch.ops"):
    copyreg.pickle(type(sys.modules[_module]), lambda module: (importlib.import_module, (module.__name__,)))  # type: ignore[arg-type]


class RunError(RuntimeError):
    """A run that cannot start or go on; the message names the directory or key and the fix."""


# ------------------------------------------------------------------------------------------------- the configuration
def plain(cfg: DictConfig | Mapping) -> dict:
    """The resolved configuration as plain dicts and lists. Raises `RunError` for a value that is missing ('???')."""
    if not isinstance(cfg, DictConfig):
        return dict(cfg)
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise RunError(f"no value given for {', '.join(missing)}: set it on the command line, e.g. {missing[0]}=...")
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def flatten(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists are leaves."""
    flat = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def fingerprint(cfg: DictConfig | Mapping) -> str:
    """SHA-256 of the resolved configuration less `NOT_IN_FINGERPRINT`: equal hashes compute the same numbers."""
    return hashlib.sha256(json.dumps(_fingerprinted(plain(cfg)), sort_keys=True).encode()).hexdigest()


def _fingerprinted(config: Mapping) -> dict[str, Any]:
    def ignored(key: str) -> bool:
        return any(key == name or key.startswith(name + ".") for name in NOT_IN_FINGERPRINT)

    flat = flatten(config).items()
    return {k: v for k, v in flat if not ignored(k) and not (k in ABSENT_AS and v == ABSENT_AS[k])}


def differing_keys(old: Mapping, new: Mapping) -> list[str]:
    """Lines "key: old -> new" for every key that the fingerprint covers and that differs."""
    a, b = _fingerprinted(old), _fingerprinted(new)
    gone = "(absent)"
    return [f"{k}: {a.get(k, gone)} -> {b.get(k, gone)}" for k in sorted(a | b) if a.get(k, gone) != b.get(k, gone)]


# ------------------------------------------------------------------------------------------------------- the devices
def launch(fabric_cfg: Mapping, **kwargs: Any) -> Fabric:
    """A launched `Fabric` for the processes that a launcher (torchrun) made; one process without a launcher.

    Raises `RunError` if the launcher's world size and Fabric's disagree, instead of two trainings in one directory, and
    inside `srun` with several tasks that are no ranks; ValueError for 16-mixed on a CPU, which has no such arithmetic."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if "WORLD_SIZE" not in os.environ:
        if int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
            raise RunError(
                "srun started several tasks, each would train by itself in one directory: use srun --ntasks-per-node=1 "
                "torchrun --nproc_per_node=<cards> train.py ..."
            )
        kwargs = {"plugins": [LightningEnvironment()], **kwargs}  # an allocation's variables make no ranks
    if fabric_cfg.get("precision") == "16-mixed" and (
        fabric_cfg.get("accelerator") == "cpu" or not torch.cuda.is_available()
    ):
        raise ValueError("fabric.precision=16-mixed needs a GPU: on a CPU use bf16-mixed or 32-true")
    nodes = max(1, world // int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    fabric = Fabric(**{"num_nodes": nodes, **fabric_cfg}, **kwargs)
    if fabric.world_size != world and "WORLD_SIZE" in os.environ:
        raise RunError(
            f"the launcher started {world} processes but fabric.devices={fabric_cfg.get('devices')} makes "
            f"{fabric.world_size}: leave fabric.devices to its default, which follows the launcher"
        )
    fabric.launch()
    atexit.register(_leave)
    return fabric


def _leave() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def leave() -> None:
    """Ends a process that has finished as one of several; does nothing in a process of its own.

    DistributedDataParallel keeps gloo's threads running after its group is destroyed, and one of them that is late aborts an
    interpreter that is ending."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _leave()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def per_device_batch(batch_size: int, world_size: int, accumulation: int = 1) -> int:
    """Images per device and micro-step of a GLOBAL batch. Raises `ValueError` if that is not a whole number."""
    parts = world_size * accumulation
    if batch_size < 1 or accumulation < 1 or batch_size % parts:
        raise ValueError(
            f"train.batch_size={batch_size} is the global batch and must be a positive multiple of "
            f"devices x accumulation = {world_size} x {accumulation} = {parts}"
        )
    return batch_size // parts


def check_finite(terms: Mapping[str, torch.Tensor], *, step: int, last_good: Path | None = None) -> None:
    """Raise `FloatingPointError` naming the step and the terms that are NaN or infinite.

    terms: named scalars, e.g. the loss terms or {"gradient norm": ...}. One device synchronisation."""
    values = torch.stack([t.detach().float().reshape(()) for t in terms.values()])
    finite = values.isfinite()
    if not bool(finite.all()):
        bad = ", ".join(
            f"{n}={v:g}" for n, v, ok in zip(terms, values.tolist(), finite.tolist(), strict=True) if not ok
        )
        kept = f"the last good state is {last_good}" if last_good and last_good.exists() else "no checkpoint yet"
        raise FloatingPointError(
            f"not finite at step {step}: {bad}; {kept}. Lower optim.lr or use fabric.precision=32-true"
        )


# ------------------------------------------------------------------------------------------------- the run directory
class Run:
    """One run directory. Only rank 0 writes; every rank reads the same decision."""

    def __init__(self, path: Path, config: dict, fabric: Fabric, lock: Any, data: Mapping[str, Any], new: bool) -> None:
        self.dir, self.config, self.fabric, self.data, self._lock = path, config, fabric, dict(data), lock
        self.sha = fingerprint(config)
        self.checkpoint = path / "last.ckpt"
        self.seconds_before, self._start, self._lines, self._new = 0.0, time.perf_counter(), 0, new

    @classmethod
    def open(
        cls, path: str | Path, cfg: DictConfig | Mapping, fabric: Fabric, data: Mapping[str, Any] | None = None
    ) -> "Run | None":
        """The run to carry out, or None if `path` holds it finished already.

        The same fingerprint and data: a finished run is skipped, any other is resumed. Another one: `RunError` naming what
        differs, or with `force: true` the old run is overwritten. data: the identity of the images
        (`common.data.files.identity`); where they lie may change, what they are may not."""
        path, config, data = Path(path), plain(cfg), dict(data or {})
        lock, decision = None, ""
        if fabric.is_global_zero:
            lock = _lock(path)
            decision = _decide(path, config, data)
            if decision != "skip" and isinstance(lock, OSError):
                decision = f"refuse cannot write {path}: {lock.strerror}"
            if decision == "start":
                for name in ("last.ckpt", "best.ckpt", "metrics.jsonl", "result.json"):
                    (path / name).unlink(missing_ok=True)
        decision = fabric.broadcast(decision, src=0)
        if decision.startswith("refuse"):
            _release(path, lock)
            raise RunError(decision.removeprefix("refuse "))
        if decision == "skip":
            _release(path, lock)
            fabric.print(f"finished already: {path} (force=true runs it again)")
            return None
        run = cls(path, config, fabric, lock, data, new=decision == "start")
        if fabric.is_global_zero:
            if decision == "resume" and (old := _result_of(path)):
                run.seconds_before = old.get("seconds", 0.0)
            _write(path / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
            run._result("running", {})
        fabric.print(f"{decision} {path}")
        return run

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and self.fabric.is_global_zero:
            if (
                self._new
                and not self._lines
                and not self.checkpoint.exists()
                and not isinstance(error, FloatingPointError)
            ):
                for name in ("config.yaml", "result.json"):  # it never began: a wrong value leaves nothing behind
                    (self.dir / name).unlink(missing_ok=True)
            else:
                self._result("failed", {}, error=f"{type(error).__name__}: {error}")
        _release(self.dir, self._lock)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds so far, those before an interruption included."""
        return self.seconds_before + time.perf_counter() - self._start

    def log(self, **row: Any) -> None:
        """Append one line to metrics.jsonl."""
        self._lines += 1
        if self.fabric.is_global_zero:
            with (self.dir / "metrics.jsonl").open("a") as f:
                f.write(json.dumps(row) + "\n")

    def save_checkpoint(self, state: Mapping[str, Any], name: str = "last.ckpt") -> None:
        """Write `state` beside the target and move it into place, so that a kill never leaves half a checkpoint.

        A full disk raises `RunError` and leaves the previous checkpoint as it was."""
        target, beside = self.dir / name, self.dir / f".{name}.tmp"
        header = {"config_sha256": self.sha, "data": self.data, "lines": self._lines, "seconds": self.seconds}
        try:
            if (
                self.fabric.is_global_zero
            ):  # straight beside the target: a temporary folder may be small, or lost by a kill
                torch.save({**state, "run": header}, beside)
                os.replace(beside, target)
        except (OSError, RuntimeError) as error:
            beside.unlink(missing_ok=True)
            raise RunError(f"cannot write {target}: {error}. Free space and start again; the run resumes") from error
        self.fabric.barrier()

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The state to resume from (on CPU), or None. metrics.jsonl is cut back to the lines of that moment."""
        if not self.checkpoint.exists():
            self._cut_log(0)
            return None
        state = load_checkpoint(self.checkpoint)
        header = state.get("run") if isinstance(state, Mapping) else None
        if not isinstance(header, Mapping) or not {"config_sha256", "lines", "seconds"} <= header.keys():
            raise RunError(
                f"{self.checkpoint} was not written by this script: move it away to start from the beginning"
            )
        if header["config_sha256"] != self.sha:
            raise RunError(
                f"{self.checkpoint} belongs to another configuration than {self.dir / 'result.json'}: move it away to start "
                "from the beginning, or force=true"
            )
        self._lines = header["lines"]
        self.seconds_before = header["seconds"]
        self._cut_log(self._lines)
        return state

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Write the final metrics (finite numbers by name) and mark the run as finished."""
        bad = {k: v for k, v in metrics.items() if not isinstance(v, int | float) or not math.isfinite(v)}
        if bad:
            raise ValueError(f"final metrics must be finite numbers, got {bad}")
        if self.fabric.is_global_zero:
            self._result("finished", dict(metrics))

    def _cut_log(self, lines: int) -> None:
        log = self.dir / "metrics.jsonl"
        if self.fabric.is_global_zero and log.exists():
            _write(log, "".join(log.read_text().splitlines(keepends=True)[:lines]))

    def _result(self, status: str, metrics: dict, **more: Any) -> None:
        c = self.config
        _write(self.dir / "result.json", json.dumps({
            "scale": c.get("scale"), "arm": c.get("arm"), "seed": c.get("seed"), "status": status, "metrics": metrics,
            "seconds": round(self.seconds, 3), "config_sha256": self.sha, "data": self.data,
            **provenance(self.fabric.device), **more,
        }, indent=1) + "\n")  # fmt: skip


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint as tensors and plain types, on CPU; of a folder of `hub.publish`, too. Never unpickles code.

    Raises `FileNotFoundError`, or `RunError` for a file that is truncated or holds anything but tensors and plain types."""
    path = Path(path).expanduser()
    if path.is_dir():
        return hub.read(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path.absolute()}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch writes checksums and does not look at them
                if (broken := archive.testzip()) is not None:
                    raise ValueError(f"damaged at {broken}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        what = next(iter(str(error).splitlines()), "") or type(error).__name__
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise RunError(
                f"refused {path}: it holds pickled objects, not only tensors and plain types ({what})"
            ) from error
        raise RunError(
            f"cannot read {path}: damaged, truncated or not a checkpoint ({what}). Use a copy, or move it away to start again"
        ) from error


def remove_if_empty(path: str | Path, root: str | Path) -> None:
    """Remove `path`, its parents up to `root`, and `root`, as long as they are empty (Hydra makes the directory first)."""
    root = Path(root).resolve()
    keep = {Path.cwd(), root.parent, *Path.cwd().parents}
    for place in (Path(path).resolve(), root):  # a scale like ../../x leaves root, which Hydra has made all the same
        with contextlib.suppress(OSError):  # another rank was faster, or it is not ours
            while place not in keep and place != place.parent and not (place.is_dir() and any(place.iterdir())):
                if place.is_dir():
                    place.rmdir()
                place = place.parent


def read_json(path: str | Path) -> Any:
    """The content of a JSON file, or None if there is none. Raises `RunError` for a corrupt one."""
    path = Path(path)
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise RunError(f"corrupt {path}: {error}. Move it away and start again") from error


# -------------------------------------------------------------------------------------------------------- provenance
def provenance(device: torch.device | None = None) -> dict[str, Any]:
    """{commit, versions, machine} of this process."""
    from importlib.metadata import version

    accelerator = torch.cuda.get_device_name(device) if device is not None and device.type == "cuda" else "cpu"
    versions = {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}}
    machine = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": os.environ.get("ONEDNN_MAX_CPU_ISA", torch.backends.cpu.get_cpu_capability()),
        "accelerator": accelerator,
    }
    return {"commit": git_commit(), "versions": versions, "machine": machine}


def git_commit(root: Path | None = None) -> str | None:
    """The current commit, with "+" appended when tracked files differ from it; None outside a git checkout."""
    where = root or Path(__file__).parent
    ours = [] if root else [Path(__file__).name]  # an installed copy may lie in somebody else's repository
    try:
        subprocess.run(["git", "ls-files", "--error-unmatch", *ours], cwd=where, capture_output=True, check=True)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=where, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=where, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def hash_files(paths: Iterable[Path], root: Path) -> str:
    """SHA-256 over names (relative to root) and contents of files, in name order."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text)
    os.replace(beside, path)


def _result_of(path: Path) -> dict[str, Any] | None:
    """The result of a run directory; from its last checkpoint where result.json is missing or was cut off."""
    file = path / "result.json"
    try:
        if file.exists() and file.stat().st_size and (result := read_json(file)) is not None:
            return result
    except RunError:
        if not (path / "last.ckpt").exists():
            raise
    if not (path / "last.ckpt").exists():
        return None
    state = load_checkpoint(path / "last.ckpt")
    header = state.get("run") if isinstance(state, Mapping) else None
    if not isinstance(header, Mapping) or "config_sha256" not in header:
        raise RunError(f"{path / 'last.ckpt'} was not written by this script: move it away to start from the beginning")
    return {**header, "status": "interrupted"}


def _decide(path: Path, config: dict, data: Mapping[str, Any]) -> str:
    if config.get("force") or (result := _result_of(path)) is None:
        return "start"
    if result["config_sha256"] != fingerprint(config):
        old = yaml.safe_load((path / "config.yaml").read_text()) if (path / "config.yaml").exists() else {}
        keys = "; ".join(differing_keys(old or {}, config))
        return f"refuse {path} holds a {result['status']} run with another configuration ({keys}); force=true overwrites it"
    if result.get("data") is not None and dict(result["data"]) != dict(data):
        return (
            f"refuse {path} holds a {result['status']} run on other data ({_described(result['data'])}; now "
            f"{_described(data)}): give another run_root=, or force=true to overwrite it"
        )
    return "skip" if result["status"] == "finished" else "resume"


def _described(data: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in data.items()) or "embedded"


def _lock(path: Path) -> Any:
    """Hold the directory (made if need be) against a second writer; wait for one that is still at work (a killed sweep's last
    cell). An OSError is returned where the disk cannot be written: a finished run can be read there all the same."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = (path / ".lock").open("w")
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return error
        raise
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting: another process is still writing {path}", file=sys.stderr, flush=True)
        fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def _release(path: Path, lock: Any) -> None:
    """Let go of the directory; one that holds nothing but the lock goes, too."""
    if lock is None or isinstance(lock, OSError):
        return
    with contextlib.suppress(OSError):
        if [p.name for p in path.iterdir()] == [".lock"]:
            (path / ".lock").unlink()
            path.rmdir()
    lock.close()
