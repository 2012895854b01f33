"""Evaluate a checkpoint of train.py or released dense weights: accuracy, MACs, kept tokens per stage and their histogram.

python evaluate.py weights=runs/default/as/seed0/last.ckpt
python evaluate.py weights=deit_small.pth set=imagenet data.root=/datasets/imagenet vit=deit_small arm=dense
python evaluate.py weights=runs/default/pretrain/seed0/last.ckpt arm=as calibrate=0.5      # thresholds without training
"""

import csv
import hashlib
import json
from pathlib import Path

import hydra
from hydra import compose
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from adaptive_prune.backbones import build_vit
from adaptive_prune.calibrate import calibrate
from adaptive_prune.data import Data, build_data
from adaptive_prune.metrics import histogram
from adaptive_prune.model import INFERENCE, PrunedViT
from adaptive_prune.train import evaluate
from common import runs
from common.data.batches import Plan


def load(
    path: str | Path,
    *,
    model: str | None = None,
    method: str | None = None,
    dataset: str | None = None,
    data: dict | None = None,
    ema: bool = False,
) -> tuple[PrunedViT, DictConfig]:
    """The model of a checkpoint with its weights, and its configuration.

    A checkpoint of train.py knows its configuration (`method` replaces the arm, `data` single keys). Any other file must be
    a state dict of a bare ViT (also under "model" or "state_dict", as DeiT and LV-ViT are published; "module." prefixes are
    dropped), and model, method and dataset must name configs. Raises FileNotFoundError, `runs.RunError` for a broken file,
    ValueError where names are missing or the weights do not fit."""
    state = runs.load_checkpoint(path)
    arm = [f"method={method}"] if method else []
    if "config" in state:
        if lacking := sorted({"model", "classes", "channels", "keep"} - state.keys()):
            raise ValueError(f"{path} was not written by this train.py: it lacks {', '.join(lacking)}")
        if ema and "ema" not in state:
            raise ValueError(f"{path} holds no averaged weights (it was trained with train.ema=null): leave ema out")
        cfg = OmegaConf.create(state["config"])
        if arm:
            composed = compose("config", overrides=arm)
            composed.model = cfg.model
            cfg.method = OmegaConf.to_container(composed.method, resolve=True)
        weights = state["ema" if ema else "model"]
        classes, channels = state["classes"], state["channels"]
        keep = None if arm else state["keep"]
    else:
        if not (model and method and dataset):
            raise ValueError(f"{path} was not written by train.py: say what it is with vit=, arm= and set=")
        cfg = compose("config", overrides=[f"model={model}", f"data={dataset}", *arm])
        weights = state.get("model", state.get("state_dict", state))
        weights = {k.removeprefix("module."): v for k, v in weights.items()}
        head = weights.get("head.weight")
        stem = next((v for k, v in weights.items() if k.startswith("patch_embed.") and v.ndim == 4), None)
        if head is None or stem is None:
            raise ValueError(
                f"{path} holds no {'head' if head is None else 'patch_embed'} weights: no classification ViT"
            )
        classes, channels, keep = len(head), stem.shape[1], None
    OmegaConf.set_struct(cfg, False)
    cfg.data = OmegaConf.merge(cfg.data, data or {})
    vit = build_vit(**cfg.model.vit, num_classes=classes, in_chans=channels)
    m = cfg.method
    pruned = PrunedViT(
        vit, rule=m.rule, locations=m.locations, budget=cfg.budget.target, score=m.score, mask=m.mask, inference=m.inference,
        temperature=m.temperature, thresholds=m.thresholds, keep=keep, cumulative=not cfg.parity.separate_masks,
    )  # fmt: skip
    if m.rule != "threshold":
        weights = {k: v for k, v in weights.items() if k != "theta"}
    missing, unexpected = pruned.load_state_dict(weights, strict=False)
    if set(missing) - {"theta"} or unexpected:
        raise ValueError(
            f"{path} does not fit {cfg.model.vit.name}: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    return pruned.eval(), cfg  # type: ignore[return-value]


def calibrated(fabric: Fabric, pruned: PrunedViT, data: Data, cfg: DictConfig) -> dict[str, float]:
    """Thresholds for a budget from training images; returns the accuracy of top-k at the same cost, to be seen beside it."""
    size = min(cfg.batch_size, data.train_size)
    batches: list[Tensor] = []
    for images, _ in data.epoch(Plan(data.train_size, size, seed=0), 1, fabric.device):
        batches.append(images)
        if len(batches) * size >= cfg.calibration_images:
            break
    cost = calibrate(pruned, batches, cfg.calibrate)
    top = PrunedViT(pruned.vit, rule="topk", locations=pruned.locations, budget=cost, score=pruned.score).eval()
    other, _ = evaluate(fabric, top, data, batch_size=cfg.batch_size, workers=0)
    return {"calibrated_macs": cost, "top1_of_topk": other["top1"], "macs_of_topk": other["macs"]}


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    fabric = runs.launch(cfg.fabric)
    changed = {k: v for k, v in cfg.data.items() if v is not None}
    pruned, trained = load(cfg.weights, model=cfg.vit, method=cfg.arm, dataset=cfg.set, data=changed, ema=cfg.ema)
    if cfg.thresholds is not None:
        pruned.theta.data.copy_(pruned.theta.new_tensor(list(cfg.thresholds)))
    data = build_data(seed=trained.seed, **trained.data)
    if data.classes != pruned.vit.num_classes:
        raise ValueError(f"the weights have {pruned.vit.num_classes} classes, the data set {data.classes}")
    pruned = fabric.to_device(pruned)
    extra = calibrated(fabric, pruned, data, cfg) if cfg.calibrate is not None else {}
    if cfg.inference is not None:
        if cfg.inference not in INFERENCE:
            raise ValueError(f"inference={cfg.inference!r}, allowed: {', '.join(INFERENCE)}")
        pruned.inference = cfg.inference
    metrics, found = evaluate(fabric, pruned, data, batch_size=cfg.batch_size, workers=trained.data.get("workers", 0))
    for name, value in (metrics | extra).items():
        print(f"{name:20s} {value:.5g}")
    if cfg.histogram and found["kept"].shape[1]:
        out = Path(cfg.out)
        out.mkdir(parents=True, exist_ok=True)
        stages = [f"kept_{s + 1}" for s in range(found["kept"].shape[1])]
        images = enumerate(zip(found["right"].tolist(), found["kept"].tolist(), strict=True))
        write_csv(out / "kept.csv", ["image", "right", *stages], [[i, int(r), *map(int, k)] for i, (r, k) in images])
        rows = histogram(found["kept"])
        write_csv(out / "histogram.csv", list(rows[0]), [list(r.values()) for r in rows])
        print(f"kept tokens per image and their histogram: {out}/kept.csv, {out}/histogram.csv")
    if cfg.record:
        digest = hashlib.sha256(Path(cfg.weights).expanduser().read_bytes()).hexdigest()
        record = {"claim": cfg.claim, "value": metrics["top1"], "weights_sha256": digest, "n": len(found["right"])}
        target = Path(__file__).parent / f"results/external/{digest[:12]}_{data.name}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(
            json.dumps({**record, "metrics": metrics | extra, **runs.provenance(fabric.device)}, indent=1) + "\n"
        )
        print(f"recorded in {target}")


def write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


if __name__ == "__main__":
    main()
