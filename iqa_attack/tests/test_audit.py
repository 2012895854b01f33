"""audit.py as a stranger runs it: any callable and an ONNX file, a page, a broken file, an interruption."""

import csv
import re
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest
import torch
from torch import nn

from iqa_attack import audit
from iqa_attack.photographs.images import read_image, write_png
from iqa_attack.quality_models.calibration import Calibration, Scored
from iqa_attack.quality_models.models import CallableMetric, OnnxMetric
from iqa_attack.tests.conftest import config


def sharpness(x):
    """A metric with a gradient: the mean size of the differences between neighbours, less where noise makes them."""
    grey = x.mean(1, keepdim=True)
    smooth = nn.functional.avg_pool2d(grey, 5, 1)
    return (smooth.diff(dim=-1).abs().mean((1, 2, 3)) - (grey[..., 2:-2, 2:-2] - smooth).abs().mean((1, 2, 3))) * 100


@pytest.fixture
def folder(tmp_path, images):
    for i, name in enumerate(("0", "1 #b")):
        write_png(tmp_path / "in" / f"{name}.png", images[i])
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
    assert "s for an image of 96 x 96 pixels, 3 images" in said.out
    assert re.search(r"[\d.]+ s for the first image, about [\d.]+ min for the rest", said.out)
    rows, page = list(csv.DictReader((out / "audit.csv").open())), (out / "index.html").read_text()
    assert [r["image"] for r in rows] == ["0", "1 #b"] and all(r["gradient"] == "exact" for r in rows)
    for row in rows:
        for what in ("original", "attacked", "difference"):
            assert (
                f'src="images/{quote(row["image"])}_{what}.png"' in page
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
    assert "random squares" not in page and "below 0.8" in page, "the sharpness of an image is not its quality"
    assert f"(raw {float(rows[0]['raw_after']):.4g})" in page


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
    assert audit.run_audit(options(folder), fabric) == whole and seen == ["0", "1 #b", "1 #b"], (
        "the first is not attacked again"
    )
    assert audit.run_audit(options(folder), fabric) == whole and len(seen) == 3, "finished: nothing is done"


def test_an_onnx_file_is_a_black_box(folder, fabric, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    from common.onnx_export import export_onnx

    class Sharpness(nn.Module):
        def forward(self, x):
            return sharpness(x)

    example = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    export_onnx(Sharpness().eval(), example, tmp_path / "m.onnx", about={}, tolerance=1e-3, outputs=("scores",))
    found = audit.run_audit(options(folder, f"model={tmp_path / 'm.onnx'}", "fidelity=ssim"), fabric)
    assert found["images"] == 2 and found["change_after"] > 0
    page = (folder.parent / "out/index.html").read_text()
    assert "attacked with random squares" in page and "none: random squares" in page
    write_png(folder / "large.png", torch.rand(3, 120, 120))
    with pytest.raises(SystemExit):
        audit.run_audit(options(folder, f"model={tmp_path / 'm.onnx'}", "fidelity=ssim", "force=true"), fabric)
    assert "120 x 120 pixels, m.onnx takes 96 x 96 only" in capsys.readouterr().err


def test_a_metric_of_one_image_at_a_time(images):
    """PIQE of pyiqa gives one value for a batch, others their mean: each image is then given alone, with its gradient."""
    one = CallableMetric(lambda x: sharpness(x).mean(), higher_is_better=False)
    x = images[:3].clone().requires_grad_()
    torch.testing.assert_close(one(x), -sharpness(images[:3]))
    one(x).sum().backward()
    assert x.grad is not None and bool((x.grad.abs().flatten(1).sum(1) > 0).all())
    with pytest.raises(ValueError, match="gives 2 values for one image"):
        CallableMetric(lambda x: torch.ones(2), higher_is_better=True)(images[:1])


def test_an_onnx_file_for_one_image_is_given_one_at_a_time(images):
    def run(_, inputs):
        assert inputs["x"].shape == (1, 3, 96, 96)
        return [inputs["x"].mean((1, 2, 3))]

    metric = OnnxMetric.__new__(OnnxMetric)
    nn.Module.__init__(metric)
    metric.session, metric.inputs, metric.path, metric.batch, metric.size = (
        SimpleNamespace(run=run),
        ["x"],
        Path("m.onnx"),
        1,
        96,
    )
    torch.testing.assert_close(metric(images), images.mean((1, 2, 3)))


def test_a_checkpoint_below_the_floor_is_refused(folder, trained_root, fabric):
    weights = f"weights={trained_root / 'default/all/seed0/last.ckpt'}"
    cfg = config(
        "audit", weights, "model=brisque", f"images={folder}", f"out={folder.parent / 'no'}", "calibration_floor=1"
    )
    with pytest.raises(ValueError, match=r"brisque: SRCC 0\.\d+ on .*, needed: 1"):
        audit.run_audit(cfg, fabric)
    assert not (folder.parent / "no").exists()


def test_large_photographs_are_attacked_a_few_candidates_at_a_time(brisque, images, monkeypatch):
    sizes = []

    def watching(x):
        sizes.append(len(x))
        return brisque(x)

    metric = CallableMetric(watching, higher_is_better=True)
    scored = Scored(metric, Calibration(40.0, 20.0, 1.0, 0, "given"))
    whole = audit.audit_scored(scored, images[:1], names=["a"], steps=3)[0]
    assert max(sizes) == 8, "all candidates at once"
    sizes.clear()
    monkeypatch.setattr(audit, "PIXELS", 2 * 96 * 96 + 1)
    few = audit.audit_scored(scored, images[:1], names=["a"], steps=3)[0]
    assert max(sizes) == 2 and few["after"] == pytest.approx(whole["after"], abs=0.2)
