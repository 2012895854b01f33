"""Train a Faster R-CNN on a 1-bit backbone of a genotype.

python detect.py                                                      generated scenes, minutes on two cores
python detect.py genotype=file genotype.file=runs/.../genotype.json
python detect.py experiment=voc_detection data.root=/datasets/VOCdevkit init.weights=dcp_nas_l.ckpt
"""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import time
from dataclasses import asdict
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from common import runs
from common.data.batches import Plan, SeededBatches, stream
from common.data.detection import TorchvisionDetection, collate, detection_sets
from common.metrics.detection import detection_metrics
from dcp_nas.checkpoint import build_network, find_genotype
from dcp_nas.detection import faster_rcnn, load_backbone


def step_lr(epoch: int, *, lr: float, milestones: list[int], warmup_share: float) -> float:
    """lr / 10 for every milestone reached (a milestone counts from its own epoch on), times the warm-up share."""
    return lr * warmup_share * 0.1 ** sum(epoch >= m for m in milestones)


def train_one_epoch(fabric: Fabric, model, optimizer, batches, *, epoch, cfg, run) -> dict[str, float]:
    """One pass over the training set; returns the mean of every loss term."""
    model.train()
    sums: dict[str, Tensor] = {}
    for k, (images, targets) in enumerate(batches.epoch(epoch)):
        step = (epoch - 1) * len(batches) + k
        share = min(1.0, (step + 1) / max(1, cfg.optim.warmup))
        lr = step_lr(epoch, lr=cfg.optim.lr, milestones=list(cfg.optim.milestones), warmup_share=share)
        for group in optimizer.param_groups:
            group["lr"] = lr
        terms = model(images, targets)
        loss = sum(terms.values())
        runs.check_finite({**terms, "loss": loss}, step=step, last_good=run.checkpoint)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=cfg.train.clip_norm, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for name, value in {**terms, "loss": loss}.items():
            sums[name] = sums.get(name, torch.zeros((), device=fabric.device)) + value.detach()
    return {name: fabric.all_reduce(value / len(batches), reduce_op="mean").item() for name, value in sums.items()}


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


def build(cfg: DictConfig, genotype, classes: int) -> FasterRCNN:
    """The detector of a configuration, with weights drawn from its seed, its backbone from init.weights if given."""
    torch.manual_seed(stream(cfg.seed))
    backbone = build_network(
        genotype=genotype,
        model=cfg.model,
        stage=cfg.stage,
        official_m_grad=cfg.parity.official_m_grad,
        classes=1,
        channels=3,
    )
    if cfg.init.weights is not None:
        load_backbone(backbone, cfg.init.weights)
    return faster_rcnn(backbone, num_classes=classes, **cfg.detector)


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Build, train to the end, evaluate; resumes from out/last.ckpt."""
    per_device = runs.per_device_batch(cfg.train.batch_size, fabric.world_size)
    genotype = find_genotype(cfg)
    training, held_out = detection_sets(seed=cfg.seed, **{k: v for k, v in cfg.data.items() if k != "workers"})
    network = build(cfg, genotype, len(held_out.classes))
    optimizer = torch.optim.SGD(
        [p for p in network.parameters() if p.requires_grad], lr=cfg.optim.lr, momentum=cfg.optim.momentum,
        weight_decay=cfg.optim.weight_decay,
    )  # fmt: skip
    model, optimizer = fabric.setup(network, optimizer)
    plan = Plan(len(training), cfg.train.batch_size, seed=cfg.seed, rank=fabric.global_rank, world=fabric.world_size)
    batches = SeededBatches(
        TorchvisionDetection(training), plan, workers=cfg.data.workers, device=fabric.device, collate=collate
    )
    if cfg.preflight:
        images, targets = next(iter(batches.epoch(1)))
        start = time.perf_counter()
        fabric.backward(sum(model.train()(images, targets).values()))
        seconds = time.perf_counter() - start
        hours = seconds * len(batches) * cfg.train.epochs / 3600
        return fabric.print(
            f"preflight: data found, {per_device} images per device, {seconds:.2f} s per step, about {hours:.2g} h"
        )
    run = runs.Run.open(out, cfg, fabric)
    if run is None:
        return
    with run:
        first, rows = 1, []
        if (state := run.load_checkpoint()) is not None:
            network.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first, rows = state["epoch"] + 1, state["rows"]
        fabric.print(
            f"{cfg.arm} on {cfg.data.name}: {len(training)} images, {len(held_out.classes)} classes, global batch "
            f"{cfg.train.batch_size} = {fabric.world_size} devices x {per_device}, lr {cfg.optim.lr}, "
            f"epochs {first}..{cfg.train.epochs}"
        )
        for epoch in range(first, cfg.train.epochs + 1):
            torch.manual_seed(stream(cfg.seed, epoch, fabric.global_rank))  # proposals are sampled from this stream
            start = time.perf_counter()
            row = train_one_epoch(fabric, model, optimizer, batches, epoch=epoch, cfg=cfg, run=run)
            rows.append(row)
            run.log(epoch=epoch, **row)
            terms = "  ".join(f"{k} {v:.3g}" for k, v in row.items())
            left = (time.perf_counter() - start) * (cfg.train.epochs - epoch)
            fabric.print(f"epoch {epoch}/{cfg.train.epochs}  {terms}  {left:.0f} s left")
            if epoch % cfg.train.save_every == 0 or epoch == cfg.train.epochs:
                run.save_checkpoint({
                    "model": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "rows": rows,
                    "class_names": list(held_out.classes), "genotype": asdict(genotype), "config": run.config,
                })  # fmt: skip
        metrics = detection_metrics(held_out, predict(fabric, network, held_out, batch_size=cfg.evaluate.batch_size))
        run.finish(metrics | {"last_loss": rows[-1]["loss"]})
        fabric.print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


@hydra.main(version_base="1.3", config_path="configs", config_name="detect")
def main(cfg: DictConfig) -> None:
    out = HydraConfig.get().runtime.output_dir
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    try:
        fit(cfg, runs.launch(cfg.fabric), Path(out))
    finally:
        runs.remove_if_empty(out, cfg.run_root)


if __name__ == "__main__":
    main()
