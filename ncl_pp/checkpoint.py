"""The checkpoint of train.py: what it says, and the experts that it holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from common import runs
from common.loop import Loaded
from ncl_pp.data import LongTailed, build_data
from ncl_pp.model import Experts, NCLModel


def state(
    model: NCLModel, optimizer: Optimizer, data: LongTailed, *, epoch: int, best: float, config: dict
) -> dict[str, Any]:
    """What a run needs to go on, and what anybody needs to use its experts."""
    return {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "best": best, "indices": data.indices,
        "about": data.about(), "config": config,
    }  # fmt: skip


def load(path: str | Path) -> Loaded:
    """The experts in evaluation mode, the configuration and what to know of a checkpoint; without the training data.

    FileNotFoundError, `runs.RunError` for a broken file, ValueError for one that train.py did not write."""
    found = runs.load_checkpoint(path)
    if missing := {"model", "config", "about"} - found.keys():
        raise ValueError(f"{path} is no checkpoint of ncl_pp/train.py: it lacks {', '.join(sorted(missing))}")
    config, about = found["config"], found["about"]
    network = {k: v for k, v in config["model"].items() if k != "pretrained"}
    model = Experts(
        num_classes=len(about["classes"]), in_channels=about["channels"], experts=config["method"]["experts"], **network
    )
    model.load_state_dict(
        {k.removeprefix("experts."): v for k, v in found["model"].items() if k.startswith("experts.")}
    )
    return Loaded(model.eval(), config, about)


def data_of(trained: Loaded, data: Mapping[str, Any]) -> LongTailed:
    """The data set that a checkpoint was trained on, with the keys of `data` that are not null in place of its own.

    ValueError where the classes differ, or for a root where the set is embedded."""
    options = trained.config["data"] | {k: v for k, v in data.items() if v is not None}
    if options["name"] == "digits_lt" and options.get("root"):
        raise ValueError(
            f"data.root={options['root']}: digits_lt is embedded; name the set at the root, e.g. +data.name=folder"
        )
    found = build_data(seed=trained.config["seed"], **options)
    if len(found.counts) != len(trained.about["classes"]):
        raise ValueError(
            f"{options['name']} has {len(found.counts)} classes, the model {len(trained.about['classes'])}"
        )
    return found
