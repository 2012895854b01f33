"""DER++ (Buzzega et al. 2020), and experience replay with the same reservoir: baselines."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lifelong.augmentation import Prepare
from lifelong.learner import Learner
from lifelong.memory import Reservoir
from lifelong.model import Gated


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
        mine, both = self.ranks.mine, not (self.w_logits > 0 or self.w_labels > 0)
        if both and len(self.reservoir):
            old, targets, _ = self.reservoir.sample(self.batch_size, generator=generator)
            logits = self.model(torch.cat([mine(x), mine(self.prepare(old, generator))]))
            terms = {"ce": _ce(logits, torch.cat([mine(labels), mine(targets)]), len(labels) + len(targets))}
        else:
            logits = self.model(mine(x))
            terms = {"ce": _ce(logits, mine(labels), len(labels))}
        if not both and len(self.reservoir):
            old, _, stored = self.reservoir.sample(self.batch_size, generator=generator)
            now = self.model(mine(self.prepare(old, generator)))[:, : stored.shape[1]]
            kept, known = mine(stored), ~mine(stored).isnan()
            distance = F.mse_loss(now[known], kept[known], reduction="sum") / (~stored.isnan()).sum()
            terms["logits"] = self.w_logits * distance
            old, targets, _ = self.reservoir.sample(self.batch_size, generator=generator)
            again = self.model(mine(self.prepare(old, generator)))
            terms["labels"] = self.w_labels * _ce(again, mine(targets), len(targets))
        self.offer = (raw, labels, self.ranks.gather(logits[: len(mine(x))].detach(), len(x)))
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


def _ce(logits: Tensor, labels: Tensor, of: int) -> Tensor:
    """The share of these rows in a mean cross entropy over `of` rows."""
    return F.cross_entropy(logits, labels, reduction="sum") / of
