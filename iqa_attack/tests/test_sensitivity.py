"""Where a model is sensitive, in closed form and on models of known structure; what counterexamples have in common."""

import shutil

import pytest
import torch

from common import runs
from iqa_attack import attack, sensitivity
from iqa_attack.quality_models.ma19 import Ma19
from iqa_attack.sensitivity import (
    alike,
    border,
    colour,
    compare,
    describe,
    edges,
    energy,
    gradients,
    moved_by_others,
    spread,
)
from iqa_attack.tests.conftest import attack_config, config


def test_spread_is_the_share_of_the_pixels_that_carry_the_energy():
    e = torch.zeros(4, 6, 8)
    e[0], e[1, 2, 3], e[2, :3], e[3, :, 0] = 2.0, 7.0, 5.0, 1.0
    assert spread(e).tolist() == pytest.approx([1, 1 / 48, 1 / 2, 1 / 8])


def test_colour_is_what_luma_does_not_see():
    luma = torch.tensor([0.2989, 0.5870, 0.1140]).view(1, 3, 1, 1) * torch.randn(1, 1, 5, 5)
    blind = torch.tensor([0.5870, -0.2989, 0.0]).view(1, 3, 1, 1) * torch.randn(1, 1, 5, 5)
    assert float(colour(luma)) == pytest.approx(0, abs=1e-6) and float(colour(blind)) == pytest.approx(1, abs=1e-6)
    both = luma / luma.norm() + blind / blind.norm()
    assert float(colour(both)) == pytest.approx(0.5, abs=1e-5)
    assert float(energy(both).sum()) == pytest.approx(2, abs=1e-5)


def test_edges_and_border():
    x = torch.full((1, 3, 16, 16), 0.2)
    x[..., 6:10, :] = 0.8  # two horizontal edges: rows 5, 6 and 9, 10 are steep, a quarter of the pixels
    on, off = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
    on[:, [5, 6, 9, 10]], off[:, [0, 3, 7, 13]] = 1.0, 1.0
    assert float(edges(on, x)) == 1 and float(edges(off, x)) == 0
    assert float(edges(torch.ones(1, 16, 16), x)) == pytest.approx(0.25)
    assert float(edges(on.transpose(1, 2), x.transpose(2, 3))) == 1, "edges in both directions count"
    frame = torch.ones(1, 16, 16)
    assert float(border(frame, 2)) == pytest.approx(1)
    frame[:, 2:-2, 2:-2] = 0
    assert float(border(frame, 2)) == pytest.approx(256 / 112)


def test_up_and_down_are_the_same_direction():
    a = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    b = torch.zeros_like(a)
    b[:, 0], b[:, 1] = a[:, 1], -a[:, 0]
    assert alike(a, -3 * a).tolist() == pytest.approx([1, 1]) and alike(a, b).tolist() == pytest.approx(
        [0, 0], abs=1e-7
    )
    found = compare({"a": a, "b": b, "c": -a}, "x")
    assert found == pytest.approx(
        {"cosine_x_a_b": 0, "cosine_x_a_c": 1, "cosine_x_b_c": 0, "cosine_x": 1 / 3}, abs=1e-7
    )
    assert compare({"a": a}, "x") == {}


def test_a_models_gradient_and_images_without_one():
    weights = torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(1))
    x = torch.rand(5, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    g = gradients(lambda v: (v * weights).sum((1, 2, 3)), x, chunk=2)
    torch.testing.assert_close(g, weights.expand(5, -1, -1, -1))
    whole, g[3] = describe("m", g, x), 0
    some = describe("m", g, x)
    assert some["reacting_m"] == pytest.approx(0.8) and whole["reacting_m"] == 1
    assert some["spread_m"] == pytest.approx(whole["spread_m"]) and some["colour_m"] == pytest.approx(whole["colour_m"])


def test_regressions_see_luma_networks_see_colour_and_maxima_see_little(brisque, cornia, images):
    torch.manual_seed(0)
    spp, gap = Ma19(width=8).eval(), Ma19(width=8, pooling="gap").eval()
    found = {n: describe("m", gradients(m, images), images) for n, m in
             {"brisque": brisque, "cornia": cornia, "spp": spp, "gap": gap}.items()}  # fmt: skip
    assert found["brisque"]["colour_m"] < 1e-4 and found["cornia"]["colour_m"] < 1e-4 < 0.05 < found["spp"]["colour_m"]
    assert found["gap"]["spread_m"] > 2 * found["spp"]["spread_m"], "14 maxima a channel, against every pixel"


def test_how_far_others_move_a_model():
    def rows(a, b):
        return {"i": {"before_a": 5.0, "after_a": 5.0 + a, "before_b": 5.0, "after_b": 5.0 - b}}

    found = moved_by_others({"a": rows(4.0, 0.5), "b": rows(1.0, 2.0)})
    assert found == pytest.approx((0.5 / 2 + 1 / 4) / 2)


def test_the_script_compares_finished_attacks(trained_root, fabric, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(trained_root / "default/all", root / "default/all")
    options = [f"run_root={root}", "arm=test", "fidelity=[chebyshev]", "pictures=1"]
    for nr in ("brisque", "cornia"):
        out = root / f"default/{nr}_chebyshev_perceptual/seed0"
        cfg = attack_config(f"run_root={root}", f"nr={nr}", "strengths=[2]", "pictures=0", "calibration_floor=-1")
        attack.fit(cfg, fabric, out)
    sensitivity.fit(config("sensitivity", *options, "attacked=[brisque,cornia]"), fabric, tmp_path / "run")
    found = runs.read_json(tmp_path / "run/result.json")["metrics"]
    assert 0 < found["cosine_chebyshev"] == found["cosine_chebyshev_brisque_cornia"] < 1
    assert found["moved_by_others"] == found["moved_by_others_chebyshev"] > 0
    assert {"spread_ma19", "colour_unique", "edges_cornia", "border_ma19", "cosine_gradients"} <= found.keys()
    assert (tmp_path / "run/sensitivity.png").stat().st_size > 10_000
    for wrong, error in (
        (["attacked=[brisque,niqe]"], "attacked names niqe, .* holds brisque, cornia, ma19, unique"),
        (["attacked=[brisque]"], "two models and a measure are needed"),
    ):
        with pytest.raises(ValueError, match=error):
            sensitivity.fit(config("sensitivity", *options, *wrong), fabric, tmp_path / "no")
    with pytest.raises(FileNotFoundError, match=r"run `python attack.py nr=brisque fr=ssim` first"):
        more = ["attacked=[brisque,cornia]", "fidelity=[ssim]", "seed=0"]
        sensitivity.fit(config("sensitivity", f"run_root={root}", "arm=test", *more), fabric, tmp_path / "no")
    assert not (tmp_path / "no").exists()
