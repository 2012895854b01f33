"""Fixtures that the tests of all folders share (pytest loads them as a plugin, see pyproject.toml)."""

import functools
import gc
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from lightning_fabric import Fabric
from omegaconf import DictConfig

from common import runs, scripts


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector of cycles need not look through it again, nor so often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else extensions report at the exit what they leave behind


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what tests have measured: record_property("measured", "a line"). Workers of xdist have no terminal of their own."""
    reports = [r for found in terminalreporter.stats.values() for r in found if isinstance(r, pytest.TestReport)]
    for line in [value for r in reports if r.when == "call" for name, value in r.user_properties if name == "measured"]:
        terminalreporter.write_line(str(line))


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """A test that sets the number of torch threads must not change the sums of the next one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def fabric() -> Fabric:
    """One process on the CPU."""
    return runs.launch({"accelerator": "cpu", "devices": 1})


@pytest.fixture
def resumed(tmp_path: Path, fabric: Fabric, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Path, Path]]:
    """resumed(fit, cfg, epoch=2) -> (run directory of an uninterrupted training, of one that was killed and went on).

    Killed after the epoch and before its checkpoint. Fails unless weights, metrics.jsonl and final metrics are equal."""

    def call(fit: Callable[..., None], cfg: DictConfig, epoch: int = 2) -> tuple[Path, Path]:
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        fit(cfg, fabric, whole)
        log = runs.Run.log

        def killed(self: runs.Run, **row: Any) -> None:
            log(self, **row)
            if row["epoch"] == epoch:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(runs.Run, "log", killed)
            fit(cfg, fabric, parts)
        assert runs.read_json(parts / "result.json")["status"] == "running"
        fit(cfg, fabric, parts)
        models = [runs.load_checkpoint(place / "last.ckpt")["model"] for place in (whole, parts)]
        torch.testing.assert_close(models[1], models[0], rtol=0, atol=0)
        assert (whole / "metrics.jsonl").read_text() == (parts / "metrics.jsonl").read_text()
        assert runs.read_json(whole / "result.json")["metrics"] == runs.read_json(parts / "result.json")["metrics"]
        return whole, parts

    return call


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Sequence[str]], int]:
    """started(script file, overrides) -> exit status of `python <script> <overrides>`, in this process."""

    def call(script: Path, overrides: Sequence[str]) -> int:
        monkeypatch.setattr(scripts, "_terminate_cleanly", lambda: None)
        monkeypatch.setattr(sys, "argv", [str(script), *overrides])
        GlobalHydra.instance().clear()
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stopped:
            return int(stopped.code or 0)
        finally:
            GlobalHydra.instance().clear()
        return 0

    return call


@functools.cache
def _defaults(paper: Path, name: str, overrides: tuple[str, ...]) -> DictConfig:
    return compose(
        name, overrides=list(overrides)
    )  # a tenth of a second, read only, the same for most lines of a paper


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """refused(paper, script, overrides) -> the one line with which `python <script>.py <overrides>` ends, from an empty folder.

    Fails unless it ends with status 1, in one line `error: ...`, and leaves nothing behind."""

    def call(paper: Path, script: str, overrides: Sequence[str]) -> str:
        place = tmp_path / "empty"
        place.mkdir(exist_ok=True)
        monkeypatch.chdir(place)
        monkeypatch.setattr(scripts, "_terminate_cleanly", lambda: None)
        monkeypatch.setattr(scripts, "compose", lambda name, overrides=(): _defaults(paper, name, tuple(overrides)))
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
