"""Export to ONNX with the tokens really dropped, for one image at a time, and check it with onnxruntime.

python export.py weights=runs/default/as/seed0/last.ckpt out=as.onnx

At batch 1 the survivors are a Gather whose length depends on the image (NonZero); several images of one batch would need
padding to a common length, so a batch is exported as dense attention with a key mask (batch=true): right, not faster.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from adaptive_prune.checkpoint import load
from adaptive_prune.class_attention_score import class_attention, token_score
from adaptive_prune.model import PrunedViT
from adaptive_prune.removal import finish_block, heads, run_dense
from common.hub import publishable
from common.onnx_export import write_checked
from common.scripts import script


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
        x, p, scores = m.embed(images), m.cost.prefix, None
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
        x = m.embed(images)
        for s, blocks in enumerate(m.stages()):
            score = m.score if s < len(m.locations) else None
            x, scores = run_dense(blocks, x, score=score, valid=valid)
            if scores is not None:
                keep = (scores > m.theta[s]) | (torch.arange(m.cost.patches + p) < p)
                valid = keep if valid is None else keep & valid
        return m.vit.forward_head(m.vit.norm(x)[:, :p])


def export(
    model: PrunedViT,
    image: Tensor,
    out: str | Path,
    *,
    about: Mapping[str, Any],
    batch: bool = False,
    tolerance: float = 1e-4,
) -> float:
    """Writes an ONNX file with `about` in its metadata (`common.onnx_export.read_about`) and returns the largest difference
    between onnxruntime and torch. image: an example (1, C, H, W); batch: any number of images at a time, else one.

    ValueError, and no file, above `tolerance`."""
    network = (Masked if batch else OneImage)(model).cpu().eval()
    return traced(network, image, Path(out).expanduser(), about, tolerance, batch=batch)


def traced(
    network: nn.Module, image: Tensor, out: Path, about: Mapping[str, Any], tolerance: float, *, batch: bool
) -> float:
    """The older exporter: the other one handles data-dependent sizes poorly."""
    axes = {"images": {0: "batch"}, "logits": {0: "batch"}} if batch else None
    example = image.repeat(2, 1, 1, 1) if batch else image

    def write(file: Path) -> None:
        torch.onnx.export(
            network, (example,), str(file), input_names=["images"], output_names=["logits"], dynamic_axes=axes,
            opset_version=17, dynamo=False,
        )  # fmt: skip

    batches = (1, 4) if batch else (1,) * 6
    return write_checked(out, write, network, image, about=about, tolerance=tolerance, batches=batches)


@torch.no_grad()
def run(cfg: DictConfig) -> Path:
    """Writes cfg.out and returns its path; see configs/export.yaml."""
    model, _, about = load(cfg.weights, vit=cfg.vit, way=cfg.way)
    out, image = Path(cfg.out).expanduser(), torch.zeros(1, about["channels"], about["size"], about["size"])
    worst = export(model, image, out, about=about, batch=cfg.batch, tolerance=cfg.tolerance)  # type: ignore[arg-type]
    how = "any number of images, dropped tokens masked" if cfg.batch else "one image at a time, tokens really dropped"
    print(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB, {how}; largest difference between onnxruntime and torch {worst:.2g}"
    )
    return out


main = script("export", publishable(run))


if __name__ == "__main__":
    main()
