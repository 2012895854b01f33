"""Speed of a binary 3x3 convolution from packed bits against float convolutions on this CPU. Writes bench.json; a minute.

python bench.py threads=1

Interleaved rounds, medians with quartiles; ratio = baseline / ours; nothing is asserted. The baseline is the fastest float
convolution of the same shape: eager, channels_last, or bfloat16 channels_last.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from omegaconf import DictConfig

from common.metrics.timing import Bench, interleaved
from common.quant.pack import binary_conv2d, pack_signs
from common.scripts import script

SHAPES = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels and side of the four stages of ResNet-18 at 224 x 224


def calls(channels: int, side: int) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """({ours}, {float convolutions}) of one shape. RuntimeError if the packed result is not the float one."""
    x, w = torch.randn(1, channels, side, side).sign(), torch.randn(channels, channels, 3, 3).sign()
    packed, weight = pack_signs(x.permute(0, 2, 3, 1)), pack_signs(w.permute(0, 2, 3, 1))
    last = x.contiguous(memory_format=torch.channels_last), w.contiguous(memory_format=torch.channels_last)
    half = last[0].bfloat16(), last[1].bfloat16()
    result = binary_conv2d(packed, weight, channels, padding=1, backend="numba").permute(0, 3, 1, 2)
    if not torch.equal(result.float(), F.conv2d(x, w, padding=1)):
        raise RuntimeError(f"the packed convolution of {channels} channels is not the float one")

    def convolve(bits: torch.Tensor) -> torch.Tensor:
        return binary_conv2d(bits, weight, channels, padding=1, backend="numba")

    ours = {
        "packed input": lambda: convolve(packed),
        "packing included": lambda: convolve(pack_signs(x.permute(0, 2, 3, 1))),
    }
    return ours, {
        "float eager": lambda: F.conv2d(x, w, padding=1),
        "float channels_last": lambda: F.conv2d(*last, padding=1),
        "bf16 channels_last": lambda: F.conv2d(*half, padding=1),
    }


@torch.inference_mode()
def bench(out: str | Path, *, rounds: int, shapes: tuple[tuple[int, int], ...] = SHAPES) -> list[dict]:
    """Writes `out` and returns its rows: two per shape."""
    table = Bench(out)
    for channels, side in shapes:
        ours, floats = calls(channels, side)
        times = interleaved({**ours, **floats}, rounds=rounds)
        best = min(floats, key=lambda name: times[name].median)
        for name in ours:
            label = f"3x3 convolution, {channels} channels, {side}x{side}, {name}"
            table.add(label, times[name], times[best], baseline_is=best)
    return table.write()


@script("bench")
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    bench(cfg.out, rounds=cfg.rounds)


if __name__ == "__main__":
    main()
