"""The report, its figures and the README tables, from a small tree of finished runs."""

import csv
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread

from common.metrics import figures, readme, report, tables
from common.metrics.readme import BEGIN, END, PAPERS

PUBLISHED = [
    {
        "id": "t1",
        "table": "Table 1",
        "setting": "C100-LT",
        "metric": "top1",
        "value": 54.2,
        "unit": "%",
        "source": "code",
    },
    {"id": "m1", "table": "", "setting": "IF50", "metric": "top1", "value": 58.2, "unit": "%", "source": "memory"},
    {
        "id": "p1",
        "table": "4",
        "setting": "ResNet-32",
        "metric": "params",
        "value": 470004,
        "unit": "",
        "source": "paper",
    },
]
BASE = {"kind": "ordering", "scale": "mini", "primary": False, "published": None, "better": "higher"}
CLAIMS = [
    BASE
    | {"id": "better", "statement": "new | beats old", "primary": True, "published": "t1", "metric": "top1"}
    | {"arms": ["new", "old"]},
    BASE | {"id": "worse", "statement": "new is slower", "published": "m1", "metric": "top1", "arms": ["old", "new"]},
    BASE | {"id": "spread", "statement": "less spread", "kind": "ratio", "better": "lower", "metric": "eval/dis"}
    | {"arms": ["new", "old"], "primary": True},
    BASE | {"id": "positive", "statement": "active", "kind": "property", "metric": "active", "arms": ["new"]},
    BASE | {"id": "size", "statement": "size", "kind": "exact", "published": "p1", "metric": "params", "arms": ["new"]},
    BASE | {"id": "paper", "statement": "at paper scale", "published": "t1", "scale": "paper", "metric": "top1"}
    | {"arms": ["new", "old"]},
    BASE | {"id": "absent", "statement": "an arm nobody ran", "metric": "top1", "arms": ["new", "never"]},
]  # fmt: skip


def write_run(folder, seed, metrics, status="finished", commit="c0ffee", config=None):
    folder = folder / f"seed{seed}"
    folder.mkdir(parents=True)
    cell = {"scale": "mini", "arm": "?", "seed": seed, "status": status, "metrics": metrics, "seconds": 30.0}
    cell |= {"config_sha256": f"{seed}", "commit": commit, "versions": {"torch": "2"}, "machine": {"cores": 2}}
    (folder / "result.json").write_text(json.dumps(cell))
    usual = {"seed": seed, "data": {"seed": seed}, "start": f"runs/mini/first/seed{seed}/last.ckpt", "lr": 0.1}
    (folder / "config.yaml").write_text(yaml.safe_dump(usual | (config or {})))


@pytest.fixture
def root(tmp_path):
    paper = tmp_path / "ncl_pp"
    paper.mkdir()
    (paper / "claims.yaml").write_text(yaml.safe_dump({"basis": "code", "published": PUBLISHED, "claims": CLAIMS}))
    rng = np.random.default_rng(0)
    for arm, shift, dis in (("old", 0.0, 0.10), ("new", 2.0, 0.05)):
        for seed, level in zip(range(100, 104), (60.0, 66.0, 63.0, 70.0), strict=True):
            noise = float(rng.normal(0, 0.2))
            metrics = {"top1": level + shift + noise, "eval/dis": dis * (1 + noise / 5), "params": 470004, "loss": 1.5}
            write_run(paper / "runs/mini" / arm, seed, metrics | {"active": 0.4 + noise})
    write_run(paper / "runs/mini/old/lr=1", 100, {}, status="failed")
    for file, heading in ((paper / "README.md", "# NCL++ here"), (tmp_path / "README.md", "# Ten papers")):
        file.write_text(f"{heading}\n\nbefore\n{BEGIN}\n{END}\nafter\n")
    return tmp_path


def test_report_is_complete(root):
    written = report.write_report(root / "ncl_pp", "mini")
    out = root / "ncl_pp/runs/mini/report"
    assert json.loads((out / "claims.json").read_text()) == written  # what it returns survives JSON
    assert written["machine"] == {"cores": 2} and written["paper"] == "ncl_pp"
    assert {"commit", "dirty", "versions", "scale"} <= set(written)
    verdicts = {r["id"]: r["verdict"] for r in written["claims"]}
    assert verdicts == {
        "better": "supported",
        "worse": "contradicted",
        "spread": "supported",
        "positive": "supported",
        "size": "supported",
        "absent": "not_run",
    }
    required = {"id", "statement", "kind", "primary", "published", "measured", "effect", "mde", "verdict"}
    assert all(required <= set(r) for r in written["claims"])
    assert 1.5 < written["claims"][2]["effect"]["estimate"] < 2.5  # .10 / .05, better lower
    text = (out / "report.md").read_text()
    for words in (
        "Basis: code",
        "54.2 % (Table 1, code)",
        "58.2 % (memory, not compared)",
        "470,004",
        "old/lr=1/seed100: failed",
        "8 of 9 cells finished",
        "![",
        "(claims.png)",
        "(arms.png)",
        "<details>",
        "new \\| beats old",
        "(exploratory)",
    ):
        assert words in text, words
    assert "## Warnings" not in text and "can show" not in text
    rows = list(csv.DictReader((out / "cells.csv").open()))
    assert len(rows) == 9 and rows[0].keys() >= {"arm", "seed", "status", "seconds", "loss", "eval/dis"}
    assert {r["loss"] for r in rows if r["status"] == "finished"} == {"1.5"}


def test_limits_of_the_scale_are_quoted(root):
    limits = root / "ncl_pp/configs/reproduce/mini/README.md"
    limits.parent.mkdir(parents=True)
    limits.write_text("It cannot show accuracy on photographs.\n")
    report.write_report(root / "ncl_pp", "mini")
    text = (root / "ncl_pp/runs/mini/report/report.md").read_text()
    assert "## What this scale can show / cannot show\n\nIt cannot show accuracy on photographs.\n" in text


def test_incomparable_cells_are_warned_about(root):
    other = {"lr": 0.2, "start": "runs/mini/first/seed100/last.ckpt"}
    write_run(root / "ncl_pp/runs/mini/new", 200, {}, status="failed", commit="bad", config=other)
    report.write_report(root / "ncl_pp", "mini")
    text = (root / "ncl_pp/runs/mini/report/report.md").read_text()
    warnings = text.partition("## Warnings")[2].partition("##")[0]
    assert '"bad" in 1 cells, e.g. new/seed200' in warnings
    assert (
        "arm new: seeds differ in config: lr, start\n" in warnings
    )  # seed, data.seed and runs of that seed may differ


def test_figures_are_drawn_and_not_left_over(root, tmp_path):
    report.write_report(root / "ncl_pp", "mini")
    out = root / "ncl_pp/runs/mini/report"
    for name in ("claims.png", "arms.png"):
        image = imread(out / name)[..., :3]
        assert min(image.shape[:2]) > 300
        dark = (image.min(2) < 0.9).mean()
        assert 0.005 < dark < 0.5  # neither blank nor filled
    coloured = lambda image, rgb: (np.abs(image - np.array(rgb) / 255).max(2) < 0.02).sum()  # noqa: E731
    forest = imread(out / "claims.png")[..., :3]
    assert coloured(forest, (0x00, 0x9E, 0x73)) > 100 and coloured(forest, (0xD5, 0x5E, 0x00)) > 100
    document = {"basis": "code", "published": PUBLISHED, "claims": [CLAIMS[4]]}
    (root / "ncl_pp/claims.yaml").write_text(yaml.safe_dump(document))
    report.write_report(root / "ncl_pp", "mini")  # exact claims alone: nothing to draw
    assert not (out / "claims.png").exists() and not (out / "arms.png").exists()
    assert ".png" not in (out / "report.md").read_text()


def test_terminal_table_fits(root, capsys):
    assert report.main(["ncl_pp", "mini", "--root", str(root)]) == 0  # a contradicted claim does not fail
    text = capsys.readouterr().out
    table = text.partition("\n\n")[2].partition("\nreport:")[0]
    assert max(map(len, table.splitlines())) <= 100
    assert "supported     new | beats old" in table and "exact counts and identities: 1 of 1 as stated" in table
    assert "new is slower" not in table and "exploratory claims: see the report" in table
    assert text.strip().splitlines()[-1].endswith("report.md"), "the last line says where the report is"


def test_missing_or_bad_input_is_one_line_and_status_1(root, capsys):
    for argv, words in (
        (["ncl_pp", "full"], "runs/full: no runs there"),
        (["q_vit", "mini"], "q_vit/claims.yaml"),
    ):
        assert report.main([*argv, "--root", str(root)]) == 1
        captured = capsys.readouterr()
        assert words in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert not (root / "ncl_pp/runs/full").exists()
    with pytest.raises(SystemExit):
        report.main(["ncl_pp"])


def test_module_runs_and_out_moves_the_report(root, monkeypatch):
    out = ["--root", str(root), "--out", str(root / "elsewhere")]
    monkeypatch.setattr(sys, "argv", ["report", "ncl_pp", "mini", *out])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("common.metrics.report", run_name="__main__")
    assert not ended.value.code
    assert (root / "elsewhere/claims.json").exists() and not (root / "ncl_pp/runs/mini/report").exists()


def record(root):
    source, target = root / "ncl_pp/runs/mini/report", root / "ncl_pp/results/mini"
    report.write_report(root / "ncl_pp", "mini")
    target.mkdir(parents=True, exist_ok=True)
    for name in ("claims.json", "cells.csv"):
        (target / name).write_bytes((source / name).read_bytes())
    report.draw_figures(target)


def test_the_first_screen_shows_five_rows_with_a_verdict_and_the_best_scale(root):
    assert "Nothing recorded yet" in readme.render_front(root / "ncl_pp")
    record(root)

    def rows():
        return [x for x in readme.render_front(root / "ncl_pp").splitlines() if x.startswith("|")]

    assert rows()[0] == "| claim | paper | here, with interval (scale) | verdict |"
    assert len(rows()) <= 2 + readme.FRONT and not any("not_run" in row for row in rows())
    assert "new \\| beats old" in rows()[2] and rows()[2].endswith("(mini) | supported |")
    assert "Exact counts: 1 of 1" in readme.render_front(root / "ncl_pp")
    folder, fewer = root / "ncl_pp/results/real_set", root / "ncl_pp/results/full"
    fewer.mkdir()
    results = json.loads((root / "ncl_pp/results/mini/claims.json").read_text())
    for more, scale in ((-1, "mini"), (2, "full")):
        for measured in (m for r in results["claims"] for m in r["measured"].values()):
            measured["n"] += more
        (fewer / "claims.json").write_text(json.dumps(results))
        assert rows()[2].endswith(f"({scale}) | supported |"), "more seeds before fewer"
    folder.mkdir()
    (folder / "claims.json").write_bytes((root / "ncl_pp/results/mini/claims.json").read_bytes())
    assert rows()[2].endswith("(real_set) | supported |"), "real images before embedded ones"
    claims = yaml.safe_load((root / "ncl_pp/claims.yaml").read_text())
    claims["claims"][1]["front"] = True
    (root / "ncl_pp/claims.yaml").write_text(yaml.safe_dump(claims))
    assert "new is slower" in rows()[2], "a claim marked front comes first"


def test_all_results_stand_in_a_page_of_their_own(root):
    record(root)
    page = readme.render_results(root / "ncl_pp")
    rows = {
        c["id"]: next(x for x in page.splitlines() if x.startswith("|") and c["statement"].replace("|", "\\|") in x)
        for c in CLAIMS
    }
    assert (
        "**new \\| beats old**" in rows["better"]
        and "| supported |" in rows["better"]
        and "| 4.0 min |" in rows["better"]
    )
    assert "58.2 % (memory, not compared)" in rows["worse"] and "| contradicted (exploratory) |" in rows["worse"]
    assert "new 470,004 +/- 0 (4)" in rows["size"] and "1 of 1 exact counts" in page
    assert "`make reproduce-ncl_pp SCALE=paper ONLY=paper`" in rows["paper"]
    assert page.index("Here, embedded data, `mini`") < page.index("## Not run yet") and "Here, paper scale" not in page


def test_speed_has_a_scale_of_its_own_behind_all_others(root):
    record(root)
    claims = yaml.safe_load((root / "ncl_pp/claims.yaml").read_text())
    claims["claims"].append(
        claims["claims"][0] | {"id": "fast", "statement": "it is fast", "scale": "bench", "primary": False}
    )
    (root / "ncl_pp/claims.yaml").write_text(yaml.safe_dump(claims))
    page = readme.render_results(root / "ncl_pp")
    assert "| `make bench-ncl_pp ARGS=record=true` |" in next(x for x in page.splitlines() if "it is fast" in x)
    folder = root / "ncl_pp/results/bench"
    folder.mkdir()
    (folder / "claims.json").write_bytes((root / "ncl_pp/results/mini/claims.json").read_bytes())
    page = readme.render_results(root / "ncl_pp")
    assert page.index("`mini`") < page.index("## Here, speed on one machine, `bench`")


def test_a_margin_is_printed_where_it_is_taken_off():
    result = {"kind": "ordering", "margin": 2.5, "effect": {"estimate": 1.0, "low": 0.5, "high": 1.5, "unit": "%"}}
    assert readme._effect(result) == "+1 [0.5, 1.5] % beyond 2.5"
    assert "beyond" not in readme._effect(result | {"margin": 0})


def test_readmes_round_trip(root, capsys):
    argv = ["--readme", "--root", str(root)]
    record(root)
    assert report.main([*argv, "--check"]) == 1
    assert "ncl_pp/README.md: stale" in capsys.readouterr().out
    assert (root / "README.md").read_text().count("|") == 0  # check wrote nothing
    assert report.main(argv) == 0
    once = (root / "ncl_pp/README.md").read_text(), (root / "README.md").read_text()
    assert report.main([*argv, "--check"]) == 0 and report.update_readmes(root, check=False) == []
    assert ((root / "ncl_pp/README.md").read_text(), (root / "README.md").read_text()) == once
    paper, top = once
    assert paper.startswith("# NCL++ here\n\nbefore\n") and paper.endswith(f"{END}\nafter\n")
    assert "| [`ncl_pp`](ncl_pp/README.md) | experts learn long tails together | new \\| beats old: " in top
    assert "mini: 3 supported, 1 contradicted, 1 not_run; exact 1/1" in top
    assert top.count("| not started |") == len(PAPERS) - 1
    claims = root / "ncl_pp/claims.yaml"
    claims.write_text(claims.read_text().replace("new is slower", "new is much slower"))
    assert set(report.update_readmes(root, check=True)) == {
        root / "ncl_pp/README.md",
        root / "ncl_pp/results/README.md",
    }


def test_readme_errors_name_the_file_and_the_fix(root):
    (root / "ncl_pp/README.md").write_text("# no markers\n")
    with pytest.raises(ValueError, match=rf"ncl_pp/README.md.*{BEGIN}"):
        readme.update_readmes(root, check=True)
    (root / "ncl_pp/README.md").unlink()
    with pytest.raises(FileNotFoundError, match=r"ncl_pp/README\.md"):
        readme.update_readmes(root, check=True)
    folder = root / "ncl_pp/results/mini"
    folder.mkdir(parents=True)
    (folder / "claims.json").write_text("{}")
    with pytest.raises(ValueError, match=r"results/mini/claims\.json"):
        readme.render_front(root / "ncl_pp")


def test_numbers_as_text():
    assert [tables.number(x) for x in (1814073344, 470004.0, 94.0617, 0.000123456, 0, None)] == [
        "1,814,073,344",
        "470,004",
        "94.06",
        "0.0001235",
        "0",
        "n/a",
    ]
    assert (
        tables.p_text({"p": 0.01, "p_holm": 0.03}) == ".030" and tables.p_text({"p": 1e-5, "p_holm": None}) == "<.001"
    )


def test_an_odd_number_of_metrics_leaves_no_empty_axes_and_long_names_break_at_underscores(tmp_path):
    values = {arm: {seed: dict.fromkeys("abc", seed + 0.5) for seed in range(3)} for arm in ("one", "two")}
    assert figures.plot_arms(values, [], ["a", "b", "c"], tmp_path) == ["arms.png", "arms_2.png"]
    many = {f"arm{i}": {seed: {"a": float(i)} for seed in range(3)} for i in range(60)}
    pages = figures.plot_arms(many, [], ["a"], tmp_path)
    assert len(pages) == 3 and all(imread(tmp_path / p).shape[0] < 2000 for p in pages), (
        "no page taller than two screens"
    )
    assert figures._fill("irm_beats_baseline_stressed", 22) == "irm_beats_baseline_\nstressed"


def test_figures_older_than_their_data_or_code_are_stale(root):
    record(root)
    folder = root / "ncl_pp/results/mini"
    assert report.stale_figures(root) == [] and (folder / "claims.png").exists()
    text = (folder / "cells.csv").read_text()
    (folder / "cells.csv").write_text(text.replace("finished", "failed", 1))
    assert report.stale_figures(root) == [folder]
    report.draw_figures(folder)
    assert report.stale_figures(root) == []
    (folder / "figures.json").unlink()
    assert report.stale_figures(root) == [folder]


def test_figures_speak_in_words_and_are_stale_when_the_words_change(tmp_path, monkeypatch):
    words = {"top1": {"says": "top-1 accuracy", "unit": "%"}}
    assert figures._label("top1", [], words) == "top-1 accuracy (%)" and figures._label("a_b", [], words) == "a b"
    drawn, folder = set(), tmp_path / "paper/results/mini"
    folder.mkdir(parents=True)
    for name in ("claims.json", "cells.csv"):
        (folder / name).write_text("{}")
    for says in ("accuracy", "top-1 accuracy"):
        (tmp_path / "paper/claims.yaml").write_text(
            f"{{basis: text, published: [], claims: [], metrics: {{top1: {{says: {says}}}}}}}"
        )
        drawn.add(report._drawn_from(folder))
    assert len(drawn) == 2


@pytest.mark.parametrize("words", [7, 8, 12, 35])
def test_no_text_of_the_forest_plot_leaves_the_figure(tmp_path, monkeypatch, words):
    drawn = []
    monkeypatch.setattr(figures, "Figure", lambda **options: drawn.append(Figure(**options)) or drawn[-1])
    result = {
        "kind": "property", "metric": "m", "verdict": "inconclusive", "level": 0.95, "primary": True,
        "statement": "Patches of the background are dropped more often, all in all, than chance would drop them.",
        "published": None, "arms": ["app"], "better": "higher", "margin": 0, "effect": None,
        "measured": {"app": {"seeds": {"100": 0.3, "101": 0.2, "102": 0.4}}},
    }  # fmt: skip
    others = result | {"metric": "n", "effect": {"estimate": 0.3, "low": 0.1, "high": 0.5}}
    says = {"m": {"says": " ".join(["backgrounds"] * words), "unit": ""}, "n": {"says": "accuracy", "unit": "%"}}
    assert figures.plot_claims([result, others], tmp_path / "claims.png", says)
    (figure,) = drawn
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [axis.xaxis.label.get_window_extent(canvas.get_renderer()) for axis in figure.axes]
    assert len(boxes) == 2 and all(figure.bbox.x0 <= b.x0 and b.x1 <= figure.bbox.x1 for b in boxes)
    assert not boxes[0].overlaps(boxes[1]) and min(b.y0 for b in boxes) >= 0


def test_a_bench_with_fewer_instructions_is_a_sentence_under_the_table(tmp_path):
    """Ratios per number of threads, beside what the table's own run gave."""
    folder = tmp_path / "results/deploy"
    folder.mkdir(parents=True)
    rows = json.loads((Path(__file__).parents[2] / "rbonn/results/deploy/bench.json").read_text())
    (folder / "bench.json").write_text(json.dumps(rows))
    assert "AVX2" not in (readme.render_deployment(tmp_path) or "")
    capped, n = [dict(r) for r in rows], 0
    for row in capped:
        row["isa"] = "AVX2"
        if row.get("kind") == "network":
            row["ratio"], n = 10 * row["threads"] + row["batch"], n + 1
            row["skipped"] = {"onnxruntime fp32": "not capped"}
    assert n == 4
    (folder / "bench_avx2.json").write_text(json.dumps(capped))
    text = readme.render_deployment(tmp_path) or ""
    assert text.endswith(
        "With AVX2, over the fastest float form there: x 11.00 and 18.00 on 1 thread; x 21.00 and 28.00 on 2 threads "
        "(batch 1 and 8; without onnxruntime fp32: not capped)."
    )


def test_a_table_of_bits_names_the_form_that_was_fastest(tmp_path):
    folder = tmp_path / "results/deploy"
    folder.mkdir(parents=True)
    rows = json.loads((Path(__file__).parents[2] / "rbonn/results/deploy/bench.json").read_text())
    ms = {"packed": 4.0, "packed compiled": 3.0, "packed, rest bf16": 1.0, "packed, rest bf16 compiled": 2.0}
    for row in rows:
        if row.get("kind") == "network":
            row["forms"] |= {name: [t, t, t] for name, t in ms.items()}
    (folder / "bench.json").write_text(json.dumps(rows))
    lines = (readme.render_deployment(tmp_path) or "").splitlines()
    for rest, cell in (("float32", "3.0 [3.0, 3.0], compiled"), ("bfloat16", "1.0 [1.0, 1.0], eager")):
        (line,) = (line for line in lines if line.startswith(f"| bits, real-valued rest {rest} |"))
        assert line.endswith(f"| {cell} | {cell} |")


def test_a_table_on_integers_says_from_which_to_which_ratio(tmp_path):
    folder = tmp_path / "results/deploy"
    folder.mkdir(parents=True)
    rows = json.loads((Path(__file__).parents[2] / "q_vit/results/deploy/bench.json").read_text())
    settings = [r for r in rows if r.get("kind") == "integer"]
    for row, ratio in zip(settings, (1.5, 0.5, 2.5, 2.0), strict=True):
        row["ratio"], row["forms"]["onnxruntime fp32"][0] = ratio, 3 * row["ours"]
    (folder / "bench.json").write_text(json.dumps(rows))
    text = readme.render_deployment(tmp_path) or ""
    assert (
        "Over the fastest float form, bfloat16 included: x 0.50 to 2.50. Over onnxruntime in float32: x 3.00. " in text
    )
