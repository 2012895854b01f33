"""Where the float teacher of a student comes from: found, given, or at scale "default" trained first.

It has a configuration of its own, the arm fp on the student's data, model and devices; what else is set for the student is not
meant for it. Its directory is <scale>/fp/seed<k> for the default data and model, and <scale>/fp/for-<hash>/seed<k> for others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf

from common import runs

CONFIGS = Path(__file__).parent / "configs"


def _read(name: str, *, everything: bool = False) -> dict[str, Any]:
    """A configuration file, without what only Hydra reads unless `everything`."""
    node: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    return {k: v for k, v in node.items() if everything or k not in ("defaults", "hydra")}


def own_config(cfg: DictConfig) -> DictConfig:
    """The configuration that `python train.py method=fp` has with the data, model, scale and devices of a student."""
    given: Any = OmegaConf.to_container(cfg, resolve=True)
    nodes = {"data": given["data"], "model": given["model"] | (given["teacher"]["model"] or {})}
    recipe = _read(f"experiment/{cfg.teacher.experiment}") if cfg.teacher.experiment else {}
    keep = {k: given[k] for k in ("scale", "run_root", "threads", "fabric")} | {"arm": "fp", "seed": cfg.teacher.seed}
    return OmegaConf.merge(_read("config"), nodes, _read("method/fp"), recipe, given["teacher"]["settings"], keep)  # type: ignore[return-value]


def default_config(own: DictConfig) -> DictConfig:
    """The same with the data and the model of a plain `python train.py`."""
    groups: dict[str, str] = {}
    for choice in _read("config", everything=True)["defaults"]:
        groups |= choice if isinstance(choice, dict) else {}
    nodes = {group: _read(f"{group}/{groups[group]}") for group in ("data", "model")}
    keep = {k: own[k] for k in ("scale", "run_root", "arm", "seed")}
    return OmegaConf.merge(_read("config"), nodes, _read("method/fp"), keep)  # type: ignore[return-value]


def directory(own: DictConfig) -> Path:
    """The run directory of a teacher: one of the arm fp that has its configuration already, else the one named for it."""
    base, seed, sha = Path(own.run_root) / own.scale / "fp", f"seed{own.seed}", runs.fingerprint(own)
    usual = base / seed
    for file in [usual / "result.json", *sorted(base.rglob(f"{seed}/result.json"))]:
        if (runs.read_json(file) or {}).get("config_sha256") == sha:
            return file.parent
    if runs.fingerprint(default_config(own)) == sha and not (usual / "result.json").exists():
        return usual
    unseeded: Any = OmegaConf.merge(own, {"seed": 0})
    return base / f"for-{runs.fingerprint(unseeded)[:8]}" / seed


def find(cfg: DictConfig, fabric: Fabric, fit: Callable[[DictConfig, Fabric, Path], None]) -> Path | None:
    """The teacher's checkpoint, trained by `fit` where it has to be; None for timm's weights, and in a preflight that finds none.

    FileNotFoundError at another scale than default, whose sweeps train the teacher as a stage of its own."""
    if cfg.teacher.weights != "auto":
        return Path(cfg.teacher.weights).expanduser() if cfg.teacher.weights else None
    if cfg.scale == "default":
        own = own_config(cfg)
        path = directory(own)
        if not cfg.preflight:
            fabric.print(f"teacher: {path} (teacher.force=true trains it again, force=true does not)")
            try:
                fit(OmegaConf.merge(own, {"force": cfg.teacher.force}), fabric, path)  # type: ignore[arg-type]
            except (ValueError, runs.RunError) as error:
                kind = ValueError if isinstance(error, ValueError) else runs.RunError
                raise kind(
                    f"the teacher: {error}. Set its own keys, +teacher.settings.<key>=..., or give teacher.weights=<checkpoint>"
                ) from error
    else:
        path = Path(cfg.run_root) / cfg.scale / "fp" / f"seed{cfg.teacher.seed}"
        if not (path / "last.ckpt").exists() and not cfg.preflight:
            raise FileNotFoundError(
                f"no teacher at {path / 'last.ckpt'}: train it first, python train.py method=fp scale={cfg.scale} "
                f"seed={cfg.teacher.seed}, or give teacher.weights=<checkpoint>"
            )
    return path / "last.ckpt" if (path / "last.ckpt").exists() else None
