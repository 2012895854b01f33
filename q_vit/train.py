"""Train one arm of Q-ViT: a float teacher (method=fp), or a quantised student that starts from it and learns from it.

python train.py                                                  cued digits, 2 bit, IRM + DGD, about a minute
python train.py method=baseline method.bits=4 seed=1
python train.py experiment=deit_small data.root=/datasets/imagenet         the paper's recipe
torchrun --nproc_per_node=8 train.py experiment=deit_small data.root=/datasets/imagenet
"""

import math
import time
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from timm.optim import create_optimizer_v2
from torch import Tensor
from tqdm import tqdm

from common import runs
from common.data.batches import eval_batches, stream
from common.quant.lsq import calibrate, check_steps
from q_vit.data import Batches, Data, build_data
from q_vit.distribution_guided_distillation import dgd_loss, hard_distillation
from q_vit.metrics import accuracy, query_key_statistics
from q_vit.model import build_float, build_student, load_weights, parameter_groups, prefix_tokens, stress
from q_vit.quantized_vit import Tapped, keep_steps_positive
from q_vit.schedule import lr_at


def train_one_epoch(fabric: Fabric, student, teacher, optimizer, batches, *, epoch, cfg, prefix, run) -> dict:
    """One pass; returns the mean of every loss term, the last learning rate and the images seen per second."""
    student.train()
    accumulation, dgd = cfg.train.accumulation, dict(cfg.method.dgd)
    weight, _ = dgd.pop("weight"), dgd.pop("student_tap")
    sums: dict[str, Tensor] = {}
    start, images_seen, total, lr = time.perf_counter(), 0, batches.steps * accumulation, 0.0
    quiet = None if total > 50 else True
    bar = tqdm(batches.epoch(epoch), total=total, desc=f"epoch {epoch}", leave=False, disable=quiet)
    for micro, (images, labels) in enumerate(bar):
        images, labels = images.to(fabric.device, non_blocking=True), labels.to(fabric.device, non_blocking=True)
        step = (epoch - 1) * batches.steps + micro // accumulation
        last = (micro + 1) % accumulation == 0
        expected, their_qk = None, None
        if teacher is not None:
            with torch.no_grad(), fabric.autocast():
                expected, their_qk = teacher(images)
        with fabric.no_backward_sync(student, enabled=not last):
            logits, qk = student(images)
            terms = hard_distillation(logits, labels, expected if cfg.method.distill == "hard" else None)
            if weight and their_qk is not None:
                terms["dgd"] = weight * dgd_loss(qk, their_qk, prefix=prefix, **dgd)
            loss = sum(terms.values())
            runs.check_finite({**terms, "loss": loss}, step=step, last_good=run.checkpoint)
            fabric.backward(loss / accumulation)
        if last:
            norm = fabric.clip_gradients(student, optimizer, max_norm=math.inf, error_if_nonfinite=False)
            if run.config["fabric"]["precision"] != "16-mixed":  # the fp16 loss scaler skips such a step by itself
                runs.check_finite({"gradient norm": norm}, step=step, last_good=run.checkpoint)
            lr = lr_at(
                step,
                base_lr=cfg.optim.lr,
                steps=batches.steps * cfg.train.epochs,
                epochs=cfg.train.epochs,
                **cfg.schedule,
            )
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            keep_steps_positive(student)
            optimizer.zero_grad(set_to_none=True)
        images_seen += len(labels) * fabric.world_size
        for name, value in terms.items():
            sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach()
    means = {name: value.item() / total for name, value in sums.items()}
    return means | {"lr": lr, "images_per_s": images_seen / (time.perf_counter() - start)}


@torch.no_grad()
def predict(fabric: Fabric, model, dataset, *, batch_size: int, workers: int) -> tuple[Tensor, Tensor]:
    """Logits (M, C), heads averaged, and labels (M,) of a data set on every rank, on CPU."""
    model.eval()
    rank, world = fabric.global_rank, fabric.world_size
    loader = eval_batches(dataset, batch_size=batch_size, workers=workers, rank=rank, world=world)
    outputs = [(model(x.to(fabric.device)), y) for x, y in loader]
    logits = torch.cat([z for z, _ in outputs])
    labels = torch.cat([y for _, y in outputs]).to(fabric.device)
    if world > 1:  # shares differ by one image at most: pad, gather, drop the padding
        pad = math.ceil(len(dataset) / world) - len(logits)
        logits = torch.cat([logits, logits[:pad]])
        labels = torch.cat([labels, labels.new_full((pad,), -1)])
        logits, labels = fabric.all_gather(logits).flatten(0, 1), fabric.all_gather(labels).flatten()
        logits, labels = logits[labels >= 0], labels[labels >= 0]
    return logits.float().cpu(), labels.cpu()


def find_teacher(cfg: DictConfig, fabric: Fabric) -> Path | None:
    """The teacher's checkpoint. "auto" is the arm fp of the same scale; at scale "default" it is trained first if missing."""
    if cfg.teacher.weights != "auto":
        return Path(cfg.teacher.weights).expanduser() if cfg.teacher.weights else None
    path = Path(cfg.run_root) / cfg.scale / "fp" / f"seed{cfg.teacher.seed}"
    if cfg.scale == "default" and not cfg.preflight:
        fabric.print(f"teacher: {path}")
        own = OmegaConf.load(Path(__file__).parent / "configs/method/fp.yaml")
        fit(OmegaConf.merge(cfg, own, {"arm": "fp", "seed": cfg.teacher.seed, "force": False}), fabric, path)
    elif not (path / "last.ckpt").exists():
        raise FileNotFoundError(
            f"no teacher at {path / 'last.ckpt'}: train it first, python train.py method=fp scale={cfg.scale} "
            f"seed={cfg.teacher.seed}, or give teacher.weights=<checkpoint>"
        )
    return path / "last.ckpt"


def build(cfg: DictConfig, data: Data, batches: Batches, teacher_weights: Path | None):
    """(student, float teacher or None) of a configuration, with weights drawn from its seed and every step set."""
    torch.manual_seed(stream(cfg.seed))
    method, options = (
        cfg.method,
        {"num_classes": data.num_classes, "in_channels": data.channels, **OmegaConf.to_container(cfg.model)},
    )
    if method.distill not in ("hard", "none") or method.start not in ("teacher", "random"):
        raise ValueError(
            f"method.distill={method.distill}, method.start={method.start}, allowed: hard, none; teacher, random"
        )
    model = build_float(**options)
    if cfg.arm == "fp" or (method.bits == 32 and not method.irm):
        return model, None
    images = batches.first(cfg.train.calibration_images)
    teacher = build_float(**{**options, **(cfg.teacher.model or {})})
    if teacher_weights is not None:
        load_weights(teacher, teacher_weights)
    elif not cfg.model.pretrained and not (cfg.teacher.model or {}).get("pretrained"):
        raise ValueError("teacher.weights is null and the model is not pretrained: the teacher would be random")
    if cfg.teacher.stress:
        stress(teacher, images, **cfg.teacher.stress)
    start = teacher if method.start == "teacher" and not cfg.teacher.model else model
    student = build_student(start, images, irm=method.irm, irm_init=method.irm_init, bits=method.bits, **method.quant)
    if method.percentile is not None:
        with calibrate(student, percentile=method.percentile), torch.no_grad():
            student(images)
    return student, teacher.eval().requires_grad_(False)


def preflight(fabric: Fabric, cfg: DictConfig, student, teacher, optimizer, batches, prefix) -> None:
    """One step forward and backward; prints memory and hours. Writes nothing."""
    images, labels = (t.to(fabric.device) for t in next(iter(batches.epoch(1))))
    dgd = {k: v for k, v in cfg.method.dgd.items() if k not in ("weight", "student_tap")}
    for _ in range(2):  # the first step also pays for allocation and kernel selection
        start = time.perf_counter()
        with torch.no_grad(), fabric.autocast():
            expected, theirs = teacher(images) if teacher is not None else (None, None)
        logits, qk = student(images)
        loss = sum(hard_distillation(logits, labels, expected).values())
        fabric.backward(loss + dgd_loss(qk, theirs, prefix=prefix, **dgd) if theirs else loss)
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    optimizer.zero_grad(set_to_none=True)
    parameters = sum(p.numel() for p in student.parameters())
    memory = (
        f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the card, " if fabric.device.type == "cuda" else ""
    )
    hours = seconds * batches.steps * cfg.train.accumulation * cfg.train.epochs / 3600
    fabric.print(
        f"preflight: data found, {len(labels)} images per device and step, {parameters:,} parameters, {memory}{seconds:.3f} s "
        f"per step without data loading, about {hours:.2g} h for {cfg.train.epochs} epochs"
    )


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Build, train to the end, evaluate; resumes from out/last.ckpt."""
    per_device = runs.per_device_batch(cfg.train.batch_size, fabric.world_size, cfg.train.accumulation)
    lr_at(0, base_lr=cfg.optim.lr, steps=1, epochs=1, **cfg.schedule)  # a bad schedule stops here, before any data
    data = build_data(**cfg.data)
    batches = Batches(
        data.source, cfg.seed, cfg.train.batch_size, fabric.global_rank, fabric.world_size, cfg.train.accumulation
    )
    fp = cfg.method.bits == 32 and not cfg.method.irm
    core, teacher = build(cfg, data, batches, None if fp else find_teacher(cfg, fabric))
    prefix = (prefix_tokens(core), prefix_tokens(teacher) if teacher is not None else 0)
    student = Tapped(core, "raw" if fp else cfg.method.dgd.student_tap)
    teacher = None if teacher is None else Tapped(teacher, "raw").to(fabric.device).eval()
    optim = dict(cfg.optim)
    groups = parameter_groups(core, optim.pop("weight_decay"))
    optimizer = create_optimizer_v2(groups, opt=optim.pop("name"), weight_decay=0.0, **optim)
    student, optimizer = fabric.setup(student, optimizer)
    if cfg.preflight:
        return preflight(fabric, cfg, student, teacher, optimizer, batches, prefix)

    run = runs.Run.open(out, cfg, fabric)
    if run is None:
        return
    with run:
        first, row = 1, {}
        if (state := run.load_checkpoint()) is not None:
            core.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first, row = state["epoch"] + 1, state["row"]
        fabric.print(
            f"{cfg.arm} on {cfg.data.name}: {cfg.method.bits} bit, {data.source.size} images per epoch, global batch "
            f"{cfg.train.batch_size} = {fabric.world_size} devices x {cfg.train.accumulation} micro-steps x {per_device}, "
            f"lr {cfg.optim.lr}, epochs {first}..{cfg.train.epochs}"
        )
        start = time.perf_counter()
        for epoch in range(first, cfg.train.epochs + 1):
            torch.manual_seed(
                stream(cfg.seed, epoch, fabric.global_rank)
            )  # drop path; batches have streams of their own
            row = train_one_epoch(
                fabric, student, teacher, optimizer, batches, epoch=epoch, cfg=cfg, prefix=prefix, run=run
            )
            check_steps(core)
            rate = row.pop("images_per_s")
            run.log(epoch=epoch, **row)
            for logger in fabric.loggers:
                logger.log_metrics(row, step=epoch)
            if epoch % cfg.train.log_every == 0 or epoch in (first, cfg.train.epochs):
                left = (time.perf_counter() - start) / (epoch - first + 1) * (cfg.train.epochs - epoch)
                terms = "  ".join(f"{k} {v:.4g}" for k, v in row.items())
                fabric.print(f"epoch {epoch}/{cfg.train.epochs}  {terms}  {rate:.0f} images/s  {left:.0f} s left")
            if epoch % cfg.train.save_every == 0 or epoch == cfg.train.epochs:
                save(run, core, optimizer, epoch, row, data)
        if cfg.train.epochs == 0:
            save(run, core, optimizer, 0, row, data)
        logits, labels = predict(fabric, core, data.test, batch_size=cfg.evaluate.batch_size, workers=cfg.data.workers)
        images = torch.stack([data.test[i][0] for i in range(min(cfg.evaluate.statistics_images, len(data.test)))])
        metrics = accuracy(logits, labels) | query_key_statistics(core, images.to(fabric.device))
        run.finish(metrics | {f"loss_{k}": v for k, v in row.items() if k != "lr"})
        fabric.print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


def save(run: runs.Run, model, optimizer, epoch: int, row: dict, data: Data) -> None:
    run.save_checkpoint({
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "row": row,
        "data": {"classes": data.num_classes, "channels": data.channels}, "config": run.config,
    })  # fmt: skip


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
