"""Train the network of a genotype with 1-bit weights and activations: in one stage, or in two with stage=step1, stage=step2.

python train.py                                          digits, the genotype of `python search.py` (searched first if missing)
python train.py genotype=random genotype.draw=3          a random genotype; genotype=dcp_nas_l model.nodes... the published cell
python train.py stage=step1; python train.py stage=step2 init.weights=runs/.../last.ckpt
torchrun --nproc_per_node=8 train.py experiment=imagenet_step1 data.root=/datasets/imagenet
"""

import math
import time
from dataclasses import asdict
from pathlib import Path

import hydra
import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from common import runs
from common.data.batches import Plan, eval_batches, stream
from dcp_nas.checkpoint import build_network, build_teacher, find_genotype, initialise, search_if_missing
from dcp_nas.data import build_data
from dcp_nas.operations import reconstruction_error

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def distribution_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_b sum_n -softmax(teacher)_n log_softmax(student)_n; logits (B, N). ValueError for different shapes."""
    if student.shape != teacher.shape:
        raise ValueError(f"student logits {tuple(student.shape)}, teacher logits {tuple(teacher.shape)} must be equal")
    return F.cross_entropy(student, teacher.softmax(1))


def cosine_lr(epoch: int, *, lr: float, lr_min: float, epochs: int) -> float:
    """lr in epoch 1, falling by half a cosine towards lr_min."""
    return lr_min + (lr - lr_min) * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2


def train_one_epoch(fabric: Fabric, model, network, teacher, optimizer, batches, *, epoch, cfg, run) -> dict:
    """One pass over the training set; returns the mean loss and the images seen per second."""
    model.train()
    total, accumulation, images_seen, start = len(batches), cfg.train.accumulation, 0, time.perf_counter()
    loss_sum = torch.zeros((), device=fabric.device)
    bar = tqdm(
        batches.epoch(epoch), total=total, desc=f"epoch {epoch}", leave=False, disable=None if total > 100 else True
    )
    for micro, ((images,), labels) in enumerate(bar):
        step = (epoch - 1) * (total // accumulation) + micro // accumulation
        last = (micro + 1) % accumulation == 0
        with fabric.no_backward_sync(model, enabled=not last):
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
            runs.check_finite(terms, step=step, last_good=run.checkpoint)
            fabric.backward(sum(terms.values()) / accumulation)
        if last:
            norm = fabric.clip_gradients(
                model, optimizer, max_norm=cfg.train.clip or math.inf, error_if_nonfinite=False
            )
            if run.config["fabric"]["precision"] != "16-mixed":  # the fp16 loss scaler skips such a step by itself
                runs.check_finite({"gradient norm": norm}, step=step, last_good=run.checkpoint)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss_sum += loss.detach()
        images_seen += len(labels) * fabric.world_size
    mean = fabric.all_reduce(loss_sum / total, reduce_op="mean").item()
    return {"loss": mean, "images_per_s": images_seen / (time.perf_counter() - start)}


@torch.no_grad()
def predict(fabric: Fabric, model, dataset, *, batch_size: int, workers: int) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and labels (N,) of a data set, each image once, on every rank (in another order), on CPU."""
    model.eval()
    rank, world = fabric.global_rank, fabric.world_size
    loader = eval_batches(dataset, batch_size=batch_size, workers=workers, rank=rank, world=world)
    outputs = [(model(x.to(fabric.device)).float(), y) for x, y in loader]
    logits = torch.cat([z for z, _ in outputs])
    labels = torch.cat([y for _, y in outputs]).to(fabric.device)
    if world > 1:  # shares differ by one image at most: pad, gather, drop the padding
        pad = math.ceil(len(dataset) / world) - len(logits)
        logits = torch.cat([logits, logits[:pad]])
        labels = torch.cat([labels, labels.new_full((pad,), -1)])
        logits, labels = fabric.all_gather(logits).flatten(0, 1), fabric.all_gather(labels).flatten()
        logits, labels = logits[labels >= 0], labels[labels >= 0]
    return logits.cpu(), labels.cpu()


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """top1 and top5 in percent, test_ce in nats."""
    best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    top1, top5 = (100 * best[:, :k].any(1).double().mean().item() for k in (1, 5))
    return {"top1": top1, "top5": top5, "test_ce": F.cross_entropy(logits, labels).item()}


def stage_path(cfg: DictConfig, node: DictConfig) -> Path | None:
    """The checkpoint that init or teacher names: its `weights`, or that of the run of `arm` at the same scale and seed."""
    if node.arm is not None and node.weights is not None:
        raise ValueError(f"give either an arm ({node.arm}) or weights ({node.weights}), not both")
    if node.weights is not None:
        return Path(node.weights)
    return None if node.arm is None else Path(cfg.run_root) / cfg.scale / node.arm / f"seed{cfg.seed}" / "last.ckpt"


def build_optimizer(model: nn.Module, cfg: DictConfig) -> torch.optim.Optimizer:
    """Adam, AdamW or SGD on all parameters. ValueError for another name."""
    o = cfg.optim
    if o.name not in OPTIMIZERS:
        raise ValueError(f"optim.name={o.name!r}, allowed: {', '.join(OPTIMIZERS)}")
    options = {"momentum": o.momentum} if o.name == "sgd" else {}
    return OPTIMIZERS[o.name](model.parameters(), lr=o.lr, weight_decay=o.weight_decay, **options)


def build(cfg: DictConfig, data, genotype) -> nn.Module:
    """The network of a configuration, with weights drawn from its seed or loaded from its first step."""
    torch.manual_seed(stream(cfg.seed))
    model = build_network(
        genotype=genotype, model=cfg.model, stage=cfg.stage, official_m_grad=cfg.parity.official_m_grad, classes=data.classes,
        channels=data.channels,
    )  # fmt: skip
    if (path := stage_path(cfg, cfg.init)) is not None:
        initialise(model, path)
    return model


def preflight(fabric: Fabric, cfg: DictConfig, model, optimizer, batches) -> None:
    """One step forward and backward; prints memory and hours. Writes nothing."""
    (images,), labels = next(iter(batches.epoch(1)))
    model.train()
    for _ in range(2):  # the first step also pays for allocation and kernel selection
        start = time.perf_counter()
        outputs = model(images)
        fabric.backward(
            sum(F.cross_entropy(z, labels) for z in (outputs if isinstance(outputs, tuple) else (outputs,)))
        )
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    optimizer.zero_grad(set_to_none=True)
    cuda = fabric.device.type == "cuda"
    memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the card, " if cuda else ""
    fabric.print(
        f"preflight: data found, {len(labels)} images per device and step, {sum(p.numel() for p in model.parameters()):,} "
        f"parameters, {memory}{seconds:.3f} s per step without data loading and teacher, about "
        f"{seconds * len(batches) * cfg.train.epochs / 3600:.2g} h for {cfg.train.epochs} epochs"
    )


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Build, train to the end, evaluate; resumes from out/last.ckpt."""
    per_device = runs.per_device_batch(cfg.train.batch_size, fabric.world_size, cfg.train.accumulation)
    genotype = find_genotype(cfg)
    data = build_data(seed=cfg.seed, **cfg.data)
    model = build(cfg, data, genotype)
    teacher = build_teacher(
        path=stage_path(cfg, cfg.teacher), timm_name=cfg.teacher.timm, classes=data.classes, channels=data.channels
    )
    if fabric.world_size > 1 and cfg.train.sync_norm and fabric.device.type == "cuda":  # torch has it for GPUs only
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    network = model
    model, optimizer = fabric.setup(model, build_optimizer(model, cfg))
    teacher = None if teacher is None else fabric.to_device(teacher)
    plan = Plan(
        len(data), cfg.train.batch_size, seed=cfg.seed,
        rank=fabric.global_rank, world=fabric.world_size, accumulation=cfg.train.accumulation,
    )  # fmt: skip
    batches = data.batches(plan, fabric.device)
    if cfg.preflight:
        return preflight(fabric, cfg, model, optimizer, batches)

    run = runs.Run.open(out, cfg, fabric)
    if run is None:
        return
    with run:
        first, rows = 1, []
        if (state := run.load_checkpoint()) is not None:
            network.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first, rows = state["epoch"] + 1, state["rows"]
        fabric.print(
            f"{cfg.arm} on {cfg.data.name}: {genotype}\n{len(data)} images of {data.classes} classes, "
            f"{'teacher' if teacher else 'labels'}, global batch {cfg.train.batch_size} = {fabric.world_size} devices x "
            f"{cfg.train.accumulation} micro-steps x {per_device}, lr {cfg.optim.lr}, epochs {first}..{cfg.train.epochs}"
        )
        start = time.perf_counter()
        for epoch in range(first, cfg.train.epochs + 1):
            torch.manual_seed(stream(cfg.seed, epoch, fabric.global_rank))
            lr = cosine_lr(epoch, lr=cfg.optim.lr, lr_min=cfg.optim.lr_min, epochs=cfg.train.epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr
            network.drop_path = cfg.model.drop_path * (epoch - 1) / cfg.train.epochs  # grows, as in DARTS
            row = train_one_epoch(fabric, model, network, teacher, optimizer, batches, epoch=epoch, cfg=cfg, run=run)
            rate = row.pop("images_per_s")
            rows.append(row)
            run.log(epoch=epoch, lr=lr, **row)
            for logger in fabric.loggers:
                logger.log_metrics({"lr": lr, **row}, step=epoch)
            if epoch % cfg.train.log_every == 0 or epoch in (first, cfg.train.epochs):
                left = (time.perf_counter() - start) / (epoch - first + 1) * (cfg.train.epochs - epoch)
                terms = "  ".join(f"{k} {v:.4g}" for k, v in row.items())
                fabric.print(
                    f"epoch {epoch}/{cfg.train.epochs}  lr {lr:.4g}  {terms}  {rate:.0f} images/s  {left:.0f} s left"
                )
            if epoch % cfg.train.save_every == 0 or epoch == cfg.train.epochs:
                run.save_checkpoint({
                    "model": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "rows": rows,
                    "classes": data.classes, "channels": data.channels, "size": data.size, "genotype": asdict(genotype),
                    "config": run.config,
                })  # fmt: skip
        options = {"batch_size": cfg.evaluate.batch_size, "workers": cfg.data.workers}
        metrics = classification_metrics(*predict(fabric, model, data.test, **options))
        run.finish(metrics | {"last_loss": rows[-1]["loss"], "skips": genotype.skips()})
        fabric.print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(cfg: DictConfig) -> None:
    out = HydraConfig.get().runtime.output_dir
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    try:
        loggers = [instantiate(cfg.logger)] if cfg.logger else []
        fabric = runs.launch(cfg.fabric, loggers=loggers)
        search_if_missing(cfg, world_size=fabric.world_size)
        fit(cfg, fabric, Path(out))
    finally:
        runs.remove_if_empty(out, cfg.run_root)


if __name__ == "__main__":
    main()
