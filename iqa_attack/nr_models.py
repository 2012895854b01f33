"""The quality models by name: built, saved, loaded from the authors' files, and mapped to 0..10.

Everything downstream sees a `Scored` model: images (B, 3, H, W) in 0..1 -> scores (B,) in 0..10, larger = better.
"""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import runs
from iqa_attack.brisque import Brisque, load_brisque
from iqa_attack.cornia import Cornia, load_cornia
from iqa_attack.ma19 import Ma19
from iqa_attack.niqe import Niqe, load_niqe
from iqa_attack.quality_metrics import logistic
from iqa_attack.unique import Unique

KINDS: dict[str, type[nn.Module]] = {"brisque": Brisque, "cornia": Cornia, "ma19": Ma19, "unique": Unique, "niqe": Niqe}
# (b3, b4) of the authors' models on LIVE; their script gives Ma19 those of CORNIA and UNIQUE those of Ma19
OFFICIAL_LOGISTIC = {
    "brisque": (57.4975833, 24.1426074), "cornia": (58.3700969, 23.8076639), "ma19": (2.6943240, 0.9155527),
    "unique": (-0.4135264, 1.6893845),
}  # fmt: skip


class Scored(nn.Module):
    """q(f(x)): a model and its logistic map to 0..10."""

    def __init__(self, model: nn.Module, b3: float, b4: float):
        super().__init__()
        self.model, self.b3, self.b4 = model, b3, b4

    def forward(self, x: Tensor) -> Tensor:
        return logistic(self.model(x), self.b3, self.b4)

    @property
    def minimum(self) -> int:
        """The smallest side that the model takes."""
        return self.model.patch if isinstance(self.model, Niqe) else getattr(self.model, "minimum", 1)


def build_nr(kind: str, **options) -> nn.Module:
    """An untrained model by name. ValueError for an unknown one."""
    if kind not in KINDS:
        raise ValueError(f"no quality model {kind!r}, allowed: {', '.join(KINDS)}")
    return KINDS[kind](**options)


def pack(kind: str, scored: Scored) -> dict[str, Any]:
    """A trained model as tensors and plain types."""
    options = scored.model.options()  # type: ignore[operator]
    return {
        "kind": kind, "options": options, "state": scored.model.state_dict(), "logistic": [scored.b3, scored.b4],
    }  # fmt: skip


def unpack(packed: Mapping[str, Any]) -> Scored:
    """The model that `pack` wrote, in evaluation mode, without gradients of its weights."""
    model = build_nr(packed["kind"], **packed["options"])
    model.load_state_dict(packed["state"])
    return Scored(model, *packed["logistic"]).eval().requires_grad_(False)


def load_trained(path: str | Path) -> dict[str, Scored]:
    """Every model of a checkpoint of train.py. ValueError for a file that it did not write or that is unfinished."""
    state = runs.load_checkpoint(path)
    if "trained" not in state:
        raise ValueError(f"{path} is no checkpoint of iqa_attack/train.py; it holds {', '.join(sorted(state))}")
    if not state.get("complete"):
        raise ValueError(f"{path}: the training is unfinished; start train.py again, it resumes")
    return {name: unpack(packed) for name, packed in state["trained"].items()}


# -------------------------------------------------------------------------------------------------------- authors'
# files
def load_official(
    kind: str, path: str | Path, *, b3: float | None = None, b4: float | None = None, **options
) -> Scored:
    """A model from its authors' file(s), with their logistic constants unless given.

    brisque: .mat, .npz, .yml; cornia: a folder of .mat; ma19, unique: a torch checkpoint; niqe: .npz, .mat (b3 and b4
    needed)."""
    if kind == "brisque":
        model: nn.Module = load_brisque(path, **options)
    elif kind == "cornia":
        model = load_cornia(path, **options)
    elif kind == "niqe":
        model = load_niqe(path, **options)
    elif kind in ("ma19", "unique"):
        model = _load_network(kind, path, options)
    else:
        raise ValueError(f"no quality model {kind!r}, allowed: {', '.join(KINDS)}")
    default = OFFICIAL_LOGISTIC.get(kind)
    if (b3 is None or b4 is None) and default is None:
        raise ValueError(f"{kind} has no published logistic: give b3 and b4 (fit_logistic on images of known quality)")
    return Scored(model, *(default if b3 is None or b4 is None else (b3, b4))).eval().requires_grad_(False)  # type: ignore[misc]


def _load_network(kind: str, path: str | Path, options: dict) -> nn.Module:
    """Weights by name where the names agree, else in order of the file where all shapes agree."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no {kind} checkpoint {path}")
    # Ma19's file also holds NumPy scalars (its test results): plain numbers, named here, nothing else is unpickled.
    scalar = importlib.import_module("numpy._core.multiarray").scalar
    kinds = [np.dtype, *{type(np.dtype(t)) for t in ("f4", "f8", "i4", "i8")}]
    with torch.serialization.safe_globals([scalar, (scalar, "numpy.core.multiarray.scalar"), *kinds]):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise runs.RunError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    state = state.get("state_dict", state)
    prefix = {"ma19": "cnn.", "unique": "module."}[kind]
    state = {k.removeprefix(prefix): v for k, v in state.items() if isinstance(v, Tensor)}
    if kind == "unique":
        state = {k: v for k, v in state.items() if not k.startswith("backbone.fc.")}  # in the file, never used
    model = build_nr(kind, **options)
    own = model.state_dict()
    if own.keys() != state.keys():
        shapes, found = [tuple(v.shape) for v in own.values()], [tuple(v.shape) for v in state.values()]
        state = dict(zip(own, _reordered(kind, state) if shapes != found else state.values(), strict=False))
    wrong = [f"{k}: {tuple(state[k].shape) if k in state else 'missing'}, expected {tuple(own[k].shape)}"
             for k in own if k not in state or state[k].shape != own[k].shape]  # fmt: skip
    if wrong:
        raise ValueError(f"{path} holds no weights of {kind}: {'; '.join(wrong[:3])}")
    model.load_state_dict(state)
    return model


def _reordered(kind: str, state: dict[str, Tensor]) -> list[Tensor]:
    """A file in the order of the layers (conv, norm, conv, ...) -> the order of our modules (all convs, all norms,
    the head)."""
    tensors = list(state.values())
    if kind != "ma19" or len(tensors) != 20:
        return tensors
    blocks = [tensors[4 * i : 4 * i + 4] for i in range(4)]
    convs = [t for block in blocks for t in block if t.ndim == 4 or (t.ndim == 1 and t is _bias(block))]
    norms = []
    for block in blocks:
        gamma = next(t for t in block if t.ndim == 2)
        beta = next(t for t in block if t.ndim == 1 and t is not _bias(block))
        norms += [gamma, beta]
    return [*convs, *norms, *tensors[16:]]


def _bias(block: list[Tensor]) -> Tensor:
    """The bias of the convolution: the vector that follows the kernel."""
    return block[next(i for i, t in enumerate(block) if t.ndim == 4) + 1]


# -------------------------------------------------------------------------------------------------------- any other
# model
class CallableMetric(nn.Module):
    """Any callable images (B, 3, H, W) in 0..1 -> scores (B,), turned so that larger = better."""

    def __init__(self, function: Callable[[Tensor], Tensor], *, higher_is_better: bool):
        super().__init__()
        self.function, self.sign = function, 1.0 if higher_is_better else -1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.sign * torch.as_tensor(self.function(x)).reshape(-1)


def pyiqa_metric(name: str, **options) -> CallableMetric:
    """A metric of pyiqa by name, larger = better. Needs the extra `iqa`, whose licence is non-commercial."""
    try:
        pyiqa = importlib.import_module("pyiqa")
    except ImportError as error:
        raise ImportError(
            f"the model pyiqa:{name} needs the package pyiqa (non-commercial licence): pip install 'vision-reproductions[iqa]'"
        ) from error
    metric = pyiqa.create_metric(name, as_loss=True, **options)
    return CallableMetric(metric, higher_is_better=not metric.lower_better)
