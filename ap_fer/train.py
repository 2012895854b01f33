"""Train one arm (APViT, one of its poolings alone, a control or a baseline) on faces.

python train.py                                                  parametric faces, APP + ATP, a minute
python train.py method=random seed=1
python train.py experiment=raf_db data.root=/datasets                      the released recipe
torchrun --nproc_per_node=2 train.py experiment=raf_db data.root=/datasets
"""

import math
import time
from pathlib import Path

import hydra
import torch
import torch.nn.functional as F
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from ap_fer.build import build, build_optimizer, macs, sibling
from ap_fer.data import Data, build_data
from ap_fer.metrics import classification, confusion, pooling_metrics
from ap_fer.schedule import check_kind, lr_at
from ap_fer.token_selection import to_mask
from common import runs
from common.data.batches import Plan, eval_batches, seeded, stream


def train_one_epoch(fabric: Fabric, cfg: DictConfig, model, optimizer, batches, plan: Plan, *, epoch: int, run) -> dict:
    """One pass over the training set; returns the mean loss, the last learning rate and the images per second."""
    model.train()
    begin, lr, total, summed = time.perf_counter(), 0.0, len(batches), torch.zeros((), device=fabric.device)
    bar = tqdm(batches.epoch(epoch), total=total, leave=False, disable=None if total > 50 else True)
    for micro, (views, labels) in enumerate(bar):
        last = (micro + 1) % plan.accumulation == 0
        step = (epoch - 1) * plan.steps + micro // plan.accumulation
        lr = lr_at(cfg.schedule.kind, step, steps_per_epoch=plan.steps, epochs=cfg.train.epochs, lr=cfg.optim.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with fabric.no_backward_sync(model, enabled=not last):
            loss = F.cross_entropy(model(views[0]).float(), labels)
            runs.check_finite({"loss": loss}, step=step, last_good=run.checkpoint)
            fabric.backward(loss / plan.accumulation)
        if last:
            norm = fabric.clip_gradients(
                model, optimizer, max_norm=cfg.train.clip or math.inf, error_if_nonfinite=False
            )
            if cfg.fabric.precision != "16-mixed":  # the fp16 loss scaler skips such a step by itself
                runs.check_finite({"gradient norm": norm}, step=step, last_good=run.checkpoint)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        summed += loss.detach()
    rate = plan.steps * plan.batch_size / (time.perf_counter() - begin)
    return {"lr": lr, "loss": summed.item() / total, "images_per_s": rate}


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
    whole = {name: torch.cat(parts) for name, parts in rows.items()}
    if world > 1:  # rank r holds the images r, r + world, ...: pad, gather, interleave, cut
        size = math.ceil(len(dataset) / world)
        for name, value in whole.items():
            padded = torch.cat([value, value[: size - len(value)]]).to(
                torch.float64 if value.is_floating_point() else torch.int64
            )
            gathered = fabric.all_gather(padded).transpose(0, 1).flatten(0, 1)[: len(dataset)]
            whole[name] = gathered.to(value.dtype)
    return {name: value.cpu() for name, value in whole.items()}


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


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Build, train to the end, evaluate; resumes from out/last.ckpt."""
    per_device = runs.per_device_batch(cfg.train.batch_size, fabric.world_size, cfg.train.accumulation)
    check_kind(cfg.schedule.kind)
    data = build_data(seed=cfg.seed, **cfg.data)
    model = build(cfg, len(data.names))
    if fabric.world_size > 1 and fabric.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer, cost = build_optimizer(model, cfg), macs(model, cfg)  # type: ignore[arg-type]
    model, optimizer = fabric.setup(model, optimizer)
    plan = Plan(
        len(data.indices), cfg.train.batch_size, seed=cfg.seed, rank=fabric.global_rank, world=fabric.world_size,
        accumulation=cfg.train.accumulation,
    )  # fmt: skip
    batches, epochs = data.make(plan, fabric.device), cfg.train.epochs
    if cfg.preflight:
        return preflight(fabric, model, optimizer, batches, epochs)
    test = {"batch_size": cfg.evaluate.batch_size, "workers": cfg.data.workers}

    run = runs.Run.open(out, cfg, fabric)
    if run is None:
        return
    with run:
        first, best = 1, {"top1_best_epoch": 0.0, "best_epoch": 0}
        if (state := run.load_checkpoint()) is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first, best = state["epoch"] + 1, state["best"]
        fabric.print(
            f"{cfg.arm} on {cfg.data.name}: {sum(data.counts)} images ({len(data.indices)} per epoch) of {len(data.names)} "
            f"classes, global batch {cfg.train.batch_size} = {fabric.world_size} devices x {cfg.train.accumulation} micro-steps "
            f"x {per_device}, lr {cfg.optim.lr}, epochs {first}..{epochs} of {plan.steps} steps"
        )
        start = time.perf_counter()
        for epoch in range(first, epochs + 1):
            torch.manual_seed(
                stream(cfg.seed, epoch, fabric.global_rank)
            )  # random scores; batches have their own streams
            row = train_one_epoch(fabric, cfg, model, optimizer, batches, plan, epoch=epoch, run=run)
            rate = row.pop("images_per_s")
            if cfg.train.eval_every and epoch % cfg.train.eval_every == 0:
                row["top1"] = evaluate(fabric, model, data, **test)[0]["top1"]
                if row["top1"] > best["top1_best_epoch"]:
                    best = {"top1_best_epoch": row["top1"], "best_epoch": epoch}
            run.log(epoch=epoch, **row)
            for logger in fabric.loggers:
                logger.log_metrics(row, step=epoch)
            if epoch % cfg.train.log_every == 0 or epoch in (first, epochs):
                left = (time.perf_counter() - start) / (epoch - first + 1) * (epochs - epoch)
                values = "  ".join(f"{k} {v:.4g}" for k, v in row.items())
                fabric.print(f"epoch {epoch}/{epochs}  {values}  {rate:.0f} images/s  {left:.0f} s left")
            if epoch % cfg.train.save_every == 0 or epoch == epochs:
                run.save_checkpoint(
                    {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "best": best,
                     "names": list(data.names), "config": run.config}
                )  # fmt: skip
        metrics, _ = evaluate(fabric, model, data, **test)
        metrics |= cost
        if (
            cfg.train.eval_every
        ):  # without a validation split the best epoch is chosen on the test set: shown, never claimed
            metrics |= best
        run.finish(metrics)
        fabric.print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


def preflight(fabric: Fabric, model, optimizer, batches, epochs: int) -> None:
    """One step forward and backward; prints memory and hours. Writes nothing."""
    views, labels = next(iter(batches.epoch(1)))
    seconds = 0.0
    model.train()
    for _ in range(2):  # the first step also pays for allocation and kernel selection
        begin = time.perf_counter()
        fabric.backward(F.cross_entropy(model(views[0]).float(), labels))
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    optimizer.zero_grad(set_to_none=True)
    card = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the card, " if fabric.device.type == "cuda" else ""
    fabric.print(
        f"preflight: data found, {len(labels)} images per device and step, {sum(p.numel() for p in model.parameters()):,} "
        f"parameters, {card}{seconds:.3f} s per step without data loading, about "
        f"{seconds * len(batches) * epochs / 3600:.2g} h for {epochs} epochs"
    )


def stems_first(cfg: DictConfig) -> list[tuple[DictConfig, Path]]:
    """Configurations and directories of the runs that this one starts from (start.arm) and that are not finished, in order."""
    if cfg.start.arm is None or cfg.preflight:
        return []
    path = sibling(cfg, "last.ckpt").parent
    if (runs.read_json(path / "result.json") or {}).get("status") == "finished":
        return []
    same = {"model": {k: cfg.model[k] for k in ("stem", "units", "widths", "strides", "kernels")}}
    same |= {k: cfg[k] for k in ("seed", "scale", "run_root", "threads", "fabric")} | {"data": {"size": cfg.data.size}}
    base = OmegaConf.merge(compose("config", overrides=[f"method={cfg.start.arm}", f"arm={cfg.start.arm}"]), same)
    return [*stems_first(base), (base, path)]  # type: ignore[arg-type,list-item]


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(cfg: DictConfig) -> None:
    out = HydraConfig.get().runtime.output_dir
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    try:
        fabric = runs.launch(cfg.fabric, loggers=[instantiate(cfg.logger)] if cfg.logger else [])
        for start, path in stems_first(cfg):
            fabric.print(f"{path} comes first")
            fit(start, fabric, path)
        fit(cfg, fabric, Path(out))
    finally:
        runs.remove_if_empty(out, cfg.run_root)


if __name__ == "__main__":
    main()
