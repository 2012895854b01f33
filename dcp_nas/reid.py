"""Train a re-identification network on a 1-bit backbone of a genotype (strong baseline: identity and triplet loss, BNNeck).

python reid.py                                                        procedural people, minutes on two cores
python reid.py experiment=market1501 data.root=/datasets/Market-1501-v15.09.15 init.weights=dcp_nas_l.ckpt
"""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import time
from dataclasses import asdict
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader

from common import runs
from common.data.batches import SeededBatches, stream
from dcp_nas.checkpoint import build_network, find_genotype
from dcp_nas.detection import load_backbone
from dcp_nas.reidentification import (
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
    """(train, query, gallery) by name; options: those of `procedural`. ValueError for another name, or a size of one number."""
    del workers  # of the loader
    if name not in SETS or len(size) != 2:
        raise ValueError(f"data.name={name!r}, data.size={list(size)}, allowed: {', '.join(SETS)} and [height, width]")
    if name == "market1501":
        return market1501(root)
    return procedural(seed=seed, height=size[0], width=size[1], **options)


@torch.no_grad()
def embed(fabric: Fabric, network, people: People, *, size, batch_size: int, workers: int) -> Tensor:
    """Embeddings (N, C) on CPU, mean of the image's and its mirror's."""
    network.eval()
    items = PeopleSet(people, people.ids, size=size, augment=False)
    found = []
    for images, _ in DataLoader(items, batch_size=batch_size, num_workers=workers):
        images = images.to(fabric.device)
        found.append((network(images) + network(images.flip(-1))).float().cpu() / 2)
    return torch.nn.functional.normalize(torch.cat(found), dim=1)


def reid_metrics(query: Tensor, gallery: Tensor, q: People, g: People) -> dict[str, float]:
    """mAP, rank1, rank5, rank10 in percent by cosine distance of the embeddings."""
    return cmc_map(
        1 - query @ gallery.T, query_ids=q.ids, query_cameras=q.cameras, gallery_ids=g.ids, gallery_cameras=g.cameras
    )


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Build, train to the end, evaluate; resumes from out/last.ckpt."""
    genotype = find_genotype(cfg)
    train, query, gallery = build_people(seed=cfg.seed, **cfg.data)
    size = tuple(cfg.data.size)
    _, labels = train.ids.unique(return_inverse=True)
    plan = PKPlan(
        labels,
        people=cfg.train.people,
        images=cfg.train.images,
        seed=cfg.seed,
        rank=fabric.global_rank,
        world=fabric.world_size,
    )
    torch.manual_seed(stream(cfg.seed))
    backbone = build_network(
        genotype=genotype,
        model=cfg.model,
        stage=cfg.stage,
        official_m_grad=cfg.parity.official_m_grad,
        classes=1,
        channels=3,
    )
    if cfg.init.weights is not None:
        load_backbone(backbone, cfg.init.weights)
    network = ReIdentifier(backbone, int(labels.max()) + 1)
    optimizer = torch.optim.Adam(
        [p for p in network.parameters() if p.requires_grad], lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay
    )
    model, optimizer = fabric.setup(network, optimizer)
    batches = SeededBatches(
        PeopleSet(train, labels, size=size, augment=True), plan, workers=cfg.data.workers, device=fabric.device
    )
    if cfg.preflight:
        images, y = next(iter(batches.epoch(1)))
        start = time.perf_counter()
        logits, f = model.train()(images)
        fabric.backward(identity_loss(logits, y) + triplet_loss(f, y))
        seconds = time.perf_counter() - start
        hours = seconds * len(batches) * cfg.train.epochs / 3600
        return fabric.print(
            f"preflight: data found, {len(train)} images, {seconds:.2f} s per step, about {hours:.2g} h"
        )
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
            f"{cfg.arm} on {cfg.data.name}: {len(train)} images of {len(plan.members)} people, {len(query)} queries, "
            f"{len(gallery)} gallery images, batch {plan.batch_size}, epochs {first}..{cfg.train.epochs}"
        )
        for epoch in range(first, cfg.train.epochs + 1):
            torch.manual_seed(stream(cfg.seed, epoch, fabric.global_rank))
            reached = sum(epoch >= m for m in cfg.optim.milestones)
            for group in optimizer.param_groups:
                group["lr"] = cfg.optim.lr * min(1.0, epoch / max(1, cfg.optim.warmup)) * 0.1**reached
            model.train()
            sums, start = {}, time.perf_counter()
            for k, (images, y) in enumerate(batches.epoch(epoch)):
                logits, f = model(images)
                terms = {
                    "identity": identity_loss(logits, y, smoothing=cfg.train.smoothing),
                    "triplet": triplet_loss(f, y, margin=cfg.train.margin),
                }
                runs.check_finite(terms, step=(epoch - 1) * len(batches) + k, last_good=run.checkpoint)
                fabric.backward(sum(terms.values()))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0.0) + value.detach() / len(batches)
            row = {name: fabric.all_reduce(value, reduce_op="mean").item() for name, value in sums.items()}
            rows.append(row)
            run.log(epoch=epoch, **row)
            if epoch % cfg.train.save_every == 0 or epoch == cfg.train.epochs:
                left = (time.perf_counter() - start) * (cfg.train.epochs - epoch)
                fabric.print(
                    f"epoch {epoch}/{cfg.train.epochs}  {'  '.join(f'{k} {v:.3g}' for k, v in row.items())}  {left:.0f} s left"
                )
                run.save_checkpoint({
                    "model": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "rows": rows,
                    "genotype": asdict(genotype), "config": run.config,
                })  # fmt: skip
        options = {"size": size, "batch_size": cfg.evaluate.batch_size, "workers": cfg.data.workers}
        metrics = reid_metrics(*(embed(fabric, network, p, **options) for p in (query, gallery)), query, gallery)
        run.finish(metrics)
        fabric.print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


@hydra.main(version_base="1.3", config_path="configs", config_name="reid")
def main(cfg: DictConfig) -> None:
    out = HydraConfig.get().runtime.output_dir
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    try:
        fit(cfg, runs.launch(cfg.fabric), Path(out))
    finally:
        runs.remove_if_empty(out, cfg.run_root)


if __name__ == "__main__":
    main()
