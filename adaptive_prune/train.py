"""Fine-tune one arm (AS-ViT or a baseline at equal MACs) from a dense vision transformer.

python train.py                                               digit grids, AS-ViT, a minute; trains the dense start first
python train.py method=topk seed=1
python train.py data=folder data.root=photos/ model=deit_cifar          your own class folders
python train.py experiment=deit_s data.root=/datasets/imagenet          the paper's recipe
torchrun --nproc_per_node=4 train.py experiment=deit_s data.root=/datasets/imagenet
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from omegaconf import DictConfig
from timm.data import Mixup  # pyright: ignore[reportPrivateImportUsage]
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from adaptive_prune.backbones import build_vit
from adaptive_prune.calibrate import calibrate_on
from adaptive_prune.checkpoint import state
from adaptive_prune.data import Data, build_data, mixed
from adaptive_prune.distillation import logit_kl, teacher_outputs, token_kl
from adaptive_prune.evaluation import evaluate
from adaptive_prune.metrics import mcnemar, merit
from adaptive_prune.model import PrunedViT
from adaptive_prune.settings import check, options
from adaptive_prune.stages import check_start, dense_start, load_start, matched_counts, matched_run, teacher_of
from common import runs
from common.data.batches import Plan, stream
from common.loop import Means, Progress, bar, compiled, preflight, sync_norm
from common.scripts import script


def loss_terms(fabric: Fabric, cfg: DictConfig, model, teacher, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """L = L_CE + lambda_1 L_budget + lambda_2 (L_KL + L_token), each term with its weight.

    labels: (b,) classes, or (b, C) mixed ones, which Mixup has smoothed already. The budget's mean is that of all ranks."""
    w = cfg.method.losses
    logits, info = model(images, details=True)
    smoothing = cfg.train.label_smoothing if labels.ndim == 1 else 0.0
    terms = {"ce": F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)}
    if w.budget:
        mean = None
        if fabric.world_size > 1 and not cfg.parity.budget_per_rank:
            mean = fabric.all_reduce(info.macs.mean().detach(), reduce_op="mean")
        terms["budget"] = w.budget * model.module.budget_loss(info.macs, form=cfg.budget.form, mean=mean)
    if teacher is not None:
        target, target_tokens = teacher_outputs(teacher, images)
        terms["distill"] = w.distill * logit_kl(logits, target)
        if w.token and info.alive is not None and target_tokens is not None:
            terms["token"] = w.token * token_kl(info.tokens, target_tokens, info.alive)
    if w.aux and info.tokens is not None:  # every token learns the image's label
        terms["aux"] = w.aux * F.cross_entropy(info.tokens.float().mean(1), labels, label_smoothing=smoothing)
    return terms


def train_one_epoch(fabric, cfg, model, teacher, optimizer, ema, mixup, data: Data, plan: Plan, *, epoch, run) -> dict:
    """One pass over the training set; returns the last rate and the mean of every loss term over all images."""
    model.train()
    means, lr = Means(), 0.0
    batches = bar(data.batches(plan, epoch, fabric.device), total=len(plan), title=f"epoch {epoch}")
    for micro, (images, labels) in enumerate(batches):
        step, last = micro // plan.accumulation, (micro + 1) % plan.accumulation == 0
        lr = cosine(cfg.optim.lr, cfg.optim.min_lr, (epoch - 1 + step / plan.steps) / cfg.train.epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        images, labels = mixed(mixup, images, labels, stream(cfg.seed, epoch, step))
        with fabric.no_backward_sync(model, enabled=not last):
            terms = loss_terms(fabric, cfg, model, teacher, images, labels)
            fabric.backward(sum(terms.values()) / plan.accumulation)
        means.add(terms, len(images))
        if last:
            norm = fabric.clip_gradients(
                model, optimizer, max_norm=cfg.train.clip or math.inf, error_if_nonfinite=False
            )
            at = (epoch - 1) * plan.steps + step
            means.check(step=at, norm=norm, last_good=run.checkpoint, precision=cfg.fabric.precision)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ema is not None:
                ema.update(model.module)
    return {"lr": lr, **means.result(fabric)}


def cosine(lr: float, min_lr: float, progress: float) -> float:
    """From lr at progress 0 to min_lr at 1."""
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def build(cfg: DictConfig, data: Data, start: Path | None, matched: Path | None) -> tuple[PrunedViT, nn.Module | None]:
    """The model of a configuration with its starting weights (start: a checkpoint; None: timm's or random ones), and the frozen
    teacher if it distils. matched: the run whose token counts it takes."""
    torch.manual_seed(stream(cfg.seed))
    known = cfg.start.pretrained and start is None
    vit = build_vit(**cfg.model.vit, num_classes=len(data.classes), in_chans=data.channels, pretrained=known)
    use, keep = options(runs.plain(cfg)), cfg.method.keep
    if matched is not None:
        keep = matched_counts(PrunedViT(vit, **{**use, "rule": "threshold"}), matched, cfg.method.schedule)
    model = PrunedViT(vit, keep=keep, **use)
    if start is not None:
        load_start(model, start, cfg)
    if cfg.method.calibrate:
        model.theta.requires_grad_(False)
    if hasattr(vit, "aux_head") and not (cfg.method.losses.token or cfg.method.losses.aux):
        vit.aux_head.requires_grad_(
            False
        )  # nothing trains it, and DDP waits for every parameter that could have a gradient
    return model, teacher_of(cfg, model)


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """The dense start if need be, then build, train to the end, evaluate; resumes from out/last.ckpt."""
    check(cfg)
    runs.per_device_batch(cfg.train.batch_size, fabric.world_size, cfg.train.accumulation)
    data = build_data(seed=cfg.seed, **cfg.data)
    plan = Plan.of(cfg.train, data.train_size, fabric, seed=cfg.seed, repeats=cfg.data.get("repeats", 1))
    check_start(cfg, data)
    matched = matched_run(cfg, data.source)
    model, teacher = build(cfg, data, dense_start(cfg, fabric, data, fit), matched)
    mix, classes = cfg.train.mixup, len(data.classes)
    mixup = Mixup(**mix, label_smoothing=cfg.train.label_smoothing, num_classes=classes) if mix else None
    # Biases, norms and the thresholds are not decayed.
    spared = ("vit.cls_token", "vit.pos_embed")
    groups = param_groups_weight_decay(model, cfg.optim.weight_decay, no_weight_decay_list=spared)
    optimizer = torch.optim.AdamW(groups, lr=cfg.optim.lr, betas=tuple(cfg.optim.betas))
    model, optimizer = fabric.setup(compiled(sync_norm(fabric, model), cfg.compile), optimizer)
    ema = ModelEmaV3(model.module, decay=cfg.train.ema) if cfg.train.ema else None
    teacher = fabric.to_device(teacher) if teacher is not None else None
    if cfg.preflight:
        model.train()
        images, labels = mixed(mixup, *next(iter(data.batches(plan, 1, fabric.device))), 0)
        preflight(
            fabric, lambda: fabric.backward(sum(loss_terms(fabric, cfg, model, teacher, images, labels).values())),
            parameters=sum(p.numel() for p in model.parameters()), what=f"{len(images)} images",
            steps=len(plan) * cfg.train.epochs, note="the dense start not counted",
        )  # fmt: skip
    elif (run := runs.Run.open(out, cfg, fabric, data=data.source)) is not None:
        with run:
            train(fabric, run, cfg, data, model, teacher, optimizer, ema, mixup, plan, matched)


def train(
    fabric, run, cfg, data: Data, model, teacher, optimizer, ema, mixup, plan: Plan, matched: Path | None
) -> None:
    """The epochs from the last checkpoint on, then the evaluation."""
    pruned, epochs, first, best = model.module, cfg.train.epochs, 1, [-math.inf, 0.0]
    split = "test" if data.validation is None else "validation"
    every = cfg.train.eval_every or (cfg.train.save_every if data.validation is not None else epochs)
    sizes = {"batch_size": cfg.evaluate.batch_size, "workers": cfg.data.get("workers", 0)}
    if (saved := run.load_checkpoint()) is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if ema is not None:
            ema.module.load_state_dict(saved["ema"])
        first, best = saved["epoch"] + 1, saved["best"]
    elif cfg.method.calibrate:
        calibrate_on(fabric, pruned, data, cfg.method.calibrate, cfg.budget.target, sizes["batch_size"])
    kept = f", keeps {pruned.keep}" if pruned.keep else ""
    fabric.print(
        f"{cfg.arm} on {cfg.data.name}: {pruned.cost.dense / 1e9:.4g} GMACs dense, budget {cfg.budget.target}{kept}, {plan}, "
        f"lr {cfg.optim.lr}, epochs {first}..{epochs} of {plan.steps} steps"
    )
    progress = Progress(fabric, run, first=first, last=epochs, every=cfg.train.log_every)
    for epoch in range(first, epochs + 1):
        torch.manual_seed(stream(cfg.seed, epoch, fabric.global_rank))  # drop path; batches have streams of their own
        row = train_one_epoch(fabric, cfg, model, teacher, optimizer, ema, mixup, data, plan, epoch=epoch, run=run)
        if cfg.method.calibrate:  # the thresholds follow the scores, they do not learn
            calibrate_on(fabric, pruned, data, cfg.method.calibrate, cfg.budget.target, sizes["batch_size"])
        if pruned.rule == "threshold":
            row |= {f"theta_{s + 1}": v for s, v in enumerate(pruned.theta.tolist())}
        names = ["last.ckpt"] if epoch % cfg.train.save_every == 0 or epoch == epochs else []
        if (epoch % every == 0 and epoch < epochs) or (epoch == epochs and data.validation is not None):
            found = evaluate(fabric, model, data, split=split, **sizes)[0]
            row |= {f"{split}_{k}": found[k] for k in ("top1", "macs")}
            if data.validation is not None and merit(found, cfg.budget.target) > best:
                best, names = merit(found, cfg.budget.target), ["best.ckpt", *names]  # never chosen on the test set
        progress.report(epoch, row, images=plan.steps * plan.batch_size)
        for name in names:
            run.save_checkpoint(state(model, optimizer, ema, data, epoch=epoch, best=best, config=run.config), name)
    metrics, found = evaluate(fabric, model, data, **sizes)
    if matched is not None:  # the same images, one by one: beside the paired interval over seeds
        pair = mcnemar(runs.load_checkpoint(matched / "evaluation.ckpt")["right"], found["right"])
        names = {"mcnemar_only_matched": "only_a", "mcnemar_only_here": "only_b", "mcnemar_p": "p"}
        metrics |= {name: pair[key] for name, key in names.items()}
    run.save_checkpoint({"right": found["right"], "kept": found["kept"], "macs": metrics["macs"]}, "evaluation.ckpt")
    run.finish(metrics)
    fabric.print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


main = script("config", fit)


if __name__ == "__main__":
    main()
