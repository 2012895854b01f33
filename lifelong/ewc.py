"""Elastic weight consolidation (Kirkpatrick et al. 2017; Schwarz et al. 2018), a baseline."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.batches import stream as random_stream
from lifelong.augmentation import Prepare
from lifelong.learner import Learner
from lifelong.model import Gated


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
            terms["ewc"] = self.weight / 2 * penalty / self.ranks.world  # the same on every rank
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
