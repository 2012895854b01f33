"""Networks as ONNX files that say what they need, checked against torch before they are written."""

import contextlib
import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def export_onnx(
    model: nn.Module,
    image: Tensor,
    out: str | Path,
    *,
    about: Mapping[str, Any],
    tolerance: float = 1e-4,
    batches: Sequence[int] = (1, 5),
    outputs: Sequence[str] = ("logits",),
    translations: Mapping[Any, Any] | None = None,
) -> float:
    """Writes model(images (B, C, H, W)) -> outputs with a dynamic batch, `about` as JSON in its metadata (`read_about`); returns
    the largest difference between onnxruntime and torch.

    image: one example (1, C, H, W). translations: what custom operators become, see torch.onnx.export.
    Checked on random batches of sizes `batches`; ValueError, and no file, above `tolerance`."""
    quiet()
    model = model.cpu().eval()

    def write(file: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # the exporter reports its progress
            torch.onnx.export(
                model, (image.repeat(2, 1, 1, 1),), file, input_names=["images"], output_names=list(outputs),
                dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, external_data=False, verbose=False,
                custom_translation_table=None if translations is None else dict(translations),
            )  # fmt: skip

    return write_checked(Path(out).expanduser(), write, model, image, about=about, tolerance=tolerance, batches=batches)


def write_checked(
    out: Path, write: Callable[[Path], Any], model: nn.Module, image: Tensor, *, about: Mapping[str, Any], tolerance: float,
    batches: Sequence[int],
) -> float:  # fmt: skip
    """Moves the file of `write(file)` to `out` with `about` in it, and returns its difference to the model on random batches;
    ValueError, and no file, above `tolerance`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.tmp.onnx")
    try:
        write(beside)
        write_about(beside, about)
        worst = difference(model, beside, image, batches)
        if not worst < tolerance:
            raise ValueError(f"onnxruntime differs from torch by {worst:.2g}, allowed: tolerance={tolerance:g}")
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
    return worst


def quiet() -> None:
    """Keeps the exporter from telling every node that it removes."""
    for name in ("onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.WARNING)


@torch.no_grad()
def difference(model: nn.Module, file: str | Path, image: Tensor, batches: Sequence[int]) -> float:
    """Largest absolute difference of all outputs on random images of the shape of `image` (1, C, H, W)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for batch in batches:
        images = torch.randn(batch, *image.shape[1:], generator=generator)
        expected = model(images)
        expected = expected if isinstance(expected, tuple | list) else (expected,)
        for found, wanted in zip(session.run(None, {"images": images.numpy()}), expected, strict=True):
            worst = max(worst, float(np.abs(found - wanted.numpy()).max()))
    return worst


def write_about(file: str | Path, about: Mapping[str, Any]) -> None:
    """Puts what is needed to use a network into the metadata of its ONNX file; takes the exporter's notes out."""
    import onnx

    proto = onnx.load(str(file))
    onnx.helper.set_model_props(proto, {"about": json.dumps(dict(about))})
    for noted in (*proto.graph.node, *proto.graph.value_info, *proto.graph.initializer):
        del noted.metadata_props[:]  # stack traces with paths of this machine, 2 kB each
    onnx.save(proto, str(file))


def read_about(file: str | Path) -> dict[str, Any]:
    """What an exported file says about its network: classes, channels, size, normalise, ... ValueError where it says nothing."""
    import onnx

    props = {p.key: p.value for p in onnx.load(str(file), load_external_data=False).metadata_props}
    if "about" not in props:
        raise ValueError(f"{file} was not written by export.py here: it does not say its classes and normalisation")
    return json.loads(props["about"])
