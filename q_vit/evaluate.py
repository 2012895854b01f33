"""Evaluate a checkpoint of train.py, a packed file or one of the released code: top-1, top-5, and what its q and k look like.

python evaluate.py weights=runs/default/both/seed0/last.ckpt
python evaluate.py weights=twobits_deit_small.pth bits=2 data.root=/datasets/imagenet claim=released_deit_s_2 record=true
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch.utils.data import Dataset

from common.loop import Loaded
from common.metrics.external import check_claim, print_metrics, write_record
from common.scripts import script
from q_vit.checkpoint import load
from q_vit.data import build_data, check_data, test_set
from q_vit.metrics import accuracy, query_key_statistics
from q_vit.train import predict

PAPER = Path(__file__).resolve().parent


def test_images(trained: Loaded, data: Mapping[str, Any]) -> tuple[Dataset, str]:
    """(test images as the network wants them, name of the set): the one that a checkpoint was trained on, with the keys of
    `data` that are not null in place of its own; class folders for a released one. ValueError where the classes differ."""
    options = {"name": "folder", **trained.config.get("data", {}), **{k: v for k, v in data.items() if v is not None}}
    name = options["name"]
    if name == "cued_digits":
        check_data(**options)
        return build_data(**{**options, "train_images": 1}).test, name
    test, names, _ = test_set(name, options.get("root"), trained.about)
    wanted = trained.about["classes"]
    same = trained.config.get("data", {}).get("name") == name  # the names of another set may mean the same classes
    if len(names) != len(wanted) or (same and names != wanted):
        different = sorted(set(names) ^ set(wanted))[:5]
        raise ValueError(
            f"the test images of {name} have {len(names)} classes, the model {len(wanted)}; different: {', '.join(different)}"
        )
    return test, name


test_images.__test__ = False  # type: ignore[attr-defined]


def evaluate(cfg: DictConfig, fabric: Fabric) -> dict[str, float]:
    """Prints and returns the metrics of cfg.weights; see configs/evaluate.yaml."""
    check_claim(PAPER, cfg.claim)
    trained = load(cfg.weights, bits=cfg.bits, check_bits=cfg.check_bits)
    test, name = test_images(trained, cfg.data)
    model = fabric.setup_module(trained.model)
    logits, labels = predict(fabric, model, test, batch_size=cfg.batch_size, workers=cfg.workers)
    images = torch.stack([test[i][0] for i in range(min(cfg.statistics_images, len(labels)))]).to(fabric.device)
    metrics = accuracy(logits, labels) | query_key_statistics(model, images)
    print_metrics(metrics, len(labels))
    if cfg.record and fabric.is_global_zero:
        write_record(
            cfg.record_to or PAPER / "results/external", weights=cfg.weights, value=metrics["top1"], n=len(labels), data=name,
            metrics=metrics, claim=cfg.claim, device=fabric.device, bits=trained.about["network"]["bits"],
        )  # fmt: skip
    return metrics


main = script("evaluate", evaluate)


if __name__ == "__main__":
    main()
