"""Evaluate a checkpoint of train.py, or official DETR or SMCA-DETR weights: the COCO figures by pycocotools, and the VOC mAP.

python evaluate.py weights=runs/default/drd/seed0/last.ckpt [per_class=true]
python evaluate.py weights=detr-r50.pth data.root=/datasets/coco claim=released_detr_r50 record=true
python evaluate.py perfect=true data=voc data.root=/datasets/own      before any training: the annotations fed back must give 100
"""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from common.data.detection import DetectionSet, ground_truth
from common.loop import Loaded
from common.metrics.detection import DIFFICULT, CocoEvaluator, detection_metrics, voc_map
from common.metrics.external import check_claim, print_metrics, write_record
from common.scripts import script
from q_detr.checkpoint import load
from q_detr.data import check_data, num_classes
from q_detr.held_out import held_out_set, objects, predict

HERE = Path(__file__).parent
Found = dict[int, dict[str, Tensor]]


def data_of(trained: Loaded | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The data set of a checkpoint, for released weights COCO, with the keys of `given` in place of its own."""
    coco = OmegaConf.to_container(OmegaConf.load(HERE / "configs/data/coco.yaml"))
    config = trained.config if trained is not None else {}
    data = {"seed": config.get("seed", 0), **config.get("data", coco), **given}  # type: ignore[dict-item]
    check_data(data)
    return data


def annotations_as_detections(held_out: DetectionSet) -> Found:
    """The ground truth without crowd regions, with score 1: AP is 1 if loader, evaluator and ids agree."""
    found = {}
    for image_id, t in ground_truth(held_out).items():
        boxes, labels = t["boxes"].as_subclass(Tensor)[t["iscrowd"] == 0], t["labels"][t["iscrowd"] == 0]
        found[image_id] = {"boxes": boxes, "labels": labels, "scores": torch.ones(len(labels))}
    return found


def known_labels(held_out: DetectionSet) -> dict[int, int]:
    """{label: category id}; gaps between the ids are no class."""
    ids = held_out.category_ids
    return dict(zip(range(len(ids)) if held_out.labels == "contiguous" else ids, ids, strict=True))


def kept(p: Mapping[str, Tensor], labels: Mapping[int, int]) -> dict[str, Tensor]:
    """The detections (or objects) whose label is a category, their labels replaced by the values of `labels`."""
    known = torch.isin(p["labels"], torch.tensor(list(labels)))
    own = {k: v[known] for k, v in p.items()}
    return {**own, "labels": torch.tensor([labels[i] for i in own["labels"].tolist()], dtype=torch.int64)}


def coco_rows(found: Found, labels: Mapping[int, int]) -> Iterator[dict[str, Any]]:
    """Detections in the format of COCO's results. labels: {label of the network: category id}."""
    for image_id, p in found.items():
        own = kept(p, labels)
        for (x0, y0, x1, y1), c, s in zip(
            own["boxes"].tolist(), own["labels"].tolist(), own["scores"].tolist(), strict=True
        ):
            box = [round(v, 3) for v in (x0, y0, x1 - x0, y1 - y0)]
            yield {"image_id": image_id, "category_id": c, "bbox": box, "score": round(s, 6)}


def recalls(held_out: DetectionSet, found: Found, difficult: str) -> dict[str, float]:
    """The six average recalls of COCO in 0..1, without the sizes that the set has not."""
    sized = [a for a in held_out.coco["annotations"] if min(a["bbox"][2:]) > 0]
    evaluator = CocoEvaluator({**held_out.coco, "annotations": sized}, difficult=difficult)
    evaluator.update({i: kept(p, known_labels(held_out)) for i, p in found.items()})
    return {k: v for k, v in evaluator.compute().items() if k.startswith("AR") and v >= 0}


def class_ap50(held_out: DetectionSet, found: Found, difficult: str) -> dict[str, float]:
    """{class name: VOC AP at IoU 0.5} of the classes that occur; crowd regions count neither way."""
    position = {label: i for i, label in enumerate(known_labels(held_out))}
    truth = {k: kept(t, position) for k, t in ground_truth(held_out).items()}
    if difficult == "ignore":
        truth = {k: {**t, "difficult": t["difficult"] | t["iscrowd"]} for k, t in truth.items()}
    predictions = {k: kept(p, position) for k, p in found.items()}
    result = voc_map(predictions, truth, num_classes=len(position), difficult=difficult)
    return {name: ap for name, ap in zip(held_out.classes, result["per_class"], strict=True) if ap == ap}


def check(cfg: DictConfig, *, grouped: bool) -> None:
    check_claim(HERE, cfg.claim)
    if (cfg.weights is None) != cfg.perfect or (cfg.perfect and cfg.record):
        raise ValueError("give either weights=<checkpoint> or perfect=true, of which there is nothing to record")
    if cfg.perfect and not grouped:
        raise ValueError("perfect=true needs a data set: data=coco, data=voc or another file of configs/data")
    if cfg.difficult not in DIFFICULT:
        raise ValueError(f"difficult={cfg.difficult!r}, allowed: {', '.join(DIFFICULT)}")
    if cfg.results is not None and not str(cfg.results).endswith(".json"):
        raise ValueError(f"results={cfg.results}: give a name that ends in .json")


def detections(cfg: DictConfig, fabric: Fabric, given: Mapping[str, Any]) -> tuple[DetectionSet, Found, str]:
    """(test set, detections on it, name of the set) of the weights, or of its own annotations."""
    trained = None if cfg.perfect else load(cfg.weights)
    data = data_of(trained, given)
    held_out = held_out_set(data)
    if not objects(held_out):
        raise ValueError(
            f"the split {data['test']} of {data['name']} has no object (crowd regions do not count): there is no AP on it"
        )
    classes = num_classes(held_out)
    if trained is None:
        print(f"{len(held_out.classes)} classes, labels={held_out.labels}: a model needs num_classes={classes}")
        return held_out, annotations_as_detections(held_out), data["name"]
    if classes != trained.about["num_classes"]:
        raise ValueError(
            f"{cfg.weights} has {trained.about['num_classes']} classes, {data['name']} with data.labels={data['labels']} needs "
            f"{classes}. Official weights know COCO's ids; train on own classes with start.weights=... start.new_classes=true"
        )
    theirs = trained.about["classes"]
    if trained.config and list(held_out.classes) != theirs:
        raise ValueError(f"{cfg.weights} knows {', '.join(theirs)}; {data['name']} has {', '.join(held_out.classes)}")
    network = fabric.setup_module(trained.model)
    start = time.perf_counter()
    options = {"loss": trained.about["loss"], "side": data["test_side"], "batch_size": cfg.batch_size}
    found = predict(fabric, network, held_out, workers=cfg.workers, **options)
    seconds = (time.perf_counter() - start) / len(held_out)
    print(f"{1000 * seconds:.0f} ms per image, loading included, on {fabric.device}")
    return held_out, found, data["name"]


def evaluate(cfg: DictConfig, fabric: Fabric, *, grouped: bool) -> dict[str, float]:
    """Prints and returns the metrics in percent; see configs/evaluate.yaml. grouped: data=... chose a whole data set; otherwise
    only what is set under `data` replaces the keys of the checkpoint's own set."""
    check(cfg, grouped=grouped)
    given = {k: v for k, v in OmegaConf.to_container(cfg.data).items() if grouped or v is not None}  # type: ignore[union-attr]
    held_out, found, name = detections(cfg, fabric, given)  # type: ignore[arg-type]
    figures = detection_metrics(held_out, found, difficult=cfg.difficult) | recalls(held_out, found, cfg.difficult)
    metrics = {k: 100 * v for k, v in figures.items()}
    if cfg.results is not None and fabric.is_global_zero:
        rows = list(coco_rows(found, known_labels(held_out)))
        Path(cfg.results).expanduser().write_text(json.dumps(rows))
        print(f"{len(rows)} detections in {cfg.results}")
    print_metrics(metrics, len(held_out))
    print(f"{held_out.dropped} boxes without extent dropped")
    if cfg.per_class:
        for label, value in class_ap50(held_out, found, cfg.difficult).items():
            print(f"class {label:20s} AP50 {100 * value:.2f}")
    if cfg.perfect and metrics["AP"] < 99.999:
        raise ValueError(
            f"the annotations fed back give AP {metrics['AP']:.2f}, not 100: boxes reach beyond their image, or an "
            "image has more than the 100 objects that the evaluation counts"
        )
    if cfg.record and fabric.is_global_zero:
        write_record(
            cfg.record_to or HERE / "results/external", weights=cfg.weights, value=metrics["AP"], n=len(held_out), data=name,
            metrics=metrics, claim=cfg.claim, device=fabric.device,
        )  # fmt: skip
    return metrics


@script("evaluate")
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    evaluate(cfg, fabric, grouped=HydraConfig.get().runtime.choices.get("data") is not None)


if __name__ == "__main__":
    main()
