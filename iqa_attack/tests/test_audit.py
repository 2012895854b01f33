"""audit.py as a stranger runs it: any callable and an ONNX file, a page, a broken file, an interruption."""

import csv
import re

import pytest
import torch
from torch import nn

from iqa_attack import audit
from iqa_attack.photographs.images import read_image, write_png
from iqa_attack.tests.conftest import config


def sharpness(x):
    """A metric with a gradient: the mean size of the differences between neighbours, less where noise makes them."""
    grey = x.mean(1, keepdim=True)
    smooth = nn.functional.avg_pool2d(grey, 5, 1)
    return (smooth.diff(dim=-1).abs().mean((1, 2, 3)) - (grey[..., 2:-2, 2:-2] - smooth).abs().mean((1, 2, 3))) * 100


@pytest.fixture
def folder(tmp_path, images):
    for i in range(2):
        write_png(tmp_path / "in" / f"{i}.png", images[i])
    return tmp_path / "in"


def options(folder, *more):
    where = f"out={folder.parent / 'out'}"
    return config(
        "audit",
        "model=iqa_attack.tests.test_audit:sharpness",
        f"images={folder}",
        where,
        "steps=3",
        "b3=0",
        "b4=1",
        "calibration_floor=-1",
        *more,
    )


def test_the_page_of_a_callable(folder, fabric, tmp_path, capsys):
    (folder / "broken.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as stopped:
        audit.run_audit(options(folder), fabric)
    said, out = capsys.readouterr(), folder.parent / "out"
    assert stopped.value.code == 1 and "broken.png" in said.err and "1 of 3 images were left out" in said.err
    assert re.search(r"[\d.]+ s for the first image, about [\d.]+ min for the rest", said.out)
    rows, page = list(csv.DictReader((out / "audit.csv").open())), (out / "index.html").read_text()
    assert [r["image"] for r in rows] == ["0", "1"] and all(r["gradient"] == "exact" for r in rows)
    for row in rows:
        for what in ("original", "attacked", "difference"):
            assert (
                f'src="images/{row["image"]}_{what}.png"' in page
                and (out / f"images/{row['image']}_{what}.png").is_file()
            )
        original, attacked = (
            read_image(out / f"images/{row['image']}_{w}.png")[None] for w in ("original", "attacked")
        )
        assert float(sharpness(original)) == pytest.approx(float(row["raw_before"]), rel=1e-5), (
            "the file is what was scored"
        )
        assert float(sharpness(attacked)) == pytest.approx(float(row["raw_after"]), rel=1e-5)
        assert float((attacked - original).abs().max() * 255) == pytest.approx(float(row["max_change"]), abs=1e-3)
    interval = re.search(r"R under the attack \(chebyshev\): <b>([\d.]+) \[(-?[\d.]+), ([\d.]+)\]</b>", page)
    assert interval and float(interval[2]) < float(interval[1]) < float(interval[3])
    assert "random squares" not in page


def test_an_interrupted_audit_goes_on_where_it_stopped(folder, fabric, monkeypatch):
    whole = audit.run_audit(options(folder, f"out={folder.parent / 'whole'}"), fabric)
    one, seen = audit.audit_one, []

    def killed(cfg, scored, x0, name, out):
        seen.append(name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return one(cfg, scored, x0, name, out)

    monkeypatch.setattr(audit, "audit_one", killed)
    with pytest.raises(KeyboardInterrupt):
        audit.run_audit(options(folder), fabric)
    assert audit.run_audit(options(folder), fabric) == whole and seen == ["0", "1", "1"], (
        "the first is not attacked again"
    )
    assert audit.run_audit(options(folder), fabric) == whole and len(seen) == 3, "finished: nothing is done"


@pytest.mark.parametrize("fidelity", ["ssim", "chebyshev"])
def test_an_onnx_file_is_a_black_box(folder, fabric, tmp_path, capsys, fidelity):
    pytest.importorskip("onnxruntime")
    from common.onnx_export import export_onnx

    class Sharpness(nn.Module):
        def forward(self, x):
            return sharpness(x)

    example = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    export_onnx(Sharpness().eval(), example, tmp_path / "m.onnx", about={}, tolerance=1e-3, outputs=("scores",))
    found = audit.run_audit(options(folder, f"model={tmp_path / 'm.onnx'}", f"fidelity={fidelity}"), fabric)
    assert found["images"] == 2 and found["change_after"] > 0
    page = (folder.parent / "out/index.html").read_text()
    assert "attacked with random squares" in page and "none: random squares" in page
    write_png(folder / "large.png", torch.rand(3, 120, 120))
    with pytest.raises(SystemExit):
        audit.run_audit(options(folder, f"model={tmp_path / 'm.onnx'}", f"fidelity={fidelity}", "force=true"), fabric)
    assert "120 x 120 pixels, m.onnx takes 96 x 96 only" in capsys.readouterr().err
