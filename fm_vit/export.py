"""Export a checkpoint to ONNX for one set of sensors, and check it with onnxruntime.

python export.py weights=runs/default/fmvit/seed0/last.ckpt modalities=[rgb] out=rgb.onnx     one branch of three
python export.py weights=... modalities=[rgb,depth,ir] out=fused.onnx
"""

import contextlib
import io
import logging
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from common import runs
from fm_vit.evaluate import load
from fm_vit.model import FMViT


class Deployed(nn.Module):
    """Liveness (B,) from one tensor per modality, in the order of `names`, each (B, 3, H, W) normalised to -1..1."""

    def __init__(self, model: Any, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *images: Tensor) -> Tensor:
        return self.model.score(self.model(dict(zip(self.names, images, strict=True))))


def one_set(model: Any, names: list[str]) -> Deployed:
    """`model` with the branches of `names` only. ValueError for a name that it has not."""
    if not names or (unknown := [m for m in names if m not in model.modalities]):
        raise ValueError(
            f"modalities={names}, allowed: one or more of {', '.join(model.modalities)}"
            + (f", not {unknown}" if names else "")
        )
    names = [m for m in model.modalities if m in names]
    if isinstance(model, FMViT):
        model.branches = nn.ModuleDict({m: model.branches[m] for m in names})
        model.modalities = names
    return Deployed(model, names).eval()


def export(cfg: DictConfig) -> Path:
    """Writes cfg.out and returns its path; see configs/export.yaml."""
    import onnxruntime

    for name in ("onnxscript", "onnx_ir"):  # they tell every node that they remove
        logging.getLogger(name).setLevel(logging.WARNING)
    model, trained, _ = load(cfg.weights)
    deployed, out = one_set(model, list(cfg.modalities)), Path(cfg.out)
    size, names = trained.data.size, deployed.names
    example = tuple(torch.zeros(2, 3, size, size) for _ in names)
    beside = out.with_name(f".{out.name}.tmp.onnx")
    with contextlib.redirect_stdout(io.StringIO()):  # the exporter reports its progress
        batch = torch.export.Dim("batch")
        torch.onnx.export(
            deployed, example, beside, input_names=names, output_names=["liveness"],
            dynamic_shapes=(tuple({0: batch} for _ in names),), dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
    session = onnxruntime.InferenceSession(str(beside), providers=["CPUExecutionProvider"])
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for n in (1, 5):
        images = [torch.rand(n, 3, size, size, generator=generator) * 2 - 1 for _ in names]
        with torch.no_grad():
            expected = deployed(*images).numpy()
        (found,) = session.run(None, {m: x.numpy() for m, x in zip(names, images, strict=True)})
        worst = max(worst, float(np.abs(found - expected).max()))
    if not worst < cfg.tolerance:
        beside.unlink()
        raise ValueError(f"onnxruntime differs from torch by {worst:.2g}, allowed: tolerance={cfg.tolerance:g}")
    beside.replace(out)
    parameters = sum(p.numel() for p in deployed.parameters())
    thresholds = runs.read_json(Path(cfg.weights).expanduser().with_name("thresholds.json")) or {}
    print(
        f"{out}: {', '.join(names)}, {parameters:,} parameters, largest difference between onnxruntime and torch {worst:.2g}"
    )
    print(f"threshold of this subset: {thresholds.get('_'.join(names), 'not known')}")
    return out


@hydra.main(version_base="1.3", config_path="configs", config_name="export")
def main(cfg: DictConfig) -> None:
    export(cfg)


if __name__ == "__main__":
    main()
