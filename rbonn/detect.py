"""Train a Faster R-CNN on a binary backbone.

python detect.py                                                      generated scenes, minutes on two cores
python detect.py experiment=voc_detection data.root=/datasets/VOCdevkit init.weights=rbonn18.ckpt
"""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import ConcatDataset
from torchvision.models.detection import FasterRCNN

from common import runs
from common.data.batches import Plan, SeededBatches, stream
from common.data.detection import (
    SETS,
    VOC_CLASSES,
    DetectionSet,
    TorchvisionDetection,
    coco_detection,
    collate,
    detection_sets,
    voc_detection,
)
from common.data.files import identity
from common.data.vision import data_root
from common.loop import Means, Progress, bar, preflight, sync_norm
from common.metrics.detection import detection_metrics
from common.scripts import script
from rbonn.binarize import parameter_groups
from rbonn.checkpoint import resume, state
from rbonn.detection import freeze_norms
from rbonn.layers import anneal
from rbonn.network import build_detector
from rbonn.recurrent import Recurrence
from rbonn.schedule import lr_at
from rbonn.stages import REQUIRED, load_backbone, weights_identity


def rate(cfg: DictConfig, epoch: int, step: int) -> float:
    """Learning rate of a step counted from 0 over all epochs: that of its epoch, times a linear warm-up."""
    own = {k: cfg.schedule[k] for k in ("kind", "milestones", "gamma")}
    first = cfg.schedule.warmup_factor
    warm = min(1.0, first + (1 - first) * step / max(1, cfg.schedule.warmup))
    return warm * lr_at(epoch, base_lr=cfg.optim.lr, epochs=cfg.train.epochs, **own)


def train_one_epoch(fabric: Fabric, model, network, optimizer, batches, *, epoch: int, cfg, run) -> dict[str, float]:
    """One pass over the training set; returns the mean of every loss term over its images."""
    model.train()
    freeze_norms(network)
    means = Means()
    for k, (images, targets) in enumerate(bar(batches.epoch(epoch), total=len(batches), title=f"epoch {epoch}")):
        step = (epoch - 1) * len(batches) + k
        for group in optimizer.param_groups:
            group["lr"] = rate(cfg, epoch, step) * group["lr_mult"]
        terms = model(images, targets)
        loss = sum(terms.values())
        fabric.backward(loss)
        norm = fabric.clip_gradients(model, optimizer, max_norm=cfg.train.clip_norm, error_if_nonfinite=False)
        means.add({**terms, "loss": loss}, len(images))
        means.check(step=step, norm=norm, last_good=run.checkpoint, precision=cfg.fabric.precision)
        optimizer.step()  # its hook hands the gradients to the recurrent layers
        optimizer.zero_grad(set_to_none=True)
    return means.result(fabric)


@torch.no_grad()
def predict(fabric: Fabric, network, dataset: DetectionSet, *, batch_size: int) -> dict[int, dict[str, Tensor]]:
    """{image id: boxes, scores, labels from 0} of every image, on the CPU of every rank."""
    network.eval()
    found: dict[int, dict[str, Tensor]] = {}
    mine = range(fabric.global_rank, len(dataset), fabric.world_size)
    for start in range(0, len(mine), batch_size):
        items = [dataset[i] for i in mine[start : start + batch_size]]
        images = [image.as_subclass(Tensor).float().to(fabric.device) / 255 for image, _ in items]
        for (_, target), out in zip(items, network(images), strict=True):
            out = {k: v.float().cpu() if v.is_floating_point() else v.cpu() for k, v in out.items()}
            found[target["image_id"]] = {**out, "labels": out["labels"] - 1}
    if fabric.world_size > 1:
        parts: list[Any] = [None] * fabric.world_size
        torch.distributed.all_gather_object(parts, found)
        found = {k: v for part in parts for k, v in part.items()}
    return found


def evaluate_detector(fabric: Fabric, network, dataset: DetectionSet, *, batch_size: int) -> dict[str, float]:
    """COCO AP and VOC mAP of a detector on a test set."""
    return detection_metrics(dataset, predict(fabric, network, dataset, batch_size=batch_size))


def test_scenes(data: Mapping[str, Any], *, seed: int) -> DetectionSet:
    """The test images alone of a node `data`; see `common.data.detection.detection_sets`."""
    check_data(data)
    if data["name"] == "scenes":
        return detection_sets(
            seed=seed, **{k: v for k, v in data.items() if k not in ("workers", "repeat")} | {"train": 1}
        )[1]
    if data["name"] == "coco":
        return coco_detection(data["root"], str(data["test"]), labels="contiguous")
    names = VOC_CLASSES if data.get("classes") is None else tuple(data["classes"])
    return voc_detection(
        data_root(data["root"]) / data["voc_test"], str(data["test"]), classes=names, labels="contiguous"
    )


test_scenes.__test__ = False  # type: ignore[attr-defined]


def check_data(data: Mapping[str, Any]) -> None:
    """ValueError for an unknown set, or for a root where the set is generated; reads nothing."""
    if data["name"] not in SETS:
        raise ValueError(f"data.name={data['name']!r}, allowed: {', '.join(SETS)}")
    if data["name"] == "scenes" and data.get("root"):
        raise ValueError(
            f"data.root={data['root']}: scenes are generated; name the set at the root with data.name=coco or voc"
        )


def build(cfg: DictConfig, classes: int) -> FasterRCNN:
    """The detector of a configuration, with weights drawn from its seed, its backbone from init.weights if given."""
    torch.manual_seed(stream(cfg.seed))
    model = build_detector(detector=cfg.detector, method=cfg.method, sign_zero=cfg.parity.sign_zero, classes=classes)
    if cfg.init.weights is not None and not (cfg.preflight and not Path(cfg.init.weights).expanduser().is_file()):
        load_backbone(model, cfg.init.weights)
    return model


def check(cfg: DictConfig) -> None:
    """ValueError or `RunError` for what would otherwise be found out late; reads no data and trains nothing."""
    runs.plain(cfg)
    if (
        cfg.train.epochs < 1
        or cfg.data.repeat < 1
        or cfg.schedule.warmup < 0
        or not 0 <= cfg.schedule.warmup_factor <= 1
    ):
        raise ValueError(
            f"train.epochs={cfg.train.epochs} and data.repeat={cfg.data.repeat} must be >= 1, schedule.warmup="
            f"{cfg.schedule.warmup} >= 0, schedule.warmup_factor={cfg.schedule.warmup_factor} in 0..1"
        )
    if not cfg.train.clip_norm > 0:
        raise ValueError(f"train.clip_norm={cfg.train.clip_norm}, allowed: > 0")
    rate(cfg, 1, 0)
    check_data(cfg.data)
    with torch.device("meta"):  # nothing is computed
        build_detector(detector=cfg.detector, method=cfg.method, sign_zero=cfg.parity.sign_zero, classes=2)
    if cfg.init.weights == REQUIRED and not cfg.preflight:
        raise ValueError(
            "init.weights is not set, and this recipe needs it: give init.weights=<last.ckpt of a classifier>"
        )
    if cfg.init.weights is None and cfg.detector.frozen_stages:
        raise ValueError(
            f"detector.frozen_stages={cfg.detector.frozen_stages} freezes weights that nothing has trained: give init.weights=<a "
            "checkpoint of train.py>, or frozen_stages=0"
        )
    if cfg.init.weights is not None and not Path(cfg.init.weights).expanduser().is_file() and not cfg.preflight:
        raise FileNotFoundError(f"no backbone at init.weights={cfg.init.weights}: train it with train.py first")


def source_of(data: DictConfig, parts: list[DetectionSet]) -> dict[str, Any]:
    """The identity of the training images and their annotations; {} for generated ones."""
    if data.name == "scenes":
        return {}
    files = [part.folder / info["file_name"] for part in parts for info in part.infos]
    objects = sum(len(part.coco["annotations"]) for part in parts)
    return identity(data.name, files, root=data.root, objects=objects, classes=len(parts[0].classes))


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Build, train to the end, evaluate; resumes from out/last.ckpt."""
    check(cfg)
    runs.per_device_batch(cfg.train.batch_size, fabric.world_size)
    training, held_out = detection_sets(
        seed=cfg.seed, **{k: v for k, v in cfg.data.items() if k not in ("workers", "repeat")}
    )
    parts = training.datasets if isinstance(training, ConcatDataset) else [training]
    for split, sets in ((cfg.data.train, parts), (cfg.data.test, [held_out])):
        if not any(part.coco["annotations"] for part in sets):
            raise ValueError(f"the split {split} of {cfg.data.name} under data.root={cfg.data.root} names no object")
    training = ConcatDataset([training] * cfg.data.repeat)  # passes over the training set per epoch
    plan = Plan.of(cfg.train, len(training), fabric, seed=cfg.seed)
    network = sync_norm(fabric, build(cfg, len(held_out.classes)))
    begun = {} if cfg.init.weights is None else {"init": weights_identity(network)}
    groups = parameter_groups(
        network, lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay, u_lr_mult=cfg.optim.u_lr_mult
    )
    torch_optimizer = torch.optim.SGD(groups, lr=cfg.optim.lr, momentum=cfg.optim.momentum)
    model, optimizer = fabric.setup(network, torch_optimizer)
    recurrence = Recurrence(network, torch_optimizer)
    batches = SeededBatches(
        TorchvisionDetection(training), plan, workers=cfg.data.workers, device=fabric.device, collate=collate
    )
    if cfg.preflight:
        model.train()
        images, targets = next(iter(batches.epoch(1)))
        preflight(
            fabric, lambda: fabric.backward(sum(model(images, targets).values())), what=f"{len(images)} images",
            parameters=sum(p.numel() for p in network.parameters()), steps=len(batches) * cfg.train.epochs,
        )  # fmt: skip
        return
    if (run := runs.Run.open(out, cfg, fabric, data=source_of(cfg.data, parts) | begun)) is not None:
        with run:
            train(fabric, run, cfg, held_out, (model, network), optimizer, recurrence, batches)


def train(fabric: Fabric, run: runs.Run, cfg, held_out: DetectionSet, models, optimizer, recurrence, batches) -> None:
    """The epochs from the last checkpoint on, then the evaluation. models: as Fabric wraps it, and bare."""
    model, network = models
    first, rows = resume(run.load_checkpoint(), network, optimizer, recurrence)
    epochs, plan, transform = cfg.train.epochs, batches.plan, network.transform
    normalise = {"mean": list(transform.image_mean), "std": list(transform.image_std)}  # the network does it by itself
    about = {"classes": list(held_out.classes), "channels": 3, "size": transform.min_size[-1], "normalise": normalise}
    fabric.print(
        f"{cfg.arm} on {cfg.data.name}: {plan.size} images, {len(held_out.classes)} classes, {plan}, lr {cfg.optim.lr}, "
        f"epochs {first}..{epochs}"
    )
    progress = Progress(fabric, run, first=first, last=epochs, every=1)
    for epoch in range(first, epochs + 1):
        torch.manual_seed(stream(cfg.seed, epoch, fabric.global_rank))  # proposals are sampled from this stream
        anneal(network, (epoch - 1) / epochs)
        row = train_one_epoch(fabric, model, network, optimizer, batches, epoch=epoch, cfg=cfg, run=run)
        row = {"lr": rate(cfg, epoch, epoch * len(batches) - 1), **row}
        rows.append(row | recurrence.counters())
        progress.report(epoch, rows[-1], images=plan.steps * plan.batch_size)
        if epoch % cfg.train.save_every == 0 or epoch == epochs:
            more = {"epoch": epoch, "rows": rows, "about": about, "config": run.config}
            run.save_checkpoint(state(network, optimizer, recurrence, **more))
    metrics = evaluate_detector(fabric, network, held_out, batch_size=cfg.evaluate.batch_size)
    metrics["last_loss"] = rows[-1]["loss"]
    for name in [n for n in rows[-1] if n in ("flip_rate", "active_share", "lookahead_flips")]:
        metrics[name] = sum(r[name] for r in rows) / len(rows)
    run.finish(metrics)
    fabric.print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


main = script("detect", fit)


if __name__ == "__main__":
    main()
