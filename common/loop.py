"""What the train loops of the papers need beside forward, losses, backward and step, which stay in plain sight in each folder:
means over images and ranks, the finite check, gathering over ranks, the progress of a run, and its preflight.
"""

import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from tqdm import tqdm

from common.runs import Run, check_finite

Network = TypeVar("Network", bound=nn.Module)


_DONE: set[tuple[Hashable, ...]] = set()


def once(check: Callable[..., None], *arguments: Hashable) -> None:
    """check(*arguments), unless this process has done so with these arguments: cells of a sweep often differ in the seed alone.

    In place of functools.cache, because joblib takes the functions of a script to its processes by value, a cached one by name,
    under which nothing is found there."""
    key = (check.__module__, check.__qualname__, *arguments)
    if key not in _DONE:
        check(*arguments)
        _DONE.add(key)


class Loaded(NamedTuple):
    """What `load(path)` of every paper's checkpoint.py returns: the network in evaluation mode, the resolved configuration
    that trained it ({} for released weights), and what is needed to use it: classes (names), channels, size, normalise, ..."""

    model: nn.Module
    config: dict[str, Any]
    about: dict[str, Any]


class Means:
    """Means of named scalars over the images of an epoch, and over ranks.

        means = Means()
        for images, labels in batches: means.add(terms, len(labels)); ...; means.check(step=step, norm=norm, last_good=...)
        row = means.result(fabric)

    One host synchronisation per optimizer step, in `check`: a sum is NaN or infinite as soon as one of its terms was."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.counts: dict[tuple[str, int], int] = {}
        self.images = 0

    def add(self, terms: Mapping[str, Tensor | float], images: int) -> None:
        """terms: scalars that are means over `images` images."""
        self.images += images
        for name, value in terms.items():
            # One sum per number of images: equal batches, the rule here, are summed as they are and divided once.
            key = (name, images)
            value = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))
            self.sums[key] = self.sums[key] + value if key in self.sums else value
            self.counts[key] = self.counts.get(key, 0) + 1

    def check(self, *, step: int, norm: Tensor | None, last_good: Path | None, precision: str = "32-true") -> None:
        """`check_finite` of everything added so far, and of the gradient norm. The loss scaler of 16-mixed skips a step whose
        gradient is infinite, so there the norm is not looked at."""
        terms = {name: value for (name, _), value in self.sums.items()}
        if norm is not None and precision != "16-mixed":
            terms["gradient norm"] = norm
        check_finite(terms, step=step, last_good=last_good)

    def result(self, fabric: Fabric | None = None) -> dict[str, float]:
        """{name: mean over the images of all ranks}; without `fabric` those of this process."""
        totals: dict[str, float] = {}
        weights: dict[str, float] = {}
        single = {name for name, _ in self.sums if sum(n == name for n, _ in self.sums) == 1}
        for (name, images), value in self.sums.items():
            scale = 1 if name in single else images
            totals[name] = totals.get(name, 0.0) + scale * value.item()
            weights[name] = weights.get(name, 0) + scale * self.counts[name, images]
        if fabric is not None and fabric.world_size > 1:
            own = torch.tensor([[totals[n], weights[n]] for n in totals], dtype=torch.float64, device=fabric.device)
            both = fabric.all_reduce(own, reduce_op="sum").tolist()  # type: ignore[union-attr]
            return {n: total / weight for n, (total, weight) in zip(totals, both, strict=True)}
        return {n: totals[n] / weights[n] for n in totals}


def gather(fabric: Fabric, share: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """All rows in order on every rank, on the CPU, of tensors whose rows rank, rank + world, ... this rank holds
    (`eval_batches`). share: {name: (rows of this rank, ...)}; size: rows of all ranks, at least one per rank."""
    if fabric.world_size == 1:
        return {name: value.cpu() for name, value in share.items()}
    if size < fabric.world_size:
        raise ValueError(f"{size} images for {fabric.world_size} ranks: evaluate with at most {size} processes")
    whole = {}
    for name, value in share.items():
        kind = value.dtype if value.is_floating_point() else torch.int64
        rows = torch.zeros(size, *value.shape[1:], dtype=kind, device=fabric.device)
        rows[fabric.global_rank :: fabric.world_size] = value.to(
            fabric.device, kind
        )  # the others' rows are zero: a sum
        whole[name] = fabric.all_reduce(rows, reduce_op="sum").to(value.dtype).cpu()  # type: ignore[union-attr]
    return whole


def sync_norm(fabric: Fabric, model: nn.Module) -> nn.Module:
    """The model with batch statistics over all ranks. torch has that for GPUs only: on CPUs each rank keeps its own, and a
    notice says so."""
    normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if fabric.world_size == 1 or not normed:
        return model
    if fabric.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    fabric.print(
        f"notice: batch norm uses the statistics of each of the {fabric.world_size} ranks by itself on a CPU, so the numbers "
        "differ from one process with the whole batch"
    )
    return model


def compiled(network: Network, wanted: bool) -> Network:
    """The network itself, which torch.compile will translate at its first step if `wanted` (cfg.compile); its names, state and
    type stay. Sums may run in another order, so `compile=true` is part of what a run is. ValueError without a compiler."""
    if wanted:
        if not torch.cuda.is_available() and not shutil.which(os.environ.get("CXX", "c++")):
            raise ValueError(
                "compile=true needs a C++ compiler on a CPU (Debian, Ubuntu: apt install g++; or CXX=<compiler>)"
            )
        network.compile()
    return network


def bar(batches: Iterable, *, total: int, title: str, quiet_below: int = 20) -> Iterator:
    """A progress bar over micro-batches on a terminal, nothing in a log or for less than `quiet_below` of them."""
    return iter(tqdm(batches, total=total, desc=title, leave=False, disable=None if total > quiet_below else True))


class Progress:
    """Reports epochs: a line in metrics.jsonl, the loggers, and every `every` epochs one on the screen with the time left."""

    def __init__(self, fabric: Fabric, run: Run, *, first: int, last: int, every: int):
        self.fabric, self.run, self.first, self.last, self.every = fabric, run, first, last, every
        self.start = self.begun = time.perf_counter()

    def report(self, epoch: int, row: Mapping[str, Any], *, images: int, unit: str = "images") -> None:
        """row: the numbers of the epoch; images: those that all ranks have seen in it."""
        now = time.perf_counter()
        rate, self.begun = images / max(now - self.begun, 1e-9), now
        self.run.log(epoch=epoch, **row)
        for logger in self.fabric.loggers:
            logger.log_metrics({k: v for k, v in row.items() if isinstance(v, int | float)}, step=epoch)
        if epoch % self.every == 0 or epoch in (self.first, self.last):
            left = (now - self.start) / (epoch - self.first + 1) * (self.last - epoch)
            values = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, int | float))
            self.fabric.print(f"epoch {epoch}/{self.last}  {values}  {rate:.0f} {unit}/s  {left:.0f} s left")


def preflight(
    fabric: Fabric, step: Callable[[], Any], *, parameters: int, what: str, steps: int, repeats: int = 3, note: str = ""
) -> dict[str, float]:
    """Runs `step` (one micro-batch forward and backward, the teacher's forward pass included), once to warm up and `repeats`
    times on the clock; prints memory and hours, and writes nothing. Returns {seconds per step, hours, memory in bytes}.

    parameters: of what is trained; what: the batch in words, e.g. '32 images'; steps: micro-batches of the whole training.
    The gradients are those of the last step: the process ends after a preflight."""
    cuda = fabric.device.type == "cuda"
    seconds = []
    for k in range(repeats + 1):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        if k:  # the first also pays for allocation and the choice of kernels
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    memory = torch.cuda.max_memory_allocated() if cuda else peak_memory()
    hours = median * steps / 3600
    where = "on the card" if cuda else "of main memory at most"
    fabric.print(
        f"preflight: data found, {what} per device and step, {parameters:,} parameters, {memory / 2**30:.2f} GiB {where}, "
        f"{median:.3f} s per step without data loading, about {two_digits(hours)} h for {steps:,} "
        f"steps{f'; {note}' if note else ''}"
    )
    return {"seconds": median, "hours": hours, "memory": memory}


def two_digits(x: float) -> str:
    """0.0123 as 0.012, 172.4 as 170."""
    return f"{float(f'{x:.2g}'):g}"


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
