"""Train no-reference quality models: one run trains the models of `method.models` on one split.

python train.py                                              BRISQUE, CORNIA, Ma19 and UNIQUE stand-ins on embedded photographs
python train.py method=brisque seed=1
python train.py experiment=live data.root=/datasets/live     BRISQUE and CORNIA on LIVE minus the twelve test contents
torchrun --nproc_per_node=4 train.py experiment=unique data.root=/datasets/iqa
"""

import math
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor, nn

from common import runs
from common.data.batches import Plan, stream
from common.loop import Means, Progress, bar, preflight, sync_norm
from common.scripts import script
from iqa_attack.checkpoint import state
from iqa_attack.photographs.data import build_data, pair_batches, score_all
from iqa_attack.photographs.photos import ANNOTATORS, QualitySet
from iqa_attack.quality_metrics import correlations
from iqa_attack.quality_models.calibration import Scored, fit_calibration
from iqa_attack.quality_models.ma19 import Annotators, Ma19, probability_better
from iqa_attack.quality_models.models import build_network, pack, unpack
from iqa_attack.quality_models.statistics import fit_statistics
from iqa_attack.quality_models.unique import Unique, pair_loss
from iqa_attack.settings import NETWORKS, check_training, options_of


class Learner(nn.Module):
    """forward: this rank's images of a batch, and the targets of the whole batch -> named losses over all its pairs of one
    data set, those between images of two ranks included.

    Ma19 learns from the votes of full-reference annotators, UNIQUE from MOS."""

    def __init__(self, network: Ma19 | Unique, fabric: Fabric):
        super().__init__()
        self.network, self.rank, self.world = network, fabric.global_rank, fabric.world_size
        self.annotators = Annotators(len(ANNOTATORS)) if isinstance(network, Ma19) else None

    def whole(self, own: Tensor) -> Tensor:
        """The values (B,) of all ranks from this rank's; the gradient reaches this rank's, times the number of ranks, as DDP
        takes the mean of what all ranks find."""
        if self.world == 1:
            return own
        parts = [torch.zeros_like(own) for _ in range(self.world)]
        torch.distributed.all_gather(parts, own.detach().contiguous())
        parts[self.rank] = own * self.world - (own * (self.world - 1)).detach()
        return torch.cat(parts)

    def forward(self, x: Tensor, mos: Tensor, std: Tensor, fr: Tensor, source: Tensor) -> dict[str, Tensor]:
        first, second = (self.whole(v) for v in self.network.distribution(x))
        i, j = torch.tensor(list(combinations(range(len(mos)), 2)), device=x.device).T
        i, j = (t[source[i] == source[j]] for t in (i, j))
        if self.annotators is None:
            return pair_loss(first, second, mos, std, i, j)
        votes = (fr[i] > fr[j]).float()
        return {"likelihood": self.annotators(probability_better(first, second, i, j), votes)}


def train_one_epoch(
    fabric: Fabric, learner, module, optimizer, batches, *, total: int, epoch: int, run
) -> dict[str, float]:
    """One pass over the training images; returns the mean of every loss term. batches: images of this rank, targets of all."""
    learner.train()
    means, precision = Means(), run.config["fabric"]["precision"]
    for step, (x, targets) in enumerate(bar(batches, total=total, title=f"epoch {epoch}"), (epoch - 1) * total):
        terms = learner(x, *targets)
        fabric.backward(sum(terms.values()))
        means.add(terms, len(targets[0]))
        norm = fabric.clip_gradients(learner, optimizer, max_norm=math.inf, error_if_nonfinite=False)
        means.check(step=step, norm=norm, last_good=run.checkpoint, precision=precision)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if isinstance(module.network, Ma19):
            module.network.project()
    return means.result(fabric)


def batches_of(fabric: Fabric, cfg: DictConfig, data: QualitySet, plan: Plan, options: dict[str, Any], epoch: int):
    """See `pair_batches`."""
    where = {"seed": cfg.seed, "epoch": epoch, "device": fabric.device, "workers": cfg.data.get("workers", 0)}
    return pair_batches(data, plan, crop=options["crop"], resize=options["resize"], **where)


def rates(options: dict[str, Any], epoch: int) -> tuple[float, float]:
    """Learning rates of an epoch, counted from 1: of what is new, and of the trunk, which rests at first."""
    step = options["lr_step"]
    decay = 0.1 ** ((epoch - 1) // step) if step else 0.5 * (1 + math.cos(math.pi * (epoch - 1) / options["epochs"]))
    return options["lr"] * decay, 0.0 if epoch <= options["frozen_epochs"] else options["lr"] * decay


def prepared(fabric: Fabric, cfg: DictConfig, name: str, size: int):
    """(options, network with its losses, the same for training, optimizer, plan of the batches)."""
    options = options_of(cfg, name)
    torch.manual_seed(stream(cfg.seed, *name.encode()))
    module = sync_norm(fabric, Learner(build_network(name, **options["model"]), fabric))
    trunk = list(module.network.backbone.parameters()) if isinstance(module.network, Unique) else []
    rest = [p for p in module.parameters() if all(p is not t for t in trunk)]
    groups = [{"params": rest}, {"params": trunk}]
    optimizer = torch.optim.Adam(groups, lr=options["lr"], weight_decay=options["weight_decay"])
    learner, optimizer = fabric.setup(module, optimizer)
    return options, module, learner, optimizer, Plan.of(options, size, fabric, seed=stream(cfg.seed, *name.encode()))


def train_network(fabric: Fabric, cfg: DictConfig, name: str, data: QualitySet, run, saved: dict) -> nn.Module:
    """Train Ma19 or UNIQUE to the end; goes on from what `saved` has of it. Returns the network on the CPU."""
    options, module, learner, optimizer, plan = prepared(fabric, cfg, name, len(data))
    first, last = 1, options["epochs"]
    if saved["learning"]["name"] == name:
        module.load_state_dict(saved["learning"]["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epoch"] + 1
    fabric.print(f"{name}: {len(data)} images, {plan}, lr {options['lr']}, epochs {first}..{last}")
    progress = Progress(fabric, run, first=first, last=last, every=cfg.train.log_every)
    for epoch in range(first, last + 1):
        torch.manual_seed(stream(cfg.seed, epoch, fabric.global_rank))
        for group, lr in zip(optimizer.param_groups, rates(options, epoch), strict=True):
            group["lr"] = lr
        batches = batches_of(fabric, cfg, data, plan, options, epoch)
        row = train_one_epoch(fabric, learner, module, optimizer, batches, total=len(plan), epoch=epoch, run=run)
        row = {"model": name, "lr": optimizer.param_groups[0]["lr"], **row}
        progress.report(epoch, row, images=plan.steps * plan.batch_size)
        if epoch % cfg.train.save_every == 0 or epoch == last:
            learning = {"name": name, "model": module.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
            run.save_checkpoint(state(saved["model"], config=run.config, learning=learning))
    return module.network.cpu().eval()


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Train every model of the arm, map its scores to 0..10, report correlations on test images; resumes from out/last.ckpt."""
    check_training(cfg, fabric.world_size)
    data = build_data(seed=cfg.seed, **cfg.data)
    if cfg.preflight:
        return look_ahead(fabric, cfg, data["train"])
    if (run := runs.Run.open(out, cfg, fabric, data=data["train"].identity)) is not None:
        with run:
            train(fabric, run, cfg, data)


def train(fabric: Fabric, run: runs.Run, cfg: DictConfig, data: dict[str, QualitySet]) -> None:
    """One model after the other from the last checkpoint on; each is calibrated on the training images."""
    saved = run.load_checkpoint() or state({}, config=run.config)
    sizes = ", ".join(f"{len(data[split])} {split}" for split in ("train", "test"))
    fabric.print(f"{cfg.arm} on {cfg.data.kind}: {sizes} images, seed {cfg.seed}")
    metrics: dict[str, float] = {}
    for name in cfg.method.models:
        resize = cfg.networks[name].test_resize if name in NETWORKS else None
        if name not in saved["model"]:
            if name in NETWORKS:
                model = train_network(fabric, cfg, name, data["train"], run, saved)
            else:
                model = fit_statistics(name, data["train"], cfg.statistics[name], seed=cfg.seed, split=cfg.data)
            raw = score_all(model.to(fabric.device), data["train"], device=fabric.device, resize=resize)
            fitted = fit_calibration(raw, data["train"].mos, source="fitted to the training images")
            saved = state({**saved["model"], name: pack(name, Scored(model.cpu(), fitted))}, config=run.config)
            run.save_checkpoint(saved)
        scored = unpack(saved["model"][name]).to(fabric.device)
        for split in ("test", "attack"):
            s = score_all(scored, data[split], device=fabric.device, resize=resize)
            metrics |= {f"{k}_{split}_{name}": v for k, v in correlations(s, data[split].mos).items()}
        shown = ", ".join(f"{metrics[f'srcc_{split}_{name}']:.3f} on those of {split}" for split in ("test", "attack"))
        fabric.print(f"{name}: SRCC of its scores {shown}, {run.seconds:.0f} s")
    run.save_checkpoint(state(saved["model"], config=run.config, complete=True))
    run.finish(metrics)


def look_ahead(fabric: Fabric, cfg: DictConfig, data: QualitySet) -> None:
    """Data found, steps of every network; prints memory and hours, writes nothing."""

    def step(learner: nn.Module, x: Tensor, targets: list[Tensor]) -> None:
        fabric.backward(sum(learner(x, *targets).values()))

    for name in cfg.method.models:
        if name not in NETWORKS:
            fabric.print(f"preflight: {len(data)} training images for {name}, a fit of seconds to minutes")
            continue
        options, module, learner, _, plan = prepared(fabric, cfg, name, len(data))
        learner.train()
        x, targets = next(iter(batches_of(fabric, cfg, data, plan, options, 1)))
        of, steps = sum(p.numel() for p in module.parameters()), len(plan) * options["epochs"]
        fabric.print(f"{name}:")
        preflight(fabric, partial(step, learner, x, targets), parameters=of, what=f"{len(x)} images", steps=steps)


main = script("config", fit)


if __name__ == "__main__":
    main()
