"""CP-NAS: single-path sampling with a Child-Parent score, the predecessor of DCP-NAS.

Every stage samples sub-networks without replacement, so that each remaining operation of each edge is trained and judged equally
often. An operation's score is the mean over its sub-networks of z = beta_P (A_P - A_C) + A_C, with A_P and A_C the validation
accuracies of Parent and Child. After a stage every edge abandons its worst operation, until one is left. `none` is not sampled.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcp_nas.search_space import Genotype, operations
from dcp_nas.supernet import Supernet

Batch = tuple[Tensor, Tensor]


def score(parent_accuracy: float, child_accuracy: float, *, beta_p: float = 2.0) -> float:
    """z = beta_P (A_P - A_C) + A_C; beta_P = 2 is the published best."""
    return beta_p * (parent_accuracy - child_accuracy) + child_accuracy


def feature_loss(parent: list[Tensor], child: list[Tensor], labels: Tensor, *, lam: float) -> Tensor:
    """L_H = lam / 2 sum_cells MSE(H, H^) + 1/2 sum_s ||f(H^)_s - mean of its class||^2 / B.

    parent, child: outputs of the cells (B, C, H, W); f pools the last one. Class means are the batch's, without a gradient."""
    matching = torch.stack([F.mse_loss(b, a.detach()) for a, b in zip(parent, child, strict=True)]).sum()
    f = child[-1].mean(dim=(2, 3))
    members = F.one_hot(labels).to(f.dtype)
    means = (members.T @ f) / members.sum(0).clamp_min(1)[:, None]
    return lam / 2 * matching + (f - means[labels].detach()).square().sum(1).mean() / 2


class CPNAS:
    """The interface of `ChildParentSearch`; one phase per stage, one `step` per batch.

    samples: how often each stage samples every operation; steps_per_sample: batches that train a sub-network before its score."""

    def __init__(
        self, parent: Supernet, child: Supernet, *, generator: torch.Generator, w: dict[str, Any], steps_per_sample: int = 1,
        samples: int = 1, beta_p: float = 2.0, lam_feature: float = 1e-3,
    ):  # fmt: skip
        if steps_per_sample < 1 or samples < 1:
            raise ValueError(f"steps_per_sample={steps_per_sample}, samples={samples}: both must be >= 1")
        self.nets, self.generator, self.w = {"parent": parent, "child": child}, generator, dict(w)
        self.steps_per_sample, self.samples, self.beta_p, self.lam_feature = (
            steps_per_sample,
            samples,
            beta_p,
            lam_feature,
        )
        names, edges = operations(parent.order), len(parent.cells[0].edges)  # type: ignore[arg-type]
        usable = [k for k, name in enumerate(names) if name != "none"]
        self.remaining: list[list[list[int]]] = [[list(usable) for _ in range(edges)] for _ in range(2)]
        self.width = len(names)
        self.scores = torch.full((2, edges, self.width), -1.0)  # of the last stage in which an operation was judged
        self.done = 0  # batches of this stage
        self.sums = torch.zeros(2, edges, self.width)
        self.order: list[list[list[int]]] = []
        self.optimizers = {
            k: torch.optim.SGD(n.parameters(), lr=w["lr"], momentum=w["momentum"], weight_decay=w["weight_decay"])
            for k, n in self.nets.items()
        }

    def phases(self) -> list[str]:
        return [f"stage of {n} operations" for n in range(self.width - 1, 1, -1)]

    def steps(self, phase: int) -> int:
        """Batches of a stage."""
        return (self.width - 1 - phase) * self.samples * self.steps_per_sample

    def begin(self, phase: int) -> None:
        """To be called once before the first step of a phase."""
        self.done, self.sums = 0, torch.zeros_like(self.sums)
        self._new_pass()

    def _new_pass(self) -> None:
        """Every remaining operation once on every edge, in random order."""
        self.order = [
            [[ops[i] for i in torch.randperm(len(ops), generator=self.generator)] for ops in kind]
            for kind in self.remaining
        ]

    def architecture(self) -> list[list[int]]:
        """Operation of every edge, for both cell types, of the current sub-network."""
        index = self.done // self.steps_per_sample % len(self.remaining[0][0])
        return [[edge[index] for edge in kind] for kind in self.order]

    def step(self, phase: int, train: Batch, val: Batch) -> dict[str, Tensor | float]:
        choice = self.architecture()
        images, labels = train
        outputs = {k: n.cell_outputs(images, tuple(choice)) for k, n in self.nets.items()}
        row: dict[str, Tensor | float] = {}
        for name, net in self.nets.items():
            loss = F.cross_entropy(net.fc(outputs[name][-1].mean(dim=(2, 3))), labels)
            if name == "child":
                loss = loss + feature_loss(outputs["parent"], outputs["child"], labels, lam=self.lam_feature)
            self.optimizers[name].zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(net.parameters(), self.w["clip"])
            row |= {f"{name}_loss": loss.detach(), f"{name} gradient norm": norm}
            if bool(norm.isfinite()):
                self.optimizers[name].step()
        self.done += 1
        if self.done % self.steps_per_sample == 0:
            row |= self._judge(choice, val)
        if self.done % (self.steps_per_sample * len(self.remaining[0][0])) == 0:
            self._new_pass()
        return row

    @torch.no_grad()
    def _judge(self, choice: list[list[int]], val: Batch) -> dict[str, Tensor | float]:
        images, labels = val
        found = {}
        for name, net in self.nets.items():
            logits = net.fc(net.cell_outputs(images, tuple(choice))[-1].mean(dim=(2, 3)))
            found[name] = (logits.argmax(1) == labels).float().mean().item()
        z = score(found["parent"], found["child"], beta_p=self.beta_p)
        for kind, edges in enumerate(choice):
            for edge, k in enumerate(edges):
                self.sums[kind, edge, k] += z
        return {f"{k}_accuracy": v for k, v in found.items()} | {"score": z}

    def end(self, phase: int) -> None:
        """Every edge abandons its worst operation (of equals the first)."""
        for kind, edges in enumerate(self.remaining):
            for edge, ops in enumerate(edges):
                for k in ops:
                    self.scores[kind, edge, k] = self.sums[kind, edge, k] / self.samples
                ops.remove(min(ops, key=lambda k, row=self.sums[kind, edge]: row[k].item()))

    def alphas(self) -> tuple[Tensor, Tensor]:
        """The latest score of every operation."""
        return self.scores[0], self.scores[1]

    def genotype(self) -> Genotype:
        """Per node the two edges whose operation has the highest score; of equals the first. Before the end of the search an
        edge has the best of its remaining operations."""
        names, nodes = operations(self.nets["parent"].order), self.nets["parent"].nodes
        cells = []
        for kind, edges in enumerate(self.remaining):
            rows = self.scores[kind].tolist()
            best = [max(ops, key=lambda k, row=row: row[k]) for ops, row in zip(edges, rows, strict=True)]
            kept = []
            for j in range(2, 2 + nodes):
                first = j * (j - 1) // 2 - 1
                ranked = sorted(range(j), key=lambda i, f=first, r=rows, b=best: -r[f + i][b[f + i]])
                kept += [(names[best[first + i]], i) for i in ranked[:2]]
            cells.append(tuple(kept))
        return Genotype(*cells)

    def state_dict(self) -> dict[str, Any]:
        return {
            "nets": {k: v.state_dict() for k, v in self.nets.items()},
            "optimizers": {k: v.state_dict() for k, v in self.optimizers.items()},
            "remaining": self.remaining, "scores": self.scores, "done": self.done, "sums": self.sums, "order": self.order,
            "generator": self.generator.get_state(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part in ("nets", "optimizers"):
            for k, v in getattr(self, part).items():
                v.load_state_dict(state[part][k])
        for key in ("remaining", "scores", "done", "sums", "order"):
            setattr(self, key, state[key])
        self.generator.set_state(state["generator"])
