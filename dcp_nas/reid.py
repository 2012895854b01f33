"""Train a re-identification network on a 1-bit backbone of a genotype (strong baseline: identity and triplet loss, BNNeck).

python reid.py                                                        procedural people, minutes on two cores
python reid.py experiment=market1501 data.root=/datasets/Market-1501-v15.09.15 init.weights=dcp_nas_l.ckpt
"""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import math
from pathlib import Path

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor

from common import runs
from common.data.batches import SeededBatches, eval_batches, stream
from common.data.files import identity
from common.loop import Means, Progress, bar, gather, preflight, sync_norm
from common.scripts import script
from dcp_nas.checkpoint import build_network, check_start, load_backbone, state, try_network
from dcp_nas.genotypes import find_genotype
from dcp_nas.search_space import Genotype
from dcp_nas.transfer.reidentification import (
    SETS,
    People,
    PeopleSet,
    PKPlan,
    ReIdentifier,
    cmc_map,
    identity_loss,
    market1501,
    procedural,
    triplet_loss,
)


def build_people(*, name: str, seed: int, root: str | None = None, size: list[int], workers: int = 0, **options):
    """(train, query, gallery) by name; options: those of `procedural`."""
    del workers  # of the loader
    if name == "market1501":
        return market1501(root)
    return procedural(seed=seed, height=size[0], width=size[1], **options)


def losses(model, images: Tensor, labels: Tensor, cfg: DictConfig) -> dict[str, Tensor]:
    """Cross-entropy of the identities behind the neck, batch-hard triplets in front of it."""
    logits, f = model(images)
    return {
        "identity": identity_loss(logits, labels, smoothing=cfg.train.smoothing),
        "triplet": triplet_loss(f, labels, margin=cfg.train.margin),
    }


def train_one_epoch(fabric: Fabric, model, optimizer, batches, *, epoch: int, cfg, run: runs.Run) -> dict[str, float]:
    """One pass over the people; returns the mean of every term."""
    model.train()
    means = Means()
    for k, (images, labels) in enumerate(bar(batches.epoch(epoch), total=len(batches), title=f"epoch {epoch}")):
        terms = losses(model, images, labels, cfg)
        fabric.backward(sum(terms.values()))
        means.add(terms, len(labels))
        norm = fabric.clip_gradients(model, optimizer, max_norm=math.inf, error_if_nonfinite=False)
        step = (epoch - 1) * len(batches) + k
        means.check(step=step, norm=norm, last_good=run.checkpoint, precision=cfg.fabric.precision)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return means.result(fabric)


def rate(epoch: int, *, lr: float, milestones: list[int], warmup: int, weight_decay: float = 0.0) -> float:
    """lr, rising linearly over `warmup` epochs, a tenth of it after every milestone (which counts from its own epoch on)."""
    del weight_decay
    return lr * min(1.0, epoch / max(1, warmup)) * 0.1 ** sum(epoch >= m for m in milestones)


@torch.no_grad()
def embed(fabric: Fabric, model, people: People, *, size, batch_size: int, workers: int) -> Tensor:
    """Embeddings (N, C) on CPU, mean of the image's and its mirror's."""
    model.eval()
    items, options = (
        PeopleSet(people, people.ids, size=size, augment=False),
        {"batch_size": batch_size, "workers": workers},
    )
    found = []
    for images, _ in eval_batches(items, rank=fabric.global_rank, world=fabric.world_size, **options):
        images = images.to(fabric.device)
        found.append((model(images) + model(images.flip(-1))).float() / 2)
    whole = gather(fabric, {"embeddings": torch.cat(found)}, len(people))["embeddings"]
    return torch.nn.functional.normalize(whole, dim=1)


def reid_metrics(query: Tensor, gallery: Tensor, q: People, g: People) -> dict[str, float]:
    """mAP, rank1, rank5, rank10 in percent by cosine distance of the embeddings."""
    return cmc_map(
        1 - query @ gallery.T, query_ids=q.ids, query_cameras=q.cameras, gallery_ids=g.ids, gallery_cameras=g.cameras
    )


def check(cfg: DictConfig, genotype: Genotype) -> None:
    """ValueError or FileNotFoundError for what would otherwise be found out after the data, or never."""
    d, t, o = cfg.data, cfg.train, cfg.optim
    if d.name not in SETS or len(d.size) != 2 or min(d.size) < 1:
        raise ValueError(
            f"data.name={d.name!r}, data.size={list(d.size)}, allowed: {', '.join(SETS)} and [height, width]"
        )
    if d.name == "procedural" and d.root:
        raise ValueError(
            f"data.root={d.root}: procedural is embedded; name the set at the root with data.name=market1501"
        )
    if t.epochs < 1 or min(t.people, t.images) < 2 or t.margin < 0 or not 0 <= t.smoothing < 1:
        raise ValueError(
            f"train.epochs={t.epochs}, people={t.people}, images={t.images}, margin={t.margin}, smoothing={t.smoothing}, "
            "allowed: epochs >= 1, people and images >= 2, margin >= 0, 0 <= smoothing < 1"
        )
    if o.lr < 0 or o.weight_decay < 0 or o.warmup < 0:
        raise ValueError(f"optim.lr={o.lr}, weight_decay={o.weight_decay}, warmup={o.warmup} must not be negative")
    check_start(cfg.stage, None if cfg.init.weights is None else Path(cfg.init.weights))
    try_network(cfg, genotype, 1, 3, d.size)


def build(cfg: DictConfig, genotype: Genotype, identities: int) -> ReIdentifier:
    """The network of a configuration, with weights drawn from its seed, its backbone from init.weights if given."""
    torch.manual_seed(stream(cfg.seed))
    options = {"model": cfg.model, "stage": cfg.stage, "official_m_grad": cfg.parity.official_m_grad}
    backbone = build_network(genotype=genotype, classes=1, channels=3, **options)
    if cfg.init.weights is not None:
        load_backbone(backbone, cfg.init.weights)
    return ReIdentifier(backbone, identities)


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Build, train to the end, evaluate; resumes from out/last.ckpt."""
    genotype = find_genotype(cfg)
    check(cfg, genotype)
    people = build_people(seed=cfg.seed, **cfg.data)
    ids, labels = people[0].ids.unique(return_inverse=True)
    sharing = {"rank": fabric.global_rank, "world": fabric.world_size}
    plan = PKPlan(labels, people=cfg.train.people, images=cfg.train.images, seed=cfg.seed, **sharing)
    network = sync_norm(fabric, build(cfg, genotype, len(ids)))
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay)
    model, optimizer = fabric.setup(network, optimizer)
    items = PeopleSet(people[0], labels, size=tuple(cfg.data.size), augment=True)
    batches = SeededBatches(items, plan, workers=cfg.data.workers, device=fabric.device)
    if cfg.preflight:
        model.train()
        images, y = next(iter(batches.epoch(1)))
        preflight(
            fabric, lambda: fabric.backward(sum(losses(model, images, y, cfg).values())),
            parameters=sum(p.numel() for p in trained), what=f"{len(y)} images", steps=len(batches) * cfg.train.epochs,
        )  # fmt: skip
        return
    files = None if cfg.data.name == "procedural" else [f for part in people for f in part.images]
    source = identity(cfg.data.name, files, root=cfg.data.root)
    if (run := runs.Run.open(out, cfg, fabric, data=source)) is not None:
        with run:
            train(fabric, run, cfg, people, genotype, model, network, optimizer, batches)


def train(fabric: Fabric, run: runs.Run, cfg, people, genotype, model, network, optimizer, batches) -> None:
    """The epochs from the last checkpoint on, then the evaluation."""
    first, rows, (training, query, gallery), epochs = 1, [], people, cfg.train.epochs
    if (saved := run.load_checkpoint()) is not None:
        network.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, rows = saved["epoch"] + 1, saved["rows"]
    fabric.print(
        f"{cfg.arm} on {cfg.data.name}: {len(training)} images of {len(batches.plan.members)} people, {len(query)} queries, "
        f"{len(gallery)} gallery images, batch {batches.plan.batch_size}, epochs {first}..{epochs}"
    )
    about = {"task": "re-identification", "channels": 3, "size": list(cfg.data.size), "crop": False}
    about |= {
        "classes": [str(i) for i in training.ids.unique().tolist()],
        "normalise": {"mean": [0.5] * 3, "std": [0.25] * 3},
    }
    progress = Progress(fabric, run, first=first, last=epochs, every=cfg.train.save_every)
    for epoch in range(first, epochs + 1):
        torch.manual_seed(stream(cfg.seed, epoch, fabric.global_rank))
        lr = rate(epoch, **cfg.optim)
        for group in optimizer.param_groups:
            group["lr"] = lr
        row = train_one_epoch(fabric, model, optimizer, batches, epoch=epoch, cfg=cfg, run=run)
        rows.append(row)
        progress.report(epoch, {"lr": lr, **row}, images=batches.plan.steps * batches.plan.batch_size)
        if epoch % cfg.train.save_every == 0 or epoch == epochs:
            run.save_checkpoint(state(network, optimizer, about, genotype, epoch=epoch, rows=rows, config=run.config))
    options = {"size": tuple(cfg.data.size), "batch_size": cfg.evaluate.batch_size, "workers": cfg.data.workers}
    metrics = reid_metrics(*(embed(fabric, model, p, **options) for p in (query, gallery)), query, gallery)
    run.finish(metrics)
    fabric.print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


main = script("reid", fit)


if __name__ == "__main__":
    main()
