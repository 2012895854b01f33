"""Wrong command lines of many kinds, tests/command_lines.yaml of every folder: each ends in one clear line."""

import ast
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict

from common import scripts
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
    ["train", ["logger=wandb"], "logger=wandb, allowed: tensorboard, csv, trackio"],
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


def documented():
    """(paper, script, overrides) of every `python <script>.py ...` and torchrun line of READMEs and scripts' docstrings."""
    found = set()
    for paper in (p for p in PAPERS if os.environ.get("PAPER", p) == p):
        folder = ROOT / paper
        texts = [(folder / "README.md").read_text()]
        texts += [ast.get_docstring(ast.parse(f.read_text())) or "" for f in sorted(folder.glob("*.py"))]
        for command in re.findall(r"(?:python|torchrun [-=\w ]*?) (\w+\.py[^\n#`;&|]*)", "\n".join(texts)):
            try:
                script, *overrides = shlex.split(re.split(r"\s{3,}|, |: | and | then ", command)[0])
            except ValueError:  # prose with an apostrophe
                continue
            overrides = [re.sub(r"^\[(\S+=.*)\]$", r"\1", o) for o in overrides]  # [key=value]: may be left out
            overrides = [o for o in overrides if "=" in o and not re.search(r"=(<.*|\.\.\.)?$|>$", o)]
            found.add((paper, script.removesuffix(".py"), tuple(overrides)))
    return sorted(found)


@pytest.mark.parametrize(
    ("paper", "script", "overrides"), documented(), ids=lambda x: x if isinstance(x, str) else " ".join(x)
)
def test_every_documented_command_line_is_accepted(paper, script, overrides):
    """Its keys exist, its choices exist, its values have the right type."""
    source = (ROOT / paper / f"{script}.py").read_text()
    config = re.search(r'script\((?:\)|\s*"(\w+)")', source)
    if config is None:
        pytest.skip("takes no options")
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(ROOT / paper / "configs"), version_base="1.3"):
        whole = compose(config[1] or "config", overrides=list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(whole)
        try:
            with open_dict(whole):
                del whole["hydra"]
            for key in OmegaConf.missing_keys(whole):  # what the line leaves to the reader, e.g. weights=...
                OmegaConf.update(whole, key, "given")
            scripts.check(whole)
        finally:
            HydraConfig.instance().cfg = None
            GlobalHydra.instance().clear()
