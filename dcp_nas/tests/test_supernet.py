"""The supernet's operations side by side equal one by one; the noise operation, and the floor, as controls of a search."""

import json

import pytest
import torch

from dcp_nas import search
from dcp_nas.genotypes import find_genotype
from dcp_nas.operations import Bits, Noise
from dcp_nas.search_space import ORDERS, Genotype, discretise, random_genotype
from dcp_nas.supernet import SearchCell, Supernet
from dcp_nas.tangent_propagation import child_gradient, flatten
from dcp_nas.tests.layouts import config, search_config


def one_by_one(self, s0, s1, weights):
    states = [self.preprocess0(s0), self.preprocess1(s1)]
    for j in range(2, 2 + self.nodes):
        inputs = [k for k, (_, node) in enumerate(self.edges) if node == j]
        states.append(sum(self.mixed[k](states[self.edges[k][0]], weights[k]) for k in inputs))
    return torch.cat(states[2:], dim=1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("weights", "activations", "strict"), [("real", "real", False), ("beta", "binary", True)])
def test_side_by_side_equals_one_by_one_in_value_gradient_and_second_order(
    weights, activations, strict, order, monkeypatch
):
    torch.manual_seed(0)
    bits = Bits(weights, activations, strict_1bit=strict, affine=False)
    net = Supernet(
        num_classes=3, in_channels=1, channels=2, cells=2, nodes=3, reductions=[1], bits=bits, order=order
    ).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))  # no two channels or edges with the same slope or scale
    alphas = [torch.randn(9, len(ORDERS[order]), dtype=torch.float64).requires_grad_() for _ in range(2)]
    images, target = torch.randn(6, 1, 8, 8).double(), torch.rand(6, 3).double().softmax(1)
    t, found = torch.randn(2 * alphas[0].numel()).double(), []
    for forward in (SearchCell.forward, one_by_one):
        monkeypatch.setattr(SearchCell, "forward", forward)
        logits = net(images, tuple(alphas))
        row = [logits.detach(), flatten(torch.autograd.grad(logits.square().sum(), list(net.parameters())))]
        for hessian in ("exact", "ggn"):
            step = child_gradient(lambda a: net(images, tuple(a)), alphas, target, t, lam=1.0, hessian=hessian)
            row += [step["g"], step["tangent_term"]]
        found.append(row)
    for wide, plain in zip(*found, strict=True):
        torch.testing.assert_close(wide, plain, rtol=1e-8, atol=1e-11)


def test_noise_knows_nothing_of_the_image_and_leaves_no_trace():
    noise, other = Noise(2), Noise(2)
    x = torch.randn(400, 3, 4, 4, requires_grad=True)
    y = noise(x)
    assert y.shape == (400, 3, 2, 2) and not y.requires_grad
    assert torch.equal(y, noise(torch.zeros(400, 3, 4, 4))) and not torch.equal(y, other(x))
    assert abs(y.mean()) < 0.06 and abs(y.std() - 1) < 0.06
    assert torch.corrcoef(torch.stack([y.flatten(), x[:, :, ::2, ::2].flatten()]).detach())[0, 1].abs() < 0.06
    assert not torch.equal(y[0], y[1])


def test_a_cell_of_noise_is_counted_and_never_trained(tmp_path):
    alpha = torch.zeros(5, 9)
    alpha[:, -1] = 1.0
    alpha[3, 2] = 2.0
    cell = discretise(alpha, torch.zeros(5, 9), order="control")
    assert cell.share("noise") == 3 / 8 and cell.share("max_pool_3x3") == 4 / 8 and cell.share("avg_pool_3x3") == 1 / 8
    assert all(not random_genotype(k, nodes=2).share("noise") for k in range(40))
    cell.save(tmp_path / "genotype.json")
    assert Genotype.load(tmp_path / "genotype.json") == cell
    with pytest.raises(ValueError, match=r"keeps the noise operation of model\.order=control"):
        find_genotype(config(f"genotype.file={tmp_path / 'genotype.json'}", genotype="genotype=file"))


def test_a_search_below_its_floor_is_named_and_the_control_says_what_it_keeps(fabric, tmp_path, capsys):
    search.fit(search_config("search.floor=0.99", "model.order=control", "seed=3"), fabric, tmp_path / "low")
    assert "notice: test, seed 3: " in (said := capsys.readouterr().out) and "below search.floor=99%" in said
    metrics = json.loads((tmp_path / "low/result.json").read_text())["metrics"]
    kept = Genotype.load(tmp_path / "low/genotype.json").share("noise")
    assert metrics["below_floor"] == 1 and metrics["noise_kept"] == kept
    assert metrics["entropy"] == pytest.approx((metrics["entropy_normal"] + metrics["entropy_reduce"]) / 2)
    search.fit(search_config("search.floor=0.0"), fabric, tmp_path / "high")
    metrics = json.loads((tmp_path / "high/result.json").read_text())["metrics"]
    assert metrics["below_floor"] == 0 and "noise_kept" not in metrics and "notice" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"search\.floor=1\.5"):
        search.fit(search_config("search.floor=1.5"), fabric, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_the_floor_looks_at_the_parent_where_there_is_one():
    assert search.below_floor({"val_accuracy": 0.4}, 0.5).startswith("40.0% on the half for alpha")
    assert search.below_floor({"val_accuracy": 0.4, "parent_accuracy": 0.6, "child_accuracy": 0.1}, 0.5) == ""
    assert search.below_floor({"val_accuracy": 0.5}, 0.5) == "" == search.below_floor({"val_accuracy": 0.1}, None)
    assert search.below_floor({}, 0.5) == ""
