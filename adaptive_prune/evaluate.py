"""Evaluate a checkpoint of train.py or published dense weights: accuracy, MACs, kept tokens per stage and their histogram.

python evaluate.py weights=runs/default/as/seed0/last.ckpt out=evaluation/
python evaluate.py weights=deit_small.pth data.root=/datasets/imagenet
python evaluate.py weights=runs/default/pretrain/seed0/last.ckpt way=as calibrate=0.5      # thresholds without training
"""

from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf

from adaptive_prune.adaptive_threshold import check_thresholds
from adaptive_prune.budget import check_budget
from adaptive_prune.calibrate import calibrate_on
from adaptive_prune.checkpoint import load
from adaptive_prune.data import Data, build_data
from adaptive_prune.evaluation import evaluate
from adaptive_prune.metrics import histogram
from adaptive_prune.model import INFERENCE, PrunedViT
from common.data.files import Table
from common.loop import Loaded
from common.metrics.external import check_claim, print_metrics, write_record
from common.scripts import script

PAPER = Path(__file__).resolve().parent


def data_of(trained: Loaded, data: Any, *, training: bool = False) -> Data:
    """The test set that a checkpoint was trained for, with the keys of `data` that are not null in place of its own; with
    `training` its training set as well."""
    options = trained.config["data"] | {k: v for k, v in dict(data).items() if v is not None}
    return build_data(seed=trained.config["seed"], **options, about=None if training else trained.about)


def calibrated(fabric: Fabric, pruned: PrunedViT, data: Data, cfg: DictConfig) -> dict[str, float]:
    """Thresholds for a budget from training images; returns the accuracy of top-k at the same cost, to be seen beside it."""
    cost = calibrate_on(fabric, pruned, data, cfg.calibration_images, cfg.calibrate, cfg.batch_size)
    top = PrunedViT(
        pruned.vit,
        rule="topk",
        locations=pruned.locations,
        budget=cost,
        score=pruned.score,
        extended_cost=pruned.cost.extended,
    )
    other, _ = evaluate(fabric, top.eval(), data, batch_size=cfg.batch_size, workers=cfg.workers)
    return {"calibrated_macs": cost, "top1_of_topk": other["top1"], "macs_of_topk": other["macs"]}


def check(cfg: DictConfig, pruned: PrunedViT) -> None:
    """ValueError for an option that does not go with the network, before the data are read."""
    if cfg.inference is not None and cfg.inference not in INFERENCE:
        raise ValueError(f"inference={cfg.inference!r}, allowed: {', '.join(INFERENCE)}")
    for option in ("thresholds", "calibrate", "inference"):
        if cfg[option] is not None and pruned.rule != "threshold":
            raise ValueError(
                f"{option}={cfg[option]}: this network drops tokens by rule {pruned.rule!r}; way=as makes it AS-ViT"
            )
    if cfg.out is not None and not pruned.locations:
        raise ValueError(f"out={cfg.out}: this network drops no tokens to be counted; leave out= out")
    if cfg.thresholds is not None:
        check_thresholds(list(cfg.thresholds), len(pruned.locations))
    if cfg.calibrate is not None:
        check_budget(cfg.calibrate, floor=pruned.cost.floor(pruned.locations))


def run(cfg: DictConfig, fabric: Fabric) -> dict[str, float]:
    """Prints and returns the metrics of cfg.weights; see configs/evaluate.yaml."""
    check_claim(PAPER, cfg.claim)
    trained = load(cfg.weights, vit=cfg.vit, way=cfg.way, ema=cfg.ema)
    pruned: Any = trained.model
    check(cfg, pruned)
    data = data_of(trained, OmegaConf.to_container(cfg.data), training=cfg.calibrate is not None)
    pruned = fabric.to_device(pruned)
    if cfg.thresholds is not None:
        pruned.theta.data.copy_(pruned.theta.new_tensor(list(cfg.thresholds)))
    extra = calibrated(fabric, pruned, data, cfg) if cfg.calibrate is not None else {}
    pruned.inference = cfg.inference or pruned.inference
    model = fabric.setup_module(pruned)
    metrics, found = evaluate(fabric, model, data, batch_size=cfg.batch_size, workers=cfg.workers)
    metrics |= extra
    print_metrics(metrics, len(found["right"]))
    if cfg.out is not None:
        write_counts(Path(cfg.out).expanduser(), found)
    if cfg.record and fabric.is_global_zero:
        write_record(
            cfg.record_to or PAPER / "results/external", weights=cfg.weights, value=metrics["top1"], n=len(found["right"]),
            data=data.name, metrics=metrics, claim=cfg.claim, device=fabric.device,
        )  # fmt: skip
    return metrics


def write_counts(out: Path, found: dict) -> None:
    """kept.csv, a row per image, and histogram.csv of what evaluation found."""
    with Table(out / "kept.csv") as table:
        for i, (right, kept) in enumerate(zip(found["right"].tolist(), found["kept"].tolist(), strict=True)):
            table.write({"image": i, "right": int(right), **{f"kept_{s + 1}": int(k) for s, k in enumerate(kept)}})
    with Table(out / "histogram.csv") as table:
        for row in histogram(found["kept"]):
            table.write(row)
    print(f"kept tokens per image and their histogram: {out}/kept.csv, {out}/histogram.csv")


main = script("evaluate", run)


if __name__ == "__main__":
    main()
