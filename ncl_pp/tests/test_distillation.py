import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ncl_pp.distillation import bod_ncl, bod_nclpp, inter_cl, intra_cl, kl

P = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
Q = torch.tensor([[0.9, 0.1]], dtype=torch.float64)
HALF = torch.tensor([[[True, False]]] * 2)


def random_log_p(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).log_softmax(-1)


def random_mask(rows, classes, hard, seed=0):
    g = torch.Generator().manual_seed(seed)
    top = torch.rand(rows, classes, generator=g).topk(hard).indices
    return torch.zeros(rows, classes, dtype=torch.bool).scatter(-1, top, True)


def test_student_comes_first():
    assert kl(Q.log(), P.log()).item() == pytest.approx(0.510826, abs=1e-6)  # KL(p || q): q learns from p
    assert kl(P.log(), Q.log()).item() == pytest.approx(0.368064, abs=1e-6)


def test_worked_example_full_and_partial():
    both = torch.stack([P, Q]).log()
    full = bod_nclpp(both, None)
    assert full.item() == pytest.approx(0.527334, abs=1e-6)
    assert (bod_nclpp(both, HALF) - full).item() == pytest.approx(0.141069, abs=1e-6)
    weight = torch.tensor([[1.0, 0.0]])
    assert kl(P.log(), Q.log(), weight).item() == pytest.approx(0.529008, abs=1e-6)
    assert kl(Q.log(), P.log(), weight).item() == pytest.approx(-0.293893, abs=1e-6)


def test_sum_over_classes_mean_over_rows():
    a, b = random_log_p(4, 5), random_log_p(4, 5, seed=1)
    rows = [kl(a[i : i + 1], b[i : i + 1]) for i in range(4)]
    assert_close(kl(a, b), torch.stack(rows).mean())
    assert_close(rows[2], (b[2].exp() * (b[2] - a[2])).sum())


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 4), st.integers(1, 4), st.integers(2, 6), st.integers(0, 999))
def test_against_loops_over_pairs(members, rows, classes, seed):
    log_p = random_log_p(members, rows, classes, seed=seed)
    mask = random_mask(members * rows, classes, 2, seed).view(members, rows, classes)
    total = 0.0
    for a in range(members):
        for b in range(members):
            for i in range(rows):
                for c in range(classes):
                    p, q = log_p[b, i, c].exp().item(), log_p[a, i, c].exp().item()
                    d = p * (torch.tensor(p / q).log().item()) / rows
                    total += (d + d * mask[a, i, c].item()) if a != b else 0.0
    expected = 0.6 * 2 / (members * (members - 1)) * total
    assert bod_nclpp(log_p, mask).item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    order = torch.randperm(members, generator=torch.Generator().manual_seed(seed))
    assert_close(bod_nclpp(log_p[order], mask[order]), bod_nclpp(log_p, mask))


def test_full_mask_doubles():
    log_p = random_log_p(3, 4, 5)
    assert_close(bod_nclpp(log_p, torch.ones(3, 4, 5, dtype=torch.bool)), 2 * bod_nclpp(log_p, None))


def test_agreement_and_a_single_member_cost_nothing():
    same = random_log_p(1, 4, 5).expand(3, 4, 5)
    mask = random_mask(4, 5, 2).expand(3, 4, 5)
    assert bod_nclpp(same, mask).item() == 0
    assert abs(bod_nclpp(same, mask, official_eps=True).item()) < 5e-8
    assert bod_nclpp(same[:1], mask[:1]).item() == 0
    assert bod_ncl(same[:1], mask[:1]).item() == 0


def test_ncl_normalises_by_members():
    v = random_log_p(3, 4, 5)
    assert_close(bod_ncl(v, None), 1.5 * bod_nclpp(v, None))
    assert_close(bod_ncl(v[:2], None), bod_nclpp(v[:2], None))


@pytest.mark.parametrize("mode", ["zero_logit", "renorm"])
def test_ncl_partial_is_a_softmax_of_its_own(mode):
    g = torch.Generator().manual_seed(0)
    v = 3 * torch.randn(3, 4, 6, generator=g, dtype=torch.float64)
    mask = random_mask(4, 6, 3).expand(3, 4, 6)
    total = 0.0
    for a in range(3):
        for b in range(3):
            for i in range(4):
                keep = mask[0, i]
                rows = (v[x, i] * keep if mode == "zero_logit" else v[x, i][keep] for x in (a, b))
                p_a, p_b = (row.softmax(-1) for row in rows)
                total += (p_b * (p_b / p_a).log()).sum().item() / 4
    part = bod_ncl(v, mask, lam=0.0, lam_hcm=0.4, mode=mode)
    assert part.item() == pytest.approx(0.4 / 2 * total)
    assert_close(bod_ncl(v, mask, lam_hcm=0.4, mode=mode), part + bod_ncl(v, None))


def test_gradient_reaches_teacher_and_student_unless_detached():
    for detach in (False, True):
        a, b = torch.randn(2, 3, 4, requires_grad=True).unbind()
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        kl(a.log_softmax(-1), b.log_softmax(-1), detach_teacher=detach).backward()
        assert a.grad is not None and a.grad.abs().sum() > 0
        assert (b.grad is None) if detach else (b.grad is not None and b.grad.abs().sum() > 0)


def test_detached_teachers_give_every_member_the_students_gradient():
    """With fixed targets d/dv_a of sum_b KL_m(a<-b) is, for weights w = 1 + m: sum_b [p_a sum_c(w p_b) - w p_b]."""
    v = torch.randn(3, 1, 5, dtype=torch.float64, requires_grad=True)
    mask = random_mask(1, 5, 2).expand(3, 1, 5)
    bod_nclpp(v.log_softmax(-1), mask, lam=1.0, detach_teacher=True).backward()
    p, w = v.detach().softmax(-1), 1 + mask.double()
    for a in range(3):
        others = [b for b in range(3) if b != a]
        expected = sum(p[a] * (w[b] * p[b]).sum() - w[b] * p[b] for b in others) / 3
        assert v.grad is not None
        assert_close(v.grad[a], expected)


def test_learning_member_brings_its_own_mask():
    log_p = random_log_p(2, 1, 3)
    mask = torch.tensor([[[True, False, False]], [[False, True, False]]])
    terms = log_p.exp()[[1, 0]] * (log_p[[1, 0]] - log_p)
    expected = 0.6 * (terms.sum() + terms[0, 0, 0] + terms[1, 0, 1])
    assert_close(bod_nclpp(log_p, mask), expected)


def test_inter_pairs_experts_and_intra_pairs_copies():
    g = torch.Generator().manual_seed(0)
    v = torch.randn(2, 3 * 4, 5, generator=g, dtype=torch.float64)  # 2 experts, 3 copies of 4 images
    mask = random_mask(12, 5, 2).expand(2, 12, 5)
    log_p = v.log_softmax(-1)
    assert_close(inter_cl(v, mask), bod_nclpp(log_p, mask))
    expected = 0.0
    for k in range(2):
        copies = torch.stack([log_p[k, 4 * t : 4 * t + 4] for t in range(3)])
        expected += bod_nclpp(copies, mask[k, :4].expand(3, 4, 5))
    assert_close(intra_cl(v, mask, copies=3), expected)


def test_intra_takes_the_mask_of_copy_0():
    g = torch.Generator().manual_seed(0)
    v = torch.randn(2, 12, 5, generator=g, dtype=torch.float64)
    mask = random_mask(12, 5, 2).expand(2, 12, 5)

    def reordered(x, order):
        return x.unflatten(1, (3, 4))[:, order].flatten(1, 2)

    base = intra_cl(v, mask, copies=3)
    assert_close(intra_cl(reordered(v, [0, 2, 1]), reordered(mask, [0, 2, 1]), copies=3), base)
    swapped = reordered(v, [1, 0, 2])
    assert not torch.allclose(intra_cl(swapped, reordered(mask, [1, 0, 2]), copies=3), base)
    assert_close(intra_cl(swapped, None, copies=3), intra_cl(v, None, copies=3))
    assert intra_cl(v[:, :4].repeat(1, 3, 1), mask, copies=3).item() == 0


def test_official_eps_is_inside_the_students_logarithm():
    a = torch.tensor([[0.0, -200.0]]).log_softmax(-1)
    b = torch.tensor([[0.0, 0.0]]).log_softmax(-1)
    expected = 0.5 * (2 * torch.tensor(0.5).log() - torch.tensor(1e-9).log())
    assert_close(kl(a, b, official_eps=True), expected, rtol=1e-5, atol=0)
    assert kl(a, b).item() == pytest.approx(100 + torch.tensor(0.5).log().item(), rel=1e-5)


@pytest.mark.parametrize("official_eps", [False, True])
def test_underflowing_probabilities_keep_finite_gradients(official_eps):
    v = torch.tensor([[[0.0, -200.0, 1.0]], [[0.0, 1.0, -200.0]]], requires_grad=True)
    mask = torch.tensor([[[True, False, False]]]).expand(2, 1, 3)
    loss = bod_nclpp(v.log_softmax(-1), mask, official_eps=official_eps)
    for mode in ("zero_logit", "renorm"):
        loss = loss + bod_ncl(v, mask, mode=mode, official_eps=official_eps)
    loss.backward()
    assert v.grad is not None
    assert torch.isfinite(loss) and torch.isfinite(v.grad).all() and v.grad.abs().sum() > 0


def test_kl_div_of_a_masked_target_has_nan_gradients_and_ours_has_none():
    """The released term, kl_div(m log p_a, m p_b) over both ordered pairs: its target is 0 off the mask."""
    v = torch.tensor([[[0.3, -0.2, 1.0]], [[0.1, 0.9, -0.5]]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    p, m = v.softmax(-1), mask.double()
    released = sum(F.kl_div(m * p[a].log(), m * p[b], reduction="sum") for a, b in ((0, 1), (1, 0)))
    gradient = torch.autograd.grad(released, v)[0]
    assert released.isfinite() and gradient.isnan().all()
    log_p = v.log_softmax(-1)
    ours = kl(log_p[0], log_p[1], m) + kl(log_p[1], log_p[0], m)
    assert_close(ours, released)
    assert torch.autograd.grad(ours, v)[0].isfinite().all()


def test_misspelt_mode():
    with pytest.raises(ValueError, match=r"mode='soft', allowed"):
        bod_ncl(torch.zeros(2, 1, 3), None, mode="soft")  # type: ignore[arg-type]
