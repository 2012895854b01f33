"""Export to ONNX with the patches really dropped, any batch size, and check it with onnxruntime.

python export.py weights=runs/default/app_atp/seed0/last.ckpt out=apvit.onnx

The number of tokens of every block is a constant of the configuration, so the poolings are TopK and Gather."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ap_fer.checkpoint import load
from ap_fer.model import APViT
from common.hub import publishable
from common.onnx_export import difference, write_about
from common.scripts import script


class Logits(nn.Module):
    """The forward pass with one argument: the exporter does not know keyword-only ones."""

    def __init__(self, model: APViT):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


def export(model: APViT, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
    """Write an ONNX file (opset 17) with `about` in its metadata. ValueError for random scores, which have no fixed answer."""
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
    if about is not None:
        write_about(path, about)


def onnx_logits(path: str | Path, images: Tensor, *, threads: int = 0) -> np.ndarray:
    """Logits (B, C) by onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.numpy()})[0]  # type: ignore[return-value]


@torch.no_grad()
def export_checkpoint(cfg: DictConfig) -> float:
    """Writes cfg.out; returns the largest difference of onnxruntime to torch. ValueError, and no file, above cfg.tolerance."""
    model, _, about = load(cfg.weights)
    out = Path(cfg.out).expanduser()
    beside = out.with_name(f".{out.name}.tmp.onnx")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        export(model, beside, about)  # type: ignore[arg-type]
        worst = difference(Logits(model), beside, torch.zeros(1, 3, about["size"], about["size"]), (1, 4))  # type: ignore[arg-type]
        if not worst <= cfg.tolerance:
            raise ValueError(f"onnxruntime differs from torch by {worst:.2g}, allowed: tolerance={cfg.tolerance:g}")
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, largest difference to torch at batch 1 and 4: {worst:.2g}")
    return worst


main = script("export", publishable(export_checkpoint))


if __name__ == "__main__":
    main()
