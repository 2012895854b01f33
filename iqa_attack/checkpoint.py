"""The checkpoint of train.py: what it says, and the quality models that it holds."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from common import runs
from common.loop import Loaded
from iqa_attack.quality_models.models import Models, unpack


def state(
    trained: Mapping[str, dict], *, config: dict, complete: bool = False, learning: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a run needs to go on, and what anybody needs to use its models.

    trained: {name: `pack`ed model} of those that are ready; learning: {name, model, optimizer, epoch} of the one that is being
    trained; complete: whether all are ready."""
    now = dict(learning or {"name": None, "model": {}, "optimizer": {}, "epoch": 0})
    return {
        "model": dict(trained), "complete": complete, "learning": {"name": now["name"], "model": now["model"]},
        "optimizer": now["optimizer"], "epoch": now["epoch"], "about": about(trained, config), "config": config,
    }  # fmt: skip


def about(trained: Mapping[str, dict], config: dict) -> dict[str, Any]:
    """Plain facts: images are RGB in 0..1 of any size (what a network normalises, it normalises inside), scores 0..10, larger
    = better. resize: short side, null: as it is, to which each model's images are brought; calibration: of each model."""
    networks = config["networks"]
    return {
        "models": list(trained), "channels": 3, "size": None, "normalise": None, "images": [0, 1], "scores": [0, 10],
        "resize": {name: networks.get(name, {}).get("test_resize") for name in trained},
        "calibration": {name: packed["calibration"] for name, packed in trained.items()},
    }  # fmt: skip


def load(path: str | Path) -> Loaded:
    """Every model, by name, in evaluation mode; the configuration and what to know of a checkpoint, without any data.

    FileNotFoundError, `runs.RunError` for a broken file, ValueError for one that train.py did not write or did not finish."""
    found = runs.load_checkpoint(path)
    if missing := {"model", "config", "about", "complete"} - found.keys():
        raise ValueError(f"{path} is no checkpoint of iqa_attack/train.py: it lacks {', '.join(sorted(missing))}")
    if not found["complete"]:
        raise ValueError(f"{path}: the training is unfinished; start train.py again, it resumes")
    models = Models({name: unpack(packed) for name, packed in found["model"].items()})
    return Loaded(models.eval(), found["config"], found["about"])


def fingerprint(models: Models) -> str:
    """16 hex digits of the weights and calibrations: which models a run attacked, wherever they came from."""
    digest = hashlib.sha256()
    for name, scored in models.items():
        digest.update(f"{name} {tuple(scored.calibration)}\0".encode())  # type: ignore[arg-type]
        for key, value in scored.state_dict().items():
            digest.update(f"{key}\0".encode())
            digest.update(torch.as_tensor(value).detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
