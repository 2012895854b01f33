"""Patches, encoding, regression, the authors' files."""

import numpy as np
import pytest
import scipy.io
import torch
from scipy.stats import spearmanr

from iqa_attack.photographs.images import luma
from iqa_attack.quality_models.cornia import Cornia, learn_codebook, load_cornia, normalise


def test_patches_are_those_of_the_image(images):
    model = Cornia(words=1)
    patches = model.extract(images)
    grey = luma(images)
    assert patches.shape == (4, 90 * 90, 49)
    torch.testing.assert_close(patches[1, 90 * 5 + 7].view(7, 7), grey[1, 0, 5:12, 7:14])
    some = Cornia(words=1, patches=50, seed=3).extract(images)
    for row in some[2, :5]:
        assert bool((patches[2] == row).all(1).any()), "a random patch is a patch of the image"
    columns = Cornia(words=1, order="columns").extract(images)
    assert bool((columns[0] == grey[0, 0, 5:12, 7:14].T.flatten()).all(1).any())


def test_places_are_fixed_until_redrawn(images):
    model = Cornia(words=1, patches=20, seed=1)
    first = model.extract(images)
    torch.testing.assert_close(model.extract(images), first, rtol=0, atol=0)
    model.redraw()
    assert not torch.equal(model.extract(images), first)


def test_normalisation_removes_offset_and_gain_but_for_the_ten():
    p = torch.rand(5, 49, dtype=torch.float64) * 200
    torch.testing.assert_close(normalise(p + 30), normalise(p))
    var = p.var(-1, keepdim=True)
    torch.testing.assert_close(normalise(p), (p - p.mean(-1, keepdim=True)) / (var + 10).sqrt())
    torch.testing.assert_close(normalise(1000 * p), normalise(2000 * p), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(normalise(p / 50), normalise(p / 25), rtol=1e-3)


def test_encoding_is_a_maximum_of_both_signs(cornia):
    p = torch.rand(2, 30, 49) * 255
    code = cornia.encode(p)
    words = len(cornia.codebook)
    assert code.shape == (2, 2 * words) and float(code.min()) >= 0
    torch.testing.assert_close(cornia.encode(p[:, torch.randperm(30)]), code)
    z = (normalise(p[0]) - cornia.mean) @ cornia.whiten @ cornia.codebook.T
    expected = torch.cat([z.clamp(min=0).amax(0), (-z).clamp(min=0).amax(0)])
    torch.testing.assert_close(code[0], expected, rtol=1e-4, atol=1e-5)
    plain = Cornia(words=words)
    plain.load_state_dict({**cornia.state_dict(), "mean": torch.zeros(49)})
    a, b = plain.encode(p), plain.encode(255 - p)  # the normalised patch changes sign
    torch.testing.assert_close(a.roll(words, 1), b, rtol=1e-3, atol=1e-4)


def test_whitening_and_codebook():
    p = torch.rand(4000, 49, generator=torch.Generator().manual_seed(0)).cumsum(1) * 10
    learned = learn_codebook(p, words=8, seed=0)
    white = (normalise(p.double()) - learned["mean"]) @ learned["whiten"]
    values = torch.linalg.eigvalsh(torch.cov(normalise(p.double()).T))
    torch.testing.assert_close(torch.linalg.eigvalsh(torch.cov(white.T)), values / (values + 0.1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(learned["whiten"], learned["whiten"].T)
    torch.testing.assert_close(learned["codebook"].norm(dim=1), torch.ones(8, dtype=torch.float64))


def test_a_trained_model_orders_its_training_images_and_has_a_gradient(cornia, photos):
    x = photos["train"].stack()
    with torch.no_grad():
        assert spearmanr(cornia(x[:100]), photos["train"].mos[:100])[0] > 0.3
    leaf = x[:2].clone().requires_grad_()
    cornia(leaf).sum().backward()
    touched = (leaf.grad.abs().sum(1) > 0).float().mean()
    assert 0 < float(touched) < 1, "only the patches that hold a maximum get a gradient"


def files(folder, words=3, seed=0):
    rng = np.random.default_rng(seed)
    data = {
        "codebook.mat": {"codebook0": rng.normal(size=(49, words))},
        "white.mat": {"M": rng.normal(size=(1, 49)), "P": np.eye(49)},
        "scale.mat": {"soft_scale_param": np.stack([0.5 + rng.random(2 * words), rng.normal(size=2 * words)], axis=1)},
        "svr.mat": {"SVs": rng.normal(size=(4, 2 * words)), "sv_coef": rng.normal(size=(4, 1)), "rho": 0.7},
    }
    for name, content in data.items():
        scipy.io.savemat(folder / name, content)
    return {k: v for content in data.values() for k, v in content.items()}


def test_the_authors_files(tmp_path, images):
    d = files(tmp_path)
    model = load_cornia(tmp_path, patches=40, draws=2)
    book = d["codebook0"] / np.linalg.norm(d["codebook0"], axis=0)
    expected = []
    for draw in range(2):
        p = normalise(model.extract(images, draw).double()).numpy()
        z = (p - d["M"]) @ book
        code = np.concatenate([np.maximum(z, 0).max(1), np.maximum(-z, 0).max(1)], axis=1)
        slope, offset = d["soft_scale_param"].T
        scaled = np.stack([[s * c + o for s, c, o in zip(slope, row, offset, strict=True)] for row in code])
        dmos = scaled @ d["SVs"].T @ d["sv_coef"][:, 0] - d["rho"]
        expected.append(114.4147 - dmos)
    np.testing.assert_allclose(model(images), np.mean(expected, 0), rtol=1e-4)


def test_a_score_of_the_authors_files_by_hand(tmp_path):
    """One word, one image without contrast but for its first pixel: the affine map, the regression and the flip in numbers."""
    word = np.zeros(49)
    word[0] = 2.0  # of length 1 after normalisation
    scipy.io.savemat(tmp_path / "a.mat", {"codebook0": word[:, None], "M": np.zeros((1, 49)), "P": np.eye(49)})
    scipy.io.savemat(tmp_path / "b.mat", {"soft_scale_param": np.array([[3.0, -1.0], [5.0, 7.0]])})
    scipy.io.savemat(tmp_path / "c.mat", {"SVs": np.array([[1.0, 10.0]]), "sv_coef": np.array([[2.0]]), "rho": 4.0})
    x = torch.zeros(1, 3, 8, 8)
    x[:, :, 0, 0] = (
        49 / 255
    )  # a pixel of one of the four patches, of luma 49 * (0.2989 + 0.587 + 0.114); the others are flat
    pixel = 49 * 0.9999
    mean = pixel / 49
    deviation = (((pixel - mean) ** 2 + 48 * mean**2) / 48 + 10) ** 0.5
    positive = (pixel - mean) / deviation  # the word is the first pixel; nothing answers to its opposite
    dmos = 2 * ((3 * positive - 1) * 1 + (5 * 0 + 7) * 10) - 4
    found = float(load_cornia(tmp_path, patches="all", draws=1).double()(x.double()))
    assert found == pytest.approx(114.4147 - dmos, rel=1e-5)


def test_bad_files_and_options(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.mat file"):
        load_cornia(tmp_path)
    files(tmp_path)
    scipy.io.savemat(tmp_path / "svr.mat", {"SVs": np.zeros((4, 5)), "sv_coef": np.zeros((4, 1)), "rho": 0.0})
    with pytest.raises(ValueError, match="do not belong together"):
        load_cornia(tmp_path)
    (tmp_path / "svr.mat").unlink()
    with pytest.raises(ValueError, match="lacks SVs, sv_coef, rho"):
        load_cornia(tmp_path)
    with pytest.raises(ValueError, match="patches=0"):
        Cornia(words=3, patches=0)
    with pytest.raises(ValueError, match="constant: CORNIA"):
        Cornia(words=3)(torch.zeros(1, 3, 32, 32))
