"""Train one arm of Q-ViT: a float teacher (method=fp), or a quantised student that starts from it and learns from it.

python train.py                                                  cued digits, 2 bit, IRM + DGD, about a minute
python train.py method=baseline method.bits=4 seed=1
python train.py experiment=deit_small data.root=/datasets/imagenet         the paper's recipe
torchrun --nproc_per_node=8 train.py experiment=deit_small data.root=/datasets/imagenet
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from common import runs
from common.data.batches import Plan, eval_batches, stream
from common.loop import Means, Progress, bar, gather, preflight
from common.quant.lsq import check_steps
from common.scripts import script
from q_vit import teacher as teachers
from q_vit.arms import build, check, digest, is_float, make_optimizer, notices
from q_vit.checkpoint import about_of, state
from q_vit.data import Data, build_data
from q_vit.distribution_guided_distillation import dgd_loss, hard_distillation
from q_vit.metrics import accuracy, imitation, query_key_statistics
from q_vit.model import prefix_tokens
from q_vit.quantized_vit import Tapped, keep_steps_positive
from q_vit.schedule import lr_at


def losses(fabric: Fabric, student, teacher, images: Tensor, labels: Tensor, *, method, prefix) -> dict[str, Tensor]:
    """The named terms of one micro-batch: ce and kd (hard labels), and dgd where the method has it."""
    dgd = dict(method.dgd)
    weight, _ = dgd.pop("weight"), dgd.pop("student_tap")
    expected, theirs = None, None
    if teacher is not None and (weight or method.distill == "hard"):
        with torch.no_grad(), fabric.autocast():
            expected, theirs = teacher(images)
    logits, qk = student(images)
    terms = hard_distillation(logits, labels, expected if method.distill == "hard" else None)
    if weight and theirs is not None:
        terms["dgd"] = weight * dgd_loss(qk, theirs, prefix=prefix, **dgd)
    return terms


def train_one_epoch(
    fabric: Fabric, student, teacher, optimizer, batches, *, epoch: int, cfg: DictConfig, prefix, run: runs.Run
) -> dict[str, float]:
    """One pass over the training set; returns the mean of every loss term over its images, and the last learning rate."""
    student.train()
    means, accumulation, lr = Means(), cfg.train.accumulation, 0.0
    steps, epochs, precision = batches.plan.steps, cfg.train.epochs, run.config["fabric"]["precision"]
    for micro, (images, labels) in enumerate(bar(batches.epoch(epoch), total=len(batches), title=f"epoch {epoch}")):
        step, last = (epoch - 1) * steps + micro // accumulation, (micro + 1) % accumulation == 0
        with fabric.no_backward_sync(student, enabled=not last):
            terms = losses(fabric, student, teacher, images, labels, method=cfg.method, prefix=prefix)
            fabric.backward(sum(terms.values()) / accumulation)
        means.add(terms, len(labels))
        if last:
            norm = fabric.clip_gradients(student, optimizer, max_norm=math.inf, error_if_nonfinite=False)
            means.check(step=step, norm=norm, last_good=run.checkpoint, precision=precision)
            lr = lr_at(step, base_lr=cfg.optim.lr, steps=steps * epochs, epochs=epochs, **cfg.schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            keep_steps_positive(student)
            optimizer.zero_grad(set_to_none=True)
    return means.result(fabric) | {"lr": lr}


@torch.no_grad()
def predict(fabric: Fabric, model: nn.Module, dataset, *, batch_size: int, workers: int) -> tuple[Tensor, Tensor]:
    """Logits (M, C), heads averaged, and labels (M,) of a data set in its order, on every rank, on CPU."""
    model.eval()
    share = {"rank": fabric.global_rank, "world": fabric.world_size}
    outputs = [
        (model(x.to(fabric.device)), y)
        for x, y in eval_batches(dataset, batch_size=batch_size, workers=workers, **share)
    ]
    own = {"logits": torch.cat([z for z, _ in outputs]).float(), "labels": torch.cat([y for _, y in outputs])}
    whole = gather(fabric, own, len(dataset))
    return whole["logits"], whole["labels"]


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Build, train to the end, evaluate; resumes from out/last.ckpt."""
    check(cfg)
    runs.per_device_batch(cfg.train.batch_size, fabric.world_size, cfg.train.accumulation)
    data = build_data(**cfg.data)
    if cfg.train.eval_every and data.validation is None:
        raise ValueError(
            f"train.eval_every={cfg.train.eval_every}: no validation split; set images aside with data.validation"
        )
    plan = Plan.of(cfg.train, data.images, fabric, seed=cfg.seed, repeats=data.repeats)
    batches = data.batches(plan, fabric.device)
    core, teacher, note = build(cfg, data, None if is_float(cfg.method) else teachers.find(cfg, fabric, fit))
    prefix, source = (prefix_tokens(core), 0), data.source
    if teacher is not None:
        prefix, source = (prefix[0], prefix_tokens(teacher)), source | {"teacher": digest(teacher)}
        teacher = Tapped(teacher, "raw").to(fabric.device).eval()
    student = Tapped(core, "raw" if is_float(cfg.method) else cfg.method.dgd.student_tap)
    student, optimizer = fabric.setup(student, make_optimizer(core, cfg.optim))
    for line in notices(cfg, fabric.world_size):
        fabric.print(line)
    if cfg.preflight:
        student.train()
        batch = next(iter(batches.epoch(1)))
        step = partial(losses, fabric, student, teacher, *batch, method=cfg.method, prefix=prefix)
        preflight(
            fabric, lambda: fabric.backward(sum(step().values())), parameters=sum(p.numel() for p in core.parameters()),
            what=f"{len(batch[1])} images", steps=len(batches) * cfg.train.epochs, note=note,
        )  # fmt: skip
        return
    plain = OmegaConf.merge(
        cfg, {"teacher": {"force": False}}
    )  # it says what to do with the teacher, not what to compute
    if (run := runs.Run.open(out, plain, fabric, data=source)) is not None:  # type: ignore[arg-type]
        with run:
            train(fabric, run, cfg, data, core, student, teacher, optimizer, batches, prefix)


def train(
    fabric: Fabric, run: runs.Run, cfg: DictConfig, data: Data, core, student, teacher, optimizer, batches, prefix
) -> None:
    """The epochs from the last checkpoint on, then the evaluation."""
    first, row, best, epochs = 1, {}, -1.0, cfg.train.epochs
    if (saved := run.load_checkpoint()) is not None:
        core.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, row, best = saved["epoch"] + 1, saved["row"], saved["best"]
    fabric.print(
        f"{cfg.arm} on {cfg.data.name}: {cfg.method.bits} bit, {data.images} images per epoch, {batches.plan}, "
        f"lr {cfg.optim.lr}, epochs {first}..{epochs}"
    )
    about, options = (
        about_of(run.config, data.about()),
        {"batch_size": cfg.evaluate.batch_size, "workers": cfg.data.workers},
    )
    progress = Progress(fabric, run, first=first, last=epochs, every=cfg.train.log_every)

    def save(epoch: int, name: str = "last.ckpt") -> None:
        run.save_checkpoint(
            state(core, optimizer, epoch=epoch, row=row, best=best, about=about, config=run.config), name
        )

    for epoch in range(first, epochs + 1):
        torch.manual_seed(stream(cfg.seed, epoch, fabric.global_rank))  # drop path; batches have streams of their own
        row = train_one_epoch(
            fabric, student, teacher, optimizer, batches, epoch=epoch, cfg=cfg, prefix=prefix, run=run
        )
        check_steps(core)
        shown: dict[str, Any] = dict(row)
        better = False
        if cfg.train.eval_every and (epoch % cfg.train.eval_every == 0 or epoch == epochs):
            shown["val_top1"] = accuracy(*predict(fabric, core, data.validation, **options))["top1"]
            better, best = shown["val_top1"] > best, max(best, shown["val_top1"])
        progress.report(epoch, shown, images=batches.plan.steps * batches.plan.batch_size)
        if better:  # chosen on images set aside for it, never on the test set
            save(epoch, "best.ckpt")
        if epoch % cfg.train.save_every == 0 or epoch == epochs:
            save(epoch)
    if epochs == 0:
        save(0)
    logits, labels = predict(fabric, core, data.test, **options)
    images = torch.stack([data.test[i][0] for i in range(min(cfg.evaluate.statistics_images, len(labels)))])
    images = images.to(fabric.device)
    metrics = accuracy(logits, labels) | query_key_statistics(core, images)
    if teacher is not None:
        metrics |= imitation(core, teacher.model, images, prefix=prefix)
    run.finish(metrics | {f"loss_{k}": v for k, v in row.items() if k != "lr"})
    fabric.print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


main = script("config", fit)


if __name__ == "__main__":
    main()
