"""iCaRL (Rebuffi et al. 2017), a baseline."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lifelong.lwf import Distilling


class ICaRL(Distilling):
    """iCaRL (Rebuffi et al. 2017): BCE on one-hot targets of the new classes and the teacher's probabilities of the old ones,
    herded memory, nearest mean of exemplars. `scores` are minus squared distances to the means."""

    adapts = False

    def losses(self, x: Tensor, raw: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        count, x = len(labels), self.ranks.mine(x)
        logits = self.model(x)[:, : self.seen]
        targets = F.one_hot(self.ranks.mine(labels), self.seen).to(logits.dtype)
        if self.teacher is not None:
            targets[:, : self.groups[-1].start] = self.old_logits(x).sigmoid().to(logits.dtype)
        # Summed over classes, as many tasks would else shrink the gradient.
        return {"bce": F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / count}

    def run(self, function, raw: Tensor, batch_size: int = 500) -> Tensor:
        if function == self.scores:
            images, labels = self.memory.data()  # type: ignore[union-attr]
            features = F.normalize(super().run(self.model.features, images), dim=1)
            means = torch.stack([features[labels == c].mean(0) for c in range(self.seen)])
            self.means = F.normalize(means, dim=1).to(self.device)
        return super().run(function, raw, batch_size)

    def scores(self, x: Tensor) -> Tensor:
        return -(torch.cdist(F.normalize(self.model.features(x), dim=1), self.means) ** 2)
