"""Export a checkpoint of train.py to ONNX: the class_il model, or the copy that is adapted to one task.

python export.py weights=runs/default/ari/seed0/last.ckpt
python export.py weights=... task=2 out=task2.onnx

Input: images (N, C, size, size), normalised with the mean and std that are printed. Output: logits of the classes seen, or of
the task. The task vote and the adaptation need training and exemplars, so they are no part of the file.
"""

from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from lifelong.evaluate import load


class Logits(nn.Module):
    """The logits of some classes."""

    def __init__(self, model: nn.Module, group: slice):
        super().__init__()
        self.model, self.start, self.stop = model, group.start, group.stop

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[:, self.start : self.stop]


@hydra.main(version_base="1.3", config_path="configs", config_name="export")
def main(cfg: DictConfig) -> None:
    learner, stream, _, _ = load(cfg.weights, cfg.data.root)
    if not learner.adapts:
        raise ValueError(
            "iCaRL classifies by exemplar means, not by the head's logits: there is no class_il network to export"
        )
    if cfg.task is not None and not 0 <= cfg.task < len(learner.groups):
        raise ValueError(f"task={cfg.task}, allowed: 0..{len(learner.groups) - 1} or null")
    group = slice(0, learner.seen) if cfg.task is None else learner.groups[cfg.task]
    model = Logits(learner.model if cfg.task is None else learner.adapted(cfg.task), group).eval()
    prepare = learner.prepare
    example = torch.rand(2, stream.channels, prepare.size, prepare.size)
    out = Path(cfg.out)
    torch.onnx.export(
        model, (example,), str(out), input_names=["images"], output_names=["logits"], dynamo=True, verbose=False,
        dynamic_shapes={"x": {0: torch.export.Dim("n")}}, external_data=False,
    )  # fmt: skip
    print(
        f"{out}: classes {', '.join(stream.class_names[group])}; mean {prepare.mean}, std {prepare.std}, size {prepare.size}"
    )


if __name__ == "__main__":
    main()
