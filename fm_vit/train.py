"""Train FM-ViT or a baseline, and test it on every subset of the modalities.

python train.py                                              generated faces, FM-ViT, under a minute
python train.py method=late_fusion seed=1
python train.py experiment=casia_surf data.root=/datasets/CASIA_SURF
torchrun --nproc_per_node=4 train.py experiment=casia_surf data.root=/datasets/CASIA_SURF
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor, nn

from common import runs
from common.data.batches import Plan, eval_batches, stream
from common.loop import Means, Progress, bar, compiled, gather, once, preflight, sync_norm
from common.scripts import script
from fm_vit.checkpoint import build, state, untrained
from fm_vit.data import Data, build_data, check_data, checksum
from fm_vit.losses import losses, subsets
from fm_vit.pad_metrics import Scored, check_threshold, measure, over_subsets
from fm_vit.schedule import lr_factor
from fm_vit.triplets import unpack

KEPT = ("acer", "apcer", "apcer_worst", "bpcer", "auc")  # of every subset, in result.json


def train_one_epoch(
    fabric: Fabric, model, optimizer, batches, plan: Plan, cfg: DictConfig, data: Data, *, epoch: int, run: runs.Run
) -> dict[str, float]:
    """One pass over the training set; returns the last learning rate and the mean of every loss term over its samples."""
    model.train()
    means, lr = Means(), 0.0
    for micro, (packed, labels) in enumerate(bar(batches.epoch(epoch), total=len(plan), title=f"epoch {epoch}")):
        step = (epoch - 1) * plan.steps + micro // plan.accumulation
        last = (micro + 1) % plan.accumulation == 0
        lr = learning_rate(cfg, step, plan.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["base_lr"]
        with fabric.no_backward_sync(model, enabled=not last):
            terms = losses(model, chosen(model, packed, data), labels, cfg.method.loss)
            fabric.backward(sum(terms.values()) / plan.accumulation)
        means.add(terms, len(labels))
        if last:
            most = cfg.optim.clip or math.inf  # no clipping: the norm is measured all the same
            norm = fabric.clip_gradients(model, optimizer, max_norm=most, error_if_nonfinite=False)
            means.check(step=step, norm=norm, last_good=run.checkpoint, precision=cfg.fabric.precision)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return {"lr": lr * cfg.optim.lr, **means.result(fabric)}


def learning_rate(cfg: DictConfig, step: int, steps: int) -> float:
    """The factor of every group's rate at a step counted from 0."""
    options = {k: cfg.optim[k] for k in ("warmup", "schedule", "step_every", "step_factor")}
    return lr_factor(step, steps=steps, epochs=cfg.train.epochs, **options)


def chosen(model: nn.Module, packed: Tensor, data: Data) -> dict[str, Tensor]:
    """The images of the modalities that the model has."""
    return {m: x for m, x in unpack(packed, data.modalities).items() if m in model.module.modalities}  # type: ignore[operator]


@torch.no_grad()
def predict(fabric: Fabric, model, data: Data, split: str, *, batch_size: int) -> tuple[Scored, dict[str, float]]:
    """(liveness of a split in its order for every subset of the model's modalities, named rgb, rgb_ir, ...; {kept_<modality>:
    share of patches that MMA reads with all modalities present}), on every rank."""
    model.eval()
    module, part, rows = model.module, data.splits[split], {}
    sets = subsets(module.modalities)
    options = {
        "batch_size": batch_size,
        "workers": data.workers,
        "rank": fabric.global_rank,
        "world": fabric.world_size,
    }
    for packed, _ in eval_batches(part.samples, **options):
        images = chosen(model, packed.to(fabric.device), data)
        outputs, masks = model(images, sets, with_masks=True) if module.selects else (model(images, sets), None)
        for names, logits in zip(sets, outputs, strict=True):
            rows.setdefault("_".join(names), []).append(module.score(logits))
        for m, mask in masks[-1][-1].items() if masks else ():
            rows.setdefault(f"kept_{m}", []).append(mask.float().mean(1))
    whole = gather(fabric, {name: torch.cat(parts) for name, parts in rows.items()}, len(part))
    kept = {name: float(value.mean()) for name, value in whole.items() if name.startswith("kept_")}
    scores = {name: value.numpy() for name, value in whole.items() if name not in kept}
    return Scored(scores, part.live, part.species, part.subject, part.video, part.name), kept


def evaluate(fabric: Fabric, model, data: Data, cfg: DictConfig) -> tuple[dict[str, float], dict[str, float]]:
    """(metrics, thresholds). Every subset has its own threshold, chosen on the validation split by evaluate.threshold."""
    development, _ = predict(fabric, model, data, "validation", batch_size=cfg.evaluate.batch_size)
    test, kept = predict(fabric, model, data, "test", batch_size=cfg.evaluate.batch_size)
    rows = measure(development, test, threshold=cfg.evaluate.threshold)
    metrics = {f"{key}_{tag}": row[key] for tag, row in rows.items() for key in KEPT if key in row}
    metrics |= over_subsets(rows, subsets(model.module.modalities))  # type: ignore[arg-type]
    metrics["parameters"] = sum(p.numel() for p in model.parameters())
    return metrics | kept, {tag: row["threshold"] for tag, row in rows.items()}


def parameter_groups(model: nn.Module, optim: Mapping[str, Any]) -> list[dict]:
    """Trunks at optim.backbone_lr (null: optim.lr), the rest at optim.lr; vectors, positions and class tokens are not decayed."""
    slow = optim["lr"] if optim["backbone_lr"] is None else optim["backbone_lr"]
    groups: dict[tuple[float, float], list] = {}
    for name, p in model.named_parameters():
        decay = 0.0 if p.ndim < 2 or name.endswith(("pos_embed", "cls_token")) else optim["weight_decay"]
        groups.setdefault((slow if "trunk" in name else optim["lr"], decay), []).append(p)
    return [{"params": ps, "lr": lr, "base_lr": lr, "weight_decay": decay} for (lr, decay), ps in groups.items()]


def check(cfg: DictConfig) -> None:
    """ValueError for what would otherwise be found out late: a step on shapes alone, the rules of schedule and evaluation."""
    check_data(**cfg.data)
    check_threshold(cfg.evaluate.threshold)
    learning_rate(cfg, 0, 1)
    network = json.dumps({"seed": 0} | {key: runs.plain(cfg)[key] for key in ("method", "model")})
    once(_step_on_shapes, network, tuple(cfg.data.modalities), cfg.data.size)


def _step_on_shapes(network: str, modalities: tuple[str, ...], size: int) -> None:
    """A third of a second, and the same for all seeds and rates of a sweep."""
    config = json.loads(network)
    with torch.device("meta"):
        model = untrained(config, modalities)
        images = {m: torch.zeros(2, 3, size, size) for m in model.modalities}  # type: ignore[union-attr]
        losses(model, images, torch.zeros(2, dtype=torch.long), config["method"]["loss"])


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Build, train to the end, evaluate; resumes from out/last.ckpt."""
    check(cfg)
    runs.per_device_batch(cfg.train.batch_size, fabric.world_size, cfg.train.accumulation)
    data = build_data(seed=cfg.seed, **cfg.data)
    plan = Plan.of(cfg.train, len(data.splits["train"]), fabric, seed=cfg.seed)
    model = build(runs.plain(cfg), data.modalities)
    optimizer = torch.optim.AdamW(parameter_groups(model, cfg.optim))
    model, optimizer = fabric.setup(compiled(sync_norm(fabric, model), cfg.compile), optimizer)
    batches = data.batches(plan, fabric.device)
    if cfg.preflight:
        model.train()
        packed, labels = next(iter(batches.epoch(1)))
        images = chosen(model, packed, data)
        preflight(
            fabric, lambda: fabric.backward(sum(losses(model, images, labels, cfg.method.loss).values())),
            parameters=sum(p.numel() for p in model.parameters()), steps=len(plan) * cfg.train.epochs, note=str(data),
            what=f"{len(labels)} samples of {', '.join(images)}",
        )  # fmt: skip
        return
    if (run := runs.Run.open(out, cfg, fabric, data=data.source)) is not None:
        with run:
            train(fabric, run, cfg, data, model, optimizer, batches, plan)


def train(fabric: Fabric, run: runs.Run, cfg: DictConfig, data: Data, model, optimizer, batches, plan: Plan) -> None:
    """The epochs from the last checkpoint on, then the evaluation, whose thresholds go into the checkpoint."""
    first, epochs = 1, cfg.train.epochs
    # Where numbers differ between machines, these two say whether the runs began alike.
    marks = data.crc() | {"crc_start": checksum(model.parameters())}
    if (saved := run.load_checkpoint()) is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epoch"] + 1
    fabric.print(
        f"{cfg.arm} on {cfg.data.name} ({data}): modalities {', '.join(model.module.modalities)}, {plan}, lr {cfg.optim.lr}, "
        f"epochs {first}..{epochs}"
    )
    progress = Progress(fabric, run, first=first, last=epochs, every=cfg.train.log_every)
    for epoch in range(first, epochs + 1):
        torch.manual_seed(stream(cfg.seed, epoch, fabric.global_rank))  # dropout of modalities
        row = train_one_epoch(fabric, model, optimizer, batches, plan, cfg, data, epoch=epoch, run=run)
        progress.report(epoch, row, images=plan.steps * plan.batch_size, unit="samples")
        if epoch % cfg.train.save_every == 0 or epoch == epochs:
            run.save_checkpoint(state(model, optimizer, data, epoch=epoch, config=run.config))
    metrics, thresholds = evaluate(fabric, model, data, cfg)
    run.save_checkpoint(state(model, optimizer, data, epoch=epochs, config=run.config, thresholds=thresholds))
    run.finish(metrics | marks)
    shown = {k: v for k, v in metrics.items() if k.startswith(("acer_", "mean_", "gain_", "kept_"))}
    fabric.print("  ".join(f"{k} {v:.4g}" for k, v in shown.items()))


main = script("config", fit)


if __name__ == "__main__":
    main()
