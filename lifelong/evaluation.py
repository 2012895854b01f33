"""Accuracies of a learner on the tasks of a stream under the three protocols, and the figures of a run."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lifelong.background_attack import region_weight
from lifelong.learner import Learner
from lifelong.metrics import PROTOCOLS, background_gap, plot_matrix, summaries
from lifelong.streams import Stream
from lifelong.task_prediction import within_group


def protocols(more_p: Sequence[int] = ()) -> list[str]:
    """Names of the accuracies: class_il, continuum (over p samples), task_il, and continuum_p<q> for every q of `more_p`.

    ValueError for lengths < 1."""
    if any(q < 1 for q in more_p):
        raise ValueError(f"evaluate.more_p={list(more_p)}, allowed: >= 1 consecutive samples of one task")
    return [*PROTOCOLS, *(f"continuum_p{q}" for q in more_p)]


def empty_matrices(tasks: int, more_p: Sequence[int] = ()) -> dict[str, Tensor]:
    """(tasks, tasks) of NaN for every protocol and the vote."""
    names = [*protocols(more_p), "vote"]
    return {name: torch.full((tasks, tasks), torch.nan, dtype=torch.double) for name in names}


def evaluate(
    learner: Learner,
    sets: list[tuple[Tensor, Tensor]],
    *,
    p: int,
    adapt: bool,
    more_p: Sequence[int] = (),
    batch_size: int = 500,
) -> dict[str, list[float]]:
    """Accuracies in percent on every task seen, by protocol, and how often the task vote over p samples is right.

    sets: raw images and labels of every task seen."""
    images = [x for x, _ in sets]
    found = learner.predict_sets(images, p=p, adapt=adapt, more_p=more_p, batch_size=batch_size)
    result: dict[str, list[float]] = {name: [] for name in (*protocols(more_p), "vote")}
    for k, (prediction, (_, labels)) in enumerate(zip(found, sets, strict=True)):
        prediction["task_il"] = within_group(prediction["scores"], learner.groups[k])
        for name in protocols(more_p):
            result[name].append(100 * (prediction[name] == labels).double().mean().item())
        result["vote"].append(100 * (prediction["voted"] == k).double().mean().item())
    return result


def final_metrics(
    matrices: Mapping[str, Tensor], counts: list[int], learner: Learner, stream: Stream
) -> dict[str, float]:
    """{protocol}_{summary} of every protocol, class_il_{acc, forgetting}_after_<t> of the stream up to task t, the last task
    vote, and the attack weight on background minus foreground."""
    names = [name for name in matrices if name != "vote"]
    metrics = {f"{name}_{k}": v for name in names for k, v in summaries(matrices[name], counts).items()}
    for t in range(len(stream)):  # the curves: the same stream, had it ended with task t
        so_far = summaries(matrices["class_il"][: t + 1, : t + 1])
        metrics |= {f"class_il_{k}_after_{t}": so_far[k] for k in ("acc", "forgetting") if k in so_far}
    metrics["vote_acc"] = matrices["vote"][-1].mean().item()
    if stream.masks is not None:
        images, _ = stream.task("test", *range(len(stream)))
        attention = learner.run(lambda x: learner.model(x, return_attention=True)[1], images)
        masks = stream.masks[stream.indices("test", *range(len(stream)))]
        metrics["background_gap"] = background_gap(region_weight(attention), masks)
    return metrics


def fusion_spread(out: Path) -> dict[str, float]:
    """{fusion_spread}: how far the fusion's weights were from the plain mean (`OnlineFusion.spread`), mean over the epochs of the
    tasks after the first, from the log of a run; {} for learners that fuse nothing."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [row["spread"] for row in rows if row["task"] > 0 and "spread" in row]
    return {"fusion_spread": sum(found) / len(found)} if found else {}


def save_matrices(out: Path, matrices: Mapping[str, Tensor], title: str) -> None:
    """matrix.csv and matrix.png beside the result."""
    names = [name for name in matrices if name != "vote"]
    with (out / "matrix.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["protocol", "after_task", *(f"task_{k}" for k in range(len(matrices["class_il"])))])
        for name in names:
            rows = matrices[name].tolist()
            writer.writerows([name, t, *("" if v != v else f"{v:.4f}" for v in row)] for t, row in enumerate(rows))
    plot_matrix({name: matrices[name] for name in names}, out / "matrix.png", title)
