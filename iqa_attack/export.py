"""Export Ma19 or UNIQUE of a checkpoint of train.py to ONNX, and check it with onnxruntime.

python export.py weights=runs/default/all/seed0/last.ckpt model=unique out=unique.onnx
"""

import contextlib
import io
import logging
from pathlib import Path

import hydra
import numpy as np
import torch
from omegaconf import DictConfig

from iqa_attack.nr_models import load_official, load_trained


def export_onnx(model: torch.nn.Module, out: Path, *, size: int, tolerance: float) -> float:
    """Writes model(images (B, 3, size, size)) -> scores (B,) with a dynamic batch; returns the largest difference to
    torch.

    Checked on batches of 1 and 3 random images; ValueError, and no file, above `tolerance`."""
    import onnxruntime

    for name in ("onnxscript", "onnx_ir"):  # they tell every node that they remove
        logging.getLogger(name).setLevel(logging.WARNING)
    beside = out.with_name(f".{out.name}.tmp.onnx")
    generator = torch.Generator().manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):  # the exporter reports its progress
        torch.onnx.export(
            model, (torch.rand(2, 3, size, size, generator=generator),), beside, input_names=["images"], output_names=["scores"],
            dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
    session, worst = onnxruntime.InferenceSession(str(beside), providers=["CPUExecutionProvider"]), 0.0
    for batch in (1, 3):
        x = torch.rand(batch, 3, size, size, generator=generator)
        with torch.no_grad():
            expected = model(x).numpy()
        worst = max(worst, float(np.abs(session.run(None, {"images": x.numpy()})[0] - expected).max()))
    if not worst < tolerance:
        beside.unlink()
        raise ValueError(f"onnxruntime differs from torch by {worst:.2g}, allowed: tolerance={tolerance:g}")
    beside.replace(out)
    return worst


def export(cfg: DictConfig) -> Path:
    """Writes cfg.out and returns its path; see configs/export.yaml."""
    if cfg.model not in ("ma19", "unique"):
        raise ValueError(
            f"model={cfg.model!r}, allowed: ma19, unique (the others look up tables, which ONNX has no use for)"
        )
    models = {cfg.model: load_official(cfg.model, cfg.weights)} if cfg.official else load_trained(cfg.weights)
    if cfg.model not in models:
        raise ValueError(f"{cfg.weights} has no {cfg.model}, it holds {', '.join(models)}")
    worst = export_onnx(models[cfg.model].cpu().eval(), Path(cfg.out), size=cfg.size, tolerance=cfg.tolerance)
    print(
        f"{cfg.out}: {cfg.model} with its logistic, images of {cfg.size} x {cfg.size}, largest difference to torch {worst:.2g}"
    )
    return Path(cfg.out)


@hydra.main(version_base="1.3", config_path="configs", config_name="export")
def main(cfg: DictConfig) -> None:
    export(cfg)


if __name__ == "__main__":
    main()
