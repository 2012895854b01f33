"""The checkpoint of train.py, and the released APViT: the network and what is needed to use it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch.optim import Optimizer

from ap_fer.build import rebuild
from ap_fer.data import Data
from ap_fer.expressions import EXPRESSIONS
from ap_fer.transforms import MEAN, STD
from ap_fer.weights import load_released, read_state
from common import runs
from common.loop import Loaded

CONFIGS = Path(__file__).resolve().parent / "configs"
PUBLISHED = {"app": {"keep": 160}, "atp": {"rate": 0.9, "start": 4}}


def about(classes: list[str] | tuple[str, ...], size: int, *, drawn: bool) -> dict[str, Any]:
    """classes: names in the order of the logits; drawn: whether the faces of the training were drawings."""
    normalise = {"mean": list(MEAN), "std": list(STD)}
    return {"classes": list(classes), "channels": 3, "size": size, "normalise": normalise, "drawn": drawn}


def state(model: Any, optimizer: Optimizer, data: Data, *, epoch: int, best: dict, config: dict) -> dict[str, Any]:
    """What a run needs to go on, and what anybody needs to use its network."""
    return {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "best": best,
        "about": about(data.names, config["data"]["size"], drawn=config["data"]["name"] == "faces"), "config": config,
    }  # fmt: skip


def load(path: str | Path) -> Loaded:
    """A network in evaluation mode from a checkpoint of train.py or the released APViT (whose config here is {}).

    FileNotFoundError, `runs.RunError` for a broken file, ValueError for another format, naming missing and unknown keys."""
    found = runs.load_checkpoint(path)
    if isinstance(found, Mapping) and {"model", "config", "about"} <= found.keys():
        model = rebuild(found["config"], len(found["about"]["classes"]))
        model.load_state_dict(found["model"])
        return Loaded(model.eval(), found["config"], found["about"])
    tensors = read_state(path)
    heads = [v for k, v in tensors.items() if v.ndim == 2 and k.endswith("fc.weight")]
    if len(heads) != 1 or len(heads[0]) not in (7, 8):
        raise ValueError(f"{path} is neither a checkpoint of ap_fer/train.py nor a released APViT with 7 or 8 classes")
    network = yaml.safe_load((CONFIGS / "model/apvit.yaml").read_text())
    model = rebuild({"model": network, "method": PUBLISHED, "data": {"size": 112}}, len(heads[0]))
    load_released(model, tensors)
    return Loaded(model.eval(), {}, about(EXPRESSIONS[: len(heads[0])], 112, drawn=False))


def data_options(trained: Loaded, data_set: str | None, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of `build_data` for evaluating a network: those it was trained on or configs/data/<data_set>, with the keys of
    `changes` that are not null, at the network's own size.

    ValueError for an unknown set, released weights without one, or another number of classes."""
    if data_set is None and not trained.config:
        raise ValueError("released weights do not say what they were trained on: name their set, e.g. set=raf_db")
    options = dict(trained.config["data"]) if data_set is None else _set(data_set)
    options |= {k: v for k, v in changes.items() if v is not None} | {"size": trained.about["size"]}
    classes = len(trained.about["classes"])
    if options.get("num_classes", 7) not in (None, classes):
        raise ValueError(f"the network has {classes} classes, data.num_classes={options['num_classes']}")
    return options


def _set(name: str) -> dict[str, Any]:
    known = sorted(p.stem for p in (CONFIGS / "data").glob("*.yaml"))
    if name not in known:
        raise ValueError(f"set={name!r}, allowed: {', '.join(known)}")
    own = yaml.safe_load((CONFIGS / f"data/{name}.yaml").read_text())
    base = {k: v for group in own.pop("defaults", []) for k, v in _set(group).items()}
    return base | own
