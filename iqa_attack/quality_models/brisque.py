"""BRISQUE: 36 natural scene statistics and a support vector regression with an RBF kernel (Mittal et al. 2012).

`fit_brisque` trains one, `load_brisque` reads the published formats. Larger = better, always: a model trained on DMOS
is flipped."""

from pathlib import Path

import numpy as np
import scipy.io
import torch
import yaml
from sklearn.svm import SVR
from torch import Tensor, nn

from common.data.files import read_text
from iqa_attack.photographs.images import check_images, luma
from iqa_attack.quality_models.natural_scene_statistics import ShapeGradient, brisque_features, opencv_features

RANGE_HINT = "(36, 2) or (2, 36) numbers: minimum and maximum of every feature"


class Brisque(nn.Module):
    """forward: images (B, 3, H, W) in 0..1 -> quality (B,), larger = better.

    quality = sign * (sum_i c_i exp(-gamma |f - v_i|^2) - rho), f the features scaled to [-1, 1]. The sum is computed in
    float64: its terms are up to a thousand times larger. precision: of the features, double or single; in single precision
    rounding decides how flat areas count (a photograph with a white sky may get -6.0 for -1.6).

    features: "paper", of the paper's code, or "opencv", of OpenCV's quality module, which also rounds the luma (the gradient
    passes straight through). A regression belongs to the features that it was trained on: OpenCV's own score is minus
    this quality, clamped to 0..100. resize: the second scale of the paper's features."""

    minimum = 32
    vectors: Tensor
    coefficients: Tensor
    rho: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self,
        *,
        support: int,
        gamma: float = 0.05,
        sign: int = 1,
        shape_gradient: ShapeGradient = "none",
        resize: str = "torch_aligned",
        precision: str = "double",
        features: str = "paper",
    ):
        super().__init__()
        if features not in ("paper", "opencv"):
            raise ValueError(f"features={features!r}, allowed: paper, opencv")
        if features == "opencv" and resize != "torch_aligned":
            raise ValueError(f"resize={resize!r} belongs to features=paper; OpenCV has one of its own")
        if precision not in ("double", "single"):
            raise ValueError(f"precision={precision!r}, allowed: double, single")
        if sign not in (1, -1):
            raise ValueError(f"sign={sign}, allowed: 1 (larger raw score = better) or -1")
        self.gamma, self.sign, self.shape_gradient, self.resize = gamma, sign, shape_gradient, resize
        self.precision, self.convention = precision, features
        self.register_buffer("vectors", torch.zeros(support, 36, dtype=torch.float64))
        self.register_buffer("coefficients", torch.zeros(support, dtype=torch.float64))
        self.register_buffer("rho", torch.zeros((), dtype=torch.float64))
        self.register_buffer("low", torch.zeros(36, dtype=torch.float64))
        self.register_buffer("high", torch.ones(36, dtype=torch.float64))

    def features(self, x: Tensor) -> Tensor:
        check_images(x, self.minimum, "BRISQUE")
        x = x.double() if self.precision == "double" else x
        if self.convention == "opencv":
            y = luma(x, (0.299, 0.587, 0.114))
            return opencv_features(y + (y.round() - y).detach(), shape_gradient=self.shape_gradient)
        return brisque_features(luma(x), shape_gradient=self.shape_gradient, resize=self.resize)

    def forward(self, x: Tensor) -> Tensor:
        f = 2 * (self.features(x).double() - self.low) / (self.high - self.low) - 1
        distance = ((f[:, None] - self.vectors) ** 2).sum(-1)
        score = (self.coefficients * torch.exp(-self.gamma * distance)).sum(1) - self.rho
        return self.sign * score.to(x.dtype)

    def options(self) -> dict:
        return {
            "support": len(self.vectors), "gamma": self.gamma, "sign": self.sign,  # type: ignore[arg-type]
            "shape_gradient": self.shape_gradient, "resize": self.resize, "precision": self.precision,
            "features": self.convention,
        }  # fmt: skip


def fit_brisque(
    features: Tensor, mos: Tensor, *, c: float = 1024.0, gamma: float = 0.05, epsilon: float = 0.1, **options
) -> Brisque:
    """Train the regression on features (N, 36) of `Brisque.features` and mos (N,), larger = better.

    The target is mos on the scale 0..100, as that of the published model."""
    f = features.double().numpy()
    low, high = f.min(0), f.max(0)
    scaled = 2 * (f - low) / np.maximum(high - low, 1e-12) - 1
    svr = SVR(kernel="rbf", C=c, gamma=gamma, epsilon=epsilon, cache_size=500)  # type: ignore[arg-type]
    svr.fit(scaled, 10 * mos.double().numpy())
    return _filled(svr.support_vectors_, svr.dual_coef_[0], -svr.intercept_[0], low, high, gamma=gamma, **options)


def _filled(vectors, coefficients, rho, low, high, **options) -> Brisque:
    vectors = np.asarray(vectors, dtype=np.float64)
    if vectors.ndim != 2 or vectors.shape[1] != 36:
        raise ValueError(
            f"BRISQUE has 36 features, these support vectors are {vectors.shape}: weights of another model?"
        )
    model = Brisque(support=len(vectors), **options)
    state = {
        "vectors": vectors,
        "coefficients": np.ravel(coefficients),
        "rho": np.float64(rho),
        "low": low,
        "high": high,
    }
    model.load_state_dict({k: torch.as_tensor(np.asarray(v, dtype=np.float64)) for k, v in state.items()})
    return model.eval()


# ----------------------------------------------------------------------------------------------- published formats
def load_brisque(
    path: str | Path, *, range_path: str | Path | None = None, higher_is_better: bool = False, **options
) -> Brisque:
    """A published regression: .npz (support_vectors, alpha, rho, gamma, feature_range), .yml (OpenCV's model and range
    files), .mat (SVs, sv_coef, rho; the range in a second .mat).

    range_path: file of the feature ranges; null looks for `range` in place of `model` in the name (.yml) or scale.mat
    beside. higher_is_better: whether the raw score is; the published models predict DMOS (false), the paper's own is
    flipped (true). features: OpenCV's own for its .yml, else the paper's, unless said. Raises FileNotFoundError or
    ValueError naming the file and what it lacks."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no BRISQUE model {path}")
    readers = {".npz": _read_npz, ".yml": _read_yml, ".yaml": _read_yml, ".mat": _read_mat}
    if path.suffix not in readers:
        raise ValueError(f"{path}: suffix {path.suffix!r}, allowed are {', '.join(readers)}")
    options = {"features": "opencv" if readers[path.suffix] is _read_yml else "paper", **options}
    vectors, coefficients, rho, gamma, ranges = readers[path.suffix](path, range_path)
    ranges = np.asarray(ranges, dtype=np.float64)
    ranges = ranges if ranges.shape == (2, 36) else ranges.T
    if ranges.shape != (2, 36):
        raise ValueError(f"{path}: the feature range is {ranges.T.shape}, expected {RANGE_HINT}")
    return _filled(
        vectors, coefficients, rho, *ranges, gamma=float(gamma), sign=1 if higher_is_better else -1, **options
    )


def _need(path: Path, mapping, *names: str) -> list:
    if missing := [n for n in names if n not in mapping]:
        found = sorted(k for k in mapping if not k.startswith("__"))
        raise ValueError(f"{path} lacks {', '.join(missing)}; it holds {found}: is it a BRISQUE regression?")
    return [mapping[n] for n in names]


def _range_file(path: Path, given, default: Path) -> Path:
    where = Path(given).expanduser() if given else default
    if not where.is_file():
        raise FileNotFoundError(f"no feature range {where} for {path}: name it with range_path, {RANGE_HINT}")
    return where


def _read_npz(path: Path, range_path):
    with np.load(path, allow_pickle=False) as data:
        return _need(path, data, "support_vectors", "alpha", "rho", "gamma", "feature_range")


def _read_mat(path: Path, range_path):
    data = scipy.io.loadmat(path)
    if "model" in data and data["model"].dtype.names:  # libsvm's struct
        struct = data["model"][0, 0]
        data = {name: struct[name] for name in data["model"].dtype.names}
    vectors, coefficients, rho = _need(path, data, "SVs", "sv_coef", "rho")
    vectors = vectors.toarray() if hasattr(vectors, "toarray") else vectors
    where = _range_file(path, range_path, path.with_name("scale.mat"))
    arrays = [v for k, v in scipy.io.loadmat(where).items() if not k.startswith("__") and sorted(v.shape) == [2, 36]]
    if len(arrays) != 1:
        raise ValueError(f"{where} holds no single array of {RANGE_HINT}")
    return vectors, coefficients, np.ravel(rho)[0], 0.05, arrays[0]


class _OpenCV(yaml.SafeLoader):
    """YAML as OpenCV writes it: matrices under a tag of their own."""


def _matrix(loader: _OpenCV, node: yaml.MappingNode) -> np.ndarray:
    m = loader.construct_mapping(node, deep=True)
    return np.asarray(m["data"], dtype=np.float64).reshape(m["rows"], m["cols"])


_OpenCV.add_constructor("tag:yaml.org,2002:opencv-matrix", _matrix)


def _opencv(path: Path) -> dict:
    text = read_text(path).split("\n", 1)  # its first line "%YAML:1.0" is no YAML
    try:
        return yaml.load(text[1] if text[0].startswith("%YAML:") else "\n".join(text), Loader=_OpenCV)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not an OpenCV YAML file: {error}") from error


def _read_yml(path: Path, range_path):
    (svm,) = _need(path, _opencv(path), "opencv_ml_svm")
    vectors, kernel, functions = _need(path, svm, "support_vectors", "kernel", "decision_functions")
    default = path.with_name(path.name.replace("model", "range"))
    (ranges,) = _need(path, _opencv(_range_file(path, range_path, default)), "range")
    return vectors, functions[0]["alpha"], functions[0]["rho"], kernel["gamma"], ranges
