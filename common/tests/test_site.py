"""The pages of the evidence: what stands on them, that links lead somewhere, and that a browser filters them without scripts."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from common.metrics import site
from common.metrics.claims import load_document
from common.metrics.readme import PAPERS

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    out = tmp_path_factory.mktemp("repository") / "runs/site"
    site.build(ROOT, out)
    return out


def test_every_sentence_of_every_abstract_is_on_the_first_page_with_its_verdicts(pages):
    index = unescape((pages / "index.html").read_text())
    for paper in PAPERS:
        document = load_document(ROOT / paper)
        assert len(document["abstract"]) >= 3, paper
        found = {e.label: e.claims for e in site.evidence(ROOT / paper)}
        for row in document["abstract"]:
            assert row["says"] in index
        for row in site.sentences(document, site.evidence(ROOT / paper)):
            for claim, label, result in row["tests"]:
                assert found[label][claim["id"]]["verdict"] == result["verdict"] in row["verdicts"]
                assert f">{label}: {result['verdict']}</a>" in index


def test_every_recorded_claim_has_a_row_with_its_command(pages):
    for paper in PAPERS:
        text = unescape((pages / f"{paper}.html").read_text())
        for found in site.evidence(ROOT / paper):
            for claim in load_document(ROOT / paper)["claims"]:
                if claim["id"] in found.claims:
                    assert claim["statement"] in text
                    if claim["kind"] != "exact":
                        assert site.command(paper, claim, found.scale) in text


def test_the_guide_has_all_advice_with_recorded_verdicts_and_every_defect_with_its_test(pages):
    text = (pages / "guide.html").read_text()
    for paper in PAPERS:
        document, own = load_document(ROOT / paper), (pages / f"{paper}.html").read_text()
        found = site.evidence(ROOT / paper)
        for row in site.advice(document, found):
            assert row["says"] in text and row["says"] in own and row["take"] in text
            for claim, label, result in row["tests"]:
                recorded = next(e.claims for e in found if e.label == label)
                assert recorded[claim["id"]]["verdict"] == result["verdict"] != "not_run"
                assert f"{paper}.html#{site.anchor(claim['id'], label)}" in text
        for row in site.defects(document):
            assert row["says"] in text and row["says"] in own
            assert f'<a href="../../{row["file"]}"><code>{row["name"]}</code></a>' in text


def test_every_row_of_every_recorded_bench_is_on_the_page_of_speed(pages):
    text = unescape((pages / "speed.html").read_text())
    for paper in PAPERS:
        files = sorted(p for kind in ("bench", "deploy") for p in (ROOT / paper / "results" / kind).glob("bench*.json"))
        assert files, f"{paper} has no recorded bench"
        for file in files:
            assert file.relative_to(ROOT).as_posix() in text
            for row in json.loads(file.read_text()):
                assert f"<td>{row['name']}</td>" in text and f">{row['ratio']:.2f}</td>" in text


def test_links_and_pictures_lead_somewhere(pages):
    for page in pages.glob("*.html"):
        text = page.read_text()
        names = set(re.findall(r'id="([^"]+)"', text))
        for target in re.findall(r'(?:href|src)="([^"]+)"', text):
            if re.match("https?:|data:", target):
                continue
            file, _, anchor = unescape(target).partition("#")
            if file.startswith("../../"):
                assert (ROOT / file.removeprefix("../../")).exists(), f"{page.name}: {target}"
            elif file:
                assert (pages / file).exists(), f"{page.name}: {target}"
            if anchor and not file.startswith("../../"):
                there = set(re.findall(r'id="([^"]+)"', (pages / file).read_text())) if file else names
                assert anchor in there, f"{page.name}: {target}"


def test_the_interval_is_drawn_on_the_side_that_it_lies_on():
    effect = {"estimate": -2.0, "low": -3.0, "high": -1.0}
    drawn = site.forest({"kind": "ordering", "effect": effect})
    assert drawn["low"] < drawn["estimate"] < drawn["high"] < drawn["middle"]
    ratio = site.forest({"kind": "ratio", "effect": {"estimate": 2.0, "low": 1.5, "high": 2.5}})
    assert ratio["middle"] < ratio["low"] < ratio["high"] <= ratio["width"]
    assert site.forest({"kind": "exact", "effect": None}) is None


def test_a_report_of_this_machine_stands_beside_the_record(tmp_path):
    paper = tmp_path / "ncl_pp"
    shutil.copytree(ROOT / "ncl_pp/results/mini", paper / "results/mini")
    shutil.copytree(ROOT / "ncl_pp/results/mini", paper / "runs/mini/report")
    shutil.copy(ROOT / "ncl_pp/claims.yaml", paper)
    report = json.loads((paper / "runs/mini/report/claims.json").read_text())
    next(r for r in report["claims"] if r["id"] == "bsce_beats_ce")["verdict"] = "contradicted"
    (paper / "runs/mini/report/claims.json").write_text(json.dumps(report))
    run = paper / "runs/mini/ce/seed100"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"epoch": 1, "loss_ce": 2.0}\n{"epoch": 2, "loss_ce": 0.5}\n')
    shutil.copytree(ROOT / "ncl_pp/results/mini", paper / "results/external/someone/mini")
    found = site.evidence(paper)
    assert [e.label for e in found] == ["mini", "mini, someone", "mini, this machine"]
    assert [e.claims["bsce_beats_ce"]["verdict"] for e in found] == ["supported", "supported", "contradicted"]
    site.build(tmp_path, tmp_path / "site")
    text = (tmp_path / "site/ncl_pp.html").read_text()
    assert "loss ce 2 to 0.5" in text and 'points="0.0,4.0 220.0,56.0"' in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [420, 1200])
def test_a_browser_hides_what_is_not_wanted_and_the_page_fits_a_phone(pages, width, tmp_path):
    probe = """<script>addEventListener("load", () => {
    const seen = e => e.offsetParent !== null && getComputedStyle(e).display != "none";
    const rows = [...document.querySelectorAll("tr[class*=v-]")];
    document.title = JSON.stringify({rows: rows.filter(seen).length, all: rows.length,
      empty: rows.filter(r => seen(r) && ![...r.querySelectorAll(".chip")].some(seen)).length,
      supported: [...document.querySelectorAll(".chip.supported")].filter(seen).length,
      wide: document.documentElement.scrollWidth - document.documentElement.clientWidth}) })</script></head>"""
    found = {}
    for name, box in (("all", None), ("without", "supported")):
        text = (pages / "index.html").read_text().replace("</head>", probe)
        text = text.replace(f'id="f-{box}" checked', f'id="f-{box}"')
        (pages / f"probe_{name}.html").write_text(text)
        assert CHROMIUM is not None
        done = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / name}",
             f"--window-size={width},900", "--dump-dom", f"file://{pages / f'probe_{name}.html'}"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        found[name] = json.loads(unescape(re.search(r"<title>(\{.*?\})</title>", done.stdout)[1]))  # type: ignore[index]
        (pages / f"probe_{name}.html").unlink()
    assert found["all"]["rows"] == found["all"]["all"] and found["all"]["supported"] > 0
    assert found["without"]["supported"] == 0 and 0 < found["without"]["rows"] < found["all"]["rows"]
    assert found["all"]["empty"] == found["without"]["empty"] == 0 and found["all"]["wide"] <= 0
