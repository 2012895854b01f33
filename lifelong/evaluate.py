"""Evaluate a checkpoint of train.py: class_il, continuum and task_il accuracy per task, and the matrix of its stream.

python evaluate.py weights=runs/default/ari/seed0/last.ckpt
python evaluate.py weights=... data.root=/datasets p=1 figure=matrix.png
"""

from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig

from common.metrics.external import check_claim, write_record
from common.runs import plain
from common.scripts import script
from lifelong.checkpoint import load_learner, test_stream
from lifelong.evaluation import evaluate
from lifelong.metrics import PROTOCOLS, plot_matrix, summaries

PAPER = Path(__file__).resolve().parent


def matrices_of(saved: dict[str, Any], row: dict[str, list[float]], *, p: int, adapt: bool) -> dict[str, torch.Tensor]:
    """The matrices that may be summed up: rows 0.. of the training run, the last one as measured now. A matrix has one p: that of
    the continuum is left out where p or the adaptation is not that of the training run, and without a finished task all are."""
    asked = saved["config"]["evaluate"]
    found = {}
    for name in PROTOCOLS if saved["task"] == len(row["class_il"]) else ():
        if name == "continuum" and (p, adapt) != (asked["p"], asked["adapt"]):
            continue
        found[name] = saved["matrices"][name][: saved["task"], : saved["task"]].clone()
        found[name][-1] = torch.tensor(row[name], dtype=torch.double)
    return found


def run(cfg: DictConfig, fabric: Fabric) -> dict[str, float]:
    """Prints and returns the means over tasks; see configs/evaluate.yaml."""
    if cfg.p is not None and cfg.p < 1:
        raise ValueError(f"p={cfg.p}, allowed: >= 1 consecutive samples of one task")
    check_claim(PAPER, cfg.claim)
    learner, saved = load_learner(cfg.weights, fabric.device)
    if not learner.groups:
        raise ValueError(f"{cfg.weights} is of a run that has not begun its first task")
    trained, tasks = saved["config"], len(learner.groups)
    stream = test_stream(saved, plain(cfg)["data"])
    p = trained["evaluate"]["p"] if cfg.p is None else cfg.p
    sets = stream.test_sets(trained["seed"], tasks)
    with fabric.autocast():
        row = evaluate(learner, sets, p=p, adapt=cfg.adapt, batch_size=cfg.batch_size)
    means = {name: sum(values) / tasks for name, values in row.items()}
    memory = trained["memory"]["budget"] if learner.memory is not None else "none"
    protocol = f"p = {p}, memory {memory}, {'adapted' if cfg.adapt and learner.memory is not None else 'not adapted'}"
    print(f"{trained['arm']} on {trained['data']['name']}, {tasks} of {len(stream)} tasks, {protocol}, "
          f"class order {trained['data']['order']}, {trained['train']['epochs']} epochs per task")  # fmt: skip
    print("task      " + "".join(f"{name:>11s}" for name in row))
    for k in range(tasks):
        print(f"{k:<10d}" + "".join(f"{row[name][k]:11.2f}" for name in row))
    print("mean      " + "".join(f"{means[name]:11.2f}" for name in row))
    matrices = matrices_of(saved, row, p=p, adapt=cfg.adapt)
    for name, matrix in matrices.items():
        lines = "\n".join(" ".join(f"{v:6.2f}" for v in r if v == v) for r in matrix.tolist())
        print(f"\n{name} ({protocol}), row t: after task t\n{lines}")
        print("  ".join(f"{k} {v:.2f}" for k, v in summaries(matrix).items()))
    if "continuum" not in matrices:
        print("\nno matrix of the continuum: the rows before the last are known as trained only, a matrix has one p")
    if cfg.figure and matrices:
        plot_matrix(matrices, cfg.figure, f"{trained['arm']}, {protocol}")
    if cfg.record and fabric.is_global_zero:
        write_record(
            cfg.record_to or PAPER / "results/external", weights=cfg.weights, value=means["continuum"],
            n=sum(len(y) for _, y in sets), data=f"{trained['data']['name']}_p{p}", metrics=means, claim=cfg.claim,
            device=fabric.device, p=p, adapt=cfg.adapt, memory=memory,
        )  # fmt: skip
    return means


@script("evaluate")
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    run(cfg, fabric)


if __name__ == "__main__":
    main()
