"""The checkpoint of train.py: what it says, and the network or the whole learner that it holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import runs
from common.loop import Loaded
from lifelong.build import build
from lifelong.learner import Learner
from lifelong.streams import Stream, build_stream


def about(stream: Stream, prepare: Mapping[str, Any]) -> dict[str, Any]:
    """What anybody needs to use a network of this stream: classes in stream order, classes of every task, channels, the side of
    the stored square (short side and centre of a photo), the side of its centre that the network sees, mean and std."""
    normalise = {"mean": list(prepare["mean"]), "std": list(prepare["std"])}
    sizes = {"stored": stream.size, "size": prepare["size"]}
    return {
        "classes": stream.class_names,
        "tasks": stream.sizes,
        "channels": stream.channels,
        **sizes,
        "normalise": normalise,
    }


def state(
    learner: Learner, stream: Stream, *, matrices: dict[str, Tensor], task: int, epoch: int, config: dict
) -> dict[str, Any]:
    """What a run needs to go on (after `epoch` of `task`, 0: before its first), and what anybody needs to use the learner."""
    own = learner.state_dict()
    return {
        "model": own.pop("model"), "optimizer": own.pop("optimizers"), "learner": own, "epoch": epoch, "task": task,
        "matrices": matrices, "about": about(stream, config["prepare"]), "config": config,
    }  # fmt: skip


def restore(learner: Learner, saved: Mapping[str, Any]) -> None:
    """The learner as it was when `saved` was made."""
    learner.load_state_dict({"model": saved["model"], "optimizers": saved["optimizer"], **saved["learner"]})


def load_learner(path: str | Path, device: torch.device | str = "cpu") -> tuple[Learner, dict[str, Any]]:
    """The learner of a checkpoint as it was, with its exemplars, and the checkpoint; without the training data.

    FileNotFoundError, `runs.RunError` for a broken file, ValueError for one that train.py did not write."""
    saved = runs.load_checkpoint(path)
    keys = saved.keys() if isinstance(saved, Mapping) else set()
    if missing := {"model", "learner", "config", "about", "matrices", "task"} - keys:
        raise ValueError(f"{path} is no checkpoint of lifelong/train.py: it lacks {', '.join(sorted(missing))}")
    config = {**saved["config"], "model": dict(saved["config"]["model"])}
    config["model"] |= {"pretrained": False} if "pretrained" in config["model"] else {}
    outputs = len(saved["model"]["head.weight"])
    learner = build(config, saved["about"]["tasks"], saved["about"]["channels"], device=device, outputs=outputs)
    restore(learner, {"optimizer": None, **saved})
    learner.model.eval()
    return learner, saved


def load(path: str | Path) -> Loaded:
    """The network in evaluation mode, the configuration and what to know of a checkpoint; errors: see `load_learner`."""
    learner, saved = load_learner(path)
    return Loaded(learner.model, saved["config"], saved["about"])


def test_stream(saved: Mapping[str, Any], data: Mapping[str, Any]) -> Stream:
    """The test images of a checkpoint's stream, with the keys of `data` that are not null in place of its own.

    ValueError where classes or channels differ, or for a root where the set is embedded."""
    options = dict(saved["config"]["data"]) | {k: v for k, v in data.items() if v is not None}
    known = saved["about"]
    options |= {"order": known["classes"], "tasks": known["tasks"], "splits": ("test",), "download": False}
    stream = build_stream(seed=saved["config"]["seed"], **options)
    if stream.channels != known["channels"] or stream.size != known["stored"]:
        raise ValueError(
            f"{options['name']} has images of {stream.channels} channels, side {stream.size}; the network was trained on "
            f"{known['channels']}, side {known['stored']} (+data.stored_size={known['stored']})"
        )
    return stream


test_stream.__test__ = False  # type: ignore[attr-defined]
