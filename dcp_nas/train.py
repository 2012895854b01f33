"""Train the network of a genotype with 1-bit weights and activations: in one stage, or in two with stage=step1, stage=step2.

python train.py                                          digits, the genotype of `python search.py` (searched first if missing)
python train.py genotype=random genotype.draw=3          a random genotype; genotype=dcp_nas_l model.nodes... the published cell
python train.py stage=step1; python train.py stage=step2 init.weights=runs/default/dcp_ggn_do/stage-step1/seed0/last.ckpt
torchrun --nproc_per_node=8 train.py experiment=imagenet_step1 data.root=/datasets/imagenet
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor, nn

from common import runs
from common.data.batches import Plan, eval_batches, stream
from common.loop import Means, Progress, bar, gather, preflight, sync_norm
from common.scripts import script
from dcp_nas.checkpoint import build_network, build_teacher, initialise, stage_path, state
from dcp_nas.checks import check_training
from dcp_nas.data import Data, build_data
from dcp_nas.genotypes import genotype_for
from dcp_nas.operations import reconstruction_error
from dcp_nas.search_space import Genotype

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def distribution_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_b sum_n -softmax(teacher)_n log_softmax(student)_n; logits (B, N). ValueError for different shapes."""
    if student.shape != teacher.shape:
        raise ValueError(f"student logits {tuple(student.shape)}, teacher logits {tuple(teacher.shape)} must be equal")
    return F.cross_entropy(student, teacher.softmax(1))


def cosine_lr(epoch: int, *, lr: float, lr_min: float, epochs: int) -> float:
    """lr in epoch 1, falling by half a cosine towards lr_min."""
    return lr_min + (lr - lr_min) * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2


def losses(model, network, teacher, images: Tensor, labels: Tensor, cfg: DictConfig) -> dict[str, Tensor]:
    """The terms of one batch: against the teacher's distribution or the labels, the second classifier, the reconstruction."""
    outputs = model(images)
    logits, auxiliary = outputs if isinstance(outputs, tuple) else (outputs, None)
    if teacher is None:
        loss = F.cross_entropy(logits, labels, label_smoothing=cfg.train.label_smoothing)
    else:
        with torch.no_grad():
            soft = teacher(images)
        loss = distribution_loss(logits, soft)
    if auxiliary is not None:
        loss = loss + cfg.train.auxiliary_weight * F.cross_entropy(auxiliary, labels)
    terms = {"loss": loss}
    if cfg.stage.reconstruction:
        terms["reconstruction"] = cfg.stage.reconstruction * reconstruction_error(network)
    return terms


def train_one_epoch(
    fabric: Fabric, model, network, teacher, optimizer, batches, *, epoch, cfg, run
) -> dict[str, float]:
    """One pass over the training set; returns the mean of every term over its images."""
    model.train()
    means, accumulation = Means(), batches.plan.accumulation
    for micro, ((images,), labels) in enumerate(bar(batches.epoch(epoch), total=len(batches), title=f"epoch {epoch}")):
        last = (micro + 1) % accumulation == 0
        with fabric.no_backward_sync(model, enabled=not last):
            terms = losses(model, network, teacher, images, labels, cfg)
            fabric.backward(sum(terms.values()) / accumulation)
        means.add(terms, len(labels))
        if last:
            norm = fabric.clip_gradients(
                model, optimizer, max_norm=cfg.train.clip or math.inf, error_if_nonfinite=False
            )
            step = ((epoch - 1) * len(batches) + micro) // accumulation
            means.check(step=step, norm=norm, last_good=run.checkpoint, precision=cfg.fabric.precision)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return means.result(fabric)


@torch.no_grad()
def predict(fabric: Fabric, model, dataset, *, batch_size: int, workers: int) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and labels (N,) of a data set in its order, on every rank, on CPU."""
    model.eval()
    rank, world = fabric.global_rank, fabric.world_size
    loader = eval_batches(dataset, batch_size=batch_size, workers=workers, rank=rank, world=world)
    outputs = [(model(x.to(fabric.device)).float(), y) for x, y in loader]
    share = {"logits": torch.cat([z for z, _ in outputs]), "labels": torch.cat([y for _, y in outputs])}
    whole = gather(fabric, share, len(dataset))
    return whole["logits"], whole["labels"]


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """top1 and top5 in percent, test_ce in nats."""
    best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    top1, top5 = (100 * best[:, :k].any(1).double().mean().item() for k in (1, 5))
    return {"top1": top1, "top5": top5, "test_ce": F.cross_entropy(logits, labels).item()}


def build_optimizer(model: nn.Module, cfg: DictConfig) -> torch.optim.Optimizer:
    """Adam, AdamW or SGD on all parameters."""
    o = cfg.optim
    options = {"momentum": o.momentum} if o.name == "sgd" else {}
    return OPTIMIZERS[o.name](model.parameters(), lr=o.lr, weight_decay=o.weight_decay, **options)


def build(cfg: DictConfig, data: Data, genotype: Genotype) -> nn.Module:
    """The network of a configuration, with weights drawn from its seed or loaded from its first step."""
    torch.manual_seed(stream(cfg.seed))
    model = build_network(
        genotype=genotype, model=cfg.model, stage=cfg.stage, official_m_grad=cfg.parity.official_m_grad, classes=data.classes,
        channels=data.channels,
    )  # fmt: skip
    if (path := stage_path(cfg, cfg.init)) is not None:
        initialise(model, path)
    return model


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Build, train to the end, evaluate; resumes from out/last.ckpt."""
    check_training(cfg)
    runs.per_device_batch(cfg.train.batch_size, fabric.world_size, cfg.train.accumulation)
    data = build_data(seed=cfg.seed, **cfg.data)
    plan = Plan.of(cfg.train, len(data), fabric, seed=cfg.seed)
    genotype = genotype_for(cfg, world_size=fabric.world_size, source=data.source)
    model = build(cfg, data, genotype)
    teacher = build_teacher(cfg.teacher, stage_path(cfg, cfg.teacher), classes=data.classes, channels=data.channels)
    network = sync_norm(fabric, model) if cfg.train.sync_norm else model
    model, optimizer = fabric.setup(network, build_optimizer(network, cfg))
    teacher = None if teacher is None else fabric.to_device(teacher)
    batches = data.batches(plan, fabric.device)
    if cfg.preflight:
        model.train()
        (images,), labels = next(iter(batches.epoch(1)))
        preflight(
            fabric, lambda: fabric.backward(sum(losses(model, network, teacher, images, labels, cfg).values())),
            parameters=sum(p.numel() for p in model.parameters()), what=f"{len(labels)} images",
            steps=len(batches) * cfg.train.epochs,
        )  # fmt: skip
        return
    if (run := runs.Run.open(out, cfg, fabric, data=data.source)) is not None:
        with run:
            train(fabric, run, cfg, data, genotype, model, network, teacher, optimizer, batches)


def train(
    fabric: Fabric, run: runs.Run, cfg, data: Data, genotype, model, network, teacher, optimizer, batches
) -> None:
    """The epochs from the last checkpoint on, then the evaluation."""
    first, rows, epochs = 1, [], cfg.train.epochs
    if (saved := run.load_checkpoint()) is not None:
        network.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, rows = saved["epoch"] + 1, saved["rows"]
    fabric.print(
        f"{cfg.arm} on {cfg.data.name}: {genotype}\n{len(data)} images of {data.classes} classes, "
        f"{'teacher' if teacher else 'labels'}, {batches.plan}, lr {cfg.optim.lr}, epochs {first}..{epochs}"
    )
    about = {"task": "classification", **data.about(), "seed": cfg.seed}
    about["data"] = {k: v for k, v in run.config["data"].items() if k not in ("root", "workers", "download")}
    progress = Progress(fabric, run, first=first, last=epochs, every=cfg.train.log_every)
    for epoch in range(first, epochs + 1):
        torch.manual_seed(stream(cfg.seed, epoch, fabric.global_rank))
        lr = cosine_lr(epoch, lr=cfg.optim.lr, lr_min=cfg.optim.lr_min, epochs=epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        network.drop_path = cfg.model.drop_path * (epoch - 1) / epochs  # grows, as in DARTS
        row = train_one_epoch(fabric, model, network, teacher, optimizer, batches, epoch=epoch, cfg=cfg, run=run)
        rows.append(row)
        progress.report(epoch, {"lr": lr, **row}, images=batches.plan.steps * batches.plan.batch_size)
        if epoch % cfg.train.save_every == 0 or epoch == epochs:
            run.save_checkpoint(state(network, optimizer, about, genotype, epoch=epoch, rows=rows, config=run.config))
    logits, labels = predict(fabric, model, data.test, batch_size=cfg.evaluate.batch_size, workers=cfg.data.workers)
    metrics = classification_metrics(logits, labels)
    run.finish(metrics | {"last_loss": rows[-1]["loss"], "skips": genotype.skips()})
    fabric.print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


main = script("config", fit)


if __name__ == "__main__":
    main()
