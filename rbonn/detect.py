"""Train a Faster R-CNN on a binary backbone.

python detect.py                                                      generated scenes, minutes on two cores
python detect.py experiment=voc_detection data.root=/datasets/VOCdevkit init.weights=rbonn18.ckpt
"""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import time
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import ConcatDataset
from torchvision.models.detection import FasterRCNN

from common import runs
from common.data.batches import Plan, SeededBatches, stream
from common.data.detection import TorchvisionDetection, collate, detection_sets
from common.metrics.detection import detection_metrics
from rbonn.binarize import parameter_groups
from rbonn.detection import faster_rcnn, freeze_norms, load_backbone
from rbonn.layers import anneal, make_conv, make_sign
from rbonn.recurrent import Recurrence
from rbonn.schedule import lr_at


def train_one_epoch(fabric: Fabric, model, network, optimizer, batches, *, epoch, lr, cfg, run) -> dict[str, float]:
    """One pass over the training set; returns the mean of every loss term."""
    model.train()
    freeze_norms(network)
    sums: dict[str, Tensor] = {}
    for k, (images, targets) in enumerate(batches.epoch(epoch)):
        step = (epoch - 1) * len(batches) + k
        warm = min(
            1.0, cfg.schedule.warmup_factor + (1 - cfg.schedule.warmup_factor) * step / max(1, cfg.schedule.warmup)
        )
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * group["lr_mult"]
        terms = model(images, targets)
        loss = sum(terms.values())
        runs.check_finite({**terms, "loss": loss}, step=step, last_good=run.checkpoint)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=cfg.train.clip_norm, error_if_nonfinite=False)
        optimizer.step()  # its hook hands the gradients to the recurrent layers
        optimizer.zero_grad(set_to_none=True)
        for name, value in {**terms, "loss": loss}.items():
            sums[name] = sums.get(name, torch.zeros((), device=fabric.device)) + value.detach()
    return {name: fabric.all_reduce(value / len(batches), reduce_op="mean").item() for name, value in sums.items()}


@torch.no_grad()
def predict(fabric: Fabric, network, dataset, *, batch_size: int) -> dict[int, dict[str, Tensor]]:
    """{image id: boxes, scores, labels from 0} of every image, on rank 0's device moved to CPU; every rank does all of them."""
    network.eval()
    found = {}
    for start in range(0, len(dataset), batch_size):
        items = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        images = [image.as_subclass(Tensor).float().to(fabric.device) / 255 for image, _ in items]
        for (_, target), out in zip(items, network(images), strict=True):
            out = {k: v.float().cpu() if v.is_floating_point() else v.cpu() for k, v in out.items()}
            found[target["image_id"]] = {**out, "labels": out["labels"] - 1}
    return found


def build(cfg: DictConfig, classes: int) -> FasterRCNN:
    """The detector of a configuration, with weights drawn from its seed, its backbone from init.weights if given."""
    torch.manual_seed(stream(cfg.seed))
    method = dict(cfg.method)
    sign = make_sign(activations=method.pop("activations"), zero=cfg.parity.sign_zero)
    conv = make_conv(**method, zero=cfg.parity.sign_zero)
    model = faster_rcnn(num_classes=classes, conv=conv, sign=sign, **cfg.detector)
    if cfg.init.weights is not None:
        load_backbone(model, cfg.init.weights)
    return model


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Build, train to the end, evaluate; resumes from out/last.ckpt."""
    per_device = runs.per_device_batch(cfg.train.batch_size, fabric.world_size)
    schedule = {"base_lr": cfg.optim.lr, "epochs": cfg.train.epochs}
    schedule |= {k: cfg.schedule[k] for k in ("kind", "milestones", "gamma")}
    lr_at(1, **schedule)
    own = {k: v for k, v in cfg.data.items() if k not in ("workers", "repeat")}
    training, held_out = detection_sets(seed=cfg.seed, **own)
    training = ConcatDataset([training] * cfg.data.repeat)  # passes over the training set per epoch
    network = build(cfg, len(held_out.classes))
    groups = parameter_groups(
        network, lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay, u_lr_mult=cfg.optim.u_lr_mult
    )
    torch_optimizer = torch.optim.SGD(groups, lr=cfg.optim.lr, momentum=cfg.optim.momentum)
    model, optimizer = fabric.setup(network, torch_optimizer)
    recurrence = Recurrence(network, torch_optimizer)
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
            recurrence.load_state_dict(state["recurrence"])
            first, rows = state["epoch"] + 1, state["rows"]
        fabric.print(
            f"{cfg.arm} on {cfg.data.name}: {len(training)} images, {len(held_out.classes)} classes, global batch "
            f"{cfg.train.batch_size} = {fabric.world_size} devices x {per_device}, lr {cfg.optim.lr}, "
            f"epochs {first}..{cfg.train.epochs}"
        )
        for epoch in range(first, cfg.train.epochs + 1):
            torch.manual_seed(stream(cfg.seed, epoch, fabric.global_rank))  # proposals are sampled from this stream
            anneal(network, (epoch - 1) / cfg.train.epochs)
            start, lr = time.perf_counter(), lr_at(epoch, **schedule)
            row = train_one_epoch(fabric, model, network, optimizer, batches, epoch=epoch, lr=lr, cfg=cfg, run=run)
            row |= recurrence.counters()
            rows.append(row)
            run.log(epoch=epoch, lr=lr, **row)
            terms = "  ".join(f"{k} {v:.3g}" for k, v in row.items())
            left = (time.perf_counter() - start) * (cfg.train.epochs - epoch)
            fabric.print(f"epoch {epoch}/{cfg.train.epochs}  {terms}  {left:.0f} s left")
            if epoch % cfg.train.save_every == 0 or epoch == cfg.train.epochs:
                run.save_checkpoint({
                    "model": network.state_dict(), "optimizer": optimizer.state_dict(), "recurrence": recurrence.state_dict(),
                    "epoch": epoch, "rows": rows, "class_names": list(held_out.classes), "config": run.config,
                })  # fmt: skip
        metrics = detection_metrics(held_out, predict(fabric, network, held_out, batch_size=cfg.evaluate.batch_size))
        metrics["last_loss"] = rows[-1]["loss"]
        run.finish(metrics)
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
