"""Evaluate a checkpoint of train.py: experts single and together, per group and class, calibrated or not.

python evaluate.py weights=runs/default/nclpp/seed0/last.ckpt
python evaluate.py weights=... data.root=/datasets groups=official prior=backward prior_ratio=50
"""

from pathlib import Path

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor

from common.metrics.external import check_claim, print_metrics, write_record
from common.scripts import script
from ncl_pp.checkpoint import data_of, load
from ncl_pp.metrics import expert_metrics, groups_of, per_class_accuracy
from ncl_pp.model import NCLModel, ensemble
from ncl_pp.train import predict

PAPER = Path(__file__).resolve().parent
PRIORS = ("uniform", "train", "forward", "backward")


def test_prior(kind: str, class_counts: list[int], ratio: float) -> Tensor | None:
    """Class frequencies (C,) of a shifted test set, by class id; None for a balanced one.

    forward: long-tailed in the order of the training counts, head : tail = ratio; backward: the reverse; train: the
    training counts themselves. ValueError for another name or ratio < 1.
    """
    if kind not in PRIORS or ratio < 1:
        raise ValueError(f"prior={kind!r}, prior_ratio={ratio}, allowed: {', '.join(PRIORS)} and a ratio >= 1")
    counts = torch.tensor(class_counts, dtype=torch.double)
    if kind == "uniform":
        return None
    if kind == "train":
        return counts / counts.sum()
    rank = torch.empty(len(counts), dtype=torch.double)
    rank[torch.argsort(counts, descending=kind == "forward", stable=True)] = torch.arange(len(counts)).double()
    prior = float(ratio) ** (-rank / (len(counts) - 1))
    return prior / prior.sum()


test_prior.__test__ = False  # type: ignore[attr-defined]


def reweighted(metric: Tensor, prior: Tensor) -> float:
    """Accuracy in percent under class frequencies `prior` from per-class accuracies (C,)."""
    return float((metric * prior).nansum() / prior[~metric.isnan()].sum())


def evaluate(cfg: DictConfig, fabric: Fabric) -> dict[str, float]:
    """Prints and returns the metrics of cfg.weights; see configs/evaluate.yaml."""
    check_claim(PAPER, cfg.claim)
    trained = load(cfg.weights)
    counts, classes = trained.about["counts"], trained.about["classes"]
    prior = test_prior(cfg.prior, counts, cfg.prior_ratio)
    groups = cfg.groups or trained.config["evaluate"]["groups"]
    groups_of(counts, groups)
    data = data_of(trained, cfg.data)
    model = fabric.setup_module(NCLModel(trained.model))  # type: ignore[arg-type]
    logits, labels = predict(fabric, model, data.split(cfg.split), batch_size=cfg.batch_size, workers=cfg.workers)
    metrics = expert_metrics(logits, labels, counts, groups=groups, prior=prior)
    if prior is not None:  # what a test set with these frequencies would give, with and without knowing them
        for name, z in (("known", logits + prior.log()), ("ignored", logits)):
            per_class = per_class_accuracy(ensemble(z).argmax(-1), labels, len(counts))
            metrics[f"top1_ensemble_prior_{name}"] = reweighted(per_class, prior)
    print_metrics(metrics, len(labels))
    if cfg.per_class:
        per_class = per_class_accuracy(ensemble(logits).argmax(-1), labels, len(counts)).tolist()
        for name, count, value in zip(classes, counts, per_class, strict=True):
            print(f"class {name:20s} trained on {count:6d}  {value:6.2f}")
    if cfg.record and fabric.is_global_zero:
        write_record(
            cfg.record_to or PAPER / "results/external", weights=cfg.weights, value=metrics["top1_ensemble"], n=len(labels),
            data=f"{cfg.data.get('name') or trained.config['data']['name']}_{cfg.split}_{cfg.prior}", metrics=metrics,
            claim=cfg.claim, device=fabric.device,
        )  # fmt: skip
    return metrics


main = script("evaluate", evaluate)


if __name__ == "__main__":
    main()
