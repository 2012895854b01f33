"""The cell that a run is to use: of a search, of a file, a published one, or a random one."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.data.files import read_json
from common.runs import RunError
from common.scripts import arm_name, override
from dcp_nas.search_space import GENOTYPES, NOISE, Genotype, random_genotype

PAPER = Path(__file__).resolve().parent
DIGITS = {"sigma": 0.25, "train": 1000}  # of configs/data/digits.yaml: what a search has without overrides


def check_genotype(node: Mapping[str, Any]) -> None:
    """ValueError unless exactly one of arm, file, name, draw is given, or for an unknown name or a number that cannot be."""
    given = {key: node[key] for key in ("arm", "file", "name", "draw") if node[key] is not None}
    if len(given) != 1:
        raise ValueError(f"genotype: give exactly one of arm, file, name, draw; got {given or 'none'}")
    if node["name"] is not None and node["name"] not in GENOTYPES:
        raise ValueError(f"genotype.name={node['name']!r}, allowed: {', '.join(GENOTYPES)}")
    if node["draw"] is not None and (node["draw"] < 0 or node["nodes"] < 1):
        raise ValueError(f"genotype.draw={node['draw']}, nodes={node['nodes']}, allowed: draw >= 0, nodes >= 1")


def own_digits(cfg: Any) -> dict[str, Any]:
    """The options of the digits that a search with its defaults would not have."""
    data = cfg.get("data") or {}
    if data.get("name") != "digits":
        return {}
    return {k: data[k] for k, default in DIGITS.items() if data.get(k, default) != default}


def genotype_path(cfg: Any) -> Path | None:
    """Where the search of genotype.arm (same scale and seed) leaves its genotype; None when no arm is named.

    The search that a training makes by itself on digits of its own (`own_digits`) lies in a directory of its own."""
    if cfg.genotype.arm is None:
        return None
    arm = arm_name(f"search_{cfg.genotype.arm}")
    if cfg.genotype.search_if_missing and (own := own_digits(cfg)):
        arm += f"/for-{hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:8]}"
    return Path(cfg.run_root) / cfg.scale / arm / f"seed{cfg.seed}" / "genotype.json"


def find_genotype(cfg: Any) -> Genotype:
    """The genotype that the node `genotype` asks for. ValueError as `check_genotype`, FileNotFoundError when it is missing."""
    node = cfg.genotype
    check_genotype(node)
    if node.name is not None:
        return GENOTYPES[node.name]
    if node.draw is not None:  # another draw for every seed of the training
        return random_genotype(1000 * cfg.seed + node.draw, nodes=node.nodes)
    path = genotype_path(cfg) or Path(node.file)
    if node.arm is not None and not path.exists():
        raise FileNotFoundError(
            f"no genotype at {path.absolute()}: run python search.py method={node.arm} scale={cfg.scale} seed={cfg.seed} first, "
            "or train another one (genotype=dcp_nas_l, genotype=random, genotype=file genotype.file=...)"
        )
    genotype = Genotype.load(path)
    if genotype.share(NOISE):
        raise ValueError(
            f"{path}: the cell keeps the noise operation of model.order=control, which says how much a search decides; it is "
            "nothing to train"
        )
    return genotype


def genotype_for(cfg: Any, *, world_size: int, source: Mapping[str, Any]) -> Genotype:
    """`find_genotype` for a training on the images `source` (their identity), after the search where that is still missing.

    A preflight does not search: it takes a random cell of as many nodes. ValueError for the cell of an arm that was found on
    other images, which is a choice to be made (genotype=file), not to be inherited; for a file a notice says so."""
    path = genotype_path(cfg)
    if path is not None and not path.exists() and cfg.genotype.search_if_missing:
        if cfg.preflight:
            print("preflight: a random cell stands for the one that is still to be searched", flush=True)
            return random_genotype(cfg.seed, nodes=cfg.genotype.nodes)
        search_first(cfg, path, world_size=world_size)
    genotype = find_genotype(cfg)
    path = path or (Path(cfg.genotype.file) if cfg.genotype.file is not None else None)
    found = None if path is None else read_json(path.expanduser()).get("found")
    if found and found["data"] != dict(source):
        text = f"the cell of {path} was searched on {described(found['data'])}, this training is on {described(source)}"
        if cfg.genotype.arm is not None:
            raise ValueError(
                f"{text}: search on these images first, or take it all the same with genotype=file genotype.file={path}"
            )
        print(f"notice: {text}", flush=True)
    return genotype


def described(source: Mapping[str, Any]) -> str:
    """digits; folder (1,200 images, sha 1f...)"""
    more = [f"{source['images']:,} images"] if "images" in source else []
    more += [f"sha {source['sha']}"] if "sha" in source else []
    return f"{source.get('kind')} ({', '.join(more)})" if more else str(source.get("kind"))


def search_first(cfg: Any, path: Path, *, world_size: int) -> None:
    """Run search.py for the genotype of this training: its own method and configuration, the digits of the training.

    RunError for other data, whose search needs settings that nobody has given, under torchrun, and for a search that fails."""
    arm = cfg.genotype.arm
    if cfg.data.name != "digits":
        raise RunError(
            f"no genotype at {path.absolute()}: search on {cfg.data.name} first (python search.py method={arm} "
            f"experiment=search_folder data.root=...), then train with genotype=file genotype.file=.../genotype.json"
        )
    if world_size != 1:
        raise RunError(
            f"no genotype at {path.absolute()}: the search runs in one process, python search.py method={arm} first"
        )
    command = [sys.executable, "search.py", f"method={arm}", f"seed={cfg.seed}", f"scale={cfg.scale}"]
    command += [override("run_root", Path(cfg.run_root).absolute()), f"fabric.accelerator={cfg.fabric.accelerator}"]
    command += [f"threads={cfg.threads}"] if cfg.threads else []
    own = own_digits(cfg)
    if own:
        command += [f"data.{k}={v}" for k, v in own.items()] + [override("hydra.run.dir", path.parent.absolute())]
    print(
        f"no genotype at {path} yet: searching it first (python search.py method={arm}, which with force=true searches again)",
        flush=True,
    )
    # the scripts set it for Hydra; a child would take it for the wish to see tracebacks
    environment = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    if subprocess.run(command, cwd=PAPER, env=environment).returncode:
        raise RunError(f"the search of method={arm} failed, see above")
