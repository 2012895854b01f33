"""A sweep through the SLURM launcher, on a cluster that is a few lines of shell: what is submitted, and that it trains."""

import os
import stat
from pathlib import Path

import pytest

from common.runs import read_json
from common.testing import process

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("submitit")

COMMANDS = {
    # Runs every task of the array after it has answered, as a queue does.
    "sbatch": """script="${@: -1}"; cp "$script" "$(dirname "$0")/submitted.sh"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for i in $(seq 0 "$last"); do
  (sleep 1; SLURM_JOB_ID=4$i SLURM_ARRAY_JOB_ID=40 SLURM_ARRAY_TASK_ID=$i SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 \\
   SLURM_NODEID=0 SLURM_JOB_NUM_NODES=1 SLURM_NTASKS_PER_NODE=1 SLURM_JOB_NODELIST=one bash "$script"
   touch "$(dirname "$0")/done_$i") >/dev/null 2>&1 &
done
echo "Submitted batch job 40"
""",
    "srun": 'while [[ "$1" == -* ]]; do case "$1" in --output|--error) shift 2;; *) shift;; esac; done; exec "$@"\n',
    "scontrol": "echo one\n",
    "sacct": """echo "JobID|State"
for i in 0 1; do [ -e "$(dirname "$0")/done_$i" ] && echo "40_$i|COMPLETED" || echo "40_$i|RUNNING"; done
""",
}


def test_a_sweep_goes_through_slurm(tmp_path):
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(stat.S_IRWXU)
    line = ["-m", "hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=90", "seed=0,1",
        "train.epochs=1", "schedule.warmup=0", "train.batch_size=64", f"run_root={tmp_path / 'runs'}"]  # fmt: skip
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    begun = process(ROOT / "ncl_pp/train.py", line, tmp_path, **env)
    begun.join(300)
    assert begun.exitcode == 0, (tmp_path / "err").read_text()[-2000:]
    script = (tmp_path / "submitted.sh").read_text()
    assert "#SBATCH --partition=gpu\n" in script and "#SBATCH --time=90\n" in script and "--array=0-1" in script
    found = [read_json(f) for f in (tmp_path / "runs").rglob("result.json")]
    assert sorted(r["seed"] for r in found) == [0, 1] and {r["status"] for r in found} == {"finished"}
