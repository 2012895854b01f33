"""Checkpoints of train.py and detect.py, packed files of export.py, and published ones: what they say, and their network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from common import runs
from common.loop import Loaded
from rbonn.data import STATS, look
from rbonn.deploy import FORMAT, unpack
from rbonn.network import build_detector, build_network
from rbonn.recurrent import Recurrence
from rbonn.released import is_released, load_released


def state(
    network: nn.Module,
    optimizer: Any,
    recurrence: Recurrence,
    *,
    epoch: int,
    rows: list[dict],
    about: Mapping,
    config: dict,
) -> dict[str, Any]:
    """What a run needs to go on, and what anybody needs to use its network."""
    return {
        "model": network.state_dict(), "optimizer": optimizer.state_dict(), "recurrence": recurrence.state_dict(), "epoch": epoch,
        "rows": rows, "about": dict(about), "config": config,
    }  # fmt: skip


def resume(saved: Mapping | None, network: nn.Module, optimizer: Any, recurrence: Recurrence) -> tuple[int, list[dict]]:
    """(first epoch to run, rows of those before), with everything in the state that `saved` (see `state`) holds."""
    if saved is None:
        return 1, []
    network.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    recurrence.load_state_dict(saved["recurrence"])
    return saved["epoch"] + 1, saved["rows"]


def load(path: str | Path, *, zero: int | None = None) -> Loaded:
    """The network in evaluation mode, the configuration and what to know of a checkpoint; without the training data.

    about: classes, channels, size, crop, normalise, task (classify | detect), and build: the nodes that the network is built
    from. zero: value of sign(0) for a published checkpoint (their codes use 0, the default); ours keep the one they were trained
    with. FileNotFoundError, `runs.RunError` for a broken file, ValueError for any other content."""
    found = runs.load_checkpoint(path)
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds a {type(found).__name__}, no checkpoint")
    if found.get("format") == FORMAT:
        return unpack(found)
    if str(found.get("format", "")).startswith("rbonn-packed"):
        raise ValueError(f"{path} is a packed file of an older kind ({found['format']}): export the checkpoint again")
    if is_released(found):
        network, build = load_released(found, zero=0 if zero is None else zero)
        about = {"classes": imagenet_names(build["classes"]), "channels": 3, **look(224, STATS["folder"], crop=True)}
        return Loaded(network, {}, {**about, "task": "classify", "build": build})
    if missing := {"model", "config", "about"} - found.keys():
        raise ValueError(
            f"{path} is neither a checkpoint of rbonn/train.py or detect.py (it lacks {', '.join(sorted(missing))}), a packed "
            "file, nor one of ReActNet or RBONN"
        )
    config, about = found["config"], found["about"]
    build = {"method": config["method"], "sign_zero": config["parity"]["sign_zero"], "classes": len(about["classes"])}
    if "detector" in config:
        network = build_detector(detector=config["detector"], **build)
        build, task = {"detector": config["detector"], **build}, "detect"
    else:
        build, task = {"model": config["model"], "channels": about["channels"], **build}, "classify"
        network = build_network(**build)
    network.load_state_dict(found["model"])
    return Loaded(network.eval(), config, {**about, "task": task, "build": build})


def imagenet_names(classes: int) -> list[str]:
    """'n01440764 tench' and so on for the thousand classes of ImageNet; for another number of classes their indices."""
    if classes != 1000:
        return [str(c) for c in range(classes)]
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo()
    return [f"{info.index_to_label_name(c)} {info.index_to_description(c).split(',')[0]}" for c in range(classes)]


def check_classes(known: list[str], found: list[str], *, who: str) -> None:
    """ValueError unless a data set has the classes of a network, in its order. 'n01440764' is 'n01440764 tench'; published
    weights that know no names fit any set with as many classes."""
    if len(known) != len(found):
        raise ValueError(f"{who} has {len(known)} classes, the data {len(found)}")
    if known == [str(c) for c in range(len(known))]:
        return
    if wrong := [(a, b) for a, b in zip(known, found, strict=True) if b not in (a, a.split(" ")[0])]:
        raise ValueError(f"{who} has other classes than the data: {wrong[0][0]!r} where the data have {wrong[0][1]!r}")
