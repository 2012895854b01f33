"""Latency of flexible inference as ratios of one run: one branch, all branches, and a zero-filled fusion model that needs all.

python bench.py [vit.name=vit_small_patch16_224] [batch_size=1] [threads=2]

Interleaved rounds, medians with quartiles; weights are random, the time does not depend on them. Each network at its fastest of
eager and onnxruntime (fp32); ratio = baseline / ours; nothing is asserted.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from common.metrics.timing import Bench, interleaved
from common.onnx_export import export_onnx
from common.scripts import script
from fm_vit.baselines import ConcatFusion
from fm_vit.export import Deployed, one_set
from fm_vit.model import FMViT

MODALITIES = ["rgb", "depth", "ir"]


@torch.no_grad()
def bench(cfg: DictConfig) -> list[dict]:
    """Measures, prints, writes cfg.out and returns the rows."""
    import onnxruntime

    vit = OmegaConf.to_container(cfg.vit, resolve=True)
    networks = {
        "one branch, RGB": one_set(FMViT(MODALITIES, vit=vit), ["rgb"]),  # type: ignore[arg-type]
        "three branches": one_set(FMViT(MODALITIES, vit=vit), MODALITIES),  # type: ignore[arg-type]
        "zero-filled fusion, RGB": Deployed(ConcatFusion(MODALITIES, vit=vit), ["rgb"]).eval(),
    }
    height, width = networks["three branches"].model.branches["rgb"].trunk.patch_embed.img_size
    options, calls = onnxruntime.SessionOptions(), {}
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as scratch:
        for name, network in networks.items():
            images = torch.randn(cfg.batch_size, 3 * len(network.names), height, width)
            calls[f"{name}: eager"] = _call(network, images)
            file = Path(scratch) / f"{len(calls)}.onnx"
            export_onnx(network, torch.zeros(1, *images.shape[1:]), file, about={})
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            feed = {"images": images.numpy()}
            calls[f"{name}: onnxruntime"] = lambda s=session, f=feed: s.run(None, f)
        with torch.inference_mode():
            times = interleaved(calls, rounds=cfg.rounds)
    fastest = {n: min(t for k, t in times.items() if k.startswith(f"{n}:")) for n in networks}
    table = Bench(cfg.out)
    for name in ("one branch, RGB", "three branches"):
        table.add(
            f"{name} vs zero-filled fusion with RGB given",
            fastest[name],
            fastest["zero-filled fusion, RGB"],
            batch=cfg.batch_size,
        )
    table.add(
        "one branch: onnxruntime vs eager",
        times["one branch, RGB: onnxruntime"],
        times["one branch, RGB: eager"],
        batch=cfg.batch_size,
    )
    return table.write()


def _call(network: Deployed, images: Tensor) -> Callable[[], object]:
    return lambda: network(images)


main = script("bench", bench)


if __name__ == "__main__":
    main()
