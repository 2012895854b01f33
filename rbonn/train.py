"""Train one arm of RBONN (or a baseline): one stage, or the second of two with init.* (and a teacher with teacher.*).

python train.py                                              digits, RBONN in one stage, seconds
python train.py method=activations                           stage 1: binary activations, real weights
python train.py method=drelu_fixed init.arm=activations      stage 2 from it
python train.py experiment=imagenet_stage2 data.root=/datasets/imagenet init.weights=stage1.ckpt
torchrun --nproc_per_node=8 train.py experiment=imagenet_stage1 data.root=/datasets/imagenet
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
from common.loop import Means, Progress, bar, compiled, gather, preflight, sync_norm
from common.scripts import script
from rbonn.binarize import parameter_groups
from rbonn.checkpoint import resume, state
from rbonn.data import Classified, build_data, check_data
from rbonn.distillation import distribution_loss
from rbonn.layers import anneal, latent_sparsity
from rbonn.metrics import classification_metrics
from rbonn.network import build_network
from rbonn.recurrent import Recurrence
from rbonn.schedule import lr_at
from rbonn.stages import build_teacher, check_teacher, initialise, stage_path, weights_identity

OPTIMIZERS = ("adam", "sgd")


def loss_of(model: nn.Module, teacher: nn.Module | None, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the labels, or with the teacher's probabilities where there is one."""
    logits = model(images)
    if teacher is None:
        return F.cross_entropy(logits, labels)
    with torch.no_grad():
        soft = teacher(images)
    return distribution_loss(logits, soft)


def train_one_epoch(
    fabric: Fabric, model, teacher, optimizer, batches, *, epoch: int, run: runs.Run
) -> dict[str, float]:
    """One pass over the training set; returns the mean loss over its images."""
    model.train()
    means, accumulation, precision = Means(), batches.plan.accumulation, run.config["fabric"]["precision"]
    for micro, ((images,), labels) in enumerate(bar(batches.epoch(epoch), total=len(batches), title=f"epoch {epoch}")):
        last = (micro + 1) % accumulation == 0
        with fabric.no_backward_sync(model, enabled=not last):
            loss = loss_of(model, teacher, images, labels)
            fabric.backward(loss / accumulation)
        means.add({"loss": loss}, len(labels))
        if last:
            norm = fabric.clip_gradients(model, optimizer, max_norm=math.inf, error_if_nonfinite=False)
            step = ((epoch - 1) * len(batches) + micro) // accumulation
            means.check(step=step, norm=norm, last_good=run.checkpoint, precision=precision)
            optimizer.step()  # its hook hands the gradients to the recurrent layers
            optimizer.zero_grad(set_to_none=True)
    return means.result(fabric)


@torch.no_grad()
def predict(fabric: Fabric, model: nn.Module, dataset, *, batch_size: int, workers: int) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and labels (N,) of a data set in its order, on every rank, on CPU."""
    model.eval()
    rank, world = fabric.global_rank, fabric.world_size
    loader = eval_batches(dataset, batch_size=batch_size, workers=workers, rank=rank, world=world)
    outputs = [(model(x.to(fabric.device)).float(), y) for x, y in loader]
    share = {"logits": torch.cat([z for z, _ in outputs]), "labels": torch.cat([y for _, y in outputs])}
    whole = gather(fabric, share, len(dataset))
    return whole["logits"], whole["labels"]


def build_optimizer(model: nn.Module, cfg: DictConfig) -> torch.optim.Optimizer:
    """Adam or SGD on the published groups: u at a tenth of the rate, weight decay on convolution weights."""
    o = cfg.optim
    groups = parameter_groups(
        model, lr=o.lr, weight_decay=o.weight_decay, u_lr_mult=o.u_lr_mult, decay_4d_biases=cfg.parity.decay_4d_biases
    )
    return torch.optim.Adam(groups) if o.name == "adam" else torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum)


def build(cfg: DictConfig, data: Classified) -> tuple[nn.Module, nn.Module | None, dict[str, str]]:
    """(network, teacher or None, the hashes of the weights that they begin with).

    The network's weights are drawn from the seed, or loaded from its first stage. A preflight makes do without stages."""
    torch.manual_seed(stream(cfg.seed))
    options = {
        "model": cfg.model,
        "sign_zero": cfg.parity.sign_zero,
        "classes": data.classes,
        "channels": data.channels,
    }
    model = build_network(method=cfg.method, **options)
    if (first := stage_path(cfg, "init", fresh=cfg.preflight)) is not None:
        initialise(model, first, classes=data.names)
    teacher = build_teacher(
        path=stage_path(cfg, "teacher", fresh=cfg.preflight), node=cfg.teacher, classes=data.names, channels=data.channels,
        fresh={"method": {"weights": "real", "activations": "real"}, **options} if cfg.preflight else None,
    )  # fmt: skip
    begun = {"init": weights_identity(model if first is not None else None), "teacher": weights_identity(teacher)}
    return model, teacher, {k: v for k, v in begun.items() if v is not None}


def check(cfg: DictConfig) -> None:
    """ValueError or `RunError` for what would otherwise be found out late; reads no data and trains nothing."""
    runs.plain(cfg)
    if cfg.train.epochs < 1:
        raise ValueError(f"train.epochs={cfg.train.epochs}, allowed: >= 1")
    for epoch in {1, cfg.train.epochs}:
        lr_at(epoch, base_lr=cfg.optim.lr, epochs=cfg.train.epochs, **cfg.schedule)
    if cfg.optim.name not in OPTIMIZERS:
        raise ValueError(f"optim.name={cfg.optim.name!r}, allowed: {', '.join(OPTIMIZERS)}")
    check_data(**cfg.data)
    with torch.device("meta"):  # nothing is computed
        build_network(model=cfg.model, method=cfg.method, sign_zero=cfg.parity.sign_zero, classes=2, channels=1)
    check_teacher(cfg.teacher)
    for key in ("init", "teacher"):
        stage_path(cfg, key, fresh=cfg.preflight)


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Build, train to the end, evaluate; resumes from out/last.ckpt."""
    check(cfg)
    runs.per_device_batch(cfg.train.batch_size, fabric.world_size, cfg.train.accumulation)
    data = build_data(seed=cfg.seed, **cfg.data)
    plan = Plan.of(cfg.train, len(data), fabric, seed=cfg.seed)
    network, teacher, begun = build(cfg, data)
    network = sync_norm(fabric, network) if cfg.train.sync_norm else network
    torch_optimizer = build_optimizer(network, cfg)
    model, optimizer = fabric.setup(compiled(network, cfg.compile), torch_optimizer)
    recurrence = Recurrence(network, torch_optimizer)
    teacher = None if teacher is None else fabric.to_device(teacher)
    batches = data.batches(plan, fabric.device)
    if cfg.preflight:
        model.train()
        (images,), labels = next(iter(batches.epoch(1)))
        preflight(
            fabric, lambda: fabric.backward(loss_of(model, teacher, images, labels)),
            parameters=sum(p.numel() for p in network.parameters()), what=f"{len(labels)} images",
            steps=len(batches) * cfg.train.epochs, note="" if teacher is None else "the teacher's forward pass included",
        )  # fmt: skip
        return
    if (run := runs.Run.open(out, cfg, fabric, data=data.source | begun)) is not None:
        with run:
            train(fabric, run, cfg, data, (model, network), teacher, optimizer, recurrence, batches)


def train(
    fabric: Fabric, run: runs.Run, cfg, data: Classified, models, teacher, optimizer, recurrence, batches
) -> None:
    """The epochs from the last checkpoint on, then the evaluation. models: as Fabric wraps it, and bare."""
    model, network = models
    first, rows = resume(run.load_checkpoint(), network, optimizer, recurrence)
    epochs, plan = cfg.train.epochs, batches.plan
    fabric.print(
        f"{cfg.arm} on {cfg.data.name}: {len(data)} images of {data.classes} classes, {'teacher' if teacher else 'labels'}, "
        f"{plan}, lr {cfg.optim.lr}, epochs {first}..{epochs}"
    )
    progress = Progress(fabric, run, first=first, last=epochs, every=cfg.train.log_every)
    for epoch in range(first, epochs + 1):
        torch.manual_seed(stream(cfg.seed, epoch, fabric.global_rank))
        lr = lr_at(epoch, base_lr=cfg.optim.lr, epochs=epochs, **cfg.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
        anneal(network, (epoch - 1) / epochs)
        row = {"lr": lr, **train_one_epoch(fabric, model, teacher, optimizer, batches, epoch=epoch, run=run)}
        rows.append(row | recurrence.counters())
        progress.report(epoch, rows[-1], images=plan.steps * plan.batch_size)
        if epoch % cfg.train.save_every == 0 or epoch == epochs:
            about = {"epoch": epoch, "rows": rows, "about": data.about(), "config": run.config}
            run.save_checkpoint(state(network, optimizer, recurrence, **about))
    options = {"batch_size": cfg.evaluate.batch_size, "workers": cfg.data.workers}
    metrics = classification_metrics(*predict(fabric, model, data.test, **options)) | {"last_loss": rows[-1]["loss"]}
    if (plain := data.plain_train()) is not None:  # the loss of the network that is deployed, without look-ahead
        metrics["train_ce"] = F.cross_entropy(*predict(fabric, model, plain, **options)).item()
    for name in [
        n for n in rows[-1] if n not in ("lr", "loss")
    ]:  # flip_rate, active_share, lookahead_flips: means over the epochs
        metrics[name] = sum(r[name] for r in rows) / len(rows)
    if (sparsity := latent_sparsity(network)) is not None:
        metrics["latent_sparsity"] = sparsity
    run.finish(metrics)
    fabric.print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


main = script("config", fit)


if __name__ == "__main__":
    main()
