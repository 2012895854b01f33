"""A learner of a stream of tasks: `observe_task(dataset)`, `predict(images, mode=...)`, and the steps between.

    learner = MetaLearner(build_model(...), Prepare(...), total_tasks=10)
    for images, labels in tasks:                 # labels 0..4, then 5..9, ...
        learner.observe_task(dataset)
    classes = learner.predict(images, mode="class_il")

A train loop of its own calls begin_task, epoch, step and end_task instead (train.py does). Images are raw: uint8 0..255 or
float 0..1, (n, C, H, W).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from common.data.batches import stream as random_stream
from lifelong.adaptive_fusion import step_size
from lifelong.augmentation import Prepare
from lifelong.batches import LAST, cut
from lifelong.memory import ExemplarMemory
from lifelong.meta_update import MetaOptions, group_bce, meta_step
from lifelong.model import Gated, grow_head
from lifelong.ranks import Ranks
from lifelong.task_prediction import adapt, group_scores, vote, within_group

MODES = ("class_il", "continuum", "task_il")
REPLAYS = ("none", "memory", "all")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def make_optimizer(
    parameters, *, name: str = "sgd", lr: float = 0.05, momentum: float = 0.0, weight_decay: float = 0.0
):
    """SGD or RAdam (betas 0.9, 0.999; momentum belongs to SGD). ValueError for another name or lr <= 0."""
    if lr <= 0:
        raise ValueError(f"optim.lr={lr}, allowed: > 0")
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if name == "radam":
        return torch.optim.RAdam(parameters, lr=lr, weight_decay=weight_decay)
    raise ValueError(f"optim.name={name!r}, allowed: sgd, radam")


def lr_factor(
    epoch: int, epochs: int, *, kind: str = "constant", milestones: Sequence[int] = (), gamma: float = 0.2
) -> float:
    """Factor of the learning rate in epoch 1..epochs of a task: constant | step (gamma after every milestone) | cosine."""
    if kind == "constant":
        return 1.0
    if kind == "step":
        return gamma ** sum(epoch > m for m in milestones)
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))
    raise ValueError(f"schedule.kind={kind!r}, allowed: constant, step, cosine")


class Learner:
    """Cross entropy over the classes seen; `replay` chooses finetune (none), experience replay (memory) or joint (all).

    Replayed images are mixed with those of the new task in one shuffled pass. Other methods derive from this class.

    model: see lifelong.model; a head smaller than the classes seen grows. prepare: see `Prepare`. total_tasks: K, None for an
    open stream. budget, policy: see `ExemplarMemory`. last_batch: see `cut`. optim, schedule: see `make_optimizer`,
    `lr_factor`; a fresh optimiser for every task. attack_stats: mean and std of the attack's step and box, data | imagenet
    (parity with the released code). ranks: the processes that share every batch.
    ValueError for values that are not allowed.
    """

    adapts = True  # whether the head's logits classify, so that adapting a copy makes sense

    def __init__(
        self,
        model: Gated,
        prepare: Prepare,
        *,
        total_tasks: int | None = None,
        replay: str = "memory",
        budget: int = 2000,
        policy: str = "first",
        batch_size: int = 128,
        epochs: int = 70,
        last_batch: str = "merge",
        optim: dict[str, Any] | None = None,
        schedule: dict[str, Any] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        attack_stats: str = "data",
        ranks: Ranks | None = None,
    ):
        if replay not in REPLAYS:
            raise ValueError(f"method.replay={replay!r}, allowed: {', '.join(REPLAYS)}")
        if batch_size < 2 or epochs < 1:
            raise ValueError(f"batch_size={batch_size}, epochs={epochs}, allowed: batch_size >= 2, epochs >= 1")
        if attack_stats not in ("data", "imagenet"):
            raise ValueError(f"parity.attack_stats={attack_stats!r}, allowed: data, imagenet")
        if last_batch not in LAST:
            raise ValueError(f"train.last_batch={last_batch!r}, allowed: {', '.join(LAST)}")
        self.schedule, self.last_batch, self.ranks = schedule or {}, last_batch, ranks or Ranks()
        lr_factor(1, epochs, **self.schedule)
        self.model, self.prepare, self.device = model.to(device), prepare, torch.device(device)
        self.total_tasks, self.replay, self.seed = total_tasks, replay, seed
        self.batch_size, self.epochs, self.optim = batch_size, epochs, optim or {}
        own = {"mean": prepare.mean, "std": prepare.std}
        self.stats = own if attack_stats == "data" else IMAGENET
        self.memory = ExemplarMemory(budget, policy=policy, seed=seed) if replay == "memory" else None
        self.past: list[tuple[Tensor, Tensor]] = []  # replay=all
        self.groups: list[slice] = []
        self.optimizers = self.make_optimizers()

    # ------------------------------------------------------------------------------------------------------ one task
    @property
    def seen(self) -> int:
        """Number of classes seen."""
        return self.groups[-1].stop if self.groups else 0

    def begin_task(self, classes: int) -> None:
        """A new task with that many new classes: widen the head if need be, make a fresh optimiser.

        ValueError for an empty task, more tasks than announced, or a memory smaller than the classes seen."""
        if classes < 1:
            raise ValueError(f"a task must have at least one class, got {classes}")
        if self.total_tasks is not None and len(self.groups) == self.total_tasks:
            raise ValueError(f"task {len(self.groups) + 1} of a stream announced with {self.total_tasks} tasks")
        if self.memory is not None:
            self.memory.share(self.seen + classes)
        self.before_task()
        torch.manual_seed(random_stream(self.seed, len(self.groups), 0))  # new rows of the head
        self.groups = [*self.groups, slice(self.seen, self.seen + classes)]
        grow_head(self.model, max(self.seen, self.model.head.out_features))
        self.optimizers = self.make_optimizers()

    def epoch(self, images: Tensor, labels: Tensor, epoch: int) -> Iterator[tuple[Tensor, Tensor, torch.Generator]]:
        """Batches (raw images on the device, labels, generator) of epoch 1, 2, ..., with what is replayed mixed in.

        They depend on (seed, task, epoch) alone; see `cut` for the last one. Sets the learning rate."""
        self.model.train()
        factor = lr_factor(epoch, self.epochs, **self.schedule)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]
        generator = torch.Generator(self.device).manual_seed(random_stream(self.seed, len(self.groups), epoch))
        torch.manual_seed(random_stream(self.seed, len(self.groups), epoch, 1))  # dropout
        order = torch.randperm(len(images), generator=generator, device=self.device).to(images.device)
        for batch in cut(order, self.batch_size, self.last_batch):
            yield images[batch].to(self.device), labels[batch].to(self.device), generator

    def batches(self, images: int) -> int:
        """Batches of an epoch of so many images."""
        return len(cut(torch.arange(images), self.batch_size, self.last_batch))

    def training_set(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The new task's data and what is replayed with it. ValueError for labels outside the new classes."""
        group = self.groups[-1]
        if len(images) != len(labels) or not set(labels.tolist()) == set(range(group.start, group.stop)):
            raise ValueError(
                f"{len(images)} images with labels {sorted(set(labels.tolist()))[:10]}: the task needs every one of "
                f"{group.start}..{group.stop - 1} and no other"
            )
        old = [self.memory.data()] if self.memory is not None and len(self.memory) else self.past
        return torch.cat([images, *(x for x, _ in old)]), torch.cat([labels, *(y for _, y in old)])

    def step(self, raw: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """One update on a batch of `epoch`, which all ranks have whole; returns named scalars."""
        terms = self.losses(self.prepare(raw, generator), raw, labels, generator)
        self.optimizers[0].zero_grad(set_to_none=True)
        torch.stack([*terms.values()]).sum().backward()
        terms = self.ranks.add(self.model.parameters(), terms)
        self.optimizers[0].step()
        return terms

    def end_task(self, images: Tensor, labels: Tensor) -> None:
        """Keep exemplars of the new task."""
        if self.memory is not None:
            self.memory.add(images, labels, lambda x: self.run(self.model.features, x))
        if self.replay == "all":
            self.past.append((images, labels))

    def observe_task(self, data: Dataset | tuple[Tensor, Tensor]) -> list[dict[str, float]]:
        """Learn one task: the next classes. Returns mean terms per epoch.

        data: a map-style data set of (raw image tensor (C, H, W), label), or its images (n, C, H, W) and labels (n,)."""
        if isinstance(data, Dataset):
            items = [data[i] for i in range(len(data))]  # type: ignore[arg-type]
            data = torch.stack([image for image, _ in items]), torch.tensor([int(label) for _, label in items])
        images, labels = data
        self.begin_task(len(set(labels.tolist())))
        rows = []
        training = self.training_set(images, labels)
        for epoch in range(1, self.epochs + 1):
            terms = [self.step(*batch) for batch in self.epoch(*training, epoch)]
            rows.append({k: torch.stack([t[k] for t in terms if k in t]).mean().item() for t in terms[:1] for k in t})
        self.end_task(images, labels)
        return rows

    # ------------------------------------------------------------------------------------- what methods change
    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        optimizers: list[torch.optim.Optimizer] = [make_optimizer(self.model.parameters(), **self.optim)]
        for group in (g for o in optimizers for g in o.param_groups):
            group["initial_lr"] = group["lr"]
        return optimizers

    def before_task(self) -> None:
        """Called when a task begins, before its classes are added."""

    def losses(self, x: Tensor, raw: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """This rank's share of the loss terms of a batch: sums over its rows, divided by all rows. x: prepared images, raw: as
        they came, both of the whole batch."""
        logits = self.model(self.ranks.mine(x))[:, : self.seen]
        return {"ce": F.cross_entropy(logits, self.ranks.mine(labels), reduction="sum") / len(labels)}

    def scores(self, x: Tensor) -> Tensor:
        """Prepared images -> (B, classes seen), the largest is the predicted class."""
        return self.model(x)[:, : self.seen]

    # ----------------------------------------------------------------------------------------------------- inference
    @torch.no_grad()
    def run(self, function: Callable[[Tensor], Tensor], raw: Tensor, batch_size: int = 500) -> Tensor:
        """function(prepared images) in evaluation mode over raw images in batches, on CPU. Ranks share the images."""
        training, shared = self.model.training, len(raw) >= self.ranks.world
        self.model.eval()
        mine = self.ranks.mine(raw) if shared else raw
        out = torch.cat([function(self.prepare(part.to(self.device))).float() for part in mine.split(batch_size)])
        self.model.train(training)
        return (self.ranks.gather(out, len(raw)) if shared else out).cpu()

    def adapted(self, task: int, **options: Any) -> Gated:
        """A copy of the model adapted to the exemplars of a task; see `task_prediction.adapt`.

        ValueError without exemplars."""
        if self.memory is None:
            raise ValueError("this learner keeps no exemplars to adapt to")
        images, labels = self.memory.data(self.groups[task])
        generator = torch.Generator(self.device).manual_seed(random_stream(self.seed, len(self.groups), task, 2))
        x = self.prepare(images.to(self.device), generator)
        return adapt(self.model, x, labels.to(self.device), self.groups[task], generator=generator, **options)  # type: ignore[return-value]

    def predict(self, raw: Tensor, mode: str = "class_il", *, p: int = 20, task: int | None = None) -> Tensor:
        """Classes (n,) of raw images (n, C, H, W), on CPU.

        class_il: argmax over all classes seen. continuum: every p consecutive images are known to come from one task, which
        is voted, then the adapted copy decides. task_il: the task of all images is given. ValueError for another mode."""
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}, allowed: {', '.join(MODES)}")
        if not self.groups:
            raise ValueError("no task was observed yet")
        if mode == "continuum":
            return self.predict_sets([raw], p=p)[0]["continuum"]
        scores = self.run(self.scores, raw)
        if mode == "class_il":
            return scores.argmax(1)
        if task is None or not 0 <= task < len(self.groups):
            raise ValueError(f"mode=task_il needs the task, task={task}, allowed: 0..{len(self.groups) - 1}")
        return within_group(scores, self.groups[task])

    def predict_sets(
        self, sets: Sequence[Tensor], *, p: int, adapt: bool = True, more_p: Sequence[int] = (), batch_size: int = 500
    ) -> list[dict[str, Tensor]]:
        """Per set of raw images (each from one task): {class_il, continuum, voted: (n,); scores (n, classes seen)}, and
        continuum_p<q> for every q in `more_p`.

        Sets are predicted together because every adapted copy is made once. Adaptation is left out after the first task and
        for learners without exemplars."""
        votes = {"voted": ("continuum", p), **{f"voted_p{q}": (f"continuum_p{q}", q) for q in more_p}}
        results = []
        for raw in sets:
            scores = self.run(self.scores, raw, batch_size)
            classes = torch.stack([within_group(scores, g) for g in self.groups], 1)
            result = {"class_il": scores.argmax(1), "scores": scores}
            for voted, (name, length) in votes.items():
                result[voted] = vote(group_scores(scores, self.groups), length)
                result[name] = classes.gather(1, result[voted][:, None])[:, 0]
            results.append(result)
        if adapt and self.adapts and self.memory is not None and len(self.groups) > 1:
            for k, group in enumerate(self.groups):
                if not any(bool((r[voted] == k).any()) for r in results for voted in votes):
                    continue
                copy = self.adapted(k)
                for raw, result in zip(sets, results, strict=True):
                    for voted, (name, _) in votes.items():
                        if (mine := result[voted] == k).any():
                            result[name][mine] = within_group(self.run(copy, raw[mine], batch_size), group)
        return results

    # --------------------------------------------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """Everything that training goes on from, as tensors and plain types; `past` (replay=all) is not included."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "memory": None if self.memory is None else self.memory.state_dict(),
            "sizes": [g.stop - g.start for g in self.groups],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.groups = []
        for size in state["sizes"]:
            self.groups.append(slice(self.seen, self.seen + size))
        grow_head(self.model, max(self.seen, self.model.head.out_features))
        self.model.load_state_dict(state["model"])
        self.optimizers = self.make_optimizers()
        if state["optimizers"] is not None:  # published weights have none
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        if self.memory is not None:
            self.memory.load_state_dict(state["memory"])


class MetaLearner(Learner):
    """ARI and iTAML: `meta_step` on every batch. options: keywords of `MetaOptions`."""

    def __init__(self, model: Gated, prepare: Prepare, *, options: dict[str, Any] | None = None, **common: Any):
        self.options = MetaOptions(**(options or {}))
        super().__init__(model, prepare, **common)

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        count = len(self.groups) if self.options.optimizer_state == "per_task" else 1
        return [o for _ in range(max(1, count)) for o in super(MetaLearner, self).make_optimizers()]

    def begin_task(self, classes: int) -> None:
        super().begin_task(classes)
        self.alpha = step_size(len(self.groups) - 1, self.total_tasks, beta=self.options.beta)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.alpha = step_size(max(0, len(self.groups) - 1), self.total_tasks, beta=self.options.beta)

    def step(self, raw: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return meta_step(
            self.model, self.optimizers, self.prepare(raw, generator), labels, self.groups,
            alpha=self.alpha, options=self.options, generator=generator, ranks=self.ranks, **self.stats,
        )  # fmt: skip


class BinaryReplay(Learner):
    """Experience replay with the loss of the meta update, binary cross entropy over the classes seen, in plain steps."""

    def losses(self, x: Tensor, raw: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        logits, mine = self.model(self.ranks.mine(x)), self.ranks.mine(labels)
        return {"bce": group_bce(logits, mine, slice(0, self.seen), of=len(labels))}
