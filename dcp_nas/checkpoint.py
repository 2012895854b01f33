"""The checkpoint of train.py, of export.py's packed file, and of the transfers: what they say, and the network that they hold."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from common import runs
from common.loop import Loaded
from common.scripts import arm_name
from dcp_nas.deploy import pack_
from dcp_nas.network import Network
from dcp_nas.operations import Bits
from dcp_nas.search_space import Genotype

NEW_IN_STEP_2 = ("m", "beta")
PACKED = "dcp-nas-packed-3"
NETWORK = ("model", "stage", "parity")  # the nodes of a configuration that make a network


def state(
    network: nn.Module, optimizer: Optimizer, about: Mapping[str, Any], genotype: Genotype, *, epoch: int, rows: list[dict],
    config: dict,
) -> dict[str, Any]:  # fmt: skip
    """What a run needs to go on, and what anybody needs to use its network. about: {task, classes, channels, size, ...}."""
    return {
        "model": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "rows": rows,
        "about": {**about, "genotype": genotype.plain()}, "config": config,
    }  # fmt: skip


def build_network(
    *, genotype: Genotype, model: Mapping, stage: Mapping, official_m_grad: bool, classes: int, channels: int
) -> Network:
    """The network of one run; `model`, `stage` are config nodes. ValueError or TypeError names a wrong key or value."""
    options = {k: v for k, v in stage.items() if k != "reconstruction"}
    bits = Bits(**options, official_m_grad=official_m_grad)
    return Network(genotype, num_classes=classes, in_channels=channels, bits=bits, **model)


def try_network(cfg: Any, genotype: Genotype, classes: int, channels: int, size: int | Sequence[int]) -> None:
    """Builds and runs the network without computing anything: ValueError for a model that does not fit images of that size."""
    options = {"model": cfg.model, "stage": cfg.stage, "official_m_grad": cfg.parity.official_m_grad}
    sides = (size, size) if isinstance(size, int) else tuple(size)
    with torch.device("meta"):
        network = build_network(genotype=genotype, classes=classes, channels=channels, **options)
    with torch.no_grad():
        network.eval()(torch.zeros(1, channels, *sides, device="meta"))


def load(path: str | Path) -> Loaded:
    """The classifier in evaluation mode, the configuration and what to know of a checkpoint of train.py or a packed file.

    FileNotFoundError, `runs.RunError` for a broken file, ValueError for one of another script."""
    found = runs.load_checkpoint(path)
    if missing := {"model", "config", "about"} - found.keys():
        raise ValueError(f"{path} is no checkpoint of dcp_nas/train.py: it lacks {', '.join(sorted(missing))}")
    config, about = found["config"], found["about"]
    if about["task"] != "classification":
        raise ValueError(f"{path} is a checkpoint of {about['task']}, not of dcp_nas/train.py")
    kind = found.get("format")
    if kind not in (None, PACKED):
        raise ValueError(f"{path} is a packed file of an older kind ({kind}): export the checkpoint again")
    network = untrained(config, about)
    if kind == PACKED:
        pack_(network)
    network.load_state_dict(found["model"])
    if kind == PACKED:
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return Loaded(network.eval(), config, about)


def untrained(config: Mapping[str, Any], about: Mapping[str, Any]) -> Network:
    """The network that a checkpoint (or a packed file) describes, before its weights."""
    return build_network(
        genotype=Genotype.parse(about["genotype"]), model=config["model"], stage=config["stage"],
        official_m_grad=config["parity"]["official_m_grad"], classes=len(about["classes"]), channels=about["channels"],
    )  # fmt: skip


def stage_path(cfg: Any, node: Any) -> Path | None:
    """The checkpoint that init or teacher names: its `weights`, or that of the run of `arm` at the same scale and seed."""
    if node.arm is not None and node.weights is not None:
        raise ValueError(f"give either an arm ({node.arm}) or weights ({node.weights}), not both")
    if node.weights is not None:
        return Path(node.weights)
    return (
        None
        if node.arm is None
        else Path(cfg.run_root) / cfg.scale / arm_name(node.arm) / f"seed{cfg.seed}" / "last.ckpt"
    )


def check_start(stage: Mapping[str, Any], path: Path | None) -> None:
    """ValueError for the second step (weights 0.02 |m| sign(w)) without the first, which would begin with random weights;
    FileNotFoundError says how to make a first step that is missing."""
    if path is None:
        if stage["weights"] == "m":
            raise ValueError(
                "stage=step2 begins with the weights of step 1: give init.weights=<checkpoint of stage=step1>"
            )
        return
    if not path.expanduser().is_file():
        raise FileNotFoundError(
            f"no step-1 checkpoint at {path.expanduser().absolute()}: train it first (stage=step1), or "
            "set init.weights to the file"
        )


def initialise(network: nn.Module, path: str | Path) -> None:
    """Load step 1 (binary activations, real weights) into a network of step 2; only m or beta may be missing.

    ValueError names a misfit."""
    found, expected = load(path).model.state_dict(), network.state_dict()
    wrong = [
        f"{k}: {tuple(v.shape)} instead of {tuple(expected[k].shape)}"
        for k, v in found.items()
        if k in expected and v.shape != expected[k].shape
    ]
    wrong += [f"unexpected {k}" for k in found.keys() - expected.keys()]
    wrong += [f"missing {k}" for k in expected.keys() - found.keys() if k.rpartition(".")[2] not in NEW_IN_STEP_2]
    if wrong:
        raise ValueError(f"{path} is no first step of this network: {'; '.join(sorted(wrong)[:5])}")
    network.load_state_dict(found, strict=False)


def load_backbone(network: Network, path: str | Path) -> None:
    """Weights of a classification network of train.py, without its classifier. ValueError naming what does not fit."""
    heads = ("fc.", "auxiliary_head.")
    found = {k: v for k, v in load(path).model.state_dict().items() if not k.startswith(heads)}
    expected = {k: v for k, v in network.state_dict().items() if not k.startswith(heads)}
    keys = found.keys() | expected.keys()
    wrong = sorted(k for k in keys if k not in found or k not in expected or found[k].shape != expected[k].shape)
    if wrong:
        raise ValueError(f"{path} does not fit the backbone (same genotype, stage and model?): {', '.join(wrong[:5])}")
    network.load_state_dict(found, strict=False)


def check_teacher(node: Mapping[str, Any], path: Path | None) -> None:
    """ValueError for two teachers at once or no timm model; FileNotFoundError for a file that is missing."""
    if path is not None and node["timm"] is not None:
        raise ValueError(f"teacher: give either a checkpoint ({path}) or teacher.timm={node['timm']!r}, not both")
    if node["timm"] is None and node["file"] is not None:
        raise ValueError("teacher.file holds the weights of teacher.timm=<name>, which is not given")
    for file in (path, node["file"]):
        if file is not None and not Path(file).expanduser().is_file():
            raise FileNotFoundError(f"no teacher at {Path(file).expanduser().absolute()}")
    if node["timm"] is not None:
        import timm

        if not timm.is_model(node["timm"]):
            close = ", ".join(timm.list_models("resnet34*"))
            raise ValueError(f"teacher.timm={node['timm']!r} is no timm model, e.g. {close}")


def build_teacher(node: Mapping[str, Any], path: Path | None, *, classes: int, channels: int) -> nn.Module | None:
    """A frozen network in evaluation mode: a checkpoint of train.py, a pretrained timm model, or None when neither is given.

    ValueError when it has other classes than the data, RunError when timm's weights cannot be had."""
    if path is not None:
        teacher: nn.Module = load(path).model
        found = teacher.fc.out_features  # type: ignore[union-attr]
    elif node["timm"] is not None:
        import timm

        own: dict[str, Any] = (
            {"pretrained_cfg_overlay": {"file": str(Path(node["file"]).expanduser())}} if node["file"] else {}
        )
        try:
            teacher = timm.create_model(node["timm"], pretrained=True, in_chans=channels, **own)
        except Exception as error:  # whatever the hub, the network or the file has to say
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise runs.RunError(
                f"cannot get the weights of teacher.timm={node['timm']} ({what}): give a local file with teacher.file=..."
            ) from error
        found = teacher.num_classes  # type: ignore[union-attr]
    else:
        return None
    if found != classes:
        raise ValueError(f"the teacher {path or node['timm']} has {found} classes, the data {classes}")
    return teacher.eval().requires_grad_(False)
