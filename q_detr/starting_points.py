"""The teacher and the first stage of a student: files, or runs of the same scale that are trained first if they are not there."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf

from common import runs

CONFIGS = Path(__file__).parent / "configs"
BACKBONE = (
    "bits",
    "stem_bits",
    "quantizer",
    "backbone_act",
    "act_granularity",
    "quantize_downsample",
)  # options of quantize_detr that a first stage has settled


def own_config(cfg: DictConfig, arm: str, seed: int, *, data: Any, model: Any) -> DictConfig:
    """The configuration of `arm` by itself: its recipe as the files give it, on this data and model, and of `cfg` only where and
    on what it computes. The first stage also takes the student's teacher and, its steps being kept, the student's quantisers."""
    base, method = OmegaConf.load(CONFIGS / "config.yaml"), OmegaConf.load(CONFIGS / f"method/{arm}.yaml")
    for name in ("defaults", "hydra"):
        del base[name]  # type: ignore[arg-type]
    shared = {k: cfg[k] for k in ("run_root", "scale", "threads", "fabric")}
    own = OmegaConf.merge(base, method, {**shared, "data": data, "model": model, "arm": arm, "seed": seed})
    if arm == "stage1":
        quant = OmegaConf.to_container(cfg.method.quant, resolve=True)
        kept = {k: v for k, v in quant.items() if k not in ("parts", "da")}  # type: ignore[union-attr]
        own = OmegaConf.merge(own, {"teacher": cfg.teacher, "method": {"quant": kept}})
    return own  # type: ignore[return-value]


def directory(cfg: DictConfig, arm: str, seed: int, own: DictConfig, identity: Mapping[str, Any]) -> Path:
    """<run_root>/<scale>/<arm>/seed<k>, where `python train.py method=<arm>` writes as well; for other data, another model or
    other quantisers than the default <arm>/for-<hash of what it must be>/seed<k>."""
    base = Path(cfg.run_root) / cfg.scale / arm
    data, model = OmegaConf.load(CONFIGS / "data/scenes.yaml"), OmegaConf.load(CONFIGS / "model/tiny.yaml")
    standard = own_config(_plainest(cfg), arm, seed, data=data, model=model)
    if runs.fingerprint(own) == runs.fingerprint(standard):
        return base / f"seed{seed}"
    must = runs.fingerprint(own) + json.dumps(dict(identity), sort_keys=True)
    return base / f"for-{hashlib.sha256(must.encode()).hexdigest()[:8]}" / f"seed{seed}"


def _plainest(cfg: DictConfig) -> DictConfig:
    """`cfg` with the teacher, quantisers and precision of configs/config.yaml."""
    base = OmegaConf.load(CONFIGS / "config.yaml")
    quant = OmegaConf.merge({"method": base.method, "parity": base.parity}).method.quant
    shared = {"run_root": cfg.run_root, "scale": cfg.scale, "threads": cfg.threads}
    return OmegaConf.create({
        **shared, "fabric": {**cfg.fabric, "precision": base.fabric.precision}, "teacher": base.teacher,
        "parity": base.parity, "method": {"quant": quant},
    })  # fmt: skip


def find(
    cfg: DictConfig, fabric: Fabric, arm: str, seed: int, *, identity: Mapping[str, Any], train: Callable[..., None]
) -> Path:
    """last.ckpt of the arm "teacher" or "stage1" of this scale. At scale "default" it is trained first by `train`, unless it is
    finished. FileNotFoundError at another scale, where sweeps train it; ValueError for a teacher of another shape."""
    if cfg.scale != "default":
        path = Path(cfg.run_root) / cfg.scale / arm / f"seed{seed}" / "last.ckpt"
        if not path.exists():
            raise FileNotFoundError(
                f"no {arm} at {path}: train it first, python train.py method={arm} scale={cfg.scale} seed={seed}"
            )
        return path
    if arm == "teacher" and cfg.teacher.model:
        raise ValueError(
            "teacher.model makes it another network than the student, with a recipe of its own: give teacher.weights="
        )
    own = own_config(cfg, arm, seed, data=cfg.data, model=cfg.model)
    out = directory(cfg, arm, seed, own, identity)
    again = f"python train.py method={arm} seed={seed} force=true"
    if out.parent.name != arm:
        again += f" hydra.run.dir={out} and the same data= and model= settings"
    fabric.print(f"{arm}: {out} (to train it anew: {again})")
    with _without_loggers(fabric):
        try:
            train(own, fabric, out)
        except (runs.RunError, ValueError) as error:
            raise type(error)(
                f"the {arm} in {out}: {error}. It can be trained by itself ({again}) and given as "
                f"{'teacher' if arm == 'teacher' else 'start'}.weights=<its last.ckpt>"
            ) from error
    return out / "last.ckpt"


def first_stage(saved: Mapping[str, Any], quant: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of a first stage. quant: the quantisers of the second; ValueError where those of the backbone were others: the
    second goes on with their steps."""
    theirs = (saved.get("config") or {}).get("method", {}).get("quant", {})
    for key in BACKBONE:
        if key in theirs and theirs[key] != quant[key]:
            raise ValueError(
                f"the first stage was trained with method.quant.{key}={theirs[key]}, this student has {key}={quant[key]}: they "
                "share the steps of the backbone"
            )
    return saved["model"]


@contextlib.contextmanager
def _without_loggers(fabric: Fabric) -> Iterator[None]:
    """The loggers belong to the student's run."""
    kept, fabric.loggers[:] = list(fabric.loggers), []
    try:
        yield
    finally:
        fabric.loggers[:] = kept
