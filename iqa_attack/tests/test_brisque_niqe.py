"""The regressions in the published formats, orientation, bad input."""

import numpy as np
import pytest
import scipy.io
import skimage.data
import torch
from scipy.stats import spearmanr

from iqa_attack.quality_models.brisque import Brisque, load_brisque
from iqa_attack.quality_models.natural_scene_statistics import mscn
from iqa_attack.quality_models.niqe import Niqe, fit_niqe, load_niqe


def regression(seed=0, n=5):
    rng = np.random.default_rng(seed)
    low, high = -rng.random(36), 1 + rng.random(36)
    return {
        "vectors": rng.uniform(-1, 1, (n, 36)),
        "coef": rng.normal(size=n) * 10,
        "rho": -3.5,
        "gamma": 0.05,
        "range": np.stack([low, high]),
    }


def write(r, folder, kind):
    if kind == "npz":
        path = folder / "svr.npz"
        np.savez(
            path,
            support_vectors=r["vectors"],
            alpha=r["coef"],
            rho=r["rho"],
            gamma=r["gamma"],
            feature_range=r["range"],
        )
    elif kind == "yml":
        path = folder / "my_model.yml"
        rows = "".join("      - [ " + ", ".join(f"{v:.17e}" for v in row) + " ]\n" for row in r["vectors"])
        path.write_text(
            "%YAML:1.0\n---\nopencv_ml_svm:\n   format: 3\n   svmType: EPS_SVR\n   kernel:\n      type: RBF\n"
            f"      gamma: {r['gamma']}\n   C: 1024.\n   var_count: 36\n   support_vectors:\n{rows}"
            "   decision_functions:\n      -\n"
            f"         sv_count: 5\n         rho: {r['rho']}\n         alpha: [ {', '.join(f'{v:.17e}' for v in r['coef'])} ]\n"
        )
        data = ", ".join(f"{v:.17e}" for v in r["range"].ravel())
        (folder / "my_range.yml").write_text(
            f"%YAML:1.0\n---\nrange: !!opencv-matrix\n   rows: 2\n   cols: 36\n   dt: f\n   data: [ {data} ]\n"
        )
    else:
        path = folder / "svm_model.mat"
        scipy.io.savemat(path, {"SVs": r["vectors"], "sv_coef": r["coef"][:, None], "rho": r["rho"]})
        scipy.io.savemat(folder / "scale.mat", {"feature_scale": r["range"].T})
    return path


@pytest.mark.parametrize("kind", ["npz", "yml", "mat"])
def test_published_formats_give_the_formula(kind, tmp_path, images):
    r = regression()
    model = load_brisque(write(r, tmp_path, kind))
    f = model.features(images).double().numpy()
    scaled = 2 * (f - r["range"][0]) / (r["range"][1] - r["range"][0]) - 1
    raw = np.array(
        [
            sum(c * np.exp(-0.05 * np.sum((row - v) ** 2)) for c, v in zip(r["coef"], r["vectors"], strict=True))
            for row in scaled
        ]
    )
    np.testing.assert_allclose(model(images), -(raw - r["rho"]), rtol=1e-4)
    turned = load_brisque(tmp_path / write(r, tmp_path, kind).name, higher_is_better=True)
    torch.testing.assert_close(turned(images), -model(images))


# QualityBRISQUE_computeFeatures of OpenCV 5.0.0 (opencv_contrib, module quality) of scikit-image's chelsea()[40:200, 100:300].
OPENCV = [
    2.433, 0.3742347, 0.761, 0.0570879, 0.1214055, 0.1899476, 0.766, 0.0382126, 0.1337073, 0.1798039, 0.75, -0.0295052,
    0.1750934, 0.1391659, 0.77, -0.0409118, 0.1753924, 0.1270283, 2.659, 0.4309445, 0.794, -0.0081073, 0.2040615, 0.1931525,
    0.78, -0.0386258, 0.2379248, 0.1841455, 0.77, -0.0061924, 0.2029888, 0.194569, 0.796, -0.0487303, 0.2226596, 0.1586855,
]  # fmt: skip


def test_opencvs_parameters_meet_opencvs_features(tmp_path):
    photo = torch.from_numpy(skimage.data.chelsea()[40:200, 100:300].copy()).permute(2, 0, 1)[None] / 255
    found = Brisque(support=1, features="opencv").features(photo)[0]
    torch.testing.assert_close(found, torch.tensor(OPENCV, dtype=torch.float64), rtol=0, atol=2e-6)
    r = regression()
    models = {kind: load_brisque(write(r, tmp_path, kind)) for kind in ("yml", "npz", "mat")}
    for kind, model in models.items():
        assert torch.equal(model.features(photo)[0], found) == (kind == "yml")
    asked = load_brisque(tmp_path / "svr.npz", features="opencv")
    assert torch.equal(asked(photo), models["yml"](photo)) and asked.options()["features"] == "opencv"
    with pytest.raises(ValueError, match="resize='antialias' belongs to features=paper"):
        Brisque(support=1, features="opencv", resize="antialias")
    with pytest.raises(ValueError, match="features='cv', allowed: paper, opencv"):
        Brisque(support=1, features="cv")
    leaf = photo.clone().requires_grad_()
    asked(leaf).sum().backward()
    assert float(leaf.grad.abs().max()) > 0  # rounding the luma lets the gradient through


def test_a_flat_area_is_on_neither_side_in_opencvs_features():
    m = torch.zeros(1, 1, 40, 40, dtype=torch.float64)
    m[..., 20:] = torch.rand(40, 20, generator=torch.Generator().manual_seed(0)).double() * 255
    flat = mscn(m, padding="replicate", flat=0.0)[..., :16]
    assert float(flat.abs().max()) == 0 and float(mscn(m, padding="replicate")[..., :16].min()) > 0


def test_files_of_another_model_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="no BRISQUE model"):
        load_brisque(tmp_path / "none.npz")
    np.savez(tmp_path / "niqe.npz", mu_pris_param=np.zeros((1, 36)), cov_pris_param=np.eye(36))
    with pytest.raises(ValueError, match=r"lacks support_vectors.*it holds \['cov_pris_param', 'mu_pris_param'\]"):
        load_brisque(tmp_path / "niqe.npz")
    r = regression() | {"vectors": np.zeros((5, 18))}
    with pytest.raises(ValueError, match=r"36 features, these support vectors are \(5, 18\)"):
        load_brisque(write(r, tmp_path, "npz"))
    with pytest.raises(ValueError, match=r"suffix '.pt', allowed are .npz"):
        (tmp_path / "a.pt").write_text("")
        load_brisque(tmp_path / "a.pt")
    scipy.io.savemat(tmp_path / "alone.mat", {"SVs": np.zeros((2, 36)), "sv_coef": np.zeros((2, 1)), "rho": 0.0})
    with pytest.raises(FileNotFoundError, match="no feature range"):
        load_brisque(tmp_path / "alone.mat", range_path=tmp_path / "elsewhere.mat")


def test_a_trained_regression_orders_distorted_photographs(brisque, photos):
    with torch.no_grad():
        s = brisque(photos["test"].stack())
    assert spearmanr(s, photos["test"].mos)[0] > 0.5
    single = torch.cat([brisque(x[None]) for x in photos["test"].stack()[:5]])
    torch.testing.assert_close(single, s[:5], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (torch.full((1, 3, 64, 64), 0.5), "image 0 of the batch is constant: BRISQUE"),
        (torch.rand(1, 3, 20, 64), "at least 32 x 32 pixels, got 20 x 64"),
        (torch.rand(1, 1, 64, 64), r"takes RGB images \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "torch.uint8"),
    ],
)
def test_bad_images_are_named(x, error):
    with pytest.raises(ValueError, match=error):
        Brisque(support=1)(x)


def test_odd_sides_and_saturated_areas_have_finite_gradients(brisque):
    x = torch.rand(1, 3, 65, 97)
    x[:, :, :30] = 1.0
    x = x.requires_grad_()
    brisque(x).sum().backward()
    assert bool(x.grad.isfinite().all()) and float(x.grad.abs().sum()) > 0


def pristine(n=6):
    rng = np.random.default_rng(3)
    base = torch.from_numpy(rng.random((n, 3, 96, 144)).astype(np.float32))
    return [torch.nn.functional.avg_pool2d(x[None], 3, 1, 1)[0] for x in base]


@pytest.fixture(scope="module")
def niqe():
    return fit_niqe(pristine(), patch=24)


def test_niqe_is_the_distance_of_patch_statistics(niqe):
    """In NumPy from the features: sqrt(d^T pinv((C1 + C2)/2) d), negated."""
    x = pristine()[0][None]
    f = niqe.features(x)[0][0].double().numpy()
    d = f.mean(0) - niqe.mean.numpy()
    inverse = np.linalg.pinv((np.cov(f.T) + niqe.covariance.numpy()) / 2)
    assert float(niqe(x)) == pytest.approx(-np.sqrt(d @ inverse @ d), rel=1e-5)


def test_niqe_prefers_what_looks_like_its_pristine_set_and_has_a_gradient(niqe):
    x = pristine()[1][None]
    noisy = (x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert float(niqe(x)) > float(niqe(noisy)) + 1
    leaf = x.clone().requires_grad_()
    niqe(leaf).sum().backward()
    assert bool(leaf.grad.isfinite().all()) and float(leaf.grad.abs().max()) > 0


def test_niqe_patches_are_cut_row_by_row(niqe):
    x = pristine()[2][None]
    shifted = torch.cat(
        [x[..., 24:], x[..., :24]], dim=-1
    )  # the luma of whole patches moves, borders of their neighbours change little
    a, b = niqe.features(x)[1].view(4, 6), niqe.features(shifted)[1].view(4, 6)
    torch.testing.assert_close(a[:, 2:5], b[:, 1:4], rtol=1e-3, atol=1e-2)


def test_niqe_files_and_errors(niqe, tmp_path):
    arrays = {"mu": niqe.mean.numpy()[None], "cov": niqe.covariance.numpy()}
    np.savez(
        tmp_path / "p.npz", mu_pris_param=arrays["mu"], cov_pris_param=arrays["cov"], gaussian_window=np.ones((7, 7))
    )
    scipy.io.savemat(tmp_path / "p.mat", {"mu_prisparam": arrays["mu"], "cov_prisparam": arrays["cov"]})
    x = pristine()[0][None]
    for name in ("p.npz", "p.mat"):
        torch.testing.assert_close(load_niqe(tmp_path / name, patch=24)(x), niqe(x))
    np.savez(tmp_path / "other.npz", rho=np.zeros(3))
    with pytest.raises(ValueError, match="is no NIQE model"):
        load_niqe(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="two whole patches of 96 pixels"):
        Niqe()(torch.rand(1, 3, 100, 150))
    with pytest.raises(ValueError, match="at least 40 are needed"):
        fit_niqe(pristine(1), patch=24)
