"""Wrong command lines of many kinds, tests/command_lines.yaml of every folder: each ends in one clear line."""

import os
from pathlib import Path

import pytest
import yaml

from common.metrics.readme import PAPERS

ROOT = Path(__file__).resolve().parents[1]
# What every train script must refuse alike: misspelt keys, values of another type, values that nothing can use.
EVERYWHERE = [
    ["train", ["optim.lrr=1"], "there is no key optim.lrr"],
    ["train", ["train.epochs=ten"], "train.epochs=ten must be a"],
    ["train", ["force=maybe"], "force=maybe must be true or false"],
    ["train", ["preflight=no"], "preflight=no must be true or false"],
    ["train", ["seed=-1"], "seed=-1, allowed: 0"],
    ["train", ["seed=null"], "seed=null must be a whole number"],
    ["train", ["run_root=null"], "run_root=null must be a text"],
    ["train", ["scale=../../x"], "scale=../../x must stay below run_root"],
    ["train", ["threads=0"], "threads=0, allowed"],
    ["train", ["fabric.precision=16-mixed", "fabric.accelerator=cpu"], "fabric.precision"],
    ["train", ["logger=wandb"], "logger=wandb, allowed: tensorboard, csv"],
    ["evaluate", ["weights=/none.ckpt", "claim=nothing"], "allowed"],
    ["export", ["weights=/none.ckpt"], "/none.ckpt"],
    ["counts", ["seed=x"], "seed=x must be a whole number"],
]


def lines():
    for paper in PAPERS:
        if os.environ.get("PAPER", paper) != paper:
            continue
        own = ROOT / paper / "tests/command_lines.yaml"
        for script, overrides, message in [*EVERYWHERE, *(yaml.safe_load(own.read_text()) if own.exists() else [])]:
            yield pytest.param(paper, script, overrides, message, id=f"{paper} {script} {' '.join(overrides)}"[:90])


@pytest.mark.parametrize(("paper", "script", "overrides", "message"), lines())
def test_a_wrong_command_line_is_one_line_and_leaves_nothing(paper, script, overrides, message, refused):
    overrides = [o.replace("{paper}", str(ROOT / paper)) for o in overrides]
    assert message in refused(ROOT / paper, script, overrides)
