"""Images per second with and without pooling: the published network, its transformer alone, and onnxruntime.

python bench.py [batches=[1,8]] [threads=2] [out=bench.json]

Random weights: the number of tokens does not depend on them. Interleaved rounds, medians with quartiles. `ours` is APP + ATP,
`baseline` the same weights and runtime without pooling. `share`: of the time that the multiply-accumulates saved would save,
how much is saved, 1 - ours / baseline over 1 - MACs / MACs without pooling."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig

from ap_fer.checkpoint import PUBLISHED
from ap_fer.counts import measure
from ap_fer.export import export
from ap_fer.model import APViT
from common.metrics.timing import Bench, interleaved
from common.scripts import script

NONE: dict = {"app": {"keep": None}, "atp": {"rate": 1.0, "start": 0}}


def onnx_call(model: APViT, folder: Path, name: str, x: torch.Tensor, threads: int) -> Callable[[], object]:
    import onnxruntime

    export(model, folder / f"{name}.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])
    images = x.numpy()
    return lambda: session.run(None, {"images": images})


def torch_call(module: torch.nn.Module, inputs: torch.Tensor) -> Callable[[], object]:
    def run() -> None:
        module(inputs)
        if inputs.is_cuda:
            torch.cuda.synchronize()

    return run


@torch.no_grad()
def bench(cfg: DictConfig, device: torch.device) -> list[dict]:
    """Measures, prints, writes cfg.out and returns the rows: milliseconds with both poolings (ours) and without (baseline)."""
    torch.manual_seed(0)
    pooled, dense = APViT().eval(), APViT(**NONE).eval()
    dense.load_state_dict(pooled.state_dict())
    counts = [measure(**setting) for setting in (PUBLISHED, NONE)]
    ideal = {
        part: 1 - counts[0][key] / counts[1][key] for part, key in (("transformer", "macs_vit"), ("whole", "macs"))
    }
    table = Bench(cfg.out)
    print(f"multiply-accumulates saved: transformer {ideal['transformer']:.1%}, whole network {ideal['whole']:.1%}")
    for batch in cfg.batches or ([1, 64, 256] if device.type == "cuda" else [1, 8]):
        x, calls = torch.randn(batch, 3, 112, 112), {}
        with tempfile.TemporaryDirectory() as folder:
            if device.type == "cpu":
                for name, model in (("pooled", pooled), ("dense", dense)):
                    calls[f"onnxruntime {name}"] = onnx_call(model, Path(folder), name, x, torch.get_num_threads())
            x, features = x.to(device), torch.randn(batch, 256, 14, 14, device=device)
            for name, model in (("pooled", pooled.to(device)), ("dense", dense.to(device))):
                calls |= {f"whole {name}": torch_call(model, x), f"transformer {name}": torch_call(model.vit, features)}  # type: ignore[arg-type]
            times = interleaved(calls, rounds=cfg.rounds, seconds=cfg.seconds)
        for what in dict.fromkeys(name.rsplit(" ", 1)[0] for name in calls):
            ours, baseline, least = times[f"{what} pooled"], times[f"{what} dense"], ideal.get(what, ideal["whole"])
            share = (1 - ours.median / baseline.median) / least
            table.add(f"{what}, APP + ATP against no pooling", ours, baseline, batch=batch, ideal=least, share=share)
            print(f"{'':4s}{share:.0%} of the ideal saving of {least:.1%}")
    return table.write()


@script("bench")
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    bench(cfg, fabric.device)


if __name__ == "__main__":
    main()
