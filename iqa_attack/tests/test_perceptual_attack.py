"""The attack on models whose optimum is known, its recipes, presets and black boxes."""

import math

import pytest
import torch

from iqa_attack.audit import audit
from iqa_attack.fidelities.fidelity import SSIM, Chebyshev
from iqa_attack.perceptual_attack import (
    CODE_LAMBDAS,
    PRESETS,
    Step,
    VanishingGradient,
    attack_batch,
    autograd_gradient,
    check_gradient,
    discrepancy,
    objective,
    perceptual_attack,
    quantise,
    spsa_gradient,
    square_attack,
    start_noise,
)
from iqa_attack.random_control import random_at_distance, random_signs


def grey_images(n=2, size=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(60, 196, (n, 3, size, size), generator=g) / 255


WEIGHTS = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(9)) / 100


def linear(x):
    return 5 + (x * WEIGHTS).sum((1, 2, 3))


class Squared(torch.nn.Module):
    def forward(self, x, x0):
        return ((x - x0) ** 2).sum((1, 2, 3))


def test_gradient_of_the_discrepancy_is_zero_at_the_image():
    x = grey_images().requires_grad_()
    d = discrepancy(linear(x), linear(x).detach(), "square").sum()
    assert float(torch.autograd.grad(d, x)[0].abs().max()) == 0
    up = torch.autograd.grad(discrepancy(linear(x), linear(x).detach(), "up").sum(), x)[0]
    torch.testing.assert_close(up[0], WEIGHTS)


def test_both_sign_conventions_have_the_same_direction():
    """lambda on the fidelity and 1/lambda on the discrepancy: gradients that differ by the factor lambda."""
    x0, lam = grey_images(), 7.0
    x = (x0 + 0.01).requires_grad_()
    j = {}
    for name, value in (("fidelity", lam), ("discrepancy", 1 / lam)):
        disc = discrepancy(linear(x), linear(x0), "square")
        j[name] = torch.autograd.grad(objective(disc, SSIM()(x, x0), torch.tensor(value), name).sum(), x)[0]
    torch.testing.assert_close(j["fidelity"], lam * j["discrepancy"], rtol=1e-4, atol=1e-6)
    a, b = (
        perceptual_attack(linear, SSIM(), x0, torch.tensor([v]), seeds=[0, 1], steps=5, lambda_on=n)
        for n, v in (("fidelity", lam), ("discrepancy", 1 / lam))
    )
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="lambda_on='both'"):
        objective(disc, disc, torch.tensor(1.0), "both")


def test_fidelity_is_subtracted():
    """s = linear, D = |x - x0|^2: the best x is x0 + w/(2 lambda) (upward), with c = s(x0) and no projection."""
    x0 = torch.full((1, 3, 16, 16), 0.5)
    lam = torch.tensor([0.1])
    x = x0.clone()
    for _ in range(300):
        g = autograd_gradient(
            lambda v: objective(discrepancy(linear(v), linear(x0), "up"), Squared()(v, x0), lam, "fidelity"), x
        )
        x = x + 0.5 * g
    torch.testing.assert_close(x, x0 + WEIGHTS / (2 * 0.1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_linear_model_moves_as_the_closed_form_says(direction):
    """n sign steps of gamma change s by gamma n |w|_1 until a value leaves 0..1."""
    x0 = grey_images()
    out = perceptual_attack(
        linear,
        Squared(),
        x0,
        torch.tensor([0.0]),
        seeds=[0, 1],
        steps=8,
        gamma=1 / 255,
        direction=direction,
        noise="none",
    )[0]
    change = linear(out) - linear(x0)
    expected = (1 if direction == "up" else -1) * 8 / 255 * WEIGHTS.abs().sum()
    torch.testing.assert_close(change, expected.expand(2), rtol=1e-3, atol=1e-4)
    noise = random_signs(x0, torch.full((2,), 8 / 255), [0, 1])
    assert bool((change.abs() > 5 * (linear(noise) - linear(x0)).abs()).all())


def test_projected_attack_reaches_the_corner_and_never_leaves_the_box():
    x0 = grey_images()
    eps = torch.tensor([1.0, 3.0, 7.0]) / 255
    out = perceptual_attack(
        linear, Chebyshev(), x0, eps, seeds=[0, 1], steps=20, direction="up", projected=True, noise="none"
    )
    levels = ((out - x0) * 255).round()
    for k, e in enumerate((1, 3, 7)):
        assert float(levels[k].abs().max()) == e
        torch.testing.assert_close(levels[k], e * WEIGHTS.sign().expand(2, -1, -1, -1))
    edge = torch.zeros(1, 3, 16, 16)
    at_edge = perceptual_attack(linear, Chebyshev(), edge, eps, seeds=[0], steps=20, direction="down", projected=True)
    assert float(at_edge.min()) >= 0


@pytest.mark.parametrize("preset", [k for k in PRESETS if k != "paper_literal"])
def test_outputs_lie_on_the_8_bit_lattice_and_presets_move_them(preset):
    x0 = grey_images()
    out = perceptual_attack(
        linear,
        SSIM(),
        x0,
        torch.tensor([1e-3 if PRESETS[preset]["lambda_on"] == "fidelity" else 1e3]),
        seeds=[0, 1],
        **{**PRESETS[preset], "steps": 12},
    )
    torch.testing.assert_close(quantise(out), out, rtol=0, atol=0)
    torch.testing.assert_close((out * 255).round() / 255, out, rtol=0, atol=0)
    assert float(out.min()) >= 0 and float(out.max()) <= 1
    assert float((linear(out[0]) - linear(x0)).abs().min()) > 0.02


def test_the_literal_l2_recipe_is_erased_by_rounding():
    """200 steps of l2 length 1e-3 are at most 0.2 in l2: 0.31 gray levels per value at 96 x 96."""
    x0 = grey_images(size=96)
    w = torch.ones(3, 96, 96)
    out = perceptual_attack(
        lambda x: (x * w).sum((1, 2, 3)) / 1000,
        SSIM(),
        x0,
        torch.tensor([1e6]),
        seeds=[0, 1],
        direction="up",
        **{**PRESETS["paper_literal"], "steps": 200, "noise": "none"},
    )
    torch.testing.assert_close(out[0], x0, rtol=0, atol=1e-6)


def test_step_rules():
    g = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    n = 75
    assert float(Step("sign", 0.01)(g).abs().max()) == pytest.approx(0.01)
    l2 = Step("l2", 0.01)(g).flatten(1)
    assert l2.norm(dim=1).tolist() == pytest.approx([0.01, 0.01])
    assert float((l2[0] / g[0].flatten()).std()) == pytest.approx(0, abs=1e-6)
    rms = Step("l2", 0.01, "rms")(g).flatten(1)
    assert (rms.norm(dim=1) / n**0.5).tolist() == pytest.approx([0.01, 0.01])
    restart, kept = Step("adam_restart", 0.005), Step("adam", 0.005)
    for k in range(4):  # gradients that turn around: an Adam that is kept steps along their mean, a new one along each
        turned = (-1) ** k * (k + 1) * g
        torch.testing.assert_close(restart(turned), 0.005 * turned.sign(), rtol=0.02, atol=1e-4)
        assert float(kept(turned).abs().mean()) < 0.003 or k == 0
    adam = Step("adam", 0.005)
    torch.testing.assert_close(adam(g), 0.005 * g.sign(), rtol=0.02, atol=1e-4)
    x = torch.nn.Parameter(torch.zeros_like(g[:1]))  # torch's Adam on the same (unit) gradients
    optimizer = torch.optim.Adam([x], lr=0.005, maximize=True)
    ours, total = Step("adam", 0.005), torch.zeros_like(x)
    for k in range(5):
        raw = g[:1] * (k + 1) + k
        x.grad = raw / raw.norm()
        optimizer.step()
        total = total + ours(raw)
    torch.testing.assert_close(total, x.detach(), rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="step_rule='sgd'"):
        Step("sgd", 1.0)
    assert float(Step("l2", 1.0)(torch.zeros(1, 3, 4, 4)).abs().max()) == 0, "a zero gradient stays zero"


def test_start_noise():
    counts = torch.bincount(
        (start_noise((1, 3, 100, 100), [5], "ternary") * 255).round().long().flatten() + 1, minlength=3
    )
    assert (counts / counts.sum()).tolist() == pytest.approx([1 / 3] * 3, abs=0.01)
    official = (start_noise((1, 3, 50, 50), [5], "official") * 255).round()
    assert set(official.unique().tolist()) == {-1.0, 0.0}
    a = start_noise((2, 3, 8, 8), [1, 2], "ternary")
    torch.testing.assert_close(a[1:], start_noise((1, 3, 8, 8), [2], "ternary"))
    with pytest.raises(ValueError, match="noise='uniform'"):
        start_noise((1, 3, 2, 2), [0], "uniform")


def test_images_and_lambdas_are_independent_problems(brisque, images):
    """Together or alone, in one chunk or several: the same candidates (signs may differ where a gradient is near zero)."""
    lam = torch.tensor([10.0, 1000.0])
    together = perceptual_attack(brisque, SSIM(), images[:2], lam, seeds=[1, 2], steps=3)
    alone = perceptual_attack(brisque, SSIM(), images[1:2], lam[1:], seeds=[2], steps=3, chunk=1)
    assert float((together[1, 1] - alone[0, 0]).abs().gt(0).float().mean()) < 0.01
    again = perceptual_attack(brisque, SSIM(), images[:2], lam, seeds=[1, 2], steps=3)
    assert torch.equal(together, again)
    per_image = perceptual_attack(brisque, SSIM(), images[:2], torch.tensor([[10.0, 1000.0]]), seeds=[1, 2], steps=3)
    assert float((per_image[0, 0] - together[0, 0]).abs().gt(0).float().mean()) < 0.01
    assert float((per_image[0, 1] - together[1, 1]).abs().gt(0).float().mean()) < 0.01


def test_more_fidelity_keeps_the_image_closer(brisque, images):
    out = perceptual_attack(brisque, SSIM(), images, torch.tensor([1.0, 1e5]), seeds=range(4), steps=10)
    loose, strict = (SSIM()(x, images) for x in out)
    assert bool((loose > 1.25 * strict).all())


def test_both_takes_the_larger_change_candidate_by_candidate():
    """s = max(w.x, .) rises easily and cannot fall: `both` must take the rise."""
    x0 = grey_images()

    def one_sided(x):
        return torch.relu(linear(x) - linear(x0[: len(x)])) + 0.01 * linear(x)

    options = {"seeds": [0, 1], "steps": 5, "gamma": 1 / 255}
    up, down, both = (
        perceptual_attack(one_sided, Squared(), x0, torch.tensor([0.0]), direction=d, **options)
        for d in ("up", "down", "both")
    )
    assert torch.equal(both, up) and not torch.equal(up, down)
    with pytest.raises(ValueError, match="direction='left'"):
        perceptual_attack(linear, Squared(), x0, torch.tensor([0.0]), direction="left", **options)


def test_target_and_border_and_rounding_inside_the_loop():
    x0 = grey_images()
    far = perceptual_attack(
        linear,
        Squared(),
        x0,
        torch.tensor([0.0]),
        seeds=[0, 1],
        steps=4,
        gamma=1 / 255,
        noise="none",
        target=linear(x0) + 5,
    )[0]
    assert bool((linear(far) < linear(x0)).all()), "away from a target above means down"
    framed = perceptual_attack(
        linear, Squared(), x0, torch.tensor([0.0]), seeds=[0, 1], steps=4, gamma=1 / 255, border=3
    )[0]
    change = (framed - x0).abs().amax(1)
    assert float(change[:, :3].max()) == float(change[:, :, -3:].max()) == 0 and float(change[:, 3:-3, 3:-3].min()) > 0
    seen = []

    def watching(x):
        seen.append(x.detach().clone())
        return linear(x)

    attack_batch(
        watching,
        Squared(),
        x0,
        torch.zeros(2),
        torch.zeros_like(x0),
        steps=3,
        gamma=0.4 / 255,
        step_rule="sign",
        lambda_on="fidelity",
        direction="up",
        quantised="every_step",
    )
    for x in seen:
        torch.testing.assert_close(quantise(x), x, rtol=0, atol=1e-6)


def test_nan_gradients_do_not_move_a_pixel():
    x0 = grey_images()

    def broken(x):
        y = x.clone()
        y[:, 0, 0, 0] = (y[:, 0, 0, 0] - y[:, 0, 0, 0].detach()).sqrt()  # infinite slope at 0
        return linear(y)

    out = perceptual_attack(
        broken, Squared(), x0, torch.tensor([0.0]), seeds=[0, 1], steps=4, gamma=1 / 255, direction="up", noise="none"
    )
    assert bool(out.isfinite().all()) and float((out[0] - x0)[:, 1].abs().min()) > 0


# ------------------------------------------------------------------------------------------------------- vanishing gradients
@pytest.mark.parametrize(
    "score",
    [lambda x: linear((x * 255).round() / 255), lambda x: (x * 255).to(torch.uint8).float().mean((1, 2, 3))],
    ids=["round", "uint8"],
)
def test_a_model_without_gradient_is_reported_and_not_called_robust(score):
    x0 = grey_images()
    with pytest.raises(
        VanishingGradient,
        match=r"gradient of mine is zero on all 2 images.*not robustness.*attack=spsa or attack=square",
    ):
        check_gradient(score, x0, "mine")
    check_gradient(linear, x0, "linear")
    changed = square_attack(score, x0, 4 / 255, steps=60, seed=0)
    assert float((score(changed) - score(x0)).abs().min()) > 0
    assert float((changed - x0).abs().max()) <= 4 / 255 + 1e-6


def test_spsa_points_the_way_of_the_gradient():
    x = grey_images(1)
    g = spsa_gradient(samples=400, seed=0)(linear, x)[0]
    cosine = float((g * WEIGHTS).sum() / g.norm() / WEIGHTS.norm())
    assert cosine > 0.4, f"expected about sqrt(400/768) = 0.58, got {cosine}"
    stepped = perceptual_attack(
        lambda x: linear((x * 255).round() / 255),
        Squared(),
        grey_images(1),
        torch.tensor([0.0]),
        seeds=[0],
        steps=10,
        gamma=1 / 255,
        direction="up",
        gradient=spsa_gradient(samples=64),
    )[0]
    assert float(linear(stepped) - linear(grey_images(1))) > 0.04


# ---------------------------------------------------------------------------------------------------------------- controls
def test_random_control_has_the_distance_of_the_attack(images):
    target = torch.tensor([0.002, 0.01, 0.05, 0.0])
    x = random_at_distance(SSIM(), images, target, [1, 2, 3, 4], chebyshev=False)
    torch.testing.assert_close(SSIM()(x, images)[:3], target[:3], rtol=0.1, atol=0)
    assert torch.equal(x[3], images[3])
    torch.testing.assert_close(quantise(x), x, rtol=0, atol=1e-7)
    levels = torch.tensor([1.0, 2.0, 3.0, 5.0]) / 255
    y = random_at_distance(Chebyshev(), images, levels, [1, 2, 3, 4], chebyshev=True)
    torch.testing.assert_close(Chebyshev()(y, images), levels, rtol=1e-3, atol=1e-6)


def test_audit_of_any_callable(tmp_path, brisque, images):
    rows = audit(lambda x: -brisque(x), images[:2], higher_is_better=False, steps=5, out=tmp_path)
    assert len(rows) == 2 and len(list(tmp_path.glob("images/*.png"))) == 6
    for row in rows:
        assert abs(row["after"] - row["before"]) > abs(row["random"] - row["before"]) and row["r"] < row["r_random"]
        assert row["visibility"] <= 0.78 and row["max_change"] >= 1
        assert row["random"] != row["before"] and row["r_random"] < 10, "the control is noise, not the image itself"
        assert row["gradient"] == "exact" and row["raw_before"] != row["before"]


def test_published_grid():
    assert len(CODE_LAMBDAS) == 33 and CODE_LAMBDAS[0] == 0 and list(CODE_LAMBDAS) == sorted(CODE_LAMBDAS)
    assert math.isclose(max(CODE_LAMBDAS), 9e6)
    with pytest.raises(ValueError, match="seeds for 2 images"):
        perceptual_attack(linear, Squared(), grey_images(), torch.tensor([0.0]), seeds=[0])
