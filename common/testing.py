"""Fixtures that the tests of all folders share (pytest loads them as a plugin, see pyproject.toml)."""

import copy
import dataclasses
import functools
import gc
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from hydra._internal import config_loader_impl as loader
from hydra._internal import defaults_list
from hydra._internal.config_repository import ConfigRepository, IConfigRepository
from hydra.core.global_hydra import GlobalHydra
from lightning_fabric import Fabric
from matplotlib.figure import Figure
from omegaconf import DictConfig

from common import runs, scripts

ROOT = Path(__file__).resolve().parents[1]


def _ours(repo: IConfigRepository) -> tuple[tuple[str, str], ...] | None:
    """Where a configuration is looked for; None where that is a folder of a test, whose files may change."""
    sources = tuple((s.provider, s.path) for s in repo.get_sources())
    inside = all(Path(s.path).is_relative_to(ROOT) for s in repo.get_sources() if s.scheme() == "file")
    return sources if inside else None


def pytest_configure() -> None:
    """Hydra composes a configuration of ours once for each choice of groups; on a copy of that, values are set as ever.

    Reading the files, listing the defaults and merging them again for every command line was a fifth of the suite's time."""
    load, merge = ConfigRepository.load_config, loader.ConfigLoaderImpl._compose_config_from_defaults_list
    known: dict[tuple, Any] = {}
    merging: list[bool] = []

    def once(key: tuple, call: Callable[[], Any]) -> Any:
        if key[1] is None:
            return call()
        if key not in known:
            known[key] = call()
        return known[key]

    def load_config(self: ConfigRepository, config_path: str) -> Any:
        found = once(("load", _ours(self), config_path), lambda: load(self, config_path))
        return copy.deepcopy(found) if merging else found

    def create_defaults_list(repo: IConfigRepository, config_name: str, overrides_list: list, **options: Any) -> Any:
        if (sources := _ours(repo)) is None:
            return defaults_list.create_defaults_list(repo, config_name, overrides_list, **options)
        values = [
            o for o in overrides_list
            if not o.is_sweep_override() and (isinstance(o.value(), dict) or not repo.group_exists(o.key_or_group))
        ]  # fmt: skip
        groups = [o for o in overrides_list if o not in values]
        key = ("list", sources, config_name, *(o.input_line for o in groups), *sorted(options.items()))
        found = once(key, lambda: defaults_list.create_defaults_list(repo, config_name, groups, **options))
        return dataclasses.replace(found, config_overrides=values)

    def merged(self: loader.ConfigLoaderImpl, defaults: list, repo: IConfigRepository) -> DictConfig:
        merging.append(True)  # which changes what was read: it needs copies
        try:
            return merge(self, defaults, copy.deepcopy(repo))
        finally:
            merging.pop()

    def compose(self: loader.ConfigLoaderImpl, defaults: list, repo: IConfigRepository) -> DictConfig:
        key = ("merge", _ours(repo), *(dataclasses.astuple(d) for d in defaults))
        return copy.deepcopy(once(key, lambda: merged(self, defaults, repo)))

    ConfigRepository.load_config = load_config
    loader.create_defaults_list = create_defaults_list  # type: ignore[reportPrivateImportUsage]
    loader.ConfigLoaderImpl._compose_config_from_defaults_list = compose


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector of cycles need not look through it again, nor so often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else extensions report at the exit what they leave behind


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """A test that sets the number of torch threads must not change the sums of the next one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made and their files exist, without the seconds of painting them: for tests of what surrounds a figure."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).touch())


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


# What most scripts import: half of the time in which a short one is done.
PRELOADED = ["common.testing", "torchvision.transforms.v2", "timm", "scipy.optimize", "scipy.stats", "sklearn.datasets"]


@functools.cache
def _server() -> ForkServerContext:
    """Processes that are forked from one that has imported PRELOADED and computed nothing: seconds faster than new ones."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


def _as_script(file: str, arguments: Sequence[str], environment: dict[str, str], out: str, err: str) -> None:
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), stream)
    os.environ |= environment
    os.chdir(Path(file).parent)
    sys.path.insert(0, str(Path(file).parent))
    sys.argv = [file, *arguments]
    runpy.run_path(file, run_name="__main__")


def process(script: Path, arguments: Sequence[str], place: Path, **environment: str) -> ForkServerProcess:
    """`python <script> <arguments>` from inside its folder, begun; what it says is added to the files out and err of `place`."""
    words, out, err = [str(a) for a in arguments], str(place / "out"), str(place / "err")
    begun = _server().Process(target=_as_script, args=(str(script), words, {**os.environ, **environment}, out, err))
    begun.start()
    return begun


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., CompletedProcess]:
    """ranks(script file, arguments, count=2) -> what `torchrun --standalone --nproc_per_node=2 <script> <arguments>` ends with.

    The processes have the variables that torchrun gives them, without torchrun's own process. One that fails ends the others."""

    def call(script: Path, arguments: Sequence[str], count: int = 2) -> CompletedProcess:
        place = tmp_path_factory.mktemp("ranks")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        shared = {
            "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test",
        }  # fmt: skip
        places = [place / str(r) for r in range(count)]  # one file for all would cut lines in two
        for own in places:
            own.mkdir()
        begun = [process(script, arguments, p, **shared, RANK=p.name, LOCAL_RANK=p.name) for p in places]
        deadline = time.monotonic() + 300
        while (
            any(p.exitcode is None for p in begun)
            and not any(p.exitcode for p in begun)
            and time.monotonic() < deadline
        ):
            connection.wait([p.sentinel for p in begun if p.exitcode is None], timeout=1)
        for p in begun:
            p.kill()
            p.join()
        status = next((p.exitcode for p in begun if p.exitcode), 0)
        said = ["".join((own / n).read_text() for own in places if (own / n).exists()) for n in ("out", "err")]
        return CompletedProcess([str(script), *arguments], status, *said)

    return call


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
