"""Speed ratios from one run: Gaussian filtering as matrix products, the shape look-up, one exported network. Writes bench.json.

python bench.py threads=1

Interleaved rounds, medians with quartiles; ratio = baseline / ours; nothing is asserted.
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from common.metrics.timing import Bench, interleaved
from common.onnx_export import export_onnx
from common.scripts import script
from iqa_attack.fidelities.fidelity import C1, C2, SSIM, grey
from iqa_attack.fidelities.filters import gaussian_window
from iqa_attack.quality_models.calibration import Calibration, Scored
from iqa_attack.quality_models.natural_scene_statistics import ggd_ratio, shape_of_ratio
from iqa_attack.quality_models.unique import Unique


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


def filtering(table: Bench, batch: int, rounds: int, generator: torch.Generator) -> None:
    """SSIM forward and backward, at two sizes. ValueError if the two formulations disagree."""
    for n, side in ((batch, 96), (1, 512)):
        x0 = torch.rand(n, 3, side, side, generator=generator)
        x = (x0 + 0.01 * torch.randn(x0.shape, generator=generator)).clamp(0, 1).requires_grad_()
        both = {"matrices": SSIM(), "convolutions": convolved_ssim}
        if not torch.allclose(*(f(x, x0) for f in both.values()), atol=1e-5):
            raise ValueError("the two SSIM disagree")
        calls = {k: lambda f=f, x=x, x0=x0: torch.autograd.grad(f(x, x0).sum(), x) for k, f in both.items()}
        times = interleaved(calls, rounds=rounds)
        name = f"SSIM {side} x {side}, forward and backward: matrices vs convolutions"
        table.add(name, times["matrices"], times["convolutions"], batch=n)


def shapes(table: Bench, rounds: int, generator: torch.Generator) -> None:
    """The look-up of shapes. ValueError if the two searches disagree."""
    ratio = 1.2 + 2 * torch.rand(64, dtype=torch.float64, generator=generator)
    if not torch.equal(shape_of_ratio(ratio, "none"), argmin_shape(ratio)):
        raise ValueError("the two searches disagree")
    calls = {"bisection": lambda: shape_of_ratio(ratio, "none"), "argmin": lambda: argmin_shape(ratio)}
    times = interleaved(calls, rounds=rounds)
    table.add("shape of a generalised Gaussian: bisection vs argmin", times["bisection"], times["argmin"], batch=64)


@torch.no_grad()
def deployment(table: Bench, batch: int, rounds: int, generator: torch.Generator) -> None:
    """One network with its logistic: onnxruntime against the faster of eager and channels_last."""
    import onnxruntime

    model = Scored(Unique(backbone="small"), Calibration(0.0, 1.0, 1.0, 0, "none")).eval()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    x = torch.rand(batch, 3, 96, 96, generator=generator)
    last = x.to(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "m.onnx"
        export_onnx(model, x[:1], file, about={}, tolerance=1e-3, outputs=("scores",))
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        calls = {
            "onnxruntime": lambda: session.run(None, {"images": x.numpy()}), "eager": lambda: model(x),
            "channels_last": lambda: model(last),
        }  # fmt: skip
        times = interleaved(calls, rounds=rounds)
    best = min(times["eager"], times["channels_last"])
    name = "UNIQUE, small trunk: onnxruntime vs the faster of eager and channels_last"
    table.add(name, times["onnxruntime"], best, batch=batch)


def bench(cfg: DictConfig) -> list[dict]:
    """Measures, prints, writes cfg.out and returns the rows."""
    table, generator = Bench(cfg.out), torch.Generator().manual_seed(0)
    filtering(table, cfg.batch_size, cfg.rounds, generator)
    shapes(table, cfg.rounds, generator)
    deployment(table, cfg.batch_size, cfg.rounds, generator)
    return table.write()


main = script("bench", bench)


if __name__ == "__main__":
    main()
