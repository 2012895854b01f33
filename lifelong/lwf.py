"""Learning without forgetting (Li and Hoiem 2016), a baseline, and the frozen teacher that it shares with iCaRL."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lifelong.augmentation import Prepare
from lifelong.learner import Learner
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
        count, x, mine = len(labels), self.ranks.mine(x), self.ranks.mine(labels)
        group, logits = self.groups[-1], self.model(x)
        terms = {"ce": F.cross_entropy(logits[:, group], mine - group.start, reduction="sum") / count}
        if self.teacher is not None:
            t = self.temperature
            new, old = (logits[:, : group.start] / t).log_softmax(1), (self.old_logits(x) / t).log_softmax(1)
            distance = F.kl_div(new, old, reduction="sum", log_target=True) / count
            terms["distillation"] = self.weight * t**2 * distance
        return terms
