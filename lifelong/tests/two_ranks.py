"""What tests/test_ranks.py trains, as one process and as two: every learner on uneven tasks, some with less than one image of a
task per rank, or a whole run of train.py.   torchrun --nproc_per_node=2 two_ranks.py cases|run <folder>"""

import sys
from pathlib import Path

import torch
from lightning_fabric import Fabric

from common import runs
from lifelong.ranks import Ranks
from lifelong.tests.test_learner import TASKS, blobs, make
from lifelong.tests.test_train import config
from lifelong.train import fit

CASES = {
    "ce": ("ce", {}), "bce": ("bce", {}), "joint": ("ce", {"replay": "all"}), "lwf": ("lwf", {}), "icarl": ("icarl", {}),
    "ewc": ("ewc", {}), "derpp": ("reservoir", {"classes": 3}),  # a head that grows: stored logits of unlike width
    "er_reservoir": ("reservoir", {"options": {"reservoir": {"buffer": 12}}}),
    "ari": ("meta", {}), "momentum": ("meta", {"optim": {"lr": 0.3, "momentum": 0.5}}),
    "seen": ("meta", {"options": {"meta": {"eps": 8.0, "loss": "seen", "optimizer_state": "per_task"}}}),
    "sequential": ("meta", {"options": {"meta": {"eps": 8.0, "semantics": "sequential_last"}}}),
}  # fmt: skip


def learn(case: str, fabric: Fabric | None) -> dict[str, torch.Tensor]:
    """The weights after three tasks, the terms of every epoch and what is predicted."""
    kind, more = CASES[case]
    learner = make(kind, **{"lr": 0.3, "last_batch": "keep", **more}, ranks=Ranks(fabric))
    rows = [row for task in TASKS for row in learner.observe_task(blobs(task, n=7))]
    terms = torch.tensor([row[k] for row in rows for k in sorted(row)])
    images = torch.cat([blobs(task, n=3, seed=9)[0] for task in TASKS])
    return {**learner.model.state_dict(), "terms": terms, "scores": learner.run(learner.scores, images)}


def main(what: str, out: Path) -> None:
    fabric = runs.launch({"accelerator": "cpu", "devices": 2})
    if what == "run":
        return fit(config("method=ari", "data.tasks=2"), fabric, out)
    torch.save({case: learn(case, fabric) for case in CASES}, out / f"rank{fabric.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    runs.leave()
