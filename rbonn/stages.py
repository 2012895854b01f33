"""The first of two stages and the teacher: where a training finds them, and what it refuses to begin with."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchvision.models.detection import FasterRCNN

from common.runs import flatten, read_json
from rbonn.checkpoint import check_classes, load
from rbonn.network import build_network

NEW_IN_STAGE_2 = ("scale_factor", "u")
REQUIRED = "required"  # init.weights of the recipes of a second stage; ??? would be lost when the recipe is merged in
NOT_COMPARED = ("data.root", "data.workers", "data.download")


def stage_path(cfg: DictConfig, key: str, *, fresh: bool = False) -> Path | None:
    """The checkpoint that `init` or `teacher` names: its `weights`, or that of the finished run of `arm` at the same scale and
    seed, on the same data (and for init of the same model); overrides that changed those have a directory of their own.

    ValueError when both are given, or when no run fits; FileNotFoundError says how to make one. fresh: None, and said so, where
    there is no run yet, for a preflight."""
    node = cfg[key]
    if node.weights == REQUIRED and node.arm is None and fresh:
        print(f"preflight: {key}.weights is not set, fresh weights stand in for it")
        return None
    if node.weights == REQUIRED and node.arm is None:
        raise ValueError(
            f"{key}.weights is not set, and this recipe needs it: give {key}.weights=<last.ckpt of a first stage> "
            "(method=activations)"
        )
    if node.weights == REQUIRED:
        node = {"arm": node.arm, "weights": None}
    return _stage_path(cfg, key, DictConfig(node), fresh=fresh)


def _stage_path(cfg: DictConfig, key: str, node: DictConfig, *, fresh: bool) -> Path | None:
    if node.arm is not None and node.weights is not None:
        raise ValueError(f"{key}: give either an arm ({node.arm}) or weights ({node.weights}), not both")
    if node.weights is not None or node.arm is None:
        return None if node.weights is None else Path(node.weights).expanduser()
    base = Path(cfg.run_root) / cfg.scale / node.arm
    what = {"init": "stage-1 checkpoint", "teacher": "teacher"}[key]
    runs = [
        p for p in (base / f"seed{cfg.seed}", *sorted(base.glob(f"*/seed{cfg.seed}"))) if (p / "last.ckpt").is_file()
    ]
    if not runs and fresh:
        print(f"preflight: there is no {what} {base}/.../seed{cfg.seed} yet, fresh weights stand in for it")
        return None
    if not runs:
        raise FileNotFoundError(
            f"no {what} at {(base / f'seed{cfg.seed}/last.ckpt').absolute()}: train it first (method={node.arm} with the "
            f"same data, model, scale and seed), or set {key}.weights to the file"
        )
    differing = {p: _differing(p, cfg, ("data", "model") if key == "init" else ("data",)) for p in runs}
    fitting = [p for p in runs if not differing[p]]
    if not fitting:
        raise ValueError(
            f"{runs[0]} is no {what} for this run ({'; '.join(differing[runs[0]])}): train one with the same data and model "
            f"(method={node.arm}), or set {key}.weights"
        )
    if fitting[0] != base / f"seed{cfg.seed}" and len(fitting) > 1:
        raise ValueError(f"{key}.arm={node.arm} fits {', '.join(map(str, fitting))}: choose one with {key}.weights=")
    if (read_json(fitting[0] / "result.json") or {}).get("status") != "finished":
        raise ValueError(
            f"the {what} {fitting[0]} has not finished: run its command again first, it goes on where it was"
        )
    return fitting[0] / "last.ckpt"


def _differing(run: Path, cfg: DictConfig, nodes: Sequence[str]) -> list[str]:
    """Lines 'key: there -> here' of the nodes in which another run was configured otherwise."""
    there = yaml.safe_load((run / "config.yaml").read_text()) if (run / "config.yaml").is_file() else {}
    here = OmegaConf.to_container(cfg, resolve=True)
    a, b = (flatten({n: c.get(n, {}) for n in nodes}) for c in (there, here))  # type: ignore[union-attr]
    return [f"{k}: {a.get(k)} -> {b.get(k)}" for k in sorted(a | b) if k not in NOT_COMPARED and a.get(k) != b.get(k)]


def initialise(network: nn.Module, path: str | Path, *, classes: Sequence[str] | None = None) -> None:
    """Load the weights of a first stage (binary activations, real weights), ours or ReActNet's, into a network of the second.

    Only scale_factor and u may be missing. classes: names that the first stage must have. FileNotFoundError; ValueError names a
    misfit, or a checkpoint of ours whose weights are binary already."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"no stage-1 checkpoint at {path.absolute()}: train it first (method=activations), or set init.weights to the file"
        )
    stage1, config, about = load(path)
    if config and (binary := config["method"]["weights"]) != "real":
        raise ValueError(f"{path} is no first stage: its weights are {binary}; stage 2 begins with method=activations")
    found, expected = stage1.state_dict(), network.state_dict()
    wrong = [
        f"{k}: {tuple(v.shape)} instead of {tuple(expected[k].shape)}"
        for k, v in found.items()
        if k in expected and v.shape != expected[k].shape
    ]
    wrong += [f"unexpected {k}" for k in found.keys() - expected.keys() if k.rpartition(".")[2] not in NEW_IN_STAGE_2]
    wrong += [f"missing {k}" for k in expected.keys() - found.keys() if k.rpartition(".")[2] not in NEW_IN_STAGE_2]
    if wrong:
        raise ValueError(f"{path} is no first stage of this network: {'; '.join(sorted(wrong)[:5])}")
    if classes is not None:
        check_classes(about["classes"], list(classes), who=str(path))
    network.load_state_dict({k: v for k, v in found.items() if k in expected}, strict=False)


def check_teacher(teacher: DictConfig) -> None:
    """ValueError for an unknown timm model, or for a teacher named twice; reads nothing."""
    if teacher.arm is not None and teacher.timm is not None:
        raise ValueError(f"teacher: give either an arm ({teacher.arm}) or teacher.timm={teacher.timm!r}, not both")
    if teacher.timm is not None:
        import timm

        if not timm.is_model(teacher.timm):
            raise ValueError(
                f"teacher.timm={teacher.timm!r} is no timm model, e.g. {', '.join(timm.list_models('resnet34*'))}"
            )


def build_teacher(
    *, path: str | Path | None, node: Mapping[str, Any], classes: Sequence[str], channels: int,
    fresh: Mapping[str, Any] | None = None,
) -> nn.Module | None:  # fmt: skip
    """A frozen network in evaluation mode: a checkpoint (path), the pretrained timm model `node["timm"]` (path: a local file of
    its weights), or None where the node names no teacher. fresh: arguments of `build_network` that make one with random weights
    for a preflight, used where there is no path; a timm model then has random weights, too.

    ValueError when it has other classes than the data, or when pretrained weights cannot be had."""
    if node["timm"] is not None:
        teacher = _timm(node["timm"], path, channels, pretrained=fresh is None)
        if teacher.num_classes != len(classes):
            raise ValueError(f"the teacher {node['timm']} has {teacher.num_classes} classes, the data {len(classes)}")
    elif path is not None:
        teacher, _, about = load(path)
        check_classes(about["classes"], list(classes), who=f"the teacher {path}")
    elif node["arm"] is not None and fresh is not None:
        teacher = build_network(**fresh)
    else:
        return None
    return teacher.eval().requires_grad_(False)


def _timm(name: str, file: str | Path | None, channels: int, *, pretrained: bool) -> Any:
    import timm

    if file is not None and not Path(file).is_file():
        raise FileNotFoundError(f"no file {file} (teacher.weights, the weights of teacher.timm={name})")
    overlay = None if file is None else {"file": str(file)}
    try:
        return timm.create_model(name, pretrained=pretrained, in_chans=channels, pretrained_cfg_overlay=overlay)
    except Exception as error:  # no network, no such file at the hub, another format
        if not pretrained:
            raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"cannot get the pretrained weights of teacher.timm={name} ({reason}): without a connection, copy them here and set "
            "teacher.weights=<file> beside teacher.timm"
        ) from error


def weights_identity(network: nn.Module | None) -> str | None:
    """A short hash of the weights that a training begins with or learns from; None without a network."""
    if network is None:
        return None
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load_backbone(model: FasterRCNN, path: str | Path) -> None:
    """Weights of a classification network of rbonn/train.py (or a published one) into the backbone; its classifier is left out.

    FileNotFoundError or ValueError naming what does not fit."""
    found = {k: v for k, v in load(path).model.state_dict().items() if not k.startswith("fc.")}
    body = model.backbone.body  # type: ignore[union-attr]
    expected = body.state_dict()  # type: ignore[operator]
    wrong = sorted(
        k
        for k in found.keys() | expected.keys()
        if k not in found or k not in expected or found[k].shape != expected[k].shape
    )
    if wrong:
        raise ValueError(f"{path} does not fit the backbone: {', '.join(wrong[:5])}")
    body.load_state_dict(found)  # type: ignore[operator]
