"""The similarity matrices, their distance, and the hard-label loss."""

import math

import pytest
import torch
import torch.nn.functional as F

from q_vit.distribution_guided_distillation import dgd_loss, hard_distillation, similarity, similarity_distance


def x_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers(seed, n=2, tokens=5, dim=4):
    return [
        (x_of(3, 2, tokens, dim, seed=seed + 2 * i), x_of(3, 2, tokens, dim, seed=seed + 2 * i + 1)) for i in range(n)
    ]


def test_similarity_is_symmetric_psd_and_has_unit_norm():
    g = similarity(x_of(3, 2, 5, 4))
    torch.testing.assert_close(g, g.mT)
    assert torch.linalg.eigvalsh(g).min() > -1e-12
    torch.testing.assert_close(torch.linalg.matrix_norm(g), torch.ones(3, 2, dtype=g.dtype))
    torch.testing.assert_close(similarity(x_of(2, 5, 4), norm="row").norm(dim=-1), torch.ones(2, 5, dtype=g.dtype))


@pytest.mark.parametrize("norm", ["fro", "row"])
def test_similarity_ignores_scale_and_rotation(norm):
    x = x_of(3, 2, 5, 4)
    rotation = torch.linalg.qr(x_of(4, 4, seed=1)).Q
    torch.testing.assert_close(similarity(-3 * x @ rotation, norm=norm), similarity(x, norm=norm))


def test_distance_lies_in_0_sqrt2_is_zero_only_at_equality_and_follows_the_inner_product():
    x, y = x_of(3, 2, 5, 4), x_of(3, 2, 5, 4, seed=1)
    d = similarity_distance(x, y)
    assert d.min() > 0 and d.max() <= math.sqrt(2)
    inner = (similarity(x) * similarity(y)).sum((-2, -1))
    torch.testing.assert_close((d + 1e-6).square(), 2 - 2 * inner + 1e-12)
    assert similarity_distance(x, x).abs().max() == 0
    a, b = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    assert similarity_distance(a, b).item() == pytest.approx(math.sqrt(2), abs=1e-5)


def test_gradient_is_finite_at_equality_and_none_reaches_the_teacher():
    x, y = x_of(2, 3, 4, 4).requires_grad_(), x_of(2, 3, 4, 4).requires_grad_()
    dgd_loss([(x, x)], [(y, y)]).backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().max() == 0 and y.grad is None
    zero = torch.zeros(1, 1, 3, 4, requires_grad=True)  # dead queries
    dgd_loss([(zero, zero)], [(y.detach()[:1, :1, :3], y.detach()[:1, :1, :3])]).backward()
    assert zero.grad is not None and zero.grad.isfinite().all()


def test_gradient_against_finite_differences():
    target = x_of(1, 2, 4, 3, seed=1)
    x = x_of(1, 2, 4, 3)
    assert torch.autograd.gradcheck(lambda t: similarity_distance(t, target), x.requires_grad_())


def test_loss_sums_layers_heads_and_q_and_k_and_averages_the_batch():
    student, teacher = layers(0), layers(100)
    plain = 0.0
    for image in range(3):
        for ours, theirs in zip(student, teacher, strict=True):
            for x, y in zip(ours, theirs, strict=True):
                for head in range(2):
                    a, b = x[image, head] @ x[image, head].T, y[image, head] @ y[image, head].T
                    plain += (b / b.norm() - a / a.norm()).norm().item() / 3
    total = dgd_loss(student, teacher)
    assert total.item() == pytest.approx(plain, abs=1e-4)
    assert dgd_loss(student, teacher, reduction="mean").item() == pytest.approx(total.item() / 8, rel=1e-6)
    assert dgd_loss(student, student).item() == 0  # self-distillation


def test_loss_ignores_a_permutation_of_the_tokens_of_both():
    student, teacher = layers(0), layers(100)
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = [[tuple(t[..., order, :] for t in pair) for pair in side] for side in (student, teacher)]
    torch.testing.assert_close(dgd_loss(*permuted), dgd_loss(student, teacher))
    only_student = [tuple(t[..., order, :] for t in pair) for pair in student]
    assert abs(dgd_loss(only_student, teacher) - dgd_loss(student, teacher)) > 1e-3


def test_tokens_patches_drops_the_prefix_and_a_missing_distillation_token_restricts_to_patches():
    teacher = layers(100, tokens=6)
    student = [tuple(F.pad(t, (0, 0, 1, 0), value=9.0) for t in pair) for pair in teacher]  # one more first token
    assert dgd_loss(student, teacher, prefix=(2, 1)).item() == 0
    assert dgd_loss(teacher, teacher, tokens="patches", prefix=(1, 1)).item() == 0
    cut = [tuple(t[..., 1:, :] for t in pair) for pair in layers(0, tokens=6)]
    expected = dgd_loss(cut, [tuple(t[..., 1:, :] for t in pair) for pair in teacher])
    torch.testing.assert_close(dgd_loss(layers(0, tokens=6), teacher, tokens="patches", prefix=(1, 1)), expected)


def test_normalised_teacher_forgets_a_constant_of_its_keys():
    student, teacher = layers(0), layers(100)
    shifted = [(q, k + 50) for q, k in teacher]
    a, b = (dgd_loss(student, t, teacher_normalise=True) for t in (teacher, shifted))
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    assert abs(dgd_loss(student, teacher) - dgd_loss(student, shifted)) > 0.1


def test_bad_input_names_what_differs():
    student = layers(0)
    with pytest.raises(ValueError, match="2 attention layers, the teacher 3"):
        dgd_loss(student, layers(100, n=3))
    with pytest.raises(ValueError, match=r"q of layer 0: student \(3, 2, 5, 4\), teacher \(3, 2, 7, 4\)"):
        dgd_loss(student, layers(100, tokens=7))
    for bad in ({"reduction": "max"}, {"norm": "l1"}, {"tokens": "cls"}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
            dgd_loss(student, student, **bad)


def test_hard_distillation_is_the_mean_of_two_cross_entropies():
    a, b, t = (x_of(6, 4, seed=s) for s in range(3))
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    terms = hard_distillation((a, b), y, t)
    assert terms["ce"].item() == pytest.approx(0.5 * F.cross_entropy(a, y).item())
    assert terms["kd"].item() == pytest.approx(0.5 * F.cross_entropy(b, t.argmax(1)).item())
    single = hard_distillation(a, y, None)
    assert sum(single.values()).item() == pytest.approx(F.cross_entropy(a, y).item())
    weighted = hard_distillation((a, b), y, t, alpha=0.9)
    assert weighted["ce"].item() == pytest.approx(terms["ce"].item() * 0.2)


def test_of_equal_teacher_logits_the_first_class_counts():
    teacher = torch.tensor([[1.0, 3.0, 3.0]])
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    kd = hard_distillation(logits, torch.tensor([0]), teacher)["kd"]
    assert kd.item() == pytest.approx(0.5 * F.cross_entropy(logits, torch.tensor([1])).item())


def test_hard_distillation_bad_input():
    with pytest.raises(ValueError, match=r"alpha=1\.5"):
        hard_distillation(torch.zeros(1, 3), torch.tensor([0]), None, alpha=1.5)
    with pytest.raises(ValueError, match="other classes"):
        hard_distillation(torch.zeros(1, 3), torch.tensor([0]), torch.zeros(1, 4))
