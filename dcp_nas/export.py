"""Export a checkpoint (or a packed file) as ONNX, with ordinary convolutions, and packed: one bit per binary weight, in the order
of the kernel that runs it. Both are checked.

python export.py weights=runs/default/dcp_ggn_do/seed0/last.ckpt out=model.onnx packed=model.packed.pt

evaluate.py, predict.py and bench.py take the packed file as they take a checkpoint; it runs on bits there (numba on a CPU).
"""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from common.hub import publishable
from common.loop import Loaded
from common.onnx_export import export_onnx
from common.quant.packed_conv import in_float_
from common.scripts import script
from dcp_nas.checkpoint import NETWORK, PACKED, load
from dcp_nas.deploy import deploy_, pack_


@torch.no_grad()
def pack(trained: Loaded) -> tuple[dict[str, Any], dict[str, str]]:
    """(content of a packed file: the network after `pack_` and how to rebuild it; where its 1-bit convolutions run)."""
    network = copy.deepcopy(trained.model)
    where = pack_(network)
    config = {key: trained.config[key] for key in NETWORK}
    return {"format": PACKED, "about": trained.about, "config": config, "model": network.state_dict()}, where


@torch.no_grad()
def write_packed(trained: Loaded, target: Path, *, tolerance: float) -> float:
    """Writes `target` and returns how far its network is from the one packed, relative to the largest output. ValueError, and no
    file, above `tolerance`."""
    about, beside = trained.about, target.with_name(f".{target.name}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    x = torch.randn(2, about["channels"], about["size"], about["size"], generator=torch.Generator().manual_seed(0))
    try:
        content, where = pack(trained)
        torch.save(content, beside)
        expected = trained.model(x)
        worst = ((load(beside).model(x) - expected).abs().max() / expected.abs().max()).item()
        if not worst <= tolerance:
            raise ValueError(
                f"the packed network differs by {worst:.2g} of its largest output, allowed: tolerance={tolerance:g}"
            )
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    if where:
        bits = sum(how == "bits" for how in where.values())
        print(f"1-bit convolutions: {bits} on bits, {len(where) - bits} in float (real-valued inputs, or depth-wise)")
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
    deployed = in_float_(deploy_(copy.deepcopy(trained.model)))
    found["onnx"] = export_onnx(deployed, image, out, about=about, tolerance=cfg.tolerance)
    found["onnx_bytes"] = out.stat().st_size
    for name, value in found.items():
        print(f"{name:20s} {value:,}" if name.endswith("bytes") else f"{name:20s} differs by {value:.2g}")
    return found


main = script("export", publishable(export))


if __name__ == "__main__":
    main()
