"""Breaking real runs on purpose: kills at random moments, a full disk, truncated files. Minutes; `make faults`, not in CI."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAPER = ROOT / "ncl_pp"
pytestmark = pytest.mark.faults
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
SHORT = ["method=bsce", "train.epochs=60", "train.save_every=1", "seed=3"]


def train(*args, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "train.py", *SHORT, *args]
    return subprocess.run(command, cwd=PAPER, env=ENV, capture_output=True, text=True, **kwargs)


def run_dir(root: Path) -> Path:
    return next(root.rglob("result.json")).parent


def test_kills_at_random_moments_change_nothing(tmp_path):
    assert train(f"run_root={tmp_path / 'whole'}").returncode == 0
    moments, kills = random.Random(0), 0
    for _ in range(40):
        process = subprocess.Popen(
            [sys.executable, "train.py", *SHORT, f"run_root={tmp_path / 'parts'}"],
            cwd=PAPER,
            env=ENV,
            stdout=subprocess.DEVNULL,
        )
        try:
            process.wait(timeout=moments.uniform(4, 12))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert process.returncode == 0, "the run never came to its end"
    whole, parts = run_dir(tmp_path / "whole"), run_dir(tmp_path / "parts")
    a, b = (torch.load(d / "last.ckpt", weights_only=True)["model"] for d in (whole, parts))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert (whole / "metrics.jsonl").read_text() == (parts / "metrics.jsonl").read_text()
    assert not list(parts.glob(".*.tmp")) or kills, "a half-written file remains although nothing was killed"


def test_a_killed_sweep_goes_on_where_it_was(tmp_path):
    data = [f"run_root={tmp_path}"]
    sweep = [
        sys.executable,
        "train.py",
        "-m",
        *SHORT[:-1],
        "seed=3,4",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        *data,
    ]
    process = subprocess.Popen(sweep, cwd=PAPER, env=ENV, stdout=subprocess.DEVNULL, start_new_session=True)
    while not list(tmp_path.rglob("last.ckpt")):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert subprocess.run(sweep, cwd=PAPER, env=ENV, stdout=subprocess.DEVNULL).returncode == 0
    results = [json.loads(p.read_text()) for p in tmp_path.rglob("result.json")]
    assert [r["status"] for r in results] == ["finished"] * 2


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    assert train(f"run_root={tmp_path}", "train.epochs=60").returncode == 0
    checkpoint = run_dir(tmp_path) / "last.ckpt"
    size = checkpoint.stat().st_size
    result = run_dir(tmp_path) / "result.json"
    result.write_text(result.read_text().replace('"finished"', '"running"'))
    state = torch.load(checkpoint, weights_only=True)
    state["epoch"] = 30
    torch.save(state, checkpoint)
    before = checkpoint.read_bytes()

    def limit() -> None:  # no file of this process may grow to the size of a checkpoint, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    full = train(f"run_root={tmp_path}", preexec_fn=limit)
    assert full.returncode != 0 and "cannot write" in full.stderr and "last.ckpt" in full.stderr, full.stderr
    assert checkpoint.read_bytes() == before
    again = train(f"run_root={tmp_path}")
    assert again.returncode == 0 and "epochs 31..60" in again.stdout


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_a_truncated_checkpoint_is_named(tmp_path, keep):
    assert train(f"run_root={tmp_path}").returncode == 0
    where = run_dir(tmp_path)
    result = where / "result.json"
    result.write_text(result.read_text().replace('"finished"', '"running"'))
    content = (where / "last.ckpt").read_bytes()
    (where / "last.ckpt").write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    broken = train(f"run_root={tmp_path}")
    assert broken.returncode != 0 and "last.ckpt" in broken.stderr and "Delete it" in broken.stderr, broken.stderr
    (where / "last.ckpt").unlink()
    assert train(f"run_root={tmp_path}").returncode == 0
