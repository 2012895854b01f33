"""Prices and times on this CPU, each row against its baseline in one run.  python bench.py -> bench.json (about a minute)

python bench.py --deploy --backbone resnet50 --side 800 1066      the paper's network and size, more runtimes (many minutes)

What the rows show: what distillation and simulated quantisation cost in training, and which float or int8 runtime is fastest for
inference. Nothing here computes with 2 to 4 bits: CPUs cannot, and the paper's OPs are not seconds."""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from common.data.detection import Scenes
from common.data.shapes import shape_scenes
from common.runs import provenance
from q_detr.building import build_real, build_student
from q_detr.data import Prepared
from q_detr.detr import DETR, pad_images
from q_detr.distribution_rectification import drd_loss
from q_detr.export import OUTPUTS, export_onnx
from q_detr.set_prediction import SetCriterion, giou

TINY = {
    "backbone": "tiny", "queries": 8, "dim": 48, "heads": 4, "ffn": 128, "encoder_layers": 1, "decoder_layers": 2, "dropout": 0.0
}  # fmt: skip


def interleaved(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of every function, called in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(repeats + 1):
        for name, f in functions.items():
            start = time.perf_counter()
            f()
            if i:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def training_steps(batch: int = 16) -> dict[str, float]:
    """Seconds of a step of the mini scale's networks, forward to gradients: the real-valued DETR, the LSQ+ student, Q-DETR."""
    items = Prepared(Scenes(shape_scenes(batch, seed=0, sizes=(48,))))
    images, targets = zip(*(items[i] for i in range(batch)), strict=True)
    images, mask = pad_images(images)
    real = build_real("detr", num_classes=3, **TINY)
    teacher, criterion = build_real("detr", num_classes=3, **TINY).eval(), SetCriterion(3)
    students = {da: build_student(real, images, mask, quant={"bits": 2, "da": da}) for da in ("none", "co_attn")}

    def step(model: DETR, distil: bool = False) -> None:
        out = model.train()(images, mask)
        loss = sum(criterion(out, targets)[0].values())
        if distil:
            with torch.no_grad():
                theirs = teacher(images, mask)
            loss = loss + 2.5 * drd_loss(out, theirs, [t["boxes"] for t in targets])[0]
        loss.backward()  # type: ignore[union-attr]
        model.zero_grad(set_to_none=True)

    return interleaved(
        {
            "real": lambda: step(real),
            "lsq+": lambda: step(students["none"]),
            "drd": lambda: step(students["co_attn"], True),
        },
        8,
    )


def plain_drd(student: dict[str, Any], teacher: dict[str, Any], truth: list[Tensor], tau: float = 0.6) -> Tensor:
    """L_DRD by the letter of Eq. 10-15: one query, one object and one pair at a time."""
    distances = []
    for i, boxes in enumerate(truth):
        own, other = student["pred_boxes"][i].detach(), teacher["pred_boxes"][i]
        best = [max(float(giou(b[None], s[None])) for s in own) for b in boxes]
        for j, s in enumerate(own):
            if any(float(giou(b[None], s[None])) > tau * g for b, g in zip(boxes, best, strict=True)):
                scores = [2 * float(giou(s[None], t[None])) - 5 * float((s - t).abs().sum()) for t in other]
                k = max(range(len(scores)), key=scores.__getitem__)
                distances += [
                    torch.linalg.vector_norm(a[i, j] - b[i, k])
                    for a, b in zip(student["co_attended"], teacher["co_attended"], strict=True)
                ]
    return torch.stack(distances).mean()


def distillation_losses(batch: int = 2, queries: int = 100, dim: int = 256, layers: int = 6) -> dict[str, float]:
    """Seconds of `drd_loss` and of `plain_drd`, forward and backward. RuntimeError if they disagree."""
    g = torch.Generator().manual_seed(0)

    def outputs(grad: bool) -> dict[str, Any]:
        corners = torch.rand(batch, queries, 4, generator=g)
        boxes = torch.cat([corners[..., :2], 0.05 + 0.3 * corners[..., 2:]], dim=-1)
        return {
            "pred_boxes": boxes,
            "co_attended": torch.randn(layers, batch, queries, dim, generator=g).requires_grad_(grad),
        }

    ours, theirs = outputs(True), outputs(False)
    truth = [theirs["pred_boxes"][i, :7] for i in range(batch)]
    values = drd_loss(ours, theirs, truth)[0], plain_drd(ours, theirs, truth)
    if not torch.allclose(*values, rtol=1e-5):
        raise RuntimeError(f"drd_loss {values[0].item()} is not the plain sum {values[1].item()}")
    return interleaved(
        {
            "vectorised": lambda: drd_loss(ours, theirs, truth)[0].backward(),
            "loop": lambda: plain_drd(ours, theirs, truth).backward(),
        },
        3,
    )


def inference(backbone: str, height: int, width: int, *, deploy: bool = False) -> dict[str, float]:
    """Seconds of a forward pass of one image: the real-valued DETR as it is, channels last and in onnxruntime; a 4-bit student,
    simulated. deploy: also by torch.compile, and an 8-bit student with a step per tensor in onnxruntime, where part of its
    products run on int8."""

    def network() -> DETR:
        torch.manual_seed(0)
        return build_real("detr", num_classes=91, backbone=backbone).eval()

    real, last = network(), network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, mask = torch.randn(1, 3, height, width), torch.zeros(1, height, width, dtype=torch.bool)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    student = build_student(real, x, mask, quant={"bits": 4, "da": "co_attn"}).eval()
    passes: dict[str, Callable[[], Any]] = {
        "eager": lambda: real(x, mask), "channels last": lambda: last(channels_last, mask),
        "onnxruntime": in_onnxruntime(real, x, mask), "4 bit, simulated": lambda: student(x, mask),
    }  # fmt: skip
    if deploy:
        compiled = torch.compile(network())
        eight = build_student(
            real, x, mask, quant={"bits": 8, "quantizer": "lsq", "act_granularity": "per_tensor"}
        ).eval()
        passes["torch.compile"] = lambda: compiled(x, mask)
        passes["8 bit, onnxruntime"] = in_onnxruntime(eight, x, mask)
    with torch.inference_mode():
        return interleaved(passes, 4)


def in_onnxruntime(model: DETR, images: Tensor, mask: Tensor) -> Callable[[], Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, f"{folder}/model.onnx", qdq=True)
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options, providers=["CPUExecutionProvider"])
    feed = {"images": images.numpy(), "mask": mask.numpy()}
    return lambda: session.run(list(OUTPUTS), feed)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--side", type=int, nargs=2, default=(256, 320), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--deploy", action="store_true", help="also torch.compile, and 8 bit in onnxruntime (minutes)")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message=".*steps of a quantiser would start below")  # untrained: biases are 0
    rows: list[dict[str, Any]] = []

    def row(name: str, ours: float, baseline: float, batch: int) -> None:
        rows.append({
            "name": name, "ours": ours, "baseline": baseline, "ratio": baseline / ours, "unit": "s",
            "threads": torch.get_num_threads(), "batch": batch, "isa": torch.backends.cpu.get_cpu_capability(),
            "machine": provenance()["machine"]["cpu"],
        })  # fmt: skip

    t = training_steps()
    row("training step of the tiny DETR: Q-DETR (DA, FQM, teacher) against the LSQ+ student", t["drd"], t["lsq+"], 16)
    row("training step of the tiny DETR: LSQ+ student against real-valued", t["lsq+"], t["real"], 16)
    t = distillation_losses()
    row(
        "L_DRD, 100 queries, 6 layers, forward and backward: drd_loss against a plain loop",
        t["vectorised"],
        t["loop"],
        2,
    )
    what = f"DETR, {args.backbone}, {args.side[0]}x{args.side[1]}"
    t = inference(args.backbone, *args.side, deploy=args.deploy)
    floats = {k: v for k, v in t.items() if "bit" not in k}
    best = min(floats, key=floats.__getitem__)
    row(f"{what}: real-valued eager against the best float ({best})", t["eager"], floats[best], 1)
    for name in [n for n in floats if n != "eager"]:
        row(f"{what}: {name} against eager", t[name], t["eager"], 1)
    row(f"{what}: 4 bit, simulated, against real-valued eager", t["4 bit, simulated"], t["eager"], 1)
    if args.deploy:
        row(f"{what}: 8 bit in onnxruntime against the best float ({best})", t["8 bit, onnxruntime"], floats[best], 1)
    Path("bench.json").write_text(json.dumps(rows, indent=1) + "\n")
    for r in rows:
        print(f"{r['name']:84s} {r['ours']:8.4f} s  baseline {r['baseline']:8.4f} s  x{r['ratio']:.2f}")


if __name__ == "__main__":
    main()
