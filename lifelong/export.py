"""Export a checkpoint of train.py to ONNX: the class_il model, or the copy that is adapted to one task.

python export.py weights=runs/default/ari/seed0/last.ckpt
python export.py weights=... task=2 out=task2.onnx

Input: images (N, C, size, size), normalised; classes, mean, std and size stand in the file. Output: logits of the classes seen,
or of the task. The task vote and the adaptation need training and exemplars, so they are no part of the file. A folder
(out=my-model/) has them: it holds the exemplars, which are training images.
"""

from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from common.hub import publishable
from common.onnx_export import export_onnx
from common.scripts import script
from lifelong.checkpoint import load_learner


class Logits(nn.Module):
    """The logits of some classes."""

    def __init__(self, model: nn.Module, group: slice):
        super().__init__()
        self.model, self.start, self.stop = model, group.start, group.stop

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[:, self.start : self.stop]


def export(cfg: DictConfig) -> Path:
    """Writes cfg.out and returns its path; see configs/export.yaml."""
    learner, saved = load_learner(cfg.weights)
    about, tasks = saved["about"], len(learner.groups)
    if not learner.adapts:
        raise ValueError(
            "iCaRL classifies by exemplar means, not by the head's logits: there is no class_il network to export"
        )
    if not tasks or (cfg.task is not None and not 0 <= cfg.task < tasks):
        raise ValueError(f"task={cfg.task}, allowed: 0..{tasks - 1} or null (all of the {learner.seen} classes seen)")
    group = slice(0, learner.seen) if cfg.task is None else learner.groups[cfg.task]
    model = Logits(learner.model if cfg.task is None else learner.adapted(cfg.task), group)
    about = about | {"classes": about["classes"][group], "task": cfg.task}
    image = torch.zeros(1, about["channels"], about["size"], about["size"])
    worst = export_onnx(model, image, cfg.out, about=about, tolerance=cfg.tolerance)
    print(f"{cfg.out}: classes {', '.join(about['classes'])}; {about['normalise']}, size {about['size']}")
    print(f"largest difference between onnxruntime and torch: {worst:.2g}")
    return Path(cfg.out)


main = script("export", publishable(export))


if __name__ == "__main__":
    main()
