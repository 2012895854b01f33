"""The checkpoint of train.py: what it says, and the network that it holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from common import runs
from common.data.batches import stream
from common.loop import Loaded
from fm_vit.baselines import ConcatFusion, CrossAttentionFusion, SharedViT, TwoBranchCMFL
from fm_vit.data import SPLITS, Data, build_data, check_data
from fm_vit.model import FMViT

MODELS: dict[str, Any] = {
    "fmvit": FMViT, "shared": SharedViT, "concat": ConcatFusion, "cross_attention": CrossAttentionFusion, "cmfl": TwoBranchCMFL,
}  # fmt: skip


def build(config: Mapping[str, Any], modalities: Sequence[str]) -> nn.Module:
    """The model of a configuration {seed, method, model}, with weights drawn from its seed; modalities: those of the data.
    ValueError for an unknown model or modality."""
    method = config["method"]
    if method["model"] not in MODELS:
        raise ValueError(f"method.model={method['model']!r}, allowed: {', '.join(MODELS)}")
    names = list(method["modalities"] or modalities)
    if unknown := [m for m in names if m not in modalities]:
        raise ValueError(
            f"method.modalities: {', '.join(unknown)} is not in the data, which has {', '.join(modalities)}"
        )
    torch.manual_seed(stream(config["seed"]))
    return MODELS[method["model"]](names, vit=config["model"]["vit"], **(method["options"] or {}))


def untrained(config: Mapping[str, Any], modalities: Sequence[str]) -> nn.Module:
    """`build` without the weights that a trunk would start from."""
    vit = {k: v for k, v in config["model"]["vit"].items() if k not in ("pretrained", "weights")}
    return build({**config, "model": {"vit": vit}}, modalities)


def state(
    model: nn.Module, optimizer: Optimizer, data: Data, *, epoch: int, config: dict,
    thresholds: Mapping[str, float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What a run needs to go on, and what anybody needs to use the network. thresholds: of every subset of the modalities
    ("rgb_ir"), None before the training has ended; at the frame level, by the rule evaluate.threshold."""
    about = data.about() | {"modalities": list(model.modalities), "data_modalities": data.modalities}  # type: ignore[arg-type]
    return {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch,
        "about": about | {"thresholds": None if thresholds is None else dict(thresholds)}, "config": config,
    }  # fmt: skip


def load(path: str | Path) -> Loaded:
    """The network in evaluation mode, the configuration and what to know of a checkpoint; without the training data.

    FileNotFoundError, `runs.RunError` for a broken file, ValueError for one that train.py did not write."""
    found: Any = runs.load_checkpoint(path)
    if missing := {"model", "config", "about"} - (found.keys() if isinstance(found, Mapping) else set()):
        raise ValueError(f"{path} is no checkpoint of fm_vit/train.py: it lacks {', '.join(sorted(missing))}")
    about = found["about"]
    model = untrained(found["config"], about["data_modalities"])
    model.load_state_dict(found["model"])
    return Loaded(model.eval(), found["config"], about)


def data_of(trained: Loaded, data: Mapping[str, Any], *, splits: Sequence[str] = SPLITS) -> Data:
    """The data set that a checkpoint was trained on, with the keys of `data` that are not null in place of its own (of lists and
    splits the ones that are named); with another `data.name` these keys alone, and the modalities and the look of the
    checkpoint. splits: those that are read.

    ValueError for modalities that the network does not have, or for a root where the set is embedded."""
    given = {k: v for k, v in data.items() if v is not None}
    own, about = trained.config["data"], trained.about
    if given.get("name", own["name"]) == own["name"]:
        if "protocol" in given and "lists" not in given:
            raise ValueError(
                f"data.protocol={given['protocol']}: the lists are those of the training; give +data.lists={{...}}"
            )
        options = own | {k: {**own[k], **v} if k in ("lists", "splits") else v for k, v in given.items()}
    else:
        look = {k: about[k] for k in ("size", "depth_max", "outline_only")}
        options = {"modalities": about["modalities"], **look, **given}
        if options["name"] == "folder":
            options = {"splits": {"train": "train", "validation": "val", "test": "test"}, **options}
    if absent := [m for m in about["modalities"] if m not in options["modalities"]]:
        raise ValueError(f"data.modalities={options['modalities']}: the network also has {', '.join(absent)}")
    if options["size"] != about["size"]:
        raise ValueError(f"data.size={options['size']}: the network was made for images of {about['size']}")
    check_data(**options)
    return build_data(seed=trained.config["seed"], read=splits, **options)
