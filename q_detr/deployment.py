"""What 8-bit integers save: a DETR and its students as ONNX files, whole and in parts, timed beside every float form."""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.metrics.integer_deployment import dynamic_int8, peak_memory, time_integer, time_layer
from common.metrics.timing import Bench
from common.onnx_export import export_onnx
from common.quant.binary import RPReLU
from common.quant.integer_onnx import translations
from common.quant.packed_weights import payload
from q_detr.detr import DETR, ResNetBody
from q_detr.export import Deployed
from q_detr.packing import pack
from q_detr.quantized_detr import calibrate_student, quantize_detr

WHOLE = {"quantizer": "lsq", "act_granularity": "per_tensor", "weight_init": "per_channel"}
CALIBRATED = 320  # pixels of a side, at most, from which the steps are set: their values do not change the time


class Unpadded(nn.Module):
    """images (B, 3, H, W) without padding -> (logits, boxes); encode: -> the encoder's output (B, N, dim)."""

    def __init__(self, model: nn.Module, *, encode: bool = False):
        super().__init__()
        self.model, self.encode = model, encode

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        mask = torch.zeros_like(images[:, 0], dtype=torch.bool)
        if self.encode:
            return self.model.encode(images, mask)[0]  # type: ignore[operator]
        out = self.model(images, mask)
        return out["pred_logits"], out["pred_boxes"]


def students(real: DETR, images: Tensor, widths: Sequence[int]) -> dict[str, DETR]:
    """{"<b> bit": a calibrated student with a step per tensor, its slopes and shifts not 0, as training leaves them}."""
    found, generator = {}, torch.Generator().manual_seed(0)
    for bits in widths:
        found[f"{bits} bit"] = student = quantize_detr(real, bits=bits, **WHOLE)  # type: ignore[arg-type]
        with torch.no_grad():
            for m in student.modules():
                for t in m.parameters(recurse=False) if isinstance(m, RPReLU | nn.PReLU) else ():
                    t.copy_(0.1 * torch.randn(t.shape, generator=generator))
        small = images[..., :CALIBRATED, :CALIBRATED]
        calibrate_student(student, small, torch.zeros_like(small[:, 0], dtype=torch.bool))
        student.eval()
    return found


def parts(model: DETR) -> dict[str, nn.Module]:
    """{what: a network from a tensor to a tensor}, in the order in which an image passes them: stem and stages of the backbone,
    projection and encoder, decoder and heads."""
    body: Any = model.backbone[0].body  # type: ignore[union-attr]
    found: dict[str, nn.Module] = {"backbone": body}
    if isinstance(body, ResNetBody):
        found = {"stem": nn.Sequential(body.conv1, body.bn1, body.relu, body.maxpool)}
        found |= {f"stage {i}": getattr(body, f"layer{i}") for i in range(1, 5)}
    behind = copy.deepcopy(model)
    behind.backbone[0].body = nn.Identity()  # type: ignore[union-attr]
    last = copy.deepcopy(behind)
    last.input_proj, last.transformer["encoder"].layers = nn.Identity(), nn.ModuleList()  # type: ignore[assignment]
    return found | {"encoder": Unpadded(behind, encode=True), "decoder": Unpadded(last)}


def write(network: nn.Module, image: Tensor, out: Path) -> Path:
    """An ONNX file, batch free. Random networks lie between two codes now and then: not compared."""
    logging.getLogger("onnxscript.optimizer").setLevel(
        logging.ERROR
    )  # a line for every Split of an attention's weights
    with torch.no_grad():
        export_onnx(network, image, out, about={}, batches=(), translations=translations())
    return out


def add_deployment(
    table: Bench, name: str, real: DETR, images: Tensor, folder: Path, *, widths: Sequence[int], rounds: int, compiled: bool
) -> None:  # fmt: skip
    """Adds the rows of one image (1, 3, H, W) with the threads of torch: bytes and peak memory of every form, milliseconds of the
    network and of its `parts`, those of the first width on integers against float32."""
    real, made = real.eval().requires_grad_(False), students(real, images, widths)
    files = {"onnxruntime fp32": write(Unpadded(real), images, folder / "fp32.onnx")}
    files["onnxruntime int8 dynamic"] = folder / "dynamic.onnx"
    dynamic_int8(files["onnxruntime fp32"], files["onnxruntime int8 dynamic"])
    deployed = {form: Deployed(student, form="integer").model for form, student in made.items()}
    files |= {form: write(Unpadded(m), images, folder / f"{form[0]}.onnx") for form, m in deployed.items()}
    floats = 4 * sum(p.numel() for p in real.parameters())
    sizes = {form: file.stat().st_size for form, file in files.items()}
    sizes |= {f"{form} packed": payload(pack(student)) for form, student in made.items()}
    for form, size in sizes.items():
        table.add(f"{name}, {form}, bytes", size, floats, unit="bytes", kind="bytes", form=form)
    peak = {form: peak_memory(file, images) for form, file in files.items()}
    for form, size in peak.items():
        table.add(
            f"{name}, {form}, peak memory", size, peak["onnxruntime fp32"], unit="bytes", kind="memory", form=form
        )
    with torch.inference_mode():
        time_integer(table, name, Unpadded(real), files, images, rounds=rounds, last=True, compiled=compiled)
    x, own = images, parts(next(iter(deployed.values())))
    for part, network in parts(real).items():
        pair = [write(m, x, folder / f"{form}.onnx") for form, m in (("part", own[part]), ("part_fp32", network))]
        time_layer(table, f"{name}, {part}", pair[0], pair[1], x, rounds=rounds)
        if part != "decoder":
            with torch.no_grad():
                x = network(x)
            x = x.transpose(1, 2).unsqueeze(2).contiguous() if x.ndim == 3 else x  # tokens as a map of one row
