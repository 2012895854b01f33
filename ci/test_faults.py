"""Breaking real runs of all ten papers on purpose; minutes, so `make faults` and not CI. It prints what it did.

Per paper: 20 kills at random moments of one run that must end in the same numbers; some 300 wrong command lines that must each
end in one line and leave nothing; checkpoints cut off, with a flipped bit, of somebody else, with code in them; a full disk; two
starts in one directory."""

import importlib
import io
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from common import runs
from common.metrics.readme import PAPERS

ROOT = Path(__file__).resolve().parents[1]
CHOSEN = [p for p in PAPERS if os.environ.get("PAPER", p) == p]
pytestmark = [pytest.mark.faults, pytest.mark.parametrize("paper", CHOSEN)]
KILLS = 20
MARK = Path(tempfile.gettempdir()) / "code-of-a-checkpoint-was-run"


def hook(paper):
    return importlib.import_module(f"{paper}.tests.contract")


def forked(paper, cfg, out):
    """A process that trains; forked, so that it begins at once."""
    if pid := os.fork():
        return pid
    try:
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
            hook(paper).fit(cfg, runs.launch({"accelerator": "cpu", "devices": 1}), out)
        os._exit(0)
    except BaseException:
        os._exit(1)


def test_twenty_kills_change_no_number(paper, tmp_path, record_property):
    """Runs of the same configuration, killed and started again until they end, until there were twenty kills."""
    cfg = hook(paper).config("train.epochs=4")
    start = time.perf_counter()
    assert os.waitpid(forked(paper, cfg, tmp_path / "whole"), 0)[1] == 0
    seconds, moments, kills, ended = time.perf_counter() - start, random.Random(0), 0, 0
    while kills < KILLS or not ended:
        out = tmp_path / f"parts{ended}"
        pid = forked(paper, cfg, out)
        if kills < KILLS:
            time.sleep(moments.uniform(0.02, 0.5) * seconds)
            os.kill(pid, signal.SIGKILL)  # one that has ended already is not there to be killed
        _, status = os.waitpid(pid, 0)
        if status == 0:
            same_numbers(tmp_path / "whole", out)
            ended += 1
        else:
            assert os.WIFSIGNALED(status), "a run that was not killed ended with an error"
            kills += 1
    if (out := tmp_path / f"parts{ended}").exists():  # the last kill left one half done
        assert os.waitpid(forked(paper, cfg, out), 0)[1] == 0
        same_numbers(tmp_path / "whole", out)
    record_property("measured", f"{paper}: {kills} kills, every number the same")


def same_numbers(whole, parts):
    """Checkpoints bit for bit, and metrics without times."""
    states = [runs.load_checkpoint(n / "last.ckpt") for n in (whole, parts)]
    for state in states:
        state.pop("run"), state.pop("config")
    assert str(states[0]) == str(states[1]) or torch.equal(
        *(torch.cat([t.flatten().double() for t in _tensors(s)]) for s in states)
    )
    a, b = (json.loads((n / "result.json").read_text())["metrics"] for n in (whole, parts))
    assert {k: v for k, v in a.items() if "second" not in k} == {k: v for k, v in b.items() if "second" not in k}


def _tensors(node):
    if isinstance(node, torch.Tensor):
        yield node
    elif isinstance(node, dict | list | tuple):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _tensors(child)


def wrong_lines(paper):
    """Overrides that must be refused, of every kind: misspelt keys, wrong types, impossible values, unknown choices."""
    configs = ROOT / paper / "configs"
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(configs), version_base="1.3"):
        flat = runs.flatten(OmegaConf.to_container(compose("config", overrides=["arm=x"]), resolve=True))
    for key, value in flat.items():
        yield f"{key}x=1"
        if isinstance(value, bool):
            yield from (f"{key}=maybe", f"{key}=2", f"{key}=null")
        elif isinstance(value, int | float):
            yield from (f"{key}=abc", f"{key}=true", f"{key}=[1]", f"{key}=nan")
        elif isinstance(value, str):
            yield from (f"{key}=[a]", f"{key}={{a:1}}")
    for key in ("train.batch_size", "train.save_every", "train.log_every", "optim.lr", "seed", "threads"):
        if key in flat:
            yield f"{key}=-1"
    for group in (p.name for p in configs.iterdir() if p.is_dir() and p.name != "reproduce"):
        yield f"{group}=nothing_of_that_name"
    yield from (
        "run_root=null",
        "run_root=''",
        "scale=../../x",
        "scale=''",
        "optim",
        "=3",
        "a.b.c=1",
        "+hydra=1",
        "seed=",
    )


def test_a_wrong_command_line_is_one_line_and_leaves_nothing(paper, tmp_path, monkeypatch, record_property):
    monkeypatch.chdir(ROOT / paper)
    module = importlib.import_module(f"{paper}.train")
    bad, count = [], 0
    before = sorted(p.name for p in Path().iterdir())
    for line in wrong_lines(paper):
        root = tmp_path / "runs"
        places = [] if line.startswith("run_root") else [f"run_root={root}"]
        monkeypatch.setattr(sys, "argv", ["train.py", *places, line])
        out, err = io.StringIO(), io.StringIO()
        status = None
        GlobalHydra.instance().clear()
        try:
            with redirect_stdout(out), redirect_stderr(err):
                module.main()
        except SystemExit as stopped:
            status = stopped.code
        except BaseException as error:
            status = f"{type(error).__name__}"
        count += 1
        if os.environ.get("TRACE"):
            print(f"{time.perf_counter():.1f} {line} -> {status}", file=sys.__stderr__, flush=True)
        lines = err.getvalue().strip().splitlines()
        if status != 1 or len(lines) != 1 or not lines[0].startswith("error: ") or root.exists():
            bad.append(
                f"{line}: status {status}, {len(lines)} lines, {lines[-1][:90] if lines else ''}{' LEFT' * root.exists()}"
            )
    record_property("measured", f"{paper}: {count} wrong command lines, {len(bad)} without one clear line")
    assert not bad, "\n".join(bad[:40])
    assert sorted(p.name for p in Path().iterdir()) == before


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {MARK}",)


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "code", "empty"])
def test_a_damaged_checkpoint_is_named_and_kept(paper, damage, tmp_path):
    cfg = hook(paper).config()
    fabric = runs.launch({"accelerator": "cpu", "devices": 1})
    hook(paper).fit(cfg, fabric, tmp_path)
    result, checkpoint = tmp_path / "result.json", tmp_path / "last.ckpt"
    result.write_text(result.read_text().replace('"finished"', '"running"'))
    raw = bytearray(checkpoint.read_bytes())
    if damage == "cut":
        raw = raw[: len(raw) // 2]
    elif damage == "flipped":
        raw[len(raw) // 2] ^= 1
    elif damage == "foreign":
        torch.save({"state_dict": {}}, checkpoint)
        raw = bytearray(checkpoint.read_bytes())
    elif damage == "code":
        raw = bytearray(pickle.dumps(Evil()))
    else:
        raw = bytearray()
    checkpoint.write_bytes(raw)
    with pytest.raises(runs.RunError, match=r"last\.ckpt"):
        hook(paper).fit(cfg, fabric, tmp_path)
    assert checkpoint.read_bytes() == bytes(raw) and not MARK.exists()


def test_a_full_disk_keeps_the_last_good_checkpoint(paper, tmp_path):
    cfg = hook(paper).config()
    assert os.waitpid(forked(paper, cfg, tmp_path / "whole"), 0)[1] == 0
    size = (tmp_path / "whole/last.ckpt").stat().st_size
    if not (pid := os.fork()):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(forked(paper, cfg, tmp_path / "full"), 0)[1]))
    assert os.waitpid(pid, 0)[1] != 0
    assert not (tmp_path / "full/last.ckpt").exists() and not list((tmp_path / "full").glob(".last*"))
    assert os.waitpid(forked(paper, cfg, tmp_path / "full"), 0)[1] == 0, "with space again it goes on"


def test_two_starts_in_one_directory_train_once(paper, tmp_path):
    cfg = hook(paper).config()
    pids = [forked(paper, cfg, tmp_path) for _ in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines)), "an epoch was written twice"


def test_a_killed_sweep_leaves_no_worker_and_goes_on(paper, tmp_path):
    """SIGTERM to the command ends what it started; the same command goes on."""
    command = [sys.executable, "-m", "common.reproduce", "verify", paper, "--scale", "mini"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(20)
    process.terminate()
    process.wait(30)
    left = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert not left and process.returncode != 0
