"""Evaluate a checkpoint of train.py, or official DETR or SMCA-DETR weights: AP by pycocotools, and the VOC mAP.

python evaluate.py weights=runs/default/drd/seed0/last.ckpt
python evaluate.py weights=detr-r50.pth data.root=/datasets/coco claim=released_detr_r50 record=true
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from common import runs
from common.data.detection import detection_sets
from common.metrics.claims import load_claims
from common.metrics.detection import detection_metrics
from q_detr.building import KINDS, load_official, rebuild
from q_detr.data import num_classes
from q_detr.detr import DETR
from q_detr.train import predict


def load(path: str, data: dict[str, Any]) -> tuple[DETR, str, dict[str, Any]]:
    """(network in evaluation mode, loss kind, keys of its data set with those of `data`): our own checkpoint, or official
    weights, which are evaluated on COCO unless `data` says otherwise."""
    state = runs.load_checkpoint(path)
    if "config" in state and "classes" in state:
        network, state = rebuild(path)
        trained = state["config"]
        return network, KINDS[trained["model"]["kind"]][1], {"seed": trained["seed"], **trained["data"], **data}
    network, loss = load_official(path)
    coco = OmegaConf.to_container(OmegaConf.load(Path(__file__).parent / "configs/data/coco.yaml"))
    return network, loss, {"seed": 0, **coco, **data}  # type: ignore[dict-item]


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    known = {c["id"] for c in load_claims(Path(__file__).parent) if c["kind"] == "released_weights"}
    if cfg.claim is not None and cfg.claim not in known:
        raise ValueError(f"claim={cfg.claim!r}, allowed: {', '.join(sorted(known))}")
    given = {k: v for k, v in OmegaConf.to_container(cfg.data).items() if v is not None}  # type: ignore[union-attr]
    network, loss, data = load(cfg.weights, given)  # type: ignore[arg-type]
    own = {k: v for k, v in data.items() if k not in ("workers", "augment", "test_side")}
    held_out = detection_sets(**{**own, "train": own["test"] if own["name"] == "coco" else own["train"]})[1]
    if (needed := num_classes(held_out)) != network.num_classes:
        raise ValueError(
            f"{cfg.weights} has {network.num_classes} classes, {own['name']} needs {needed} ({own['labels']})"
        )
    fabric = runs.launch(cfg.fabric)
    network = fabric.setup_module(network)
    found = predict(fabric, network, held_out, loss=loss, batch_size=cfg.batch_size, side=data["test_side"])
    metrics = {k: 100 * v for k, v in detection_metrics(held_out, found, difficult=cfg.difficult).items()}
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
