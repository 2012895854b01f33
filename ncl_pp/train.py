"""Train one arm of NCL++ (or a baseline) on a long-tailed data set.

python train.py                                              digits, NCL++, seconds
python train.py method=bsce seed=1
python train.py experiment=cifar100_lt data.root=/datasets   the paper's recipe
torchrun --nproc_per_node=4 train.py experiment=imagenet_lt data.root=/datasets
"""

import math
import time
from functools import partial
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from common import runs
from common.data.batches import Plan, eval_batches, stream
from common.data.longtail import save_indices
from ncl_pp.contrastive import MomentumContrast, check_queue
from ncl_pp.criterion import NCLPlusLoss
from ncl_pp.data import LongTailed, build_data
from ncl_pp.metrics import expert_metrics
from ncl_pp.model import Experts, NCLModel
from ncl_pp.schedule import lr_at


def losses(model: nn.Module, criterion: NCLPlusLoss, views: list[Tensor], labels: Tensor) -> dict:
    """The named terms of one batch. views: N copies of the images and, in the arm that has a MoCo branch, one more view.

    The copies are concatenated copy-major: copy 0 of all images, then copy 1, ... (section 3.1)."""
    logits, contrast = model(torch.cat(views[: criterion.copies]), *views[criterion.copies :])
    return criterion(logits, labels) | contrast


def train_one_epoch(fabric: Fabric, model, criterion, optimizer, batches, *, epoch, accumulation, run) -> dict:
    """One pass over the training set; returns the mean of every loss term and the images seen per second."""
    model.train()
    sums: dict[str, Tensor] = {}
    start, images_seen = time.perf_counter(), 0
    total = len(batches)
    bar = tqdm(
        batches.epoch(epoch), total=total, desc=f"epoch {epoch}", leave=False, disable=None if total > 20 else True
    )
    for micro, batch in enumerate(bar):
        step = (epoch - 1) * (total // accumulation) + micro // accumulation
        last = (micro + 1) % accumulation == 0
        with fabric.no_backward_sync(model, enabled=not last):
            terms = losses(model, criterion, *batch)
            loss = sum(terms.values())
            runs.check_finite({**terms, "loss": loss}, step=step, last_good=run.checkpoint)
            fabric.backward(loss / accumulation)
        if last:
            norm = fabric.clip_gradients(model, optimizer, max_norm=math.inf, error_if_nonfinite=False)
            if run.config["fabric"]["precision"] != "16-mixed":  # the fp16 loss scaler skips such a step by itself
                runs.check_finite({"gradient norm": norm}, step=step, last_good=run.checkpoint)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model.after_step()
        images_seen += len(batch[1]) * fabric.world_size
        for name, value in terms.items():
            sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach()
    means = {name: value.item() / total for name, value in sums.items()}
    return means | {"images_per_s": images_seen / (time.perf_counter() - start)}


@torch.no_grad()
def predict(fabric: Fabric, model: nn.Module, dataset, *, batch_size: int, workers: int) -> tuple[Tensor, Tensor]:
    """Raw logits (K, M, C) and labels (M,) of a data set on every rank, on CPU."""
    model.eval()
    rank, world = fabric.global_rank, fabric.world_size
    loader = eval_batches(dataset, batch_size=batch_size, workers=workers, rank=rank, world=world)
    outputs = [(model(x.to(fabric.device))[0].transpose(0, 1), y) for x, y in loader]
    logits = torch.cat([z for z, _ in outputs])
    labels = torch.cat([y for _, y in outputs]).to(fabric.device)
    if world > 1:  # shares differ by one image at most: pad, gather, drop the padding
        size = math.ceil(len(dataset) / world)
        pad = size - len(logits)
        logits = torch.cat([logits, logits[:pad]])
        labels = torch.cat([labels, labels.new_full((pad,), -1)])
        logits, labels = fabric.all_gather(logits).flatten(0, 1), fabric.all_gather(labels).flatten()
        logits, labels = logits[labels >= 0], labels[labels >= 0]
    return logits.transpose(0, 1).float().cpu(), labels.cpu()


def build(cfg: DictConfig, data: LongTailed) -> tuple[NCLModel, NCLPlusLoss]:
    """Model and criterion of a configuration, with weights drawn from its seed.

    parity switches on what the released code does otherwise: eps, log(p + 1e-9) in the distillation; init,
    torch's default convolution init for timm models; moco, see `contrastive.MomentumContrast`."""
    torch.manual_seed(stream(cfg.seed))
    make = partial(
        Experts, num_classes=len(data.counts), experts=cfg.method.experts,
        in_channels=data.channels, official_init=cfg.parity.init, **cfg.model,
    )  # fmt: skip
    experts, contrast = make(), None
    if cfg.method.w_con:
        keys = make().backbones if cfg.parity.moco else None
        contrast = MomentumContrast(
            experts.backbones, experts.num_features, official_quirks=cfg.parity.moco, key_backbones=keys, **cfg.moco
        )
    criterion = NCLPlusLoss(data.counts, copies=cfg.method.copies, official_eps=cfg.parity.eps, **cfg.method.loss)
    return NCLModel(experts, contrast, weight=cfg.method.w_con), criterion


def preflight(fabric: Fabric, cfg: DictConfig, model, criterion, optimizer, batches) -> None:
    """One step forward and backward; prints memory and hours. Writes nothing."""
    batch = next(batches.epoch(1))
    for _ in range(2):  # the first step also pays for allocation and kernel selection
        start = time.perf_counter()
        fabric.backward(sum(losses(model, criterion, *batch).values()))
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    optimizer.zero_grad(set_to_none=True)
    parameters = sum(p.numel() for p in model.parameters())
    memory = (
        f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the card, " if fabric.device.type == "cuda" else ""
    )
    hours = seconds * len(batches) * cfg.train.epochs / 3600
    fabric.print(
        f"preflight: data found, {len(batch[1])} images x {cfg.method.copies} copies per device and step, {parameters:,} "
        f"parameters, {memory}{seconds:.3f} s per step without data loading, about {hours:.2g} h for {cfg.train.epochs} epochs"
    )


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Build, train to the end, evaluate; resumes from out/last.ckpt."""
    per_device = runs.per_device_batch(cfg.train.batch_size, fabric.world_size, cfg.train.accumulation)
    schedule = partial(lr_at, base_lr=cfg.optim.lr, epochs=cfg.train.epochs, **cfg.schedule)
    schedule(1)  # a bad one stops here, before any data
    if cfg.method.w_con:
        check_queue(cfg.moco.queue, per_device * fabric.world_size)
    data = build_data(seed=cfg.seed, **cfg.data)
    data.split(cfg.evaluate.split)
    model, criterion = build(cfg, data)
    if fabric.world_size > 1 and fabric.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.SGD(model.parameters(), **cfg.optim)
    model, optimizer = fabric.setup(model, optimizer)
    criterion = criterion.to(fabric.device)
    plan = Plan(
        len(data.indices), cfg.train.batch_size, seed=cfg.seed,
        rank=fabric.global_rank, world=fabric.world_size, accumulation=cfg.train.accumulation,
    )  # fmt: skip
    batches = data.batches(plan, copies=cfg.method.copies, device=fabric.device, second_view=bool(cfg.method.w_con))
    if cfg.preflight:
        return preflight(fabric, cfg, model, criterion, optimizer, batches)

    def evaluate(split: str) -> dict[str, float]:
        logits, labels = predict(
            fabric, model, data.split(split), batch_size=cfg.evaluate.batch_size, workers=cfg.data.workers
        )
        return expert_metrics(logits, labels, data.counts, groups=cfg.evaluate.groups)

    run = runs.Run.open(out, cfg, fabric)
    if run is None:
        return
    with run:
        if data.full_size and fabric.is_global_zero:  # the draw matters by about a point; data.indices= repeats it
            save_indices(run.dir / "indices.json", data.indices, dataset=cfg.data.name, size=data.full_size)
        first, best = 1, -1.0
        if (state := run.load_checkpoint()) is not None:
            if state["indices"] != data.indices:
                raise runs.RunError(
                    f"{run.checkpoint} was trained on another subset of {cfg.data.name}; force=true starts again"
                )
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first, best = state["epoch"] + 1, state["best"]
        fabric.print(
            f"{cfg.arm} on {cfg.data.name}: {len(data.indices)} images of {len(data.counts)} classes ({max(data.counts)} .. "
            f"{min(data.counts)}), global batch {cfg.train.batch_size} = {fabric.world_size} devices x {cfg.train.accumulation} "
            f"micro-steps x {per_device}, lr {cfg.optim.lr}, epochs {first}..{cfg.train.epochs}"
        )
        start = time.perf_counter()
        for epoch in range(first, cfg.train.epochs + 1):
            torch.manual_seed(stream(cfg.seed, epoch, fabric.global_rank))  # dropout; batches have streams of their own
            lr = schedule(epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            row = train_one_epoch(
                fabric, model, criterion, optimizer, batches,
                epoch=epoch, accumulation=cfg.train.accumulation, run=run,
            )  # fmt: skip
            rate = row.pop("images_per_s")
            save = epoch % cfg.train.save_every == 0 or epoch == cfg.train.epochs
            if save and data.validation is not None:
                row["val_top1_ensemble"] = evaluate("validation")["top1_ensemble"]
            run.log(epoch=epoch, lr=lr, **row)
            for logger in fabric.loggers:
                logger.log_metrics({"lr": lr, **row}, step=epoch)
            if epoch % cfg.train.log_every == 0 or epoch in (first, cfg.train.epochs):
                left = (time.perf_counter() - start) / (epoch - first + 1) * (cfg.train.epochs - epoch)
                terms = "  ".join(f"{k} {v:.4f}" for k, v in row.items())
                fabric.print(
                    f"epoch {epoch}/{cfg.train.epochs}  lr {lr:.4g}  {terms}  {rate:.0f} images/s  {left:.0f} s left"
                )
            if save:
                better = row.get("val_top1_ensemble", -1.0) > best  # best.ckpt: where there is a validation split
                best = max(best, row.get("val_top1_ensemble", -1.0))
                checkpoint = {
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "best": best,
                    "indices": data.indices, "counts": data.counts, "classes": data.classes,
                    "channels": data.channels, "config": run.config,
                }  # fmt: skip
                for name in ["best.ckpt"] * better + ["last.ckpt"]:
                    run.save_checkpoint(checkpoint, name)
        metrics = evaluate(cfg.evaluate.split)
        run.finish(metrics)
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
