"""Train one arm (ARI or a baseline) on a stream of tasks.

python train.py                                               digits and their negatives in 4 tasks, ARI, seconds
python train.py method=er seed=1
python train.py experiment=cifar100 data.root=/datasets        the recipe of the released code

The step of an arm (forward, losses, backward, optimizer, fusion) stands in `meta_update.meta_step` for ARI and iTAML, in
`Learner.step` for the baselines: a learner is a thing to use by itself, see lifelong/learner.py.
"""

from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor, nn

from common import runs
from common.loop import Means, Progress, bar, preflight, sync_norm
from common.scripts import script
from lifelong.build import build
from lifelong.checkpoint import restore, state
from lifelong.evaluation import empty_matrices, evaluate, final_metrics, fusion_spread, protocols, save_matrices
from lifelong.learner import Learner
from lifelong.ranks import Ranks
from lifelong.streams import Stream, build_stream


def train_one_epoch(
    fabric: Fabric, learner: Learner, data: tuple[Tensor, Tensor], *, task: int, epoch: int, run: runs.Run
) -> dict[str, float]:
    """One pass over new and replayed images; returns the mean of every term over the images."""
    means, total = Means(), learner.batches(len(data[0]))
    batches = bar(learner.epoch(*data, epoch), total=total, title=f"task {task} epoch {epoch}")
    for step, (images, labels, generator) in enumerate(batches):
        with fabric.autocast():
            terms = learner.step(images, labels, generator)
        means.add(terms, len(labels))
        means.check(step=(epoch - 1) * total + step, norm=None, last_good=run.checkpoint)
    # A gradient that is not finite shows in the weights; they are looked at before they are saved.
    weights = torch.stack([p.detach().float().sum() for p in learner.model.parameters()]).sum()
    runs.check_finite({"weights": weights}, step=epoch * total - 1, last_good=run.checkpoint)
    return means.result()


def check(cfg: DictConfig, fabric: Fabric) -> None:
    """What can be refused before data is read: every value of the learner (built on no device), protocols, precision, ranks."""
    runs.per_device_batch(cfg.train.batch_size, fabric.world_size)
    if fabric._precision.precision not in ("32-true", "bf16-mixed"):
        raise ValueError(
            f"fabric.precision={cfg.fabric.precision!r}, allowed: 32-true, bf16-mixed (no loss scaler here)"
        )
    if cfg.evaluate.p < 1:
        raise ValueError(f"evaluate.p={cfg.evaluate.p}, allowed: >= 1 consecutive samples of one task")
    if not isinstance(cfg.optim.lr, int | float):  # experiment/mnist_short.yaml gives it by interpolation, a text
        raise ValueError(f"optim.lr={cfg.optim.lr} must be a finite number")
    protocols(cfg.evaluate.more_p)
    options = runs.plain(cfg)
    options["model"] = {**options["model"], **({"pretrained": False} if "pretrained" in options["model"] else {})}
    with torch.device("meta"):
        model = build(options, [2, 2], len(cfg.prepare.mean), device="meta").model
    normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if normed and fabric.world_size > 1 and fabric.device.type != "cuda":
        raise runs.RunError(
            f"{cfg.model.name} on {fabric.world_size} CPU processes: batch norm would use the statistics of each process by "
            "itself (torch synchronises them on GPUs only), and the numbers would be others; use one process"
        )


def probe(fabric: Fabric, learner: Learner, stream: Stream) -> None:
    """The preflight: steps in the middle of the stream, on images of the first task with labels of all classes seen."""
    middle = len(stream) // 2
    for size in stream.sizes[: middle + 1]:  # makes the teacher of the arms that have one
        learner.begin_task(size)
    images, _ = stream.task("train", 0)
    labels = torch.arange(len(images)) % learner.seen
    batch = next(learner.epoch(images, labels, 1))
    replayed = {"none": 0, "memory": learner.memory.budget if learner.memory else 0}
    steps = 0
    for k in range(len(stream)):
        new, old = len(stream.indices("train", k)), len(stream.indices("train", *range(k)))
        steps += learner.batches(new + min(old, replayed.get(learner.replay, old))) * learner.epochs
    preflight(
        fabric, lambda: learner.step(*batch), parameters=sum(p.numel() for p in learner.model.parameters()),
        what=f"{len(batch[1])} images of {middle + 1} of {len(stream)} tasks", steps=steps,
        note="a step of the meta update grows with the tasks seen, this is one in the middle of the stream",
    )  # fmt: skip


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Build, learn task after task, evaluate after each; resumes in the middle of the stream from out/last.ckpt."""
    check(cfg, fabric)
    stream = build_stream(seed=cfg.seed, **runs.plain(cfg)["data"])
    learner = build(cfg, stream.sizes, stream.channels, device=fabric.device, ranks=Ranks(fabric))
    learner.model = sync_norm(fabric, learner.model)
    if learner.memory is not None:
        learner.memory.share(stream.groups[-1].stop)  # a memory too small stops here, not in the last task
    if cfg.preflight:
        return probe(fabric, learner, stream)
    if (run := runs.Run.open(out, cfg, fabric, data=stream.source)) is not None:
        with run:
            train(fabric, run, cfg, stream, learner)


def resume(run: runs.Run, learner: Learner, stream: Stream, more_p: Any) -> tuple[dict[str, Tensor], int, int]:
    """The accuracy matrices, the task to go on with and its last finished epoch; the learner as it was then."""
    if (saved := run.load_checkpoint()) is None:
        return empty_matrices(len(stream), more_p), 0, 0
    if saved["about"]["classes"] != stream.class_names:
        raise runs.RunError(f"{run.checkpoint} was trained on other classes or another order; force=true starts again")
    restore(learner, saved)
    if learner.replay == "all":
        learner.past = [stream.task("train", k) for k in range(saved["task"])]
    return saved["matrices"], saved["task"], saved["epoch"]


def train(fabric: Fabric, run: runs.Run, cfg: DictConfig, stream: Stream, learner: Learner) -> None:
    """The tasks and epochs from the last checkpoint on, the evaluation after every task, the summaries at the end."""
    tasks, epochs = len(stream), cfg.train.epochs
    matrices, task0, epoch0 = resume(run, learner, stream, cfg.evaluate.more_p)
    fabric.print(
        f"{cfg.arm} on {cfg.data.name}: tasks of {stream.sizes} classes, "
        f"{len(stream.indices('train', *range(tasks)))} training images, memory {cfg.memory.budget}, global batch "
        f"{cfg.train.batch_size} on {fabric.world_size} device(s), lr {cfg.optim.lr}, from task {task0} epoch {epoch0 + 1} of "
        f"{tasks} x {epochs}"
    )
    tests = stream.test_sets(cfg.seed, tasks)
    first = min(task0 * epochs + epoch0 + 1, tasks * epochs)
    progress = Progress(fabric, run, first=first, last=tasks * epochs, every=cfg.train.log_every)

    def save(task: int, epoch: int) -> None:
        run.save_checkpoint(state(learner, stream, matrices=matrices, task=task, epoch=epoch, config=run.config))

    for t in range(task0, tasks):
        images, labels = stream.task("train", t)
        if epoch0 == 0:
            learner.begin_task(stream.sizes[t])
        data = learner.training_set(images, labels)
        for epoch in range(epoch0 + 1, epochs + 1):
            row = train_one_epoch(fabric, learner, data, task=t, epoch=epoch, run=run)
            rate = learner.optimizers[0].param_groups[0]["lr"]
            progress.report(t * epochs + epoch, {"task": t, "lr": rate, **row}, images=len(data[0]))
            if epoch % cfg.train.save_every == 0 and epoch < epochs:
                save(t, epoch)
        learner.end_task(images, labels)
        found = evaluate(learner, tests[: t + 1], **cfg.evaluate)
        for name, values in found.items():
            matrices[name][t, : t + 1] = torch.tensor(values, dtype=torch.double)
        run.log(task=t, **found)
        shown = "  ".join(f"{name} {sum(v) / len(v):.2f}" for name, v in found.items())
        fabric.print(f"task {t} done, mean over {t + 1} tasks in %: {shown}")
        epoch0 = 0
        save(t + 1, 0)
    metrics = final_metrics(matrices, [len(y) for _, y in tests], learner, stream)
    if fabric.is_global_zero:
        metrics |= fusion_spread(run.dir)
        save_matrices(
            run.dir, matrices, f"{cfg.arm}, seed {cfg.seed}, p = {cfg.evaluate.p}, memory {cfg.memory.budget}"
        )
    run.finish(metrics)
    for name in protocols(cfg.evaluate.more_p):
        fabric.print("  ".join(f"{k} {v:.2f}" for k, v in metrics.items() if k.startswith(f"{name}_")))


@script()
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    fit(cfg, fabric, out)


if __name__ == "__main__":
    main()
