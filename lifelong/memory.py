"""The exemplar memory: a fixed number of images in total, shared equally by the classes seen."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

POLICIES = ("first", "random", "herding")


class ExemplarMemory:
    """At most `budget` raw images in total; after a task every class seen keeps floor(budget / classes seen).

    policy: first (the first of a class in data-set order, as in the released code) | random | herding (iCaRL: the class mean
    of normalised features, greedily). The images of a class are kept in order of preference, so a class shrinks to a prefix.
    ValueError for another policy or budget < 0; `add` raises it when a class would get no image at all.
    """

    def __init__(self, budget: int, *, policy: str = "first", seed: int = 0):
        if policy not in POLICIES:
            raise ValueError(f"memory.policy={policy!r}, allowed: {', '.join(POLICIES)}")
        if budget < 0:
            raise ValueError(f"memory.budget={budget}, allowed: >= 0")
        self.budget, self.policy, self.seed = budget, policy, seed
        self.classes: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return sum(map(len, self.classes.values()))

    def share(self, classes: int) -> int:
        """Images per class with that many classes seen. ValueError if that is none."""
        if self.budget // classes == 0:
            raise ValueError(
                f"memory.budget={self.budget} is smaller than the {classes} classes seen: none is kept; raise it"
            )
        return self.budget // classes

    def add(self, images: Tensor, labels: Tensor, features: Callable[[Tensor], Tensor] | None = None) -> None:
        """Take exemplars of new classes from a task's images (n, C, H, W), labels (n,), and truncate the old classes.

        features: images -> (n, D), needed by herding only. ValueError for a class that is in memory already."""
        new = sorted(set(labels.tolist()))
        if again := sorted(set(new) & set(self.classes)):
            raise ValueError(f"classes {again} are in memory already: a class belongs to one task")
        share = self.share(len(self.classes) + len(new))
        self.classes = {c: kept[:share].clone() for c, kept in self.classes.items()}
        for c in new:
            members = images[labels == c]
            self.classes[c] = members[self._prefer(c, members, share, features)].clone()

    def _prefer(self, c: int, members: Tensor, count: int, features: Callable[[Tensor], Tensor] | None) -> Tensor:
        if self.policy == "first":
            return torch.arange(min(count, len(members)))
        if self.policy == "random":
            generator = torch.Generator().manual_seed(self.seed * 100_003 + c)
            return torch.randperm(len(members), generator=generator)[:count]
        if features is None:
            raise ValueError("memory.policy=herding needs a feature function")
        return herd(features(members).cpu(), count)

    def data(self, group: slice | None = None) -> tuple[Tensor, Tensor]:
        """Images and labels in class order, of all classes or those of one task. ValueError when there are none."""
        chosen = [c for c in sorted(self.classes) if group is None or group.start <= c < group.stop]
        if not chosen:
            raise ValueError("the memory holds no image of these classes")
        images = torch.cat([self.classes[c] for c in chosen])
        return images, torch.cat([torch.full((len(self.classes[c]),), c) for c in chosen])

    def state_dict(self) -> dict[str, Any]:
        return {"classes": {c: kept.clone() for c, kept in self.classes.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.classes = dict(state["classes"])


def herd(features: Tensor, count: int) -> Tensor:
    """Indices (min(count, n),) of the images whose running mean follows the class mean best, in the order chosen.

    features: (n, D), normalised here. iCaRL, algorithm 4."""
    features = torch.nn.functional.normalize(features.double(), dim=1)
    mean, total = features.mean(0), torch.zeros(features.shape[1], dtype=torch.double)
    free = torch.ones(len(features), dtype=torch.bool)
    chosen: list[int] = []
    for n in range(1, min(count, len(features)) + 1):
        distance = ((total + features) / n - mean).norm(dim=1)
        distance[~free] = torch.inf
        best = int(distance.argmin())
        chosen.append(best)
        free[best] = False
        total += features[best]
    return torch.tensor(chosen, dtype=torch.long)


class Reservoir:
    """A uniform sample of all images that came by (reservoir sampling), with their labels and logits if given.

    For ER and DER++ as their authors run them: filled while training, no class balance, a batch is drawn at every step."""

    def __init__(self, budget: int):
        if budget < 1:
            raise ValueError(f"memory.budget={budget}, allowed: >= 1 for a reservoir")
        self.budget, self.seen = budget, 0
        self.items: list[Tensor] = []

    def __len__(self) -> int:
        return min(self.seen, self.budget)

    def add(self, *tensors: Tensor, generator: torch.Generator) -> None:
        """Offer a batch; tensors (B, ...) in the same order in every call, e.g. images, labels, logits."""
        if not self.items:
            self.items = [t.new_zeros(self.budget, *t.shape[1:]) for t in tensors]
        draws = torch.rand(len(tensors[0]), generator=generator, device=generator.device).tolist()
        for i, draw in enumerate(draws):
            at = self.seen if self.seen < self.budget else int(draw * (self.seen + 1))
            self.seen += 1
            if at < self.budget:
                for kept, t in zip(self.items, tensors, strict=True):
                    kept[at] = t[i].detach()

    def sample(self, count: int, *, generator: torch.Generator) -> list[Tensor]:
        """min(count, len) different entries, drawn uniformly."""
        order = torch.randperm(len(self), generator=generator, device=generator.device)[:count]
        return [kept[order.to(kept.device)] for kept in self.items]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "items": [t.clone() for t in self.items]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.items = state["seen"], list(state["items"])
