"""Evaluate a checkpoint of train.py, or official DETR or SMCA-DETR weights: AP by pycocotools, and the VOC mAP.

python evaluate.py weights=runs/default/drd/seed0/last.ckpt [per_class=true]
python evaluate.py weights=detr-r50.pth data.root=/datasets/coco claim=released_detr_r50 record=true
python evaluate.py perfect=true data=voc data.root=/datasets/own      before any training: the annotations fed back must give 100
"""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from common import runs
from common.data.detection import DetectionSet, detection_sets, ground_truth
from common.data.vision import data_root
from common.metrics.claims import load_claims
from common.metrics.detection import detection_metrics, voc_map
from q_detr.building import KINDS, load_official, rebuild
from q_detr.data import num_classes, source_options
from q_detr.detr import DETR
from q_detr.train import predict

HERE = Path(__file__).parent


def load(path: str, data: dict[str, Any]) -> tuple[DETR, str, dict[str, Any]]:
    """(network in evaluation mode, loss kind, keys of its data set with those of `data`): our own checkpoint, or official
    weights, which are evaluated on COCO unless `data` says otherwise."""
    state = runs.load_checkpoint(path)
    if "config" in state and "classes" in state:
        network, state = rebuild(path)
        trained = state["config"]
        return network, KINDS[trained["model"]["kind"]][1], {"seed": trained["seed"], **trained["data"], **data}
    network, loss = load_official(path)
    coco = OmegaConf.to_container(OmegaConf.load(HERE / "configs/data/coco.yaml"))
    return network, loss, {"seed": 0, **coco, **data}  # type: ignore[dict-item]


def held_out_set(data: dict[str, Any]) -> DetectionSet:
    """The test set of a data configuration; nothing of the training set needs to be there."""
    own = source_options(data)
    if own["name"] == "scenes":
        return detection_sets(**{**own, "train": 1})[1]
    data_root(own.get("root"))  # the message for an unset root comes before any other
    return detection_sets(**{**own, "train": own["test"], "voc_train": [own.get("voc_test", "VOC2007")]})[1]


def annotations_as_detections(held_out: DetectionSet) -> dict[int, dict[str, Tensor]]:
    """The ground truth without crowd regions, with score 1: AP is 1 if loader, evaluator and ids agree."""
    found = {}
    for image_id, t in ground_truth(held_out).items():
        boxes, labels = t["boxes"].as_subclass(Tensor)[t["iscrowd"] == 0], t["labels"][t["iscrowd"] == 0]
        found[image_id] = {"boxes": boxes, "labels": labels, "scores": torch.ones(len(labels))}
    return found


def class_ap50(held_out: DetectionSet, found: dict[int, dict[str, Tensor]], difficult: str) -> dict[str, float]:
    """{class name: VOC AP at IoU 0.5} of the classes that occur; crowd regions count neither way."""
    contiguous = held_out.labels == "contiguous"
    names = dict(
        zip(range(len(held_out.classes)) if contiguous else held_out.category_ids, held_out.classes, strict=True)
    )
    position = {label: i for i, label in enumerate(names)}

    def kept(p: dict[str, Tensor]) -> dict[str, Tensor]:  # labels become positions; gaps between the ids are no class
        known = torch.isin(p["labels"], torch.tensor(list(position)))
        own = {k: v[known] for k, v in p.items()}
        return {**own, "labels": torch.tensor([position[i] for i in own["labels"].tolist()], dtype=torch.int64)}

    truth = {k: kept(t) for k, t in ground_truth(held_out).items()}
    if difficult == "ignore":
        truth = {k: {**t, "difficult": t["difficult"] | t["iscrowd"]} for k, t in truth.items()}
    result = voc_map({k: kept(p) for k, p in found.items()}, truth, num_classes=len(names), difficult=difficult)
    return {name: ap for name, ap in zip(names.values(), result["per_class"], strict=True) if ap == ap}


def evaluate(cfg: DictConfig, *, grouped: bool) -> dict[str, float]:
    """What the script does; returns the metrics in percent. grouped: data=... chose a whole data set; otherwise only what is set
    under `data` replaces the keys of the checkpoint's own set."""
    known = {c["id"] for c in load_claims(HERE) if c["kind"] == "released_weights"}
    if cfg.claim is not None and cfg.claim not in known:
        raise ValueError(f"claim={cfg.claim!r}, allowed: {', '.join(sorted(known))}")
    if (cfg.weights is None) != cfg.perfect or (cfg.perfect and cfg.record):
        raise ValueError("give either weights=<checkpoint> or perfect=true, of which there is nothing to record")
    if cfg.perfect and not grouped:
        raise ValueError("perfect=true needs a data set: data=coco, data=voc or another file of configs/data")
    given = {k: v for k, v in OmegaConf.to_container(cfg.data).items() if grouped or v is not None}  # type: ignore[union-attr]
    fabric = runs.launch(cfg.fabric)
    if cfg.perfect:
        held_out = held_out_set({"seed": 0, **given})  # type: ignore[dict-item]
        found = annotations_as_detections(held_out)
        classes = num_classes(held_out)
        print(f"{len(held_out.classes)} classes, labels={held_out.labels}: a model needs num_classes={classes}")
    else:
        network, loss, data = load(cfg.weights, given)  # type: ignore[arg-type]
        held_out = held_out_set(data)
        if (needed := num_classes(held_out)) != network.num_classes:
            raise ValueError(
                f"{cfg.weights} has {network.num_classes} classes, {data['name']} with data.labels={data['labels']} needs "
                f"{needed}. Official weights know COCO's ids only; train on own classes with start.weights=... "
                "start.new_classes=true"
            )
        network = fabric.setup_module(network)
        start = time.perf_counter()
        found = predict(fabric, network, held_out, loss=loss, batch_size=cfg.batch_size, side=data["test_side"])
        seconds = (time.perf_counter() - start) / len(held_out)
        print(f"{1000 * seconds:.0f} ms per image, loading included, on {fabric.device}")
    metrics = {k: 100 * v for k, v in detection_metrics(held_out, found, difficult=cfg.difficult).items()}
    for name, value in metrics.items():
        print(f"{name:12s} {value:.2f}")
    if cfg.per_class:
        for name, value in class_ap50(held_out, found, cfg.difficult).items():
            print(f"  AP50 {name:16s} {100 * value:.2f}")
    print(f"{len(held_out)} images, {held_out.dropped} boxes without extent dropped")
    if cfg.perfect and metrics["AP"] < 99.999:
        raise ValueError(
            f"the annotations fed back give AP {metrics['AP']:.2f}, not 100: boxes reach beyond their image, or an "
            "image has more than the 100 objects that the evaluation counts"
        )
    if cfg.record:
        digest = hashlib.sha256(Path(cfg.weights).expanduser().read_bytes()).hexdigest()
        record = {"claim": cfg.claim, "value": metrics["AP"], "weights_sha256": digest, "n": len(held_out)}
        record |= {"data": data["name"], "metrics": metrics, **runs.provenance(fabric.device)}
        target = Path(cfg.record_to or HERE / "results/external") / f"{digest[:12]}_{data['name']}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(record, indent=1) + "\n")
        print(f"recorded in {target}")
    return metrics


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    evaluate(cfg, grouped=HydraConfig.get().runtime.choices.get("data") is not None)


if __name__ == "__main__":
    main()
