"""Times of DeiT-T: a forward pass float and quantised, and a training step; sizes of packed weights. Writes bench.json.

python bench.py threads=1

What this shows is a price: simulated quantisation is slower than float. No low-bit kernel is used, no speed-up is claimed."""

import torch
from omegaconf import DictConfig
from torch import nn

from common.metrics.timing import Bench, interleaved
from common.scripts import script
from q_vit.model import build_float, first_forward
from q_vit.packing import pack
from q_vit.quantized_vit import quantize_vit

NAME = "deit_tiny_patch16_224"


def bench(cfg: DictConfig) -> list[dict]:
    """Measures, prints, writes cfg.out and returns the rows."""
    torch.manual_seed(0)
    images, real = torch.randn(cfg.batch_size, 3, 224, 224), build_float(NAME, num_classes=1000).eval()
    students = {p: quantize_vit(real, bits=4, preset=p) for p in ("official", "deployable")}
    for student in students.values():
        first_forward(student, images)
        student.eval()

    def forward(model: nn.Module) -> None:
        with torch.inference_mode():
            model(images)

    def step(model: nn.Module) -> None:
        model.train()(images).sum().backward()
        model.zero_grad(set_to_none=True)

    table = Bench(cfg.out)
    calls = {"float": lambda: forward(real)} | {p: lambda m=m: forward(m) for p, m in students.items()}
    times = interleaved(calls, rounds=cfg.rounds, warmup=1)
    for preset in students:
        name = f"DeiT-T evaluation, 4 bit {preset} simulated vs float eager"
        table.add(name, times[preset], times["float"], batch=cfg.batch_size)
    packed = pack(students["deployable"])
    size = sum(t.numel() * t.element_size() for part in ("packed", "rest") for t in packed[part].values())
    calls = {"float": lambda: step(real), "official": lambda: step(students["official"])}
    times = interleaved(calls, rounds=max(3, cfg.rounds // 2), warmup=1)
    table.add("DeiT-T training step, 4 bit official vs float", times["official"], times["float"], batch=cfg.batch_size)
    floats = 4 * sum(p.numel() for p in real.parameters())
    table.add("DeiT-T file, 4 bit packed with steps vs float32", size / 1e6, floats / 1e6, unit="MB")
    return table.write()


main = script("bench", bench)


if __name__ == "__main__":
    main()
