"""Networks from configurations and from checkpoints: those of train.py and the published ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from common import runs
from rbonn.layers import make_conv, make_sign
from rbonn.model import build_model
from rbonn.released import is_released, load_released

NEW_IN_STAGE_2 = ("scale_factor", "u")


def build_network(*, model: Mapping, method: Mapping, sign_zero: int, classes: int, channels: int) -> nn.Module:
    """The network of one arm: `model` and `method` are config nodes. ValueError or TypeError names a wrong key or value."""
    if sign_zero not in (1, 0, -1):
        raise ValueError(f"parity.sign_zero={sign_zero!r}, allowed: 1, 0, -1")
    method = dict(method)
    sign = make_sign(activations=method.pop("activations"), zero=sign_zero)
    conv = make_conv(**method, zero=sign_zero)
    return build_model(num_classes=classes, in_channels=channels, conv=conv, sign=sign, **model)


def load_network(path: str | Path, *, zero: int | None = None) -> tuple[nn.Module, dict[str, Any] | None]:
    """(network in evaluation mode, the checkpoint's content or None for a published one).

    zero: value of sign(0) for a published checkpoint (their codes use 0, the default); ours keep the one they were trained with.
    FileNotFoundError, `runs.RunError` for a broken file, ValueError for any other content."""
    state = runs.load_checkpoint(path)
    if is_released(state):
        return load_released(state, zero=0 if zero is None else zero), None
    if missing := {"model", "config", "classes", "channels"} - state.keys():
        raise ValueError(
            f"{path} is neither a checkpoint of rbonn/train.py (it lacks {', '.join(sorted(missing))}) "
            "nor one of ReActNet or RBONN"
        )
    config = state["config"]
    network = build_network(
        model=config["model"], method=config["method"], sign_zero=config["parity"]["sign_zero"],
        classes=state["classes"], channels=state["channels"],
    )  # fmt: skip
    network.load_state_dict(state["model"])
    return network.eval(), state


def initialise(network: nn.Module, path: str | Path) -> None:
    """Load the weights of a first stage (binary activations, real weights), ours or ReActNet's, into a network of the second.

    Only scale_factor and u may be missing. FileNotFoundError says how to make the checkpoint; ValueError names a misfit."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"no stage-1 checkpoint at {path.absolute()}: train it first (method=activations), or set init.weights to the file"
        )
    stage1, _ = load_network(path)
    found, expected = stage1.state_dict(), network.state_dict()
    wrong = [
        f"{k}: {tuple(v.shape)} instead of {tuple(expected[k].shape)}"
        for k, v in found.items()
        if k in expected and v.shape != expected[k].shape
    ]
    wrong += [f"unexpected {k}" for k in found.keys() - expected.keys() if k.rpartition(".")[2] not in NEW_IN_STAGE_2]
    wrong += [f"missing {k}" for k in expected.keys() - found.keys() if k.rpartition(".")[2] not in NEW_IN_STAGE_2]
    if wrong:
        raise ValueError(f"{path} is no first stage of this network: {'; '.join(sorted(wrong)[:5])}")
    network.load_state_dict({k: v for k, v in found.items() if k in expected}, strict=False)


def build_teacher(*, path: str | Path | None, timm_name: str | None, classes: int, channels: int) -> nn.Module | None:
    """A frozen network in evaluation mode: a checkpoint, a pretrained timm model by name, or None when neither is given.

    ValueError when it has other classes than the data, or when both are given."""
    if path is not None and timm_name is not None:
        raise ValueError(f"teacher: give either a checkpoint ({path}) or teacher.timm={timm_name!r}, not both")
    if path is not None:
        teacher, _ = load_network(path)
        found = teacher.fc.out_features  # type: ignore[union-attr]
    elif timm_name is not None:
        import timm

        if not timm.is_model(timm_name):
            raise ValueError(
                f"teacher.timm={timm_name!r} is no timm model, e.g. {', '.join(timm.list_models('resnet34*'))}"
            )
        teacher = timm.create_model(timm_name, pretrained=True, in_chans=channels)
        found = teacher.num_classes  # type: ignore[union-attr]
    else:
        return None
    if found != classes:
        raise ValueError(f"the teacher {path or timm_name} has {found} classes, the data {classes}")
    return teacher.eval().requires_grad_(False)
