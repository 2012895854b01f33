"""Export to ONNX with the patches really dropped, any batch size, and check it with onnxruntime.

python export.py weights=runs/default/app_atp/seed0/last.ckpt out=apvit.onnx

The number of tokens of every block is a constant of the configuration, so the poolings are TopK and GatherElements."""

import warnings
from pathlib import Path

import hydra
import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ap_fer.evaluate import load
from ap_fer.model import APViT


class Logits(nn.Module):
    """The forward pass with one argument: the exporter does not know keyword-only ones."""

    def __init__(self, model: APViT):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


def export(model: APViT, path: str | Path) -> None:
    """Write an ONNX file (opset 17). ValueError for random scores, which have no fixed answer."""
    vit = model.vit
    random = vit is not None and (
        vit.app.score in ("noise", "channel") or any(b.atp.score == "random" and b.atp.rate < 1 for b in vit.blocks)
    )
    if random:
        raise ValueError("a pooling with random scores is a control, not a model to export")
    example = torch.zeros(2, 3, model.image_size, model.image_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # numbers of tokens are constants, on purpose
        torch.onnx.export(
            Logits(model).eval(), (example,), str(path), input_names=["images"], output_names=["logits"], opset_version=17,
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}}, dynamo=False,
        )  # fmt: skip


def onnx_logits(path: str | Path, images: Tensor, *, threads: int = 0) -> np.ndarray:
    """Logits (B, C) by onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.numpy()})[0]  # type: ignore[return-value]


@hydra.main(version_base="1.3", config_path="configs", config_name="export")
@torch.no_grad()
def main(cfg: DictConfig) -> None:
    model, _ = load(cfg.weights, data_set=cfg.set)
    export(model, cfg.out)
    generator, gap = torch.Generator().manual_seed(0), 0.0
    for batch in (1, 4):
        x = torch.randn(batch, 3, model.image_size, model.image_size, generator=generator)
        gap = max(gap, float(np.abs(onnx_logits(cfg.out, x) - model(x).numpy()).max()))
    print(
        f"{cfg.out}: {Path(cfg.out).stat().st_size / 1e6:.1f} MB, largest difference to torch at batch 1 and 4: {gap:.2g}"
    )
    if gap > 1e-4:
        raise SystemExit("the exported model differs by more than 1e-4")


if __name__ == "__main__":
    main()
