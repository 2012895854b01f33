"""The criterion against a second formulation in plain loops over scalars, and its invariants."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ncl_pp.balanced_softmax import balanced_softmax_loss
from ncl_pp.criterion import NCLPlusLoss

COUNTS = [50, 20, 9, 4, 1]


def example(experts=2, copies=2, images=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(experts, copies * images, len(COUNTS), generator=g, dtype=torch.float64)
    return z, torch.randint(0, len(COUNTS), (images,), generator=g)


def total(terms):
    return torch.stack(list(terms.values())).sum()


def loops(z, labels, counts, *, hard, lam=0.6, lam_hcm=0.6, copies=1, w_ce=1.0, w_hcm=1.0, inter=True, intra=True,
          partial=True, norm="nclpp", mode="zero_logit", select="expert0", balanced=True,
          detach_teacher=False, official_eps=False):  # fmt: skip
    """The whole loss written from the definitions, with explicit probabilities; row r = t * B + b is image b."""
    experts, rows, classes = z.shape
    images = rows // copies
    y = [int(labels[r % images]) for r in range(rows)]
    eps = 1e-9 if official_eps else 0.0

    def hard_set(k, r):
        scores = {"expert0": z[0, r], "mean": sum(z[j, r] for j in range(experts)), "per_expert": z[k, r]}[select]
        rivals = sorted((c for c in range(classes) if c != y[r]), key=lambda c: -scores[c].item())
        return {y[r], *rivals[: hard - 1]}

    def softmax(u):
        e = {c: torch.exp(value) for c, value in u.items()}
        return {c: value / sum(e.values()) for c, value in e.items()}

    v = [[{c: z[k, r, c] + (math.log(counts[c]) if balanced else 0.0) for c in range(classes)}
          for r in range(rows)] for k in range(experts)]  # fmt: skip
    p = [[softmax(v[k][r]) for r in range(rows)] for k in range(experts)]

    def hard_softmax(k, r, chosen):
        if mode == "renorm":
            return softmax({c: v[k][r][c] for c in chosen})
        return softmax({c: v[k][r][c] if c in chosen else 0 * z[k, r, c] for c in range(classes)})

    def divergence(p_a, p_b, over):
        if detach_teacher:
            p_b = {c: value.detach() for c, value in p_b.items()}
        return sum(p_b[c] * (torch.log(p_b[c]) - torch.log(p_a[c] + eps)) for c in over)

    loss = torch.zeros((), dtype=z.dtype)
    for k in range(experts):
        for r in range(rows):
            loss = loss - w_ce * torch.log(p[k][r][y[r]]) / rows
            if w_hcm:
                loss = loss - w_hcm * torch.log(hard_softmax(k, r, hard_set(k, r))[y[r]]) / rows
    everything = range(classes)
    if inter and experts > 1:
        nested = bool(w_hcm) and partial in (True, "inter")
        for a in range(experts):
            for b in range(experts):
                for r in range(rows):
                    if a == b:
                        continue
                    chosen = hard_set(a, r)
                    full = divergence(p[a][r], p[b][r], everything) / rows
                    if norm == "ncl":
                        loss = loss + lam / (experts - 1) * full
                        if nested:
                            q_a, q_b = hard_softmax(a, r, chosen), hard_softmax(b, r, chosen)
                            loss = loss + lam_hcm / (experts - 1) * divergence(q_a, q_b, q_a) / rows
                    else:
                        part = divergence(p[a][r], p[b][r], chosen) / rows if nested else 0.0
                        loss = loss + lam * 2 / (experts * (experts - 1)) * (full + part)
    if intra and copies > 1:
        nested = bool(w_hcm) and partial in (True, "intra")
        for k in range(experts):
            for s in range(copies):
                for t in range(copies):
                    for b in range(images):
                        if s == t:
                            continue
                        p_a, p_b = p[k][s * images + b], p[k][t * images + b]
                        term = divergence(p_a, p_b, everything)
                        if nested:
                            term = term + divergence(p_a, p_b, hard_set(k, b))
                        loss = loss + lam * 2 / (copies * (copies - 1)) * term / images
    return loss


def compare(z, labels, **options):
    ours, plain = z.clone().requires_grad_(), z.clone().requires_grad_()
    ours_loss, plain_loss = total(NCLPlusLoss(COUNTS, **options)(ours, labels)), loops(plain, labels, COUNTS, **options)
    assert_close(ours_loss, plain_loss, rtol=1e-10, atol=1e-12)
    (ours_grad,) = torch.autograd.grad(ours_loss, ours)
    (plain_grad,) = torch.autograd.grad(plain_loss, plain)
    assert_close(ours_grad, plain_grad, rtol=1e-8, atol=1e-11)


ARMS = {
    "ce": {"balanced": False, "w_hcm": 0.0, "inter": False, "intra": False},
    "bsce": {"w_hcm": 0.0, "inter": False, "intra": False},
    "bsce_x2": {"w_ce": 2.0, "w_hcm": 0.0, "inter": False, "intra": False},
    "bil": {"inter": False, "intra": False},
    "bil_renorm": {"inter": False, "intra": False, "mode": "renorm"},
    "bod": {"w_hcm": 0.0, "intra": False},
    "ncl": {"norm": "ncl", "intra": False, "lam_hcm": 0.3},
    "ncl_renorm": {"norm": "ncl", "intra": False, "mode": "renorm", "lam_hcm": 0.3},
    "ncl_per_expert": {"norm": "ncl", "intra": False, "select": "per_expert", "lam_hcm": 0.3},
    "inter": {"intra": False},
    "intra": {"inter": False},
    "intra_full": {"partial": "inter"},
    "inter_full": {"partial": "intra"},
    "full_only": {"partial": False},
    "nclpp": {},
    "nclpp_detached": {"detach_teacher": True},
    "nclpp_eps": {"official_eps": True},
}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_against_the_loops(arm):
    z, y = example(experts=3)
    compare(z, y, copies=2, hard=3, **ARMS[arm])


@settings(deadline=None, max_examples=15)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from(["expert0", "mean", "per_expert"]),
    st.sampled_from(["zero_logit", "renorm"]),
    st.sampled_from(["nclpp", "ncl"]),
    st.floats(0, 2),
    st.integers(0, 999),
)
def test_any_options_against_the_loops(experts, copies, hard, select, mode, norm, lam, seed):
    z, y = example(experts, copies, images=2, seed=seed)
    options = {"select": select, "mode": mode, "norm": norm, "lam": lam, "intra": norm == "nclpp"}
    compare(z, y, copies=copies, hard=hard, **options)


@pytest.mark.parametrize("mode", ["zero_logit", "renorm"])
@pytest.mark.parametrize("norm", ["nclpp", "ncl"])
def test_gradient_against_finite_differences(norm, mode):
    z, y = example(experts=3)
    criterion = NCLPlusLoss(COUNTS, hard=3, copies=2, norm=norm, mode=mode, intra=norm == "nclpp")
    assert torch.autograd.gradcheck(lambda x: total(criterion(x, y)), z.requires_grad_())


def test_terms_are_named_and_weighted():
    z, y = example(experts=2, copies=2)
    terms = NCLPlusLoss(COUNTS, hard=3, copies=2)(z, y)
    assert list(terms) == ["ce", "hcm", "inter", "intra"]
    weighted = NCLPlusLoss(COUNTS, hard=3, copies=2, w_ce=2.0, w_hcm=0.5, lam=1.2)(z, y)
    for name, factor in {"ce": 2.0, "hcm": 0.5, "inter": 2.0, "intra": 2.0}.items():
        assert_close(weighted[name], factor * terms[name])
    assert list(NCLPlusLoss(COUNTS, hard=3)(z[:1, :3], y)) == ["ce", "hcm"]
    assert list(NCLPlusLoss(COUNTS, w_hcm=0.0, copies=2)(z, y)) == ["ce", "inter", "intra"]


def test_individual_losses_sum_over_experts_and_average_rows():
    z, y = example(experts=3, copies=1)
    per_expert = balanced_softmax_loss(z, y, torch.tensor(COUNTS))
    assert_close(NCLPlusLoss(COUNTS)(z, y)["ce"], per_expert.sum())
    assert_close(NCLPlusLoss(COUNTS, copies=2)(z.repeat(1, 2, 1), y)["ce"], per_expert.sum())


def test_without_distillation_only_the_individual_loss_is_left():
    z, y = example(experts=3, copies=2)
    terms = NCLPlusLoss(COUNTS, hard=3, copies=2, lam=0.0)(z, y)
    assert terms["inter"] == 0 and terms["intra"] == 0
    bil = NCLPlusLoss(COUNTS, hard=3, copies=2, inter=False, intra=False)(z, y)
    assert_close(total(terms), total(bil))


def test_identical_copies_are_one_copy():
    z, y = example(experts=2, copies=1)
    one = NCLPlusLoss(COUNTS, hard=3, copies=1)(z, y)
    three = NCLPlusLoss(COUNTS, hard=3, copies=3)(z.repeat(1, 3, 1), y)
    assert three["intra"].abs() < 1e-12
    assert_close(total(three), total(one))


def test_copies_are_stored_one_after_the_other():
    """Rows t*B + b come from image b: perfect logits in that order cost almost nothing, in the other order a lot."""
    y = torch.tensor([0, 1, 2])
    criterion = NCLPlusLoss([7, 7, 7], hard=2, copies=2)
    copy_major = 50 * torch.nn.functional.one_hot(y.repeat(2), 3).float()[None]
    image_major = 50 * torch.nn.functional.one_hot(y.repeat_interleave(2), 3).float()[None]
    assert total(criterion(copy_major, y)) < 1e-6
    assert total(criterion(image_major, y)) > 10


def test_symmetry_of_experts():
    z, y = example(experts=3, copies=2)
    for select, symmetric in (("expert0", False), ("mean", True), ("per_expert", True)):
        criterion = NCLPlusLoss(COUNTS, hard=3, copies=2, select=select)
        loss = total(criterion(z, y))
        assert_close(total(criterion(z[[0, 2, 1]], y)), loss)
        assert torch.allclose(total(criterion(z[[1, 0, 2]], y)), loss) is symmetric


def test_lists_tensors_and_integer_widths_agree():
    z, y = example(experts=2, copies=2)
    criterion = NCLPlusLoss(torch.tensor(COUNTS, dtype=torch.float32), hard=3, copies=2)
    assert_close(total(criterion(list(z), y.int())), total(criterion(z, y)))


def test_autocast_computes_in_float32():
    z, y = example()
    half = z.to(torch.bfloat16)
    criterion = NCLPlusLoss(COUNTS, hard=3, copies=2)
    expected = criterion(half.float(), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = criterion(half, y)
        again = criterion(half.float(), y)
    for name, value in expected.items():
        assert terms[name].dtype == torch.float32
        assert torch.equal(terms[name], value) and torch.equal(again[name], value)


def test_counts_survive_half_precision_and_a_checkpoint(tmp_path):
    criterion = NCLPlusLoss([1273, 1], hard=1).half()
    torch.save(criterion.state_dict(), tmp_path / "c.pt")
    other = NCLPlusLoss([5, 5], hard=1)
    other.load_state_dict(torch.load(tmp_path / "c.pt", weights_only=True))
    assert other.class_counts.tolist() == [1273, 1]


@pytest.mark.parametrize("norm", ["nclpp", "ncl"])
@pytest.mark.parametrize("mode", ["zero_logit", "renorm"])
@pytest.mark.parametrize("official_eps", [False, True])
def test_underflowing_probabilities_keep_finite_gradients(norm, mode, official_eps):
    """A masked target that is exactly 0 turned every gradient of the published criterion into NaN."""
    z, y = example(experts=2, copies=2)
    z = z.float()
    z[0, 0, 1] = z[1, 3, 2] = -200.0
    z.requires_grad_()
    criterion = NCLPlusLoss(
        COUNTS, hard=2, copies=2, norm=norm, mode=mode, intra=norm == "nclpp", official_eps=official_eps
    )
    loss = total(criterion(z, y))
    loss.backward()
    assert z.grad is not None
    assert torch.isfinite(loss) and torch.isfinite(z.grad).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hard": 6}, "H=6 of C=5"),
        ({"hard": 0}, "hard=0"),
        ({"lam": -0.1}, "lam=-0.1"),
        ({"w_ce": float("nan")}, "w_ce=nan"),
        ({"copies": 0}, "copies=0"),
        ({"norm": "ncl++"}, "norm='ncl\\+\\+', allowed: nclpp, ncl"),
        ({"mode": "soft"}, "allowed: zero_logit, renorm"),
        ({"select": "best"}, "allowed: expert0, mean, per_expert"),
        ({"partial": "none"}, "allowed: True, False, inter, intra"),
        ({"norm": "ncl", "copies": 2}, "set intra=False"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        NCLPlusLoss(COUNTS, **options)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 6, 4), torch.zeros(3, dtype=torch.long), "there are 5 class counts"),
        (torch.zeros(6, 5), torch.zeros(3, dtype=torch.long), "experts, rows, 5"),
        (torch.zeros(2, 5, 5), torch.zeros(2, dtype=torch.long), "5 rows .* copies=2"),
        (torch.zeros(2, 6, 5), torch.zeros(6, dtype=torch.long), "expected 3 integers"),
        (torch.zeros(2, 6, 5), torch.zeros(3), "float32"),
        (torch.zeros(2, 6, 5), torch.tensor([0, 5, 1]), "span 0..5, allowed: 0..4"),
        (torch.zeros(2, 6, 5), torch.tensor([0, -1, 1]), "span -1..1"),
        ([torch.zeros(6, 5), torch.zeros(4, 5)], torch.zeros(3, dtype=torch.long), "one shape"),
        ([], torch.zeros(3, dtype=torch.long), "one shape"),
    ],
)
def test_bad_batches(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        NCLPlusLoss(COUNTS, copies=2)(logits, labels)
