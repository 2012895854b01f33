"""Train one arm (ARI or a baseline) on a stream of tasks.

python train.py                                               digits and their negatives in 4 tasks, ARI, seconds
python train.py method=er seed=1
python train.py experiment=cifar100 data.root=/datasets        the recipe of the released code
"""

import csv
import time
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from common import runs
from common.data.batches import stream as random_stream
from lifelong.augmentation import Prepare
from lifelong.background_attack import region_weight
from lifelong.baselines import build_learner
from lifelong.learner import Learner
from lifelong.metrics import PROTOCOLS, background_gap, plot_matrix, summaries
from lifelong.model import build_model
from lifelong.streams import Stream, build_stream
from lifelong.task_prediction import within_group


def build(cfg: DictConfig, stream: Stream, device: torch.device | str = "cpu") -> Learner:
    """The learner of a configuration, its weights drawn from the seed."""
    torch.manual_seed(random_stream(cfg.seed))
    options = OmegaConf.to_container(cfg.model, resolve=True)
    growing = options.pop("growing")
    first, last = stream.groups[0].stop, stream.groups[-1].stop
    model = build_model(
        num_classes=first if growing else last, channels=stream.channels, size=cfg.prepare.size,
        unused=cfg.parity.unused_parameters, **options,
    )  # fmt: skip
    method = OmegaConf.to_container(cfg.method, resolve=True)
    common = {k: method.pop(k) for k in ("replay",)} | {"seed": cfg.seed, "device": device, "total_tasks": len(stream)}
    common |= {**cfg.memory, "batch_size": cfg.train.batch_size, "epochs": cfg.train.epochs}
    common |= {"optim": dict(cfg.optim), "schedule": dict(cfg.schedule), "attack_stats": cfg.parity.attack_stats}
    return build_learner(method.pop("learner"), model, Prepare(**cfg.prepare), method, **common)


def train_one_epoch(
    fabric: Fabric, learner: Learner, data, *, task: int, epoch: int, run: runs.Run
) -> dict[str, float]:
    """One pass over new and replayed images; returns the mean of every term and the images seen per second."""
    rows: list[dict[str, Tensor]] = []
    start, total = time.perf_counter(), -(-len(data[0]) // learner.batch_size)
    batches = learner.epoch(*data, epoch)
    bar = tqdm(
        batches, total=total, desc=f"task {task} epoch {epoch}", leave=False, disable=None if total > 20 else True
    )
    for step, batch in enumerate(bar):
        with fabric.autocast():
            terms = learner.step(*batch)
        runs.check_finite(terms, step=(epoch - 1) * total + step, last_good=run.checkpoint)
        rows.append(terms)
    means = {k: torch.stack([r[k] for r in rows if k in r]).mean().item() for k in sorted({k for r in rows for k in r})}
    return means | {"images_per_s": len(data[0]) / (time.perf_counter() - start)}


def test_sets(stream: Stream, seed: int, tasks: int) -> list[tuple[Tensor, Tensor]]:
    """Test images and labels of the first tasks, shuffled within a task: a chunk must not hold one class only."""
    sets = []
    for k in range(tasks):
        images, labels = stream.task("test", k)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(random_stream(seed, k, 4)))
        sets.append((images[order], labels[order]))
    return sets


def evaluate(learner: Learner, sets: list[tuple[Tensor, Tensor]], *, p: int, adapt: bool) -> dict[str, list[float]]:
    """Accuracies in percent on every task seen, by protocol, and how often the task vote is right."""
    found = learner.predict_sets([images for images, _ in sets], p=p, adapt=adapt)
    result: dict[str, list[float]] = {name: [] for name in (*PROTOCOLS, "vote")}
    for k, (prediction, (_, labels)) in enumerate(zip(found, sets, strict=True)):
        prediction["task_il"] = within_group(prediction["scores"], learner.groups[k])
        for name in PROTOCOLS:
            result[name].append(100 * (prediction[name] == labels).double().mean().item())
        result["vote"].append(100 * (prediction["voted"] == k).double().mean().item())
    return result


def final_metrics(matrices: dict[str, Tensor], counts: list[int], learner: Learner, stream: Stream) -> dict[str, float]:
    """{protocol}_{summary} of every protocol, the last task vote, and the attack weight on background minus foreground."""
    metrics = {f"{name}_{k}": v for name in PROTOCOLS for k, v in summaries(matrices[name], counts).items()}
    metrics["vote_acc"] = matrices["vote"][-1].mean().item()
    if stream.masks is not None:
        images, _ = stream.task("test", *range(len(stream)))
        attention = learner.run(lambda x: learner.model(x, return_attention=True)[1], images)
        masks = stream.masks[stream.indices("test", *range(len(stream)))]
        metrics["background_gap"] = background_gap(region_weight(attention), masks)
    return metrics


def preflight(fabric: Fabric, learner: Learner, stream: Stream) -> None:
    """Two steps on the first task; prints memory and hours. Writes nothing."""
    images, labels = stream.task("train", 0)
    learner.begin_task(stream.groups[0].stop)
    batches = learner.epoch(*learner.training_set(images, labels), 1)
    first = next(batches)
    for _ in range(2):  # the first step also pays for allocation and kernel selection
        start = time.perf_counter()
        learner.step(*first)
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    card = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the card, " if fabric.device.type == "cuda" else ""
    steps = sum(-(-len(stream.indices("train", k)) // learner.batch_size) for k in range(len(stream))) * learner.epochs
    fabric.print(
        f"preflight: data found, {len(stream)} tasks, {sum(p.numel() for p in learner.model.parameters()):,} parameters, {card}"
        f"{seconds:.3f} s per step of the first task, about {seconds * steps / 3600:.2g} h at that rate "
        "(inner loops of more tasks make later steps longer)"
    )


def save_figures(out: Path, matrices: dict[str, Tensor], title: str) -> None:
    """matrix.csv and matrix.png beside the result."""
    with (out / "matrix.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["protocol", "after_task", *(f"task_{k}" for k in range(len(matrices["class_il"])))])
        for name in PROTOCOLS:
            rows = matrices[name].tolist()
            writer.writerows([name, t, *("" if v != v else f"{v:.4f}" for v in row)] for t, row in enumerate(rows))
    plot_matrix({name: matrices[name] for name in PROTOCOLS}, out / "matrix.png", title)


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Build, learn task after task, evaluate after each; resumes in the middle of the stream from out/last.ckpt."""
    if fabric.world_size > 1:
        raise runs.RunError(
            "inner loops of one batch run one after another on one device: start arms and seeds side by side"
        )
    if fabric._precision.precision not in ("32-true", "bf16-mixed"):
        raise ValueError(
            f"fabric.precision={cfg.fabric.precision!r}, allowed: 32-true, bf16-mixed (no loss scaler here)"
        )
    if cfg.evaluate.p < 1:
        raise ValueError(f"evaluate.p={cfg.evaluate.p}, allowed: >= 1 consecutive samples of one task")
    stream = build_stream(seed=cfg.seed, **cfg.data)
    learner = build(cfg, stream, fabric.device)
    if learner.memory is not None:
        learner.memory.share(stream.groups[-1].stop)  # a memory too small stops here, not in the last task
    if cfg.preflight:
        return preflight(fabric, learner, stream)

    run = runs.Run.open(out, cfg, fabric)
    if run is None:
        return
    with run:
        tasks, epochs = len(stream), cfg.train.epochs
        matrices = {name: torch.full((tasks, tasks), torch.nan, dtype=torch.double) for name in (*PROTOCOLS, "vote")}
        task0, epoch0 = 0, 0
        if (state := run.load_checkpoint()) is not None:
            if state["classes"] != stream.class_names:
                raise runs.RunError(
                    f"{run.checkpoint} was trained on other classes or another order; force=true starts again"
                )
            learner.load_state_dict(state["learner"])
            matrices, task0, epoch0 = state["matrices"], state["task"], state["epoch"]
            if learner.replay == "all":
                learner.past = [stream.task("train", k) for k in range(task0)]
        sizes = [g.stop - g.start for g in stream.groups]
        fabric.print(
            f"{cfg.arm} on {cfg.data.name}: tasks of {sizes} classes, {len(stream.targets['train'])} training images, memory "
            f"{cfg.memory.budget}, batch {cfg.train.batch_size} on one device, lr {cfg.optim.lr}, "
            f"from task {task0} epoch {epoch0 + 1} of {tasks} x {epochs}"
        )
        tests = test_sets(stream, cfg.seed, tasks)

        def save(task: int, epoch: int) -> None:
            run.save_checkpoint({
                "learner": learner.state_dict(), "matrices": matrices, "task": task, "epoch": epoch,
                "classes": stream.class_names, "config": run.config,
            })  # fmt: skip

        start, done = time.perf_counter(), 0
        for t in range(task0, tasks):
            images, labels = stream.task("train", t)
            if epoch0 == 0:
                learner.begin_task(sizes[t])
            data = learner.training_set(images, labels)
            for epoch in range(epoch0 + 1, epochs + 1):
                row = train_one_epoch(fabric, learner, data, task=t, epoch=epoch, run=run)
                rate, done = row.pop("images_per_s"), done + 1
                run.log(task=t, epoch=epoch, lr=learner.optimizers[0].param_groups[0]["lr"], **row)
                for logger in fabric.loggers:
                    logger.log_metrics(row, step=t * epochs + epoch)
                if epoch % cfg.train.log_every == 0 or epoch == epochs:
                    left = (time.perf_counter() - start) / done * ((tasks - t) * epochs - epoch)
                    terms = "  ".join(f"{k} {v:.4f}" for k, v in row.items())
                    fabric.print(f"task {t} epoch {epoch}/{epochs}  {terms}  {rate:.0f} images/s  {left:.0f} s left")
                if epoch % cfg.train.save_every == 0 and epoch < epochs:
                    save(t, epoch)
            learner.end_task(images, labels)
            row = evaluate(learner, tests[: t + 1], **cfg.evaluate)
            for name, values in row.items():
                matrices[name][t, : t + 1] = torch.tensor(values, dtype=torch.double)
            run.log(task=t, **row)
            shown = "  ".join(f"{name} {sum(v) / len(v):.2f}" for name, v in row.items())
            fabric.print(f"task {t} done, mean over {t + 1} tasks in %: {shown}")
            epoch0 = 0
            save(t + 1, 0)
        metrics = final_metrics(matrices, [len(y) for _, y in tests], learner, stream)
        save_figures(out, matrices, f"{cfg.arm}, seed {cfg.seed}, p = {cfg.evaluate.p}")
        run.finish(metrics)
        for name in PROTOCOLS:
            fabric.print("  ".join(f"{k} {v:.2f}" for k, v in metrics.items() if k.startswith(name)))


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
