"""The same front door on all ten: verbs and their words, how scripts end, what checkpoints say, and what a README shows first."""

import ast
import importlib
import inspect
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from common.metrics.claims import TESTED, load_document
from common.metrics.readme import PAPERS
from common.metrics.site import evidence

ROOT = Path(__file__).resolve().parents[1]
WORDS = {
    "train": ("run_root", "scale", "arm", "seed", "force", "preflight", "threads", "logger", "fabric.precision"),
    "evaluate": ("weights", "data.root", "batch_size", "record", "record_to", "claim", "fabric.accelerator"),
    "predict": ("weights", "images", "out", "batch_size", "fabric.accelerator"),
    "export": ("weights", "out", "fabric.accelerator"),
    "bench": ("out", "threads", "fabric.accelerator"),
    "counts": ("run_root", "scale", "arm", "seed"),
}
SCRIPTS = sorted(
    (p, f.stem)
    for p in PAPERS
    for f in (ROOT / p).rglob("*.py")
    if "tests" not in f.parts and f.stem != "picture" and "__main__" in f.read_text()  # a picture has no options
)


def composed(paper, verb):
    name = "config" if verb == "train" else verb
    with initialize_config_dir(config_dir=str(ROOT / paper / "configs"), version_base="1.3"):
        return compose(name)


@pytest.mark.parametrize("verb", WORDS)
@pytest.mark.parametrize("paper", PAPERS)
def test_a_verb_has_its_words_in_every_folder(paper, verb):
    assert (ROOT / paper / f"{verb}.py").exists()
    cfg = composed(paper, verb)
    missing = [w for w in WORDS[verb] if not _has(cfg, w)]
    assert not missing, f"{paper}/configs/{verb}.yaml lacks {missing}"


def _has(cfg, word):
    *parents, last = word.split(".")
    node = OmegaConf.select(cfg, ".".join(parents)) if parents else cfg
    return node is not None and last in list(node.keys())  # `in` leaves out what has no value yet


@pytest.mark.parametrize(("paper", "script"), SCRIPTS)
def test_every_script_is_one_of_the_frames(paper, script):
    """common.scripts turns errors into one line and checks types; Hydra's own decorator or argparse would do neither."""
    text = next((ROOT / paper).rglob(f"{script}.py")).read_text()
    calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert any(n.func.id == "script" for n in calls) and "argparse" not in text and "hydra.main" not in text


@pytest.mark.parametrize("paper", PAPERS)
def test_no_function_is_longer_than_60_lines_and_no_train_script_longer_than_200(paper):
    assert (ROOT / paper / "train.py").read_text().count("\n") <= 200
    long = []
    for file in (ROOT / paper).rglob("*.py"):
        if "tests" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long.append(f"{file.relative_to(ROOT)}:{node.name}")
    assert not long


@pytest.mark.parametrize("paper", PAPERS)
def test_a_checkpoint_is_loaded_by_path_alone(paper):
    load = importlib.import_module(f"{paper}.checkpoint").load
    required = [
        p for p in inspect.signature(load).parameters.values() if p.default is p.empty and p.kind != p.VAR_KEYWORD
    ]
    assert len(required) == 1, "load(path) must need the path only"


@pytest.mark.parametrize("paper", PAPERS)
def test_run_directories_are_named_by_run_name(paper):
    for file in (ROOT / paper / "configs").glob("*.yaml"):
        assert "override_dirname" not in file.read_text(), file


@pytest.mark.parametrize("paper", PAPERS)
def test_every_equation_of_the_map_can_be_imported(paper):
    equations = yaml.safe_load((ROOT / paper / "claims.yaml").read_text()).get("equations")
    assert equations, "claims.yaml has no equations: {source, says, code: module:name}"
    for row in equations:
        module, _, name = row["code"].partition(":")
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        assert row["source"] and row["says"]


@pytest.mark.parametrize("paper", PAPERS)
def test_every_defect_is_shown_by_a_test_that_exists_and_advice_stands_on_recorded_claims(paper):
    document = load_document(ROOT / paper)
    for row in document["defects"]:
        file, _, name = row["test"].partition("::")
        assert file.startswith((f"{paper}/tests/", "common/tests/")) and re.search(
            rf"^def {re.escape(name)}\(", (ROOT / file).read_text(), flags=re.M
        ), row["test"]
    recorded = {i for e in evidence(ROOT / paper) for i, r in e.claims.items() if r["verdict"] != "not_run"}
    for row in document["advice"]:
        assert set(row["claims"]) <= recorded, f"{row['task']}: not recorded"
        assert row["claims"] or "cannot be told" in row["says"], row["task"]


@pytest.mark.parametrize("paper", PAPERS)
def test_figures_have_words_for_every_metric_of_a_tested_claim(paper):
    document = load_document(ROOT / paper)
    wordless = {c["metric"] for c in document["claims"] if c["kind"] in TESTED} - document["metrics"].keys()
    assert not wordless, f"add to metrics: in {paper}/claims.yaml what these are"


@pytest.mark.parametrize("paper", PAPERS)
def test_the_first_screen_of_a_readme(paper):
    lines = (ROOT / paper / "README.md").read_text().splitlines()
    first = next(i for i, line in enumerate(lines, 1) if line.startswith("```"))
    assert first <= 20 and len(lines) <= 92, f"first command on line {first} of {len(lines)}"
    assert any("![" in line for line in lines[:20]), "no picture on the first screen"


def test_nothing_cites_a_document_that_the_reader_does_not_have():
    cited = re.compile(r"[Ss]ections? [0-9]|[Tt]he specification|exact checks? [0-9]|\bprototype")
    tracked = subprocess.run(
        ["git", "ls-files", *PAPERS, "common"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    found = []
    for name in tracked:
        path = ROOT / name
        if path.suffix in (".py", ".yaml", ".md") and path.is_file() and "/results/" not in name:
            found += [f"{name}:{i}" for i, line in enumerate(path.read_text().splitlines(), 1) if cited.search(line)]
    assert not found
