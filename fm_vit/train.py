"""Train FM-ViT or a baseline, and test it on every subset of the modalities.

python train.py                                              generated faces, FM-ViT, under a minute
python train.py method=late_fusion seed=1
python train.py experiment=casia_surf data.root=/datasets/CASIA_SURF
torchrun --nproc_per_node=4 train.py experiment=casia_surf data.root=/datasets/CASIA_SURF
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from common import runs
from common.data.batches import Plan, eval_batches, stream
from fm_vit.baselines import ConcatFusion, CrossAttentionFusion, SharedViT, TwoBranchCMFL
from fm_vit.data import Data, build_data
from fm_vit.losses import path_losses, subsets, training_paths
from fm_vit.model import FMViT
from fm_vit.pad_metrics import eer_threshold, summary
from fm_vit.triplets import unpack

MODELS: dict[str, Any] = {
    "fmvit": FMViT, "shared": SharedViT, "concat": ConcatFusion, "cross_attention": CrossAttentionFusion, "cmfl": TwoBranchCMFL,
}  # fmt: skip


def train_one_epoch(fabric: Fabric, model, optimizer, batches, cfg: DictConfig, data: Data, *, epoch: int, run) -> dict:
    """One pass over the training set; returns the mean of every loss term, the last learning rate and images per second."""
    model.train()
    module, method = model.module, cfg.method
    paths = training_paths(module.modalities, method.loss.paths)
    kinds, sets = [kind for kind, _ in paths], [names for _, names in paths]
    accumulation, total = cfg.train.accumulation, len(batches)
    options = {k: v for k, v in method.loss.items() if k != "paths"}
    sums: dict[str, Tensor] = {}
    start, seen, lr = time.perf_counter(), 0, 0.0
    bar = tqdm(
        batches.epoch(epoch), total=total, desc=f"epoch {epoch}", leave=False, disable=None if total > 20 else True
    )
    for micro, (packed, labels) in enumerate(bar):
        step = (epoch - 1) * (total // accumulation) + micro // accumulation
        last = (micro + 1) % accumulation == 0
        lr = warm_cosine(step / (cfg.train.epochs * (total // accumulation)), cfg.optim.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["base_lr"]
        images = {m: x for m, x in unpack(packed, data.modalities).items() if m in module.modalities}
        with fabric.no_backward_sync(model, enabled=not last):
            outputs = model(images, sets)
            terms = path_losses(module, outputs, kinds, labels, **options)
            loss = sum(terms.values())
            runs.check_finite({**terms, "loss": loss}, step=step, last_good=run.checkpoint)
            fabric.backward(loss / accumulation)
        if last:
            norm = fabric.clip_gradients(
                model, optimizer, max_norm=cfg.optim.clip or math.inf, error_if_nonfinite=False
            )
            if cfg.fabric.precision != "16-mixed":  # the fp16 loss scaler skips such a step by itself
                runs.check_finite({"gradient norm": norm}, step=step, last_good=run.checkpoint)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += len(labels) * fabric.world_size
        for name, value in terms.items():
            sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach()
    means = {name: value.item() / total for name, value in sums.items()}
    return {"lr": lr * cfg.optim.lr, **means, "images_per_s": seen / (time.perf_counter() - start)}


def warm_cosine(progress: float, warmup: float) -> float:
    """Factor of the learning rate: linear over the share `warmup` of the training, then a cosine to 0."""
    if progress < warmup:
        return (progress + 1e-8) / warmup
    return (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


@torch.no_grad()
def predict(
    fabric: Fabric, model, samples, modalities: list[str], *, batch_size: int, workers: int
) -> dict[str, Tensor]:
    """Liveness (n,) of a data set in its order for every subset of the model's modalities, named rgb, rgb_ir, ..., on every
    rank, on CPU; and kept_<modality> (n,), the share of patches that MMA reads with all modalities present."""
    model.eval()
    module = model.module
    sets = subsets(module.modalities)
    rank, world = fabric.global_rank, fabric.world_size
    rows: dict[str, list[Tensor]] = {}
    for packed, _ in eval_batches(samples, batch_size=batch_size, workers=workers, rank=rank, world=world):
        images = unpack(packed.to(fabric.device), modalities)
        outputs = model({m: images[m] for m in module.modalities}, sets)
        for names, logits in zip(sets, outputs, strict=True):
            rows.setdefault("_".join(names), []).append(module.score(logits))
        for m, mask in getattr(module, "kept", {}).items():
            rows.setdefault(f"kept_{m}", []).append(mask.float().mean(1))
    whole = {name: torch.cat(parts) for name, parts in rows.items()}
    if world > 1:  # rank r holds the samples r, r + world, ...: pad, gather, interleave, cut
        size = math.ceil(len(samples) / world)
        for name, value in whole.items():
            padded = torch.cat([value, value[: size - len(value)]])
            whole[name] = fabric.all_gather(padded).T.flatten()[: len(samples)]
    return {name: value.cpu() for name, value in whole.items()}


def evaluate(fabric: Fabric, model, data: Data, cfg: DictConfig) -> tuple[dict[str, float], dict[str, float]]:
    """(metrics, thresholds). Every subset has its own threshold: the equal error rate of the validation split."""
    options = {"batch_size": cfg.evaluate.batch_size, "workers": data.workers}
    dev = predict(fabric, model, data.splits["validation"].samples, data.modalities, **options)
    test = predict(fabric, model, data.splits["test"].samples, data.modalities, **options)
    split, metrics, thresholds = data.splits["test"], {}, {}
    for names in subsets(model.module.modalities):
        tag = "_".join(names)
        thresholds[tag] = eer_threshold(dev[tag].numpy(), data.splits["validation"].live)[0]
        found = summary(test[tag].numpy(), split.live, split.species.tolist(), thresholds[tag])
        metrics |= {f"{key}_{tag}": found[key] for key in ("acer", "apcer", "apcer_worst", "bpcer", "auc")}
    return metrics | {k: float(v.mean()) for k, v in test.items() if k.startswith("kept_")}, thresholds


def build(cfg: DictConfig, modalities: list[str]) -> nn.Module:
    """The model of a configuration, with weights drawn from its seed; modalities: those of the data.
    ValueError for an unknown model or modality."""
    method = cfg.method
    if method.model not in MODELS:
        raise ValueError(f"method.model={method.model!r}, allowed: {', '.join(MODELS)}")
    names = list(method.modalities or modalities)
    if unknown := [m for m in names if m not in modalities]:
        raise ValueError(
            f"method.modalities: {', '.join(unknown)} is not in the data, which has {', '.join(modalities)}"
        )
    torch.manual_seed(stream(cfg.seed))
    options = OmegaConf.to_container(method.options, resolve=True) if method.options else {}
    return MODELS[method.model](names, vit=runs.plain(cfg.model.vit), **options)  # type: ignore[arg-type]


def parameter_groups(model: nn.Module, optim: Mapping[str, Any]) -> list[dict]:
    """Trunks at optim.backbone_lr (null: optim.lr), the rest at optim.lr; vectors, positions and class tokens are not decayed."""
    groups: dict[tuple[float, float], list] = {}
    for name, p in model.named_parameters():
        lr = optim["backbone_lr"] or optim["lr"] if "trunk" in name else optim["lr"]
        decay = 0.0 if p.ndim < 2 or name.endswith(("pos_embed", "cls_token")) else optim["weight_decay"]
        groups.setdefault((lr, decay), []).append(p)
    return [{"params": ps, "lr": lr, "base_lr": lr, "weight_decay": decay} for (lr, decay), ps in groups.items()]


def preflight(fabric: Fabric, cfg: DictConfig, model, batches, data: Data) -> None:
    """One step forward and backward; prints memory and hours. Writes nothing."""
    packed, labels = next(iter(batches.epoch(1)))
    module, seconds = model.module, 0.0
    images = {m: x for m, x in unpack(packed, data.modalities).items() if m in module.modalities}
    paths = training_paths(module.modalities, cfg.method.loss.paths)
    options = {k: v for k, v in cfg.method.loss.items() if k != "paths"}
    for _ in range(2):  # the first step also pays for allocation and kernel selection
        start = time.perf_counter()
        terms = path_losses(module, model(images, [s for _, s in paths]), [k for k, _ in paths], labels, **options)
        fabric.backward(sum(terms.values()))
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    memory = (
        f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the card, " if fabric.device.type == "cuda" else ""
    )
    fabric.print(
        f"preflight: data found ({describe(data)}), {len(labels)} samples of {', '.join(images)} per device and step, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {memory}{seconds:.3f} s per step without data loading, "
        f"about {seconds * len(batches) * cfg.train.epochs / 3600:.2g} h for {cfg.train.epochs} epochs"
    )


def describe(data: Data) -> str:
    """Samples per split and class, and what was left out."""
    parts = [f"{name} {int(s.live.sum())} live, {int((~s.live).sum())} attacks" for name, s in data.splits.items()]
    return "; ".join(parts + [f"left out in {why}: {n}" for why, n in (data.dropped or {}).items()])


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Build, train to the end, evaluate; resumes from out/last.ckpt."""
    per_device = runs.per_device_batch(cfg.train.batch_size, fabric.world_size, cfg.train.accumulation)
    training_paths(cfg.data.modalities, cfg.method.loss.paths)
    if not 0 <= cfg.optim.warmup < 1:
        raise ValueError(f"optim.warmup={cfg.optim.warmup}, allowed: 0 <= share of the training < 1")
    data = build_data(seed=cfg.seed, **cfg.data)
    model = build(cfg, data.modalities)
    if fabric.world_size > 1 and fabric.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, cfg.optim))
    model, optimizer = fabric.setup(model, optimizer)
    plan = Plan(
        len(data.splits["train"]), cfg.train.batch_size, seed=cfg.seed,
        rank=fabric.global_rank, world=fabric.world_size, accumulation=cfg.train.accumulation,
    )  # fmt: skip
    batches = data.batches(plan, fabric.device)
    if cfg.preflight:
        return preflight(fabric, cfg, model, batches, data)
    run = runs.Run.open(out, cfg, fabric)
    if run is None:
        return
    with run:
        first = 1
        if (state := run.load_checkpoint()) is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first = state["epoch"] + 1
        fabric.print(
            f"{cfg.arm} on {cfg.data.name} ({describe(data)}): modalities {', '.join(model.module.modalities)}, global batch "
            f"{cfg.train.batch_size} = {fabric.world_size} devices x {cfg.train.accumulation} micro-steps x {per_device}, "
            f"lr {cfg.optim.lr}, epochs {first}..{cfg.train.epochs}"
        )
        start = time.perf_counter()
        for epoch in range(first, cfg.train.epochs + 1):
            torch.manual_seed(stream(cfg.seed, epoch, fabric.global_rank))  # dropout of modalities
            row = train_one_epoch(fabric, model, optimizer, batches, cfg, data, epoch=epoch, run=run)
            rate = row.pop("images_per_s")
            run.log(epoch=epoch, **row)
            for logger in fabric.loggers:
                logger.log_metrics(row, step=epoch)
            if epoch % cfg.train.log_every == 0 or epoch in (first, cfg.train.epochs):
                left = (time.perf_counter() - start) / (epoch - first + 1) * (cfg.train.epochs - epoch)
                terms = "  ".join(f"{k} {v:.4g}" for k, v in row.items())
                fabric.print(f"epoch {epoch}/{cfg.train.epochs}  {terms}  {rate:.0f} samples/s  {left:.0f} s left")
            if epoch % cfg.train.save_every == 0 or epoch == cfg.train.epochs:
                run.save_checkpoint({
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch,
                    "modalities": data.modalities, "config": run.config,
                })  # fmt: skip
        metrics, thresholds = evaluate(fabric, model, data, cfg)
        if fabric.is_global_zero:  # every subset of sensors needs its own
            (run.dir / "thresholds.json").write_text(json.dumps(thresholds, indent=1) + "\n")
        run.finish(metrics)
        fabric.print(
            "  ".join(
                f"{k} {v:.4g}" for k, v in metrics.items() if k.startswith(("acer_", "kept_")) and "worst" not in k
            )
        )


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
