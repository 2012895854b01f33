"""Speed of a binary 3x3 convolution from packed bits against float convolutions on this CPU. Writes bench.json; about 30 s.

python bench.py
"""

import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from common import runs
from common.quant.pack import binary_conv2d, pack_signs

SHAPES = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels and side of the four stages of ResNet-18 at 224 x 224


def seconds(run, *, budget: float = 1.0) -> float:
    """Median time of one call after a warm-up."""
    run()
    times, end = [], time.perf_counter() + budget
    while not times or (time.perf_counter() < end and len(times) < 200):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


@torch.inference_mode()
def main() -> None:
    rows = []
    for channels, side in SHAPES:
        x = torch.randn(1, channels, side, side).sign()
        w = torch.randn(channels, channels, 3, 3).sign()
        packed = pack_signs(x.permute(0, 2, 3, 1)), pack_signs(w.permute(0, 2, 3, 1))
        last = x.contiguous(memory_format=torch.channels_last), w.contiguous(memory_format=torch.channels_last)
        half = last[0].bfloat16(), last[1].bfloat16()
        result = binary_conv2d(*packed, channels, padding=1, backend="numba").permute(0, 3, 1, 2)
        if not torch.equal(result.float(), F.conv2d(x, w, padding=1)):
            raise RuntimeError(f"the packed convolution of {channels} channels is not the float one")
        ours = seconds(lambda p=packed, c=channels: binary_conv2d(*p, c, padding=1, backend="numba"))
        baselines = {
            "float eager": seconds(lambda a=x, b=w: F.conv2d(a, b, padding=1)),
            "float channels_last": seconds(lambda p=last: F.conv2d(*p, padding=1)),
            "bf16 channels_last": seconds(lambda p=half: F.conv2d(*p, padding=1)),
        }
        with_packing = seconds(
            lambda a=x, b=packed[1], c=channels: binary_conv2d(
                pack_signs(a.permute(0, 2, 3, 1)), b, c, padding=1, backend="numba"
            )
        )
        best = min(baselines, key=baselines.get)  # type: ignore[arg-type]
        for name, mine in (("packed input", ours), ("packing included", with_packing)):
            rows.append({
                "name": f"3x3 convolution, {channels} channels, {side}x{side}, {name}", "ours": mine * 1e3,
                "baseline": baselines[best] * 1e3,
                "ratio": baselines[best] / mine, "unit": f"ms (baseline: best float, {best})", "threads": torch.get_num_threads(),
                "batch": 1, "isa": torch.backends.cpu.get_cpu_capability(), "machine": runs.provenance()["machine"],
            })  # fmt: skip
            print(
                f"{rows[-1]['name']:70s} {mine * 1e3:8.3f} ms   best float {baselines[best] * 1e3:8.3f} ms "
                f"({best})   x{rows[-1]['ratio']:.2f}"
            )
    (Path(__file__).parent / "bench.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
