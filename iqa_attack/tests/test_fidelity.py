"""Distances against torchmetrics and scikit-image, their properties, refused weights."""

import numpy as np
import pytest
import torch
import torchmetrics.functional.image as tm
from skimage.metrics import structural_similarity

from iqa_attack.fidelities.deep_fidelity import CHANNELS, DISTS, LPIPS, vgg16_trunk
from iqa_attack.fidelities.distances import build_fr
from iqa_attack.fidelities.fidelity import MSSSIM, SSIM, Chebyshev, grey, ssim, ssim_maps


def pair(size=(48, 57), n=2, noise=0.05, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.avg_pool2d(torch.rand(n, 3, size[0] + 4, size[1] + 4, generator=g), 5, 1)
    return x, (x + noise * torch.randn(x.shape, generator=g)).clamp(0, 1)


def test_ssim_equals_torchmetrics():
    x, y = pair()
    found = ssim(x, y, padding="reflect")
    expected = tm.structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_ssim_in_matlab_convention():
    """Whole windows of the grey image, population covariance; larger images first averaged over f x f blocks."""
    x, y = (t.double() for t in pair())
    for a, b, value in zip(grey(x)[:, 0], grey(y)[:, 0], ssim(grey(x), grey(y)), strict=True):
        whole = structural_similarity(
            a.numpy(),
            b.numpy(),
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )[1]
        assert float(value) == pytest.approx(whole[5:-5, 5:-5].mean(), abs=1e-9)
    x, y = pair((520, 524), n=1)
    pooled = [torch.nn.functional.avg_pool2d(t, 2) for t in (x, y)]
    torch.testing.assert_close(ssim(x, y, downsample=True), ssim(*pooled))
    assert not torch.allclose(ssim(x, y), ssim(*pooled), atol=1e-3)


def test_replicated_borders_keep_the_size_and_the_inside():
    x, y = pair()
    valid, whole = ssim_maps(x, y)[0], ssim_maps(x, y, padding="replicate")[0]
    assert whole.shape == x.shape
    torch.testing.assert_close(whole[..., 5:-5, 5:-5], valid, rtol=1e-4, atol=1e-5)
    corner = y.clone()
    corner[..., 0, 0] = 1 - corner[..., 0, 0]
    border = [float(SSIM(padding=p)(corner, y)[0]) for p in ("valid", "replicate")]
    assert border[1] > 10 * border[0], "with whole windows a corner pixel is nearly free"


def test_ms_ssim_equals_torchmetrics():
    x, y = pair((176, 190))
    g = [grey(t) for t in (x, y)]
    expected = [
        1 - tm.multiscale_structural_similarity_index_measure(a[None], b[None], data_range=1.0)
        for a, b in zip(*g, strict=True)
    ]
    torch.testing.assert_close(MSSSIM(last="reflect")(x, y), torch.stack(expected), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="at least 161 pixels, got 96"):
        MSSSIM()(torch.rand(1, 3, 96, 200), torch.rand(1, 3, 96, 200))


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """Random weights in torchvision's format: what is computed with them must agree with torchmetrics, whatever they are."""
    torch.manual_seed(0)
    trunk = vgg16_trunk().to_empty(device="cpu")
    for layer in [m for m in trunk if isinstance(m, torch.nn.Conv2d)]:
        layer.reset_parameters()
    state = {f"features.{k}": v for k, v in trunk.state_dict().items()}
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({**state, "classifier.0.weight": torch.zeros(2, 2)}, path)
    return path


def test_lpips_equals_torchmetrics_with_the_same_trunk(vgg_file):
    from torchmetrics.functional.image.lpips import _LPIPS

    x, y = pair((64, 70))
    ours = LPIPS(weights_path=vgg_file)
    theirs = _LPIPS(pretrained=True, net="vgg", pnet_rand=True, eval_mode=True)
    slices = [getattr(theirs.net, f"slice{i}") for i in range(1, 6)]
    for index, module in [(int(n), m) for s in slices for n, m in s.named_children()]:
        if index < 30 and hasattr(module, "weight"):
            module.load_state_dict(ours.vgg[index].state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(x, y), theirs(x, y, normalize=True).flatten(), rtol=1e-4, atol=1e-7)


def test_dists_equals_torchmetrics_with_the_same_trunk(vgg_file, monkeypatch):
    import torchvision
    from torchmetrics.functional.image import dists as module

    ours = DISTS(weights_path=vgg_file)
    build = torchvision.models.vgg16

    def without_download(*args, **kwargs):
        model = build(weights=None)
        model.features[:30].load_state_dict(ours.vgg.state_dict())
        return model

    monkeypatch.setattr(torchvision.models, "vgg16", without_download)
    monkeypatch.setattr(module, "vgg16", without_download, raising=False)
    theirs = module.DISTSNetwork()
    x, y = pair((64, 70))
    with torch.no_grad():
        torch.testing.assert_close(ours(x, y), theirs(x, y).flatten(), rtol=1e-3, atol=1e-5)


def test_every_stage_of_dists_carries_gradient(vgg_file):
    """In the released attack only the raw pixels did."""
    x, y = pair((32, 32), n=1)
    distance, sizes = DISTS(weights_path=vgg_file), (3, *CHANNELS)
    assert float(distance.alpha.sum() + distance.beta.sum()) == pytest.approx(1, abs=1e-5)

    def gradient(only=None):
        alone = DISTS(weights_path=vgg_file)
        for weights in (alone.alpha, alone.beta):
            parts = weights.split(sizes)
            for part in [p for i, p in enumerate(parts) if only is not None and i != only]:
                part.zero_()
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(alone(leaf, y).sum(), leaf)[0]

    stages = [gradient(i) for i in range(len(sizes))]
    assert all(float(g.abs().max()) > 0 for g in stages)
    torch.testing.assert_close(sum(stages), gradient(), rtol=1e-3, atol=1e-3 * float(gradient().abs().max()))


@pytest.mark.parametrize("name", ["chebyshev", "ssim", "lpips", "dists"])
def test_distances_are_zero_for_equal_images_positive_and_symmetric(name, vgg_file):
    options = {"weights_path": str(vgg_file)} if name in ("lpips", "dists") else {}
    distance = build_fr(kind=name, **options)
    x, y = pair((40, 44))
    with torch.no_grad():
        assert distance(x, x).abs().max() < 1e-5 and float(distance(x, y).min()) > 0
        torch.testing.assert_close(distance(x, y), distance(y, x), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(distance(x[:1], y[:1]), distance(x, y)[:1], rtol=1e-4, atol=1e-6)


def test_chebyshev_is_the_largest_change_of_any_value():
    x = torch.full((2, 3, 4, 4), 0.5)
    y = x.clone()
    y[0, 1, 2, 3] -= 3 / 255
    y[1] += 1 / 255
    torch.testing.assert_close(Chebyshev()(y, x) * 255, torch.tensor([3.0, 1.0]), rtol=1e-4, atol=1e-4)


def test_lpips_and_dists_are_refused_without_the_weights(tmp_path, vgg_file):
    for name in ("lpips", "dists"):
        with pytest.raises(
            ValueError, match=r"need the ImageNet weights of VGG-16: fr.weights_path=.*random features are refused"
        ):
            build_fr(kind=name, weights_path=None)
    half = {name: value.half() for name, value in torch.load(vgg_file, weights_only=True).items()}
    torch.save(half, tmp_path / "half.pth")
    assert next(build_fr(kind="lpips", weights_path=str(tmp_path / "half.pth")).parameters()).dtype == torch.float32
    torch.save({"features.0.weight": torch.zeros(2), "epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no weights of torchvision's vgg16"):
        build_fr(kind="lpips", weights_path=str(tmp_path / "other.pth"))
    with pytest.raises(ValueError, match="fr.kind='psnr', allowed: chebyshev, ssim, ms_ssim, lpips, dists"):
        build_fr(kind="psnr")


def test_bad_options_and_sizes():
    with pytest.raises(ValueError, match="color='yuv', allowed: grey, rgb"):
        SSIM(color="yuv")
    with pytest.raises(ValueError, match="padding='same'"):
        SSIM(padding="same")(*pair())
    with pytest.raises(ValueError, match="at least 11 x 11"):
        SSIM()(torch.rand(1, 3, 8, 20), torch.rand(1, 3, 8, 20))
    rgb, mono = (float(SSIM(color=c)(*pair(n=1))) for c in ("rgb", "grey"))
    assert abs(rgb - mono) > 1e-3 and np.isfinite([rgb, mono]).all()
