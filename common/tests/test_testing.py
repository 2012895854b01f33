"""What the shared plugin of the tests prints."""

import os
import shutil
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from common.pytest_plugin import pytest_configure, pytest_terminal_summary
from common.testing import ROOT


def test_what_tests_measured_is_printed_once_however_they_ended():
    def report(when, outcome, *properties):
        return pytest.TestReport("a", ("a", 1, "a"), {}, outcome, None, when, user_properties=list(properties))

    line, other = ("measured", "ncl_pp: 20 kills"), ("junit", "x")
    stats = {
        "passed": [report("call", "passed", line, other), report("teardown", "passed", line)],
        "failed": [report("call", "failed", ("measured", "rbonn: 3 lines"))],
        "warnings": [object()],
    }
    lines: list[str] = []
    pytest_terminal_summary(SimpleNamespace(stats=stats, write_line=lines.append))  # type: ignore[arg-type]
    assert lines == ["ncl_pp: 20 kills", "rbonn: 3 lines"]


@pytest.mark.parametrize(("workers", "loaded"), [(2, []), (None, ["common.testing"])])
def test_only_what_runs_tests_loads_the_fixtures(workers, loaded):
    found: list[str] = []
    config = SimpleNamespace(getoption=lambda *_: workers, pluginmanager=SimpleNamespace(import_plugin=found.append))
    pytest_configure(config)  # type: ignore[arg-type]
    assert found == loaded


SCRIPT = """
import os, sys
import torch.distributed as dist
from common import runs

rank = int(os.environ["RANK"])
if sys.argv[1] == "fails" and rank == 1:
    raise SystemExit("no such thing")
fabric = runs.launch({"accelerator": "cpu", "devices": int(os.environ["LOCAL_WORLD_SIZE"])})
print(f"rank {fabric.global_rank} of {fabric.world_size} in {os.getcwd()}, torchrun: {dist.is_torchelastic_launched()}")
fabric.barrier()
runs.leave()
"""


def test_ranks_are_those_of_torchrun(ranks, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = ranks(tmp_path / "script.py", ["works"])
    assert done.returncode == 0, done.stderr
    said = sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    assert said == [f"rank {r} of 2 in {tmp_path}, torchrun: True" for r in (0, 1)]
    assert "RANK" not in os.environ


def test_a_rank_that_fails_ends_the_others(ranks, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = ranks(tmp_path / "script.py", ["fails"])  # rank 0 waits for rank 1 in vain
    assert done.returncode not in (0, None) and "no such thing" in done.stderr


CHOICES = [
    [], ["seed=3"], ["method=xnor", "seed=3"], ["method=xnor", "seed=4", "optim.lr=0.5"], ["data=fashion_mnist"],
    ["+new={a: 1}"], ["+reproduce/mini=20_train_arms"],
]  # fmt: skip


def test_what_the_suite_composes_once_is_what_hydra_composes(tmp_path):
    """In a folder of a test, where files may change, it reads them each time."""
    ours, copied = ROOT / "rbonn/configs", tmp_path / "configs"
    shutil.copytree(ours, copied)

    def composed(folder, overrides, **options):
        with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
            text = OmegaConf.to_yaml(compose("config", overrides=overrides, **options))
        return text.replace(str(folder), "")

    for overrides in [*CHOICES, *CHOICES]:
        assert composed(ours, overrides) == composed(copied, overrides)
        whole = {"return_hydra_config": True}
        assert composed(ours, overrides, **whole) == composed(copied, overrides, **whole)
    file = copied / "config.yaml"
    file.write_text(file.read_text() + "another: 1\n")
    assert "another: 1" in composed(copied, []) and "another: 1" not in composed(ours, [])
