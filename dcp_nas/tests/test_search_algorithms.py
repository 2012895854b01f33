"""The alternating algorithm and CP-NAS: what moves in which phase, what is handed over, what is sampled and abandoned."""

import pytest
import torch
import torch.nn.functional as F

from dcp_nas.analysis.snapshots import examine, moved
from dcp_nas.child_parent import ChildParentSearch
from dcp_nas.cp_nas import CPNAS, feature_loss, score
from dcp_nas.operations import BetaConv2d, Bits, DilConv, FactorizedReduce, Preprocess
from dcp_nas.search_space import edge_nodes
from dcp_nas.supernet import Supernet
from dcp_nas.tangent_propagation import flatten

W = {"lr": 0.05, "lr_min": 0.01, "momentum": 0.9, "weight_decay": 3e-4, "clip": 5.0}
ALPHA = {"lr": 3e-3, "betas": (0.5, 0.999), "weight_decay": 1e-3}
DO = {"eta": 0.1, "psi": 0.2, "psi_lr_mult": 0.1, "tau": 0.6, "granularity": "operation"}
SHAPE = {"num_classes": 4, "in_channels": 1, "channels": 2, "cells": 2, "nodes": 1, "reductions": [1]}


def nets():
    torch.manual_seed(0)
    return Supernet(**SHAPE, bits=Bits(affine=False)), Supernet(**SHAPE, bits=Bits("beta", "binary", affine=False))


def search(child=True, **options):
    parent, binary = nets()
    options = {"rounds": 2, "steps": 2, "chunks": 2, "alpha": ALPHA, **options}
    return ChildParentSearch(
        parent, binary if child else None, generator=torch.Generator().manual_seed(0), w=W, **options
    )


def batch(seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 4, 4, generator=g), torch.randint(0, 4, (8,), generator=g)


def run_phase(s, phase, steps=2):
    s.begin(phase)
    rows = [s.step(phase, batch(10 * phase + k), batch(100 + 10 * phase + k)) for k in range(steps)]
    s.end(phase)
    return rows


def vector(s, name):
    return flatten([a.detach().clone() for a in s.arch[name].alphas])


def test_phases_move_one_network_and_hand_alpha_over():
    s = search()
    assert s.phases() == ["parent 1", "child 1", "parent 2", "child 2"] and s.steps(0) == 2
    child_before = {k: v.clone() for k, v in s.nets["child"].state_dict().items()}
    start = vector(s, "parent")
    run_phase(s, 0)
    assert not torch.equal(vector(s, "parent"), start) and torch.equal(vector(s, "child"), start)
    assert all(torch.equal(v, child_before[k]) for k, v in s.nets["child"].state_dict().items())
    assert s.alphas() is s.arch["parent"].alphas
    after_parent, weights = vector(s, "parent"), {k: v.clone() for k, v in s.nets["parent"].state_dict().items()}
    s.begin(1)
    assert torch.equal(vector(s, "child"), after_parent)
    for k, v in weights.items():  # inherited in the first round
        assert torch.equal(s.nets["child"].state_dict()[k], v)
    s.step(1, batch(1), batch(2))
    assert torch.equal(vector(s, "parent"), after_parent) and not torch.equal(vector(s, "child"), after_parent)
    assert all(torch.equal(v, weights[k]) for k, v in s.nets["parent"].state_dict().items())
    s.end(1)
    assert torch.equal(vector(s, "parent"), vector(s, "child")) and s.alphas() is s.arch["child"].alphas
    child_weights = s.nets["child"].fc.weight.clone()
    run_phase(s, 2)
    s.begin(3)
    assert torch.equal(s.nets["child"].fc.weight, child_weights)  # not inherited again
    every = search(inherit="every")
    for phase in range(3):
        run_phase(every, phase)
    every.begin(3)
    assert torch.equal(every.nets["child"].fc.weight, every.nets["parent"].fc.weight)


def test_the_tangent_is_the_mean_over_the_round_the_last_batch_or_the_same_batch():
    found = {}
    for tangent in ("round", "last", "same"):
        s = search(tangent=tangent)
        run_phase(s, 0)
        collected = torch.stack(s.collected)
        s.begin(1)
        found[tangent] = s.t
    assert len(collected) == 2 and not torch.allclose(collected[0], collected[1])
    torch.testing.assert_close(found["round"], collected.mean(0))
    assert torch.equal(found["last"], collected[1]) and found["same"] is None
    row = s.step(1, batch(1), batch(2))
    assert "gradient_cosine" in row and "tangent_ratio" in row
    s.begin(2)
    assert s.collected == []


def test_parent_ascends_the_likelihood_and_child_learns_the_parents_output():
    s = search(steps=20, mu=0.0)
    s.begin(0)
    losses = [float(s.step(0, batch(0), batch(0))["loss"]) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    s.end(0)
    s.begin(1)
    images = batch(0)[0]
    target = s.target(images)
    assert not target.requires_grad
    torch.testing.assert_close(target.sum(1), torch.ones(8))
    objective = [float(s.step(1, batch(0), batch(0))["objective"]) for _ in range(20)]
    assert objective[-1] > objective[0] and all(g <= 1e-6 for g in objective)


@pytest.mark.parametrize("decay", [0.0, 0.3])  # without a step along the gradient, with 0.3 one along alpha for most
def test_the_alpha_step_is_adam_along_the_gradient_of_the_loss(decay):
    rule = ALPHA | {"weight_decay": decay}
    s = search(child=False, alpha=rule)
    s.begin(0)
    images, labels = batch(5)
    for a in s.arch["parent"].alphas:
        a.data.normal_(generator=torch.Generator().manual_seed(0))
    before = [a.detach().clone() for a in s.arch["parent"].alphas]
    loss = F.cross_entropy(s.nets["parent"](images, s.arch["parent"].alphas), labels)
    gradients = torch.autograd.grad(loss, s.arch["parent"].alphas)
    s.parent_alpha_step((images, labels))
    copies = [b.clone().requires_grad_() for b in before]
    adam = torch.optim.Adam(copies, **rule)
    for c, g in zip(copies, gradients, strict=True):
        c.grad = g
    adam.step()
    torch.testing.assert_close(list(s.arch["parent"].alphas), copies)


def test_reconstruction_pulls_the_latent_weights_to_their_binary_form():
    errors = {}
    for mu in (0.0, 1.0):
        s = search(mu=mu, recon_reduction="sum")
        run_phase(s, 0)
        assert ("reconstruction" in run_phase(s, 1, steps=6)[-1]) == (mu > 0)
        errors[mu] = sum(m.reconstruction().item() for m in s.nets["child"].modules() if isinstance(m, BetaConv2d))
    assert errors[1.0] < 0.7 * errors[0.0]


def test_the_childs_weights_follow_the_parents_output_and_mu_times_the_reconstruction():
    s = search(steps=1, mu=0.3, recon_reduction="sum")
    s.w["clip"] = 1e9
    run_phase(s, 0, steps=1)
    s.begin(1)
    child, (images, labels) = s.nets["child"], batch(3)
    log_p = child(images, tuple(a.detach() for a in s.arch["child"].alphas)).log_softmax(1)
    layers = [m for m in child.modules() if isinstance(m, BetaConv2d)]
    error = sum(((m.weight - m.beta.abs() * m.weight.detach().sign()) ** 2).sum() for m in layers)
    loss = -(s.target(images) * log_p).sum(1).mean() + 0.3 * error
    parameters = list(child.parameters())
    expected = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = []
    s.optimizers["child"].register_step_pre_hook(lambda *_: found.extend(p.grad for p in parameters))
    s.step(1, (images, labels), batch(4))
    assert [f is None for f in found] == [e is None for e in expected] and layers
    pairs = [(f, e) for f, e in zip(found, expected, strict=True) if e is not None]
    torch.testing.assert_close([f for f, _ in pairs], [e for _, e in pairs], rtol=1e-4, atol=1e-6)


def test_without_a_child_it_is_darts_and_frozen_alpha_stays():
    s = search(child=False, alpha_start=1)
    assert s.phases() == ["parent 1", "parent 2"]
    start = vector(s, "parent")
    run_phase(s, 0)
    assert torch.equal(vector(s, "parent"), start) and s.collected == []
    run_phase(s, 1)
    assert not torch.equal(vector(s, "parent"), start) and s.genotype().nodes == 1


def test_decoupled_optimisation_changes_the_search_and_reports_its_size():
    plain, do, tiny = (search(decoupled=d) for d in (None, DO, DO | {"eta": None}))
    rows = [run_phase(s, 0) for s in (plain, do, tiny)]
    assert rows[0][0]["backtrack_ratio"] == 0 and 0 < rows[2][0]["backtrack_ratio"] < rows[1][0]["backtrack_ratio"]
    assert not torch.equal(vector(plain, "parent"), vector(do, "parent"))
    assert tiny.arch["parent"].decoupled[0].eta == pytest.approx(3e-3 * 0.05)  # eta_1 eta_2
    assert tiny.arch["parent"].decoupled[0].eta_psi == pytest.approx(3e-4)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"tangent": "epoch"}, "tangent='epoch'"), ({"inherit": "all"}, "inherit='all'"), ({"rounds": 0}, "rounds=0"),
     ({"mu": -1.0}, "mu=-1"), ({"decoupled": DO | {"tau": 2}}, "tau=2")],
)  # fmt: skip
def test_wrong_options_are_named(options, error):
    with pytest.raises(ValueError, match=error):
        search(**options)


def test_the_mechanism_check_on_a_real_child_succeeds_with_the_exact_step():
    parent, other = nets()[0].double(), nets()[0].double()
    s = ChildParentSearch(
        parent, other, generator=torch.Generator().manual_seed(0), rounds=1, steps=3, w=W, alpha=ALPHA, lam=0.0
    )
    for arch in s.arch.values():  # in float64 throughout
        arch.alphas = tuple(a.detach().double().requires_grad_() for a in arch.alphas)
        arch.optimizer = torch.optim.Adam(arch.alphas, **ALPHA)
    pairs = [(x.double(), y) for x, y in (batch(k) for k in range(4))]
    for phase in (0, 1):
        s.begin(phase)
        for k in range(3):
            s.step(phase, pairs[k], pairs[3])
        s.end(phase)
    found = examine(s, pairs, [1e-4, 1e-3], 2, 1.0, 0)
    assert found["success_exact_0"] == 1.0 and found["success_random_0"] == pytest.approx(0.5, abs=0.13)
    assert found["gain_exact_0"] == found["success_exact_0"] - found["success_random_0"]
    assert found["change_exact_1"] < found["change_exact_0"] < 0 and found["cosine_ggn"] > 0.9
    step = moved(s.arch["child"].alphas, torch.ones(vector(s, "child").numel(), dtype=torch.float64), 0.5)
    assert (flatten([a.detach() for a in step]) - vector(s, "child")).norm().item() == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------------------ CP-NAS
def cp_nas(**options):
    return CPNAS(*nets(), generator=torch.Generator().manual_seed(1), w=W, **options)


def test_score_and_feature_loss_by_hand():
    assert score(0.8, 0.6) == pytest.approx(2 * 0.2 + 0.6) and score(0.8, 0.6, beta_p=0.0) == 0.6
    a = [torch.zeros(4, 2, 1, 1)]
    b = [torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 2.0]]).view(4, 2, 1, 1)]
    labels = torch.tensor([0, 0, 1, 1])
    matching = (1 + 9 + 4 + 4) / 8
    centre = (1 + 1) / 4  # class 0 lies 1 away from its mean (2, 0), class 1 at its mean
    assert feature_loss(a, b, labels, lam=0.5).item() == pytest.approx(0.25 * matching + 0.5 * centre)


def test_every_operation_is_sampled_once_per_pass_and_the_worst_is_abandoned():
    s = cp_nas(samples=2)
    assert s.phases()[0] == "stage of 7 operations" and len(s.phases()) == 6 and s.steps(0) == 14 and s.steps(5) == 4
    s.begin(0)
    seen = []
    for k in range(14):
        seen.append(s.architecture()[0][0])
        s.step(0, batch(k), batch(k + 50))
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(1, 8))  # without `none`
    sums = s.sums.clone()
    s.end(0)
    for kind in range(2):
        for edge in range(len(edge_nodes(1))):
            gone = set(range(1, 8)) - set(s.remaining[kind][edge])
            assert len(gone) == 1 and sums[kind, edge, gone.pop()] == sums[kind, edge, 1:].min()


def test_to_the_end_one_operation_is_left_and_the_genotype_takes_the_best_edges():
    s = cp_nas()
    for phase in range(len(s.phases())):
        s.begin(phase)
        for k in range(s.steps(phase)):
            s.step(phase, batch(k), batch(k + 50))
        s.end(phase)
    assert all(len(ops) == 1 for kind in s.remaining for ops in kind)
    genotype = s.genotype()
    assert genotype.nodes == 1 and {i for _, i in genotype.normal} == {0, 1}
    best = [s.scores[0, e, s.remaining[0][e][0]].item() for e in range(2)]
    assert genotype.normal[0][1] == (0 if best[0] >= best[1] else 1)


def test_cp_nas_clips_the_gradients_of_both_networks():
    s, norms = cp_nas(), []
    s.w["clip"] = 1e-3
    for name, optimizer in s.optimizers.items():
        grads = list(s.nets[name].parameters())
        optimizer.register_step_pre_hook(
            lambda *_, g=grads: norms.append(torch.cat([p.grad.flatten() for p in g if p.grad is not None]).norm())
        )
    s.begin(0)
    row = s.step(0, batch(0), batch(1))
    assert min(row["parent gradient norm"], row["child gradient norm"]) > 1e-2
    assert [n.item() for n in norms] == pytest.approx([1e-3, 1e-3], rel=1e-2)


def test_cp_nas_resumes_in_the_middle_of_a_stage():
    def go(s, steps):
        for k in steps:
            s.step(0, batch(k), batch(k + 50))

    whole, half, rest = cp_nas(samples=2), cp_nas(samples=2), cp_nas(samples=2)
    for s in (whole, half):
        s.begin(0)
    go(whole, range(10))
    go(half, range(5))
    rest.load_state_dict(half.state_dict())
    go(rest, range(5, 10))
    assert torch.equal(whole.sums, rest.sums) and whole.order == rest.order
    assert all(torch.equal(v, rest.nets["child"].state_dict()[k]) for k, v in whole.nets["child"].state_dict().items())
    with pytest.raises(ValueError, match="samples=0"):
        cp_nas(samples=0)


# --------------------------------------------------------------------------------------- what goes wrong without notice
def test_the_hand_over_forgets_what_was_added_to_the_other_alpha():
    """psi's gradient belongs to the alpha that was moved, not to the one that is taken over."""
    s = search(decoupled=DO)
    run_phase(s, 0)
    run_phase(s, 1)
    assert any(rule.added.abs().max() > 0 for rule in s.arch["child"].decoupled)
    run_phase(s, 2)
    s.begin(3)
    for rule in s.arch["child"].decoupled:
        assert rule.added.abs().max() == 0 and rule.psi_gradient(torch.ones_like(rule.added)).abs().max() == 0


def test_weights_move_by_the_training_half_and_alpha_by_the_other():
    for phase in (0, 1):
        moved_by = {}
        for name, train, val in (("base", 0, 1), ("train", 2, 1), ("val", 0, 3)):
            s = search(mu=0.0)
            if phase:
                run_phase(s, 0)
            s.begin(phase)
            who = "child" if phase else "parent"
            s.step(phase, batch(train), batch(val))
            moved_by[name] = (flatten([p.detach() for p in s.nets[who].parameters()]).clone(), vector(s, who))
        (w, a), (w_train, _), (w_val, a_val) = moved_by["base"], moved_by["train"], moved_by["val"]
        assert torch.equal(w, w_val), "the validation half moved the weights"
        assert not torch.equal(w, w_train) and not torch.equal(a, a_val)


def test_the_target_is_the_parents_output_at_the_parents_own_alpha():
    s = search(steps=3)
    run_phase(s, 0)
    s.begin(1)
    with torch.no_grad():
        for a in s.arch["child"].alphas:
            a.normal_(generator=torch.Generator().manual_seed(3))
    images = batch(5)[0]
    with torch.no_grad():
        own = s.nets["parent"](images, s.arch["parent"].alphas).softmax(1)
        other = s.nets["parent"](images, s.arch["child"].alphas).softmax(1)
    torch.testing.assert_close(s.target(images), own)
    assert not torch.allclose(own, other)
    before = s.target(images)
    s.step(1, batch(6), batch(7))
    assert torch.equal(s.target(images), before), "a Child round moves nothing of the Parent"


def test_gradients_of_the_weights_are_clipped(monkeypatch):
    for phase in (0, 1):
        s = search()
        s.w = {**W, "clip": 1e-3}
        if phase:
            run_phase(s, 0)
        s.begin(phase)
        norms = []
        name = "child" if phase else "parent"
        monkeypatch.setattr(
            s.optimizers[name],
            "step",
            lambda n=name, found=norms, s=s: found.append(
                torch.stack([p.grad.norm() for p in s.nets[n].parameters() if p.grad is not None]).norm().item()
            ),
        )
        row = s.step(phase, batch(0), batch(1))
        assert norms[0] == pytest.approx(1e-3, rel=1e-2) and float(row["gradient norm"]) > 1e-2


def test_the_rate_of_the_weights_falls_by_half_a_cosine_from_round_to_round():
    s, taken = search(rounds=4, steps=1, alpha_start=4), {"parent": [], "child": []}
    for name, optimizer in s.optimizers.items():
        optimizer.register_step_pre_hook(lambda o, *_, n=name: taken[n].append(o.param_groups[0]["lr"]))
    for phase in range(len(s.phases())):
        run_phase(s, phase, steps=1)
    half = 0.04 * 0.5**0.5 / 2  # cos(pi / 4) = sqrt(1 / 2)
    assert taken["parent"] == taken["child"] == pytest.approx([0.05, 0.03 + half, 0.03, 0.03 - half])


def test_norms_have_the_epsilon_of_their_place():
    """1e-5 at the entrance of a cell, 1e-3 inside operations and behind the entrance, as in the released code."""
    for net in nets():
        for cell in net.cells:
            entrances = [m.norm_in if hasattr(m, "norm_in") else m[0] for m in (cell.preprocess0, cell.preprocess1)]
            assert [m.eps for m in entrances] == [1e-5, 1e-5]
            inside = [
                m for edge in cell.mixed for op in edge.ops for m in op.modules() if isinstance(m, torch.nn.BatchNorm2d)
            ]
            small = [m for edge in cell.mixed for op in edge.ops for m in op.modules() if hasattr(m, "norm_in")]
            assert {m.eps for m in inside if m not in [r.norm_in for r in small]} == {1e-3}
            assert all(r.norm_in.eps == 1e-5 for r in small)
            assert all(m.track_running_stats is False for m in inside)
    for bits in (Bits(), Bits("m", "binary")):  # a network that is trained
        assert Preprocess(2, 2, bits)[0].eps == FactorizedReduce(2, 2, bits).norm_in.eps == 1e-5
        kept = [m.eps for m in DilConv(2, 3, 1, 2, 2, bits).modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert kept and set(kept) == {1e-3}
