"""Export a checkpoint, published weights or a packed file: packed (one bit per binary weight, in the order of the kernel that
runs it), and a classifier as ONNX, too (ordinary convolutions).

python export.py weights=runs/default/drelu_official/seed0/last.ckpt out=model.onnx        also writes model.packed.pt
python export.py weights=detector.ckpt out=detector.packed.pt                              packed only
python export.py weights=model.packed.pt out=again.onnx                                    from bits

evaluate.py, predict.py and bench.py take the packed file as they take a checkpoint; it runs on bits there (with numba on a CPU).
"""

import copy
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from common.hub import publishable
from common.onnx_export import export_onnx
from common.quant.packed_conv import in_float_
from common.scripts import script
from rbonn.binary_conv import binary_layers
from rbonn.checkpoint import load
from rbonn.deploy import deploy_, pack, pack_


def outputs(network: Any, images: Tensor) -> list[Tensor]:
    """What is compared: the logits, or of a detector the pyramid and the proposals before any threshold."""
    if not isinstance(network, FasterRCNN):
        return [network(images)]
    features = list(network.backbone(images).values())
    return [*features, *(x for level in network.rpn.head(features) for x in level)]


def worst_difference(a: nn.Module, b: nn.Module, images: Tensor) -> float:
    """Largest difference of two networks' outputs, relative to the largest entry of each."""
    pairs = zip(outputs(a, images), outputs(b, images), strict=True)
    return max(float((x - y).abs().max() / x.abs().max().clamp_min(1e-12)) for x, y in pairs)


@torch.no_grad()
def export(cfg: DictConfig, fabric: Fabric) -> dict[str, float]:
    """Writes cfg.out and the packed file beside it, and checks both. Returns sizes in bytes and largest differences.

    ValueError, and no file, if one differs by more than cfg.tolerance (relative to the largest output)."""
    out = Path(cfg.out).expanduser()
    trained = load(cfg.weights, zero=1)
    about, detector = trained.about, trained.about["task"] == "detect"
    if detector and out.suffix == ".onnx":
        raise ValueError(f"out={cfg.out}: a detector is exported packed only, give out=<name>.packed.pt")
    packed = out.with_name(f"{out.name.removesuffix('.onnx').removesuffix('.packed.pt')}.packed.pt")
    size = cfg.size or (96 if detector else about["size"])
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(2, about["channels"], size, size, generator=generator)
    packed_already = not binary_layers(trained.model)
    deployed = in_float_(copy.deepcopy(trained.model)) if packed_already else deploy_(copy.deepcopy(trained.model))
    on_bits = copy.deepcopy(trained.model)
    where = Counter(pack_(on_bits).values())
    found = {
        "checkpoint_bytes": sum(v.numel() * v.element_size() for v in trained.model.state_dict().values()),
        "deployed": worst_difference(trained.model, deployed, example),
    }
    packed.parent.mkdir(parents=True, exist_ok=True)
    beside = packed.with_name(f".{packed.name}.tmp")
    try:
        torch.save(pack(on_bits, trained.config, about), beside)
        found |= {
            "packed": worst_difference(trained.model, load(beside).model, example),
            "packed_bytes": beside.stat().st_size,
        }
        if wrong := {k: v for k, v in found.items() if not k.endswith("bytes") and not v <= cfg.tolerance}:
            raise ValueError(
                f"exported outputs differ from the network by more than tolerance={cfg.tolerance:g}: {wrong}. A value that "
                "rounding moves over the threshold of a sign differs by more than rounding; a larger tolerance= accepts that"
            )
        if not detector:
            shape = torch.zeros(1, about["channels"], size, size)
            found["onnx"] = export_onnx(deployed, shape, out, about=about | {"size": size}, tolerance=cfg.tolerance)
            found["onnx_bytes"] = out.stat().st_size
        os.replace(beside, packed)
    finally:
        beside.unlink(missing_ok=True)
    if where:
        print(
            f"binary convolutions: {where['bits']} on bits, {where['float']} in float (real inputs, sign(0) = 0 or depth-wise)"
        )
    print("written: " + ", ".join(str(f) for f in ((packed,) if detector else (out, packed))))
    for name, value in found.items():
        print(f"{name:20s} {value:,}" if name.endswith("bytes") else f"{name:20s} differs by {value:.2g}")
    return found


main = script("export", publishable(export))


if __name__ == "__main__":
    main()
