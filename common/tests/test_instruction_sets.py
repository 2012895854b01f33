"""One recorded cell with all instructions and with AVX2: what is counted, what is capped, what is shown."""

import json
import os
import subprocess
import sys

from common import instruction_sets, reproduce
from common.metrics import site
from common.metrics.readme import PAPERS
from common.runs import read_json

MACHINE = {"cpu": "some CPU", "isa": "AVX512"}
RECORDED = {"top1": 0.5, "loss": 2.0, "gone": 1.0}


def test_numbers_are_counted_and_the_farthest_is_named():
    assert instruction_sets.compare(RECORDED, dict(RECORDED)) == {"metrics": 3, "same": 3, "worst": None}
    moved = {"top1": 0.4, "loss": 1.9, "gone": 1.0, "new": 3.0}
    assert instruction_sets.compare(RECORDED, moved) == {"metrics": 3, "same": 1, "worst": ["top1", 0.5, 0.4]}
    assert instruction_sets.compare(RECORDED, {"top1": 0.5, "loss": 9.0})["worst"] == ["gone", 1.0, None]


def test_the_second_run_is_capped_and_both_are_written(tmp_path, monkeypatch, capsys):
    seen = []

    def again(paper, scale, name="", extra=(), env=None):
        seen.append(env)
        capped = env["ONEDNN_MAX_CPU_ISA"] == "AVX2"
        metrics = RECORDED | ({"top1": 0.4} if capped else {})
        machine = MACHINE | ({"isa": "AVX2"} if capped else {})
        return {"cell": "a/seed1", "metrics": RECORDED, "machine": MACHINE}, {"metrics": metrics, "machine": machine}

    (tmp_path / "ncl_pp/results/mini").mkdir(parents=True)
    monkeypatch.setattr(reproduce, "again", again)
    assert instruction_sets.main(["ncl_pp", "--root", str(tmp_path)]) == 0
    assert (
        seen == [dict.fromkeys(instruction_sets.AVX2), instruction_sets.AVX2]
        and "AVX2: 2 of 3 numbers as recorded" in capsys.readouterr().out
    )
    native, capped = read_json(tmp_path / "ncl_pp/results/mini/isa.json")
    assert native["same"] == 3 and native["here"] == "some CPU, AVX512" and native["worst"] is None
    assert capped["same"] == 2 and capped["here"] == "some CPU, AVX2" and capped["worst"] == ["top1", 0.5, 0.4]

    assert instruction_sets.main(["nobody", "--root", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_the_caps_take_away_what_lies_above_avx2():
    """By asking the libraries, in a process of its own: they look at the variables when they are loaded."""
    code = """
import torch, numba, numpy as np
@numba.njit(fastmath=True)
def total(x):
    s = np.float32(0)
    for i in range(len(x)):
        s += x[i]
    return s
total(np.ones(64, dtype=np.float32))
print(torch.backends.cpu.get_cpu_capability(), "zmm" in next(iter(total.inspect_asm().values())))
"""
    env = os.environ | instruction_sets.AVX2
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() in (["AVX2", "False"], ["DEFAULT", "False"]), done.stdout


def test_the_first_page_has_a_row_for_each(tmp_path):
    pages = tmp_path / "site"
    site.build(reproduce.ROOT, pages)
    text = (pages / "index.html").read_text()
    for paper in PAPERS:
        file = reproduce.ROOT / paper / "results/mini/isa.json"
        assert file.is_file(), f"a new record takes this file away: make isa-{paper}"
        rows = json.loads(file.read_text())
        assert [row["kind"] for row in rows] == ["native", "AVX2"]
        for row in rows:
            assert row["cell"] in text and f"{row['same']} of {row['metrics']}" in text
