"""Export a checkpoint as ONNX (ordinary convolutions) and as a packed file with one bit per binary weight.

python export.py weights=runs/default/drelu_official/seed0/last.ckpt     writes model.onnx and model.packed.pt
"""

import copy
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from rbonn.checkpoint import load_network
from rbonn.deploy import deploy_, load_packed, pack


@torch.no_grad()
def export(weights: str, target: Path, *, size: int = 224, tolerance: float = 1e-4) -> dict[str, float]:
    """Write target.onnx and (for our checkpoints) target.packed.pt, and check both against the network.

    size: image side for published checkpoints, ours know theirs. Returns file sizes in bytes and the largest differences of
    the outputs relative to the largest output. ValueError if one exceeds `tolerance`."""
    network, state = load_network(weights, zero=1)
    side, channels = (state["size"], state["channels"]) if state else (size, 3)
    x = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))
    expected = network(x)
    deployed = deploy_(copy.deepcopy(network))
    onnx = target.with_suffix(".onnx")
    torch.onnx.export(
        deployed, (x,), onnx, dynamo=True, input_names=["images"], output_names=["logits"], external_data=False, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
    )  # fmt: skip
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    found = {"deployed": deployed(x), "onnx": torch.from_numpy(session.run(None, {"images": x.numpy()})[0])}
    sizes = {
        "checkpoint_bytes": sum(v.numel() * v.element_size() for v in network.state_dict().values()),
        "onnx_bytes": onnx.stat().st_size,
    }
    if state is not None:
        packed = target.with_suffix(".packed.pt")
        torch.save(pack(deployed, state["config"], classes=state["classes"], channels=channels, size=side), packed)
        found["packed"] = load_packed(packed)(x)
        sizes["packed_bytes"] = packed.stat().st_size
    differences = {k: ((v - expected).abs().max() / expected.abs().max()).item() for k, v in found.items()}
    if wrong := {k: v for k, v in differences.items() if v > tolerance}:
        raise ValueError(f"exported outputs differ from the network by more than {tolerance:g}: {wrong}")
    return {**sizes, **differences}


@hydra.main(version_base="1.3", config_path="configs", config_name="export")
def main(cfg: DictConfig) -> None:
    target = Path(cfg.target) if cfg.target else Path(cfg.weights).with_name("model")
    for name, value in export(cfg.weights, target, size=cfg.size).items():
        print(f"{name:20s} {value:,}" if name.endswith("bytes") else f"{name:20s} differs by {value:.2g}")


if __name__ == "__main__":
    main()
