"""Ma19 and UNIQUE: layers in closed form, losses, the authors' checkpoints, export."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.onnx_export import export_onnx
from iqa_attack.checkpoint import load, state
from iqa_attack.quality_models.calibration import Calibration, Scored
from iqa_attack.quality_models.ma19 import GDN, Annotators, Ma19, probability_better, spatial_pyramid
from iqa_attack.quality_models.models import (
    CallableMetric,
    _load_network,
    load_official,
    pack,
    pyiqa_metric,
    unpack,
)
from iqa_attack.quality_models.unique import Unique, bilinear_pool, fidelity_loss, pair_loss, preference


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_gdn_is_the_formula_and_has_right_gradients():
    layer = GDN(3).double()
    with torch.no_grad():
        layer.gamma.copy_(torch.rand(3, 3, generator=generator(), dtype=torch.float64))
        layer.beta.copy_(torch.rand(3, generator=generator(1), dtype=torch.float64))
    x = torch.randn(2, 3, 4, 5, generator=generator(2), dtype=torch.float64, requires_grad=True)
    y = layer(x)
    for i in range(3):
        pool = layer.beta[i] + sum(layer.gamma[j, i] * x[:, j] ** 2 for j in range(3))
        torch.testing.assert_close(y[:, i], x[:, i] / pool.sqrt())
    assert torch.autograd.gradcheck(layer, (x,))
    fresh = GDN(3)
    with torch.no_grad():
        fresh.beta.zero_()
    torch.testing.assert_close(
        fresh(torch.tensor([[-2.0, 3.0, -0.5]]).view(1, 3, 1, 1)).flatten(), torch.tensor([-1.0, 1.0, -1.0])
    )


def test_gdn_projection_keeps_parameters_positive():
    layer = GDN(2)
    with torch.no_grad():
        layer.gamma.fill_(-1), layer.beta.fill_(-1)
    layer.project()
    assert float(layer.gamma.min()) == pytest.approx(2e-10) and float(layer.beta.min()) == pytest.approx(1e-6)


@pytest.mark.parametrize("size", [(3, 3), (4, 5), (6, 6), (7, 9), (12, 8)])
def test_spatial_pyramid_windows(size):
    """Windows of ceil(side/n) that begin floor((kernel n - side + 1)/2) before the image."""
    x = torch.randn(2, 3, *size, generator=generator())
    found = spatial_pyramid(x)
    assert found.shape == (2, 42)
    start = 3
    torch.testing.assert_close(found[:, :3], x.amax((2, 3)))
    for n in (2, 3):
        k = [math.ceil(s / n) for s in size]
        p = [(kk * n - s + 1) // 2 for kk, s in zip(k, size, strict=True)]
        cells = found[:, start : start + 3 * n * n].view(2, 3, n, n)
        start += 3 * n * n
        for i in range(n):
            for j in range(n):
                rows = slice(max(0, i * k[0] - p[0]), max(0, (i + 1) * k[0] - p[0]))
                columns = slice(max(0, j * k[1] - p[1]), max(0, (j + 1) * k[1] - p[1]))
                torch.testing.assert_close(cells[:, :, i, j], x[:, :, rows, columns].amax((2, 3)))
    if size == (6, 6):
        torch.testing.assert_close(found[:, 3:15], F.adaptive_max_pool2d(x, 2).flatten(1))


def test_ma19_variants_and_batches():
    torch.manual_seed(0)
    model = Ma19(width=6).eval()
    x = torch.rand(3, 3, 41, 50, generator=generator())
    mean, variance = model.distribution(x)
    assert bool((variance > 0).all())
    torch.testing.assert_close(torch.cat([model(i[None]) for i in x]), mean, rtol=1e-4, atol=1e-5)
    assert Ma19(width=6, pooling="gap").fc1.in_features == 6
    with pytest.raises(ValueError, match="pooling='max', allowed: spp, gap"):
        Ma19(pooling="max")
    with pytest.raises(ValueError, match=r"beta=0\.0, allowed: > 0"):
        Ma19(beta=0.0)
    soft = Ma19(width=6, gamma=0.1, beta=1.0)
    again = Ma19(**soft.options())
    again.load_state_dict(soft.state_dict())
    torch.testing.assert_close(again(x), soft(x), rtol=0, atol=0)
    channel = soft.norms[0](torch.full((1, 6, 1, 1), 0.5))
    torch.testing.assert_close(channel, torch.full((1, 6, 1, 1), 0.5 / (1 + 0.1 * 0.25) ** 0.5))
    with pytest.raises(ValueError, match="Ma19 needs images of at least 24"):
        model(torch.rand(1, 3, 20, 40))


@pytest.mark.parametrize("network", [Ma19(width=4), Unique(backbone="small")], ids=["ma19", "unique"])
def test_a_constant_crop_does_not_end_a_training(network):
    x = torch.rand(3, 3, 32, 32, generator=generator())
    x[1] = 0.4
    first, second = network.distribution(x)
    (first.sum() + second.sum()).backward()
    assert bool(first.isfinite().all()) and all(bool(p.grad.isfinite().all()) for p in network.parameters())


def test_annotators_marginalise_over_which_image_is_better():
    votes = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    model = Annotators(2)
    with torch.no_grad():
        model.sensitivity.copy_(torch.tensor([1.0, -0.5])), model.specificity.copy_(torch.tensor([0.3, 2.0]))
    sens, spec = torch.sigmoid(model.sensitivity), torch.sigmoid(model.specificity)
    p = torch.tensor([0.7, 0.2])
    likelihood = p * (sens**votes * (1 - sens) ** (1 - votes)).prod(1) + (1 - p) * (
        spec ** (1 - votes) * (1 - spec) ** votes
    ).prod(1)
    torch.testing.assert_close(model(p, votes), -likelihood.log().mean())
    torch.testing.assert_close(
        probability_better(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]), torch.tensor([0]), torch.tensor([1])),
        torch.tensor([0.8413447]),
    )


def test_annotators_find_the_one_that_votes_at_random():
    g = generator(3)
    truth = torch.rand(4000, generator=g) < 0.5
    good, random = truth.float(), (torch.rand(4000, generator=g) < 0.5).float()
    flipped = torch.rand(4000, generator=g) < 0.1
    votes = torch.stack([torch.where(flipped, 1 - good, good), random], 1)
    model = Annotators(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        model(torch.where(truth, 0.99, 0.01), votes).backward()
        optimizer.step()
    assert torch.sigmoid(model.sensitivity).tolist() == pytest.approx([0.9, 0.5], abs=0.03)


def test_bilinear_pooling():
    x = torch.randn(2, 5, 3, 4, generator=generator())
    found = bilinear_pool(x).view(2, 5, 5)
    torch.testing.assert_close(found, found.transpose(1, 2))
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.ones(2))
    product = torch.einsum("bchw,bdhw->bcd", x, x) / 12
    root = product.sign() * (product.abs() + 1e-8).sqrt()
    torch.testing.assert_close(found, root / root.flatten(1).norm(dim=1).view(-1, 1, 1))


def test_fidelity_loss():
    p, g = torch.tensor([0.2, 0.9]), torch.tensor([0.5, 0.4])
    assert float(fidelity_loss(p, p)) == pytest.approx(0, abs=1e-4)
    torch.testing.assert_close(fidelity_loss(p, g), fidelity_loss(1 - p, 1 - g))
    assert float(fidelity_loss(torch.tensor([0.0]), torch.tensor([1.0]))) == pytest.approx(1, abs=3e-4)
    q = torch.tensor([1.0, 0.0])
    i, j = torch.tensor([0]), torch.tensor([1])
    assert float(preference(q, torch.ones(2), i, j)) == pytest.approx(0.5 * (1 + math.erf(0.5)), rel=1e-5)


def test_the_deviation_learns_from_its_order_alone():
    quality = torch.tensor([1.0, 0.0], requires_grad=True)
    deviation = torch.tensor([0.3, 0.3], requires_grad=True)
    i, j = torch.tensor([0]), torch.tensor([1])
    terms = pair_loss(quality, deviation, torch.tensor([5.0, 4.0]), torch.tensor([0.9, 0.1]), i, j)
    terms["fidelity"].backward(retain_graph=True)
    assert deviation.grad is None and float(quality.grad[0]) != 0
    assert float(terms["uncertainty"]) == pytest.approx(0.025)
    terms["uncertainty"].backward()
    assert deviation.grad.tolist() == [-1.0, 1.0], "the first should be the less certain"
    equal = pair_loss(quality, deviation, torch.tensor([5.0, 4.0]), torch.tensor([0.5, 0.5]), i, j)
    assert float(equal["uncertainty"]) == 0


def test_unique_normalises_inside_and_batches_equal_single():
    torch.manual_seed(0)
    model = Unique(backbone="small").eval()
    x = torch.rand(3, 3, 48, 56, generator=generator())
    torch.testing.assert_close(torch.cat([model(i[None]) for i in x]), model(x), rtol=1e-4, atol=1e-5)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    model(mean.expand(1, 3, 48, 48) + torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1) * torch.linspace(0, 1, 48))
    torch.testing.assert_close(seen[0][0, 1, 0], torch.linspace(0, 1, 48), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="backbone='resnet50', allowed: resnet34, small"):
        Unique(backbone="resnet50")


def official_ma19(width=4):
    """A checkpoint in the order of the layers: conv, norm, conv, ... under the prefix cnn., with NumPy scalars beside it."""
    torch.manual_seed(1)
    model = Ma19(width=width).eval()
    with torch.no_grad():
        for norm in model.norms:
            norm.beta.add_(0.1)
    state = {}
    for i in range(4):
        state |= {f"cnn.conv{i}.weight": model.convs[i].weight, f"cnn.conv{i}.bias": model.convs[i].bias}
        state |= {f"cnn.gdn{i}.beta": model.norms[i].beta, f"cnn.gdn{i}.gamma": model.norms[i].gamma}
    for name in ("fc1", "fc2"):
        state |= {f"cnn.{name}.{k}": v for k, v in getattr(model, name).state_dict().items()}
    return model, {k: v.detach() for k, v in state.items()}


def test_official_checkpoints(tmp_path):
    x = torch.rand(2, 3, 32, 32, generator=generator())
    ma19, state = official_ma19()
    torch.save({"state_dict": state, "epoch": 7, "test_srcc": {"LIVE": np.float64(0.9188)}}, tmp_path / "ma19.pt")
    loaded = load_official("ma19", tmp_path / "ma19.pt", width=4, floor=-1)
    torch.testing.assert_close(loaded.model(x), ma19(x))
    torch.testing.assert_close(loaded(x), 10 * torch.sigmoid((ma19(x) - 2.6943240) / 0.9155527))
    unique = Unique(backbone="resnet34").eval()
    state = {f"module.{k}": v for k, v in unique.state_dict().items()}
    state |= {"module.backbone.fc.weight": torch.zeros(1000, 512), "module.backbone.fc.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "UNIQUE.pt")
    with torch.no_grad():  # without the calibration, which scores every training image
        torch.testing.assert_close(_load_network("unique", tmp_path / "UNIQUE.pt", {}).eval()(x), unique(x))
    with pytest.raises(ValueError, match="holds no weights of ma19"):
        load_official("ma19", tmp_path / "UNIQUE.pt")
    with pytest.raises(ValueError, match=r"holds no weights of ma19: .*expected \(48, 3, 3, 3\)"):
        load_official("ma19", tmp_path / "ma19.pt")
    with pytest.raises(ValueError, match="no quality model 'niq'"):
        load_official("niq", tmp_path / "n.npz")


def test_a_checkpoint_with_code_in_it_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"state_dict": {}, "x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(RuntimeError, match="cannot read"):
        load_official("ma19", tmp_path / "evil.pt")
    assert not (tmp_path / "written").exists()


def test_packed_models_come_back(brisque, cornia, images, tmp_path):
    for kind, model in (("brisque", brisque), ("cornia", cornia), ("unique", Unique(backbone="small").eval())):
        scored = Scored(model, Calibration(1.5, 2.5, 0.9, 4, "given"))
        packed = pack(kind, scored)
        torch.save(state({kind: packed}, config={"networks": {}}, complete=True), tmp_path / "c.ckpt")
        loaded = load(tmp_path / "c.ckpt")
        again = loaded.model[kind]
        assert loaded.about["models"] == [kind] and loaded.about["calibration"][kind]["srcc"] == 0.9
        assert again.model.options() == model.options() and again.calibration == scored.calibration
        with torch.no_grad():
            torch.testing.assert_close(again(images), scored(images), rtol=0, atol=0)
        assert not any(p.requires_grad for p in unpack(packed).parameters())
    torch.save(state({}, config={"networks": {}}), tmp_path / "half.ckpt")
    with pytest.raises(ValueError, match="unfinished"):
        load(tmp_path / "half.ckpt")
    torch.save({"model": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="is no checkpoint of iqa_attack/train.py"):
        load(tmp_path / "other.ckpt")


def test_any_callable_and_pyiqa_missing(monkeypatch):
    metric = CallableMetric(lambda x: x.mean((1, 2, 3), keepdim=True), higher_is_better=False)
    torch.testing.assert_close(metric(torch.full((2, 3, 4, 4), 0.25)), torch.tensor([-0.25, -0.25]))
    monkeypatch.setitem(__import__("sys").modules, "pyiqa", None)
    with pytest.raises(
        ValueError, match=r"pyiqa:musiq needs the package pyiqa .*pip install 'vision-reproductions\[iqa\]'"
    ):
        pyiqa_metric("musiq")


def test_pyiqa_metrics_are_turned(monkeypatch):
    class Fake:
        lower_better = True

        def __call__(self, x):
            return x.mean((1, 2, 3))

    import types

    monkeypatch.setitem(
        __import__("sys").modules, "pyiqa", types.SimpleNamespace(create_metric=lambda name, **k: Fake())
    )
    torch.testing.assert_close(pyiqa_metric("anything")(torch.ones(1, 3, 2, 2)), torch.tensor([-1.0]))


def test_onnx(tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = Scored(Ma19(width=4).eval(), Calibration(0.0, 1.0, 1.0, 0, "given"))
    worst = export_onnx(
        model, torch.rand(1, 3, 48, 48), tmp_path / "m.onnx", about={}, tolerance=1e-3, outputs=("scores",)
    )
    assert worst < 1e-3 and (tmp_path / "m.onnx").stat().st_size > 1000
