"""Export to ONNX with the tokens really dropped, for one image at a time, and check it with onnxruntime.

python export.py weights=runs/default/as/seed0/last.ckpt out=as.onnx

At batch 1 the survivors are a Gather whose length depends on the image (NonZero); several images of one batch would need
padding to a common length, so a batch is exported as dense attention with a key mask (batch=true): right, not faster.
"""

from pathlib import Path

import hydra
import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from adaptive_prune.class_attention_score import class_attention, token_score
from adaptive_prune.evaluate import load
from adaptive_prune.model import PrunedViT
from adaptive_prune.removal import finish_block, heads, run_dense


class OneImage(nn.Module):
    """The packed inference of one image in operations that trace: images (1, C, H, W) -> logits (1, classes)."""

    def __init__(self, model: PrunedViT):
        super().__init__()
        if model.rule != "threshold" or hasattr(model.vit, "aux_head"):
            raise ValueError(
                f"only rule=threshold on models without auxiliary head is exported, this is {model.rule!r}"
            )
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        m = self.model
        x, p, scores = m._embed(images), m.cost.prefix, None
        for i, block in enumerate(m.vit.blocks):
            if i in m.locations:
                assert scores is not None
                keep = scores[0, p:] > m.theta[m.locations.index(i)]
                index = torch.cat(
                    [torch.arange(p), keep.nonzero().flatten() + p]
                )  # flatten: one or no survivor is a list, too
                x = x.index_select(1, index)
            q, k, v = (t.transpose(1, 2) for t in heads(block.attn, block.norm1(x)))
            context = F.scaled_dot_product_attention(q, k, v, scale=block.attn.scale).transpose(1, 2)
            if i + 1 in m.locations:
                scores = token_score(class_attention(q[:, :, 0], k, scale=block.attn.scale), context, kind=m.score)
            x = finish_block(block, x, context)
        return m.vit.forward_head(m.vit.norm(x)[:, :p])


class Masked(nn.Module):
    """Any batch with dropped tokens masked: images (B, C, H, W) -> logits (B, classes)."""

    def __init__(self, model: PrunedViT):
        super().__init__()
        self.model = OneImage(model).model  # the same restrictions

    def forward(self, images: Tensor) -> Tensor:
        m, p, valid = self.model, self.model.cost.prefix, None
        x = m._embed(images)
        for s, blocks in enumerate(m._stages()):
            score = m.score if s < len(m.locations) else None
            x, scores = run_dense(blocks, x, score=score, valid=valid)
            if scores is not None:
                keep = (scores > m.theta[s]) | (torch.arange(m.cost.patches + p) < p)
                valid = keep if valid is None else keep & valid
        return m.vit.forward_head(m.vit.norm(x)[:, :p])


def export(model: PrunedViT, example: Tensor, path: str | Path, *, batch: bool = False) -> None:
    """Write an ONNX file (opset 17). example: images (B, C, H, W), of which one is traced unless `batch`."""
    wrapped = (Masked if batch else OneImage)(model.eval()).eval()
    axes = {"images": {0: "batch"}, "logits": {0: "batch"}} if batch else None
    torch.onnx.export(
        wrapped, (example if batch else example[:1],), str(path), input_names=["images"], output_names=["logits"],
        dynamic_axes=axes, opset_version=17, dynamo=False,  # the other exporter handles data-dependent sizes poorly
    )  # fmt: skip


def onnx_logits(path: str | Path, images: Tensor, *, batch: bool = False) -> np.ndarray:
    """Logits (B, classes) by onnxruntime, one image at a time unless `batch`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    parts = [images] if batch else images.split(1)
    return np.concatenate([session.run(None, {"images": part.numpy()})[0] for part in parts])


@hydra.main(version_base="1.3", config_path="configs", config_name="export")
@torch.no_grad()
def main(cfg: DictConfig) -> None:
    model, _ = load(cfg.weights, model=cfg.vit, method=cfg.arm, dataset=cfg.set)
    size = model.vit.patch_embed.img_size
    x = torch.randn(4, model.vit.in_chans, *size, generator=torch.Generator().manual_seed(0))
    expected = model(x).numpy()
    export(model, x, cfg.out, batch=cfg.batch)
    gap = float(np.abs(onnx_logits(cfg.out, x, batch=cfg.batch) - expected).max())
    print(f"{cfg.out}: {Path(cfg.out).stat().st_size / 1e6:.1f} MB, largest difference to torch on 4 images {gap:.2g}")
    if gap > 1e-3:
        raise SystemExit("the exported model differs")


if __name__ == "__main__":
    main()
