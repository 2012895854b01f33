"""Evaluate a checkpoint of train.py: experts single and together, per group and class, calibrated or not.

python evaluate.py weights=runs/default/nclpp/seed0/last.ckpt
python evaluate.py weights=... data.root=/datasets groups=official prior=backward prior_ratio=50
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from common import runs
from ncl_pp.data import LongTailed, build_data
from ncl_pp.metrics import expert_metrics, per_class_accuracy
from ncl_pp.model import Experts, NCLModel, ensemble
from ncl_pp.train import predict

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


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds: the experts in evaluation mode, the configuration, the classes and their training counts."""

    model: Experts
    config: DictConfig
    counts: list[int]
    classes: list[str]
    channels: int

    def data(self) -> LongTailed:
        """The data set of the checkpoint, found under its (or the replaced) root."""
        data = build_data(seed=self.config.seed, **self.config.data)
        if len(data.counts) != len(self.counts):
            raise ValueError(f"{self.config.data.name} has {len(data.counts)} classes, the model {len(self.counts)}")
        return data

    def image_size(self) -> int:
        """Height and width of the test images."""
        return 8 if self.config.data.name == "digits_lt" else self.config.data.size


def load(path: str, data: Mapping[str, Any] | None = None) -> Trained:
    """A checkpoint of train.py; data: keys of its data set to replace, null leaves them.

    FileNotFoundError, `runs.RunError` for a broken file, ValueError for one that train.py did not write."""
    state = runs.load_checkpoint(path)
    if missing := {"model", "config", "counts", "classes", "channels"} - state.keys():
        raise ValueError(f"{path} is no checkpoint of ncl_pp/train.py: it lacks {', '.join(sorted(missing))}")
    cfg: Any = OmegaConf.create(state["config"])
    cfg.data.update({k: v for k, v in (data or {}).items() if v is not None})
    build = {**cfg.model, **({"pretrained": False} if "pretrained" in cfg.model else {})}
    model = Experts(
        num_classes=len(state["counts"]), in_channels=state["channels"], experts=cfg.method.experts, **build
    )
    experts = {k.removeprefix("experts."): v for k, v in state["model"].items() if k.startswith("experts.")}
    model.load_state_dict(experts)
    return Trained(model.eval(), cfg, state["counts"], state["classes"], state["channels"])


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Prints and returns the metrics of cfg.weights; see configs/evaluate.yaml."""
    trained = load(cfg.weights, cfg.data)
    counts = trained.counts
    prior = test_prior(cfg.prior, counts, cfg.prior_ratio)
    fabric = runs.launch(cfg.fabric)
    data = trained.data()
    split = data.split(cfg.split)
    model = fabric.setup_module(NCLModel(trained.model))
    workers = trained.config.data.workers
    logits, labels = predict(fabric, model, split, batch_size=cfg.batch_size, workers=workers)
    groups = cfg.groups or trained.config.evaluate.groups
    metrics = expert_metrics(logits, labels, counts, groups=groups, prior=prior)
    if prior is not None:  # what a test set with these frequencies would give, with and without knowing them
        for name, z in (("known", logits + prior.log()), ("ignored", logits)):
            per_class = per_class_accuracy(ensemble(z).argmax(-1), labels, len(counts))
            metrics[f"top1_ensemble_prior_{name}"] = reweighted(per_class, prior)
    for name, value in metrics.items():
        print(f"{name:28s} {value:.4f}")
    if cfg.per_class:
        per_class = per_class_accuracy(ensemble(logits).argmax(-1), labels, len(counts)).tolist()
        for name, count, value in zip(trained.classes, counts, per_class, strict=True):
            print(f"class {name:20s} trained on {count:6d}  {value:6.2f}")
    if cfg.record and fabric.is_global_zero:
        digest = hashlib.sha256(Path(cfg.weights).expanduser().read_bytes()).hexdigest()
        record = {"claim": None, "value": metrics["top1_ensemble"], "weights_sha256": digest, "n": len(labels)}
        record |= {"data": trained.config.data.name, "split": cfg.split, "metrics": metrics}
        target = Path(cfg.record_to) / f"{digest[:12]}_{trained.config.data.name}_{cfg.split}_{cfg.prior}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(record | runs.provenance(fabric.device), indent=1) + "\n")
        print(f"recorded in {target}")
    return metrics


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    evaluate(cfg)


if __name__ == "__main__":
    main()
