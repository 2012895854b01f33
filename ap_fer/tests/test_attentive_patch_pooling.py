import pytest
import torch

from ap_fer.attentive_patch_pooling import APP, SCORES, LocalAttention, patch_score

X = torch.tensor([[[1.0, -4.0], [2.0, 1.0], [-3.0, -3.0], [0.5, 0.0]]])  # one image, four patches, two channels


def test_every_score_in_closed_form():
    expected = {
        "sum": [-3, 3, -6, 0.5], "sum_abs_1": [5, 3, 6, 0.5], "sum_abs_2": [17, 5, 18, 0.25], "max": [1, 2, -3, 0.5],
        "max_abs_1": [4, 2, 3, 0.5],
    }  # fmt: skip
    for mode, values in expected.items():
        torch.testing.assert_close(patch_score(X, mode), torch.tensor([values], dtype=torch.float32))


def test_identities_of_the_scores():
    x = torch.randn(3, 10, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(patch_score(x, "sum_abs_1"), patch_score(x.abs(), "sum"))
    shuffled = x[..., torch.randperm(6)]
    for mode in ("sum_abs_1", "sum_abs_2"):
        torch.testing.assert_close(patch_score(x, mode), patch_score(-x, mode))
        torch.testing.assert_close(patch_score(x, mode), patch_score(shuffled, mode))
    for mode in ("sum", "sum_abs_1", "sum_abs_2", "max", "max_abs_1"):
        assert torch.equal(APP(4, score=mode)(x)[1], APP(4, score=mode)(3.7 * x)[1]), mode
    assert not torch.equal(APP(4, score="sum")(x)[1], APP(4, score="sum")(-x)[1])


@pytest.mark.parametrize("mode", ["sum", "sum_abs_1", "sum_abs_2", "max", "max_abs_1", "channel"])
def test_scores_are_float32_under_half_precision(mode):
    """Summed in bfloat16, hundreds of patches would tie."""
    x = torch.randn(1, 196, 64).bfloat16()
    torch.manual_seed(0)
    scores = patch_score(x, mode)
    torch.manual_seed(0)
    assert scores.dtype == torch.float32 and torch.equal(scores, patch_score(x.float(), mode))


def test_random_scores_one_channel_or_noise_per_patch():
    x = torch.randn(2, 50, 8)
    torch.manual_seed(0)
    drawn = [patch_score(x, "channel") for _ in range(30)]
    assert all(any(torch.equal(d, x[..., c]) for c in range(8)) for d in drawn)
    assert len({d.sum().item() for d in drawn}) > 4
    noise = patch_score(x, "noise")
    assert noise.shape == (2, 50) and not torch.equal(noise[0], noise[1]) and noise.min() >= 0 and noise.max() < 1
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), patch_score(x).flatten()]))[0, 1]) < 0.4


def test_the_position_is_added_before_the_choice_and_does_not_change_it():
    x = torch.randn(2, 9, 4)
    position = 100 * torch.randn(1, 9, 4)
    tokens, index = APP(3)(x, position)
    assert torch.equal(index, APP(3)(x)[1]), "scores come from the features alone"
    for b in range(2):
        torch.testing.assert_close(tokens[b], (x + position)[b, index[b]])


def test_gradients_reach_kept_patches_and_exactly_no_other():
    x = torch.randn(2, 9, 4, requires_grad=True)
    tokens, index = APP(3)(x)
    (tokens * torch.randn_like(tokens)).sum().backward()
    kept = torch.zeros(2, 9, dtype=torch.bool).scatter_(1, index, True)
    assert (x.grad[kept] != 0).all() and (x.grad[~kept] == 0).all()


def test_the_gradient_of_kept_patches_is_not_scaled_by_their_score():
    x = torch.randn(1, 9, 4, requires_grad=True)
    tokens, index = APP(3)(x)
    tokens.sum().backward()
    torch.testing.assert_close(x.grad[0, index[0]], torch.ones(3, 4))


def test_all_patches_are_the_identity_and_ties_keep_exactly_k():
    x = torch.randn(2, 9, 4)
    for app in (APP(9), APP(None), APP(3, when="test").train(), APP(3, when="train").eval()):
        tokens, index = app(x)
        assert torch.equal(tokens, x) and index.tolist() == [list(range(9))] * 2
    tokens, index = APP(5)(torch.ones(2, 9, 4))
    assert tokens.shape == (2, 5, 4) and all(len(set(row)) == 5 for row in index.tolist())


def test_lowest_keeps_the_complement():
    x = torch.randn(2, 9, 4)
    best, worst = APP(4)(x)[1], APP(5, lowest=True)(x)[1]
    for b in range(2):
        assert set(best[b].tolist()) | set(worst[b].tolist()) == set(range(9))


def test_images_are_independent_of_their_batch_mates():
    x = torch.randn(5, 9, 4)
    together = APP(4)(x)[1]
    assert torch.equal(together, torch.cat([APP(4)(one[None])[1] for one in x]))


def test_no_score_has_parameters_but_la_whose_map_learns():
    for score in SCORES:
        count = sum(p.numel() for p in APP(4, score=score, channels=768).parameters())
        assert count == (37_059 if score == "la" else 0), score
    assert (
        sum(p.numel() for n, p in LocalAttention(768).named_parameters() if not n.endswith("bias")) + 48 + 1 == 37_010
    )
    app, x = APP(3, score="la", channels=16), torch.randn(4, 9, 16)
    tokens, index = app(x)
    tokens.square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for n, p in app.named_parameters()
        if n == "attention.net.0.weight"
    )
    app.eval()
    scale = app.attention(x)
    torch.testing.assert_close(app(x)[0], torch.stack([(x * scale[..., None])[b, i] for b, i in enumerate(app(x)[1])]))


def test_bad_options():
    with pytest.raises(ValueError, match="score='mean'; use one of sum, sum_abs_1"):
        APP(4, score="mean")
    with pytest.raises(ValueError, match="give channels"):
        APP(4, score="la")
    with pytest.raises(ValueError, match="divisible by 16"):
        APP(4, score="la", channels=20)
    with pytest.raises(ValueError, match="keep=0"):
        APP(0)
    with pytest.raises(ValueError, match="keep=10 of 9 patches"):
        APP(10)(torch.randn(1, 9, 4))
