"""DA, FQM and the DRD loss (Eq. 9-15)."""

import math

import pytest
import torch
from torch.testing import assert_close

from q_detr.distribution_alignment import DistributionAlignment, code_entropy, gaussian_entropy, query_statistics
from q_detr.distribution_rectification import drd_loss
from q_detr.foreground_query_matching import foreground_queries, matched_teacher_queries
from q_detr.set_prediction import giou


def boxes(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.cat([torch.rand(n, 2, generator=g) * 0.5 + 0.25, torch.rand(n, 2, generator=g) * 0.3 + 0.1], dim=1)


def outputs(seed=0, queries=6, layers=2, batch=2, width=4):
    g = torch.Generator().manual_seed(1000 + seed)
    return {
        "pred_boxes": torch.stack([boxes(queries, 10 * seed + i) for i in range(batch)]).requires_grad_(),
        "co_attended": torch.randn(layers, batch, queries, width, generator=g).requires_grad_(),
        "co_projected": torch.randn(layers, batch, queries, width, generator=g).requires_grad_(),
    }


# ------------------------------------------------------------------------------------------------------------------- DA
def test_da_has_mean_zero_and_the_unbiased_variance_of_the_formula():
    torch.manual_seed(0)
    q = torch.randn(2, 3, 5, 8, dtype=torch.float64) * 4 + 7
    out = DistributionAlignment(8).double()(q)
    variance = q.var(-1, correction=1)
    assert_close(out.mean(-1), torch.zeros(2, 3, 5, dtype=torch.float64), atol=1e-12, rtol=0)
    assert_close(out.var(-1, correction=1), variance / (variance + 1e-5))


def test_da_ignores_a_positive_scale_and_a_shift_and_flips_with_a_negative_one():
    torch.manual_seed(0)
    q, da = torch.randn(1, 2, 3, 8, dtype=torch.float64), DistributionAlignment(8).double()
    assert_close(da(3 * q + 5), da(q), atol=1e-4, rtol=0)
    assert_close(da(-3 * q), -da(q), atol=1e-4, rtol=0)


def test_da_applies_gamma_and_beta_per_component_and_gives_beta_for_a_constant_query():
    da = DistributionAlignment(4)
    torch.nn.init.uniform_(da.gamma), torch.nn.init.uniform_(da.beta)
    q = torch.randn(1, 2, 3, 4)
    plain = (q - q.mean(-1, keepdim=True)) / (q.var(-1, keepdim=True) + 1e-5).sqrt()
    assert_close(da(q), plain * da.gamma + da.beta)
    assert_close(da(torch.full((1, 1, 1, 4), 3.0))[0, 0, 0], da.beta)
    assert {n: tuple(p.shape) for n, p in da.named_parameters()} == {"gamma": (4,), "beta": (4,)}
    with pytest.raises(ValueError, match="width=1"):
        DistributionAlignment(1)


def test_da_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    da = DistributionAlignment(4).double()
    assert torch.autograd.gradcheck(da, torch.randn(1, 1, 2, 4, dtype=torch.float64, requires_grad=True))


def test_the_entropy_is_that_of_a_gaussian():
    assert gaussian_entropy(torch.tensor(1.0)).item() == pytest.approx(0.5 * math.log(2 * math.pi * math.e))
    s = torch.distributions.Normal(0.0, 3.0)
    assert gaussian_entropy(torch.tensor(9.0)).item() == pytest.approx(s.entropy().item())
    printed = 0.5 * math.log(2 * math.pi * 9)
    assert gaussian_entropy(torch.tensor(9.0)).item() - printed == pytest.approx(0.5)
    q = DistributionAlignment(16)(torch.randn(2, 2, 4, 16) * 5)
    found = query_statistics(q)
    assert found["query_variance"] == pytest.approx(1, abs=1e-3) and found["query_mean"] == pytest.approx(0, abs=1e-6)
    assert found["query_entropy"] == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=1e-3)


def test_query_statistics_tell_equal_from_unequal_queries_and_codes_have_the_entropy_of_their_shares():
    q = torch.randn(2, 2, 6, 256, dtype=torch.float64)
    q = (q - q.mean(-1, keepdim=True)) / q.std(-1, keepdim=True)
    assert query_statistics(3 * q)["query_spread"] == pytest.approx(0, abs=1e-9)
    scale = torch.tensor([1.0, 2, 3, 4, 5, 6])[:, None]
    expected = (scale.double() ** 2).log().expand(2, 2, 6, 1).std().item()
    assert query_statistics(scale * q)["query_spread"] == pytest.approx(expected)
    codes = torch.stack([torch.tensor([[0, 1], [2, 3]]), torch.tensor([[7, 7], [7, -7]])])[None]  # two heads
    expected = (2 + 0.75 * math.log2(4 / 3) + 0.25 * 2) / 2
    assert code_entropy(codes) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------------------ FQM
def kept(student, gt, **options):
    """Indices of the kept queries of one image."""
    return foreground_queries(student[None], [gt], **options)[0].nonzero().flatten().tolist()


def partners(student, teacher, *, one_to_one=False):
    rows = torch.ones(1, len(student), dtype=torch.bool) if one_to_one else None
    return matched_teacher_queries(student[None], teacher[None], kept=rows)[0]


def test_images_of_a_batch_do_not_see_each_other():
    student, gt = torch.stack([boxes(9, 1), boxes(9, 2), boxes(9, 3)]), [boxes(3, 4), boxes(0), boxes(1, 5)]
    found = foreground_queries(student, gt, tau=0.5)
    for i in range(3):
        assert found[i].nonzero().flatten().tolist() == kept(student[i], gt[i], tau=0.5)
    assert found.any() and not found[1].any()
    teacher = torch.stack([boxes(5, 6), boxes(5, 7), boxes(5, 8)])
    assert all(
        torch.equal(a, partners(s, t))
        for a, s, t in zip(matched_teacher_queries(student, teacher), student, teacher, strict=True)
    )


def test_a_query_is_kept_if_it_is_near_any_object():
    gt = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.8, 0.8, 0.2, 0.2]])
    student = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.5, 0.5, 0.05, 0.05], [0.8, 0.82, 0.2, 0.2], [0.24, 0.2, 0.2, 0.2]])
    overlap = giou(gt, student)
    expected = [j for j in range(4) if any(overlap[i, j] > 0.6 * overlap[i].max() for i in range(2))]
    assert kept(student, gt, tau=0.6) == expected == [0, 2, 3]
    assert kept(student, gt, tau=0.9) == [0, 2]
    assert not any(all(overlap[i, j] > 0.6 * overlap[i].max() for i in range(2)) for j in range(4))  # as printed


def test_tau_is_monotone_strict_and_checked():
    student, gt = torch.cat([boxes(12, 1), boxes(2, 2)]), boxes(2, 2)
    previous = set(range(14))
    for tau in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        found = set(kept(student, gt, tau=tau))
        assert found <= previous
        previous = found
    assert previous == set()  # strict: nothing exceeds the best itself
    for tau in (-0.1, 1.1):
        with pytest.raises(ValueError, match="tau="):
            kept(student, gt, tau=tau)


def test_an_object_far_from_every_query_selects_nothing():
    near, far = torch.tensor([[0.2, 0.2, 0.2, 0.2]]), torch.tensor([[0.9, 0.9, 0.1, 0.1]])
    assert giou(far, near).item() < 0
    for tau in (0.2, 0.6):
        assert kept(near, far, tau=tau) == []
        assert kept(near, torch.cat([far, near]), tau=tau) == [0]
    assert kept(near, torch.zeros(0, 4)) == []


def test_the_partner_maximises_two_giou_minus_five_l1():
    student, teacher = boxes(5, 3), boxes(7, 4)
    score = 2 * giou(student, teacher) - 5 * (student[:, None] - teacher).abs().sum(-1)
    assert partners(student, teacher).tolist() == score.argmax(1).tolist()
    order = torch.randperm(7)
    moved = partners(student, teacher[order])
    assert order[moved].tolist() == score.argmax(1).tolist()


def test_students_share_a_partner_unless_told_otherwise():
    student = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.51, 0.5, 0.2, 0.2]])
    teacher = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]])
    assert partners(student, teacher).tolist() == [0, 0]
    assert sorted(partners(student, teacher, one_to_one=True).tolist()) == [0, 1]
    with pytest.raises(ValueError, match="one_to_one: 2 student"):
        partners(student, teacher[:1], one_to_one=True)


# ------------------------------------------------------------------------------------------------------------------ DRD
@pytest.mark.parametrize("layers", ["all", "last"])
@pytest.mark.parametrize("feature", ["pre_proj", "post_proj"])
def test_the_loss_is_the_mean_distance_over_all_pairs_of_the_batch(layers, feature):
    ours, theirs, gt = outputs(1), outputs(2, queries=8), [boxes(1, 5), boxes(3, 6)]
    loss, log = drd_loss(ours, theirs, gt, tau=0.4, layers=layers, feature=feature)
    key = {"pre_proj": "co_attended", "post_proj": "co_projected"}[feature]
    distances, pairs = [], 0
    for i in range(2):
        found = kept(ours["pred_boxes"][i], gt[i], tau=0.4)
        partner = partners(ours["pred_boxes"][i, found], theirs["pred_boxes"][i])
        pairs += len(found)
        for j, k in zip(found, partner.tolist(), strict=True):
            for layer in (0, 1) if layers == "all" else (1,):
                distances.append((ours[key][layer, i, j] - theirs[key][layer, i, k]).square().sum().sqrt())
    assert pairs > 2 and log["pairs"] == pairs / 2
    assert_close(loss, torch.stack(distances).mean())


def test_only_the_students_features_of_the_kept_queries_get_a_gradient():
    ours, theirs, gt = outputs(1), outputs(2), [boxes(1, 5), boxes(0)]
    loss, _ = drd_loss(ours, theirs, gt)
    loss.backward()
    found = kept(ours["pred_boxes"][0], gt[0])
    moved = ours["co_attended"].grad.abs().sum((0, 3))
    assert set(moved[0].nonzero().flatten().tolist()) == set(found) and moved[1].sum() == 0
    assert ours["pred_boxes"].grad is None
    assert all(t.grad is None for t in theirs.values())


@pytest.mark.parametrize(("gt", "tau"), [([boxes(2, 5), boxes(2, 6)], 1.0), ([boxes(0), boxes(0)], 0.6)])
def test_nothing_kept_gives_zero_and_a_zero_gradient(gt, tau):
    ours = outputs(1)
    loss, log = drd_loss(ours, outputs(2), gt, tau=tau)
    loss.backward()
    assert loss.item() == 0 and log == {"pairs": 0, "pair_giou": 0}
    assert (ours["co_attended"].grad == 0).all()


def test_a_student_equal_to_its_teacher_has_no_loss_in_any_order_of_the_teacher():
    ours, gt = outputs(1), [boxes(2, 5), boxes(2, 6)]
    loss, log = drd_loss(ours, ours, gt, select="all")
    assert loss.item() == 0 and log["pairs"] == 6 and log["pair_giou"] == pytest.approx(1)
    loss.backward()
    assert torch.isfinite(ours["co_attended"].grad).all()
    order = torch.randperm(6)
    moved = {"pred_boxes": ours["pred_boxes"][:, order], "co_attended": ours["co_attended"][:, :, order]}
    assert drd_loss(ours, moved, gt, select="all")[0].item() == 0


def test_full_imitation_is_not_tau_zero():
    ours, theirs, gt = outputs(1), outputs(2), [boxes(1, 5), boxes(1, 6)]
    assert drd_loss(ours, theirs, gt, select="all")[1]["pairs"] == 6
    assert drd_loss(ours, theirs, gt, tau=0.0)[1]["pairs"] < 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "some"}, "select='some', allowed: foreground, all"),
        ({"layers": "first"}, "layers='first'"),
        ({"feature": "out"}, "feature='out'"),
        ({"tau": 2}, "tau=2"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        drd_loss(outputs(1), outputs(2), [boxes(1), boxes(1)], **options)
    with pytest.raises(ValueError, match="d_model"):
        drd_loss(outputs(1), outputs(2, width=8), [boxes(1), boxes(1)])
