"""Checkpoints by path alone: those of train.py, packed files of export.py, and the released code's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.data.imagenet_info import ImageNetInfo
from torch import nn
from torch.optim import Optimizer

from common import runs
from common.loop import Loaded
from q_vit.data import look
from q_vit.model import network
from q_vit.packing import unpack
from q_vit.released import is_released, load_released


def about_of(cfg: Mapping[str, Any], data_about: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of itself: names, channels, size, crop and normalisation of its data, and how its network is built.

    cfg: the resolved configuration; data_about: `Data.about()`."""
    method = cfg["method"]
    made = {"model": cfg["model"], "bits": method["bits"], "irm": method["irm"], "quant": method["quant"]}
    return {**data_about, "network": made}


def state(
    model: nn.Module, optimizer: Optimizer, *, epoch: int, row: dict, best: float, about: dict, config: dict
) -> dict[str, Any]:
    """What a run needs to go on, and what anybody needs to use its network. row: the numbers of the epoch."""
    return {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "row": row, "best": best,
        "about": about, "config": config,
    }  # fmt: skip


def load(path: str | Path, *, bits: int | None = None, check_bits: bool = True) -> Loaded:
    """The network in evaluation mode, the configuration that trained it ({} for released weights) and what to know of it.

    bits: the width of a released checkpoint, whose keys do not say it, checked against its steps unless check_bits is
    false; of any other file, an error unless it is the width that it was trained with.
    FileNotFoundError, `runs.RunError` for a broken file, ValueError for another format or width."""
    found = runs.load_checkpoint(path)
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} is no checkpoint: it holds a {type(found).__name__}")
    if is_released(found):
        if bits is None:
            raise ValueError(
                f"{path} is a checkpoint of the released code, whose keys do not say its width: give bits=2, 3 or 4"
            )
        model, made = load_released(path, bits=bits, check=check_bits)
        return Loaded(model, {}, {"classes": _names(made.pop("classes")), **look("folder"), "network": made})
    if missing := {"about", "config", "packed" if "packed" in found else "model"} - found.keys():
        raise ValueError(
            f"{path} is no checkpoint of q_vit/train.py or export.py: it lacks {', '.join(sorted(missing))}"
        )
    about = found["about"]
    trained = about["network"]["bits"]
    if bits not in (None, trained):
        raise ValueError(f"bits={bits} but {path} was trained with {trained} bit; leave bits out")
    model = network(about)
    if "packed" in found:
        return Loaded(unpack(model, found), found["config"], about)
    model.load_state_dict(found["model"])
    return Loaded(model.eval(), found["config"], about)


def _names(classes: int) -> list[str]:
    """ImageNet's names for a thousand classes, else numbers."""
    if classes != 1000:
        return [str(c) for c in range(classes)]
    known = ImageNetInfo()  # reads its files each time it is made
    return [known.index_to_description(c) for c in range(1000)]
