"""Speed ratios from one run: Gaussian filtering as matrix products, the shape look-up, and one exported network.
Writes bench.json.

python bench.py threads=1

Every row is {name, ours, baseline, ratio = baseline / ours, unit, threads, batch, isa, machine}; nothing is asserted.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import hydra
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from common.runs import provenance
from iqa_attack.export import export_onnx
from iqa_attack.fidelity import C1, C2, SSIM, grey
from iqa_attack.filters import gaussian_window
from iqa_attack.natural_scene_statistics import ggd_ratio, shape_of_ratio
from iqa_attack.nr_models import Scored
from iqa_attack.unique import Unique


def milliseconds(call: Callable[[], object], seconds: float) -> float:
    """Median time of a call over `seconds`, after one to warm up."""
    call()
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * sorted(times)[len(times) // 2]


def convolved_ssim(x: Tensor, y: Tensor) -> Tensor:
    """1 - SSIM as one writes it first: separable convolutions. Grey, replicate padding."""
    x, y = grey(x), grey(y)
    w = gaussian_window(11, 1.5).to(x)
    stack = F.pad(torch.cat([x, y, x * x, y * y, x * y]), (5, 5, 5, 5), mode="replicate")
    mx, my, xx, yy, xy = F.conv2d(F.conv2d(stack, w.view(1, 1, 1, -1)), w.view(1, 1, -1, 1)).chunk(5)
    cs = (2 * (xy - mx * my) + C2) / (xx - mx**2 + yy - my**2 + C2)
    return 1 - ((2 * mx * my + C1) / (mx**2 + my**2 + C1) * cs).mean((1, 2, 3))


def argmin_shape(ratio: Tensor) -> Tensor:
    """The grid search as the authors write it: argmin over all 9,801 shapes."""
    alpha = torch.arange(200, 10001, dtype=torch.float64) / 1000
    return alpha[(ggd_ratio(alpha) - ratio[:, None]).abs().argmin(1)]


def bench(cfg: DictConfig) -> list[dict]:
    """Measures, prints, writes cfg.out and returns the rows."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    common = {
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "machine": provenance()["machine"],
    }
    rows: list[dict] = []

    def row(name: str, ours: float, baseline: float, batch: int) -> None:
        rows.append(
            {"name": name, "ours": ours, "baseline": baseline, "ratio": baseline / ours, "unit": "ms", "batch": batch}
            | common
        )
        print(f"{name:70s} batch {batch:4d} {ours:9.3f} ms {baseline:9.3f} ms  x {baseline / ours:.2f}", flush=True)

    generator = torch.Generator().manual_seed(0)
    for batch, side in ((cfg.batch, 96), (1, 512)):
        x0 = torch.rand(batch, 3, side, side, generator=generator)
        x = (x0 + 0.01 * torch.randn(x0.shape, generator=generator)).clamp(0, 1).requires_grad_()
        distance = SSIM()
        if not torch.allclose(distance(x, x0), convolved_ssim(x, x0), atol=1e-5):
            raise ValueError("the two SSIM disagree")
        calls = [lambda f=f, x=x, x0=x0: torch.autograd.grad(f(x, x0).sum(), x) for f in (distance, convolved_ssim)]
        row(
            f"SSIM {side} x {side}, forward and backward: matrices vs convolutions",
            *(milliseconds(c, cfg.seconds) for c in calls),
            batch,
        )
    ratio = 1.2 + 2 * torch.rand(64, dtype=torch.float64, generator=generator)
    if not torch.equal(shape_of_ratio(ratio, "none"), argmin_shape(ratio)):
        raise ValueError("the two searches disagree")
    times = [milliseconds(c, cfg.seconds) for c in (lambda: shape_of_ratio(ratio, "none"), lambda: argmin_shape(ratio))]
    row("shape of a generalised Gaussian: bisection vs argmin", *times, 64)
    model = Scored(Unique(backbone="small"), 0.0, 1.0).eval()
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        export_onnx(model, Path(scratch) / "m.onnx", size=96, tolerance=1e-3)
        session = onnxruntime.InferenceSession(
            str(Path(scratch) / "m.onnx"), options, providers=["CPUExecutionProvider"]
        )
        x = torch.rand(cfg.batch, 3, 96, 96, generator=generator)
        last = x.to(memory_format=torch.channels_last)
        faster = min(milliseconds(lambda v=v: model(v), cfg.seconds) for v in (x, last))
        row("UNIQUE, small trunk: onnxruntime vs the faster of eager and channels_last",
            milliseconds(lambda: session.run(None, {"images": x.numpy()}), cfg.seconds), faster, cfg.batch)  # fmt: skip
    Path(cfg.out).write_text(json.dumps(rows, indent=1) + "\n")
    print(f"written to {cfg.out}")
    return rows


@hydra.main(version_base="1.3", config_path="configs", config_name="bench")
def main(cfg: DictConfig) -> None:
    bench(cfg)


if __name__ == "__main__":
    main()
