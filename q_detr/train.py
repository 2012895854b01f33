"""Train one arm of Q-DETR: the real-valued teacher (method=teacher), or a quantised student that starts from it.

python train.py                                   generated scenes, 2 bit, DA + FQM: teacher, first stage (backbone), second
python train.py method.start=teacher              one stage: everything is quantised at once
torchrun --nproc_per_node=8 train.py experiment=coco_stage1 data.root=/datasets/coco teacher.weights=... start.weights=...
"""

import math
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from common import runs
from common.data.batches import Plan, SeededBatches, stream
from common.data.detection import collate, detection_sets
from common.loop import Means, Progress, bar, preflight
from common.metrics.detection import detection_metrics
from common.quant.lsq import check_steps
from common.scripts import script
from q_detr.building import KINDS, build_real, build_student, keep_steps_positive, parameter_groups
from q_detr.checkpoint import about, state
from q_detr.data import Prepared, data_identity, dropped_boxes, num_classes, source_options, training_transform
from q_detr.detr import pad_images
from q_detr.distribution_rectification import drd_loss, layer_weight
from q_detr.held_out import check_floor, held_out_distance, objects, predict
from q_detr.official_weights import load_weights
from q_detr.schedule import lr_factor
from q_detr.set_prediction import SetCriterion
from q_detr.settings import check
from q_detr.starting_points import find, first_stage


def losses(
    fabric: Fabric, model: nn.Module, teacher: nn.Module | None, criterion: SetCriterion, images: list[Tensor],
    targets: list[dict], *, count: Tensor, drd: dict[str, Any],
) -> tuple[dict[str, Tensor], dict[str, Any]]:  # fmt: skip
    """(the weighted terms of one micro-batch, what else to log). drd: lambda as `weight`, and the options of `drd_loss`."""
    batch, mask = pad_images(images)
    out = model(batch, mask)
    terms, log = criterion(out, targets, count)
    terms["ce"] = (
        terms["ce"] + 0 * batch.sum()
    )  # an infinite pixel would be clipped by the first quantiser and pass unseen
    options = {k: v for k, v in drd.items() if k not in ("weight", "lambda_for_layers")}
    if drd["weight"]:
        with torch.no_grad(), fabric.autocast():
            theirs = teacher(batch, mask)  # type: ignore[misc]
        value, pairs = drd_loss(out, theirs, [t["boxes"] for t in targets], **options)
        weight = layer_weight(drd["weight"], layers=len(out["co_attended"]), of=drd["lambda_for_layers"])
        terms["drd"], log = weight * value, log | pairs
    return terms, log


def train_one_epoch(
    fabric: Fabric, model, teacher, criterion, optimizer, batches, *, epoch: int, cfg: DictConfig, run: runs.Run
) -> dict[str, float]:
    """One pass over the training set; returns the mean of every loss term and of what the matching kept over its images."""
    model.train()
    means, parts, steps = Means(), cfg.train.accumulation, batches.plan.steps
    micro_batches = bar(batches.epoch(epoch), total=len(batches), title=f"epoch {epoch}", quiet_below=50)
    for step, micro in enumerate(zip(*[micro_batches] * parts, strict=True), (epoch - 1) * steps):
        count = criterion.count([t for _, targets in micro for t in targets], parts=parts)
        for k, (images, targets) in enumerate(micro, 1):
            with fabric.no_backward_sync(model, enabled=k < parts):
                terms, log = losses(fabric, model, teacher, criterion, images, targets, count=count, drd=cfg.method.drd)
                fabric.backward(sum(terms.values()) / parts)
            means.add({**terms, **log}, len(targets))
        norm = fabric.clip_gradients(model, optimizer, max_norm=cfg.train.clip_norm, error_if_nonfinite=False)
        means.check(step=step, norm=norm, last_good=run.checkpoint, precision=cfg.fabric.precision)
        factor = lr_factor(step, steps=steps * cfg.train.epochs, **cfg.schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        keep_steps_positive(model)
    return means.result(fabric)


def build(cfg: DictConfig, fabric: Fabric, classes: int, first_batch: list[Tensor] | None, identity: dict):
    """(network, teacher or None) of a configuration, with weights drawn from its seed and every step set."""
    method, options = cfg.method, OmegaConf.to_container(cfg.model)
    teacher, stage1, trains = None, None, {"identity": identity, "train": fit}
    if method.quantised:
        shape = {**options, **OmegaConf.to_container(cfg.teacher.model), "weights": None}  # type: ignore[dict-item]
        teacher = build_real(**shape, num_classes=classes)
        if not cfg.preflight:
            load_weights(teacher, cfg.teacher.weights or find(cfg, fabric, "teacher", cfg.teacher.seed, **trains))
        teacher.eval().requires_grad_(False)
    torch.manual_seed(stream(cfg.seed))
    if method.start != "random":
        options["weights"] = None  # what torchvision's weights would fill is replaced
    model = build_real(**options, num_classes=classes)
    if cfg.preflight:
        pass
    elif method.start == "weights":
        kept = load_weights(model, cfg.start.weights, new_classes=cfg.start.new_classes)
        if cfg.start.new_classes:
            left = any(k.startswith("class_embed.") for k in kept)
            fabric.print(
                f"classifier {f'kept: they have {classes} classes, too' if not left else 'left out: the classes differ'}"
            )
    elif method.start == "teacher" and teacher is not None:
        model.load_state_dict(teacher.state_dict())
    elif method.start == "stage1":
        path = cfg.start.weights or find(cfg, fabric, "stage1", cfg.start.seed, **trains)
        stage1 = first_stage(runs.load_checkpoint(path), method.quant)
    if teacher is None or first_batch is None:
        return model, None
    images, mask = pad_images(first_batch)
    options = {"quant": method.quant, "da_init": method.da_init, "percentile": method.percentile, "stage1": stage1}
    return build_student(model.to(images.device), images, mask, **options), teacher.to(images.device)


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Build, train to the end, evaluate; resumes from out/last.ckpt."""
    check(cfg)
    runs.per_device_batch(cfg.train.batch_size, fabric.world_size, cfg.train.accumulation)
    training, held_out = detection_sets(seed=cfg.seed, **source_options(cfg.data))
    if not objects(held_out):
        raise ValueError(f"the test split {cfg.data.test} of {cfg.data.name} has no object: there is no AP on it")
    identity = data_identity(cfg.data.name, training, held_out, cfg.data.get("root"))
    classes, seed, loading = num_classes(held_out), cfg.seed, {"device": fabric.device, "collate": collate}
    prepared = Prepared(training, training_transform(cfg.data.augment))
    plan = Plan.of(cfg.train, len(training), fabric, seed=seed)
    batches = SeededBatches(prepared, plan, workers=cfg.data.workers, **loading)
    first_batch = None
    if cfg.method.quantised:  # every rank calibrates on the whole first batch: equal steps for any number of devices
        whole = SeededBatches(prepared, Plan(len(training), cfg.train.batch_size, seed=seed), **loading)
        first_batch = next(iter(whole.epoch(1)))[0]
    network, teacher = build(cfg, fabric, classes, first_batch, identity)
    criterion = SetCriterion(classes, loss=KINDS[cfg.model.kind][1]).to(fabric.device)
    model, optimizer = fabric.setup(network, torch.optim.AdamW(parameter_groups(network, **cfg.optim)))
    if cfg.preflight:
        images, targets = next(iter(batches.epoch(1)))
        options = {"count": criterion.count(targets), "drd": cfg.method.drd}
        preflight(
            fabric, lambda: fabric.backward(
                sum(losses(fabric, model.train(), teacher, criterion, images, targets, **options)[0].values())
            ),
            parameters=sum(p.numel() for p in network.parameters() if p.requires_grad), what=f"{len(images)} images",
            steps=len(batches) * cfg.train.epochs,
            note="" if teacher is None else "teacher and start were not loaded: fresh networks of their shape",
        )  # fmt: skip
        return
    if (run := runs.Run.open(out, cfg, fabric, data=identity)) is not None:
        with run:
            fabric.print(
                f"{cfg.arm} on {cfg.data.name}: {len(training)} images ({dropped_boxes(training)} boxes without extent dropped), "
                f"{classes} classes, {plan}, lr {cfg.optim.lr}"
            )
            train(fabric, run, cfg, held_out, network, model, teacher, criterion, optimizer, batches)


def train(
    fabric: Fabric, run: runs.Run, cfg: DictConfig, held_out, network, model, teacher, criterion, optimizer, batches
) -> None:
    """The epochs from the last checkpoint on, then the evaluation."""
    first, row, epochs = 1, {}, cfg.train.epochs
    if (saved := run.load_checkpoint()) is not None:
        network.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, row = saved["epoch"] + 1, saved["row"]
    known = about(held_out, loss=criterion.loss, side=cfg.data.test_side)

    def save(epoch: int) -> None:
        run.save_checkpoint(state(network, optimizer, epoch=epoch, row=row, about=known, config=run.config))

    fabric.print(f"epochs {first}..{epochs}")
    progress = Progress(fabric, run, first=first, last=epochs, every=cfg.train.log_every)
    for epoch in range(first, epochs + 1):
        torch.manual_seed(stream(cfg.seed, epoch, fabric.global_rank))  # dropout
        row = train_one_epoch(fabric, model, teacher, criterion, optimizer, batches, epoch=epoch, cfg=cfg, run=run)
        check_steps(network)
        progress.report(epoch, row, images=batches.plan.steps * batches.plan.batch_size)
        if epoch % cfg.train.save_every == 0 and epoch < epochs:
            save(epoch)
    save(epochs)
    where, ev = {"side": known["size"]}, cfg.evaluate
    found = predict(
        fabric, network, held_out, loss=criterion.loss, batch_size=ev.batch_size, workers=cfg.data.workers, **where
    )
    metrics = {k: 100 * v for k, v in detection_metrics(held_out, found, difficult=ev.difficult).items()}
    check_floor(metrics["AP50"], floor=ev.floor, who=f"{cfg.arm}, seed {cfg.seed}")
    if teacher is not None:
        metrics |= held_out_distance(network, teacher, held_out, fabric.device, images=ev.statistics_images, **where)
    run.finish({k: v for k, v in metrics.items() if math.isfinite(v)} | {f"last_{k}": v for k, v in row.items()})
    fabric.print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


main = script("config", fit)


if __name__ == "__main__":
    main()
