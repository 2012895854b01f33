"""Write a checkpoint, or official weights, as ONNX, and the weights of a student at their real bits.

python export.py weights=runs/default/drd/seed0/last.ckpt out=model.onnx      and, of a student, model.packed.pt
python export.py weights=detr-r50.pth out=detr-r50.onnx                       official weights
python export.py weights=runs/default/drd/seed0/last.ckpt format=qdq          or format=integer

The graph takes images (B, 3, H, W), normalised as its metadata `about` says, and mask (B, H, W), True = padding
(`q_detr.detr.pad_images`); B, H and W are free (H, W >= 64). It is compared with PyTorch on batches of two sizes with padding.

A student's graph is fake-quantised: quantisers are float operations, weights float constants on their grid. With format=qdq the
quantisers of 8 bits (attention operands, stem, everything of an 8-bit student) are QuantizeLinear and DequantizeLinear: both
show the accuracy of a low-bit network, never its speed. With format=integer the products run on 8-bit integers (MatMulInteger,
see `q_detr.integer`) whatever the bits: 2 to 4 bits have smaller codes, not faster products. That needs a step per tensor and no
real offset (method.quant.quantizer=lsq method.quant.act_granularity=per_tensor). The packed file is storage: the quantised
weights at b / 32 of their float size, everything else in float32."""

import copy
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from common.hub import publishable
from common.loop import Loaded
from common.onnx_export import quiet
from common.quant.integer_onnx import StoredWeight, along, dequantize, quantize, translations
from common.quant.lsq import LSQQuantizer
from common.scripts import script
from q_detr.checkpoint import load
from q_detr.detr import DETR, Attention, pad_images
from q_detr.integer import integers_
from q_detr.packing import pack, quantised_weights

OUTPUTS = ("pred_logits", "pred_boxes")
FORMATS = ("simulated", "qdq", "integer")
SIZES = (((96, 160), (128, 100)), ((75, 133), (64, 90), (80, 64)))  # the first is traced


class FixedQuantizer(nn.Module):
    """An `LSQQuantizer` of activations in evaluation, its step a constant: step (round(clip(x / step + z)) - z), around the
    offset of LSQ+. As two nodes of ONNX if it has 8 bits and z fits them."""

    step: Tensor
    zero: Tensor
    offset: Tensor

    def __init__(self, q: LSQQuantizer, *, qdq: bool):
        super().__init__()
        self.shifted = q.zero_point_form == "real"
        self.axis, (self.qn, self.qp) = q.axis, q.bounds
        self.codes = torch.int8 if self.qn < 0 else torch.uint8
        zero = torch.zeros_like(q.step) if self.shifted else q.code_of_zero()
        self.qdq = qdq and q.bits == 8 and bool(((zero >= self.qn) & (zero <= self.qp)).all())
        for name, t in (
            ("step", q.effective_step()),
            ("zero", zero),
            ("offset", q.zero_point if self.shifted else zero),
        ):
            self.register_buffer(name, t.detach().clone().squeeze() if q.axis is None else t.detach().clone())  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        axis = 0 if self.axis is None else self.axis % x.ndim
        if not self.shifted:
            return self._on_grid(x, axis)
        offset = self.offset.view(along(axis, self.step, x))
        return self._on_grid(x - offset, axis) + offset

    def _on_grid(self, x: Tensor, axis: int) -> Tensor:
        if self.qdq:
            zero = self.zero.to(self.codes)
            return dequantize(quantize(x, self.step, zero, axis), self.step, zero, axis)
        step, zero = (t.view(along(axis, self.step, x)) for t in (self.step, self.zero))
        return step * ((x / step + zero).clamp(self.qn, self.qp).round() - zero)


class Deployed(nn.Module):
    """(images, mask) -> (pred_logits, pred_boxes), a copy of `model` without state of quantisers: weights are on their grid,
    activations pass `FixedQuantizer`; form "integer": products on integers, see `q_detr.integer`. products: how many."""

    def __init__(self, model: DETR, *, form: str = "simulated"):
        super().__init__()
        if form not in FORMATS:
            raise ValueError(f"format={form!r}, allowed: {', '.join(FORMATS)}")
        self.model, qdq = copy.deepcopy(model).eval(), form == "qdq"
        self.products = integers_(self.model) if form == "integer" else 0
        for layer, weight, quantizer in quantised_weights(self.model).values():
            fixed: nn.Module = nn.Identity()
            if qdq and quantizer.bits == 8:
                fixed = StoredWeight(weight, quantizer, as_node=isinstance(layer, nn.Conv2d))
            with torch.no_grad():
                weight.copy_(quantizer(weight))
            setattr(layer, "in_proj_quant" if isinstance(layer, Attention) else "weight_quant", fixed)
        for layer in list(self.model.modules()):
            for name, q in list(layer.named_children()):
                if isinstance(q, LSQQuantizer):
                    setattr(layer, name, FixedQuantizer(q, qdq=qdq))

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(images, mask)
        return out["pred_logits"], out["pred_boxes"]


def example(sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """A padded batch of random images of these sizes and its mask."""
    g = torch.Generator().manual_seed(0)
    return pad_images([torch.randn(3, *size, generator=g) for size in sizes])


@torch.no_grad()
def export_onnx(
    model: DETR, path: str | Path, *, form: str = "simulated", about: Mapping[str, Any] | None = None
) -> str:
    """Write an ONNX file with its weights inside and `about` in its metadata. Returns what is quantised in it, in words."""
    import onnx

    quiet()
    deployed = Deployed(model, form=form).eval()
    batch, height, width = (torch.export.Dim(n, min=lo) for n, lo in (("batch", 1), ("height", 64), ("width", 64)))
    shapes = ({0: batch, 2: height, 3: width}, {0: batch, 1: height, 2: width})
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*axis name.*will not be used"
        )  # the mask shares them with the images
        # strict: the other tracer turns len(images) into a constant; what convolutions on integers need of a free size is
        # checked when the traced program runs, not proved when it is traced
        program = torch.export.export(
            deployed,
            example(SIZES[0]),
            dynamic_shapes=shapes,
            strict=True,
            prefer_deferred_runtime_asserts_over_guards=form == "integer",
        )
        torch.onnx.export(
            program, (), path, dynamo=True, input_names=["images", "mask"], output_names=list(OUTPUTS), external_data=False,
            verbose=False, custom_translation_table=translations(),
        )  # fmt: skip
    proto = onnx.load(path)
    onnx.helper.set_model_props(proto, {"about": json.dumps(dict(about or {}))})
    onnx.save(proto, path)
    fixed = [m for m in deployed.modules() if isinstance(m, FixedQuantizer)]
    if deployed.products:
        return f", {deployed.products} products on integers"
    return f", {sum(m.qdq for m in fixed)} of {len(fixed)} quantisers of activations as QuantizeLinear" if fixed else ""


@torch.no_grad()
def onnx_differences(model: DETR, path: str | Path) -> list[dict[str, Any]]:
    """Per batch of `SIZES` {"sizes", "pred_logits": (largest, mean), "pred_boxes": the same}: |onnxruntime - PyTorch| over the
    standard deviation of the output.

    A real-valued network differs by rounding. In a student a value that lies between two codes may take the other one, and
    what follows differs by a step: look at the mean."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    model, rows = model.eval(), []
    for sizes in SIZES:
        images, mask = example(sizes)
        found = session.run(list(OUTPUTS), {"images": images.numpy(), "mask": mask.numpy()})
        expected, row = model(images, mask), {"sizes": sizes}
        for name, value in zip(OUTPUTS, found, strict=True):
            gap = (torch.from_numpy(value) - expected[name]).abs() / expected[name].std()
            row[name] = (gap.max().item(), gap.mean().item())
        rows.append(row)
    return rows


def export(cfg: DictConfig) -> Path:
    """Writes cfg.out and, of a student, the packed file; both only if they agree with PyTorch. ValueError otherwise."""
    out = Path(cfg.out).expanduser()
    if out.suffix != ".onnx" or (cfg.tolerance is not None and cfg.tolerance <= 0):
        raise ValueError(f"out={cfg.out} must end in .onnx, tolerance={cfg.tolerance} be null or > 0")
    trained = load(cfg.weights)
    network: Any = trained.model
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.stem}.tmp.onnx")
    try:
        quantised = export_onnx(network, beside, form=cfg.format, about=trained.about)
        rows = onnx_differences(network, beside)
        for row in rows:
            gaps = "  ".join(f"{n} {row[n][0]:.2g} (mean {row[n][1]:.2g})" for n in OUTPUTS)
            print(f"images {row['sizes']}: largest difference to PyTorch / standard deviation: {gaps}")
        worst, allowed = (
            max(row[n][1] for row in rows for n in OUTPUTS),
            cfg.tolerance or (0.05 if quantised else 1e-4),
        )
        if not worst <= allowed:
            raise ValueError(
                f"the exported network differs by {worst:.2g} standard deviations on average, allowed: {allowed:g}"
            )
        os.replace(beside, out)
    finally:
        beside.unlink(missing_ok=True)
    print(f"{out}: {out.stat().st_size / 1e6:.3f} MB{quantised}")
    if quantised_weights(network):
        write_packed(trained, out.with_name(f"{out.stem}.packed.pt"))
    return out


@torch.no_grad()
def write_packed(trained: Loaded, target: Path) -> None:
    """Packs a student with what to know to use it, reads it back and compares. ValueError if the outputs are not equal bit for
    bit."""
    torch.save({**pack(trained.model), "config": trained.config, "about": trained.about}, target)
    images = example(SIZES[0])
    if not torch.equal(load(target).model(*images)["pred_logits"], trained.model(*images)["pred_logits"]):
        target.unlink()
        raise ValueError("the packed network does not give the outputs of the checkpoint")
    before = 4 * sum(p.numel() for p in trained.model.parameters())
    print(f"{target}: {target.stat().st_size / 1e6:.3f} MB, float32 parameters {before / 1e6:.3f} MB, outputs equal")


main = script("export", publishable(export))


if __name__ == "__main__":
    main()
