"""Train no-reference quality models: one run trains the models of `method.models` on one split.

python train.py                                              BRISQUE, CORNIA, Ma19 and UNIQUE stand-ins on embedded
photographs
python train.py method=brisque seed=1
python train.py experiment=live data.root=/datasets/live     BRISQUE and CORNIA on LIVE minus the twelve test contents
torchrun --nproc_per_node=4 train.py experiment=unique data.root=/datasets/iqa
"""

import math
import time
from itertools import combinations
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import runs
from common.data.batches import Plan, stream
from iqa_attack.brisque import Brisque, fit_brisque
from iqa_attack.cornia import fit_cornia
from iqa_attack.data import TrainingCrops, build_data, score_all
from iqa_attack.ma19 import Annotators, Ma19, probability_better
from iqa_attack.niqe import fit_niqe
from iqa_attack.nr_models import KINDS, Scored, pack, unpack
from iqa_attack.photos import QualitySet, scenes, subset
from iqa_attack.quality_metrics import correlations, fit_logistic
from iqa_attack.unique import Unique, pair_loss

NETWORKS = ("ma19", "unique")


class Learner(nn.Module):
    """forward: a batch of images and their targets -> named losses over all its pairs of one data set.

    Ma19 learns from the votes of full-reference annotators, UNIQUE from MOS."""

    def __init__(self, network: Ma19 | Unique):
        super().__init__()
        self.network = network
        self.annotators = Annotators(4) if isinstance(network, Ma19) else None

    def forward(self, x: Tensor, mos: Tensor, std: Tensor, fr: Tensor, source: Tensor) -> dict[str, Tensor]:
        first, second = self.network.distribution(x)
        i, j = torch.tensor(list(combinations(range(len(x)), 2)), device=x.device).T
        i, j = (t[source[i] == source[j]] for t in (i, j))
        if self.annotators is None:
            return pair_loss(first, second, mos, std, i, j)
        votes = (fr[i] > fr[j]).float()
        return {"likelihood": self.annotators(probability_better(first, second, i, j), votes)}


def train_one_epoch(fabric: Fabric, learner, optimizer, loader, targets, *, epoch: int, run) -> dict[str, float]:
    """One pass over the training images; the mean of every term and the images per second."""
    learner.train()
    sums: dict[str, Tensor] = {}
    start, seen, total = time.perf_counter(), 0, len(loader)
    for step, (x, index) in enumerate(
        tqdm(loader, desc=f"epoch {epoch}", leave=False, disable=None if total > 20 else True)
    ):
        terms = learner(x.to(fabric.device), *(t[index.to(fabric.device)] for t in targets))
        loss = sum(terms.values())
        runs.check_finite(
            {**terms, "loss": loss}, step=(epoch - 1) * total + step, last_good=run.checkpoint if run else None
        )
        fabric.backward(loss)
        norm = fabric.clip_gradients(learner, optimizer, max_norm=math.inf, error_if_nonfinite=False)
        runs.check_finite(
            {"gradient norm": norm}, step=(epoch - 1) * total + step, last_good=run.checkpoint if run else None
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        network = learner.module.network if hasattr(learner, "module") else learner.network
        if isinstance(network, Ma19):
            network.project()
        seen += len(x) * fabric.world_size
        for name, value in terms.items():
            sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach()
    return {n: v.item() / total for n, v in sums.items()} | {"images_per_s": seen / (time.perf_counter() - start)}


def build_learner(cfg: DictConfig, name: str) -> Learner:
    """The network of an arm with weights drawn from the seed; UNIQUE may start from ImageNet weights (`pretrained`: a
    file)."""
    torch.manual_seed(stream(cfg.seed, *name.encode()))
    options = dict(cfg.networks[name].model)
    pretrained = options.pop("pretrained", None)
    network = Ma19(**options) if name == "ma19" else Unique(**options)
    if pretrained and isinstance(network, Unique):
        state = {k: v for k, v in runs.load_checkpoint(pretrained).items() if not k.startswith("fc.")}
        network.backbone.load_state_dict(state)
    return Learner(network)


def train_network(fabric: Fabric, cfg: DictConfig, name: str, data: QualitySet, run, state: dict) -> nn.Module:
    """Train Ma19 or UNIQUE to the end; resumes from state["current"]. Returns the network on the CPU."""
    options = cfg.networks[name]
    if name == "ma19" and data.fr is None:
        raise ValueError(
            "ma19 learns from full-reference annotators and needs undistorted originals: use data=photos or photo_folder"
        )
    per_device = runs.per_device_batch(options.batch_size, fabric.world_size)
    learner = build_learner(cfg, name)
    if fabric.world_size > 1 and fabric.device.type == "cuda":
        learner = nn.SyncBatchNorm.convert_sync_batchnorm(learner)
    trunk = list(learner.network.backbone.parameters()) if isinstance(learner.network, Unique) else []
    rest = [p for p in learner.parameters() if all(p is not t for t in trunk)]
    optimizer = torch.optim.Adam(
        [{"params": rest}, {"params": trunk}], lr=options.lr, weight_decay=options.weight_decay
    )
    module, (learner, optimizer) = learner, fabric.setup(learner, optimizer)
    first, epochs = 1, options.epochs
    if state["current"] and state["current"]["name"] == name:
        module.load_state_dict(state["current"]["model"])
        optimizer.load_state_dict(state["current"]["optimizer"])
        first = state["current"]["epoch"] + 1
    fr = data.fr if data.fr is not None else torch.zeros(len(data), 4)
    targets = [t.to(fabric.device) for t in (data.mos, data.std, fr, data.sources())]
    plan = Plan(
        len(data),
        options.batch_size,
        seed=stream(cfg.seed, *name.encode()),
        rank=fabric.global_rank,
        world=fabric.world_size,
    )
    fabric.print(
        f"{name}: {len(data)} images, global batch {options.batch_size} = {fabric.world_size} devices x {per_device}, "
        f"lr {options.lr}, epochs {first}..{epochs}"
    )
    start = time.perf_counter()
    for epoch in range(first, epochs + 1):
        torch.manual_seed(stream(cfg.seed, epoch, fabric.global_rank))
        lr = options.lr * (
            0.1 ** ((epoch - 1) // options.lr_step)
            if options.lr_step
            else 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))
        )
        for i, group in enumerate(optimizer.param_groups):  # the trunk rests at first: a step of length zero
            group["lr"] = 0.0 if i == 1 and epoch <= options.frozen_epochs else lr
        crops = TrainingCrops(data, seed=cfg.seed, epoch=epoch, size=options.crop, resize=options.resize)
        order = [indices[part].tolist() for _, indices, part in plan.epoch(epoch)]
        loader = DataLoader(crops, batch_sampler=order, num_workers=cfg.data.get("workers", 0))
        row = train_one_epoch(fabric, learner, optimizer, loader, targets, epoch=epoch, run=run)
        rate = row.pop("images_per_s")
        if run is None:  # preflight: one epoch was asked for
            break
        run.log(model=name, epoch=epoch, lr=lr, **row)
        for logger in fabric.loggers:
            logger.log_metrics({"lr": lr, **{f"{name}/{k}": v for k, v in row.items()}}, step=epoch)
        if epoch % cfg.train.log_every == 0 or epoch in (first, epochs):
            left = (time.perf_counter() - start) / (epoch - first + 1) * (epochs - epoch)
            terms = "  ".join(f"{k} {v:.4f}" for k, v in row.items())
            fabric.print(f"{name} epoch {epoch}/{epochs}  lr {lr:.3g}  {terms}  {rate:.0f} images/s  {left:.0f} s left")
        if epoch % cfg.train.save_every == 0 or epoch == epochs:
            state["current"] = {
                "name": name, "model": module.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch,
            }  # fmt: skip
            run.save_checkpoint(state)
    return module.network.cpu().eval()


@torch.no_grad()
def fit_statistics(cfg: DictConfig, name: str, data: QualitySet) -> nn.Module:
    """BRISQUE, CORNIA or NIQE on the training images."""
    options = dict(cfg.statistics[name])
    if name == "niqe":
        return fit_niqe([torch.from_numpy(p.copy()).permute(2, 0, 1).float() / 255 for p in _pristine(cfg)], **options)
    if name == "brisque":
        reader = Brisque(support=1, **{k: options[k] for k in ("shape_gradient", "resize") if k in options})
        features = torch.cat([reader.features(data.image(i)[None].float() / 255) for i in range(len(data))])
        return fit_brisque(features, data.mos, **options)
    return fit_cornia(data.stack(), data.mos, seed=cfg.seed, **options)


def _pristine(cfg: DictConfig) -> list:
    if cfg.data.kind != "photos":
        raise ValueError("niqe is fitted on pristine photographs: use data=photos or data=photo_folder")
    d = cfg.data
    return scenes(d.root, cfg.seed, test=d.test_photos, reduce=d.reduce, size=d.size)[0]


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Train every model of the arm, map its scores to 0..10, report correlations on test images; resumes from
    out/last.ckpt."""
    if unknown := set(cfg.method.models) - set(KINDS):
        raise ValueError(f"method.models names {sorted(unknown)}, allowed: {', '.join(KINDS)}")
    for name in cfg.method.models:
        if name in NETWORKS:
            runs.per_device_batch(cfg.networks[name].batch_size, fabric.world_size)
            build_learner(cfg, name)  # a misspelt key stops here, before any data
    data = build_data(seed=cfg.seed, **cfg.data)
    if cfg.preflight:
        return preflight(fabric, cfg, data["train"])
    run = runs.Run.open(out, cfg, fabric)
    if run is None:
        return
    with run:
        state = run.load_checkpoint() or {"trained": {}, "current": None, "complete": False, "config": run.config}
        state.pop("run", None)
        fabric.print(
            f"{cfg.arm} on {cfg.data.kind}: {len(data['train'])} training, {len(data['test'])} test images, seed {cfg.seed}"
        )
        metrics: dict[str, float] = {}
        for name in cfg.method.models:
            resize = cfg.networks[name].test_resize if name in NETWORKS else None
            if name not in state["trained"]:
                if name in NETWORKS:
                    model = train_network(fabric, cfg, name, data["train"], run, state)
                else:
                    model = fit_statistics(cfg, name, data["train"])
                raw = score_all(model.to(fabric.device), data["train"], device=fabric.device, resize=resize)
                state["trained"][name] = pack(name, Scored(model.cpu(), *fit_logistic(raw, data["train"].mos)))
                state["current"] = None
                run.save_checkpoint(state)
            scored = unpack(state["trained"][name]).to(fabric.device)
            for split in ("test", "attack"):
                s = score_all(scored, data[split], device=fabric.device, resize=resize)
                metrics |= {f"{k}_{split}_{name}": v for k, v in correlations(s, data[split].mos).items()}
            test, attacked = (metrics[f"srcc_{split}_{name}"] for split in ("test", "attack"))
            fabric.print(
                f"{name}: SRCC {test:.3f} on the test images, {attacked:.3f} on those to be attacked, {run.seconds:.0f} s"
            )
        run.save_checkpoint({**state, "complete": True})
        run.finish(metrics)


def preflight(fabric: Fabric, cfg: DictConfig, data: QualitySet) -> None:
    """Data found, one step of every network; prints memory and hours, writes nothing."""
    for name in cfg.method.models:
        if name not in NETWORKS:
            fabric.print(f"preflight: {len(data)} training images for {name}, a fit of seconds to minutes")
            continue
        options = cfg.networks[name]
        few = subset(data, range(min(len(data), options.batch_size)))
        start = time.perf_counter()
        train_network(fabric, cfg, name, few, None, {"current": None})
        seconds = time.perf_counter() - start
        hours = seconds * (len(data) // options.batch_size) * options.epochs / 3600
        memory = (
            f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the card, " if fabric.device.type == "cuda" else ""
        )
        fabric.print(
            f"preflight: {name}: data found, {memory}{seconds:.2f} s per step, about {hours:.2g} h for {options.epochs} epochs"
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
