"""Prices and times on this CPU, each row against its baseline in one run. Writes bench.json, in about a minute.

python bench.py threads=1
python bench.py deploy=true backbone=resnet50 side=[800,1066] threads=1 out=results/deploy/bench.json      minutes

What the rows show: what distillation and simulated quantisation cost in training, and which float runtime is fastest for
inference. With deploy=true instead: bytes, memory and time of students on 8-bit integers beside every float form, whole and by
parts of the network; what the README's table is made from. Nothing here computes with 2 to 4 bits: CPUs cannot, and the paper's
OPs are not seconds."""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from common.data.detection import Scenes
from common.data.shapes import shape_scenes
from common.metrics.timing import Bench, Timing, interleaved
from common.scripts import script
from q_detr.building import build_real, build_student
from q_detr.data import Prepared
from q_detr.deployment import add_deployment
from q_detr.detr import DETR, pad_images
from q_detr.distribution_rectification import drd_loss
from q_detr.export import OUTPUTS, export_onnx
from q_detr.set_prediction import SetCriterion, giou

TINY = {
    "backbone": "tiny", "queries": 8, "dim": 48, "heads": 4, "ffn": 128, "encoder_layers": 1, "decoder_layers": 2, "dropout": 0.0
}  # fmt: skip


def training_steps(batch: int, rounds: int) -> dict[str, Timing]:
    """Times of a step of the mini scale's networks, forward to gradients: the real-valued DETR, the LSQ+ student, Q-DETR."""
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

    calls = {
        "real": lambda: step(real), "lsq+": lambda: step(students["none"]), "drd": lambda: step(students["co_attn"], True)
    }  # fmt: skip
    return interleaved(calls, rounds=rounds, warmup=1)


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


def distillation_losses(batch: int = 2, queries: int = 100, dim: int = 256, layers: int = 6) -> dict[str, Timing]:
    """Times of `drd_loss` and of `plain_drd`, forward and backward. ValueError if they disagree."""
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
        raise ValueError(f"drd_loss {values[0].item()} is not the plain sum {values[1].item()}")
    calls = {
        "vectorised": lambda: drd_loss(ours, theirs, truth)[0].backward(),
        "loop": lambda: plain_drd(ours, theirs, truth).backward(),
    }
    return interleaved(calls, rounds=3, warmup=1)


def inference(backbone: str, height: int, width: int, *, rounds: int) -> dict[str, Timing]:
    """Times of a forward pass of one image: the real-valued DETR as it is, channels last and in onnxruntime; a 4-bit student,
    simulated."""

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
    with torch.inference_mode():
        return interleaved(passes, rounds=rounds, warmup=1)


def in_onnxruntime(model: DETR, images: Tensor, mask: Tensor) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, f"{folder}/model.onnx")
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options, providers=["CPUExecutionProvider"])
    feed = {"images": images.numpy(), "mask": mask.numpy()}
    return lambda: session.run(list(OUTPUTS), feed)


def bench(cfg: DictConfig) -> list[dict[str, Any]]:
    """Measures, prints, writes cfg.out and returns the rows."""
    if cfg.rounds < 1 or len(cfg.side) != 2 or min(cfg.side) < 64:
        raise ValueError(f"rounds={cfg.rounds} must be >= 1, side={list(cfg.side)} two numbers >= 64: height and width")
    warnings.filterwarnings("ignore", message=".*steps of a quantiser would start below")  # untrained: biases are 0
    table = Bench(cfg.out)
    what = f"DETR, {cfg.backbone}, {cfg.side[0]}x{cfg.side[1]}"
    if cfg.deploy:
        if not cfg.bits:
            raise ValueError("bits=[]: give the widths to measure, e.g. bits=[8,4]")
        torch.manual_seed(0)
        real, options = build_real("detr", num_classes=91, backbone=cfg.backbone), {"compiled": cfg.compiled}
        with tempfile.TemporaryDirectory() as folder:
            image = torch.randn(1, 3, *cfg.side)
            add_deployment(table, what, real, image, Path(folder), widths=cfg.bits, rounds=cfg.rounds, **options)
        return table.write()
    prices(table, what, cfg)
    return table.write()


def prices(table: Bench, what: str, cfg: DictConfig) -> None:
    b = cfg.batch_size
    t = training_steps(b, cfg.rounds)
    name = "training step of the tiny DETR: "
    table.add(f"{name}Q-DETR (DA, FQM, teacher) against LSQ+ student", t["drd"], t["lsq+"], batch=b)
    table.add(f"{name}LSQ+ student against real-valued", t["lsq+"], t["real"], batch=b)
    t = distillation_losses()
    table.add(
        "L_DRD, 100 queries, 6 layers, with gradients: drd_loss against a plain loop",
        t["vectorised"],
        t["loop"],
        batch=2,
    )
    t = inference(cfg.backbone, *cfg.side, rounds=cfg.rounds)
    floats = {k: v for k, v in t.items() if "bit" not in k}
    best = min(floats, key=lambda k: floats[k].median)
    table.add(f"{what}: real-valued eager against the best float ({best})", t["eager"], floats[best])
    for runtime in [n for n in floats if n != "eager"]:
        table.add(f"{what}: {runtime} against eager", t[runtime], t["eager"])
    table.add(f"{what}: 4 bit, simulated, against real-valued eager", t["4 bit, simulated"], t["eager"])


main = script("bench", bench)


if __name__ == "__main__":
    main()
