"""Train one arm of NCL++ (or a baseline) on a long-tailed data set.

python train.py                                              digits, NCL++, seconds
python train.py method=bsce seed=1
python train.py experiment=cifar100_lt data.root=/datasets   the paper's recipe
torchrun --nproc_per_node=4 train.py experiment=imagenet_lt data.root=/datasets
"""

import math
from functools import partial
from pathlib import Path

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor, nn

from common import runs
from common.data.batches import Plan, eval_batches, stream
from common.data.longtail import save_indices
from common.loop import Means, Progress, bar, compiled, gather, preflight, sync_norm
from common.scripts import script
from ncl_pp.checkpoint import state
from ncl_pp.contrastive import MomentumContrast, check_queue
from ncl_pp.criterion import NCLPlusLoss
from ncl_pp.data import LongTailed, build_data
from ncl_pp.metrics import expert_metrics, groups_of
from ncl_pp.model import Experts, NCLModel
from ncl_pp.schedule import lr_at


def losses(model: nn.Module, criterion: NCLPlusLoss, views: list[Tensor], labels: Tensor) -> dict:
    """The named terms of one batch. views: N copies of the images and, in the arm that has a MoCo branch, one more view.

    The copies are concatenated copy-major: copy 0 of all images, then copy 1, ...."""
    logits, contrast = model(torch.cat(views[: criterion.copies]), *views[criterion.copies :])
    return criterion(logits, labels) | contrast


def train_one_epoch(
    fabric: Fabric, model, criterion, optimizer, batches, *, epoch: int, run: runs.Run
) -> dict[str, float]:
    """One pass over the training set; returns the mean of every loss term over its images."""
    model.train()
    means, accumulation, precision = Means(), batches.plan.accumulation, run.config["fabric"]["precision"]
    for micro, batch in enumerate(bar(batches.epoch(epoch), total=len(batches), title=f"epoch {epoch}")):
        last = (micro + 1) % accumulation == 0
        with fabric.no_backward_sync(model, enabled=not last):
            terms = losses(model, criterion, *batch)
            fabric.backward(sum(terms.values()) / accumulation)
        means.add(terms, len(batch[1]))
        if last:
            norm = fabric.clip_gradients(model, optimizer, max_norm=math.inf, error_if_nonfinite=False)
            step = ((epoch - 1) * len(batches) + micro) // accumulation
            means.check(step=step, norm=norm, last_good=run.checkpoint, precision=precision)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model.after_step()
    return means.result(fabric)


@torch.no_grad()
def predict(fabric: Fabric, model: nn.Module, dataset, *, batch_size: int, workers: int) -> tuple[Tensor, Tensor]:
    """Raw logits (K, M, C) and labels (M,) of a data set in its order, on every rank, on CPU."""
    model.eval()
    loader = eval_batches(
        dataset, batch_size=batch_size, workers=workers, rank=fabric.global_rank, world=fabric.world_size
    )
    outputs = [(model(x.to(fabric.device))[0].transpose(0, 1), y) for x, y in loader]
    share = {"logits": torch.cat([z for z, _ in outputs]), "labels": torch.cat([y for _, y in outputs])}
    whole = gather(fabric, share, len(dataset))
    return whole["logits"].transpose(0, 1).float(), whole["labels"]


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


def check(cfg: DictConfig) -> None:
    """ValueError for what would otherwise be found out late: the schedule, the groups of the evaluation."""
    for epoch in {1, cfg.train.epochs}:
        lr_at(epoch, base_lr=cfg.optim.lr, epochs=cfg.train.epochs, **cfg.schedule)
    groups_of([1, 1, 1], cfg.evaluate.groups)
    if cfg.method.w_con:
        check_queue(cfg.moco.queue, cfg.train.batch_size // cfg.train.accumulation)


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Build, train to the end, evaluate; resumes from out/last.ckpt."""
    check(cfg)
    runs.per_device_batch(cfg.train.batch_size, fabric.world_size, cfg.train.accumulation)
    data = build_data(seed=cfg.seed, **cfg.data)
    data.split(cfg.evaluate.split)
    model, criterion = build(cfg, data)
    optimizer = torch.optim.SGD(model.parameters(), **cfg.optim)
    model, optimizer = fabric.setup(compiled(sync_norm(fabric, model), cfg.compile), optimizer)
    criterion = criterion.to(fabric.device)
    plan = Plan.of(cfg.train, len(data.indices), fabric, seed=cfg.seed)
    batches = data.batches(plan, copies=cfg.method.copies, device=fabric.device, second_view=bool(cfg.method.w_con))
    if cfg.preflight:
        model.train()
        batch = next(batches.epoch(1))
        preflight(
            fabric, lambda: fabric.backward(sum(losses(model, criterion, *batch).values())),
            parameters=sum(p.numel() for p in model.parameters()), what=f"{len(batch[1])} images x {cfg.method.copies} copies",
            steps=len(batches) * cfg.train.epochs,
        )  # fmt: skip
        return
    if (run := runs.Run.open(out, cfg, fabric, data=data.source)) is not None:
        with run:
            train(fabric, run, cfg, data, model, criterion, optimizer, batches)


def train(
    fabric: Fabric, run: runs.Run, cfg: DictConfig, data: LongTailed, model, criterion, optimizer, batches
) -> None:
    """The epochs from the last checkpoint on, then the evaluation."""

    def evaluate(split: str) -> dict[str, float]:
        options = {"batch_size": cfg.evaluate.batch_size, "workers": cfg.data.workers}
        logits, labels = predict(fabric, model, data.split(split), **options)
        return expert_metrics(logits, labels, data.counts, groups=cfg.evaluate.groups)

    if data.full_size and fabric.is_global_zero:  # the draw matters by about a point; data.indices= repeats it
        save_indices(run.dir / "indices.json", data.indices, dataset=cfg.data.name, size=data.full_size)
    first, best, epochs = 1, -1.0, cfg.train.epochs
    if (saved := run.load_checkpoint()) is not None:
        if saved["indices"] != data.indices:
            raise runs.RunError(
                f"{run.checkpoint} was trained on another subset of {cfg.data.name}; force=true starts again"
            )
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, best = saved["epoch"] + 1, saved["best"]
    fabric.print(
        f"{cfg.arm} on {cfg.data.name}: {len(data.indices)} images of {len(data.counts)} classes ({max(data.counts)} .. "
        f"{min(data.counts)}), {batches.plan}, lr {cfg.optim.lr}, epochs {first}..{epochs}"
    )
    progress = Progress(fabric, run, first=first, last=epochs, every=cfg.train.log_every)
    for epoch in range(first, epochs + 1):
        torch.manual_seed(stream(cfg.seed, epoch, fabric.global_rank))  # dropout; batches have streams of their own
        lr = lr_at(epoch, base_lr=cfg.optim.lr, epochs=epochs, **cfg.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        row = {"lr": lr, **train_one_epoch(fabric, model, criterion, optimizer, batches, epoch=epoch, run=run)}
        save, names = epoch % cfg.train.save_every == 0 or epoch == epochs, ["last.ckpt"]
        if (
            save and data.validation is not None
        ):  # best.ckpt: where there is a validation split, never chosen on the test set
            row["val_top1_ensemble"] = evaluate("validation")["top1_ensemble"]
            if row["val_top1_ensemble"] > best:
                best, names = row["val_top1_ensemble"], ["best.ckpt", "last.ckpt"]
        progress.report(epoch, row, images=batches.plan.steps * batches.plan.batch_size)
        for name in names if save else ():
            run.save_checkpoint(state(model, optimizer, data, epoch=epoch, best=best, config=run.config), name)
    metrics = evaluate(cfg.evaluate.split)
    run.finish(metrics)
    fabric.print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


main = script("config", fit)


if __name__ == "__main__":
    main()
