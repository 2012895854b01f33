"""Weights as people exchange them, of every paper: `export.py out=folder/` writes model.safetensors, config.json and a model
card; `load` and the scripts read them back."""

import importlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import hub, runs
from common.metrics.readme import PAPERS

ROOT = Path(__file__).resolve().parents[1]
CHOSEN = [p for p in PAPERS if os.environ.get("PAPER", p) == p]


@pytest.mark.parametrize("paper", CHOSEN)
def test_export_to_a_folder_and_back_is_the_same_network(paper, fabric, tmp_path, started, capsys):
    hook = importlib.import_module(f"{paper}.tests.contract")
    cfg = hook.config()
    hook.fit(cfg, fabric, tmp_path / "run")
    weights, out = tmp_path / "run/last.ckpt", tmp_path / "my model"
    assert started(ROOT / paper / "export.py", [f"weights='{weights}'", f"out='{out}/'"]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert not list(tmp_path.glob(".*")), "something was left beside the folder"
    module = importlib.import_module(f"{paper}.checkpoint")
    before, after = module.load(weights), module.load(out)
    expected, found = before.model.state_dict(), after.model.state_dict()
    assert expected.keys() == found.keys() and expected
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)
        else:
            assert found[name] == value, name
    assert json.loads(json.dumps(before.about)) == json.loads(json.dumps(after.about))
    assert before.config == after.config
    assert not any(name.startswith("optimizer") for name in load_file(out / hub.WEIGHTS))
    card = (out / hub.CARD).read_text()
    assert (
        "not the authors' weights" in card and "arm `test`" in card and f"from {paper}.checkpoint import load" in card
    )
    assert "## Measured\n\n| metric | value | unit |" in card and str(tmp_path) not in card
    # A second export into the same folder replaces it; one into a folder of something else is refused.
    assert started(ROOT / paper / "export.py", [f"weights='{out}'", f"out='{tmp_path / 'again'}/'"]) == 0
    assert (tmp_path / "again" / hub.WEIGHTS).read_bytes() == (out / hub.WEIGHTS).read_bytes()
    (out / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert started(ROOT / paper / "export.py", [f"weights='{weights}'", f"out='{out}/'"]) == 1
    assert "holds something else: name a new folder" in capsys.readouterr().err and (out / "notes.txt").exists()


@pytest.fixture
def published(tmp_path):
    tensors = {"half": torch.ones(2, dtype=torch.bfloat16), "nan": torch.tensor([float("nan")])}
    state = {
        "model": {"w": torch.arange(6.0).view(2, 3), **tensors}, "optimizer": {"state": {0: torch.ones(3)}},
        "about": {"classes": ["ant", "bee"]}, "config": {"scale": "x", "arm": "y", "seed": 0},
        "list": [torch.tensor(3), "text", None, 1.5], "memory": {0: torch.zeros(1), 7: [torch.ones(1)]},
    }  # fmt: skip
    torch.save(state, tmp_path / "last.ckpt")
    hub.publish(tmp_path / "last.ckpt", tmp_path / "out", ROOT / "ncl_pp")
    return state, tmp_path / "out"


def test_what_is_read_back_is_what_was_there_without_the_optimizer(published):
    state, out = published
    found = runs.load_checkpoint(out)
    assert found.keys() == state.keys() - {"optimizer"}
    assert torch.equal(found["model"]["w"], state["model"]["w"]) and found["model"]["half"].dtype == torch.bfloat16
    assert found["model"]["nan"].isnan().all() and found["list"][0] == 3 and found["list"][1:] == ["text", None, 1.5]
    assert found["memory"].keys() == {0, 7} and found["memory"][7][0] == 1
    assert "- tensors: model (3), list (1), memory (2)" in (out / hub.CARD).read_text()


def test_what_json_would_change_is_refused_and_leaves_nothing(tmp_path):
    torch.save({"model": {1: torch.ones(1), "a": 2}, "about": {}, "config": {}}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="model: keys like 1 are no text"):
        hub.publish(tmp_path / "last.ckpt", tmp_path / "out", ROOT / "ncl_pp")
    torch.save({"w": torch.ones(1)}, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="does not say its configuration"):
        hub.publish(tmp_path / "bare.pt", tmp_path / "out", ROOT / "ncl_pp")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare.pt", "last.ckpt"]


def test_broken_folders_are_one_line(published):
    _, out = published
    with pytest.raises(FileNotFoundError, match="a folder of weights holds config.json and model.safetensors"):
        runs.load_checkpoint(out.parent)
    save_file({"other": torch.ones(1)}, out / hub.WEIGHTS)
    with pytest.raises(ValueError, match="damaged or of something else"):
        runs.load_checkpoint(out)
    (out / hub.WEIGHTS).write_bytes(b"\xff" * 40)
    with pytest.raises(ValueError, match="damaged or of something else"):
        runs.load_checkpoint(out)
    (out / hub.CONFIG).write_text("[]")
    with pytest.raises(ValueError, match="damaged or of something else"):
        runs.load_checkpoint(out)
