"""Fixtures that the tests of all folders share (pytest loads them as a plugin, see pyproject.toml)."""

import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from lightning_fabric import Fabric

from common import runs, scripts


@pytest.fixture(scope="session")
def fabric() -> Fabric:
    """One process on the CPU."""
    return runs.launch({"accelerator": "cpu", "devices": 1})


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """refused(paper, script, overrides) -> the one line with which `python <script>.py <overrides>` ends, from an empty folder.

    Fails unless it ends with status 1, in one line `error: ...`, and leaves nothing behind."""

    def call(paper: Path, script: str, overrides: Sequence[str]) -> str:
        place = tmp_path / "empty"
        place.mkdir(exist_ok=True)
        monkeypatch.chdir(place)
        monkeypatch.setattr(scripts, "_terminate_cleanly", lambda: None)
        monkeypatch.setattr(sys, "argv", [str(paper / f"{script}.py"), *overrides])
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(sys.argv[0], run_name="__main__")
        GlobalHydra.instance().clear()
        said = capsys.readouterr().err.strip()
        assert stopped.value.code == 1 and said.startswith("error: ") and "\n" not in said, said
        assert not list(place.iterdir()), "something was left behind"
        return said

    return call
