"""Export a checkpoint as ONNX (ordinary convolutions) and as a packed file with one bit per binary weight; both are checked.

python export.py weights=runs/default/dcp_ggn/seed0/last.ckpt out=model.onnx packed=model.packed.pt

evaluate.py and predict.py read the packed file as they read a checkpoint.
"""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from common.loop import Loaded
from common.onnx_export import export_onnx
from common.quant.binary import binary_sign
from common.quant.pack import pack_signs
from common.scripts import script
from dcp_nas.checkpoint import NETWORK, PACKED, load
from dcp_nas.operations import BinaryConv2d


@torch.no_grad()
def deploy_(network: nn.Module) -> nn.Module:
    """Replace every 1-bit convolution by nn.Conv2d with the weights scale o sign(w), in place; evaluation mode."""
    for parent in list(network.modules()):
        for name, conv in list(parent.named_children()):
            if isinstance(conv, BinaryConv2d):
                plain = nn.Conv2d(
                    conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,  # type: ignore[arg-type]
                    conv.groups, bias=False,
                )  # fmt: skip
                plain.weight.copy_(conv.scale() * binary_sign(conv.weight))
                setattr(parent, name, plain.to(conv.weight.device))
    return network.eval()


@torch.no_grad()
def pack(trained: Loaded) -> dict[str, Any]:
    """Content of a packed file: signs as bits, scales, everything else as float32, and how to rebuild the network."""
    binary = {name: m for name, m in trained.model.named_modules() if isinstance(m, BinaryConv2d)}
    own = tuple(f"{name}." for name in binary)
    return {
        "format": PACKED, "about": trained.about, "config": {key: trained.config[key] for key in NETWORK},
        "signs": {n: pack_signs(m.weight.flatten()) for n, m in binary.items()},
        "scales": {n: m.scale().flatten().clone() for n, m in binary.items()},
        "model": {k: v for k, v in trained.model.state_dict().items() if not own or not k.startswith(own)},
    }  # fmt: skip


@torch.no_grad()
def write_packed(trained: Loaded, target: Path, *, tolerance: float) -> float:
    """Writes `target` and returns how far its network is from the one packed, relative to the largest output. ValueError, and no
    file, above `tolerance`."""
    about, beside = trained.about, target.with_name(f".{target.name}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    x = torch.randn(2, about["channels"], about["size"], about["size"], generator=torch.Generator().manual_seed(0))
    try:
        torch.save(pack(trained), beside)
        expected = trained.model(x)
        worst = ((load(beside).model(x) - expected).abs().max() / expected.abs().max()).item()
        if not worst <= tolerance:
            raise ValueError(
                f"the packed network differs by {worst:.2g} of its largest output, allowed: tolerance={tolerance:g}"
            )
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    return worst


def export(cfg: DictConfig) -> dict[str, float]:
    """Writes cfg.out and cfg.packed (null: none); returns sizes in bytes and differences. See configs/export.yaml."""
    if cfg.tolerance <= 0:
        raise ValueError(f"tolerance={cfg.tolerance} must be positive")
    trained, out = load(cfg.weights), Path(cfg.out).expanduser()
    about = trained.about
    image = torch.zeros(1, about["channels"], about["size"], about["size"])
    found = {"checkpoint_bytes": sum(v.numel() * v.element_size() for v in trained.model.state_dict().values())}
    if cfg.packed:
        packed = Path(cfg.packed).expanduser()
        found["packed"] = write_packed(trained, packed, tolerance=cfg.tolerance)
        found["packed_bytes"] = packed.stat().st_size
    deployed = deploy_(copy.deepcopy(trained.model))
    found["onnx"] = export_onnx(deployed, image, out, about=about, tolerance=cfg.tolerance)
    found["onnx_bytes"] = out.stat().st_size
    for name, value in found.items():
        print(f"{name:20s} {value:,}" if name.endswith("bytes") else f"{name:20s} differs by {value:.2g}")
    return found


main = script("export", export)


if __name__ == "__main__":
    main()
