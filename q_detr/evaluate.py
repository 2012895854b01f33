"""Evaluate a checkpoint of train.py, or official DETR or SMCA-DETR weights: AP by pycocotools, and the VOC mAP.

python evaluate.py weights=runs/default/drd/seed0/last.ckpt
python evaluate.py weights=detr-r50.pth +model=detr_r50 +data=coco data.root=/datasets/coco claim=released_detr_r50 record=true
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from common import runs
from common.metrics.claims import load_claims
from q_detr.building import KINDS, load_official, rebuild
from q_detr.data import build_data, detection_metrics, num_classes
from q_detr.train import predict


def load(cfg: DictConfig) -> tuple[Any, str, dict[str, Any]]:
    """(network, loss kind, keys of the data set). ValueError if official weights lack model or data."""
    model, data = (OmegaConf.to_container(cfg[k]) for k in ("model", "data"))
    if "model" in (state := runs.load_checkpoint(cfg.weights)) and "config" in state:
        network, state = rebuild(cfg.weights)
        trained = state["config"]
        return network, KINDS[trained["model"]["kind"]][1], {"seed": trained["seed"], **trained["data"], **data}  # type: ignore[dict-item]
    if not model or "name" not in data:  # type: ignore[operator]
        raise ValueError(
            f"{cfg.weights} is no checkpoint of train.py: give +model=detr_r50 and +data=coco for official weights"
        )
    network = load_official(cfg.weights, num_classes=cfg.num_classes, **{**model, "weights": None})  # type: ignore[dict-item]
    return network, KINDS[model["kind"]][1], {"seed": 0, **data}  # type: ignore[index,dict-item]


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    known = {c["id"] for c in load_claims(Path(__file__).parent) if c["kind"] == "released_weights"}
    if cfg.claim is not None and cfg.claim not in known:
        raise ValueError(f"claim={cfg.claim!r}, allowed: {', '.join(sorted(known))}")
    network, loss, data = load(cfg)
    own = {k: v for k, v in data.items() if k not in ("workers", "augment", "test_side")}
    held_out = build_data(**{**own, "train": own["test"] if own["name"] == "coco" else own["train"]})[1]
    if (needed := num_classes(held_out, labels=own["labels"])) != network.num_classes:
        raise ValueError(
            f"{cfg.weights} has {network.num_classes} classes, {own['name']} needs {needed} ({own['labels']})"
        )
    fabric = runs.launch(cfg.fabric)
    network = fabric.setup_module(network)
    found = predict(fabric, network, held_out, loss=loss, batch_size=cfg.batch_size, side=data["test_side"])
    metrics = detection_metrics(held_out, found, labels=own["labels"], difficult=cfg.difficult)
    for name, value in metrics.items():
        print(f"{name:12s} {value:.2f}")
    print(f"{len(held_out)} images, {held_out.dropped} boxes without extent dropped")
    if cfg.record:
        digest = hashlib.sha256(Path(cfg.weights).expanduser().read_bytes()).hexdigest()
        record = {"claim": cfg.claim, "value": metrics["AP"], "weights_sha256": digest, "n": len(held_out)}
        record |= {"data": own["name"], "metrics": metrics, **runs.provenance(fabric.device)}
        target = Path(__file__).parent / f"results/external/{digest[:12]}_{own['name']}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(record, indent=1) + "\n")
        print(f"recorded in {target}")


if __name__ == "__main__":
    main()
