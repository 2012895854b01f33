"""Train a Faster R-CNN on a 1-bit backbone of a genotype.

python detect.py                                                      generated scenes, minutes on two cores
python detect.py genotype=file genotype.file=runs/.../genotype.json
python detect.py experiment=voc_detection data.root=/datasets/VOCdevkit init.weights=dcp_nas_l.ckpt
"""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from pathlib import Path

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import ConcatDataset
from torchvision.models.detection import FasterRCNN

from common import runs
from common.data.batches import Plan, SeededBatches, stream
from common.data.detection import SETS, TorchvisionDetection, collate, detection_sets
from common.data.files import identity
from common.loop import Means, Progress, bar, preflight, sync_norm
from common.metrics.detection import detection_metrics
from common.scripts import script
from dcp_nas.checkpoint import build_network, check_start, load_backbone, state
from dcp_nas.genotypes import find_genotype
from dcp_nas.search_space import Genotype
from dcp_nas.transfer.detection import faster_rcnn


def step_lr(epoch: int, *, lr: float, milestones: list[int], warmup_share: float) -> float:
    """lr / 10 for every milestone reached (a milestone counts from its own epoch on), times the warm-up share."""
    return lr * warmup_share * 0.1 ** sum(epoch >= m for m in milestones)


def train_one_epoch(fabric: Fabric, model, optimizer, batches, *, epoch, cfg, run) -> dict[str, float]:
    """One pass over the training set; returns the mean of every loss term."""
    model.train()
    means = Means()
    for k, (images, targets) in enumerate(bar(batches.epoch(epoch), total=len(batches), title=f"epoch {epoch}")):
        step = (epoch - 1) * len(batches) + k
        share = min(1.0, (step + 1) / max(1, cfg.optim.warmup))
        lr = step_lr(epoch, lr=cfg.optim.lr, milestones=list(cfg.optim.milestones), warmup_share=share)
        for group in optimizer.param_groups:
            group["lr"] = lr
        terms = model(images, targets)
        loss = sum(terms.values())
        fabric.backward(loss)
        means.add({**terms, "loss": loss}, len(images))
        norm = fabric.clip_gradients(model, optimizer, max_norm=cfg.train.clip_norm, error_if_nonfinite=False)
        means.check(step=step, norm=norm, last_good=run.checkpoint, precision=cfg.fabric.precision)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return means.result(fabric)


@torch.no_grad()
def predict(fabric: Fabric, network, dataset, *, batch_size: int) -> dict[int, dict[str, Tensor]]:
    """{image id: boxes, scores, labels from 0} of every image; every rank does all of them."""
    network.eval()
    found = {}
    for start in range(0, len(dataset), batch_size):
        items = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        images = [image.as_subclass(Tensor).float().to(fabric.device) / 255 for image, _ in items]
        for (_, target), out in zip(items, network(images), strict=True):
            out = {k: v.float().cpu() if v.is_floating_point() else v.cpu() for k, v in out.items()}
            found[target["image_id"]] = {**out, "labels": out["labels"] - 1}
    return found


def build(cfg: DictConfig, genotype: Genotype, classes: int, *, start: bool = True) -> FasterRCNN:
    """The detector of a configuration, with weights drawn from its seed, its backbone from init.weights if given."""
    torch.manual_seed(stream(cfg.seed))
    options = {"model": cfg.model, "stage": cfg.stage, "official_m_grad": cfg.parity.official_m_grad}
    backbone = build_network(genotype=genotype, classes=1, channels=3, **options)
    if start and cfg.init.weights is not None:
        load_backbone(backbone, cfg.init.weights)
    return faster_rcnn(backbone, num_classes=classes, **cfg.detector)


def check(cfg: DictConfig, genotype: Genotype) -> None:
    """ValueError or FileNotFoundError for what would otherwise be found out after the data, or never."""
    d, t, o = cfg.data, cfg.train, cfg.optim
    if d.name not in SETS:
        raise ValueError(f"data.name={d.name!r}, allowed: {', '.join(SETS)}")
    if d.name == "scenes" and d.root:
        raise ValueError(f"data.root={d.root}: scenes is embedded; name the set at the root with data.name=coco or voc")
    if t.epochs < 1 or t.clip_norm <= 0 or o.lr < 0 or o.warmup < 0 or o.weight_decay < 0:
        raise ValueError(
            f"train.epochs={t.epochs}, clip_norm={t.clip_norm}, optim.lr={o.lr}, warmup={o.warmup}, "
            f"weight_decay={o.weight_decay}, allowed: epochs >= 1, clip_norm > 0, the others >= 0"
        )
    n = cfg.detector
    if min(n.min_size) < 1 or n.max_size < max(n.min_size) or n.detections < 1:
        raise ValueError(
            f"detector.min_size={list(n.min_size)}, max_size={n.max_size}, detections={n.detections}, allowed: "
            "1 <= min_size <= max_size, detections >= 1"
        )
    if not 0 <= n.score_thresh < 1 or not 0 < n.nms_thresh <= 1:
        raise ValueError(
            f"detector.score_thresh={n.score_thresh}, nms_thresh={n.nms_thresh}, allowed: 0 <= score_thresh < 1, "
            "0 < nms_thresh <= 1"
        )
    check_start(cfg.stage, None if cfg.init.weights is None else Path(cfg.init.weights))
    with torch.device("meta"):
        build(cfg, genotype, 1, start=False)


def files_of(dataset) -> list[Path]:
    """The image files of a detection set, or of several that are joined."""
    parts = dataset.datasets if isinstance(dataset, ConcatDataset) else [dataset]
    return [part.folder / info["file_name"] for part in parts for info in part.infos]


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Build, train to the end, evaluate; resumes from out/last.ckpt."""
    genotype = find_genotype(cfg)
    check(cfg, genotype)
    per_device = runs.per_device_batch(cfg.train.batch_size, fabric.world_size)
    options = {k: v for k, v in cfg.data.items() if k != "workers"}
    training, held_out = detection_sets(seed=cfg.seed, **options)
    network = sync_norm(fabric, build(cfg, genotype, len(held_out.classes)))
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        trained, lr=cfg.optim.lr, momentum=cfg.optim.momentum, weight_decay=cfg.optim.weight_decay
    )
    model, optimizer = fabric.setup(network, optimizer)
    batches = SeededBatches(
        TorchvisionDetection(training), Plan.of(cfg.train, len(training), fabric, seed=cfg.seed),
        workers=cfg.data.workers, device=fabric.device, collate=collate,
    )  # fmt: skip
    if cfg.preflight:
        model.train()
        images, targets = next(iter(batches.epoch(1)))
        preflight(
            fabric, lambda: fabric.backward(sum(model(images, targets).values())), what=f"{per_device} images",
            parameters=sum(p.numel() for p in trained), steps=len(batches) * cfg.train.epochs,
        )  # fmt: skip
        return
    files = None if cfg.data.name == "scenes" else [*files_of(training), *files_of(held_out)]
    source = identity(cfg.data.name, files, root=cfg.data.root, classes=len(held_out.classes))
    if (run := runs.Run.open(out, cfg, fabric, data=source)) is not None:
        with run:
            train(fabric, run, cfg, held_out, genotype, model, network, optimizer, batches)


def train(fabric: Fabric, run: runs.Run, cfg, held_out, genotype, model, network, optimizer, batches) -> None:
    """The epochs from the last checkpoint on, then the evaluation."""
    first, rows, epochs = 1, [], cfg.train.epochs
    if (saved := run.load_checkpoint()) is not None:
        network.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, rows = saved["epoch"] + 1, saved["rows"]
    fabric.print(
        f"{cfg.arm} on {cfg.data.name}: {len(batches.plan)} batches, {len(held_out.classes)} classes, {batches.plan}, "
        f"lr {cfg.optim.lr}, epochs {first}..{epochs}"
    )
    transform = network.transform
    about = {"task": "detection", "classes": list(held_out.classes), "channels": 3, "size": list(cfg.detector.min_size)}
    about |= {"crop": False, "normalise": {"mean": list(transform.image_mean), "std": list(transform.image_std)}}
    progress = Progress(fabric, run, first=first, last=epochs, every=1)
    for epoch in range(first, epochs + 1):
        torch.manual_seed(stream(cfg.seed, epoch, fabric.global_rank))  # proposals are sampled from this stream
        row = train_one_epoch(fabric, model, optimizer, batches, epoch=epoch, cfg=cfg, run=run)
        rows.append(row)
        progress.report(epoch, row, images=batches.plan.steps * batches.plan.batch_size)
        if epoch % cfg.train.save_every == 0 or epoch == epochs:
            run.save_checkpoint(state(network, optimizer, about, genotype, epoch=epoch, rows=rows, config=run.config))
    metrics = detection_metrics(held_out, predict(fabric, network, held_out, batch_size=cfg.evaluate.batch_size))
    run.finish(metrics | {"last_loss": rows[-1]["loss"]})
    fabric.print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


main = script("detect", fit)


if __name__ == "__main__":
    main()
