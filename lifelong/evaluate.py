"""Evaluate a checkpoint of train.py: class_il, continuum and task_il accuracy per task, and the matrix of its stream.

python evaluate.py weights=runs/default/ari/seed0/last.ckpt
python evaluate.py weights=... data.root=/datasets p=1 figure=matrix.png

A path with "=" in it (a run with overrides) needs quotes for Hydra: weights="'runs/default/ari/optim.lr=0.5/seed0/last.ckpt'"
"""

import hashlib
import json
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from common import runs
from lifelong.learner import Learner
from lifelong.metrics import PROTOCOLS, plot_matrix, summaries
from lifelong.streams import Stream, build_stream
from lifelong.train import build, evaluate, test_sets


def load(
    path: str, root: str | None = None, device: torch.device | str = "cpu"
) -> tuple[Learner, Stream, DictConfig, dict]:
    """The learner of a checkpoint as it was, its stream (data.root replaced), configuration and the checkpoint.

    Raises FileNotFoundError, `runs.RunError` for a broken file, ValueError for a checkpoint that train.py did not write
    or data with other classes."""
    state = runs.load_checkpoint(path)
    if missing := {"learner", "config", "matrices", "task", "classes"} - state.keys():
        raise ValueError(f"{path} is no checkpoint of lifelong/train.py: it lacks {', '.join(sorted(missing))}")
    cfg = OmegaConf.create(state["config"])
    if root is not None:
        cfg.data.root = root
    if "pretrained" in cfg.model:
        cfg.model.pretrained = False
    stream = build_stream(seed=cfg.seed, **cfg.data)
    if stream.class_names != state["classes"]:
        raise ValueError(f"{path} was trained on other classes or another order than data.root={cfg.data.root} has")
    learner = build(cfg, stream, device)
    learner.load_state_dict(state["learner"])
    return learner, stream, cfg, state


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    fabric = runs.launch(cfg.fabric)
    learner, stream, trained, state = load(cfg.weights, cfg.data.root, fabric.device)
    p = trained.evaluate.p if cfg.p is None else cfg.p
    tasks = len(learner.groups)
    sets = test_sets(stream, trained.seed, tasks)
    with fabric.autocast():
        row = evaluate(learner, sets, p=p, adapt=cfg.adapt)
    print(f"{trained.arm} on {trained.data.name}, {tasks} of {len(stream)} tasks, memory {trained.memory.budget}, p = {p}, "
          f"class order {trained.data.order}, {trained.train.epochs} epochs per task")  # fmt: skip
    print("task      " + "".join(f"{name:>11s}" for name in row))
    for k in range(tasks):
        print(f"{k:<10d}" + "".join(f"{row[name][k]:11.2f}" for name in row))
    means = {name: sum(values) / tasks for name, values in row.items()}
    print("mean      " + "".join(f"{means[name]:11.2f}" for name in row))
    matrices = {name: m[: state["task"], : state["task"]].clone() for name, m in state["matrices"].items()}
    if state["task"] == tasks:  # the last row is the one measured here; with another p only that row changes
        for name in PROTOCOLS:
            matrices[name][-1] = torch.tensor(row[name], dtype=torch.double)
    for name in PROTOCOLS if state["task"] else ():
        print(
            f"\n{name}, row t: after task t\n"
            + "\n".join(" ".join(f"{v:6.2f}" for v in r if v == v) for r in matrices[name].tolist())
        )
        print("  ".join(f"{k} {v:.2f}" for k, v in summaries(matrices[name]).items()))
    if cfg.figure:
        plot_matrix({name: matrices[name] for name in PROTOCOLS}, cfg.figure, f"{trained.arm}, p = {p}")
    if cfg.record:
        digest = hashlib.sha256(Path(cfg.weights).expanduser().read_bytes()).hexdigest()
        record = {
            "claim": None,
            "value": means["continuum"],
            "weights_sha256": digest,
            "n": sum(len(y) for _, y in sets),
        }
        record |= {"data": trained.data.name, "p": p, "metrics": means, **runs.provenance(fabric.device)}
        target = Path(__file__).parent / f"results/external/{digest[:12]}_{trained.data.name}_p{p}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(record, indent=1) + "\n")
        print(f"recorded in {target}")


if __name__ == "__main__":
    main()
