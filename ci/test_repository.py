"""Contracts of the whole repository that no single folder can test."""

import ast
import importlib
import io
import pickle
import re
import subprocess
import tomllib
from pathlib import Path

import cloudpickle
import pytest
import yaml

from common.metrics.readme import PAPERS
from common.reproduce import stages

ROOT = Path(__file__).resolve().parents[1]
STARTED = [p for p in PAPERS if (ROOT / p / "train.py").exists()]
TRACKED = [
    ROOT / f for f in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
]
SOURCES = [p for p in TRACKED if p.suffix == ".py" and p.exists()]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_no_file_imports_across_papers_tests_and_scripts_included():
    bad = []
    for path in SOURCES:
        home = path.relative_to(ROOT).parts[0]
        others = set(PAPERS) - {home} if home != "ci" else set()
        bad += [f"{path.relative_to(ROOT)}: {name}" for name in imported(path) & others]
    assert not bad


def test_every_started_paper_is_a_package_is_tested_and_under_contract():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = [name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]]
    assert project["tool"]["pytest"]["ini_options"]["testpaths"] == ["."], "the tests of every folder"
    contract = (ROOT / "ci/importlinter.ini").read_text()
    checked = project["tool"]["pyright"]["include"]
    for paper in STARTED:
        assert paper in packages and paper in checked, paper
        assert len(re.findall(rf"^    {paper}$", contract, re.M)) == 3, f"{paper} is missing from ci/importlinter.ini"


@pytest.mark.parametrize("paper", STARTED)
def test_a_started_paper_has_the_interface_of_all(paper):
    wanted = [
        "README.md",
        "claims.yaml",
        "configs/config.yaml",
        "configs/reproduce/mini",
        "train.py",
        "evaluate.py",
        "tests",
    ]
    missing = [name for name in wanted if not (ROOT / paper / name).exists()]
    assert not missing


def test_no_unsafe_loading_no_machine_paths_no_large_files():
    unsafe = re.compile(r"weights_only=False|pickle\.loads?\(")
    machine = re.compile(r"/(root|home/\w+|work)/|files\.pythonhosted|pypi\.org/simple")
    for path in TRACKED:
        if not path.exists() or path.suffix not in {".py", ".md", ".yaml", ".toml", ".txt", ".yml", ".cff", ".sh"}:
            continue
        text = path.read_text()
        here = path.relative_to(ROOT)
        if path.suffix == ".py" and path != Path(__file__).resolve():
            assert not unsafe.search(text), here
        if path != Path(__file__).resolve():
            assert not machine.search(text), here
        assert path.stat().st_size < 1_000_000, here


def test_constraints_pin_every_dependency_exactly():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *extras["deploy"], *extras["dev"]]
    lines = (ROOT / "constraints.txt").read_text().split()
    pins = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    wanted = {re.split(r"[<>=\[]", name)[0].lower() for name in named}
    assert wanted <= pins, wanted - pins


def test_too_old_a_python_and_a_missing_venv_get_one_clear_line(tmp_path):
    def fake_python(name: str, body: str) -> Path:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return path

    old = fake_python("old", 'case "$*" in *version_info*) exit 1;; *--version*) echo "Python 3.9.2";; esac')
    bare = fake_python("bare", 'case "$*" in *ensurepip*) exit 1;; esac')
    for python, message in (
        (old, "Python 3.9.2 is too old"),
        (bare, "has no venv module"),
        (tmp_path / "no", "no .*no here"),
    ):
        result = subprocess.run(
            ["make", "test", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"], cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode != 0 and re.search(f"error: .*{message}", result.stderr), result.stderr
        assert not (tmp_path / "venv").exists()


def test_a_paper_that_is_not_started_says_so():
    for paper in set(PAPERS) - set(STARTED):
        result = subprocess.run(["make", f"reproduce-{paper}", "PY=python3"], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode != 0 and f"{paper} is not started yet" in result.stderr


def sweep_scripts() -> list[tuple[str, str]]:
    files = [(p, f.stem.split("_")[1]) for p in STARTED for f in (ROOT / p / "configs/reproduce").rglob("*_*.yaml")]
    return sorted(set(files))


@pytest.mark.parametrize(("paper", "script"), sweep_scripts())
def test_the_joblib_launcher_can_send_a_script_to_its_workers(paper, script):
    """A script's functions travel by value. One that reads an attribute named `classes` or `ops` drags torch.classes along,
    which cannot be pickled (the pickler takes the name for the submodule). One under functools.cache is sent as a name, and
    in a worker there is no script to find that name in."""
    module = importlib.import_module(f"{paper}.{script}")
    cloudpickle.register_pickle_by_value(module)
    try:
        sent = cloudpickle.dumps(module.main)
    finally:
        cloudpickle.unregister_pickle_by_value(module)

    class Worker(pickle.Unpickler):
        def find_class(self, place: str, name: str):
            assert place != module.__name__, f"{name} stays behind: see common.loop.once"
            return super().find_class(place, name)

    assert callable(Worker(io.BytesIO(sent)).load())


@pytest.mark.parametrize("paper", STARTED)
def test_sweeps_name_an_existing_script_their_scale_and_the_stages_that_they_read(paper):
    for folder in (ROOT / paper / "configs/reproduce").iterdir():
        names = [f.stem for f in stages(ROOT / paper, folder.name)]
        for name in names:
            text = (folder / f"{name}.yaml").read_text()
            sweep = yaml.safe_load(text)
            assert text.startswith("# @package _global_\n") and sweep["scale"] == folder.name, name
            assert set(sweep.get("after", [])) <= {n for n in names if n < name}, name
