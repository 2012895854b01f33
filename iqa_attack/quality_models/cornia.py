"""CORNIA: soft-assignment coding of raw patches with a codebook, max pooling, linear regression (Ye et al. 2012)."""

from pathlib import Path
from typing import Literal

import numpy as np
import scipy.io
import torch
from sklearn.cluster import MiniBatchKMeans
from sklearn.svm import LinearSVR
from torch import Tensor, nn

from common.data.batches import stream
from iqa_attack.photographs.images import check_images, luma

SIDE = 7


class Cornia(nn.Module):
    """forward: images (B, 3, H, W) in 0..1 -> quality (B,), larger = better.

    patches: "all" 7 x 7 patches of an image, or so many at random places. `seed` fixes the places; with `draws` > 1
    the score is the mean over so many sets of places (the authors' code: 4000 patches, 10 draws). `redraw()` moves to
    other places. order: pixels of a patch in rows, or in columns as MATLAB's codebooks have them."""

    minimum = 8
    codebook: Tensor
    mean: Tensor
    whiten: Tensor
    scale: Tensor
    offset: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(
        self, *, words: int, patches: int | Literal["all"] = "all", draws: int = 1, seed: int = 0, sign: int = 1,
        order: str = "rows",
    ):  # fmt: skip
        super().__init__()
        if (patches != "all" and not (isinstance(patches, int) and patches > 0)) or draws < 1:
            raise ValueError(f"patches={patches!r}, draws={draws}, allowed: 'all' or a number > 0, draws >= 1")
        if order not in ("rows", "columns") or sign not in (1, -1):
            raise ValueError(f"order={order!r}, sign={sign}, allowed: rows or columns, 1 or -1")
        self.patches, self.draws, self.seed, self.sign, self.order = patches, draws, seed, sign, order
        self.round = 0
        self.register_buffer("codebook", torch.zeros(words, SIDE * SIDE))  # rows of unit length
        self.register_buffer("mean", torch.zeros(SIDE * SIDE))
        self.register_buffer("whiten", torch.eye(SIDE * SIDE))
        self.register_buffer("scale", torch.ones(2 * words))  # of every feature, with an offset
        self.register_buffer("offset", torch.zeros(2 * words))
        self.register_buffer("weight", torch.zeros(2 * words))
        self.register_buffer("bias", torch.zeros(()))

    def redraw(self) -> None:
        """Other places from now on (the authors' code draws new ones in every iteration of an attack)."""
        self.round += 1

    def extract(self, x: Tensor, draw: int = 0) -> Tensor:
        """(B, P, 49) patches of the grey image in 0..255."""
        grey = luma(x)
        if self.order == "columns":
            grey = grey.transpose(2, 3)
        if self.patches == "all":
            return nn.functional.unfold(grey, SIDE).transpose(1, 2)
        h, w = grey.shape[2] - SIDE + 1, grey.shape[3] - SIDE + 1
        generator = torch.Generator().manual_seed(stream(self.seed, self.round, draw))
        n = int(self.patches)
        y = torch.randint(0, h, (n,), generator=generator)
        z = torch.randint(0, w, (n,), generator=generator)
        inside = (torch.arange(SIDE)[:, None] * grey.shape[3] + torch.arange(SIDE)).flatten()
        index = ((y * grey.shape[3] + z)[:, None] + inside).flatten().to(x.device)
        return grey.flatten(1).index_select(1, index).view(len(x), n, SIDE * SIDE)

    def encode(self, patches: Tensor) -> Tensor:
        """(B, P, 49) -> (B, 2K): the largest positive and the largest negative response of every word."""
        z = (normalise(patches) - self.mean) @ (self.whiten @ self.codebook.T)
        return torch.cat([z.amax(1).relu(), (-z).amax(1).relu()], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.minimum, "CORNIA")
        code = torch.stack([self.encode(self.extract(x, d)) * self.scale + self.offset for d in range(self.draws)])
        return self.sign * (code @ self.weight + self.bias).mean(0)

    def options(self) -> dict:
        return {
            "words": len(self.codebook), "patches": self.patches, "draws": self.draws, "seed": self.seed, "sign": self.sign,  # type: ignore[arg-type]
            "order": self.order,
        }  # fmt: skip


def normalise(patches: Tensor) -> Tensor:
    """(p - mean) / sqrt(var + 10) of every patch (..., 49), the variance unbiased: gain is removed except for the +
    10."""
    centred = patches - patches.mean(-1, keepdim=True)
    return centred / (centred.pow(2).sum(-1, keepdim=True) / (patches.shape[-1] - 1) + 10).sqrt()


def learn_codebook(patches: Tensor, *, words: int, seed: int) -> dict[str, Tensor]:
    """ZCA whitening (eigenvalues + 0.1) and a k-means codebook of normalised patches (N, 49)."""
    p = normalise(patches.double())
    mean = p.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(p.T))
    whiten = vectors @ torch.diag((values + 0.1).rsqrt()) @ vectors.T
    white = ((p - mean) @ whiten).numpy()
    kmeans = MiniBatchKMeans(words, random_state=seed, n_init=1, batch_size=2048, max_iter=30)  # type: ignore[arg-type]
    found = kmeans.fit(white).cluster_centers_
    codebook = torch.nn.functional.normalize(torch.from_numpy(found), dim=1)
    return {"codebook": codebook, "mean": mean, "whiten": whiten}


@torch.no_grad()
def fit_cornia(
    images: Tensor, mos: Tensor, *, words: int, seed: int, c: float = 0.01, codebook_patches: int = 20000, **options
) -> Cornia:
    """Codebook and linear support vector regression on images (N, 3, H, W) and mos (N,) in 0..10, larger = better."""
    model = Cornia(words=words, seed=seed, **options)
    generator = torch.Generator().manual_seed(stream(seed, 1))
    some = images[torch.randperm(len(images), generator=generator)[:400]]
    per_image = max(1, codebook_patches // len(some))
    patches = Cornia(words=1, patches=per_image, seed=seed + 1, order=model.order).extract(some).flatten(0, 1)
    learned = learn_codebook(patches, words=words, seed=seed)
    model.load_state_dict({**model.state_dict(), **{k: v.float() for k, v in learned.items()}})
    codes = torch.cat([model.encode(model.extract(part)) for part in images.split(50)])
    low, high = codes.amin(0), codes.amax(0)
    model.scale.copy_(2 / (high - low).clamp(min=1e-6))
    model.offset.copy_(-low * model.scale - 1)
    scaled = (codes * model.scale + model.offset).double().numpy()
    options = {"loss": "squared_epsilon_insensitive", "dual": False, "max_iter": 10000, "random_state": seed}
    svr = LinearSVR(C=c, epsilon=0.0, **options)  # type: ignore[arg-type]
    svr.fit(scaled, mos.double().numpy())
    model.weight.copy_(torch.from_numpy(svr.coef_))
    model.bias.fill_(float(np.ravel(svr.intercept_)[0]))
    return model.eval()


def load_cornia(folder: str | Path, *, patches: int | Literal["all"] = 4000, draws: int = 10, seed: int = 0) -> Cornia:
    """The authors' four .mat files in a folder: codebook0; M and P; soft_scale_param; SVs, sv_coef and rho.

    soft_scale_param (2K, 2): a slope and an offset for every feature. Variables are found by name in whichever file has
    them. The raw score is a DMOS on 0..114.4147 (flipped), the order of pixels MATLAB's. Raises FileNotFoundError or
    ValueError naming what is missing."""
    where = Path(folder).expanduser()
    files = sorted(where.glob("*.mat"))
    if not files:
        raise FileNotFoundError(
            f"no .mat file in {where}: expected the codebook, whitening, scale and regression of CORNIA"
        )
    found = {}
    for file in files:
        found |= {k: v for k, v in scipy.io.loadmat(file).items() if not k.startswith("__")}
    if missing := [k for k in ("codebook0", "M", "P", "soft_scale_param", "SVs", "sv_coef", "rho") if k not in found]:
        raise ValueError(f"{where} lacks {', '.join(missing)}; its .mat files hold {sorted(found)}")
    book = np.asarray(found["codebook0"], dtype=np.float64)
    book = book.T if book.shape[0] == SIDE * SIDE else book
    words = len(book)
    vectors = found["SVs"].toarray() if hasattr(found["SVs"], "toarray") else np.asarray(found["SVs"])
    affine = np.asarray(found["soft_scale_param"], dtype=np.float64)
    affine = affine if affine.shape[1] == 2 else affine.T
    if book.shape[1] != SIDE * SIDE or vectors.shape[1] != 2 * words or affine.shape != (2 * words, 2):
        raise ValueError(
            f"{where}: a codebook of {book.shape}, support vectors of {vectors.shape} and scales of {affine.shape} do not "
            f"belong together; expected (K, 49), (n, 2K), (2K, 2)"
        )
    model = Cornia(words=words, patches=patches, draws=draws, seed=seed, sign=-1, order="columns")
    weight = np.ravel(found["sv_coef"]) @ vectors
    state = {
        "codebook": book / np.linalg.norm(book, axis=1, keepdims=True), "mean": np.ravel(found["M"]),
        "whiten": np.asarray(found["P"], dtype=np.float64), "scale": affine[:, 0], "offset": affine[:, 1], "weight": weight,
        "bias": np.float64(-np.ravel(found["rho"])[0] - 114.4147),  # so that sign * score = 114.4147 - DMOS
    }  # fmt: skip
    model.load_state_dict({k: torch.as_tensor(np.asarray(v), dtype=torch.float32) for k, v in state.items()})
    return model.eval()
