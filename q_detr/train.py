"""Train one arm of Q-DETR: the real-valued teacher (method=teacher), or a quantised student that starts from it.

python train.py                                                     generated scenes, 2 bit, DA + FQM
python train.py method=baseline method.quant.bits=4 seed=1
python train.py method=stage1, then python train.py method.start=stage1          two stages: backbone, then everything
torchrun --nproc_per_node=8 train.py experiment=coco_stage1 data.root=/datasets/coco
"""

import math
import time
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from common import runs
from common.data.batches import Plan, SeededBatches, stream
from common.data.detection import collate, detection_sets
from common.metrics.detection import detection_metrics
from common.quant.lsq import check_steps
from q_detr.building import (
    KINDS,
    STARTS,
    build_real,
    build_student,
    cross_attention_statistics,
    keep_steps_positive,
    parameter_groups,
)
from q_detr.checkpoint import load_weights
from q_detr.data import (
    Prepared,
    dropped_boxes,
    normalise,
    num_classes,
    resize_for_test,
    source_options,
    training_transform,
)
from q_detr.detr import pad_images
from q_detr.distribution_rectification import drd_loss
from q_detr.schedule import lr_factor
from q_detr.set_prediction import SetCriterion, postprocess


def train_one_epoch(
    fabric: Fabric, model, teacher, criterion, optimizer, batches, *, epoch, cfg, run
) -> dict[str, float]:
    """One pass; returns the mean of every loss term and of what the matching kept."""
    model.train()
    drd, accumulation = dict(cfg.method.drd), cfg.train.accumulation
    weight = drd.pop("weight")
    total, sums = len(batches), {}
    bar = tqdm(
        batches.epoch(epoch), total=total, desc=f"epoch {epoch}", leave=False, disable=None if total > 50 else True
    )
    for micro, (images, targets) in enumerate(bar):
        step = ((epoch - 1) * total + micro) // accumulation
        last = (micro + 1) % accumulation == 0
        images, mask = pad_images(images)
        with fabric.no_backward_sync(model, enabled=not last):
            out = model(images, mask)
            terms, log = criterion(out, targets)
            if weight:
                with torch.no_grad(), fabric.autocast():
                    theirs = teacher(images, mask)
                value, pairs = drd_loss(out, theirs, [t["boxes"] for t in targets], **drd)
                terms["drd"] = weight * value
                log |= pairs
            loss = sum(terms.values())
            runs.check_finite({**terms, "loss": loss}, step=step, last_good=run.checkpoint)
            fabric.backward(loss / accumulation)
        for name, value in {**{n: v.detach() for n, v in terms.items()}, **log}.items():
            sums[name] = sums.get(name, 0.0) + value
        if not last:
            continue
        norm = fabric.clip_gradients(model, optimizer, max_norm=cfg.train.clip_norm, error_if_nonfinite=False)
        if cfg.fabric.precision != "16-mixed":  # its loss scaler skips such a step by itself
            runs.check_finite({"gradient norm": norm}, step=step, last_good=run.checkpoint)
        factor = lr_factor(step, steps=total // accumulation * cfg.train.epochs, **cfg.schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        keep_steps_positive(model)
    means = torch.tensor([float(v) for v in sums.values()], dtype=torch.float64, device=fabric.device) / total
    return dict(zip(sums, fabric.all_reduce(means, reduce_op="mean").tolist(), strict=True))  # type: ignore[union-attr]


def held_out_batch(dataset, indices, device, side):
    """Padded, normalised images and their mask, with the targets of the data set."""
    items = [dataset[i] for i in indices]
    images, mask = pad_images([resize_for_test(normalise(image), side) for image, _ in items])
    return images.to(device), mask.to(device), [t for _, t in items]


@torch.no_grad()
def predict(
    fabric: Fabric, model, dataset, *, loss: str, batch_size: int, side: int | None
) -> dict[int, dict[str, Tensor]]:
    """{image id: boxes xyxy in pixels of the original image, scores, labels} on the CPU, all images on every rank."""
    model.eval()
    found = {}
    for start in range(0, len(dataset), batch_size):
        indices = range(start, min(start + batch_size, len(dataset)))
        images, mask, targets = held_out_batch(dataset, indices, fabric.device, side)
        sizes = torch.stack([t["size"] for t in targets]).to(fabric.device)
        for t, p in zip(targets, postprocess(model(images, mask), sizes, loss=loss), strict=True):
            found[t["image_id"]] = {k: v.cpu() for k, v in p.items()}
    return found


@torch.no_grad()
def held_out_distance(model, teacher, dataset, device, *, images: int, side: int | None) -> dict[str, float]:
    """L_DRD of a test batch with the paper's choices, whatever the arm was trained with, and the query statistics."""
    batch, mask, _ = held_out_batch(dataset, range(min(images, len(dataset))), device, side)
    items = Prepared(dataset)
    boxes = [items[i][1]["boxes"].to(device) for i in range(len(batch))]
    model.eval()
    value, pairs = drd_loss(model(batch, mask), teacher(batch, mask), boxes)
    found = {"held_out_drd": value.item(), "held_out_pairs": pairs["pairs"]}
    return found | cross_attention_statistics(model, batch, mask)


def find_run(cfg: DictConfig, fabric: Fabric, arm: str, seed: int) -> Path:
    """last.ckpt of another arm of this scale; at scale "default" it is trained first if missing."""
    path = Path(cfg.run_root) / cfg.scale / arm / f"seed{seed}"
    if cfg.scale == "default" and not cfg.preflight:
        fabric.print(f"{arm}: {path}")
        own = OmegaConf.load(Path(__file__).parent / f"configs/method/{arm}.yaml")
        base = OmegaConf.load(Path(__file__).parent / "configs/config.yaml").method
        method = {"method": OmegaConf.merge(base, own.get("method", {}))}
        rest = {k: v for k, v in own.items() if k != "method"}
        fit(OmegaConf.merge(cfg, method, rest, {"arm": arm, "seed": seed, "force": False}), fabric, path)
    elif not (path / "last.ckpt").exists():
        raise FileNotFoundError(
            f"no {arm} at {path / 'last.ckpt'}: train it first, python train.py method={arm} scale={cfg.scale} seed={seed}"
        )
    return path / "last.ckpt"


def build(cfg: DictConfig, fabric: Fabric, classes: int, first_batch):
    """(network, teacher or None) of a configuration, with weights drawn from its seed and every step set."""
    method = cfg.method
    if method.start not in STARTS:
        raise ValueError(f"method.start={method.start!r}, allowed: {', '.join(STARTS)}")
    if method.start == "weights" and cfg.start.weights is None:
        raise ValueError("method.start=weights needs start.weights=<checkpoint or official weights>")
    options = OmegaConf.to_container(cfg.model)
    teacher = None
    if method.quantised:
        teacher = build_real(
            **{**options, **OmegaConf.to_container(cfg.teacher.model), "weights": None}, num_classes=classes
        )
        load_weights(teacher, cfg.teacher.weights or find_run(cfg, fabric, "teacher", cfg.teacher.seed))
        teacher.eval().requires_grad_(False)
    torch.manual_seed(stream(cfg.seed))
    model = build_real(**options, num_classes=classes)
    if method.start == "weights":
        load_weights(model, cfg.start.weights, new_classes=cfg.start.new_classes)
    if teacher is None:
        return model, None
    if method.start == "teacher":
        if cfg.teacher.model:
            raise ValueError(
                "method.start=teacher needs teacher.model={}: networks of one shape. Use method.start=weights"
            )
        model.load_state_dict(teacher.state_dict())
    stage1 = None
    if method.start == "stage1":
        stage1 = runs.load_checkpoint(cfg.start.weights or find_run(cfg, fabric, "stage1", cfg.start.seed))["model"]
    images, mask = pad_images(first_batch)
    return build_student(
        model.to(images.device),
        images,
        mask,
        quant=method.quant,
        da_init=method.da_init,
        percentile=method.percentile,
        stage1=stage1,
    ), teacher


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Build, train to the end, evaluate; resumes from out/last.ckpt."""
    accumulation = cfg.train.accumulation
    per_device = runs.per_device_batch(cfg.train.batch_size, fabric.world_size, accumulation)
    lr_factor(0, steps=1, **cfg.schedule)
    ev = cfg.evaluate
    training, held_out = detection_sets(seed=cfg.seed, **source_options(cfg.data))
    classes = num_classes(held_out)
    prepared = Prepared(training, training_transform(cfg.data.augment))
    plan = Plan(
        len(training), cfg.train.batch_size, seed=cfg.seed, rank=fabric.global_rank, world=fabric.world_size,
        accumulation=accumulation,
    )  # fmt: skip
    batches = SeededBatches(prepared, plan, workers=cfg.data.workers, device=fabric.device, collate=collate)
    # Every rank calibrates on the whole first batch, where it computes: equal steps and gamma for any number of devices.
    whole = Plan(len(training), cfg.train.batch_size, seed=cfg.seed)
    calibration = SeededBatches(prepared, whole, device=fabric.device, collate=collate).epoch(1)
    network, teacher = build(cfg, fabric, classes, next(iter(calibration))[0] if cfg.method.quantised else None)
    if teacher is not None:
        teacher = teacher.to(fabric.device)
    loss_kind = KINDS[cfg.model.kind][1]
    criterion = SetCriterion(classes, loss=loss_kind).to(fabric.device)
    model, optimizer = fabric.setup(network, torch.optim.AdamW(parameter_groups(network, **cfg.optim)))
    if cfg.preflight:
        images, targets = next(iter(batches.epoch(1)))
        start = time.perf_counter()
        fabric.backward(sum(criterion(model(*pad_images(images)), targets)[0].values()))
        seconds = time.perf_counter() - start
        hours = seconds * len(batches) * cfg.train.epochs / 3600
        return fabric.print(
            f"preflight: data found, {per_device} images per device, {seconds:.2f} s per step, about {hours:.2g} h"
        )
    run = runs.Run.open(out, cfg, fabric)
    if run is None:
        return
    with run:
        first, row = 1, {}
        if (state := run.load_checkpoint()) is not None:
            network.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first, row = state["epoch"] + 1, state["row"]
        fabric.print(
            f"{cfg.arm} on {cfg.data.name}: {len(training)} images ({dropped_boxes(training)} boxes without extent dropped), "
            f"{classes} classes, global batch {cfg.train.batch_size} = {fabric.world_size} devices x {accumulation} "
            f"micro-steps x {per_device}, "
            f"lr {cfg.optim.lr}, epochs {first}..{cfg.train.epochs}"
        )

        def save(epoch: int) -> None:
            run.save_checkpoint({
                "model": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "row": row,
                "classes": classes, "names": list(held_out.classes), "config": run.config,
            })  # fmt: skip

        begin = time.perf_counter()
        for epoch in range(first, cfg.train.epochs + 1):
            torch.manual_seed(stream(cfg.seed, epoch, fabric.global_rank))  # dropout
            row = train_one_epoch(fabric, model, teacher, criterion, optimizer, batches, epoch=epoch, cfg=cfg, run=run)
            check_steps(network)
            run.log(epoch=epoch, **row)
            for logger in fabric.loggers:
                logger.log_metrics(row, step=epoch)
            if epoch % cfg.train.log_every == 0 or epoch in (first, cfg.train.epochs):
                left = (time.perf_counter() - begin) / (epoch - first + 1) * (cfg.train.epochs - epoch)
                terms = "  ".join(f"{k} {v:.3g}" for k, v in row.items())
                fabric.print(f"epoch {epoch}/{cfg.train.epochs}  {terms}  {left:.0f} s left")
            if epoch % cfg.train.save_every == 0 or epoch == cfg.train.epochs:
                save(epoch)
        if cfg.train.epochs == 0:
            save(0)
        found = predict(fabric, network, held_out, loss=loss_kind, batch_size=ev.batch_size, side=cfg.data.test_side)
        metrics = {k: 100 * v for k, v in detection_metrics(held_out, found, difficult=ev.difficult).items()}
        if teacher is not None:
            metrics |= held_out_distance(
                network, teacher, held_out, fabric.device, images=ev.statistics_images, side=cfg.data.test_side
            )
        run.finish({k: v for k, v in metrics.items() if math.isfinite(v)} | {f"last_{k}": v for k, v in row.items()})
        fabric.print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(cfg: DictConfig) -> None:
    out = HydraConfig.get().runtime.output_dir
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    try:
        loggers = [instantiate(cfg.logger)] if cfg.logger else []
        fit(cfg, runs.launch(cfg.fabric, loggers=loggers), Path(out))
    finally:
        runs.remove_if_empty(out, cfg.run_root)


if __name__ == "__main__":
    main()
