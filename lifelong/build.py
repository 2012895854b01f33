"""The learner of a configuration: network, preparation of images, method."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from common.data.batches import stream as random_stream
from common.runs import plain
from lifelong.augmentation import Prepare
from lifelong.derpp import ReservoirReplay
from lifelong.ewc import EWC
from lifelong.icarl import ICaRL
from lifelong.learner import BinaryReplay, Learner, MetaLearner
from lifelong.lwf import LwF
from lifelong.model import Gated, build_model
from lifelong.ranks import Ranks

LEARNERS = {
    "meta": MetaLearner, "ce": Learner, "bce": BinaryReplay, "lwf": LwF, "icarl": ICaRL, "ewc": EWC, "reservoir": ReservoirReplay,
}  # fmt: skip


def build_learner(
    kind: str, model: Gated, prepare: Prepare, options: Mapping[str, dict[str, Any]], **common: Any
) -> Learner:
    """The learner `kind` with its own options (options[kind]). ValueError for an unknown kind, TypeError for an unknown key."""
    if kind not in LEARNERS:
        raise ValueError(f"method.learner={kind!r}, allowed: {', '.join(LEARNERS)}")
    own = options.get(kind, {})
    if kind == "meta":
        return MetaLearner(model, prepare, options=own, **common)
    return LEARNERS[kind](model, prepare, **own, **common)


def build(
    cfg: Mapping[str, Any],
    sizes: Sequence[int],
    channels: int,
    *,
    device: torch.device | str = "cpu",
    outputs: int | None = None,
    ranks: Ranks | None = None,
) -> Learner:
    """The learner of a configuration of train.py for tasks of `sizes` classes, its weights drawn from the seed.

    outputs: of the head, where they are known; default: all classes, or those of the first task with model.growing.
    ranks: see `Learner`."""
    config = plain(cfg)
    torch.manual_seed(random_stream(config["seed"]))
    network, parity, prepare = dict(config["model"]), config["parity"], config["prepare"]
    growing, channels_last = network.pop("growing"), network.pop("channels_last", False)
    if not isinstance(channels_last, bool):
        raise ValueError(f"model.channels_last={channels_last!r}, allowed: true, false")
    model = build_model(
        num_classes=outputs or (sizes[0] if growing else sum(sizes)), channels=channels, size=prepare["size"],
        unused=parity["unused_parameters"], **network,
    )  # fmt: skip
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    method, train = dict(config["method"]), config["train"]
    return build_learner(
        method.pop("learner"), model, Prepare(**prepare), method, replay=method.pop("replay"), seed=config["seed"],
        device=device, total_tasks=len(sizes), batch_size=train["batch_size"], epochs=train["epochs"],
        last_batch=train["last_batch"], optim=config["optim"], schedule=config["schedule"],
        attack_stats=parity["attack_stats"], ranks=ranks, **config["memory"],
    )  # fmt: skip
