"""Name the classes of images with a checkpoint of train.py; writes a CSV (or JSON) with path, label, score.

python predict.py weights=runs/default/ari/seed0/last.ckpt images=digit.png
python predict.py weights=... images=folder/ mode=continuum      all images are known to come from one task
python predict.py weights=... images=folder/ mode=task_il task=2 out=names.json top=3

The score is what the method ranks by: a logit (minus a squared distance for iCaRL). Logits of ARI and iTAML are learned within a
task and are not comparable between tasks.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from PIL.Image import Image
from torch import Tensor

from common.data.files import ImageStream, Table, find_images
from common.scripts import script
from lifelong.checkpoint import load_learner
from lifelong.learner import MODES, Learner
from lifelong.streams import stored
from lifelong.task_prediction import group_scores


class Look:
    """An RGB image as the training set stored it; the learner takes its centre and normalises."""

    def __init__(self, about: dict[str, Any]):
        self.size, self.channels = about["stored"], about["channels"]

    def __call__(self, image: Image) -> Tensor:
        return stored(image, self.size, self.channels)


def check(cfg: DictConfig, learner: Learner, path: str) -> slice:
    """The classes among which the answer lies, as far as they are known before the images. ValueError for a bad request."""
    if cfg.mode not in MODES:
        raise ValueError(f"mode={cfg.mode!r}, allowed: {', '.join(MODES)}")
    tasks = len(learner.groups)
    if not tasks:
        raise ValueError(f"{path} is of a run that has not begun its first task")
    if (cfg.task is not None) != (cfg.mode == "task_il") or (cfg.task is not None and not 0 <= cfg.task < tasks):
        raise ValueError(
            f"mode={cfg.mode}, task={cfg.task}: task=0..{tasks - 1} belongs to mode=task_il, and to no other"
        )
    group = slice(0, learner.seen) if cfg.task is None else learner.groups[cfg.task]
    fewest = min(g.stop - g.start for g in learner.groups) if cfg.mode == "continuum" else group.stop - group.start
    if not 1 <= cfg.top <= fewest:
        raise ValueError(f"top={cfg.top}, allowed: 1..{fewest}")
    return group


def voted_task(scores: Iterator[Tensor], learner: Learner) -> int:
    """The task that all images vote for: argmax of the mean of their group scores."""
    total = sum(group_scores(s, learner.groups).double().sum(0) for s in scores)
    return int(torch.as_tensor(total).argmax())


def predict(cfg: DictConfig, fabric: Fabric) -> Path:
    """Writes cfg.out and returns its path; see configs/predict.yaml."""
    learner, saved = load_learner(cfg.weights, fabric.device)
    about = saved["about"]
    group = check(cfg, learner, cfg.weights)
    paths = find_images(cfg.images)
    options = {"batch_size": cfg.batch_size, "workers": cfg.workers}
    function, words = learner.scores, f"mode {cfg.mode}"
    with fabric.autocast():
        if cfg.mode == "continuum":  # a first pass for the vote: no more than a batch of images is in memory
            first = ImageStream(paths, Look(about), **options)
            batches = [learner.run(learner.scores, images) for _, images in first]
            if not batches:
                first.finish()
            task = voted_task(iter(batches), learner)
            group, words = learner.groups[task], f"mode continuum, task {task} of {len(learner.groups)} by their vote"
            if learner.memory is not None and learner.adapts and len(learner.groups) > 1:
                function, words = learner.adapted(task), f"{words}, adapted to its exemplars"
        stream = ImageStream(paths, Look(about), **options)
        with Table(cfg.out) as table:
            for files, images in stream:
                best = learner.run(function, images, cfg.batch_size)[:, group].topk(cfg.top)
                for path, scores, at in zip(files, best.values.tolist(), best.indices.tolist(), strict=True):
                    for score, c in zip(scores, at, strict=True):
                        table.write({"path": path, "label": about["classes"][group.start + c], "score": f"{score:.6g}"})
    print(f"{stream.done} images, {words}, top {cfg.top}: {table.out}")
    stream.finish()
    return table.out


@script("predict")
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    predict(cfg, fabric)


if __name__ == "__main__":
    main()
