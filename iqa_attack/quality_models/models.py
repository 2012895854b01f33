"""The quality models by name: built, saved, loaded from the authors' files, and calibrated to 0..10.

Everything downstream sees a `Scored` model: images (B, 3, H, W) in 0..1 -> scores (B,) in 0..10, larger = better.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import runs
from iqa_attack.quality_models.brisque import Brisque, load_brisque
from iqa_attack.quality_models.calibration import FLOOR, Calibration, Scored, calibrate
from iqa_attack.quality_models.cornia import Cornia, load_cornia
from iqa_attack.quality_models.ma19 import Ma19
from iqa_attack.quality_models.niqe import Niqe, load_niqe
from iqa_attack.quality_models.unique import Unique

KINDS: dict[str, type[nn.Module]] = {"brisque": Brisque, "cornia": Cornia, "ma19": Ma19, "unique": Unique, "niqe": Niqe}
# (b3, b4) of the authors' models on LIVE; their script gives Ma19 those of CORNIA and UNIQUE those of Ma19
OFFICIAL_LOGISTIC = {
    "brisque": (57.4975833, 24.1426074), "cornia": (58.3700969, 23.8076639), "ma19": (2.6943240, 0.9155527),
    "unique": (-0.4135264, 1.6893845),
}  # fmt: skip


LARGEST_REFERENCE = 300  # short side of the smallest embedded photograph


class Models(nn.ModuleDict):
    """Several scored models by name: images (B, 3, H, W) in 0..1 -> {name: (B,) in 0..10}."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: model(x) for name, model in self.items()}


def build_nr(kind: str, **options) -> nn.Module:
    """An untrained model by name. ValueError for an unknown one."""
    if kind not in KINDS:
        raise ValueError(f"no quality model {kind!r}, allowed: {', '.join(KINDS)}")
    return KINDS[kind](**options)


def build_network(kind: str, *, pretrained: str | None = None, **options) -> Ma19 | Unique:
    """Ma19 or UNIQUE with weights from torch's stream; UNIQUE may start from ImageNet weights (pretrained: a file).

    ValueError for a file of another network."""
    network = build_nr(kind, **options)
    if pretrained:
        if not isinstance(network, Unique):
            raise ValueError(f"networks.{kind}.model.pretrained={pretrained}: only UNIQUE has a pretrained trunk")
        found = {k: v for k, v in runs.load_checkpoint(pretrained).items() if not k.startswith("fc.")}
        try:
            network.backbone.load_state_dict(found)
        except RuntimeError as error:
            what = str(error).splitlines()[-1].strip()
            raise ValueError(f"networks.unique.model.pretrained={pretrained} fits no {network.name}: {what}") from error
    return network  # type: ignore[return-value]


def pack(kind: str, scored: Scored) -> dict[str, Any]:
    """A trained model as tensors and plain types."""
    options = scored.model.options()  # type: ignore[operator]
    calibration = scored.calibration._asdict()
    return {"kind": kind, "options": options, "state": scored.model.state_dict(), "calibration": calibration}


def unpack(packed: Mapping[str, Any]) -> Scored:
    """The model that `pack` wrote, in evaluation mode, without gradients of its weights."""
    model = build_nr(packed["kind"], **packed["options"])
    model.load_state_dict(packed["state"])
    return Scored(model, Calibration(**packed["calibration"])).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------- authors' files
def load_official(
    kind: str, path: str | Path, *, b3: float | None = None, b4: float | None = None, floor: float = FLOOR, **options
) -> Scored:
    """A model from its authors' file(s), calibrated (see `calibrate`).

    brisque: .mat, .npz, .yml; cornia: a folder of .mat; ma19, unique: a torch checkpoint; niqe: .npz, .mat. The constants of
    the paper belong to its own regressors: CORNIA, Ma19, UNIQUE, and the BRISQUE .mat with higher_is_better=true. For every
    other file they are fitted unless given. Raises ValueError for a wrong sign."""
    path, source = Path(path).expanduser(), "given"
    readers = {"brisque": load_brisque, "cornia": load_cornia, "niqe": load_niqe}
    if kind not in KINDS:
        raise ValueError(f"no quality model {kind!r}, allowed: {', '.join(KINDS)}")
    model = readers[kind](path, **options) if kind in readers else _load_network(kind, path, options)
    own = kind in OFFICIAL_LOGISTIC and (kind != "brisque" or (path.suffix == ".mat" and model.sign == 1))
    if own and b3 is None and b4 is None:
        (b3, b4), source = OFFICIAL_LOGISTIC[kind], "released code"
    model = model.eval().requires_grad_(False)
    return Scored(model, calibrate(model, f"{kind} of {path}", b3=b3, b4=b4, source=source, floor=floor)).eval()


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


# ------------------------------------------------------------------------------------------------ any other model
class CallableMetric(nn.Module):
    """Any callable images (B, 3, H, W) in 0..1 -> scores (B,), turned so that larger = better."""

    def __init__(self, function: Callable[[Tensor], Tensor], *, higher_is_better: bool):
        super().__init__()
        self.function, self.sign = function, 1.0 if higher_is_better else -1.0
        self.size = function.size if isinstance(function, OnnxMetric) else None
        if isinstance(function, nn.Module):
            function.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.sign * torch.as_tensor(self.function(x)).reshape(-1)


class OnnxMetric(nn.Module):
    """The scores of an ONNX file: images (B, 3, H, W) in 0..1 -> (B,). onnxruntime has no gradient: a black box.

    size: the side of the images, where the file takes no other; a file for one image at a time is given one at a time."""

    def __init__(self, path: str | Path):
        super().__init__()
        import onnxruntime

        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no model {path}")
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.inputs = [i.name for i in self.session.get_inputs()]
        if len(self.inputs) != 1:
            raise ValueError(f"{path} takes {len(self.inputs)} inputs, a quality model takes one: images (B, 3, H, W)")
        shape = [n if isinstance(n, int) else None for n in self.session.get_inputs()[0].shape]
        if len(shape) != 4 or shape[1] not in (None, 3) or shape[2] != shape[3]:
            raise ValueError(
                f"{path} takes {shape}, a quality model takes images (B, 3, H, W), of any or of one square size"
            )
        if shape[2] is not None and shape[2] > LARGEST_REFERENCE:
            raise ValueError(
                f"{path} takes images of {shape[2]} pixels only, and the photographs that it is calibrated on have "
                f"{LARGEST_REFERENCE}: export it with free height and width"
            )
        self.path, self.batch, self.size = path, shape[0], shape[2]

    def forward(self, x: Tensor) -> Tensor:
        if self.size is not None and x.shape[2:] != (self.size, self.size):
            raise ValueError(
                f"{x.shape[3]} x {x.shape[2]} pixels, {self.path.name} takes {self.size} x {self.size} only"
            )
        parts = x.detach().float().cpu().split(self.batch or len(x))
        found = [np.asarray(self.session.run(None, {self.inputs[0]: part.numpy()})[0]).reshape(-1) for part in parts]
        return torch.from_numpy(np.concatenate(found)).to(x.device)


def pyiqa_metric(name: str, **options) -> CallableMetric:
    """A metric of pyiqa by name, larger = better. Needs the extra `iqa`, whose licence is non-commercial."""
    try:
        pyiqa = importlib.import_module("pyiqa")
    except ImportError as error:
        raise ValueError(
            f"the model pyiqa:{name} needs the package pyiqa (non-commercial licence): pip install 'vision-reproductions[iqa]'"
        ) from error
    metric = pyiqa.create_metric(name, as_loss=True, **options)
    return CallableMetric(metric, higher_is_better=not metric.lower_better)


def load_any(spec: str, *, higher_is_better: bool) -> nn.Module:
    """A model that train.py did not make, larger = better: `pyiqa:<name>`, `<file>.onnx`, or `<module>:<callable>` of images
    (B, 3, H, W) in 0..1 -> scores (B,). higher_is_better is not asked of pyiqa, which knows its own.

    ValueError naming what is wrong with it."""
    if spec.startswith("pyiqa:"):
        return pyiqa_metric(spec.removeprefix("pyiqa:"))
    if spec.endswith(".onnx"):
        return CallableMetric(OnnxMetric(spec), higher_is_better=higher_is_better)
    module, colon, name = spec.partition(":")
    if not colon or not module or not name:
        raise ValueError(
            f"model={spec}, allowed: pyiqa:<name>, <file>.onnx, <module>:<callable>, or a checkpoint's with weights="
        )
    sys.path.insert(0, str(Path.cwd()))  # a person's own module lies where the command is given
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model={spec}: {error}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    found = found() if isinstance(found, type) else found
    if not callable(found):
        raise ValueError(f"model={spec} is a {type(found).__name__} and no callable of images (B, 3, H, W)")
    return CallableMetric(found, higher_is_better=higher_is_better)  # type: ignore[arg-type]
