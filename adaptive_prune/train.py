"""Fine-tune one arm (AS-ViT or a baseline at equal MACs) from a dense vision transformer.

python train.py                                               digit grids, AS-ViT, a minute; trains the dense start first
python train.py method=topk seed=1
python train.py experiment=deit_s data.root=/datasets/imagenet          the paper's recipe
torchrun --nproc_per_node=4 train.py experiment=deit_s data.root=/datasets/imagenet
"""

import copy
import math
import time
from pathlib import Path

import hydra
import numpy as np
import torch
import torch.nn.functional as F
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from timm.data import Mixup
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor
from tqdm import tqdm

from adaptive_prune.backbones import build_vit
from adaptive_prune.budget import round_counts
from adaptive_prune.data import Data, build_data
from adaptive_prune.distillation import logit_kl, teacher_outputs, token_kl
from adaptive_prune.metrics import classification, content, mcnemar
from adaptive_prune.model import PrunedViT
from common import runs
from common.data.batches import Plan, eval_batches, stream


def loss_terms(fabric: Fabric, cfg: DictConfig, model, teacher, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """L = L_CE + lambda_1 L_budget + lambda_2 (L_KL + L_token), each term with its weight (section 3.4)."""
    w = cfg.method.losses
    logits, info = model(images, details=True)
    smoothing = cfg.train.label_smoothing if labels.ndim == 1 else 0.0  # mixed targets are smoothed already
    terms = {"ce": F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)}
    if w.budget:
        mean = None
        if fabric.world_size > 1 and not cfg.parity.budget_per_rank:
            mean = fabric.all_reduce(info.macs.mean().detach(), reduce_op="mean")
        terms["budget"] = w.budget * model.module.budget_loss(info.macs, form=cfg.budget.form, mean=mean)
    if teacher is not None:
        target, target_tokens = teacher_outputs(teacher, images)
        terms["distill"] = w.distill * logit_kl(logits, target)
        if w.token and info.tokens is not None and target_tokens is not None:
            terms["token"] = w.token * token_kl(info.tokens, target_tokens, info.alive)
    return terms


def train_one_epoch(fabric, cfg, model, teacher, optimizer, ema, mixup, data: Data, plan: Plan, *, epoch, run) -> dict:
    """One pass over the training set; returns the mean of every loss term, the last lr and images per second."""
    model.train()
    sums: dict[str, Tensor] = {}
    begin, lr, total = time.perf_counter(), 0.0, len(plan)
    batches = data.epoch(plan, epoch, fabric.device)
    for micro, (images, labels) in enumerate(
        tqdm(batches, total=total, leave=False, disable=None if total > 200 else True)
    ):
        step, last = micro // plan.accumulation, (micro + 1) % plan.accumulation == 0
        lr = cosine(cfg.optim.lr, cfg.optim.min_lr, (epoch - 1 + step / plan.steps) / cfg.train.epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if mixup is not None:
            np.random.seed(stream(cfg.seed, epoch, step) % 2**32)  # timm's Mixup draws from numpy's global stream
            images, labels = mixup(images, labels)
        with fabric.no_backward_sync(model, enabled=not last):
            terms = loss_terms(fabric, cfg, model, teacher, images, labels)
            loss = sum(terms.values())
            runs.check_finite({**terms, "loss": loss}, step=(epoch - 1) * plan.steps + step, last_good=run.checkpoint)
            fabric.backward(loss / plan.accumulation)
        if last:
            norm = fabric.clip_gradients(
                model, optimizer, max_norm=cfg.train.clip or math.inf, error_if_nonfinite=False
            )
            if cfg.fabric.precision != "16-mixed":  # the fp16 loss scaler skips such a step by itself
                runs.check_finite(
                    {"gradient norm": norm}, step=(epoch - 1) * plan.steps + step, last_good=run.checkpoint
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ema is not None:
                ema.update(model.module)
        for name, value in terms.items():
            sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach()
    rate = plan.steps * plan.batch_size / (time.perf_counter() - begin)
    return {"lr": lr, **{name: value.item() / total for name, value in sums.items()}, "images_per_s": rate}


def cosine(lr: float, min_lr: float, progress: float) -> float:
    """From lr at progress 0 to min_lr at 1."""
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def predict(fabric: Fabric, model, dataset, *, batch_size: int, workers: int) -> dict[str, Tensor]:
    """logits, labels, macs, kept and masks of a data set in its order, on every rank, on CPU. Really drops tokens."""
    model.eval()
    rank, world = fabric.global_rank, fabric.world_size
    rows: dict[str, list[Tensor]] = {}
    for images, labels in eval_batches(dataset, batch_size=batch_size, workers=workers, rank=rank, world=world):
        logits, info = model(images.to(fabric.device), details=True)
        found = {"logits": logits.float(), "labels": labels, "macs": info.macs, "kept": info.kept}
        if info.masks is not None:
            found["masks"] = info.masks.to(torch.uint8)
        for name, value in found.items():
            rows.setdefault(name, []).append(value.to(fabric.device))
    whole = {name: torch.cat(parts) for name, parts in rows.items()}
    if world > 1:  # rank r holds the images r, r + world, ...: pad, gather, interleave, cut
        size = math.ceil(len(dataset) / world)
        for name, value in whole.items():
            padded = torch.cat([value, value[: size - len(value)]])
            whole[name] = fabric.all_gather(padded).transpose(0, 1).flatten(0, 1)[: len(dataset)]
    return {name: value.cpu() for name, value in whole.items()}


def evaluate(fabric: Fabric, model, data: Data, *, batch_size: int, workers: int) -> tuple[dict[str, float], dict]:
    """All metrics of `adaptive_prune.metrics` on the test set, and what they were computed from."""
    out = predict(fabric, model, data.test, batch_size=batch_size, workers=workers)
    pruned = getattr(model, "module", model)
    metrics, out["right"] = classification(out["logits"], out["labels"], out["macs"], out["kept"], pruned.cost)
    patch = pruned.vit.patch_embed.patch_size[0]
    more = content(
        out.get("masks"),
        out["kept"],
        out["right"],
        data.truth,
        patch=patch,
        locations=pruned.locations,
        depth=pruned.cost.depth,
    )
    return metrics | more, out


def sibling(cfg: DictConfig, arm: str, name: str) -> Path:
    """A file of another arm's run with this scale and seed."""
    return Path(cfg.run_root) / cfg.scale / arm / f"seed{cfg.seed}" / name


def build(cfg: DictConfig, data: Data) -> tuple[PrunedViT, torch.nn.Module | None]:
    """The model of a configuration with its starting weights, and the frozen teacher if it distils."""
    torch.manual_seed(stream(cfg.seed))
    pretrained = cfg.start.pretrained
    vit = build_vit(**cfg.model.vit, num_classes=data.classes, in_chans=data.channels, pretrained=pretrained)
    m = cfg.method
    keep = OmegaConf.to_container(m.keep) if m.keep is not None else None
    options = {
        "rule": m.rule, "locations": m.locations, "budget": cfg.budget.target, "thresholds": m.thresholds,
        "temperature": m.temperature, "score": m.score, "mask": m.mask, "inference": m.inference,
        "extended_cost": cfg.parity.extended_cost, "cumulative": not cfg.parity.separate_masks,
        "row_max": "all" if cfg.parity.softmax else "kept", "eps": 1e-6 if cfg.parity.softmax else 0.0,
    }  # fmt: skip
    model = PrunedViT(vit, keep=keep, **options)
    if m.match is not None:
        seen = runs.load_checkpoint(sibling(cfg, m.match, "evaluation.ckpt"))
        counts = round_counts(
            model.cost, model.locations, seen["kept"].double().mean(0).tolist(), seen["macs"], at_least=True
        )
        model = PrunedViT(vit, keep=counts, **options)
    if cfg.start.arm is not None or cfg.start.checkpoint is not None:
        path = Path(cfg.start.checkpoint) if cfg.start.checkpoint else sibling(cfg, cfg.start.arm, "last.ckpt")
        state = runs.load_checkpoint(path)
        if "config" in state:  # written by this script
            ours = {"data": runs.plain(cfg.data), "vit": runs.plain(cfg.model.vit)}
            theirs = {"data": state["config"]["data"], "vit": state["config"]["model"]["vit"]}
            if different := runs.differing_keys(theirs, ours):
                raise ValueError(
                    f"the start {path} was trained with other data or another model: {'; '.join(different)}"
                )
        weights = state.get("model", state.get("state_dict", state))
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected or set(missing) - {"theta"}:
            raise ValueError(f"{path} does not fit model.vit: missing {missing[:3]}, unexpected {unexpected[:3]}")
    teacher = None
    if m.losses.distill or m.losses.token:
        if cfg.start.arm is None and cfg.start.checkpoint is None and not cfg.start.pretrained:
            raise ValueError(
                "method.losses.distill needs a teacher, the dense start: set start.arm, .checkpoint or .pretrained"
            )
        teacher = copy.deepcopy(model.vit).eval().requires_grad_(False)
    return model, teacher


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Build, train to the end, evaluate; resumes from out/last.ckpt."""
    per_device = runs.per_device_batch(cfg.train.batch_size, fabric.world_size, cfg.train.accumulation)
    data = build_data(seed=cfg.seed, **cfg.data)
    model, teacher = build(cfg, data)
    mix = cfg.train.mixup
    mixup = Mixup(**mix, label_smoothing=cfg.train.label_smoothing, num_classes=data.classes) if mix else None
    # Biases, norms and the thresholds are not decayed.
    groups = param_groups_weight_decay(
        model, cfg.optim.weight_decay, no_weight_decay_list=("vit.cls_token", "vit.pos_embed")
    )
    optimizer = torch.optim.AdamW(groups, lr=cfg.optim.lr, betas=tuple(cfg.optim.betas))
    model, optimizer = fabric.setup(model, optimizer)
    ema = ModelEmaV3(model.module, decay=cfg.train.ema) if cfg.train.ema else None
    if teacher is not None:
        teacher = fabric.to_device(teacher)
    plan = Plan(
        data.train_size, cfg.train.batch_size, seed=cfg.seed, rank=fabric.global_rank, world=fabric.world_size,
        accumulation=cfg.train.accumulation, repeats=cfg.data.get("repeats", 1),
    )  # fmt: skip
    cost, workers = model.module.cost, cfg.data.get("workers", 0)
    if cfg.preflight:
        return preflight(fabric, cfg, model, teacher, mixup, data, plan)

    run = runs.Run.open(out, cfg, fabric)
    if run is None:
        return
    with run:
        first = 1
        if (state := run.load_checkpoint()) is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            if ema is not None:
                ema.module.load_state_dict(state["ema"])
            first = state["epoch"] + 1
        keep = f", keeps {model.module.keep}" if model.module.keep else ""
        fabric.print(
            f"{cfg.arm} on {cfg.data.name}: {cost.dense / 1e9:.4g} GMACs dense, budget {cfg.budget.target}{keep}, global batch "
            f"{cfg.train.batch_size} = {fabric.world_size} devices x {cfg.train.accumulation} micro-steps x {per_device}, "
            f"lr {cfg.optim.lr}, epochs {first}..{cfg.train.epochs} of {plan.steps} steps"
        )
        start = time.perf_counter()
        for epoch in range(first, cfg.train.epochs + 1):
            torch.manual_seed(
                stream(cfg.seed, epoch, fabric.global_rank)
            )  # drop path; batches have streams of their own
            row = train_one_epoch(fabric, cfg, model, teacher, optimizer, ema, mixup, data, plan, epoch=epoch, run=run)
            rate = row.pop("images_per_s")
            if model.module.rule == "threshold":
                row |= {f"theta_{s + 1}": v for s, v in enumerate(model.module.theta.tolist())}
            if cfg.train.eval_every and epoch % cfg.train.eval_every == 0 and epoch < cfg.train.epochs:
                metrics, _ = evaluate(fabric, model, data, batch_size=cfg.evaluate.batch_size, workers=workers)
                row |= {k: metrics[k] for k in ("top1", "macs")}
            run.log(epoch=epoch, **row)
            for logger in fabric.loggers:
                logger.log_metrics(row, step=epoch)
            if epoch % cfg.train.log_every == 0 or epoch in (first, cfg.train.epochs):
                left = (time.perf_counter() - start) / (epoch - first + 1) * (cfg.train.epochs - epoch)
                values = "  ".join(f"{k} {v:.4g}" for k, v in row.items())
                fabric.print(f"epoch {epoch}/{cfg.train.epochs}  {values}  {rate:.0f} images/s  {left:.0f} s left")
            if epoch % cfg.train.save_every == 0 or epoch == cfg.train.epochs:
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "epoch": epoch,
                    "config": run.config,
                }
                state |= {"classes": data.classes, "channels": data.channels, "keep": model.module.keep}
                run.save_checkpoint(state | ({"ema": ema.module.state_dict()} if ema is not None else {}))
        metrics, found = evaluate(fabric, model, data, batch_size=cfg.evaluate.batch_size, workers=workers)
        if cfg.method.match is not None:  # the same images, one by one: beside the paired interval over seeds
            other = runs.load_checkpoint(sibling(cfg, cfg.method.match, "evaluation.ckpt"))["right"]
            pair = mcnemar(other, found["right"])
            metrics |= {
                "mcnemar_only_matched": pair["only_a"],
                "mcnemar_only_here": pair["only_b"],
                "mcnemar_p": pair["p"],
            }
        run.save_checkpoint(
            {"right": found["right"], "kept": found["kept"], "macs": metrics["macs"]}, "evaluation.ckpt"
        )
        run.finish(metrics)
        fabric.print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


def preflight(fabric: Fabric, cfg: DictConfig, model, teacher, mixup, data: Data, plan: Plan) -> None:
    """One step forward and backward; prints memory and hours. Writes nothing."""
    images, labels = next(iter(data.epoch(plan, 1, fabric.device)))
    images, labels = mixup(images, labels) if mixup is not None else (images, labels)
    seconds = 0.0
    for _ in range(2):  # the first step also pays for allocation and kernel selection
        begin = time.perf_counter()
        fabric.backward(sum(loss_terms(fabric, cfg, model, teacher, images, labels).values()))
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    memory = (
        f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the card, " if fabric.device.type == "cuda" else ""
    )
    fabric.print(
        f"preflight: data found, {len(images)} images per device and step, {sum(p.numel() for p in model.parameters()):,} "
        f"parameters, {memory}{seconds:.3f} s per step without data loading, about "
        f"{seconds * len(plan) * cfg.train.epochs / 3600:.2g} h for {cfg.train.epochs} epochs"
    )


def dense_start(cfg: DictConfig) -> tuple[DictConfig, Path] | None:
    """Configuration and directory of the dense start, if it is an arm of this folder and not trained yet."""
    if cfg.start.arm is None or cfg.start.checkpoint is not None or not cfg.start.make or cfg.preflight:
        return None
    path = sibling(cfg, cfg.start.arm, "last.ckpt")
    if (runs.read_json(path.parent / "result.json") or {}).get("status") == "finished":
        return None
    same = {k: OmegaConf.to_container(cfg[k], resolve=True) for k in ("data", "model", "fabric")}
    same |= {k: cfg[k] for k in ("seed", "scale", "run_root", "threads")}
    base = compose("config", overrides=[f"method={cfg.start.arm}", f"arm={cfg.start.arm}"])
    return OmegaConf.merge(base, same), path.parent  # type: ignore[return-value]


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(cfg: DictConfig) -> None:
    out = HydraConfig.get().runtime.output_dir
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    try:
        fabric = runs.launch(cfg.fabric, loggers=[instantiate(cfg.logger)] if cfg.logger else [])
        if (start := dense_start(cfg)) is not None:
            fabric.print(f"the dense start {start[1]} comes first")
            fit(start[0], fabric, start[1])
        fit(cfg, fabric, Path(out))
    finally:
        runs.remove_if_empty(out, cfg.run_root)


if __name__ == "__main__":
    main()
