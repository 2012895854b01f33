"""Baselines beside finetune, replay and joint training (those are `Learner`): LwF, iCaRL, EWC, DER++ and ER with a reservoir."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.batches import stream as random_stream
from lifelong.augmentation import Prepare
from lifelong.learner import Learner, MetaLearner
from lifelong.memory import Reservoir
from lifelong.model import Gated


class Distilling(Learner):
    """Keeps the model as it was when the task began, frozen, as `teacher` (None in the first task)."""

    teacher: Gated | None = None

    def before_task(self) -> None:
        if self.groups:
            self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)

    def old_logits(self, x: Tensor) -> Tensor:
        """The teacher's logits of the classes before this task."""
        assert self.teacher is not None
        with torch.no_grad():
            return self.teacher(x)[:, : self.groups[-1].start]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"teacher": None if self.teacher is None else self.teacher.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.teacher = None
        if state["teacher"] is not None:
            self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
            old = state["teacher"]["head.weight"]
            self.teacher.head = torch.nn.Linear(old.shape[1], len(old), bias="head.bias" in state["teacher"]).to(
                self.device
            )
            self.teacher.load_state_dict(state["teacher"])
            self.teacher.requires_grad_(False)


class LwF(Distilling):
    """Learning without forgetting (Li and Hoiem 2016): CE on the new task plus distillation of the old logits.

    weight: of the distillation, T^2 KL(teacher || student) at temperature T over the old classes."""

    def __init__(self, model: Gated, prepare: Prepare, *, weight: float = 1.0, temperature: float = 2.0, **common: Any):
        if weight < 0 or temperature <= 0:
            raise ValueError(f"lwf: weight={weight}, temperature={temperature}, allowed: weight >= 0, temperature > 0")
        self.weight, self.temperature = weight, temperature
        super().__init__(model, prepare, **common)

    def losses(self, x: Tensor, raw: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        group, logits = self.groups[-1], self.model(x)
        terms = {"ce": F.cross_entropy(logits[:, group], labels - group.start)}
        if self.teacher is not None:
            t = self.temperature
            new, old = (logits[:, : group.start] / t).log_softmax(1), (self.old_logits(x) / t).log_softmax(1)
            terms["distillation"] = self.weight * t**2 * F.kl_div(new, old, reduction="batchmean", log_target=True)
        return terms


class ICaRL(Distilling):
    """iCaRL (Rebuffi et al. 2017): BCE on one-hot targets of the new classes and the teacher's probabilities of the old ones,
    herded memory, nearest mean of exemplars. `scores` are minus squared distances to the means."""

    adapts = False

    def losses(self, x: Tensor, raw: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        logits = self.model(x)[:, : self.seen]
        targets = F.one_hot(labels, self.seen).to(logits.dtype)
        if self.teacher is not None:
            targets[:, : self.groups[-1].start] = self.old_logits(x).sigmoid().to(logits.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return {"bce": loss.sum(1).mean()}  # summed over classes, as many tasks would else shrink the gradient

    def run(self, function, raw: Tensor, batch_size: int = 500) -> Tensor:
        if function == self.scores:
            images, labels = self.memory.data()  # type: ignore[union-attr]
            features = F.normalize(super().run(self.model.features, images), dim=1)
            means = torch.stack([features[labels == c].mean(0) for c in range(self.seen)])
            self.means = F.normalize(means, dim=1).to(self.device)
        return super().run(function, raw, batch_size)

    def scores(self, x: Tensor) -> Tensor:
        return -(torch.cdist(F.normalize(self.model.features(x), dim=1), self.means) ** 2)


class EWC(Learner):
    """Elastic weight consolidation, online form (Kirkpatrick et al. 2017; Schwarz et al. 2018).

    weight: of 1/2 sum F (phi - phi*)^2; decay: of the old Fisher information. F is the mean squared gradient of the log
    likelihood of the true labels over up to `samples` images."""

    def __init__(
        self,
        model: Gated,
        prepare: Prepare,
        *,
        weight: float = 100.0,
        decay: float = 1.0,
        samples: int = 500,
        **common: Any,
    ):
        if weight < 0 or not 0 <= decay <= 1 or samples < 1:
            raise ValueError(
                f"ewc: weight={weight}, decay={decay}, samples={samples}: weight >= 0, decay 0..1, samples >= 1"
            )
        self.weight, self.decay, self.samples = weight, decay, samples
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        super().__init__(model, prepare, **common)

    def losses(self, x: Tensor, raw: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        terms = super().losses(x, raw, labels, generator)
        if self.fisher:
            penalty = x.new_zeros(())
            for name, p in self.model.named_parameters():
                old = tuple(slice(n) for n in self.anchor[name].shape)  # a head may have grown
                penalty = penalty + (self.fisher[name] * (p[old] - self.anchor[name]) ** 2).sum()
            terms["ewc"] = self.weight / 2 * penalty
        return terms

    def end_task(self, images: Tensor, labels: Tensor) -> None:
        super().end_task(images, labels)
        generator = torch.Generator().manual_seed(random_stream(self.seed, len(self.groups), 3))
        chosen = torch.randperm(len(images), generator=generator)[: self.samples]
        self.model.eval()
        fresh = {n: torch.zeros_like(p) for n, p in self.model.named_parameters()}
        for i in chosen.tolist():
            logits = self.model(self.prepare(images[i : i + 1].to(self.device)))[:, : self.seen]
            gradients = torch.autograd.grad(
                F.cross_entropy(logits, labels[i : i + 1].to(self.device)),
                [*self.model.parameters()],
                allow_unused=True,
            )
            for total, g in zip(fresh.values(), gradients, strict=True):
                if g is not None:
                    total += g**2 / len(chosen)
        for name, old in self.fisher.items():
            fresh[name][tuple(slice(n) for n in old.shape)] += self.decay * old
        self.fisher = fresh
        self.anchor = {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"fisher": self.fisher, "anchor": self.anchor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.fisher = {n: v.to(self.device) for n, v in state["fisher"].items()}
        self.anchor = {n: v.to(self.device) for n, v in state["anchor"].items()}


class ReservoirReplay(Learner):
    """ER and DER++ as Buzzega et al. (2020) run them: a reservoir filled while training, an extra batch of it every step.

    CE on new and replayed images together (ER), or with logits > 0 and labels > 0 (DER++): CE on the new images +
    `logits` x mean squared distance to the stored logits + `labels` x CE, on two separate draws. The cross entropy is over
    all outputs of the head, as there."""

    def __init__(
        self,
        model: Gated,
        prepare: Prepare,
        *,
        buffer: int = 200,
        logits: float = 0.0,
        labels: float = 0.0,
        **common: Any,
    ):
        if min(logits, labels) < 0:
            raise ValueError(f"reservoir: logits={logits}, labels={labels}, allowed: >= 0")
        self.reservoir, self.w_logits, self.w_labels = Reservoir(buffer), logits, labels
        super().__init__(model, prepare, **common)
        if self.memory is not None or self.replay != "none":
            raise ValueError("a reservoir learner keeps its own buffer: method.replay must be none")

    def losses(self, x: Tensor, raw: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        if not len(self.reservoir):
            logits = self.model(x)
            terms = {"ce": F.cross_entropy(logits, labels)}
        elif self.w_logits > 0 or self.w_labels > 0:
            logits = self.model(x)
            terms = {"ce": F.cross_entropy(logits, labels)}
            old, _, stored = self.reservoir.sample(self.batch_size, generator=generator)
            now, known = self.model(self.prepare(old, generator))[:, : stored.shape[1]], ~stored.isnan()
            terms["logits"] = self.w_logits * F.mse_loss(now[known], stored[known])
            old, targets, _ = self.reservoir.sample(self.batch_size, generator=generator)
            terms["labels"] = self.w_labels * F.cross_entropy(self.model(self.prepare(old, generator)), targets)
        else:
            old, targets, _ = self.reservoir.sample(self.batch_size, generator=generator)
            logits = self.model(torch.cat([x, self.prepare(old, generator)]))
            terms = {"ce": F.cross_entropy(logits, torch.cat([labels, targets]))}
        self.offer = (raw, labels, logits[: len(x)].detach())
        return terms

    def step(self, raw: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        terms = super().step(raw, labels, generator)
        kept, width = self.reservoir.items, self.offer[2].shape[1]
        if kept and kept[2].shape[1] < width:  # the head has grown: the stored logits know nothing of the new outputs
            kept[2] = F.pad(kept[2], (0, width - kept[2].shape[1]), value=torch.nan)
        self.reservoir.add(*self.offer, generator=generator)
        return terms

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"reservoir": self.reservoir.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.reservoir.load_state_dict(state["reservoir"])
        self.reservoir.items = [t.to(self.device) for t in self.reservoir.items]


LEARNERS = {"meta": MetaLearner, "ce": Learner, "lwf": LwF, "icarl": ICaRL, "ewc": EWC, "reservoir": ReservoirReplay}


def build_learner(
    kind: str, model: Gated, prepare: Prepare, options: dict[str, dict[str, Any]], **common: Any
) -> Learner:
    """The learner `kind` with its own options (options[kind]). ValueError for an unknown kind, TypeError for an unknown key."""
    if kind not in LEARNERS:
        raise ValueError(f"method.learner={kind!r}, allowed: {', '.join(LEARNERS)}")
    own = options.get(kind, {})
    if kind == "meta":
        return MetaLearner(model, prepare, options=own, **common)
    return LEARNERS[kind](model, prepare, **own, **common)
