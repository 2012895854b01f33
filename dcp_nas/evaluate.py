"""Evaluate a checkpoint of train.py (or a packed file of export.py) on its test set or another, with its cost.

python evaluate.py weights=runs/default/dcp_ggn_do/seed0/last.ckpt
python evaluate.py weights=last.ckpt data.root=/datasets/imagenet record=true
"""

from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf

from common.loop import Loaded
from common.metrics.external import check_claim, print_metrics, write_record
from common.scripts import script
from dcp_nas.checkpoint import load, untrained
from dcp_nas.counts import count
from dcp_nas.data import build_test
from dcp_nas.train import classification_metrics, predict

PAPER = Path(__file__).resolve().parent


def test_options(trained: Loaded, given: DictConfig) -> dict[str, Any]:
    """The node `data` of a checkpoint with the keys of `given` that are not null in place of its own; another set keeps the size
    that the network was trained on."""
    own = {**trained.about["data"], "root": trained.config.get("data", {}).get("root")}
    new = {k: v for k, v in OmegaConf.to_container(given).items() if v is not None}  # type: ignore[union-attr]
    if new.get("name", own["name"]) != own["name"]:
        own = {"size": trained.about["size"]}
    return own | new


test_options.__test__ = False  # type: ignore[attr-defined]


def evaluate(cfg: DictConfig, fabric: Fabric) -> dict[str, float]:
    """Prints and returns the metrics of cfg.weights; see configs/evaluate.yaml."""
    check_claim(PAPER, cfg.claim)
    trained = load(cfg.weights)
    options, about = test_options(trained, cfg.data), trained.about
    test, classes, look, _ = build_test(seed=about["seed"], **options)
    if list(classes) != about["classes"]:
        different = sorted(set(classes) ^ set(about["classes"]))
        raise ValueError(
            f"{cfg.weights} knows {len(about['classes'])} classes, the data {len(classes)}: {', '.join(different[:10])} differ"
        )
    if look["normalise"] != about["normalise"] or look["size"] != about["size"]:
        raise ValueError(
            f"{cfg.weights} was trained on images of {about['size']} normalised by {about['normalise']}, {options['name']} gives "
            f"{look['size']} and {look['normalise']}"
        )
    with torch.device("meta"):  # of the network that was trained, also where the file is a packed one
        counts = count(
            untrained(trained.config, about), torch.empty(1, about["channels"], about["size"], about["size"])
        )
    model = fabric.setup_module(trained.model)
    logits, labels = predict(fabric, model, test, batch_size=cfg.batch_size, workers=cfg.workers)
    metrics = classification_metrics(logits, labels)
    print_metrics(metrics, len(labels))
    print("  ".join(f"{name} {value:,}" for name, value in counts.items()))
    if cfg.record and fabric.is_global_zero:
        write_record(
            cfg.record_to or PAPER / "results/external", weights=cfg.weights, value=metrics["top1"], n=len(labels),
            data=options["name"], metrics=metrics, claim=cfg.claim, device=fabric.device, counts=counts,
            genotype=about["genotype"],
        )  # fmt: skip
    return metrics


main = script("evaluate", evaluate)


if __name__ == "__main__":
    main()
