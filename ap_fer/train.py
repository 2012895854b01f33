"""Train one arm (APViT, one of its poolings alone, a control or a baseline) on faces.

python train.py                                                  parametric faces, APP + ATP, a minute
python train.py method=random seed=1
python train.py experiment=raf_db data.root=/datasets                      the released recipe
torchrun --nproc_per_node=2 train.py experiment=raf_db data.root=/datasets
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor

from ap_fer.build import build, build_optimizer, macs, untrained
from ap_fer.checkpoint import state
from ap_fer.data import Data, build_data
from ap_fer.metrics import classification, confusion, pooling_metrics
from ap_fer.schedule import check_kind, lr_at
from ap_fer.stages import stems_first
from ap_fer.token_selection import to_mask
from common import runs
from common.data.batches import Plan, eval_batches, seeded, stream
from common.loop import Means, Progress, bar, compiled, gather, preflight, sync_norm
from common.scripts import script


def train_one_epoch(
    fabric: Fabric, cfg: DictConfig, model, optimizer, batches, *, epoch: int, run: runs.Run
) -> dict[str, float]:
    """One pass over the training set; returns the last learning rate and the mean loss over its images."""
    model.train()
    means, lr, plan = Means(), 0.0, batches.plan
    for micro, (views, labels) in enumerate(bar(batches.epoch(epoch), total=len(batches), title=f"epoch {epoch}")):
        last = (micro + 1) % plan.accumulation == 0
        step = (epoch - 1) * plan.steps + micro // plan.accumulation
        lr = lr_at(cfg.schedule.kind, step, steps_per_epoch=plan.steps, epochs=cfg.train.epochs, lr=cfg.optim.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        with fabric.no_backward_sync(model, enabled=not last):
            loss = F.cross_entropy(model(views[0]).float(), labels)
            fabric.backward(loss / plan.accumulation)
        means.add({"loss": loss}, len(labels))
        if last:
            clip = cfg.train.clip or math.inf
            norm = fabric.clip_gradients(model, optimizer, max_norm=clip, error_if_nonfinite=False)
            means.check(step=step, norm=norm, last_good=run.checkpoint, precision=cfg.fabric.precision)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return {"lr": lr, **means.result(fabric)}


@torch.no_grad()
def predict(fabric: Fabric, model, dataset, *, batch_size: int, workers: int) -> dict[str, Tensor]:
    """logits (N, C), labels (N,) and, with a transformer, app and final (N, P) bool: the patches that stayed after APP and
    after the last block. In the order of the data set, on every rank, on CPU. Random scores draw from a stream of their own."""
    model.eval()
    rank, world = fabric.global_rank, fabric.world_size
    patches = getattr(model, "module", model).patches
    rows: dict[str, list[Tensor]] = {}
    with seeded(1, rank):
        for images, labels in eval_batches(dataset, batch_size=batch_size, workers=workers, rank=rank, world=world):
            logits, kept = model(images.to(fabric.device), details=True)
            found = {"logits": logits.float(), "labels": labels.to(fabric.device)}
            if kept is not None:
                found |= {"app": to_mask(kept.app, patches), "final": to_mask(kept.blocks[-1], patches)}
            for name, value in found.items():
                rows.setdefault(name, []).append(value)
    return gather(fabric, {name: torch.cat(parts) for name, parts in rows.items()}, len(dataset))


def evaluate(fabric: Fabric, model, data: Data, *, batch_size: int, workers: int) -> tuple[dict[str, float], Tensor]:
    """Metrics on the test set, <metric>_<part> on its parts, and the confusion matrix."""
    out = predict(fabric, model, data.test, batch_size=batch_size, workers=workers)
    labels, predictions = out["labels"], out["logits"].argmax(1)
    matrix = confusion(predictions, labels, len(data.names))
    metrics = classification(matrix, data.names)
    for name, part in data.parts.items():
        own = classification(confusion(predictions[part], labels[part], len(data.names)), data.names)
        metrics |= {f"{k}_{name}": own[k] for k in ("top1", "mean_class", "macro_f1")}
    metrics["nll"] = F.cross_entropy(out["logits"], labels).item()
    if "app" in out:
        metrics |= pooling_metrics(out["app"], out["final"], data.truth)
    return metrics, matrix


def check(cfg: DictConfig) -> None:
    """ValueError for what would otherwise be found out late, before a stem is trained or data read."""
    check_kind(cfg.schedule.kind)
    if cfg.data.name == "faces" and cfg.data.root is not None:
        raise ValueError(
            f"data.root={cfg.data.root}: faces is embedded; name the set that lies there, e.g. data=folder"
        )
    if cfg.train.clip is not None and cfg.train.clip <= 0:
        raise ValueError(f"train.clip={cfg.train.clip}, allowed: a norm above 0, or null")


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Build, train to the end, evaluate; resumes from out/last.ckpt."""
    check(cfg)
    runs.per_device_batch(cfg.train.batch_size, fabric.world_size, cfg.train.accumulation)
    data = build_data(seed=cfg.seed, **cfg.data)
    network = build(cfg, len(data.names))
    cost = macs(network, cfg)
    model, optimizer = fabric.setup(compiled(sync_norm(fabric, network), cfg.compile), build_optimizer(network, cfg))
    batches = data.make(Plan.of(cfg.train, len(data.indices), fabric, seed=cfg.seed), fabric.device)
    if cfg.preflight:
        model.train()
        views, labels = next(iter(batches.epoch(1)))
        preflight(
            fabric, lambda: fabric.backward(F.cross_entropy(model(views[0]).float(), labels)),
            parameters=sum(p.numel() for p in model.parameters()), what=f"{len(labels)} images",
            steps=len(batches) * cfg.train.epochs,
        )  # fmt: skip
        return
    if (run := runs.Run.open(out, cfg, fabric, data=data.source)) is not None:
        with run:
            train(fabric, run, cfg, data, model, optimizer, batches, cost)


def train(fabric: Fabric, run: runs.Run, cfg: DictConfig, data: Data, model, optimizer, batches, cost: dict) -> None:
    """The epochs from the last checkpoint on, then the evaluation."""
    test, epochs = {"batch_size": cfg.evaluate.batch_size, "workers": cfg.data.workers}, cfg.train.epochs
    first, best = 1, {"top1_best_epoch": 0.0, "best_epoch": 0}
    if (saved := run.load_checkpoint()) is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, best = saved["epoch"] + 1, saved["best"]
    fabric.print(
        f"{cfg.arm} on {cfg.data.name}: {sum(data.counts)} images ({len(data.indices)} per epoch) of {len(data.names)} "
        f"classes, {batches.plan}, lr {cfg.optim.lr}, epochs {first}..{epochs} of {batches.plan.steps} steps"
    )
    progress = Progress(fabric, run, first=first, last=epochs, every=cfg.train.log_every)
    for epoch in range(first, epochs + 1):
        torch.manual_seed(
            stream(cfg.seed, epoch, fabric.global_rank)
        )  # random scores; batches have streams of their own
        row = train_one_epoch(fabric, cfg, model, optimizer, batches, epoch=epoch, run=run)
        if cfg.train.eval_every and epoch % cfg.train.eval_every == 0:
            row["top1"] = evaluate(fabric, model, data, **test)[0]["top1"]
            if row["top1"] > best["top1_best_epoch"]:
                best = {"top1_best_epoch": row["top1"], "best_epoch": epoch}
        progress.report(epoch, row, images=batches.plan.steps * batches.plan.batch_size)
        if epoch % cfg.train.save_every == 0 or epoch == epochs:
            run.save_checkpoint(state(model, optimizer, data, epoch=epoch, best=best, config=run.config))
    metrics = evaluate(fabric, model, data, **test)[0] | cost
    if (
        cfg.train.eval_every
    ):  # without a validation split the best epoch is chosen on the test set: shown, never claimed
        metrics |= best
    run.finish(metrics)
    fabric.print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


def start_and_fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """The stems that are missing, then the run itself. What is wrong with the run is said before a stem is trained."""
    check(cfg)
    stems = stems_first(cfg)
    if stems:
        runs.per_device_batch(cfg.train.batch_size, fabric.world_size, cfg.train.accumulation)
        data = build_data(seed=cfg.seed, **cfg.data)
        build_optimizer(untrained(cfg, len(data.names)), cfg)
        Plan.of(cfg.train, len(data.indices), fabric, seed=cfg.seed)
    for start, place in stems:
        fabric.print(f"{place} comes first (to train it again: python train.py method={start.arm} force=true)")
        fit(start, fabric, place)
    fit(cfg, fabric, out)


main = script("config", start_and_fit)


if __name__ == "__main__":
    main()
