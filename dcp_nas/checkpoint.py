"""Genotypes and networks from configurations and from checkpoints of train.py."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from common import runs
from dcp_nas.network import Network
from dcp_nas.operations import Bits
from dcp_nas.search_space import GENOTYPES, Genotype, random_genotype

NEW_IN_STEP_2 = ("m", "beta")
PAPER = Path(__file__).resolve().parent


def genotype_path(cfg: Any) -> Path | None:
    """Where the search of genotype.arm (same scale and seed) leaves its genotype; None when no arm is named."""
    arm = cfg.genotype.arm
    return (
        None if arm is None else Path(cfg.run_root) / cfg.scale / f"search_{arm}" / f"seed{cfg.seed}" / "genotype.json"
    )


def find_genotype(cfg: Any) -> Genotype:
    """The genotype that the node `genotype` asks for: of a search run, of a file, by name, or drawn at random.

    ValueError unless exactly one of arm, file, name, draw is given, or for an unknown name. FileNotFoundError when missing."""
    node = cfg.genotype
    given = {key: node[key] for key in ("arm", "file", "name", "draw") if node[key] is not None}
    if len(given) != 1:
        raise ValueError(f"genotype: give exactly one of arm, file, name, draw; got {given or 'none'}")
    if node.name is not None:
        if node.name not in GENOTYPES:
            raise ValueError(f"genotype.name={node.name!r}, allowed: {', '.join(GENOTYPES)}")
        return GENOTYPES[node.name]
    if node.draw is not None:  # another draw for every seed of the training
        return random_genotype(1000 * cfg.seed + node.draw, nodes=node.nodes)
    path = genotype_path(cfg) or Path(node.file)
    if node.arm is not None and not path.exists():
        raise FileNotFoundError(
            f"no genotype at {path.absolute()}: run python search.py method={node.arm} scale={cfg.scale} seed={cfg.seed} first, "
            "or train another one (genotype=dcp_nas_l, genotype=random, genotype=file genotype.file=...)"
        )
    return Genotype.load(path)


def search_if_missing(cfg: Any, *, world_size: int) -> None:
    """Run search.py for the genotype of this run if it has not been searched yet and genotype.search_if_missing is true.

    Only the embedded default asks for it; under torchrun, which would search once per rank, it is left to the user."""
    path = genotype_path(cfg)
    if path is None or path.exists() or not cfg.genotype.search_if_missing or world_size != 1:
        return
    print(f"no genotype at {path} yet: searching it first (python search.py method={cfg.genotype.arm})", flush=True)
    command = [sys.executable, "search.py", f"method={cfg.genotype.arm}", f"seed={cfg.seed}", f"scale={cfg.scale}"]
    subprocess.run([*command, f"run_root={Path(cfg.run_root).absolute()}"], cwd=PAPER, check=True)


def build_network(
    *, genotype: Genotype, model: Mapping, stage: Mapping, official_m_grad: bool, classes: int, channels: int
) -> Network:
    """The network of one run; `model`, `stage` are config nodes. ValueError or TypeError names a wrong key or value."""
    options = {k: v for k, v in stage.items() if k != "reconstruction"}
    bits = Bits(**options, official_m_grad=official_m_grad)
    return Network(genotype, num_classes=classes, in_channels=channels, bits=bits, **model)


def load_network(path: str | Path) -> tuple[Network, dict[str, Any]]:
    """(network in evaluation mode, the checkpoint's content). FileNotFoundError, `runs.RunError`, ValueError for other files."""
    state = runs.load_checkpoint(path)
    if missing := {"model", "config", "classes", "channels", "genotype"} - state.keys():
        raise ValueError(f"{path} is no checkpoint of dcp_nas/train.py: it lacks {', '.join(sorted(missing))}")
    config = state["config"]
    network = build_network(
        genotype=Genotype.parse(state["genotype"]), model=config["model"], stage=config["stage"],
        official_m_grad=config["parity"]["official_m_grad"], classes=state["classes"], channels=state["channels"],
    )  # fmt: skip
    network.load_state_dict(state["model"])
    return network.eval(), state


def initialise(network: nn.Module, path: str | Path) -> None:
    """Load step 1 (binary activations, real weights) into a network of step 2; only m or beta may be missing.

    FileNotFoundError says how to make the checkpoint; ValueError names a misfit."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"no step-1 checkpoint at {path.absolute()}: train it first (stage=step1), or set init.weights to the file"
        )
    found, expected = load_network(path)[0].state_dict(), network.state_dict()
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


def build_teacher(*, path: Path | None, timm_name: str | None, classes: int, channels: int) -> nn.Module | None:
    """A frozen network in evaluation mode: a checkpoint of train.py, a pretrained timm model, or None when neither is given.

    ValueError when it has other classes than the data, or when both are given."""
    if path is not None and timm_name is not None:
        raise ValueError(f"teacher: give either a checkpoint ({path}) or teacher.timm={timm_name!r}, not both")
    if path is not None:
        teacher: nn.Module = load_network(path)[0]
        found = teacher.fc.out_features  # type: ignore[union-attr]
    elif timm_name is not None:
        import timm

        if not timm.is_model(timm_name):
            close = ", ".join(timm.list_models("resnet34*"))
            raise ValueError(f"teacher.timm={timm_name!r} is no timm model, e.g. {close}")
        teacher = timm.create_model(timm_name, pretrained=True, in_chans=channels)
        found = teacher.num_classes  # type: ignore[union-attr]
    else:
        return None
    if found != classes:
        raise ValueError(f"the teacher {path or timm_name} has {found} classes, the data {classes}")
    return teacher.eval().requires_grad_(False)
