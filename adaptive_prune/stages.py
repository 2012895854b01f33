"""Earlier runs that a run begins with: the dense start, which it fine-tunes and learns from, and the run whose counts it copies.

Both are found by their configuration and data, whatever their directory is called; a dense start that is not there is trained.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from adaptive_prune.backbones import check_pretrained
from adaptive_prune.budget import keep_counts, round_counts
from adaptive_prune.data import Data
from adaptive_prune.model import PrunedViT
from adaptive_prune.settings import composed, method_of, start_of
from common import runs


# ------------------------------------------------------------------------------------------------------ finding a run
def find(cfg: Mapping[str, Any], wanted: Mapping[str, Any], source: Mapping[str, Any], *, arm: str) -> Path | None:
    """The finished run of cfg's run root, scale and seed whose configuration is `wanted` (its name apart) and whose data have the
    identity `source`; arm: the folder to look in, * for any. None if there is none."""
    root, seed = Path(cfg["run_root"]) / cfg["scale"], f"seed{cfg['seed']}"
    for place in sorted({*root.glob(f"{arm}/{seed}"), *root.glob(f"{arm}/*/{seed}")}, key=lambda p: (len(p.parts), p)):
        result = runs.read_json(place / "result.json") or {}
        if result.get("status") != "finished" or result.get("data", {}) != dict(source):
            continue
        differing = runs.differing_keys(runs.plain(OmegaConf.load(place / "config.yaml")), wanted)  # type: ignore[arg-type]
        if all(line.startswith("arm:") for line in differing):
            return place
    return None


def agreed(fabric: Fabric, question: Callable[[], Any]) -> Any:
    """The answer of rank 0, on every rank: files may appear between two looks."""
    return fabric.broadcast(question() if fabric.is_global_zero else None, src=0)


# ------------------------------------------------------------------------------------------------------ the dense start
def dense_config(cfg: DictConfig) -> DictConfig:
    """The configuration of the dense start of `cfg`: that of its own arm on cfg's data, model, seed and precision.

    What cfg's arm or its command line changes otherwise does not reach it; start.epochs, .batch_size and .lr do."""
    start = cfg.start
    experiment = [f"experiment={start.experiment}"] if start.experiment else []
    base = composed(f"method={start.arm}", f"arm={start.arm}", *experiment)
    OmegaConf.set_struct(base, False)
    for key in ("data", "model", "fabric"):
        base[key] = OmegaConf.to_container(cfg[key], resolve=True)
    for key in ("seed", "scale", "run_root", "threads"):
        base[key] = cfg[key]
    if start.pretrained:
        base.start = {**base.start, "pretrained": True, "random": False}
    for node, key, value in (
        ("train", "epochs", start.epochs),
        ("train", "batch_size", start.batch_size),
        ("optim", "lr", start.lr),
    ):
        if value is not None:
            base[node][key] = value
    return base


def dense_place(cfg: DictConfig, wanted: DictConfig, source: Mapping[str, Any]) -> Path:
    """Where a dense start is trained: <arm>/seed<k> for the folder's own configuration, else a directory named by what it is."""
    seed = f"seed{cfg.seed}"
    folder = Path(cfg.run_root) / cfg.scale / cfg.start.arm
    plain = composed(f"method={cfg.start.arm}", f"arm={cfg.start.arm}", f"seed={cfg.seed}", f"scale='{cfg.scale}'")
    result = runs.read_json(folder / seed / "result.json")
    free = result is None or result.get("config_sha256") == runs.fingerprint(wanted)
    if runs.fingerprint(plain) == runs.fingerprint(wanted) and free and not source:
        return folder / seed
    return folder / f"for-{runs.fingerprint({'start': runs.fingerprint(wanted), 'of': dict(source)})[:8]}" / seed


def dense_start(cfg: DictConfig, fabric: Fabric, data: Data, fit: Callable[..., None]) -> Path | None:
    """The checkpoint that `cfg` starts from, trained first by `fit` if it is an arm that is not there yet; None for
    random or timm's weights, and in a preflight, which trains nothing. FileNotFoundError: not there, and start.make=false."""
    kind = start_of(cfg.start)
    if kind == "checkpoint":
        return Path(cfg.start.checkpoint).expanduser()
    if kind != "arm":
        return None
    wanted = dense_config(cfg)
    found = agreed(fabric, lambda: find(runs.plain(cfg), runs.plain(wanted), data.source, arm=cfg.start.arm))
    if cfg.preflight:
        if found is None:
            fabric.print("preflight: the dense start is not there yet; a random network of its shape stands for it")
        return None if found is None else found / "last.ckpt"
    if found is None:
        place = agreed(fabric, lambda: dense_place(cfg, wanted, data.source))
        if not cfg.start.make:
            raise FileNotFoundError(
                f"no dense start of this configuration under {place.parents[1 if place.parent.name.startswith('for-') else 0]}: "
                "train it (method=pretrain), set start.make=true, or give start.checkpoint=<file>"
            )
        fabric.print(f"the dense start comes first: {place}")
        fit(wanted, fabric, place)
        found = place
    else:
        fabric.print(f"dense start: {found} (move it away to train it again)")
    return found / "last.ckpt"


def load_start(model: PrunedViT, path: Path, cfg: DictConfig) -> None:
    """The weights of the dense start into the model. ValueError where they are of another model or other data, or do not fit."""
    state = runs.load_checkpoint(path)
    if "config" in state:  # written by this script
        ours = {"data": runs.plain(cfg.data), "vit": runs.plain(cfg.model.vit)}
        theirs = {"data": state["config"]["data"], "vit": state["config"]["model"]["vit"]}
        if different := runs.differing_keys(theirs, ours):
            raise ValueError(f"the start {path} was trained with other data or another model: {'; '.join(different)}")
    weights = state.get("model", state.get("state_dict", state))
    load_weights(model, {k.removeprefix("module."): v for k, v in weights.items()}, path, "model.vit")


def load_weights(
    model: PrunedViT, weights: Mapping[str, Tensor], path: Any, what: str, *, lacking: tuple = ("theta",)
) -> None:
    """A state dict into the model; of what it lacks only the names `lacking` are allowed. ValueError naming what does not fit."""
    own = model.state_dict()
    known = {**own, **{k.removeprefix("vit."): v for k, v in own.items()}}
    shapes = [
        f"{k} is {tuple(v.shape)}, not {tuple(known[k].shape)}"
        for k, v in weights.items()
        if k in known and isinstance(v, Tensor) and v.shape != known[k].shape
    ]
    if shapes:
        raise ValueError(f"{path} does not fit {what}: {'; '.join(shapes[:3])}")
    missing, unexpected = model.load_state_dict(dict(weights), strict=False)
    missing = [name for name in missing if name not in lacking]
    if unexpected or missing:
        raise ValueError(f"{path} does not fit {what}: missing {missing[:3]}, unexpected {unexpected[:3]}")


def teacher_of(cfg: DictConfig, model: PrunedViT) -> nn.Module | None:
    """The dense start, frozen and in evaluation mode, where the arm distils from it."""
    if not (cfg.method.losses.distill or cfg.method.losses.token):
        return None
    return copy.deepcopy(model.vit).eval().requires_grad_(False)


def check_start(cfg: DictConfig, data: Data) -> None:
    """ValueError where timm's weights, taken as the start as they are, have a head for other classes."""
    if not cfg.start.pretrained:
        return
    classes = check_pretrained(cfg.model.vit.name)
    if start_of(cfg.start) == "pretrained" and cfg.method.losses.distill and classes != len(data.classes):
        raise ValueError(
            f"{cfg.model.vit.name} has a head for {classes} classes, {data.name} has {len(data.classes)}: its new head is random "
            "and no teacher. Leave start.arm=pretrain, so that the dense model is fine-tuned first"
        )


# ----------------------------------------------------------------------------------------------- counts of a finished run
def matched_run(cfg: DictConfig, source: Mapping[str, Any]) -> Path | None:
    """The finished run of the arm `method.match`, with everything else as in cfg; None without a match.

    FileNotFoundError if there is none."""
    if cfg.method.match is None:
        return None
    wanted = runs.plain(cfg)
    wanted["method"] = method_of(cfg.method.match, wanted["model"])
    found = find(wanted, wanted, source, arm="*")
    if found is None or not (found / "evaluation.ckpt").exists():
        raise FileNotFoundError(
            f"no finished run of method={cfg.method.match} with this configuration, data and seed under "
            f"{Path(cfg.run_root) / cfg.scale}: train it first, with the same overrides"
        )
    return found


def matched_counts(model: PrunedViT, found: Path, schedule: str) -> list[int]:
    """Patch tokens per stage that cost no less than the run `found` did on its test images: its own mean counts (stages), or
    counts that fall by one factor from stage to stage (geometric)."""
    seen = runs.load_checkpoint(found / "evaluation.ckpt")
    if schedule == "geometric":
        counts = [float(k) for k in keep_counts(model.cost, model.locations, seen["macs"])]
    else:
        counts = seen["kept"].double().mean(0).tolist()
    return round_counts(model.cost, model.locations, counts, seen["macs"], at_least=True)
