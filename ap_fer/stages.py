"""What a run starts from: the CNN stem of another arm, with a configuration of its own, trained first if it is not there.

Of the overrides only what a stem must share enters it: its network, the size of the faces, seed, scale and place."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from common import runs

NETWORK = ("stem", "units", "widths", "strides", "kernels")


def stem_config(cfg: DictConfig) -> DictConfig:
    """The configuration of the run that `start.arm` names, for this network, size, seed, scale and place."""
    same = {"model": {k: cfg.model[k] for k in NETWORK}, "data": {"size": cfg.data.size}}
    same |= {k: cfg[k] for k in ("seed", "scale", "run_root", "threads", "fabric")}
    return OmegaConf.merge(_default(cfg), same)  # type: ignore[return-value]


def _default(cfg: DictConfig) -> DictConfig:
    overrides = [f"method={cfg.start.arm}", f"arm={cfg.start.arm}"]
    if GlobalHydra.instance().is_initialized():  # inside a script
        return compose("config", overrides=overrides)
    with initialize_config_dir(config_dir=str(Path(__file__).resolve().parent / "configs"), version_base="1.3"):
        return compose("config", overrides=overrides)


def stem_place(cfg: DictConfig) -> Path:
    """Where that run is: <run_root>/<scale>/<arm>/seed<k>, and below <arm>/for-<hash> for another network or size than the
    default's."""
    own, default = stem_config(cfg), _default(cfg)
    usual = OmegaConf.merge(default, {k: cfg[k] for k in ("seed", "scale", "run_root", "threads", "fabric")})
    folder, seed = Path(cfg.run_root) / cfg.scale / cfg.start.arm, f"seed{cfg.seed}"
    if runs.fingerprint(own) == runs.fingerprint(usual):  # type: ignore[arg-type]
        return folder / seed
    unseeded = OmegaConf.merge(own, {"seed": 0})
    return folder / f"for-{runs.fingerprint(unseeded)[:8]}" / seed  # type: ignore[arg-type]


def stems_first(cfg: DictConfig) -> list[tuple[DictConfig, Path]]:
    """Configurations and directories of the runs that this one starts from and that are not finished, in their order."""
    if cfg.start.arm is None or cfg.preflight:
        return []
    own, place = stem_config(cfg), stem_place(cfg)
    result = runs.read_json(place / "result.json") or {}
    if result.get("status") == "finished" and result["config_sha256"] == runs.fingerprint(own):
        return []
    return [*stems_first(own), (own, place)]
