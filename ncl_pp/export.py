"""Export one expert, or the ensemble, of a checkpoint to ONNX, and check it with onnxruntime.

python export.py weights=runs/default/nclpp/seed0/last.ckpt out=model.onnx
python export.py weights=... expert=ensemble
"""

import contextlib
import io
import logging
from pathlib import Path

import hydra
import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn

from common import runs
from common.metrics.ops import count_macs
from ncl_pp.evaluate import Trained, load
from ncl_pp.model import Ensemble, NCLModel
from ncl_pp.train import predict


def best_expert(trained: Trained) -> tuple[int, str]:
    """(expert, why): the most accurate on the validation split, or expert 0 where the data set has none."""
    data = trained.data()
    if data.validation is None:
        return 0, "expert 0: this data set has no validation split to choose on"
    fabric = runs.launch({"accelerator": "auto", "devices": 1})
    model = fabric.setup_module(NCLModel(trained.model))
    logits, labels = predict(
        fabric,
        model,
        data.validation,
        batch_size=trained.config.evaluate.batch_size,
        workers=trained.config.data.workers,
    )
    accuracy = 100 * (logits.argmax(-1) == labels).double().mean(1)
    best = int(accuracy.argmax())
    listed = ", ".join(f"{a:.2f}" for a in accuracy.tolist())
    return best, f"expert {best}: the best on the validation split ({listed} %)"


def export_onnx(model: nn.Module, image: torch.Tensor, out: Path, *, tolerance: float = 1e-4) -> float:
    """Writes model(images (B, C, H, W)) -> logits with a dynamic batch; returns the largest difference to torch.

    image: one example (1, C, H, W). Checked on batches of 1 and 5 random images; ValueError, and no file, above
    `tolerance`."""
    import onnxruntime

    for name in ("onnxscript", "onnx_ir"):  # they tell every node that they remove
        logging.getLogger(name).setLevel(logging.WARNING)
    model = model.cpu().eval()
    beside = out.with_name(f".{out.name}.tmp.onnx")
    with contextlib.redirect_stdout(io.StringIO()):  # the exporter reports its progress
        torch.onnx.export(
            model, (image.repeat(2, 1, 1, 1),), beside, input_names=["images"], output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
    session = onnxruntime.InferenceSession(str(beside), providers=["CPUExecutionProvider"])
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for batch in (1, 5):
        images = torch.randn(batch, *image.shape[1:], generator=generator)
        with torch.no_grad():
            expected = model(images).numpy()
        (found,) = session.run(None, {"images": images.numpy()})
        worst = max(worst, float(np.abs(found - expected).max()))
    if not worst < tolerance:
        beside.unlink()
        raise ValueError(f"onnxruntime differs from torch by {worst:.2g}, allowed: tolerance={tolerance:g}")
    beside.replace(out)
    return worst


def export(cfg: DictConfig) -> Path:
    """Writes cfg.out and returns its path; see configs/export.yaml."""
    trained = load(cfg.weights, cfg.data)
    experts = len(trained.model.heads)
    if cfg.expert == "best":
        which, why = best_expert(trained)
    elif cfg.expert == "ensemble":
        which, why = None, f"the ensemble of {experts} experts"
    elif isinstance(cfg.expert, int):
        which, why = cfg.expert, f"expert {cfg.expert}, as asked for"
    else:
        raise ValueError(f"expert={cfg.expert!r}, allowed: best, ensemble, 0..{experts - 1}")
    model = Ensemble(trained.model) if which is None else trained.model.single(which)
    size = cfg.size or trained.image_size()
    image = torch.zeros(1, trained.channels, size, size)
    worst = export_onnx(model, image, Path(cfg.out), tolerance=cfg.tolerance)
    macs = sum(count_macs(model.cpu(), image).values())
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{cfg.out}: {why}. {parameters:,} parameters, {macs:,} MACs for an image of {size} x {size}")
    print(f"largest difference between onnxruntime and torch: {worst:.2g}")
    print(f"cost: the ensemble costs K = {experts} times one expert")
    return Path(cfg.out)


@hydra.main(version_base="1.3", config_path="configs", config_name="export")
def main(cfg: DictConfig) -> None:
    export(cfg)


if __name__ == "__main__":
    main()
