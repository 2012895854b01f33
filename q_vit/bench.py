"""Time of a DeiT-T forward pass: float, quantised in evaluation; and of a training step.  python bench.py -> bench.json

What this shows is a price: simulated quantisation is slower than float. No low-bit kernel is used, no speed-up is claimed."""

import json
import statistics
import time
from pathlib import Path

import timm
import torch

from common.runs import provenance
from q_vit.model import first_forward
from q_vit.quantized_vit import quantize_vit


def interleaved(functions: dict, repeats: int) -> dict[str, float]:
    """Median seconds of every function, called in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(repeats + 1):
        for name, f in functions.items():
            start = time.perf_counter()
            f()
            if i:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 224, 224)
    real = timm.create_model("deit_tiny_patch16_224").eval()
    students = {p: quantize_vit(real, bits=4, preset=p) for p in ("official", "deployable")}
    for student in students.values():
        first_forward(student, x)
        student.eval()

    def forward(model):
        with torch.inference_mode():
            model(x)

    def step(model):
        model.train()(x).sum().backward()
        model.zero_grad(set_to_none=True)

    passes = {"float": lambda: forward(real)} | {p: lambda m=m: forward(m) for p, m in students.items()}
    seconds = {"evaluation": interleaved(passes, 5)}
    passes = {"float": lambda: step(real), "official": lambda: step(students["official"])}
    seconds["training step"] = interleaved(passes, 2)
    machine = provenance()["machine"]
    rows = [
        {
            "name": f"DeiT-T {what}, 4 bit {name} against float eager", "ours": t, "baseline": own["float"],
            "ratio": own["float"] / t, "unit": "s", "threads": torch.get_num_threads(), "batch": len(x),
            "isa": torch.backends.cpu.get_cpu_capability(), "machine": machine["cpu"],
        }
        for what, own in seconds.items() for name, t in own.items() if name != "float"
    ]  # fmt: skip
    Path("bench.json").write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(f"{row['name']:60s} {row['ours']:.3f} s, float {row['baseline']:.3f} s, ratio {row['ratio']:.2f}")


if __name__ == "__main__":
    main()
